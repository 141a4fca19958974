//! The shape of a target's maps, and the lookups as its pipeline sees them.
//!
//! Rules are compiled to classes. [`class_index`] leads from family, protocol and port to a class,
//! by one array; a class is a set of senders in a prefix trie, whose key begins with the class and
//! a [`space`]: what the sender is known by.

use bytemuck::{Pod, Zeroable};

use crate::flow::{FlowKey, ICMP, ICMPV6, SECOND, TCP, UDP};
use crate::tables::EndpointKey;
use crate::wire::eth::Mac;
use crate::wire::{Address, Be16};

/// What a sender in a class is known by: the upper two bits of the trie key's class.
pub mod space {
    /// The packet's own source address.
    pub const SOURCE: u32 = 0;
    /// The source of the tunnel header that the packet came in, IPv4.
    pub const TUNNEL_V4: u32 = 1 << 30;
    /// The same, IPv6.
    pub const TUNNEL_V6: u32 = 2 << 30;
    /// The frame's source MAC address, as [`super::mac_key`].
    pub const MAC: u32 = 3 << 30;
}

/// Nobody is let in.
pub const DENIED: u16 = 0;
/// Everybody is let in.
pub const OPEN: u16 = 1;
/// Not led to by a port: who may send tunnelled packets at all.
pub const SENDERS: u16 = 2;
/// The first class of rules.
pub const FIRST_CLASS: u16 = 3;

/// Ports of a protocol.
const PORTS: u32 = 1 << 16;
/// Places of classes: TCP and UDP ports of both families, then ICMP and everything else.
pub const CLASSES: u32 = 4 * PORTS + 4;
/// Classes in an element of the array, which is a word that is written at once.
pub const CLASSES_IN_WORD: u32 = 4;
/// Words of the array of classes.
pub const CLASS_WORDS: u32 = CLASSES.div_ceil(CLASSES_IN_WORD);
/// Prefixes of all classes together.
pub const MAX_SENDERS: u32 = 1_000_000;
/// (Address, port, protocol) that tunnels end at.
pub const MAX_TUNNEL_ENDS: u32 = 4096;

/// Where the class of a protocol and a destination port stands, less than [`CLASSES`].
#[inline(always)]
pub fn class_index(is_v4: bool, protocol: u8, port: Be16) -> u32 {
    let family = !is_v4 as u32;
    match protocol {
        TCP => 2 * family * PORTS + port.get() as u32,
        UDP => (2 * family + 1) * PORTS + port.get() as u32,
        ICMP if is_v4 => 4 * PORTS,
        ICMPV6 if !is_v4 => 4 * PORTS + 1,
        _ => 4 * PORTS + 2 + family,
    }
}

/// A MAC address in the place of an address: its 6 bytes, then zeros; a prefix of 48 bits.
#[inline(always)]
pub const fn mac_key(mac: Mac) -> Address {
    let [a, b, c, d, e, f] = mac;
    Address::from_words([u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]), 0])
}

/// What the programs do; one word, so that it changes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Settings {
    /// The flags below.
    pub flags: u32,
    /// Zero.
    pub zero: u32,
}

impl Settings {
    /// Packets in IP in IP are looked at.
    pub const UNWRAPS_IPIP: u32 = 1;
    /// Packets in UDP (GUE variant 1) are looked at.
    pub const UNWRAPS_GUE: u32 = 2;
    /// Any tunnel.
    pub const UNWRAPS: u32 = Self::UNWRAPS_IPIP | Self::UNWRAPS_GUE;
    /// Flows that the target opens are remembered.
    pub const RECORDS: u32 = 4;
    /// Only what the rules allow comes in.
    pub const ENFORCES: u32 = 8;
}

/// A flow that the target opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct OwnFlow {
    /// When its last packet went or came, within [`REFRESH`](crate::flow::REFRESH); monotonic
    /// nanoseconds.
    pub last_seen: u64,
    /// 1 once the target has sent FIN or RST.
    pub closing: u32,
    /// Zero.
    pub zero: u32,
}

/// A silent TCP connection of the target's own is forgotten after this time, nanoseconds: 5 days,
/// AWS's default for established connections (EC2 connection tracking timeouts).
pub const OWN_TCP_IDLE: u64 = 432_000 * SECOND;
/// A connection whose end the target has announced: twice the longest life of a segment (RFC 9293
/// section 3.4.2), counted from the target's last packet.
pub const OWN_CLOSING_IDLE: u64 = 240 * SECOND;
/// Any other flow: AWS's default for UDP streams.
pub const OWN_IDLE: u64 = 180 * SECOND;

impl OwnFlow {
    /// A flow whose packet went by now.
    pub const fn new(now: u64) -> Self {
        Self { last_seen: now, closing: 0, zero: 0 }
    }

    /// Whether it is still alive: an entry past its idle timeout is no entry.
    #[inline(always)]
    pub fn is_alive(&self, now: u64, protocol: u8) -> bool {
        let idle = match (protocol, self.closing) {
            (TCP, 0) => OWN_TCP_IDLE,
            (TCP, _) => OWN_CLOSING_IDLE,
            _ => OWN_IDLE,
        };
        now.saturating_sub(self.last_seen) < idle
    }
}

/// What a target has unwrapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Unwrapped {
    /// Packets.
    pub packets: u64,
    /// Their bytes without the tunnel header, IP header and payload.
    pub bytes: u64,
}

/// The lookups, for the kernel and for the host. Keys of flows are from the peer to the target, as
/// packets come in.
pub trait TargetTables {
    /// What to do.
    fn settings(&self) -> Settings;
    /// Monotonic time, nanoseconds.
    fn now(&self) -> u64;
    /// Whether tunnels end here. For IP in IP the port is 0 and the protocol that of the inner
    /// packet; for GUE it is the UDP port.
    fn is_tunnel_end(&self, end: &EndpointKey) -> bool;
    /// The class at a place less than [`CLASSES`].
    fn class(&self, index: u32) -> u16;
    /// Whether a class, with the bits of a [`space`], has the sender.
    fn admits(&self, class: u32, sender: Address) -> bool;
    /// A flow that the target opened; the time of its last packet is not checked.
    fn own_flow(&self, key: &FlowKey) -> Option<OwnFlow>;
    /// Remembers a flow that the target opened.
    fn remember_own(&self, key: &FlowKey, flow: &OwnFlow);
    /// When a packet of this flow was last let in by a rule, nanoseconds; TCP has none.
    fn admitted(&self, key: &FlowKey) -> Option<u64>;
    /// Remembers when a packet was let in by a rule.
    fn remember_admitted(&self, key: &FlowKey, now: u64);
    /// Counts a packet that came out of a tunnel.
    fn count_unwrapped(&self, bytes: u64);
    /// Counts a packet that died, by the number of its [`DropReason`](crate::verdict::DropReason).
    fn count_drop(&self, reason: u32);
}

const _: () = {
    assert!(size_of::<Settings>() == 8);
    assert!(size_of::<OwnFlow>() == 16);
    assert!(CLASSES.is_multiple_of(CLASSES_IN_WORD));
};
