//! ICMP (RFC 792) and ICMPv6 (RFC 4443).

use bytemuck::{Pod, Zeroable};

use super::{Be16, Be32};

/// The first eight bytes of an ICMP or ICMPv6 message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Icmp {
    /// Type of the message.
    pub kind: u8,
    /// Code within the type.
    pub code: u8,
    /// Checksum over the message; for ICMPv6 over a pseudo header too.
    pub checksum: Be16,
    /// Depends on the type; zero for port unreachables, the MTU for packets too big.
    pub rest: Be32,
}

impl Icmp {
    /// Offset of [`Self::checksum`], bytes.
    pub const CHECKSUM_AT: usize = 2;
    /// ICMP: echo reply.
    pub const ECHO_REPLY: u8 = 0;
    /// ICMP: echo request.
    pub const ECHO_REQUEST: u8 = 8;
    /// ICMP: destination unreachable; with code 3, port unreachable.
    pub const UNREACHABLE: u8 = 3;
    /// Code of port unreachable (ICMP).
    pub const PORT_UNREACHABLE: u8 = 3;
    /// Code of fragmentation needed (ICMP).
    pub const FRAGMENTATION_NEEDED: u8 = 4;
    /// ICMPv6: echo request.
    pub const V6_ECHO_REQUEST: u8 = 128;
    /// ICMPv6: echo reply.
    pub const V6_ECHO_REPLY: u8 = 129;
    /// ICMPv6: destination unreachable; with code 4, port unreachable.
    pub const V6_UNREACHABLE: u8 = 1;
    /// ICMPv6: packet too big.
    pub const V6_TOO_BIG: u8 = 2;
    /// Code of port unreachable (ICMPv6).
    pub const V6_PORT_UNREACHABLE: u8 = 4;
}
