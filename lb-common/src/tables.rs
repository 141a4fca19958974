//! The shape of every map, and the lookups as the pipeline sees them.
//!
//! What every packet needs lies in arrays, which the kernel indexes without a call (about 1 ns a
//! lookup, against 15 ns of a hash map): listeners and targets in buckets of one cache line,
//! rings and targets by number. Only what a flow could lose is in hash maps.

use bytemuck::{Pod, Zeroable};

use crate::flow::{Flow, FlowKey, FlowTable, Keys, ReturnFlow, ReturnTable};
use crate::load::Load;
use crate::snat::SnatTables;
use crate::tunnel::Tunnel;
use crate::wire::eth::{Macs, OwnMac};
use crate::wire::{Address, Be16};

/// Buckets of the endpoint table; a power of two.
pub const BUCKETS: u32 = 8192;
/// Endpoints that found their bucket full.
pub const OVERFLOW_ENDPOINTS: u32 = 8192;
/// Listeners: pairs of address and listener; index 0 is never used. Four times what a configuration
/// may have, as an index rests for minutes before it is another's.
pub const MAX_LISTENERS: u32 = 16384;
/// Targets: (target group, address, port); index 0 is never used. Twice what a configuration may
/// have.
pub const MAX_TARGETS: u32 = 32768;
/// Rings, a few of them spare so that a full table can still be replaced ring by ring.
pub const MAX_RINGS: u32 = 264;
/// Prefixes of all admission classes together.
pub const MAX_PREFIXES: u32 = 2_000_000;
/// NICs that packets leave by.
pub const MAX_DEVICES: u32 = 256;
/// Places for NICs' own addresses, found by the last bits of a NIC's index; a power of two.
pub const NIC_PLACES: u32 = 256;
/// Clients that talk to a target's own address through us.
pub const MAX_DIRECT_FLOWS: u32 = 65_536;
/// Next hops of replies remembered on each CPU; a power of two.
pub const NEXT_HOP_CACHE: u32 = 4096;

/// What is known about an (address, port, protocol).
///
/// Two of them fill a cache line. The table is filled by the agent alone; a reader that finds no
/// entry in a bucket which is not [`Self::OVERFLOW`] knows that the endpoint is not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Endpoint {
    /// The address.
    pub address: Address,
    /// The port; 0 where the whole address is meant.
    pub port: Be16,
    /// IP protocol number; 0 where the whole address is meant.
    pub protocol: u8,
    /// What it is and how it is treated: one of the kinds, and flags.
    pub kind: u8,
    /// [`Self::LISTENER`], [`Self::TARGET`], [`Self::PROXIED`]: index of the listener. An address with
    /// [`Self::SNAT`]: the first port that flows may have, host byte order.
    pub listener: u32,
    /// [`Self::LISTENER`]: the ring; [`Self::TARGET`]: index of the target. An address with
    /// [`Self::SNAT`]: the last port that flows may have, host byte order.
    pub index: u32,
    /// [`Self::LISTENER`], [`Self::GUARD`], [`Self::PROXIED`], [`Self::TARGET`] for packets to it, an
    /// address with [`Self::REASSEMBLED`]: the admission class, [`OPEN`] without a group.
    pub class: u32,
}

/// Two endpoints: a cache line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Bucket {
    /// The endpoints; an unused place has kind 0.
    pub endpoints: [Endpoint; 2],
}

/// The admission class of a listener without security groups.
pub const OPEN: u32 = 0;
/// No listener.
pub const NO_LISTENER: u32 = u32::MAX;
/// The ring of a listener without a registered target.
pub const NO_RING: u32 = u32::MAX;

