//! Which target of a group gets a request.
//!
//! Source: "Routing algorithms", "Automatic Target Weights" and "Slow start mode" in AWS's guide to
//! application load balancers.
//!
//! A [`Balancer`] is made anew at each change and never changes itself; what must outlive it, the
//! requests in progress and outcomes of each target, is in [`Load`]s that belong to the targets,
//! and where the turn is, in a [`Turn`] that belongs to the group. So all worker threads share one
//! without a lock: a choice is one atomic addition and a look into a table (round robin), a pass
//! over the targets' counters (least outstanding requests) or a random number. One for each thread
//! would be no faster, and clients that come through different threads would see no order.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};

use crate::config::model::RequestAlgorithm;

/// The longest table of turns. Groups whose weights need more get them rounded to that many parts;
/// the table grows if there are more targets.
const LONGEST_CYCLE: u64 = 4096;

/// What is counted about a target, for as long as it is registered: across all changes of its
/// group.
#[derive(Debug, Default)]
pub struct Load {
    outstanding: AtomicU32,
    answered: AtomicU32,
    failed: AtomicU32,
    /// Steps of [`FULL`] that anomaly mitigation takes away.
    reduction: AtomicU32,
}

/// A request in progress at a target; dropped when it is over, however it ends.
#[derive(Debug)]
pub struct InProgress(Arc<Load>);

impl Load {
    /// Counts a request in progress.
    pub fn begin(self: &Arc<Self>) -> InProgress {
        self.outstanding.fetch_add(1, Relaxed);
        InProgress(self.clone())
    }

    /// Requests in progress.
    pub fn outstanding(&self) -> u32 {
        self.outstanding.load(Relaxed)
    }

    /// Notes how a request ended: `true` if the target answered with anything but 5xx.
    pub fn note(&self, is_success: bool) {
        self.answered.fetch_add(1, Relaxed);
        if !is_success {
            self.failed.fetch_add(1, Relaxed);
        }
    }

    /// Whether anomaly mitigation takes requests away from it.
    pub fn is_mitigated(&self) -> bool {
        self.reduction.load(Relaxed) > 0
    }

    /// What counts of its weight, 1 to [`FULL`].
    fn factor(&self) -> u32 {
        FULL - self.reduction.load(Relaxed).min(FULL - 1)
    }
}

impl InProgress {
    /// Of which target.
    pub fn load(&self) -> &Arc<Load> {
        &self.0
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.outstanding.fetch_sub(1, Relaxed);
    }
}

/// Where a group's (or a rule's) turn is; goes on over changes.
#[derive(Debug, Default)]
pub struct Turn(AtomicUsize);

/// Places in such an order that each gets its exact share of every cycle, and at any time within
/// one less than one turn more or fewer than its share.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cycle(Box<[u32]>);

impl Cycle {
    /// The order for weights; a weight of 0 gets no turn.
    pub fn new(weights: &[u32]) -> Self {
        let parts = reduced(weights);
        let total: u64 = parts.iter().sum();
        let mut turns = vec![0_u64; parts.len()];
        let mut order = Vec::with_capacity(total as usize);
        // Each turn has a window in which it must come: after its share of the cycle has begun and
        // before it ends. Of those that may come the one with the earliest end is next; all windows
        // are kept by that (Baruah et al. 1996; Balinski and Young's quota method).
        for now in 0..total {
            let next = (0..parts.len())
                .filter(|&i| turns[i] < parts[i] && turns[i] * total / parts[i] <= now)
                .min_by_key(|&i| ((turns[i] + 1) * total).div_ceil(parts[i]));
            let Some(next) = next else { break };
            turns[next] += 1;
            order.push(next as u32);
        }
        Self(order.into())
    }

    /// Whose turn it is; `None`: nobody has a weight.
    pub fn next(&self, turn: &Turn) -> Option<usize> {
        let now = turn.0.fetch_add(1, Relaxed);
        let place = now.checked_rem(self.0.len())?;
        self.0.get(place).map(|place| *place as usize)
    }
}

/// The weights by their greatest common divisor, or rounded to fit [`LONGEST_CYCLE`].
fn reduced(weights: &[u32]) -> Vec<u64> {
    let divisor = weights.iter().fold(0, |divisor, weight| gcd(divisor, *weight)).max(1);
    let exact: Vec<u64> = weights.iter().map(|weight| u64::from(weight / divisor)).collect();
    let total: u64 = exact.iter().sum();
    let limit = LONGEST_CYCLE.max(weights.len() as u64);
    if total <= limit {
        return exact;
    }
    let scaled = |part: u64| ((part * limit + total / 2) / total).max(u64::from(part > 0));
    exact.into_iter().map(scaled).collect()
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A target that takes requests.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// What is counted about it.
    pub load: Arc<Load>,
    /// Its weight times its share during slow start; 0 takes no requests.
    pub weight: u32,
}

