//! The life of a ring: what a change of its targets does to each slot, and what time does. Pure.
//!
//! See docs/connections.md for the whole story and the drawing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lb_common::maglev::{self, Candidate};
use lb_common::tables::{Slot, SlotState};

/// How long a changed slot learns which flows it has: until every flow that is silent for longer
/// is over anyway.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Periods {
    /// The longest idle timeout of all flows, and a little more.
    pub learning: Duration,
    /// The same of UDP flows.
    pub learning_udp: Duration,
}

/// A ring, and since when its slots learn.
#[derive(Debug, Clone)]
pub struct Ring {
    candidates: Vec<Candidate>,
    /// Their numbers.
    members: BTreeSet<u32>,
    slots: Arc<[Slot]>,
    /// When each learning slot began to, as time since `epoch`.
    since: Vec<Duration>,
    epoch: Instant,
    /// When a slot last began to learn, or to be looked through once more.
    turned: Instant,
    /// Whether a slot learns.
    learns: bool,
    periods: Periods,
}

impl Ring {
    /// A first ring: nothing went anywhere before, so the hash alone decides.
    pub fn new(candidates: Vec<Candidate>, size: u32, periods: Periods, now: Instant) -> Self {
        let slots: Arc<[Slot]> =
            maglev::ring(&candidates, size).into_iter().map(Slot::settled).collect();
        let since = vec![Duration::ZERO; slots.len()];
        let members = members(&candidates);
        Self { candidates, members, slots, since, epoch: now, turned: now, learns: false, periods }
    }

    /// The slots.
    pub fn slots(&self) -> &Arc<[Slot]> {
        &self.slots
    }

    /// Whether the hash alone decides on every slot.
    pub fn is_settled(&self) -> bool {
        self.slots.iter().all(|slot| slot.is_settled())
    }

    /// Numbers of the targets that take new flows.
    pub fn members(&self) -> &BTreeSet<u32> {
        &self.members
    }

    /// Whether a target takes new flows.
    pub fn has_candidate(&self, target: u32) -> bool {
        self.members.contains(&target)
    }

    /// Idle timeouts changed.
    pub fn set_periods(&mut self, periods: Periods) {
        self.periods = periods;
    }

    /// Gives the slots to other candidates. Slots that keep their target are not touched. Without
    /// candidates no slot has a target for new flows; known ones stay where they are.
    pub fn change(&mut self, candidates: Vec<Candidate>, now: Instant) {
        if candidates == self.candidates {
            return;
        }
        let mut targets = maglev::ring(&candidates, self.slots.len() as u32);
        targets.resize(self.slots.len(), NO_TARGET);
        self.turned = now;
        let now = now.duration_since(self.epoch);
        let changed =
            self.slots.iter().zip(&targets).zip(&mut self.since).map(|((slot, next), since)| {
                let (slot, starts) = turn(*slot, *next);
                if starts {
                    *since = now;
                }
                slot
            });
        let slots: Arc<[Slot]> = changed.collect();
        if slots != self.slots {
            self.slots = slots;
            self.learns = true;
        }
        self.members = members(&candidates);
        self.candidates = candidates;
    }

    /// Lets time pass; whether a slot changed.
    pub fn tick(&mut self, now: Instant) -> bool {
        if !self.learns {
            return false;
        }
        let now = now.duration_since(self.epoch);
        let periods = self.periods;
        let aged: Vec<Slot> = self
            .slots
            .iter()
            .zip(&self.since)
            .map(|(slot, since)| age(*slot, now.saturating_sub(*since), periods))
            .collect();
        let changed = aged != *self.slots;
        if changed {
            let learns =
                |slot: &Slot| matches!(slot.state(), SlotState::Learning | SlotState::LearningTcp);
            self.learns = aged.iter().any(learns);
            self.slots = aged.into();
        }
        changed
    }

