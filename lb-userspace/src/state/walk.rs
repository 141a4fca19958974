//! The walk over the remembered flows that lets pinned slots settle.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lb_common::flow;
use lb_common::flow::{Flow, FlowKey, FlowTable, HashKeys};
use lb_common::tables::{EXCEPTION_WORDS, Endpoint, EndpointKey, SlotState, exception_place};

use crate::reconcile::Desired;

use super::place_of;

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
    /// The other ones of them.
    pub mapped: Slots,
    /// The map of their exceptions, if there are any.
    pub exceptions: Vec<u64>,
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
    /// Its slot, of a ring, must stay pinned for it; with half of its hash.
    Exception(u32, u32, u32),
    /// Neither: its slot is not pinned, or its listener tracks every flow.
    Other,
}

impl Walk {
    /// Looks at every flow once; `now` is the kernel's monotonic time, nanoseconds. Forgets what
    /// the hash alone would do as well: should the slot have changed meanwhile, an unknown flow
    /// goes to the same target by `previous`.
    pub fn run(mut self, store: &mut impl FlowStore, now: u64) -> Findings {
        self.leave_out_what_learns();
        let mut findings = Findings { settled: self.pinned.clone(), ..Findings::default() };
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
                    Finding::Exception(ring, slot, hash) => findings.note(ring, slot, hash),
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

    /// A slot is pinned once the kernel has it so: until then it makes exceptions.
    fn leave_out_what_learns(&mut self) {
        let tables = &self.tables;
        for (ring, slots) in &mut self.pinned {
            let known = tables.rings.get(ring);
            let slot = |slot: u32| known.and_then(|slots| slots.get(slot as usize));
            slots.retain(|n| slot(*n).is_some_and(|slot| slot.state() == SlotState::Pinned));
        }
    }

    fn judge(&self, key: &FlowKey, flow: &Flow, now: u64) -> Finding {
        let listener = EndpointKey::new(key.destination, key.destination_port, key.protocol);
        let Some(endpoint) = self.tables.endpoints.get(&listener) else { return Finding::Dead };
        let idle = self.tables.listeners.get(&endpoint.listener).map_or(0, |known| known.idle);
        if !flow.is_alive(now, idle) {
            return Finding::Dead;
        }
        let is_tracked = endpoint.kind & Endpoint::TRACKED != 0;
        let Some((ring, hash)) = place_of(&self.tables, &self.keys, key) else {
            return Finding::Dead;
        };
        let slot = flow::slot(hash, self.ring_size);
        let current = self.tables.rings.get(&ring).and_then(|slots| slots.get(slot as usize));
        // As the kernel has it: whatever slot it has mapped must be in the next map, too.
        let Some(current) = current.filter(|slot| slot.state() == SlotState::Pinned) else {
            return Finding::Other;
        };
        match current.current == flow.target {
            true if is_tracked => Finding::Other,
            true => Finding::Redundant,
            false => Finding::Exception(ring, slot, hash as u32),
        }
    }
}

impl Findings {
    /// Notes a flow that its slot would send elsewhere.
    fn note(&mut self, ring: u32, slot: u32, hash: u32) {
        if self.settled.get_mut(&ring).is_some_and(|slots| slots.remove(&slot)) {
            self.mapped.entry(ring).or_default().insert(slot);
        }
        if self.exceptions.is_empty() {
            self.exceptions = vec![0; EXCEPTION_WORDS as usize];
        }
        let (word, bit) = exception_place(hash);
        if let Some(word) = self.exceptions.get_mut(word as usize) {
            *word |= bit;
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