impl Endpoint {
    /// Mask of the kinds.
    pub const KIND: u8 = 0x0f;
    /// Packets to it are balanced.
    pub const LISTENER: u8 = 1;
    /// Packets from it are replies, to be rewritten.
    pub const TARGET: u8 = 2;
    /// An address of this machine: packets to it are never rewritten.
    pub const LOCAL: u8 = 3;
    /// An address of this machine that the agent added: ports without a listener are dropped.
    pub const OWNED: u8 = 4;
    /// Admitted by class, then passed: echo requests, and ports of targets that carry a security
    /// group and whose replies are not rewritten.
    pub const GUARD: u8 = 5;
    /// Admitted by class, counted for the listener, then passed: connections to it end in the
    /// agent's proxy.
    pub const PROXIED: u8 = 6;

    /// Flag of a listener: every flow is tracked, in both directions.
    pub const TRACKED: u8 = 0x10;
    /// Flag of a target: several listeners use it, the tracked flow knows which. A flow that is
    /// not known is of [`Self::listener`], the only one before, unless that is [`NO_LISTENER`].
    pub const SHARED: u8 = 0x20;
    /// Flag of an address of this machine: flows to targets of mode [`Target::SNAT`] come from it.
    pub const SNAT: u8 = 0x40;
    /// Flag of a listener (so it is no [`Self::SHARED`]): the source address alone chooses the slot,
    /// so that all flows of a client go to one target.
    pub const BY_SOURCE: u8 = 0x20;
    /// Flag of an address that the agent added: it has [`Self::PROXIED`] ports, so later fragments of
    /// TCP, which have no port, pass if the class admits them. The kernel puts them together only with
    /// a first fragment, which has one.
    pub const REASSEMBLED: u8 = 0x20;
    /// Flag of the first place in a bucket: the bucket is full, look in the overflow table too.
    pub const OVERFLOW: u8 = 0x80;

    /// What it is, without the flags.
    #[inline(always)]
    pub fn kind(&self) -> u8 {
        self.kind & Self::KIND
    }

    /// What finds it.
    #[inline(always)]
    pub fn key(&self) -> EndpointKey {
        EndpointKey {
            address: self.address,
            port: self.port,
            protocol: self.protocol,
            zero: [0; 5],
        }
    }
}

/// What an endpoint is found by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Pod, Zeroable)]
#[repr(C)]
pub struct EndpointKey {
    /// The address.
    pub address: Address,
    /// The port.
    pub port: Be16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub zero: [u8; 5],
}

impl EndpointKey {
    /// A port of an address.
    #[inline(always)]
    pub fn new(address: Address, port: Be16, protocol: u8) -> Self {
        Self { address, port, protocol, zero: [0; 5] }
    }

    /// An address as a whole.
    #[inline(always)]
    pub fn of_address(address: Address) -> Self {
        Self::new(address, Be16::new(0), 0)
    }

    /// The bucket it belongs in, less than [`BUCKETS`].
    #[inline(always)]
    pub fn bucket(&self, keys: &impl Keys) -> u32 {
        (keys.endpoint(self) >> (64 - BUCKETS.ilog2())) as u32
    }
}

/// A listener: what a reply is rewritten to, and what its flows are remembered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Listener {
    /// The load balancer's address.
    pub address: Address,
    /// The listener's port.
    pub port: Be16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub zero: u8,
    /// A flow that is silent for longer is over, seconds.
    pub idle: u32,
}

/// A way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct NextHop {
    /// Index of the NIC, 0 while unresolved. For a VLAN device: its parent.
    pub ifindex: u32,
    /// The next hop's MAC address and the NIC's.
    pub macs: Macs,
    /// VLAN id, 0 for none; host byte order.
    pub vlan: u16,
    /// Largest IP packet, bytes; host byte order.
    pub mtu: u16,
}

/// A registered target: a cache line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Target {
    /// Its address.
    pub address: Address,
    /// Its port; [`Self::DSR_GUE`]: the UDP port that its tunnel ends at.
    pub port: Be16,
    /// How packets reach it: one of the modes.
    pub mode: u8,
    /// See [`Self::SERVES`].
    pub flags: u8,
    /// How to get there. Its MTU is that of packets before encapsulation.
    pub hop: NextHop,
    /// [`Self::DSR_IPIP`], [`Self::DSR_GUE`]: what the outer header is made of.
    pub tunnel: Tunnel,
    /// 1 once some client talked to it directly, through us. The kernel's word, which the agent
    /// clears with the rest but never overwrites.
    pub is_direct: u64,
}

