//! Rings: which target each slot chooses.
//!
//! Maglev hashing (Eisenbud et al., "Maglev: a fast and reliable software network load balancer",
//! NSDI 2016, section 3.4): every target has a permutation of the slots, targets take turns in
//! picking their next free one. Here a target takes turns in proportion to its weight and stops at
//! its exact share, so shares are right to a slot whatever the weights.

use std::vec;
use std::vec::Vec;

use crate::flow::splitmix64;
use crate::wire::{Address, Be16};

/// A candidate for slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Index of the target, as slots name it.
    pub target: u32,
    /// What its permutation is made from, equal on every node; see [`identity`].
    pub identity: u64,
    /// Its share relative to the others; without a share it gets no slot. The sum of all of them
    /// must be less than 2^64 / `size`.
    pub weight: u64,
}

/// What names a target on every node alike, whatever index it has there.
pub fn identity(address: Address, port: Be16) -> u64 {
    let [high, low] = address.words().map(u64::from_be);
    let mut state = high;
    state = splitmix64(&mut state) ^ low;
    state = splitmix64(&mut state) ^ u64::from(port.get());
    splitmix64(&mut state)
}

/// Fills a ring of `size` slots with indices of targets. Equal sets give equal rings, in whatever
/// order they come. Empty without any candidate of a weight.
///
/// `size` must be a prime, so that each permutation reaches every slot.
pub fn ring(candidates: &[Candidate], size: u32) -> Vec<u32> {
    let Some(heaviest) = candidates.iter().map(|c| c.weight).max().filter(|weight| *weight > 0)
    else {
        return Vec::new();
    };
    let mut picking: Vec<Picking> = quotas(candidates, size)
        .into_iter()
        .zip(candidates)
        .filter(|(quota, _)| *quota > 0)
        .map(|(quota, candidate)| Picking::new(candidate, quota, size))
        .collect();
    picking.sort_by_key(|picking| picking.identity);
    let mut slots = vec![FREE; size as usize];
    while !picking.is_empty() {
        // Rounds in which nobody has the credit to pick are taken at once: a million rounds may lie
        // between the picks of the lightest.
        let rounds = picking.iter().map(|picking| picking.rounds_to_wait(heaviest)).min();
        let rounds = rounds.unwrap_or(1);
        for picking in &mut picking {
            picking.credit += picking.weight * rounds;
            if picking.credit >= heaviest {
                picking.credit -= heaviest;
                picking.quota -= 1;
                let slot = picking.next_free(&slots, size);
                slots[slot as usize] = picking.target;
            }
        }
        picking.retain(|picking| picking.quota > 0);
    }
    slots
}

const FREE: u32 = u32::MAX;

/// A target that is still picking slots.
struct Picking {
    target: u32,
    identity: u64,
    weight: u64,
    credit: u64,
    quota: u32,
    next: u32,
    skip: u32,
}

impl Picking {
    fn new(candidate: &Candidate, quota: u32, size: u32) -> Self {
        let mut state = candidate.identity;
        let next = (splitmix64(&mut state) % u64::from(size)) as u32;
        let skip = (splitmix64(&mut state) % u64::from(size.max(2) - 1)) as u32 + 1;
        let Candidate { target, identity, weight } = *candidate;
        Self { target, identity, weight, credit: 0, quota, next, skip }
    }

    /// Rounds until it may pick, at least 1.
    fn rounds_to_wait(&self, heaviest: u64) -> u64 {
        heaviest.saturating_sub(self.credit).div_ceil(self.weight).max(1)
    }

    /// The first free slot of the rest of its permutation. The caller has made sure of one.
    fn next_free(&mut self, slots: &[u32], size: u32) -> u32 {
        loop {
            let slot = self.next;
            self.next = (self.next + self.skip) % size;
            if slots[slot as usize] == FREE {
                return slot;
            }
        }
    }
}

