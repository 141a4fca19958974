//! IPv4 (RFC 791).

use bytemuck::{Pod, Zeroable};

use super::{Be16, Be32};

/// The IPv4 header without options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Ipv4 {
    /// Version (4 bits) and header length in words of 4 bytes (4 bits).
    pub version_ihl: u8,
    /// DSCP and ECN (RFC 2474, RFC 3168).
    pub tos: u8,
    /// Header and payload, bytes.
    pub total_length: Be16,
    /// Identification (RFC 6864).
    pub id: Be16,
    /// Flags (3 bits) and fragment offset in units of 8 bytes (13 bits).
    pub fragment: Be16,
    /// The words that change on the way.
    pub ttl: TtlProtocolChecksum,
    /// Source address.
    pub source: Be32,
    /// Destination address.
    pub destination: Be32,
}

/// TTL, protocol and header checksum: the part of the header that a router rewrites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct TtlProtocolChecksum {
    /// Time to live, hops.
    pub ttl: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// Header checksum.
    pub checksum: Be16,
}

impl Ipv4 {
    /// Don't fragment.
    pub const DONT_FRAGMENT: u16 = 0x4000;
    /// More fragments.
    pub const MORE_FRAGMENTS: u16 = 0x2000;
    /// Mask of the fragment offset.
    pub const FRAGMENT_OFFSET: u16 = 0x1fff;

    /// Offset of [`Self::ttl`], bytes.
    pub const TTL_AT: usize = 8;
    /// Offset of [`Self::source`], bytes.
    pub const SOURCE_AT: usize = 12;
    /// Offset of [`Self::destination`], bytes.
    pub const DESTINATION_AT: usize = 16;

    /// Header length in bytes, 0 to 60, as the packet claims.
    #[inline(always)]
    pub fn header_length(&self) -> usize {
        ((self.version_ihl & 0x0f) as usize) << 2
    }
}
