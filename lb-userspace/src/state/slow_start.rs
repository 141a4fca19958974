//! Slow start: the share of a target that joins others grows from a tenth to the whole. Pure.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::TargetKey;

/// Steps from nothing to the full share. Each is a change of the ring, and the slots that it moves
/// learn; so they are few, and all targets of a group take them together.
pub const STEPS: u32 = 10;

/// The targets whose share grows.
#[derive(Debug)]
pub struct SlowStart {
    epoch: Instant,
    warming: BTreeMap<TargetKey, Warming>,
}

#[derive(Debug, Clone, Copy)]
struct Warming {
    duration: Duration,
    /// Steps since the epoch when it began.
    began: u128,
    /// Its share, in steps.
    share: u32,
}

impl SlowStart {
    /// No target's share grows.
    pub fn new(now: Instant) -> Self {
        Self { epoch: now, warming: BTreeMap::new() }
    }

    /// The share of a target, of [`STEPS`].
    pub fn share(&self, key: &TargetKey) -> u32 {
        self.warming.get(key).map_or(STEPS, |warming| warming.share)
    }

    /// A target's share grows from now on, for so long.
    pub fn begin(&mut self, key: TargetKey, duration: Duration, now: Instant) {
        let began = step(self.epoch, duration, now);
        self.warming.insert(key, Warming { duration, began, share: 1 });
    }

    /// A target takes its full share, or none.
    pub fn end(&mut self, key: &TargetKey) {
        self.warming.remove(key);
    }

    /// Ends it for all targets but these; `goes_on` says for how long their group's take, now.
    pub fn retain(&mut self, goes_on: impl Fn(&TargetKey) -> Option<Duration>) {
        self.warming.retain(|key, warming| goes_on(key) == Some(warming.duration));
    }

    /// Lets time pass; whether a share grew.
    pub fn tick(&mut self, now: Instant) -> bool {
        let mut changed = false;
        self.warming.retain(|_, warming| {
            let steps = step(self.epoch, warming.duration, now).saturating_sub(warming.began) + 1;
            let share = u32::try_from(steps).unwrap_or(STEPS).min(STEPS);
            changed |= share != warming.share;
            warming.share = share;
            share < STEPS
        });
        changed
    }
}

/// Steps since the epoch: the same moments for all targets of a group.
fn step(epoch: Instant, duration: Duration, now: Instant) -> u128 {
    let length = (duration / STEPS).max(Duration::from_nanos(1));
    now.saturating_duration_since(epoch).as_nanos() / length.as_nanos()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DURATION: Duration = Duration::from_secs(30);

    fn key(last: u8) -> TargetKey {
        TargetKey { target_group: "web".into(), address: [10, 0, 2, last].into(), port: 80 }
    }

    #[test]
    fn a_share_grows_linearly_to_the_whole_in_ten_steps() {
        let start = Instant::now();
        let mut slow_start = SlowStart::new(start);
        assert_eq!(slow_start.share(&key(1)), STEPS);
        slow_start.begin(key(1), DURATION, start);
        let mut changes = 0;
        for second in 0..=30 {
            changes += u32::from(slow_start.tick(start + Duration::from_secs(second)));
            let exact = (second as f64 / 30.0 * f64::from(STEPS)).min(f64::from(STEPS));
            let share = f64::from(slow_start.share(&key(1)));
            assert!((share - exact).abs() <= 1.0, "{share} after {second} s");
        }
        assert_eq!((changes, slow_start.share(&key(1))), (STEPS - 1, STEPS));
        assert!(!slow_start.tick(start + 2 * DURATION));
    }

    #[test]
    fn targets_that_join_one_after_the_other_take_their_steps_together() {
        let start = Instant::now();
        let mut slow_start = SlowStart::new(start);
        let mut changes = 0;
        for millisecond in 0..60_000 {
            let now = start + Duration::from_millis(millisecond);
            if millisecond % 100 == 0 && millisecond < 10_000 {
                slow_start.begin(key((millisecond / 100) as u8), DURATION, now);
            }
            changes += u32::from(slow_start.tick(now));
        }
        assert!(changes <= 14, "{changes} changes of the ring in 40 s");
        assert!((0..100).all(|n| slow_start.share(&key(n)) == STEPS));
    }

    #[test]
    fn it_ends_with_the_target_s_health_and_the_group_s_setting() {
        let start = Instant::now();
        let mut slow_start = SlowStart::new(start);
        for n in 1..=3 {
            slow_start.begin(key(n), DURATION, start);
        }
        slow_start.end(&key(1));
        slow_start.retain(|other| (*other == key(2)).then_some(DURATION));
        assert_eq!([1, 2, 3].map(|n| slow_start.share(&key(n))), [STEPS, 1, STEPS]);
        slow_start.retain(|_| Some(2 * DURATION));
        assert_eq!(slow_start.share(&key(2)), STEPS);
    }
}
