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
    /// Its share relative to the others; without a share it gets no slot.
    pub weight: u32,
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
    let mut picking: Vec<Picking> = quotas(candidates, size)
        .into_iter()
        .zip(candidates)
        .filter(|(_, candidate)| candidate.weight > 0)
        .map(|(quota, candidate)| Picking::new(candidate, quota, size))
        .collect();
    picking.sort_by_key(|picking| picking.identity);
    let Some(heaviest) = picking.iter().map(|picking| picking.weight).max() else {
        return Vec::new();
    };
    let mut slots = vec![FREE; size as usize];
    let mut free = size;
    while free > 0 {
        for picking in &mut picking {
            picking.credit += picking.weight;
            if picking.credit >= heaviest && picking.quota > 0 {
                picking.credit -= heaviest;
                picking.quota -= 1;
                free -= 1;
                let slot = picking.next_free(&slots, size);
                slots[slot as usize] = picking.target;
            }
        }
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
        Self { target, identity, weight: weight.into(), credit: 0, quota, next, skip }
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
    let total: u64 = candidates.iter().map(|candidate| u64::from(candidate.weight)).sum();
    if total == 0 {
        return vec![0; candidates.len()];
    }
    let share = |candidate: &Candidate| u64::from(candidate.weight) * u64::from(size);
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

    fn candidate(n: u32, weight: u32) -> Candidate {
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

    proptest! {
        #[test]
        fn shares_are_right_to_a_slot(weights in prop::collection::vec(0_u32..1000, 1..60)) {
            let candidates: Vec<_> =
                weights.iter().zip(1..).map(|(weight, n)| candidate(n, *weight)).collect();
            let ring = ring(&candidates, SIZE);
            let total: u32 = weights.iter().sum();
            for candidate in &candidates {
                let exact = f64::from(SIZE) * f64::from(candidate.weight) / f64::from(total.max(1));
                prop_assert!((f64::from(count(&ring, candidate.target)) - exact).abs() <= 1.0);
            }
        }

        #[test]
        fn the_order_does_not_matter(weights in prop::collection::vec(1_u32..5, 2..20)) {
            let mut candidates: Vec<_> =
                weights.iter().zip(1..).map(|(weight, n)| candidate(n, *weight)).collect();
            let forwards = ring(&candidates, 1021);
            candidates.reverse();
            prop_assert_eq!(forwards, ring(&candidates, 1021));
        }
    }
}