    /// Slots on which every flow that matters is remembered.
    pub fn pinned(&self) -> BTreeSet<u32> {
        let pinned = |(_, slot): &(u32, &Slot)| slot.state() == SlotState::Pinned;
        (0..).zip(self.slots.iter()).filter(pinned).map(|(index, _)| index).collect()
    }

    /// Whether there are pinned slots whose exceptions nobody has looked for.
    pub fn is_unexplored(&self) -> bool {
        self.slots.iter().any(|slot| slot.state() == SlotState::Pinned && !slot.is_mapped())
    }

    /// Flows that were tracked up to now may be where the hash would not send them: no slot is
    /// settled until a walk has looked.
    pub fn unsettle(&mut self, now: Instant) {
        self.turned = now;
        let pin = |slot: &Slot| match slot.state() {
            SlotState::Settled => Slot::new(slot.current, slot.current, SlotState::Pinned),
            SlotState::Pinned => Slot::new(slot.current, slot.previous(), SlotState::Pinned),
            SlotState::Learning | SlotState::LearningTcp => *slot,
        };
        self.slots = self.slots.iter().map(pin).collect();
    }

    /// Flows were not tracked up to now, and new ones will go elsewhere than the hash says: what is
    /// older than this goes by the hash for as long as it may be.
    pub fn learn(&mut self, now: Instant) {
        self.turned = now;
        let now = now.duration_since(self.epoch);
        let slots = self.slots.iter().zip(&mut self.since).map(|(slot, since)| {
            if matches!(slot.state(), SlotState::Learning | SlotState::LearningTcp) {
                return *slot;
            }
            *since = now;
            Slot::new(slot.current, slot.current, SlotState::Learning)
        });
        self.slots = slots.collect();
        self.learns = true;
    }

    /// Whether no slot has begun anew since a moment.
    pub fn is_as_of(&self, moment: Instant) -> bool {
        self.turned < moment
    }

    /// Says of slots that all flows which go elsewhere are in the map of exceptions. None comes to
    /// a pinned slot, so that stays true until its target changes.
    pub fn map(&mut self, mapped: &BTreeSet<u32>) {
        let slots = (0..).zip(self.slots.iter()).map(|(index, slot)| {
            let is_mapped = mapped.contains(&index) && slot.state() == SlotState::Pinned;
            if is_mapped { slot.mapped() } else { *slot }
        });
        self.slots = slots.collect();
    }

    /// Settles slots: no flow is left on them that the hash would send elsewhere.
    pub fn settle(&mut self, settled: &BTreeSet<u32>) {
        let slots = (0..).zip(self.slots.iter()).map(|(index, slot)| {
            let settles = settled.contains(&index) && slot.state() == SlotState::Pinned;
            if settles { Slot::settled(slot.current) } else { *slot }
        });
        self.slots = slots.collect();
    }
}

/// Index of no target.
const NO_TARGET: u32 = 0;

fn members(candidates: &[Candidate]) -> BTreeSet<u32> {
    candidates.iter().map(|candidate| candidate.target).collect()
}

/// What a new target makes of a slot, and whether its learning begins.
fn turn(slot: Slot, next: u32) -> (Slot, bool) {
    if slot.current == next {
        return (slot, false);
    }
    match slot.state() {
        // Everybody unknown is on `current`: whoever is not new stays there.
        SlotState::Settled | SlotState::Pinned => {
            (Slot::new(next, slot.current, SlotState::Learning), true)
        }
        // Whoever is unknown and not new is still on `previous`, and is being learned.
        _ if next == slot.previous() => (Slot::new(next, next, SlotState::Pinned), false),
        state => (Slot::new(next, slot.previous(), state), false),
    }
}