/// Chooses among candidates.
#[derive(Debug)]
pub struct Balancer {
    candidates: Box<[Candidate]>,
    choice: Choice,
}

#[derive(Debug)]
enum Choice {
    InTurn(Cycle),
    LeastOutstanding,
    /// Sums of the weights up to each candidate, itself included.
    AtRandom {
        sums: Box<[u64]>,
    },
}

impl Balancer {
    /// A balancer for these targets: those in service, and of the right zones.
    pub fn new(algorithm: RequestAlgorithm, candidates: Vec<Candidate>) -> Self {
        let choice = match algorithm {
            RequestAlgorithm::RoundRobin => {
                let weights: Vec<u32> = candidates.iter().map(|it| it.weight).collect();
                Choice::InTurn(Cycle::new(&weights))
            }
            RequestAlgorithm::LeastOutstandingRequests => Choice::LeastOutstanding,
            RequestAlgorithm::WeightedRandom { .. } => {
                let mut sum = 0;
                let sums = candidates.iter().map(|it| {
                    sum += u64::from(it.weight);
                    sum
                });
                Choice::AtRandom { sums: sums.collect() }
            }
        };
        Self { candidates: candidates.into(), choice }
    }

    /// The place of the candidate that gets the next request; `None`: nobody takes any.
    pub fn pick(&self, turn: &Turn) -> Option<usize> {
        match &self.choice {
            Choice::InTurn(cycle) => cycle.next(turn),
            Choice::LeastOutstanding => self.least_outstanding(turn.0.fetch_add(1, Relaxed)),
            Choice::AtRandom { sums } => self.at_random(sums),
        }
    }

    /// The fewest requests in progress for the weight, counting the one that is to come (an idle
    /// target of weight 2 gets its first before one of weight 1). Of equals the next in turn.
    fn least_outstanding(&self, turn: usize) -> Option<usize> {
        let count = self.candidates.len();
        let start = turn.checked_rem(count)?;
        let mut best: Option<(usize, u64, u64)> = None;
        for place in (start..count).chain(0..start) {
            let candidate = &self.candidates[place];
            if candidate.weight == 0 {
                continue;
            }
            let requests = u64::from(candidate.load.outstanding()) + 1;
            let weight = u64::from(candidate.weight);
            if best.is_none_or(|(_, least, its)| requests * its < least * weight) {
                best = Some((place, requests, weight));
            }
        }
        best.map(|(place, ..)| place)
    }

    /// By weight, and what anomaly mitigation leaves of it: who is chosen by weight may decline.
    fn at_random(&self, sums: &[u64]) -> Option<usize> {
        let total = sums.last().copied().filter(|total| *total > 0)?;
        let choose = || {
            let point = rand::random_range(0..total);
            sums.partition_point(|sum| *sum <= point)
        };
        // At most half of the targets decline, but they may have most of the weight.
        for _ in 0..64 {
            let place = choose();
            let factor = self.candidates[place].load.factor();
            if factor == FULL || rand::random_range(0..FULL) < factor {
                return Some(place);
            }
        }
        Some(choose())
    }
}

/// Steps of a mitigated target's weight.
const FULL: u32 = 64;
/// Fewer requests in a period say nothing about a target.
const FEWEST_REQUESTS: u32 = 10;
/// Fewer targets say nothing about each other ("at least three healthy targets").
const FEWEST_TARGETS: usize = 3;

/// Anomaly mitigation: to be called for each group of `weighted_random` with it, by one thread,
/// every 10 s or so, with the loads of the targets in service. A target whose share of failed
/// requests (5xx, or no answer at all) is over three times that of the others together, and 10
/// points above it, loses half of what counts of its weight, down to a 64th; once it is no longer,
/// it gets an eighth back each time. At most half of the targets are reduced at a time. AWS does
/// not say what it calls an anomaly; these numbers are ours.
pub fn mitigate(loads: &[Arc<Load>]) {
    let counted: Vec<(u32, u32)> =
        loads.iter().map(|it| (it.answered.swap(0, Relaxed), it.failed.swap(0, Relaxed))).collect();
    let all = counted.iter().fold((0, 0), |(answered, failed), it| {
        (answered + u64::from(it.0), failed + u64::from(it.1))
    });
    let mut room = loads.len() / 2;
    room = room.saturating_sub(loads.iter().filter(|load| load.is_mitigated()).count());
    for (load, its) in loads.iter().zip(counted) {
        let reduction = load.reduction.load(Relaxed);
        let is_anomalous = loads.len() >= FEWEST_TARGETS && is_anomalous(its, all);
        let next = match (is_anomalous, reduction) {
            (true, 0) if room == 0 => 0,
            (true, _) => {
                room -= usize::from(reduction == 0);
                FULL - ((FULL - reduction) / 2).max(1)
            }
            (false, _) => reduction.saturating_sub(FULL / 8),
        };
        load.reduction.store(next, Relaxed);
    }
}

