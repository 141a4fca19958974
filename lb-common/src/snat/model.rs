//! The tables of source address translation on the host.

use std::boxed::Box;
use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::flow::FlowKey;
use crate::model::Model;

use super::{Entered, HostAtomics, PortPool, SnatFlow, SnatReturn, SnatSource, SnatTables, Stamp};

/// What the kernel's maps hold.
#[derive(Debug, Clone, Default)]
pub struct SnatModel {
    /// Sources by `target * MAX_SNAT_ADDRESSES + number`.
    pub sources: BTreeMap<u32, SnatSource>,
    /// Ports by number.
    pub pools: BTreeMap<u32, Box<PortPool>>,
    /// Flows by their clients' packets.
    pub flows: RefCell<BTreeMap<FlowKey, SnatFlow>>,
    /// Flows by their targets' packets.
    pub returns: RefCell<BTreeMap<FlowKey, SnatReturn>>,
    /// Most flows that there is room for; `None`: any number.
    pub room: Option<usize>,
}

impl SnatTables for Model {
    type Atomics = HostAtomics;

    fn source(&self, index: u32) -> Option<&SnatSource> {
        self.snat.sources.get(&index)
    }

    fn pool(&self, number: u32) -> Option<&PortPool> {
        self.snat.pools.get(&number).map(|pool| &**pool)
    }

    fn snat_flow(&self, key: &FlowKey) -> Option<SnatFlow> {
        self.snat.flows.borrow().get(key).copied()
    }

    fn snat_return(&self, key: &FlowKey) -> Option<SnatReturn> {
        self.snat.returns.borrow().get(key).copied()
    }

    fn remember_snat(&self, key: &FlowKey, flow: &SnatFlow) -> bool {
        insert(&mut self.snat.flows.borrow_mut(), key, flow, self.snat.room)
    }

    fn enter_snat_return(&self, key: &FlowKey, flow: &SnatReturn) -> Entered {
        let mut returns = self.snat.returns.borrow_mut();
        if returns.contains_key(key) {
            return Entered::Taken;
        }
        let fits = insert(&mut returns, key, flow, self.snat.room);
        if fits { Entered::New } else { Entered::Full }
    }

    fn forget_snat_return(&self, key: &FlowKey) {
        self.snat.returns.borrow_mut().remove(key);
    }

    fn stamp_snat(&self, key: &FlowKey, stamp: Stamp) -> bool {
        let mut flows = self.snat.flows.borrow_mut();
        flows.get_mut(key).map(|flow| flow.stamp = stamp).is_some()
    }

    fn stamp_snat_return(&self, key: &FlowKey, stamp: Stamp) -> bool {
        let mut returns = self.snat.returns.borrow_mut();
        returns.get_mut(key).map(|flow| flow.stamp = stamp).is_some()
    }
}

fn insert<V: Copy>(
    table: &mut BTreeMap<FlowKey, V>,
    key: &FlowKey,
    value: &V,
    room: Option<usize>,
) -> bool {
    let fits = table.contains_key(key) || room.is_none_or(|room| table.len() < room);
    if fits {
        table.insert(*key, *value);
    }
    fits
}