impl Target {
    /// Mode: rewrite the destination.
    pub const NAT: u8 = 1;
    /// Mode: rewrite the MAC addresses only.
    pub const DSR_L2: u8 = 2;
    /// Mode: rewrite both ends, with a source port for each flow.
    pub const SNAT: u8 = 3;
    /// Mode: put one more IP header in front. This and the modes beyond are tunnels.
    pub const DSR_IPIP: u8 = 4;
    /// Mode: put an IP and a UDP header in front.
    pub const DSR_GUE: u8 = 5;
    /// Flag: it takes packets of the flows it has: it is in the ring, draining, or unhealthy while
    /// connection termination is off.
    pub const SERVES: u8 = 1;
    /// Flag: it takes new flows.
    pub const IN_RING: u8 = 2;
    /// Where in the flags the number of source addresses is, see [`Self::sources`].
    const SOURCES_SHIFT: u32 = 5;

    /// [`Self::SNAT`]: how many source addresses it has.
    #[inline(always)]
    pub const fn sources(&self) -> u32 {
        (self.flags >> Self::SOURCES_SHIFT) as u32
    }

    /// Says how many source addresses it has, [`MAX_SNAT_ADDRESSES`](crate::snat::MAX_SNAT_ADDRESSES)
    /// at most.
    pub const fn set_sources(&mut self, sources: u32) {
        let others = (1 << Self::SOURCES_SHIFT) - 1;
        self.flags = (sources as u8) << Self::SOURCES_SHIFT | (self.flags & others);
    }

    /// Whether packets of its flows still go to it.
    #[inline(always)]
    pub fn serves(&self) -> bool {
        self.flags & Self::SERVES != 0
    }
}

/// Words of the map of exceptions, 1 MiB; a power of two.
pub const EXCEPTION_WORDS: u32 = 1 << 17;

/// Where in the map of exceptions a flow is, by [`Selected::hash`](crate::forward::Selected::hash):
/// the word's index, and its bit. Another flow may be there too.
#[inline(always)]
pub const fn exception_place(hash: u32) -> (u32, u64) {
    ((hash >> 6) & (EXCEPTION_WORDS - 1), 1 << (hash & 63))
}

/// One slot of a ring: which target a flow hash chooses, and what is remembered meanwhile.
///
/// See the state diagram in docs/connections.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Slot {
    /// Index of the target of new flows.
    pub current: u32,
    /// State (2 bits), whether it is [`Self::MAPPED`] (1 bit), and index of the target that the slot
    /// was last settled or pinned on.
    previous_state: u32,
}

/// The life of a slot after a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotState {
    /// The hash alone decides.
    Settled,
    /// Flows may be older than the change: UDP flows of unknown age still go to `previous`.
    Learning,
    /// Like learning, later than UDP's idle timeout after the change.
    LearningTcp,
    /// Every live flow that `current` is wrong for is remembered.
    Pinned,
}

impl Slot {
    const SHIFT: u32 = 30;
    /// Of a pinned slot: all flows that `current` is wrong for are in the map of exceptions.
    const MAPPED: u32 = 1 << 29;

    /// A slot; the indices must be less than [`MAX_TARGETS`].
    #[inline(always)]
    pub const fn new(current: u32, previous: u32, state: SlotState) -> Self {
        Self { current, previous_state: previous | (state as u32) << Self::SHIFT }
    }

    /// A slot on which the hash alone decides.
    #[inline(always)]
    pub const fn settled(current: u32) -> Self {
        Self::new(current, 0, SlotState::Settled)
    }