fn is_anomalous(its: (u32, u32), all: (u64, u64)) -> bool {
    let (answered, failed) = (u64::from(its.0), u64::from(its.1));
    let (others, others_failed) = (all.0.saturating_sub(answered), all.1.saturating_sub(failed));
    if its.0 < FEWEST_REQUESTS || others < u64::from(FEWEST_REQUESTS) {
        return false;
    }
    // failed / answered > 3 * others_failed / others, and > that + 10 %
    failed * others > 3 * others_failed * answered
        && 10 * failed * others > 10 * others_failed * answered + others * answered
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn candidates(weights: &[u32]) -> Vec<Candidate> {
        weights.iter().map(|&weight| Candidate { load: Arc::default(), weight }).collect()
    }

    fn order(weights: &[u32], count: usize) -> Vec<usize> {
        let turn = Turn::default();
        let cycle = Cycle::new(weights);
        (0..count).map_while(|_| cycle.next(&turn)).collect()
    }

    #[test]
    fn equal_weights_alternate() {
        assert_eq!(order(&[1, 1], 5), [0, 1, 0, 1, 0]);
        assert_eq!(order(&[999, 999, 999], 6), [0, 1, 2, 0, 1, 2]);
        assert_eq!(order(&[3, 0, 1], 8), [0, 0, 0, 2, 0, 0, 0, 2]);
        assert_eq!(order(&[5, 1, 1], 7), [0, 0, 0, 1, 0, 0, 2]);
        assert!(order(&[0, 0], 3).is_empty());
        assert!(order(&[], 3).is_empty());
    }

    #[test]
    fn large_weights_are_rounded_and_nobody_is_forgotten() {
        let cycle = Cycle::new(&[9990, 9989, 1]);
        let share = |place| cycle.0.iter().filter(|it| **it == place).count();
        assert!(cycle.0.len() as u64 <= LONGEST_CYCLE + 3);
        assert_eq!(share(2), 1);
        assert!(share(0).abs_diff(share(1)) <= 1);
        let many = Cycle::new(&vec![1; 5000]);
        assert_eq!(many.0.len(), 5000);
    }

    #[test]
    fn a_turn_survives_changes_and_its_end() {
        let turn = Turn(AtomicUsize::new(usize::MAX));
        let cycle = Cycle::new(&[1, 1]);
        assert!(cycle.next(&turn).is_some());
        assert_eq!(cycle.next(&turn), Some(0));
        assert_eq!(Cycle::new(&[1]).next(&turn), Some(0));
    }

    proptest! {
        #[test]
        fn shares_are_exact_and_without_bursts(weights in prop::collection::vec(0_u32..40, 1..8)) {
            let total: u32 = weights.iter().sum();
            prop_assume!(total > 0);
            let order = order(&weights, total as usize * 2);
            let mut turns = vec![0_u32; weights.len()];
            for (past, place) in (1..).zip(order) {
                turns[place] += 1;
                for (turns, weight) in turns.iter().zip(&weights) {
                    // Between the share rounded down and rounded up, at any time.
                    prop_assert!(*turns >= past * weight / total);
                    prop_assert!(*turns <= (past * weight).div_ceil(total));
                }
            }
            for (turns, weight) in turns.iter().zip(&weights) {
                prop_assert_eq!(*turns, weight * 2);
            }
        }
    }

    #[test]
    fn the_least_loaded_for_its_weight() {
        let all = candidates(&[1, 1, 2, 0]);
        let loads: Vec<_> = all.iter().map(|it| it.load.clone()).collect();
        let balancer = Balancer::new(RequestAlgorithm::LeastOutstandingRequests, all);
        let turn = Turn::default();
        let mut running = Vec::new();
        for _ in 0..40 {
            let place = balancer.pick(&turn).unwrap();
            running.push(loads[place].begin());
        }
        let counts: Vec<_> = loads.iter().map(|load| load.outstanding()).collect();
        assert_eq!(counts, [10, 10, 20, 0]);
        running.retain(|it| !Arc::ptr_eq(it.load(), &loads[1]));
        assert_eq!(loads[1].outstanding(), 0);
        assert_eq!(balancer.pick(&turn), Some(1));
        drop(running);
        let idle: Vec<_> = (0..4).map(|_| balancer.pick(&turn).unwrap()).collect();
        assert_eq!(idle, [2, 2, 2, 2], "the one of twice the weight is the least loaded");
        let empty = Balancer::new(RequestAlgorithm::LeastOutstandingRequests, Vec::new());
        assert_eq!(empty.pick(&turn), None);
    }

    #[test]
    fn equals_take_turns() {
        let balancer =
            Balancer::new(RequestAlgorithm::LeastOutstandingRequests, candidates(&[1, 1, 1]));
        let turn = Turn::default();
        let picks: Vec<_> = (0..6).map(|_| balancer.pick(&turn).unwrap()).collect();
        assert_eq!(picks, [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn counts_outlive_balancers_and_panics() {
        let load = Arc::<Load>::default();
        let request = load.begin();
        let one = Candidate { load: load.clone(), weight: 1 };
        drop(Balancer::new(RequestAlgorithm::RoundRobin, vec![one]));
        assert_eq!(load.outstanding(), 1);
        let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _request = request;
            panic!("on purpose");
        }));
        assert!(unwound.is_err());
        assert_eq!(load.outstanding(), 0);
    }

    /// Of so many picks, each candidate's.
    fn shares(balancer: &Balancer, count: usize, of: usize) -> Vec<usize> {
        let mut shares = vec![0; of];
        for _ in 0..count {
            shares[balancer.pick(&Turn::default()).unwrap()] += 1;
        }
        shares
    }

    fn assert_about(have: usize, want: usize) {
        assert!(have.abs_diff(want) < 300, "{have} is not about {want}");
    }

    #[test]
    fn at_random_by_weight() {
        let algorithm = RequestAlgorithm::WeightedRandom { anomaly_mitigation: true };
        let balancer = Balancer::new(algorithm, candidates(&[1, 0, 3]));
        // The standard deviation is 43.
        let shares = shares(&balancer, 10_000, 3);
        assert_about(shares[0], 2500);
        assert_eq!(shares[1], 0);
        assert_eq!(Balancer::new(algorithm, candidates(&[0, 0])).pick(&Turn::default()), None);
    }

    fn noted(load: &Load, answered: u32, failed: u32) {
        for i in 0..answered {
            load.note(i >= failed);
        }
    }

    #[test]
    fn a_failing_target_gets_less_and_comes_back() {
        let all = candidates(&[1, 1, 1]);
        let loads: Vec<_> = all.iter().map(|it| it.load.clone()).collect();
        let algorithm = RequestAlgorithm::WeightedRandom { anomaly_mitigation: true };
        let balancer = Balancer::new(algorithm, all);
        let period = |failed| {
            noted(&loads[0], 100, failed);
            noted(&loads[1], 100, 1);
            noted(&loads[2], 100, 0);
            mitigate(&loads);
        };
        period(5);
        assert!(!loads[0].is_mitigated(), "5 % are no anomaly");
        period(50);
        assert!(loads[0].is_mitigated());
        // Half a weight of two and a half.
        assert_about(shares(&balancer, 10_000, 3)[0], 2000);
        (0..20).for_each(|_| period(50));
        assert!(shares(&balancer, 10_000, 3)[0] < 200);
        (0..8).for_each(|_| period(0));
        assert!(!loads[0].is_mitigated());
        assert_about(shares(&balancer, 10_000, 3)[0], 3333);
    }

    #[test]
    fn at_most_half_are_reduced_and_few_say_nothing() {
        let loads: Vec<Arc<Load>> = (0..5).map(|_| Arc::default()).collect();
        for _ in 0..3 {
            loads[..2].iter().for_each(|load| noted(load, 10, 10));
            loads[2..].iter().for_each(|load| noted(load, 1000, 0));
            mitigate(&loads);
        }
        let mitigated = || loads.iter().filter(|load| load.is_mitigated()).count();
        assert_eq!(mitigated(), 2);
        noted(&loads[2], 10, 10);
        noted(&loads[3], 1000, 0);
        (0..2).for_each(|i| noted(&loads[i], 10, 10));
        mitigate(&loads);
        assert_eq!(mitigated(), 2);
        assert!(!loads[2].is_mitigated());

        let two: Vec<Arc<Load>> = (0..2).map(|_| Arc::default()).collect();
        noted(&two[0], 100, 100);
        noted(&two[1], 100, 0);
        mitigate(&two);
        assert!(!two[0].is_mitigated());
        let few: Vec<Arc<Load>> = (0..3).map(|_| Arc::default()).collect();
        noted(&few[0], 9, 9);
        few[1..].iter().for_each(|load| noted(load, 100, 0));
        mitigate(&few);
        assert!(!few[0].is_mitigated());
    }

    #[test]
    fn threads_share_the_turn() {
        let balancer = Balancer::new(RequestAlgorithm::RoundRobin, candidates(&[3, 1]));
        let turn = Turn::default();
        let first: usize = std::thread::scope(|scope| {
            let thread = || (0..1000).filter(|_| balancer.pick(&turn) == Some(0)).count();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(thread)).collect();
            threads.into_iter().map(|it| it.join().unwrap()).sum()
        });
        assert_eq!(first, 3000);
    }
}