/// What time makes of a slot that learns since `age`.
fn age(slot: Slot, age: Duration, periods: Periods) -> Slot {
    match slot.state() {
        SlotState::Learning | SlotState::LearningTcp if age >= periods.learning => {
            Slot::new(slot.current, slot.previous(), SlotState::Pinned)
        }
        SlotState::Learning if age >= periods.learning_udp => {
            Slot::new(slot.current, slot.previous(), SlotState::LearningTcp)
        }
        _ => slot,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const PERIODS: Periods =
        Periods { learning: Duration::from_secs(350), learning_udp: Duration::from_secs(120) };

    fn candidates(targets: &[u32]) -> Vec<Candidate> {
        targets
            .iter()
            .map(|n| Candidate { target: *n, identity: u64::from(*n) * 7919, weight: 1 })
            .collect()
    }

    fn states(ring: &Ring) -> BTreeSet<&'static str> {
        let name = |slot: &Slot| match slot.state() {
            SlotState::Settled => "settled",
            SlotState::Learning => "learning",
            SlotState::LearningTcp => "learning TCP",
            SlotState::Pinned => "pinned",
        };
        ring.slots.iter().map(name).collect()
    }

    #[test]
    fn only_slots_that_change_their_target_learn() {
        let now = Instant::now();
        let mut ring = Ring::new(candidates(&[1, 2]), 251, PERIODS, now);
        let before = ring.slots.clone();
        ring.change(candidates(&[1, 2, 3]), now + SECOND);
        let mut moved = 0;
        for (old, new) in before.iter().zip(ring.slots.iter()) {
            if old.current == new.current {
                assert_eq!(old, new);
            } else {
                moved += 1;
                assert_eq!(*new, Slot::new(new.current, old.current, SlotState::Learning));
            }
        }
        assert!((251 / 3..251 / 2).contains(&moved), "{moved} of 251");
    }

    #[test]
    fn a_slot_learns_then_is_pinned_then_settles() {
        let start = Instant::now();
        let mut ring = Ring::new(candidates(&[1]), 251, PERIODS, start);
        ring.change(candidates(&[2]), start + 100 * SECOND);
        assert!(!ring.tick(start + 219 * SECOND));
        assert!(ring.tick(start + 220 * SECOND));
        assert_eq!(states(&ring), BTreeSet::from(["learning TCP"]));
        assert!(!ring.tick(start + 449 * SECOND));
        assert!(ring.tick(start + 450 * SECOND));
        assert_eq!(states(&ring), BTreeSet::from(["pinned"]));
        let pinned = ring.pinned();
        assert_eq!(pinned.len(), 251);
        assert!(ring.is_unexplored());
        ring.settle(&pinned);
        assert!(!ring.is_unexplored());
        assert_eq!(*ring.slots, *vec![Slot::settled(2); 251]);
    }

    #[test]
    fn a_further_change_does_not_restart_the_clock() {
        let start = Instant::now();
        let mut ring = Ring::new(candidates(&[1]), 251, PERIODS, start);
        ring.change(candidates(&[2]), start);
        ring.change(candidates(&[3]), start + 300 * SECOND);
        assert_eq!(ring.slots[0], Slot::new(3, 1, SlotState::Learning));
        ring.tick(start + 350 * SECOND);
        assert_eq!(states(&ring), BTreeSet::from(["pinned"]));
    }

    #[test]
    fn the_previous_target_back_pins_at_once() {
        let start = Instant::now();
        let mut ring = Ring::new(candidates(&[1]), 251, PERIODS, start);
        ring.change(candidates(&[2]), start);
        ring.change(candidates(&[1]), start + SECOND);
        assert_eq!(*ring.slots, *vec![Slot::new(1, 1, SlotState::Pinned); 251]);
    }

    #[test]
    fn without_candidates_known_flows_stay() {
        let start = Instant::now();
        let mut ring = Ring::new(candidates(&[1]), 251, PERIODS, start);
        ring.change(Vec::new(), start);
        assert_eq!(*ring.slots, *vec![Slot::new(0, 1, SlotState::Learning); 251]);
        ring.change(candidates(&[1]), start + SECOND);
        assert_eq!(*ring.slots, *vec![Slot::new(1, 1, SlotState::Pinned); 251]);
    }

    #[test]
    fn periods_follow_the_idle_timeouts() {
        let start = Instant::now();
        let short = Periods { learning: 10 * SECOND, learning_udp: 10 * SECOND };
        let mut ring = Ring::new(candidates(&[1]), 251, short, start);
        ring.change(candidates(&[2]), start);
        ring.set_periods(PERIODS);
        ring.tick(start + 10 * SECOND);
        assert_eq!(states(&ring), BTreeSet::from(["learning"]));
        ring.set_periods(short);
        ring.tick(start + 10 * SECOND);
        assert_eq!(states(&ring), BTreeSet::from(["pinned"]));
    }

    #[test]
    fn what_was_not_tracked_goes_by_the_hash_for_a_while() {
        let start = Instant::now();
        let mut ring = Ring::new(candidates(&[1]), 251, PERIODS, start);
        ring.learn(start + 10 * SECOND);
        assert_eq!(*ring.slots, *vec![Slot::new(1, 1, SlotState::Learning); 251]);
        ring.tick(start + 130 * SECOND);
        assert_eq!(states(&ring), BTreeSet::from(["learning TCP"]));
        ring.learn(start + 140 * SECOND);
        ring.tick(start + 360 * SECOND);
        assert_eq!(states(&ring), BTreeSet::from(["pinned"]), "the clock went on");
    }

    #[test]
    fn only_pinned_slots_are_mapped_until_their_target_changes() {
        let start = Instant::now();
        let mut ring = Ring::new(candidates(&[1]), 251, PERIODS, start);
        let all = (0..251).collect();
        ring.map(&all);
        assert_eq!(*ring.slots, *vec![Slot::settled(1); 251]);
        ring.change(candidates(&[2]), start);
        ring.map(&all);
        assert_eq!(*ring.slots, *vec![Slot::new(2, 1, SlotState::Learning); 251]);
        ring.tick(start + 350 * SECOND);
        ring.map(&all);
        let pinned = Slot::new(2, 1, SlotState::Pinned);
        assert_eq!(*ring.slots, *vec![pinned.mapped(); 251]);
        assert!(!ring.is_unexplored());
        assert_eq!((pinned.mapped().previous(), pinned.mapped().state()), (1, SlotState::Pinned));
        assert!(!ring.tick(start + 400 * SECOND) && ring.pinned().len() == 251);
        ring.change(candidates(&[1]), start + 400 * SECOND);
        assert_eq!(*ring.slots, *vec![Slot::new(1, 2, SlotState::Learning); 251]);
    }

    /// From there and back again within a walk: what learned in between the walk may have missed.
    #[test]
    fn what_turned_during_a_walk_is_not_as_it_was() {
        let start = Instant::now();
        let mut ring = Ring::new(candidates(&[1]), 251, PERIODS, start);
        let begun = start + SECOND;
        assert!(ring.is_as_of(begun));
        ring.change(candidates(&[2]), begun + SECOND);
        ring.change(candidates(&[1]), begun + 2 * SECOND);
        assert!(!ring.is_as_of(begun));
        assert!(ring.is_as_of(begun + 3 * SECOND));
    }

    #[test]
    fn what_was_tracked_is_looked_through() {
        let mut ring = Ring::new(candidates(&[1]), 251, PERIODS, Instant::now());
        let pinned = vec![Slot::new(1, 1, SlotState::Pinned); 251];
        ring.unsettle(Instant::now());
        assert_eq!(*ring.slots, *pinned);
        ring.map(&(0..251).collect());
        assert!(ring.slots.iter().all(|slot| slot.is_mapped()));
        ring.unsettle(Instant::now());
        assert_eq!(*ring.slots, *pinned, "there may be new exceptions");
    }
}
