//! Flows: what names one, how it is hashed, what is remembered of it.

use bytemuck::{Pod, Zeroable};

use crate::tables::{EndpointKey, Target};
use crate::wire::{Address, Be16};

/// IP protocol number of TCP.
pub const TCP: u8 = network_types::ip::IpProto::Tcp as u8;
/// IP protocol number of UDP.
pub const UDP: u8 = network_types::ip::IpProto::Udp as u8;
/// IP protocol number of ICMP.
pub const ICMP: u8 = network_types::ip::IpProto::Icmp as u8;
/// IP protocol number of ICMPv6.
pub const ICMPV6: u8 = network_types::ip::IpProto::Ipv6Icmp as u8;

/// A silent TCP flow is forgotten after this time unless its listener says otherwise, seconds
/// (AWS: 350 s).
pub const TCP_IDLE: u32 = 350;
/// A silent UDP flow is forgotten after this time unless its listener says otherwise, seconds
/// (AWS: 120 s).
pub const UDP_IDLE: u32 = 120;
/// The longest idle timeout that a listener can have, seconds (AWS: 6000 s). The way back of a flow
/// counts as known for as long: it is asked only for what a target sends.
pub const MAX_IDLE: u32 = 6000;
/// A TCP flow that has seen FIN or RST is forgotten after this time, nanoseconds.
pub const CLOSING_IDLE: u64 = 10 * SECOND;
/// How stale the time of a flow's last packet may be: it is not written for every packet.
pub const REFRESH: u64 = SECOND;
/// Nanoseconds in a second.
pub const SECOND: u64 = 1_000_000_000;

/// The five-tuple of a flow as one direction sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Pod, Zeroable)]
#[repr(C)]
pub struct FlowKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port.
    pub source_port: Be16,
    /// Destination port.
    pub destination_port: Be16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub zero: [u8; 3],
}

impl FlowKey {
    /// The flow as the other end's packets show it.
    #[inline(always)]
    pub fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            ..*self
        }
    }

    /// The flow as a target's packets show it that answers to this address and port.
    #[inline(always)]
    pub fn of_replies(target: &Target, address: Address, port: Be16, protocol: u8) -> Self {
        Self {
            source: target.address,
            destination: address,
            source_port: target.port,
            destination_port: port,
            protocol,
            zero: [0; 3],
        }
    }

    /// Source and destination port in one word, in an order that is the same on every machine.
    #[inline(always)]
    fn ports(&self) -> u32 {
        (self.source_port.get() as u32) << 16 | self.destination_port.get() as u32
    }
}

/// What is remembered of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Flow {
    /// When its last packet came, within [`REFRESH`]; monotonic nanoseconds.
    pub last_seen: u64,
    /// Index of its target.
    pub target: u32,
    /// 1 once FIN or RST was seen.
    pub closing: u32,
}

impl Flow {
    /// Whether it is still alive: an entry past its listener's idle timeout (seconds) is no entry.
    #[inline(always)]
    pub fn is_alive(&self, now: u64, idle: u32) -> bool {
        // The last packet may have come later than is written.
        let limit = if self.closing == 0 { idle as u64 * SECOND + REFRESH } else { CLOSING_IDLE };
        idle != 0 && now.saturating_sub(self.last_seen) < limit
    }
}

/// The tables that remember flows. What one packet of a flood can make lies in tables of its own,
/// so that it pushes out only its like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum FlowTable {
    /// Flows that have shown themselves twice.
    Flows = 0,
    /// TCP connections of which only SYNs came.
    HalfOpen = 1,
    /// Flows of which one packet came that was no SYN.
    OnceSeen = 2,
}

impl FlowTable {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Flows, Self::HalfOpen, Self::OnceSeen];

    /// The table with this number.
    #[inline(always)]
    pub fn of(number: u32) -> Self {
        match number {
            0 => Self::Flows,
            1 => Self::HalfOpen,
            _ => Self::OnceSeen,
        }
    }
}

/// Which listener a target's flow came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct ReturnFlow {
    /// When its last packet came, within [`REFRESH`]; monotonic nanoseconds.
    pub last_seen: u64,
    /// Index of the listener.
    pub listener: u32,
    /// Index of the target.
    pub target: u32,
}

impl ReturnFlow {
    /// Whether it is still alive, by its listener's idle timeout in seconds.
    #[inline(always)]
    pub fn is_alive(&self, now: u64, idle: u32) -> bool {
        Flow { last_seen: self.last_seen, target: 0, closing: 0 }.is_alive(now, idle)
    }
}

/// The tables of ways back: what the first packet of a flow makes lies apart, as in [`FlowTable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ReturnTable {
    /// Of flows that have shown themselves twice.
    Established = 0,
    /// Of flows of which one packet came.
    Fresh = 1,
}

impl ReturnTable {
    /// Both of them, in the order of their numbers.
    pub const ALL: [Self; 2] = [Self::Established, Self::Fresh];