/// How many slots each candidate gets: its share rounded down, and what is left over to the
/// largest remainders.
fn quotas(candidates: &[Candidate], size: u32) -> Vec<u32> {
    let total: u64 = candidates.iter().map(|candidate| candidate.weight).sum();
    if total == 0 {
        return vec![0; candidates.len()];
    }
    let share = |candidate: &Candidate| candidate.weight * u64::from(size);
    let mut quotas: Vec<u32> = candidates.iter().map(|c| (share(c) / total) as u32).collect();
    let mut by_remainder: Vec<usize> = (0..candidates.len()).collect();
    by_remainder
        .sort_by_key(|&at| (u64::MAX - share(&candidates[at]) % total, candidates[at].identity));
    let left_over = size - quotas.iter().sum::<u32>();
    for &at in by_remainder.iter().take(left_over as usize) {
        quotas[at] += 1;
    }
    quotas
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    const SIZE: u32 = 16381;

    fn candidate(n: u32, weight: u64) -> Candidate {
        let address = Ipv4Addr::from(0x0a00_0000 + n);
        Candidate { target: n, identity: identity(address.into(), Be16::new(80)), weight }
    }

    fn count(ring: &[u32], target: u32) -> u32 {
        ring.iter().filter(|slot| **slot == target).count() as u32
    }

    #[test]
    fn no_weight_no_ring() {
        assert!(ring(&[], SIZE).is_empty());
        assert!(ring(&[candidate(1, 0)], SIZE).is_empty());
    }

    #[test]
    fn a_new_target_moves_little_more_than_its_share() {
        let before: Vec<_> = (1..=10).map(|n| candidate(n, 1)).collect();
        let after: Vec<_> = (1..=11).map(|n| candidate(n, 1)).collect();
        let (before, after) = (ring(&before, SIZE), ring(&after, SIZE));
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count() as u32;
        assert!(
            moved < SIZE / 11 * 3 / 2,
            "{moved} of {SIZE} slots moved, the share is {}",
            SIZE / 11
        );
    }

    /// A canary's group grows from 10 % to 50 %: 40 % of the slots must move.
    #[test]
    fn a_group_that_grows_moves_little_more_than_it_must() {
        let groups = |web: u64, canary: u64| {
            let web = (1..=6).map(|n| candidate(n, web * 2));
            let canary = (7..=10).map(|n| candidate(n, canary * 3));
            ring(&web.chain(canary).collect::<Vec<_>>(), SIZE)
        };
        let (before, after) = (groups(90, 10), groups(50, 50));
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count() as u32;
        let must =
            (0..=10).map(|n| count(&after, n).saturating_sub(count(&before, n))).sum::<u32>();
        assert!(must.abs_diff(SIZE * 2 / 5) < 10, "{must}");
        assert!(moved < must * 3 / 2, "{moved} of {SIZE} slots moved, {must} must");
    }

    /// Of a thousand million million rounds only those count in which somebody picks.
    #[test]
    fn weights_far_apart_take_no_longer() {
        let heavy = candidate(0, 1 << 37);
        let light = (1..=1000).map(|n| candidate(n, 1 << 11));
        let ring = ring(&[heavy].into_iter().chain(light).collect::<Vec<_>>(), SIZE);
        assert_eq!(count(&ring, 0), SIZE);
        let light = (1..=1000).map(|n| candidate(n, 1 << 18));
        let candidates = [heavy].into_iter().chain(light).collect::<Vec<_>>();
        assert!((SIZE - count(&super::ring(&candidates, SIZE), 0)).abs_diff(31) <= 1);
    }

    proptest! {
        #[test]
        fn shares_are_right_to_a_slot(weights in prop::collection::vec(0_u64..1000, 1..60)) {
            let candidates: Vec<_> =
                weights.iter().zip(1..).map(|(weight, n)| candidate(n, *weight)).collect();
            let ring = ring(&candidates, SIZE);
            let total: u64 = weights.iter().sum();
            for candidate in &candidates {
                let exact = f64::from(SIZE) * candidate.weight as f64 / total.max(1) as f64;
                prop_assert!((f64::from(count(&ring, candidate.target)) - exact).abs() <= 1.0);
            }
        }

        #[test]
        fn the_order_does_not_matter(weights in prop::collection::vec(1_u64..5, 2..20)) {
            let mut candidates: Vec<_> =
                weights.iter().zip(1..).map(|(weight, n)| candidate(n, *weight)).collect();
            let forwards = ring(&candidates, 1021);
            candidates.reverse();
            prop_assert_eq!(forwards, ring(&candidates, 1021));
        }
    }
}
