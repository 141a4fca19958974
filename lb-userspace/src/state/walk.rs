//! The walk over the remembered flows that lets pinned slots settle.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lb_common::flow::{Flow, FlowKey, FlowTable, HashKeys};
use lb_common::tables::{Endpoint, EndpointKey};

use crate::reconcile::Desired;

use super::slot_of;

/// Slots by ring.
pub type Slots = BTreeMap<u32, BTreeSet<u32>>;

/// The tables of remembered flows.
pub trait FlowStore {
    /// Shows every flow of a table once, as far as the table stands still meanwhile.
    fn each(&self, table: FlowTable, visit: &mut dyn FnMut(FlowKey, Flow));
    /// What the programs have seen beginning and ending of a target's connections,
    /// [`Load::balance`](lb_common::load::Load::balance).
    fn balance(&self, target: u32) -> u64;
    /// Forgets a flow, unless it goes to another target than this by now.
    fn forget(&mut self, table: FlowTable, key: &FlowKey, target: u32);
}

/// A walk, with the tables as they were when it began.
pub struct Walk {
    /// What the kernel's tables held.
    pub tables: Arc<Desired>,
    /// Keys of the flow hash.
    pub keys: HashKeys,
    /// Slots of a ring.
    pub ring_size: u32,
    /// Slots that were pinned.
    pub pinned: Slots,
}

/// What a walk found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    /// Pinned slots without a flow that the hash would send elsewhere.
    pub settled: Slots,
    /// Live flows by target.
    pub flows: BTreeMap<u32, u64>,
    /// What makes the number of live connections of what the programs have seen, by target: for
    /// those that are chosen by it.
    pub corrections: BTreeMap<u32, u64>,
}

/// What a remembered flow means for its slot.
#[derive(Debug, PartialEq, Eq)]
enum Finding {
    /// It is over.
    Dead,
    /// The hash says the same: it need not be remembered.
    Redundant,
    /// The slot must stay pinned for it.
    Exception(u32, u32),
    /// Neither: its slot is not pinned, or its listener tracks every flow.
    Other,
}

impl Walk {
    /// Looks at every flow once; `now` is the kernel's monotonic time, nanoseconds. Forgets what
    /// the hash alone would do as well: should the slot have changed meanwhile, an unknown flow
    /// goes to the same target by `previous`.
    pub fn run(mut self, store: &mut impl FlowStore, now: u64) -> Findings {
        let mut findings =
            Findings { settled: std::mem::take(&mut self.pinned), ..Findings::default() };
        self.pinned = findings.settled.clone();
        let mut connections: BTreeMap<u32, u64> =
            self.tables.shares.keys().map(|target| (*target, 0)).collect();
        let mut before = BTreeMap::new();
        // A flow moves to the first table while we walk: it is in the other one or here.
        for table in [FlowTable::OnceSeen, FlowTable::HalfOpen, FlowTable::Flows] {
            let mut needless = Vec::new();
            if table == FlowTable::Flows {
                before = connections.keys().map(|n| (*n, store.balance(*n))).collect();
            }
            store.each(table, &mut |key, flow| {
                let finding = self.judge(&key, &flow, now);
                if finding != Finding::Dead && flow.closing == 0 {
                    *findings.flows.entry(flow.target).or_default() += 1;
                    if table == FlowTable::Flows
                        && let Some(count) = connections.get_mut(&flow.target)
                    {
                        *count += 1;
                    }
                }
                match finding {
                    Finding::Dead | Finding::Redundant => needless.push((key, flow.target)),
                    Finding::Exception(ring, slot) => {
                        if let Some(slots) = findings.settled.get_mut(&ring) {
                            slots.remove(&slot);
                        }
                    }
                    Finding::Other => {}
                }
            });
            if table == FlowTable::Flows {
                findings.corrections = corrections(&connections, &before, store);
            }
            for (key, target) in needless {
                store.forget(table, &key, target);
            }
        }
        findings
    }

    fn judge(&self, key: &FlowKey, flow: &Flow, now: u64) -> Finding {
        let listener = EndpointKey::new(key.destination, key.destination_port, key.protocol);
        let Some(endpoint) = self.tables.endpoints.get(&listener) else { return Finding::Dead };
        let idle = self.tables.listeners.get(&endpoint.listener).map_or(0, |known| known.idle);
        if !flow.is_alive(now, idle) {
            return Finding::Dead;
        }
        let is_tracked = endpoint.kind & Endpoint::TRACKED != 0;
        let Some((ring, slot)) = slot_of(&self.tables, &self.keys, key, self.ring_size) else {
            return Finding::Dead;
        };
        if !self.pinned.get(&ring).is_some_and(|slots| slots.contains(&slot)) {
            return Finding::Other;
        }
        let current = self.tables.rings.get(&ring).and_then(|slots| slots.get(slot as usize));
        match current.is_some_and(|current| current.current == flow.target) {
            true if is_tracked => Finding::Other,
            true => Finding::Redundant,
            false => Finding::Exception(ring, slot),
        }
    }
}

/// What begins and ends while flows are counted is in the count by half: it is taken for the number
/// that there was in the middle.
fn corrections(
    connections: &BTreeMap<u32, u64>,
    before: &BTreeMap<u32, u64>,
    store: &impl FlowStore,
) -> BTreeMap<u32, u64> {
    let correction = |(target, count): (&u32, &u64)| {
        let begin = before.get(target).copied().unwrap_or(0);
        let change = store.balance(*target).wrapping_sub(begin) as i64;
        let middle = begin.wrapping_add_signed(change / 2);
        (*target, count.wrapping_sub(middle))
    };
    connections.iter().map(correction).collect()
}