    /// Where the way back of a flow is whose own entry is in this table.
    #[inline(always)]
    pub fn beside(table: FlowTable) -> Self {
        match table {
            FlowTable::Flows => Self::Established,
            FlowTable::HalfOpen | FlowTable::OnceSeen => Self::Fresh,
        }
    }
}

/// The flow hash, keyed so that nobody outside can aim flows at one target.
///
/// It is NH, the universal hash of UMAC (RFC 4418 section 5.2): for keys nobody knows, two
/// different flows collide with a probability of at most 2^-32. Its products do not wait for each
/// other, an IPv4 flow takes two. A multiplication with a constant and a shift spread the sum over
/// the upper bits, which choose the slot.
pub trait Keys {
    /// A key by number, less than [`HashKeys::LEN`]. The kernel loads only those it uses.
    fn key<const N: usize>(&self) -> u32;

    /// Hash of a flow, 64 bits, of which the upper ones choose the slot.
    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> u64 {
        let ports = product(key.ports(), self.key::<8>(), key.protocol as u32, self.key::<9>());
        let ([a, b, c, d], [e, f, g, h]) = (key.source.quarters(), key.destination.quarters());
        let addresses = if key.source.is_v4() {
            product(d, self.key::<0>(), h, self.key::<1>())
        } else {
            product(a, self.key::<0>(), b, self.key::<1>())
                .wrapping_add(product(c, self.key::<2>(), d, self.key::<3>()))
                .wrapping_add(product(e, self.key::<4>(), f, self.key::<5>()))
                .wrapping_add(product(g, self.key::<6>(), h, self.key::<7>()))
        };
        finish(addresses.wrapping_add(ports))
    }

    /// Hash of a client, 64 bits, of which the upper ones choose the slot where all its flows are to
    /// go to one target. Words that are not there count as 0, as UMAC pads a message.
    #[inline(always)]
    fn source(&self, address: Address) -> u64 {
        let [a, b, c, d] = address.quarters();
        if address.is_v4() {
            return finish(product(d, self.key::<0>(), 0, self.key::<1>()));
        }
        let first = product(a, self.key::<0>(), b, self.key::<1>());
        finish(first.wrapping_add(product(c, self.key::<2>(), d, self.key::<3>())))
    }

    /// Hash of an endpoint, 64 bits, of which the upper ones choose the bucket.
    #[inline(always)]
    fn endpoint(&self, key: &EndpointKey) -> u64 {
        let [a, b, c, d] = key.address.quarters();
        let port = (key.port.get() as u32) << 16 | key.protocol as u32;
        let last = product(d, self.key::<0>(), port, self.key::<1>());
        let sum = if key.address.is_v4() {
            last
        } else {
            last.wrapping_add(product(a, self.key::<2>(), b, self.key::<3>()))
                .wrapping_add((c as u64) << 16)
        };
        finish(sum)
    }
}

/// The slot of a ring that a flow hash chooses, less than `ring_size`.
#[inline(always)]
pub fn slot(hash: u64, ring_size: u32) -> u32 {
    (((hash >> 32) * ring_size as u64) >> 32) as u32
}

/// Another hash from half of one, for one more slot: it says nothing of what the other half chose.
/// (The finalizer of Appleby's MurmurHash3, over a Weyl sequence so that no value stays itself.)
#[inline(always)]
pub fn rehash(half: u32) -> u32 {
    let mut hash = half.wrapping_add(0x9e37_79b9);
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

/// All keys of the flow hash, made from a seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct HashKeys {
    keys: [u32; 10],
}

impl HashKeys {
    /// How many there are.
    pub const LEN: usize = 10;

    /// Keys from a seed; equal seeds give equal keys on every machine. (SplitMix64, Steele et al.,
    /// "Fast splittable pseudorandom number generators", 2014.)
    pub fn from_seed(seed: u64) -> Self {
        let mut state = seed;
        let keys = core::array::from_fn(|_| (splitmix64(&mut state) >> 32) as u32);
        Self { keys }
    }

    /// The keys, as the kernel's program is given them.
    pub fn words(&self) -> &[u32; Self::LEN] {
        &self.keys
    }
}

impl Keys for HashKeys {
    #[inline(always)]
    fn key<const N: usize>(&self) -> u32 {
        self.keys[N]
    }
}

#[inline(always)]
fn product(a: u32, key_a: u32, b: u32, key_b: u32) -> u64 {
    (a.wrapping_add(key_a) as u64).wrapping_mul(b.wrapping_add(key_b) as u64)
}

