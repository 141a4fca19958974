//! IPv6 (RFC 8200).

use bytemuck::{Pod, Zeroable};

use super::{Address, Be16, Be32};

/// The IPv6 header. Addresses are held as halves of an [`Address`], 4-byte aligned as on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Ipv6 {
    /// Version (4 bits), traffic class (8 bits), flow label (20 bits).
    pub version_class_label: Be32,
    /// What follows the 40 bytes of the header, bytes.
    pub payload_length: Be16,
    /// What kind of header follows.
    pub next_header: u8,
    /// Hop limit, hops.
    pub hop_limit: u8,
    /// Source address.
    pub source: [u32; 4],
    /// Destination address.
    pub destination: [u32; 4],
}

/// The head of a hop-by-hop, routing or destination options header (RFC 8200 section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Extension {
    /// What kind of header follows.
    pub next_header: u8,
    /// Length of this header in units of 8 bytes, not counting the first 8.
    pub length: u8,
}

/// The fragment header (RFC 8200 section 4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct FragmentHeader {
    /// What kind of header the reassembled packet continues with.
    pub next_header: u8,
    /// Zero.
    pub reserved: u8,
    /// Offset in units of 8 bytes (13 bits), reserved (2 bits), more fragments (1 bit).
    pub offset_more: Be16,
    /// Identification.
    pub id: Be32,
}

impl FragmentHeader {
    /// Mask of the offset.
    pub const OFFSET: u16 = 0xfff8;
}

impl Ipv6 {
    /// Length of the header, bytes.
    pub const LENGTH: usize = 40;
    /// Offset of [`Self::next_header`], bytes.
    pub const NEXT_HEADER_AT: usize = 6;
    /// Offset of [`Self::hop_limit`], bytes.
    pub const HOP_LIMIT_AT: usize = 7;
    /// Offset of [`Self::source`], bytes.
    pub const SOURCE_AT: usize = 8;
    /// Offset of [`Self::destination`], bytes.
    pub const DESTINATION_AT: usize = 24;

    /// Hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// Routing header.
    pub const ROUTING: u8 = 43;
    /// Fragment header.
    pub const FRAGMENT: u8 = 44;
    /// Destination options.
    pub const DESTINATION_OPTIONS: u8 = 60;

    /// IP version as the packet claims.
    #[inline(always)]
    pub fn version(&self) -> u32 {
        self.version_class_label.get() >> 28
    }

    /// An address of the header.
    #[inline(always)]
    pub fn address(quarters: [u32; 4]) -> Address {
        let [a, b, c, d] = quarters;
        let word = |first: u32, second: u32| {
            if cfg!(target_endian = "little") {
                first as u64 | (second as u64) << 32
            } else {
                (first as u64) << 32 | second as u64
            }
        };
        Address::from_words([word(a, b), word(c, d)])
    }
}
