//! What the wrapper is told through its map; shared by the kernel and the harness.

/// Bytes at the start of the frame that the wrapper writes anew for every packet.
///
/// They cover Ethernet, IPv6 and TCP without options (74), and no frame may be shorter. A multiple
/// of eight: they are copied as words.
pub const HEADERS_SIZE: usize = 80;

/// Every client address has 2^10 flows, each from a port of its own.
pub const PORT_BITS: u32 = 10;

/// The first port of every client: what varies lies above the listeners' ports.
pub const FIRST_PORT: u16 = 0x8000;

/// One kind of packet, of which the wrapper makes `flows` different ones.
///
/// A flow is a number: its low [`PORT_BITS`] bits choose the port, the rest is the low half of the
/// client's IPv4 address or the last 16 bits of its IPv6 address. Both fields are zero in
/// `headers`; so both words only have to be added to the sums behind the checksums.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Template {
    /// The start of the frame, Ethernet header first.
    pub headers: [u64; HEADERS_SIZE / 8],
    /// Length in bytes of the whole frame, at least [`HEADERS_SIZE`].
    pub frame_length: u32,
    /// How many flows there are, 1 to 2^26.
    pub flows: u32,
    /// Which flow comes next; the wrapper moves it on.
    pub next: u32,
    /// Added to `next` modulo `flows`. A stride without a common divisor visits all flows, and one
    /// near the golden section of `flows` leaves neither caches nor prefetchers a pattern.
    pub stride: u32,
    /// Offset of the 16 bits of the address that vary: in the source for requests, in the
    /// destination for replies. All offsets are below [`HEADERS_SIZE`].
    pub address: u16,
    /// Offset of the port that varies.
    pub port: u16,
    /// Offset of the IPv4 header checksum, 0 for IPv6.
    pub ip_checksum: u16,
    /// Offset of the TCP or UDP checksum.
    pub l4_checksum: u16,
    /// One's complement sum of the IPv4 header, in the byte order of the wire.
    pub ip_sum: u16,
    /// One's complement sum of pseudo header, TCP or UDP header and payload.
    pub l4_sum: u16,
    /// Keeps the size a multiple of eight.
    pub _padding: [u16; 2],
}
