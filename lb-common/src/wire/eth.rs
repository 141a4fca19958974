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
