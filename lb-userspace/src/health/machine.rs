//! From the outcomes of checks to a target's health. No clock, no I/O.

use super::status::{Health, HealthState, Reason};
use crate::config::model::HealthCheck;

/// What came out of one check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The target answered as it should.
    Pass,
    /// It did not.
    Fail {
        /// Why, for programs.
        reason: Reason,
        /// Why, for people.
        description: String,
    },
}

/// How many outcomes in a row change a target's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thresholds {
    /// Passes that make an unhealthy target healthy.
    pub healthy: u32,
    /// Failures that make a healthy or an initial target unhealthy.
    pub unhealthy: u32,
}

impl From<&HealthCheck> for Thresholds {
    fn from(check: &HealthCheck) -> Self {
        Self { healthy: check.healthy_threshold, unhealthy: check.unhealthy_threshold }
    }
}

/// The health of one target.
///
/// A new target is initial; one pass makes it healthy, [`Thresholds::unhealthy`] failures in a
/// row make it unhealthy. From then on only as many contrary outcomes in a row as the thresholds
/// say change its state.
#[derive(Debug)]
pub struct Machine {
    thresholds: Thresholds,
    health: Health,
    /// Outcomes in a row that speak against the state.
    contrary: u32,
    /// Whether an outcome was ever observed.
    concluded: bool,
}

impl Machine {
    /// A machine for a new target.
    pub fn new(thresholds: Thresholds) -> Self {
        Self { thresholds, health: Health::initial(), contrary: 0, concluded: false }
    }

    /// Goes on for a check that asks otherwise: the state stays, the counting starts anew, since
    /// outcomes of different questions do not add up.
    pub fn change(&mut self, thresholds: Thresholds) {
        self.thresholds = thresholds;
        self.contrary = 0;
    }

    /// Takes in the outcome of a check. The health if it is another than before, and after the
    /// first outcome in any case.
    ///
    /// While the state stays, the reason still follows the failures: an unhealthy target that
    /// first refused and now times out is reported again.
    pub fn observe(&mut self, outcome: Outcome) -> Option<Health> {
        let first = !std::mem::replace(&mut self.concluded, true);
        let next = self.next(outcome);
        if next == self.health && !first {
            return None;
        }
        self.health = next.clone();
        Some(next)
    }

    fn next(&mut self, outcome: Outcome) -> Health {
        let state = self.turn(&outcome);
        match (state, outcome) {
            (HealthState::Healthy, Outcome::Pass) => Health::healthy(),
            (HealthState::Unhealthy, Outcome::Fail { reason, description }) => {
                Health { state, reason: Some(reason), description: Some(description) }
            }
            (HealthState::Initial, Outcome::Fail { description, .. }) => {
                Health { description: Some(description), ..Health::initial() }
            }
            // Contrary to the state, but not often enough.
            _ => self.health.clone(),
        }
    }

