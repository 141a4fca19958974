//! The tables on the host: what the kernel's maps hold, in plain collections.
//!
//! Tests, fuzzers and the comparison of host against kernel run the pipeline over these.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::vec::Vec;

use bytemuck::Pod;

use crate::endpoints::EndpointTable;
use crate::flow::{Flow, FlowKey, FlowTable, HashKeys, ReturnFlow, ReturnTable};
use crate::forward::{Frame, forward};
use crate::load::{Load, Share};
use crate::lru::Lru;
use crate::snat::SnatModel;
use crate::tables::{
    Bucket, EXCEPTION_WORDS, Endpoint, EndpointKey, GONE, Listener, NIC_PLACES, NextHop, Slot,
    Tables, Target, Traffic,
};
use crate::verdict::{DropReason, Verdict};
use crate::wire::Address;
use crate::wire::eth::OwnMac;

/// All tables of one balancer.
#[derive(Debug, Clone)]
pub struct Model {
    /// Keys of the hashes.
    pub hash_keys: HashKeys,
    /// Slots of each ring.
    pub ring_size: u32,
    /// Monotonic time, nanoseconds.
    pub now: Cell<u64>,
    /// NICs' own addresses by place.
    pub own_macs: BTreeMap<u32, OwnMac>,
    /// Listeners, targets and local addresses.
    pub endpoints: EndpointTable,
    /// Listeners by index.
    pub listeners: BTreeMap<u32, Listener>,
    /// Targets by index.
    pub targets: BTreeMap<u32, Target>,
    /// Connections of targets by index.
    pub loads: RefCell<BTreeMap<u32, Load>>,
    /// Rings by number.
    pub rings: BTreeMap<u32, Vec<Slot>>,
    /// The map of exceptions, by word.
    pub exceptions: Vec<u64>,
    /// Admitted prefixes: class, prefix, length in bits of the 128-bit address.
    pub prefixes: Vec<(u32, Address, u32)>,
    /// Next hops of replies by destination.
    pub routes: BTreeMap<Address, NextHop>,
    /// Remembered flows, by [`FlowTable`].
    pub flows: [RefCell<Lru<FlowKey, Flow>>; FlowTable::ALL.len()],
    /// Packets for which remembered flows were looked up.
    pub lookups: Cell<u64>,
    /// Which listener flows came by, by [`ReturnTable`].
    pub return_flows: [RefCell<Lru<FlowKey, ReturnFlow>>; ReturnTable::ALL.len()],
    /// Clients that talk to targets' own addresses.
    pub direct_flows: RefCell<BTreeSet<FlowKey>>,
    /// Targets that such clients talk to.
    pub direct_targets: RefCell<BTreeSet<u32>>,
    /// Flows whose both ends are rewritten.
    pub snat: SnatModel,
    /// Addresses reported as unresolved.
    pub unresolved: RefCell<Vec<Address>>,
    /// Counters by listener.
    pub listener_traffic: RefCell<BTreeMap<u32, Traffic>>,
    /// Counters by target.
    pub target_traffic: RefCell<BTreeMap<u32, Traffic>>,
    /// Counters by reason.
    pub drops: RefCell<BTreeMap<DropReason, u64>>,
}

impl Model {
    /// Empty tables.
    pub fn new(seed: u64, ring_size: u32) -> Self {
        let hash_keys = HashKeys::from_seed(seed);
        Self {
            hash_keys,
            ring_size,
            now: Cell::new(0),
            own_macs: BTreeMap::new(),
            endpoints: EndpointTable::new(hash_keys),
            listeners: BTreeMap::new(),
            targets: BTreeMap::new(),
            loads: RefCell::default(),
            rings: BTreeMap::new(),
            exceptions: std::vec![0; EXCEPTION_WORDS as usize],
            prefixes: Vec::new(),
            routes: BTreeMap::new(),
            flows: Default::default(),
            lookups: Cell::new(0),
            return_flows: Default::default(),
            direct_flows: RefCell::default(),
            direct_targets: RefCell::default(),
            snat: SnatModel::default(),
            unresolved: RefCell::default(),
            listener_traffic: RefCell::default(),
            target_traffic: RefCell::default(),
            drops: RefCell::default(),
        }
    }

    /// Runs a frame through the pipeline. Compiled here, where tests have it optimised.
    pub fn run(&self, frame: &mut Bytes) -> Verdict {
        forward(frame, self)
    }

    /// A table of remembered flows.
    pub fn flow_table(&self, table: FlowTable) -> &RefCell<Lru<FlowKey, Flow>> {
        &self.flows[table as usize]
    }

