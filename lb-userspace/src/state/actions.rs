//! Which rings there are: one for each forward action, and for each history that its listeners
//! have. Pure.
//!
//! A listener whose action changes takes its ring along, so its flows are where they were: only
//! the slots that get another target learn. So two listeners of one action may have two rings,
//! until nothing is left in either of what was before.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use lb_common::maglev::Candidate;
use lb_common::tables::MAX_RINGS;

use crate::config::{self, WeightedTargetGroup};

use super::ListenerKey;
use super::rings::{Periods, Ring};

/// What a listener does with a new flow: the target groups that it can go to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Action {
    /// By name.
    pub groups: Vec<WeightedTargetGroup>,
    /// Whether it keeps to the agent's zone.
    pub is_zonal: bool,
    /// The family of address and targets.
    pub is_v4: bool,
}

impl Action {
    /// Of a listener on an address of one family.
    pub fn new(listener: &config::Listener, is_zonal: bool, is_v4: bool) -> Self {
        let mut groups = listener.target_groups.clone();
        groups.sort();
        if let [only] = groups.as_mut_slice() {
            only.weight = 1; // Of nothing else: all weights are alike.
        }
        Self { groups, is_zonal, is_v4 }
    }
}

/// Who takes the new flows of an action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Candidates {
    /// These; without one, its targets only keep the flows that they have.
    Are(Vec<Candidate>),
    /// There is no target at all, and no flow left.
    Nobody,
    /// It will be known once the first checks have concluded.
    Unknown,
}

/// A ring in use.
#[derive(Debug)]
struct Kept {
    action: Action,
    /// Its place in the kernel's table.
    number: u32,
    ring: Ring,
}

/// All rings in use, and whose they are.
#[derive(Debug, Default)]
pub struct Rings {
    rings: BTreeMap<u32, Kept>,
    of: BTreeMap<ListenerKey, u32>,
    next: u32,
}

impl Rings {
    /// The ring of a listener: its number, and itself.
    pub fn of(&self, listener: &ListenerKey) -> Option<(u32, &Ring)> {
        let kept = self.rings.get(self.of.get(listener)?)?;
        Some((kept.number, &kept.ring))
    }

    /// All of them by number.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Ring)> {
        self.rings.values().map(|kept| (kept.number, &kept.ring))
    }

    /// All of them by number.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut Ring)> {
        self.rings.values_mut().map(|kept| (kept.number, &mut kept.ring))
    }

    /// The ring of a listener.
    pub fn of_mut(&mut self, listener: &ListenerKey) -> Option<&mut Ring> {
        let kept = self.rings.get_mut(self.of.get(listener)?)?;
        Some(&mut kept.ring)
    }

    /// Whether a ring has a share for the target group.
    pub fn has_group(&self, name: &str, is_v4: bool) -> bool {
        self.rings.values().any(|kept| {
            let mut groups = kept.action.groups.iter();
            kept.action.is_v4 == is_v4 && groups.any(|group| group.name == name)
        })
    }

    /// Gives every listener the ring of its action: the one it has, turned to the candidates of
    /// now, or a first one.
    pub fn turn(
        &mut self,
        listeners: &BTreeMap<ListenerKey, Action>,
        candidates: impl Fn(&Action, Option<&Ring>) -> Candidates,
        periods: impl Fn(&Action) -> Periods,
        size: u32,
        now: Instant,
    ) {
        let mut turn = Turn {
            // A number that this turn sets free may still be what a listener names: until the
            // tables are as wanted, its slots stay as they are.
            taken: self.rings.values().map(|kept| kept.number).collect(),
            old: std::mem::take(self),
            new: Self::default(),
            candidates,
            periods,
            size,
            now,
        };
        turn.new.next = turn.old.next;
        let mut newcomers = Vec::new();
        let mut histories: BTreeMap<(u32, &Action), Vec<&ListenerKey>> = BTreeMap::new();
        for (key, action) in listeners {
            match turn.old.of.get(key) {
                Some(id) => histories.entry((*id, action)).or_default().push(key),
                None => newcomers.push((key, action)),
            }
        }
        for ((id, action), keys) in histories {
            if let Some(id) = turn.go_on(id, action) {
                turn.new.of.extend(keys.into_iter().map(|key| (key.clone(), id)));
            }
        }
        for (key, action) in newcomers {
            if let Some(id) = turn.begin(action) {
                turn.new.of.insert(key.clone(), id);
            }
        }
        *self = turn.new;
        self.merge();
    }

    /// Listeners whose rings are the same share one, now that nothing is left of what they were.
    fn merge(&mut self) {
        let mut by_action: BTreeMap<&Action, Vec<(u32, &Ring)>> = BTreeMap::new();
        for (id, kept) in &self.rings {
            by_action.entry(&kept.action).or_default().push((*id, &kept.ring));
        }
        let mut same = BTreeMap::new();
        for rings in by_action.into_values().filter(|rings| rings.len() > 1) {
            let mut settled = rings.iter().filter(|(_, ring)| ring.is_settled());
            let Some((first, ring)) = settled.next() else { continue };
            let equal = settled.filter(|(_, other)| other.slots() == ring.slots());
            same.extend(equal.map(|(other, _)| (*other, *first)));
        }
        for id in self.of.values_mut() {
            *id = same.get(id).copied().unwrap_or(*id);
        }
        self.rings.retain(|id, _| !same.contains_key(id));
    }
}

