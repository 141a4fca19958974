//! A target's tables on the host: what the kernel's maps hold, in plain collections.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::vec::Vec;

use crate::flow::FlowKey;
use crate::tables::EndpointKey;
use crate::verdict::DropReason;
use crate::wire::Address;

use super::tables::{DENIED, OwnFlow, Settings, TargetTables, Unwrapped};

/// All tables of one target.
#[derive(Debug, Clone, Default)]
pub struct TargetModel {
    /// What to do.
    pub settings: Settings,
    /// Monotonic time, nanoseconds.
    pub now: Cell<u64>,
    /// Where tunnels end.
    pub tunnel_ends: BTreeSet<EndpointKey>,
    /// Classes by place; [`DENIED`] elsewhere.
    pub classes: BTreeMap<u32, u16>,
    /// Senders: class with its space, prefix, length in bits.
    pub senders: Vec<(u32, Address, u32)>,
    /// Flows that the target opened.
    pub own_flows: RefCell<BTreeMap<FlowKey, OwnFlow>>,
    /// Flows that a rule let in.
    pub admitted_flows: RefCell<BTreeMap<FlowKey, u64>>,
    /// What came out of tunnels.
    pub unwrapped: RefCell<Unwrapped>,
    /// Counters by reason.
    pub drops: RefCell<BTreeMap<DropReason, u64>>,
}

impl TargetTables for TargetModel {
    fn settings(&self) -> Settings {
        self.settings
    }

    fn now(&self) -> u64 {
        self.now.get()
    }

    fn is_tunnel_end(&self, end: &EndpointKey) -> bool {
        self.tunnel_ends.contains(end)
    }

    fn class(&self, index: u32) -> u16 {
        self.classes.get(&index).copied().unwrap_or(DENIED)
    }

    fn admits(&self, class: u32, sender: Address) -> bool {
        let address = u128::from_be_bytes(sender.octets());
        self.senders.iter().any(|(known, prefix, bits)| {
            let differing = address ^ u128::from_be_bytes(prefix.octets());
            *known == class && differing.leading_zeros() >= *bits
        })
    }

    fn own_flow(&self, key: &FlowKey) -> Option<OwnFlow> {
        self.own_flows.borrow().get(key).copied()
    }

    fn remember_own(&self, key: &FlowKey, flow: &OwnFlow) {
        self.own_flows.borrow_mut().insert(*key, *flow);
    }

    fn admitted(&self, key: &FlowKey) -> Option<u64> {
        self.admitted_flows.borrow().get(key).copied()
    }

    fn remember_admitted(&self, key: &FlowKey, now: u64) {
        self.admitted_flows.borrow_mut().insert(*key, now);
    }

    fn count_unwrapped(&self, bytes: u64) {
        let mut unwrapped = self.unwrapped.borrow_mut();
        unwrapped.packets += 1;
        unwrapped.bytes += bytes;
    }

    fn count_drop(&self, reason: u32) {
        let reason = DropReason::ALL[reason as usize];
        *self.drops.borrow_mut().entry(reason).or_default() += 1;
    }
}
