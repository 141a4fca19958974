//! Protocol headers as they lie on the wire, one protocol a file.
//!
//! A header is a plain struct of big-endian fields in wire order without padding, so reading one
//! is a copy. The kernel copies it field by field: that is why the structs keep their natural
//! alignment instead of being packed (a packed field costs a load for each byte in BPF).

pub mod address;
pub mod checksum;
pub mod eth;
pub mod icmp;
pub mod ipv4;
pub mod ipv6;
pub mod quic;
pub mod tcp;
pub mod udp;

use bytemuck::{Pod, Zeroable};

pub use address::Address;
pub use eth::{EtherType, Ethernet, Mac, VlanTag};
pub use ipv4::Ipv4;
pub use ipv6::Ipv6;
pub use tcp::Tcp;
pub use udp::Udp;

/// A 16-bit number in network byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct Be16(u16);

impl Be16 {
    /// From the host's byte order.
    #[inline(always)]
    pub const fn new(host: u16) -> Self {
        Self(host.to_be())
    }

    /// In the host's byte order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }

    /// The two bytes as they lie in memory: for checksums, which do not care for byte order
    /// (RFC 1071 section 2 B), and for hashes.
    #[inline(always)]
    pub const fn raw(self) -> u16 {
        self.0
    }

    /// The opposite of [`Self::raw`].
    #[inline(always)]
    pub const fn from_raw(raw: u16) -> Self {
        Self(raw)
    }
}

/// A 32-bit number in network byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct Be32(u32);

impl Be32 {
    /// From the host's byte order.
    #[inline(always)]
    pub const fn new(host: u32) -> Self {
        Self(host.to_be())
    }

    /// In the host's byte order.
    #[inline(always)]
    pub const fn get(self) -> u32 {
        u32::from_be(self.0)
    }

    /// The four bytes as they lie in memory.
    #[inline(always)]
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// The opposite of [`Self::raw`].
    #[inline(always)]
    pub const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }
}

// The layouts agree with an independent definition of the same headers.
const _: () = {
    assert!(size_of::<Ethernet>() == size_of::<network_types::eth::EthHdr>());
    assert!(size_of::<VlanTag>() == size_of::<network_types::vlan::VlanHdr>());
    assert!(size_of::<Ipv4>() == size_of::<network_types::ip::Ipv4Hdr>());
    assert!(size_of::<Ipv6>() == size_of::<network_types::ip::Ipv6Hdr>());
    assert!(size_of::<Tcp>() == size_of::<network_types::tcp::TcpHdr>());
    assert!(size_of::<Udp>() == size_of::<network_types::udp::UdpHdr>());
};
