//! Tunnels to targets: IP in IP, and IP in UDP.
//!
//! `dsr_ipip` puts the client's packet behind one more IP header (IPv4: RFC 2003, RFC 4213;
//! IPv6: RFC 2473). `dsr_gue` puts a UDP header between the two: variant 1 of Generic UDP
//! Encapsulation (draft-ietf-intarea-gue section 4), which has no header of its own.

#[cfg(any(test, feature = "std"))]
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytemuck::{Pod, Zeroable};

use crate::tables::Target;
use crate::wire::{Address, Ipv4, Ipv6, Udp};

/// What an outer header has that is the same for every packet to a target, computed beforehand.
///
/// What varies with the flow is the last bits of the source, IPv6's flow label and the source port
/// of UDP: receivers spread their load by them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Tunnel {
    /// See [`Self::v4`] and [`Self::v6`]; of the target's address' family.
    words: [u32; 4],
}

impl Tunnel {
    /// IP protocol number of IPv4 in IP (RFC 2003).
    pub const IPV4: u8 = network_types::ip::IpProto::Ipv4 as u8;
    /// IP protocol number of IPv6 in IP (RFC 2473).
    pub const IPV6: u8 = network_types::ip::IpProto::Ipv6 as u8;
    /// TTL or hop limit of outer headers.
    pub const HOPS: u8 = 64;
    /// The least source port of UDP, a power of two's multiple: the dynamic ports (RFC 6335).
    pub const FIRST_PORT: u16 = 49_152;

    /// Bytes that encapsulation adds to a packet to this address.
    #[inline(always)]
    pub fn overhead(target: Address, has_udp: bool) -> usize {
        let ip = if target.is_v4() { size_of::<Ipv4>() } else { Ipv6::LENGTH };
        ip + if has_udp { size_of::<Udp>() } else { 0 }
    }

    /// Over IPv4: the source without the bits that vary with the flow, those bits, and the sum of
    /// what is constant in the header; all as they lie in memory.
    #[inline(always)]
    pub fn v4(&self) -> (u32, u32, u32) {
        let [fixed, varying, sum, _] = self.words;
        (fixed, varying, sum)
    }

    /// Over IPv6: the quarters of the source as they lie in memory. If the last one is 0, it varies
    /// with the flow.
    #[inline(always)]
    pub fn v6(&self) -> [u32; 4] {
        self.words
    }
}

impl Target {
    /// Whether packets reach it through a tunnel.
    #[inline(always)]
    pub fn is_tunnelled(&self) -> bool {
        self.mode >= Self::DSR_IPIP
    }
}

#[cfg(any(test, feature = "std"))]
impl Target {
    /// The same target at the end of a tunnel over IPv4.
    ///
    /// `source` is a network's address, `bits` its length, at most 32. `port` counts with
    /// [`Self::DSR_GUE`] only. The way's MTU becomes that of packets before encapsulation.
    pub fn through_v4(self, source: Ipv4Addr, bits: u8, port: u16) -> Self {
        use crate::wire::Be16;
        use crate::wire::checksum::Sum;

        let varying = u32::MAX.checked_shr(bits.into()).unwrap_or(0).to_be();
        let fixed = source.to_bits().to_be();
        let sum = Sum::default()
            .add16(Be16::new(0x4500))
            .add16(Be16::new(Ipv4::DONT_FRAGMENT))
            .add16(Be16::new(u16::from(Tunnel::HOPS) << 8))
            .add32(fixed)
            .add32(self.address.low32().raw());
        let sum = u32::from(!sum.checksum().raw());
        self.with_tunnel(Tunnel { words: [fixed, varying, sum, 0] }, port)
    }

    /// The same over IPv6. The last 32 bits of the source vary if they are 0.
    pub fn through_v6(self, source: Ipv6Addr, port: u16) -> Self {
        let words = Address::from(IpAddr::from(source)).quarters();
        self.with_tunnel(Tunnel { words }, port)
    }

    fn with_tunnel(mut self, tunnel: Tunnel, port: u16) -> Self {
        let has_udp = self.mode == Self::DSR_GUE;
        self.tunnel = tunnel;
        if has_udp {
            self.port = crate::wire::Be16::new(port);
        }
        let overhead = Tunnel::overhead(self.address, has_udp) as u16;
        self.hop.mtu = self.hop.mtu.saturating_sub(overhead);
        self
    }
}