    /// Index of the target that the slot was last settled or pinned on; 0: none.
    #[inline(always)]
    pub const fn previous(self) -> u32 {
        self.previous_state & (Self::MAPPED - 1)
    }

    /// The same slot, pinned, with its exceptions in the map.
    #[inline(always)]
    pub const fn mapped(self) -> Self {
        Self { previous_state: self.previous_state | Self::MAPPED, ..self }
    }

    /// Whether only flows that are in the map of exceptions need to be looked up.
    #[inline(always)]
    pub const fn is_mapped(self) -> bool {
        self.previous_state & Self::MAPPED != 0
    }

    /// Whether the hash alone decides.
    #[inline(always)]
    pub const fn is_settled(self) -> bool {
        self.previous_state >> Self::SHIFT == SlotState::Settled as u32
    }

    /// The state.
    #[inline(always)]
    pub const fn state(self) -> SlotState {
        match self.previous_state >> Self::SHIFT {
            0 => SlotState::Settled,
            1 => SlotState::Learning,
            2 => SlotState::LearningTcp,
            _ => SlotState::Pinned,
        }
    }
}

/// Key of the admission trie: an address of a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Pod, Zeroable)]
#[repr(C)]
pub struct AdmissionKey {
    /// The class, as it lies in memory.
    pub class: u32,
    /// The source address, in wire order; a byte array because the kernel's trie key has no
    /// alignment.
    pub address: [u32; 4],
}

impl AdmissionKey {
    /// Bits of the class, which every prefix includes.
    pub const CLASS_BITS: u32 = 32;

    /// The key of an address of a class.
    #[inline(always)]
    pub fn new(class: u32, address: Address) -> Self {
        Self { class, address: address.quarters() }
    }
}

/// What a listener has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Traffic {
    /// Packets to the targets.
    pub packets: u64,
    /// Their IP bytes.
    pub bytes: u64,
    /// Replies that passed us.
    pub reply_packets: u64,
    /// Their IP bytes.
    pub reply_bytes: u64,
    /// New TCP connections (SYN), and UDP flows where flows are tracked.
    pub new_flows: u64,
    /// Zero; the size stays a power of two.
    pub zero: [u64; 3],
}

/// Changes of a table of flows since the program was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct FlowChanges {
    /// Entries made.
    pub created: u64,
    /// Entries taken out, other than by eviction.
    pub removed: u64,
}

/// Of [`Tables::refresh`]: the flow is not there.
pub const GONE: u32 = u32::MAX;

/// The lookups, for the kernel and for the host.
///
/// Methods take `&self`: in the kernel, all tables are shared with other CPUs anyway.
pub trait Tables: SnatTables {
    /// Keys of the hashes; constant while the program is loaded.
    type Keys: Keys;

    /// Keys of the hashes.
    fn keys(&self) -> &Self::Keys;
    /// Slots of each ring; constant while the program is loaded.
    fn ring_size(&self) -> u32;
    /// Monotonic time, nanoseconds; may lag behind by a timer interrupt.
    fn now(&self) -> u64;

    /// The own address of the NIC with this index.
    fn own_mac(&self, nic: u32) -> OwnMac;
    /// A bucket of the endpoint table.
    fn bucket(&self, index: u32) -> Option<&Bucket>;
    /// An endpoint that found its bucket full.
    fn overflow(&self, key: &EndpointKey) -> Option<Endpoint>;
    /// A listener by index.
    fn listener(&self, index: u32) -> Option<&Listener>;
    /// A target by index.
    fn target(&self, index: u32) -> Option<&Target>;
    /// A slot by `ring * ring_size + slot`.
    fn slot(&self, index: u32) -> Option<Slot>;
    /// Whether a flow may be an exception on a slot that is mapped: a word of the map.
    fn exceptions(&self, word: u32) -> u64;
    /// Whether the class admits the source address.
    fn admits(&self, class: u32, source: Address) -> bool;

