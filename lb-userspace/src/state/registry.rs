//! Numbers for what the kernel's tables name by index.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// Gives each key a number that stays while the key is in use.
#[derive(Debug)]
pub struct Registry<K> {
    numbers: BTreeMap<K, u32>,
    returned: VecDeque<(Instant, u32)>,
    next: u32,
    end: u32,
    quarantine: Duration,
    /// Whether a key went without a number since the others' were taken back.
    is_short: bool,
}

impl<K: Ord + Clone> Registry<K> {
    /// Numbers from 1 to `end` - 1.
    pub fn new(end: u32) -> Self {
        Self {
            numbers: BTreeMap::new(),
            returned: VecDeque::new(),
            next: 1,
            end,
            quarantine: Duration::ZERO,
            is_short: false,
        }
    }

    /// Flows are remembered for this long now. A number given back is not given out again before
    /// it is over, and a tenth more: until then a flow may be remembered that names it. Never
    /// shortened, because what was remembered under a longer timeout may still be there.
    pub fn remember_for(&mut self, idle_timeout: Duration) {
        self.quarantine = self.quarantine.max(idle_timeout + idle_timeout / 10);
    }

    /// The key's number, a new one if it has none; `None` if all are taken.
    pub fn number(&mut self, key: &K, now: Instant) -> Option<u32> {
        if let Some(number) = self.numbers.get(key) {
            return Some(*number);
        }
        let number = self.free(now);
        match number {
            Some(number) => drop(self.numbers.insert(key.clone(), number)),
            None => self.is_short = true,
        }
        number
    }

    /// The key's number, if it has one.
    pub fn get(&self, key: &K) -> Option<u32> {
        self.numbers.get(key).copied()
    }

    /// Whether some key has this number.
    pub fn has(&self, number: u32) -> bool {
        self.numbers.values().any(|known| *known == number)
    }

    /// Takes back the numbers of all other keys.
    pub fn retain(&mut self, in_use: &BTreeSet<K>, now: Instant) {
        self.is_short = false;
        self.numbers.retain(|key, number| {
            let stays = in_use.contains(key);
            if !stays {
                self.returned.push_back((now, *number));
            }
            stays
        });
    }

    /// How long a number rests.
    pub fn quarantine(&self) -> Duration {
        self.quarantine
    }

    fn has_rested(&self, returned: Instant, now: Instant) -> bool {
        now.duration_since(returned) >= self.quarantine
    }

    /// Whether a key that went without a number can have one now.
    pub fn has_come_free(&self, now: Instant) -> bool {
        self.is_short && self.returned.front().is_some_and(|(at, _)| self.has_rested(*at, now))
    }

    fn free(&mut self, now: Instant) -> Option<u32> {
        if let Some((returned, number)) = self.returned.front().copied()
            && self.has_rested(returned, now)
        {
            self.returned.pop_front();
            return Some(number);
        }
        if self.next == self.end {
            return None;
        }
        self.next += 1;
        Some(self.next - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_rests_before_it_is_given_out_again() {
        let start = Instant::now();
        let mut registry = Registry::new(3);
        registry.remember_for(Duration::from_secs(100));
        registry.remember_for(Duration::from_secs(10));
        let quarantine = Duration::from_secs(110);
        assert_eq!(registry.number(&"a", start), Some(1));
        assert_eq!(registry.number(&"b", start), Some(2));
        assert_eq!(registry.number(&"a", start), Some(1));
        assert_eq!(registry.number(&"c", start), None);
        registry.retain(&BTreeSet::from(["b"]), start);
        assert_eq!(registry.number(&"c", start + quarantine / 2), None);
        assert!(!registry.has_come_free(start + quarantine / 2));
        assert!(registry.has_come_free(start + quarantine));
        assert_eq!(registry.number(&"c", start + quarantine), Some(1));
        assert_eq!(registry.get(&"b"), Some(2));
        assert_eq!(registry.get(&"a"), None);
    }
}