    /// A table of ways back.
    pub fn return_table(&self, table: ReturnTable) -> &RefCell<Lru<FlowKey, ReturnFlow>> {
        &self.return_flows[table as usize]
    }

    /// How many ways back both tables remember.
    pub fn remembered_returns(&self) -> usize {
        self.return_flows.iter().map(|table| table.borrow().len()).sum()
    }

    /// Says what a target is due; `None`: nothing is counted for it any more.
    pub fn set_share(&self, target: u32, share: Option<Share>) {
        let mut loads = self.loads.borrow_mut();
        match share {
            Some(share) => loads.entry(target).or_default().share = share,
            None => drop(loads.remove(&target)),
        }
    }

    /// Writes the map of exceptions; what it does not say is none.
    pub fn map_exceptions(&mut self, words: &[u64]) {
        let words = words.iter().copied().chain(std::iter::repeat(0));
        self.exceptions.iter_mut().zip(words).for_each(|(known, word)| *known = word);
    }

    /// What is to be added to the connections of targets.
    pub fn correct(&self, corrections: &BTreeMap<u32, u64>) {
        let mut loads = self.loads.borrow_mut();
        for (target, correction) in corrections {
            loads.entry(*target).or_default().correction = *correction;
        }
    }

    /// How many flows all tables remember.
    pub fn remembered(&self) -> usize {
        self.flows.iter().map(|table| table.borrow().len()).sum()
    }
}

impl Tables for Model {
    type Keys = HashKeys;

    fn keys(&self) -> &HashKeys {
        &self.hash_keys
    }

    fn ring_size(&self) -> u32 {
        self.ring_size
    }

    fn now(&self) -> u64 {
        self.now.get()
    }

    fn own_mac(&self, nic: u32) -> OwnMac {
        self.own_macs.get(&(nic % NIC_PLACES)).copied().unwrap_or(OwnMac::UNKNOWN)
    }

    fn bucket(&self, index: u32) -> Option<&Bucket> {
        self.endpoints.bucket(index)
    }

    fn overflow(&self, key: &EndpointKey) -> Option<Endpoint> {
        self.endpoints.overflow(key)
    }

    fn listener(&self, index: u32) -> Option<&Listener> {
        self.listeners.get(&index)
    }

    fn target(&self, index: u32) -> Option<&Target> {
        self.targets.get(&index)
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        let ring = self.rings.get(&(index / self.ring_size))?;
        ring.get((index % self.ring_size) as usize).copied()
    }

    fn exceptions(&self, word: u32) -> u64 {
        self.exceptions[word as usize]
    }

    fn admits(&self, class: u32, source: Address) -> bool {
        let address = u128::from_be_bytes(source.octets());
        self.prefixes.iter().any(|(known, prefix, bits)| {
            let differing = address ^ u128::from_be_bytes(prefix.octets());
            *known == class && differing.leading_zeros() >= *bits
        })
    }

    fn flow(&self, table: FlowTable, key: &FlowKey) -> Option<Flow> {
        if table == FlowTable::Flows {
            self.lookups.set(self.lookups.get() + 1);
        }
        self.flow_table(table).borrow_mut().get(key)
    }

