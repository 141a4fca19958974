//! Tunnels to targets: IP in IP, and IP in UDP.
//!
//! `dsr_ipip` puts the client's packet behind one more IP header (IPv4: RFC 2003, RFC 4213;
//! IPv6: RFC 2473). `dsr_gue` puts a UDP header between the two: variant 1 of Generic UDP
//! Encapsulation (draft-ietf-intarea-gue section 4), which has no header of its own.

use bytemuck::{Pod, Zeroable};

use crate::tables::Target;
use crate::wire::{Address, Be16, Ipv4, Ipv6, Udp};

/// What an outer header has that is the same for every packet to a target, computed beforehand.
///
/// What varies with the flow is the last bits of the source, IPv6's flow label and the source port
/// of UDP: receivers spread their load by them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Tunnel {
    /// The source; the bits that vary with the flow are 0. Of the target's address' family.
    pub source: Address,
    /// The bits of the source's last four bytes that vary with the flow, as they lie in memory.
    pub varying: u32,
    /// Sum of what is constant in an outer IPv4 header, folded: a checksum not yet inverted.
    pub sum: Be16,
    /// Destination port of UDP; 0 without UDP.
    pub port: Be16,
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

    /// The source's last four bytes for a flow, as they lie in memory.
    #[inline(always)]
    pub fn flow_bits(&self, hash: u32) -> u32 {
        hash & self.varying
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
    /// The same target at the end of a tunnel.
    ///
    /// `source` is a prefix of the target's family, `bits` its length counted in 128 bits (an IPv4
    /// prefix's is 96 longer). At most the last 32 bits of a source vary. `port` counts with
    /// [`Self::DSR_GUE`] only. The way's MTU becomes that of packets before encapsulation.
    pub fn through_tunnel(mut self, source: Address, bits: u8, port: u16) -> Self {
        use crate::wire::checksum::Sum;

        let has_udp = self.mode == Self::DSR_GUE;
        let host_bits = 128_u32.saturating_sub(bits.into()).min(32);
        let varying = 1_u64.wrapping_shl(host_bits).wrapping_sub(1) as u32;
        let mut sum = Sum::default()
            .add16(Be16::new(0x4500))
            .add16(Be16::new(Ipv4::DONT_FRAGMENT))
            .add16(Be16::new(u16::from(Tunnel::HOPS) << 8));
        sum = sum.add32(source.low32().raw()).add32(self.address.low32().raw());
        self.tunnel = Tunnel {
            source,
            varying: varying.to_be(),
            sum: Be16::from_raw(!sum.checksum().raw()),
            port: Be16::new(if has_udp { port } else { 0 }),
        };
        let overhead = Tunnel::overhead(self.address, has_udp) as u16;
        self.hop.mtu = self.hop.mtu.saturating_sub(overhead);
        self
    }
}