#[inline(always)]
fn finish(sum: u64) -> u64 {
    let mixed = (sum ^ (sum >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 32)
}

/// The next number of the SplitMix64 generator.
pub(crate) fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::vec;

    use super::*;

    fn key(source: IpAddr, source_port: u16) -> FlowKey {
        let destination: IpAddr =
            if source.is_ipv4() { [10, 0, 0, 100].into() } else { "fd00::100".parse().unwrap() };
        FlowKey {
            source: source.into(),
            destination: destination.into(),
            source_port: Be16::new(source_port),
            destination_port: Be16::new(80),
            protocol: TCP,
            zero: [0; 3],
        }
    }

    /// Chi-squared of flows over slots: 256 slots have 255 degrees of freedom, mean 255, standard
    /// deviation 22.6; 255 + 6 * 22.6 = 391 is missed less than once in ten million runs, and the
    /// seeds are fixed.
    fn assert_uniform(flows: impl Iterator<Item = FlowKey>, keys: &HashKeys, what: &str) {
        assert_hashes_uniform(flows.map(|flow| keys.flow(&flow)), what);
    }

    fn assert_hashes_uniform(hashes: impl Iterator<Item = u64>, what: &str) {
        let mut slots = vec![0_u32; 256];
        let mut total = 0_u32;
        for hash in hashes {
            slots[slot(hash, 256) as usize] += 1;
            total += 1;
        }
        let expected = f64::from(total) / 256.0;
        let chi2: f64 = slots.iter().map(|n| (f64::from(*n) - expected).powi(2) / expected).sum();
        assert!(chi2 < 391.0, "{what}: chi-squared {chi2}");
    }

    #[test]
    fn similar_flows_spread_evenly() {
        for seed in 0..20 {
            let keys = HashKeys::from_seed(seed);
            let one: IpAddr = [10, 1, 2, 3].into();
            assert_uniform((1024..61024).map(|port| key(one, port)), &keys, "ports of one client");
            let many = (0..60_000_u32).map(|n| IpAddr::from((0x0a00_0000 + n).to_be_bytes()));
            assert_uniform(many.map(|ip| key(ip, 40000)), &keys, "clients of one network");
            let v6 = (0..60_000_u128).map(|n| IpAddr::from((0xfd00_u128 << 112 | n).to_be_bytes()));
            assert_uniform(v6.map(|ip| key(ip, 40000)), &keys, "IPv6 clients of one network");
            let v6 = (0..60_000_u128)
                .map(|n| IpAddr::from((0xfd00_u128 << 112 | n << 64).to_be_bytes()));
            assert_uniform(v6.map(|ip| key(ip, 40000)), &keys, "IPv6 networks");
        }
    }

    #[test]
    fn clients_spread_evenly_by_their_address_alone() {
        for seed in 0..20 {
            let keys = HashKeys::from_seed(seed);
            let v4 = |n: u32| IpAddr::from((0x0a00_0000_u32 + n).to_be_bytes());
            let far = |n: u32| IpAddr::from((n << 16 | 7).to_be_bytes());
            let v6 = |n: u32| IpAddr::from((0xfd00_u128 << 112 | u128::from(n)).to_be_bytes());
            let site =
                |n: u32| IpAddr::from((0x2001_u128 << 112 | u128::from(n) << 64).to_be_bytes());
            let of = |address: IpAddr| keys.source(address.into());
            assert_hashes_uniform((0..60_000).map(v4).map(of), "clients of one network");
            assert_hashes_uniform((0..60_000).map(far).map(of), "one host of each network");
            assert_hashes_uniform((0..60_000).map(v6).map(of), "IPv6 clients of one network");
            assert_hashes_uniform((0..60_000).map(site).map(of), "IPv6 networks");
        }
    }

    /// Both slots of a flow, as one number: not only each of them spreads evenly.
    #[test]
    fn further_slots_are_independent_of_the_first() {
        for seed in 0..20 {
            let keys = HashKeys::from_seed(seed);
            let one: IpAddr = [10, 1, 2, 3].into();
            let pair = |port| {
                let hash = keys.flow(&key(one, port));
                let second = rehash(hash as u32);
                let third = rehash(second);
                let four = |half: u32| u64::from(slot(u64::from(half) << 32, 4));
                (u64::from(slot(hash, 16)) << 4 | four(second) << 2 | four(third)) << 56
            };
            assert_hashes_uniform((1024..61024).map(pair), "three slots of a flow");
        }
    }

    #[test]
    fn the_seed_decides() {
        let flow = key([10, 1, 2, 3].into(), 4711);
        let hashes: std::collections::BTreeSet<u64> =
            (0..100).map(|seed| HashKeys::from_seed(seed).flow(&flow)).collect();
        assert_eq!(hashes.len(), 100);
    }

    #[test]
    fn an_entry_past_its_idle_timeout_is_no_entry() {
        let flow = Flow { last_seen: 5 * SECOND, target: 1, closing: 0 };
        let later = |seconds: u32| 5 * SECOND + u64::from(seconds) * SECOND;
        assert!(flow.is_alive(later(TCP_IDLE), TCP_IDLE));
        assert!(flow.is_alive(later(TCP_IDLE) + REFRESH - 1, TCP_IDLE));
        assert!(!flow.is_alive(later(TCP_IDLE) + REFRESH, TCP_IDLE));
        assert!(!flow.is_alive(later(UDP_IDLE) + REFRESH, UDP_IDLE));
        assert!(!flow.is_alive(later(0), 0), "of a listener that is gone");
        let closing = Flow { closing: 1, ..flow };
        assert!(closing.is_alive(later(10) - 1, TCP_IDLE));
        assert!(!closing.is_alive(later(10), TCP_IDLE));
    }
}