    fn remember(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> u32 {
        let mut flows = self.flow_table(table).borrow_mut();
        let open = |flow: &&Flow| table == FlowTable::Flows && flow.closing == 0;
        let replaced = flows.peek(key).filter(open).map_or(0, |flow| flow.target);
        flows.insert(*key, *flow);
        replaced
    }

    fn refresh(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> u32 {
        let mut table = self.flow_table(table).borrow_mut();
        let Some(known) = table.get(key) else { return GONE };
        table.insert(*key, Flow { target: known.target, ..*flow });
        known.closing
    }

    fn forget(&self, table: FlowTable, key: &FlowKey) -> u32 {
        u32::from(self.flow_table(table).borrow_mut().remove(key))
    }

    fn load(&self, target: u32) -> Load {
        self.loads.borrow().get(&target).copied().unwrap_or_default()
    }

    fn change_load(&self, target: u32, change: u64) {
        let mut loads = self.loads.borrow_mut();
        let load = loads.entry(target).or_default();
        load.balance = load.balance.wrapping_add(change);
    }

    fn return_flow(&self, table: ReturnTable, key: &FlowKey) -> Option<ReturnFlow> {
        self.return_table(table).borrow_mut().get(key)
    }

    fn remember_return(&self, table: ReturnTable, key: &FlowKey, flow: &ReturnFlow) {
        self.return_table(table).borrow_mut().insert(*key, *flow);
    }

    fn forget_fresh_return(&self, key: &FlowKey) {
        self.return_table(ReturnTable::Fresh).borrow_mut().remove(key);
    }

    fn has_direct_flows(&self, index: u32, _target: &Target) -> bool {
        self.direct_targets.borrow().contains(&index)
    }

    fn note_direct_flow(&self, target: u32, key: &FlowKey) {
        self.direct_flows.borrow_mut().insert(*key);
        self.direct_targets.borrow_mut().insert(target);
    }

    fn is_direct_flow(&self, key: &FlowKey) -> bool {
        self.direct_flows.borrow().contains(key)
    }

    fn forget_direct_flow(&self, key: &FlowKey) {
        self.direct_flows.borrow_mut().remove(key);
    }

    fn route(&self, _ingress: u32, _source: Address, destination: Address) -> Option<&NextHop> {
        let hop = self.routes.get(&destination);
        if hop.is_none() {
            self.report_unresolved(destination);
        }
        hop
    }

    fn report_unresolved(&self, address: Address) {
        self.unresolved.borrow_mut().push(address);
    }

    fn count_request(&self, listener: u32, target: u32, bytes: u64, new_flows: u32) {
        let count = |traffic: &mut Traffic| {
            traffic.packets += 1;
            traffic.bytes += bytes;
            traffic.new_flows += u64::from(new_flows);
        };
        count(self.listener_traffic.borrow_mut().entry(listener).or_default());
        count(self.target_traffic.borrow_mut().entry(target).or_default());
    }

    fn count_proxied(&self, listener: u32, bytes: u64, new_flows: u32) {
        let mut listeners = self.listener_traffic.borrow_mut();
        let traffic = listeners.entry(listener).or_default();
        traffic.packets += 1;
        traffic.bytes += bytes;
        traffic.new_flows += u64::from(new_flows);
    }

    fn count_reply(&self, listener: u32, target: u32, bytes: u64) {
        let count = |traffic: &mut Traffic| {
            traffic.reply_packets += 1;
            traffic.reply_bytes += bytes;
        };
        count(self.listener_traffic.borrow_mut().entry(listener).or_default());
        count(self.target_traffic.borrow_mut().entry(target).or_default());
    }

    fn count_drop(&self, reason: u32) {
        let reason = DropReason::ALL[reason as usize];
        *self.drops.borrow_mut().entry(reason).or_default() += 1;
    }
}

/// A frame in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bytes {
    /// Its bytes, from the destination MAC address on.
    pub bytes: Vec<u8>,
    /// Index of the NIC it came in by.
    pub ingress: u32,
}

impl Bytes {
    /// Room in front of a frame, bytes: what drivers leave (`XDP_PACKET_HEADROOM`).
    pub const HEADROOM: i32 = 256;
}

impl Frame for Bytes {
    fn read<H: Pod>(&self, at: usize) -> Option<H> {
        let bytes = self.bytes.get(at..at.checked_add(size_of::<H>())?)?;
        Some(bytemuck::pod_read_unaligned(bytes))
    }

    fn write<H: Pod>(&mut self, at: usize, header: H) -> Option<()> {
        let bytes = self.bytes.get_mut(at..at.checked_add(size_of::<H>())?)?;
        bytes.copy_from_slice(bytemuck::bytes_of(&header));
        Some(())
    }

    fn write_pair<const GAP: usize, A: Pod, B: Pod>(
        &mut self,
        at: usize,
        first: A,
        second: B,
    ) -> Option<()> {
        let end = at.checked_add(GAP.max(size_of::<A>()).max(GAP + size_of::<B>()))?;
        self.bytes.get(at..end)?;
        self.write(at, first)?;
        self.write(at + GAP, second)
    }

    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn ingress(&self) -> u32 {
        self.ingress
    }

    fn grow_front(&mut self, by: i32) -> Option<()> {
        if by > Self::HEADROOM {
            return None;
        }
        if by >= 0 {
            self.bytes.splice(0..0, std::iter::repeat_n(0, by as usize));
        } else {
            // The kernel keeps at least an Ethernet header.
            let cut = by.unsigned_abs() as usize;
            if cut + 14 > self.bytes.len() {
                return None;
            }
            self.bytes.drain(..cut);
        }
        Some(())
    }

    fn truncate(&mut self, length: usize) -> Option<()> {
        if length < 14 || length > self.bytes.len() {
            return None;
        }
        self.bytes.truncate(length);
        Some(())
    }
}