/// One turn of all rings.
struct Turn<F, P> {
    old: Rings,
    new: Rings,
    taken: BTreeSet<u32>,
    candidates: F,
    periods: P,
    size: u32,
    now: Instant,
}

impl<F, P> Turn<F, P>
where
    F: Fn(&Action, Option<&Ring>) -> Candidates,
    P: Fn(&Action) -> Periods,
{
    /// The ring of listeners that had one.
    fn go_on(&mut self, id: u32, action: &Action) -> Option<u32> {
        let Kept { action: before, number, ring } = self.old.rings.get(&id)?;
        let (mut ring, number) = (ring.clone(), *number);
        let candidates = match (self.candidates)(action, Some(&ring)) {
            Candidates::Nobody => return None,
            Candidates::Are(candidates) => candidates,
            Candidates::Unknown => {
                let before = before.clone();
                self.new.rings.entry(id).or_insert(Kept { action: before, number, ring });
                return Some(id);
            }
        };
        let is_same = before == action;
        let old_slots = Arc::clone(ring.slots());
        ring.set_periods((self.periods)(action));
        ring.change(candidates, self.now);
        let stays = Arc::ptr_eq(&old_slots, ring.slots());
        // A whole new ring beside the old one, shown to each listener in one store.
        let number = if is_same && stays {
            number
        } else if let Some(free) = self.free() {
            free
        } else if let Some(other) = self.like(action).filter(|_| !is_same) {
            return Some(other);
        } else {
            tracing::debug!(number, "no spare ring: slots change in place");
            number
        };
        let id = if is_same { id } else { self.new_id() };
        self.new.rings.insert(id, Kept { action: action.clone(), number, ring });
        Some(id)
    }

    /// The ring of a listener that has no flows yet: any of its action.
    fn begin(&mut self, action: &Action) -> Option<u32> {
        if let Some(id) = self.like(action) {
            return Some(id);
        }
        let candidates = match (self.candidates)(action, None) {
            Candidates::Are(candidates) if !candidates.is_empty() => candidates,
            _ => return None,
        };
        let number = self.free()?;
        let ring = Ring::new(candidates, self.size, (self.periods)(action), self.now);
        let id = self.new_id();
        self.new.rings.insert(id, Kept { action: action.clone(), number, ring });
        Some(id)
    }

    fn like(&self, action: &Action) -> Option<u32> {
        let mut rings = self.new.rings.iter();
        rings.find(|(_, kept)| kept.action == *action).map(|(id, _)| *id)
    }

    fn free(&mut self) -> Option<u32> {
        (0..MAX_RINGS).find(|number| self.taken.insert(*number))
    }

    fn new_id(&mut self) -> u32 {
        self.new.next += 1;
        self.new.next - 1
    }
}