    /// What a table remembers of a flow; the time of its last packet is not checked.
    fn flow(&self, table: FlowTable, key: &FlowKey) -> Option<Flow>;
    /// Remembers a flow; replaces what was there. Returns the target whose flow it replaced in
    /// [`FlowTable::Flows`], unless that one was closing; else 0.
    fn remember(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> u32;
    /// Brings the time and the end of a remembered flow up to date; nothing if it is gone. Returns
    /// what [`Flow::closing`] was, to one of several CPUs that change it at once; [`GONE`].
    fn refresh(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> u32;
    /// Forgets a flow. Returns 1 to the one that did; 0 if it was gone.
    fn forget(&self, table: FlowTable, key: &FlowKey) -> u32;
    /// Which listener a target's flow came by; the time of its last packet is not checked.
    fn return_flow(&self, table: ReturnTable, key: &FlowKey) -> Option<ReturnFlow>;
    /// Remembers which listener a target's flow came by; replaces what was there.
    fn remember_return(&self, table: ReturnTable, key: &FlowKey, flow: &ReturnFlow);
    /// Forgets which listener a fresh flow came by.
    fn forget_fresh_return(&self, key: &FlowKey);

    /// How many connections a target has; all zero beyond the table's end.
    fn load(&self, target: u32) -> Load;
    /// Adds to a target's [`Load::balance`], atomically.
    fn change_load(&self, target: u32, change: u64);

    /// Whether some client talks to this target's own address through us.
    fn has_direct_flows(&self, index: u32, target: &Target) -> bool;
    /// Notes a client that talks to a target's own address through us. The key is the reply's.
    fn note_direct_flow(&self, target: u32, key: &FlowKey);
    /// Whether a reply is of such a client.
    fn is_direct_flow(&self, key: &FlowKey) -> bool;
    /// Forgets such a client.
    fn forget_direct_flow(&self, key: &FlowKey);

    /// Where a packet from `source` to `destination` goes that came in by `ingress`. `None`: nowhere
    /// now; the agent has been told.
    fn route(&self, ingress: u32, source: Address, destination: Address) -> Option<&NextHop>;
    /// Tells the agent that a target's next hop is missing.
    fn report_unresolved(&self, address: Address);

    /// Counts a packet to a target, and 1 new flow or none.
    fn count_request(&self, listener: u32, target: u32, bytes: u64, new_flows: u32);
    /// Counts a packet to a listener whose connections end here, and 1 new flow or none.
    fn count_proxied(&self, listener: u32, bytes: u64, new_flows: u32);
    /// Counts a reply of a target.
    fn count_reply(&self, listener: u32, target: u32, bytes: u64);
    /// Counts a packet that died, by the number of its [`DropReason`](crate::verdict::DropReason).
    fn count_drop(&self, reason: u32);
}

const _: () = {
    assert!(size_of::<Endpoint>() == 32);
    assert!(size_of::<Bucket>() == 64);
    assert!(size_of::<Target>() == 64);
    assert!(size_of::<Listener>() == 24);
    assert!(size_of::<Slot>() == 8);
    assert!(BUCKETS.is_power_of_two());
    assert!(NEXT_HOP_CACHE.is_power_of_two());
    assert!(NIC_PLACES.is_power_of_two());
    assert!(MAX_TARGETS <= Slot::MAPPED);
    assert!(EXCEPTION_WORDS.is_power_of_two());
};

/// A next hop remembered for replies to one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct CachedHop {
    /// The client.
    pub destination: Address,
    /// The network's generation when it was looked up; another one makes it void.
    pub generation: u32,
    /// The way to it.
    pub hop: NextHop,
}

/// A NIC or VLAN device that packets may leave by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Interface {
    /// Index of the NIC, for a VLAN device its parent's.
    pub ifindex: u32,
    /// VLAN id, 0 for none; host byte order.
    pub vlan: u16,
    /// Largest IP packet, bytes; host byte order.
    pub mtu: u16,
}