    /// Counts the outcome and returns the state after it.
    fn turn(&mut self, outcome: &Outcome) -> HealthState {
        let state = self.health.state;
        let (wanted, needed) = match outcome {
            Outcome::Pass if state == HealthState::Initial => (HealthState::Healthy, 1),
            Outcome::Pass => (HealthState::Healthy, self.thresholds.healthy),
            Outcome::Fail { .. } => (HealthState::Unhealthy, self.thresholds.unhealthy),
        };
        self.contrary = if wanted == state { 0 } else { self.contrary + 1 };
        if self.contrary < needed {
            return state;
        }
        self.contrary = 0;
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const THRESHOLDS: Thresholds = Thresholds { healthy: 3, unhealthy: 2 };

    fn fail(description: &str) -> Outcome {
        Outcome::Fail { reason: Reason::FailedHealthChecks, description: description.to_owned() }
    }

    /// Feeds `P` and `F`; one letter a step: the state reported, or `.` for no report.
    fn run(machine: &mut Machine, outcomes: &str) -> String {
        outcomes
            .chars()
            .map(|c| machine.observe(if c == 'P' { Outcome::Pass } else { fail("refused") }))
            .map(|report| match report.map(|health| health.state) {
                None => '.',
                Some(HealthState::Initial) => 'i',
                Some(HealthState::Healthy) => 'h',
                Some(HealthState::Unhealthy) => 'u',
                Some(other) => panic!("{other}"),
            })
            .collect()
    }

    #[test]
    fn one_pass_makes_a_new_target_healthy() {
        assert_eq!(run(&mut Machine::new(THRESHOLDS), "P"), "h");
        assert_eq!(run(&mut Machine::new(THRESHOLDS), "FP"), "ih");
    }

    #[test]
    fn a_new_target_fails_often_enough_before_it_is_unhealthy() {
        assert_eq!(run(&mut Machine::new(THRESHOLDS), "FF"), "iu");
    }

    #[test]
    fn only_outcomes_in_a_row_count() {
        assert_eq!(run(&mut Machine::new(THRESHOLDS), "PFPFPFF"), "h.....u");
        assert_eq!(run(&mut Machine::new(THRESHOLDS), "FFPPFPPFPPP"), "iu........h");
    }

    #[test]
    fn a_changed_check_keeps_the_state_and_counts_anew() {
        let mut machine = Machine::new(THRESHOLDS);
        assert_eq!(run(&mut machine, "PF"), "h.");
        machine.change(Thresholds { healthy: 2, unhealthy: 3 });
        assert_eq!(run(&mut machine, "FF"), "..");
        assert_eq!(run(&mut machine, "FPP"), "u.h");
    }

    #[test]
    fn the_reason_is_the_last_failures() {
        let mut machine = Machine::new(THRESHOLDS);
        let first = machine.observe(fail("refused")).unwrap();
        assert_eq!(first.reason, Some(Reason::InitialHealthChecking));
        assert_eq!(first.description.as_deref(), Some("refused"));
        assert_eq!(machine.observe(fail("refused")).unwrap().state, HealthState::Unhealthy);

        let timeout = Outcome::Fail { reason: Reason::Timeout, description: "late".to_owned() };
        let health = machine.observe(timeout.clone()).unwrap();
        assert_eq!(health.reason, Some(Reason::Timeout));
        assert_eq!(health.description.as_deref(), Some("late"));
        assert_eq!(machine.observe(timeout), None);

        assert_eq!(run(&mut machine, "PPP"), "..h");
        assert_eq!(machine.health, Health::healthy());
    }

    /// The state after `passes`, read off the whole history: it is what the last conclusive
    /// window of outcomes says. A window of failures is always conclusive, one of passes too,
    /// and a single pass is as long as no conclusive window came before it.
    fn oracle(passes: &[bool], thresholds: Thresholds) -> HealthState {
        let ends_window = |end: usize, of: bool, length: u32| {
            let length = length as usize;
            end >= length && passes[end - length..end].iter().all(|&pass| pass == of)
        };
        let fails_at = |end| ends_window(end, false, thresholds.unhealthy);
        let passes_at = |end: usize| {
            ends_window(end, true, thresholds.healthy)
                || (passes[end - 1]
                    && !(1..end).any(|before| passes[before - 1] || fails_at(before)))
        };
        (1..=passes.len())
            .rev()
            .find_map(|end| {
                fails_at(end)
                    .then_some(HealthState::Unhealthy)
                    .or_else(|| passes_at(end).then_some(HealthState::Healthy))
            })
            .unwrap_or(HealthState::Initial)
    }

    proptest! {
        #[test]
        fn agrees_with_the_oracle(
            passes in prop::collection::vec(any::<bool>(), 0..40),
            healthy in 2u32..=4,
            unhealthy in 2u32..=4,
        ) {
            let thresholds = Thresholds { healthy, unhealthy };
            let mut machine = Machine::new(thresholds);
            let mut before = HealthState::Initial;
            for (index, &pass) in passes.iter().enumerate() {
                let report =
                    machine.observe(if pass { Outcome::Pass } else { fail("refused") });
                let now = oracle(&passes[..=index], thresholds);
                prop_assert_eq!(machine.health.state, now);
                // Failures are all alike here, so a report is a transition or the first one.
                prop_assert_eq!(report.is_some(), index == 0 || now != before);
                if let Some(health) = report {
                    prop_assert_eq!(health.state, now);
                }
                before = now;
            }
        }
    }
}
