//! IP addresses of both families in 16 bytes.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytemuck::{Pod, Zeroable};

use super::Be32;

/// An IPv6 address, or an IPv4 address as `::ffff:a.b.c.d` (RFC 4291 section 2.5.5.2), in network
/// byte order.
///
/// Held as two words so that comparing and hashing take two instructions; in memory it is the 16
/// bytes of the wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Address {
    words: [u64; 2],
}

impl Address {
    /// `::ffff:0:0`, where an IPv4 address is still to be written in.
    const MAPPED: u64 = u64::from_ne_bytes([0, 0, 0xff, 0xff, 0, 0, 0, 0]);

    /// An IPv4 address.
    #[inline(always)]
    pub const fn v4(address: Be32) -> Self {
        let raw = address.raw() as u64;
        let low = if cfg!(target_endian = "little") { raw << 32 } else { raw };
        Self { words: [0, Self::MAPPED | low] }
    }

    /// From the address' two halves as they lie in memory.
    #[inline(always)]
    pub const fn from_words(words: [u64; 2]) -> Self {
        Self { words }
    }

    /// The two halves as they lie in memory.
    #[inline(always)]
    pub const fn words(self) -> [u64; 2] {
        self.words
    }

    /// The four quarters as they lie in memory.
    #[inline(always)]
    pub const fn quarters(self) -> [u32; 4] {
        let [high, low] = self.words;
        if cfg!(target_endian = "little") {
            [high as u32, (high >> 32) as u32, low as u32, (low >> 32) as u32]
        } else {
            [(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32]
        }
    }

    /// The last four bytes: the address, if this is an IPv4 address.
    #[inline(always)]
    pub const fn low32(self) -> Be32 {
        Be32::from_raw(self.quarters()[3])
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(self) -> bool {
        let [_, _, mapped, _] = self.quarters();
        self.words[0] == 0 && mapped == u32::from_ne_bytes([0, 0, 0xff, 0xff])
    }

    /// The 16 bytes.
    pub fn octets(self) -> [u8; 16] {
        bytemuck::cast(self.words)
    }
}

impl From<[u8; 16]> for Address {
    fn from(octets: [u8; 16]) -> Self {
        Self { words: bytemuck::cast(octets) }
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets().into(),
            IpAddr::V6(v6) => v6.octets().into(),
        }
    }
}

impl From<Ipv4Addr> for Address {
    fn from(address: Ipv4Addr) -> Self {
        IpAddr::V4(address).into()
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        Ipv6Addr::from(address.octets()).to_canonical()
    }
}

impl core::fmt::Debug for Address {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", IpAddr::from(*self))
    }
}

impl PartialOrd for Address {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Address {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        self.octets().cmp(&other.octets())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_is_mapped_in_wire_order() {
        let address = Address::v4(Be32::new(0x0a00_0164));
        assert_eq!(address.octets(), Ipv4Addr::new(10, 0, 1, 100).to_ipv6_mapped().octets());
        assert_eq!(IpAddr::from(address), IpAddr::from([10, 0, 1, 100]));
        assert!(address.is_v4());
        assert_eq!(address.low32().get(), 0x0a00_0164);
    }

    #[test]
    fn ipv6_is_not_ipv4() {
        for text in ["2001:db8::1", "::1", "::", "::ffff:0:a00:1", "::fffe:10.0.0.1"] {
            let address = Address::from(text.parse::<IpAddr>().unwrap());
            assert!(!address.is_v4(), "{text}");
            assert_eq!(IpAddr::from(address), text.parse::<IpAddr>().unwrap());
        }
    }
}
