//! The walk over the flow table that lets pinned slots settle.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lb_common::flow::{Flow, FlowKey, HashKeys};
use lb_common::tables::{Endpoint, EndpointKey};

use crate::dataplane::FlowTable;
use crate::reconcile::Desired;
use crate::state::slot_of;

/// Slots without a flow that the hash would send elsewhere, by ring.
pub type Settled = BTreeMap<u32, BTreeSet<u32>>;

/// A walk, with the tables as they were when it began.
pub struct Walk {
    /// The flows.
    pub table: FlowTable,
    /// What the kernel's tables held.
    pub tables: Arc<Desired>,
    /// Keys of the flow hash.
    pub keys: HashKeys,
    /// Slots of a ring.
    pub ring_size: u32,
    /// Slots that were pinned, by ring.
    pub pinned: Settled,
}

/// What a remembered flow means for its slot.
#[derive(Debug, PartialEq, Eq)]
enum Finding {
    /// The hash says the same, or the flow is over: it need not be remembered.
    Redundant,
    /// The slot must stay pinned for it.
    Exception(u32, u32),
    /// Neither: its slot is not pinned, or its listener tracks every flow.
    Other,
}

impl Walk {
    /// Looks at every flow once. Forgets what the hash alone would do as well: should the slot
    /// have changed meanwhile, an unknown flow goes to the same target by `previous`.
    pub fn run(mut self) -> Settled {
        let now = monotonic_nanoseconds();
        let mut redundant = Vec::new();
        let mut settled = self.pinned.clone();
        for (key, flow) in self.table.iter() {
            match self.judge(&key, &flow, now) {
                Finding::Redundant => redundant.push(key),
                Finding::Exception(ring, slot) => {
                    if let Some(slots) = settled.get_mut(&ring) {
                        slots.remove(&slot);
                    }
                }
                Finding::Other => {}
            }
        }
        for key in redundant {
            self.table.forget(&key);
        }
        settled
    }

    fn judge(&self, key: &FlowKey, flow: &Flow, now: u64) -> Finding {
        if !flow.is_alive(now, key.protocol) {
            return Finding::Redundant;
        }
        let listener = EndpointKey::new(key.destination, key.destination_port, key.protocol);
        let is_tracked = |endpoint: &Endpoint| endpoint.kind & Endpoint::TRACKED != 0;
        if self.tables.endpoints.get(&listener).is_some_and(is_tracked) {
            return Finding::Other;
        }
        let Some((ring, slot)) = slot_of(&self.tables, &self.keys, key, self.ring_size) else {
            return Finding::Redundant;
        };
        if !self.pinned.get(&ring).is_some_and(|slots| slots.contains(&slot)) {
            return Finding::Other;
        }
        let current = self.tables.rings.get(&ring).and_then(|slots| slots.get(slot as usize));
        if current.is_some_and(|current| current.current == flow.target) {
            Finding::Redundant
        } else {
            Finding::Exception(ring, slot)
        }
    }
}

/// The clock that the kernel's side stamps flows with (`bpf_ktime_get_ns`).
pub(super) fn monotonic_nanoseconds() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(|time| std::time::Duration::from(time).as_nanos() as u64)
        .unwrap_or(0)
}
