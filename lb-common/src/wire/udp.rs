//! UDP (RFC 768).

use bytemuck::{Pod, Zeroable};

use super::Be16;

/// The UDP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Udp {
    /// Source port.
    pub source: Be16,
    /// Destination port.
    pub destination: Be16,
    /// Header and data, bytes.
    pub length: Be16,
    /// Checksum over pseudo header, header and data; 0: none (IPv4 only, RFC 768).
    pub checksum: Be16,
}

impl Udp {
    /// Offset of [`Self::checksum`], bytes.
    pub const CHECKSUM_AT: usize = 6;
}
