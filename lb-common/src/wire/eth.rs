//! Ethernet II and VLAN tags (IEEE 802.3, 802.1Q, 802.1ad).

use bytemuck::{Pod, Zeroable};

use super::Be16;

/// A MAC address.
pub type Mac = [u8; 6];

/// An EtherType as it lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct EtherType(pub Be16);

impl EtherType {
    /// IPv4 (RFC 894).
    pub const IPV4: Self = Self(Be16::new(0x0800));
    /// IPv6 (RFC 2464).
    pub const IPV6: Self = Self(Be16::new(0x86dd));
    /// A customer VLAN tag (802.1Q).
    pub const VLAN: Self = Self(Be16::new(0x8100));
    /// A service VLAN tag (802.1ad).
    pub const SERVICE_VLAN: Self = Self(Be16::new(0x88a8));

    /// Whether a VLAN tag follows.
    #[inline(always)]
    pub fn is_vlan(self) -> bool {
        self == Self::VLAN || self == Self::SERVICE_VLAN
    }
}

/// The Ethernet header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Ethernet {
    /// The receiver's MAC address.
    pub destination: Mac,
    /// The sender's MAC address.
    pub source: Mac,
    /// What follows.
    pub ether_type: EtherType,
}

/// Destination and source of a frame, which begins with them.
///
/// Held as words, and written as numbers: of bytes, and of any structure that is copied, the
/// compiler makes a call of a function that copies byte by byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Macs {
    words: [u32; 3],
}

impl Macs {
    /// The receiver's MAC address and the sender's.
    #[inline(always)]
    pub fn new(destination: Mac, source: Mac) -> Self {
        Self { words: bytemuck::cast([destination, source]) }
    }

    /// All 12 bytes, as they lie in memory.
    #[inline(always)]
    pub fn parts(&self) -> (u64, u32) {
        let [a, b, c] = self.words;
        let (first, second) = if cfg!(target_endian = "little") { (b, a) } else { (a, b) };
        ((first as u64) << 32 | second as u64, c)
    }

    /// The receiver's MAC address.
    pub fn destination(&self) -> Mac {
        let [destination, _]: [Mac; 2] = bytemuck::cast(self.words);
        destination
    }
}

/// A NIC's own MAC address, by which frames are told that are for others: a switch that does not
/// know where their receiver is gives them to everybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct OwnMac {
    /// The address in the upper six bytes, its first byte lowest; 0: not known.
    word: u64,
}

impl OwnMac {
    /// No frame is taken for another's.
    pub const UNKNOWN: Self = Self { word: 0 };
    /// The bit of a group address (IEEE 802.3 section 3.2.3), where the word has it.
    const GROUP: u64 = 1 << 16;

    /// The address, unless it is all zero, which is nobody's.
    pub fn new(mac: Mac) -> Self {
        let [a, b, c, d, e, f] = mac;
        Self { word: u64::from_le_bytes([0, 0, a, b, c, d, e, f]) }
    }

    /// Whether a frame that begins with these eight bytes, as they lie in memory, is for another
    /// machine: for neither this address nor a group of machines.
    #[inline(always)]
    pub fn is_foreign(self, beginning: u64) -> bool {
        let receiver = u64::from_le(beginning) << 16;
        receiver != self.word && self.word != 0 && receiver & Self::GROUP == 0
    }
}

/// A VLAN tag without the EtherType that announces it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct VlanTag {
    /// Priority (3 bits), drop eligible (1 bit), VLAN id (12 bits).
    pub control: Be16,
    /// What follows.
    pub ether_type: EtherType,
}

impl VlanTag {
    /// Priority and drop-eligible bits of the control field.
    pub const PRIORITY_MASK: u16 = 0xf000;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_for_other_machines_are_told() {
        let own = [0x02, 0x12, 0x34, 0x56, 0x78, 0x9a];
        let is_foreign = |own: OwnMac, receiver: Mac| {
            let [a, b, c, d, e, f] = receiver;
            // The sender's first two bytes come next, and must not matter.
            own.is_foreign(u64::from_ne_bytes([a, b, c, d, e, f, 0x01, 0xff]))
        };
        assert!(!is_foreign(OwnMac::new(own), own));
        for byte in 0..6 {
            for bit in 0..8 {
                let mut other = own;
                other[byte] ^= 1 << bit;
                let is_group = (byte, bit) == (0, 0);
                assert_eq!(is_foreign(OwnMac::new(own), other), !is_group, "{other:02x?}");
            }
        }
        assert!(!is_foreign(OwnMac::new(own), [0xff; 6]), "broadcast");
        assert!(!is_foreign(OwnMac::new(own), [0x33, 0x33, 0, 0, 0, 1]), "multicast");
        assert!(!is_foreign(OwnMac::UNKNOWN, [4; 6]), "nothing is known");
        assert_eq!(OwnMac::new([0; 6]), OwnMac::UNKNOWN);
    }
}
