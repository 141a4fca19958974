//! When to ask the kernel to resolve or verify which neighbour. Pure: the clock is an argument.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use netlink_packet_route::neighbour::NeighbourState;

use super::next_hops::NeighbourKey;

/// First pause between two attempts to resolve a neighbour; doubled after each.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Longest pause between two attempts.
const LAST_RETRY: Duration = Duration::from_secs(30);
/// A neighbour that nothing has confirmed is verified after this long and up to half as much more:
/// the data plane's packets pass the kernel by, which so would never ask by itself.
const VERIFY_AFTER: Duration = Duration::from_secs(20);
/// At most this many attempts at a time, as each may put a broadcast on the wire.
const BURST: usize = 256;

/// What a neighbour needs of us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Resolve,
    Verify,
}

impl Need {
    fn of(state: Option<NeighbourState>) -> Option<Self> {
        match state {
            None
            | Some(NeighbourState::None | NeighbourState::Incomplete | NeighbourState::Failed) => {
                Some(Self::Resolve)
            }
            Some(NeighbourState::Stale) => Some(Self::Verify),
            // Confirmed, being verified, or not ours to touch.
            Some(_) => None,
        }
    }
}

#[derive(Debug)]
struct Probe {
    need: Need,
    due: Instant,
    pause: Duration,
}

/// The schedule of attempts, for the neighbours of the wanted destinations.
#[derive(Debug, Default)]
pub(super) struct Prober {
    probes: HashMap<NeighbourKey, Probe>,
    spread: RandomState,
}

impl Prober {
    /// Takes over the present state of every neighbour that matters, and returns those to ask the
    /// kernel for now.
    pub(super) fn due(
        &mut self,
        now: Instant,
        neighbours: impl IntoIterator<Item = (NeighbourKey, Option<NeighbourState>)>,
    ) -> Vec<NeighbourKey> {
        let mut before = std::mem::take(&mut self.probes);
        let mut due = Vec::new();
        for (key, state) in neighbours {
            // Many destinations share a gateway.
            if self.probes.contains_key(&key) {
                continue;
            }
            let Some(need) = Need::of(state) else { continue };
            let mut probe = before
                .remove(&key)
                .filter(|probe| probe.need == need)
                .unwrap_or_else(|| self.first(need, key, now));
            if probe.due <= now && due.len() < BURST {
                due.push(key);
                probe.due = now + probe.pause;
                if need == Need::Resolve {
                    probe.pause = (probe.pause * 2).min(LAST_RETRY);
                }
            }
            self.probes.insert(key, probe);
        }
        due
    }

    fn first(&self, need: Need, key: NeighbourKey, now: Instant) -> Probe {
        match need {
            Need::Resolve => Probe { need, due: now, pause: FIRST_RETRY },
            Need::Verify => {
                // Many neighbours turn stale at once; they are not to be verified at once.
                let share = (self.spread.hash_one(key) % 1000) as u32;
                let pause = VERIFY_AFTER + VERIFY_AFTER / 2 * share / 1000;
                Probe { need, due: now + pause, pause }
            }
        }
    }
}

/// At least this long between two attempts for the same address on request.
const REQUEST_INTERVAL: Duration = Duration::from_secs(1);
/// Addresses remembered at most; they come from packets, so anyone can choose them.
const REQUESTS_REMEMBERED: usize = 4096;

/// Limits attempts on request to one a second for each address.
#[derive(Debug, Default)]
pub(super) struct RequestLimiter {
    last: HashMap<IpAddr, Instant>,
}

impl RequestLimiter {
    /// Whether a request for this address may be carried out now.
    pub(super) fn admit(&mut self, address: IpAddr, now: Instant) -> bool {
        if self.last.len() >= REQUESTS_REMEMBERED {
            self.last.retain(|_, last| now.duration_since(*last) < REQUEST_INTERVAL);
        }
        let recently = self
            .last
            .get(&address)
            .is_some_and(|last| now.duration_since(*last) < REQUEST_INTERVAL);
        if recently || self.last.len() >= REQUESTS_REMEMBERED {
            return false;
        }
        self.last.insert(address, now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(last: u8) -> NeighbourKey {
        NeighbourKey { ifindex: 2, address: [10, 0, 0, last].into() }
    }

    /// The seconds, of the first `seconds`, in which a neighbour that stays in `state` is asked for.
    fn attempts(prober: &mut Prober, start: Instant, state: NeighbourState) -> Vec<u64> {
        (0..130)
            .filter(|second| {
                let now = start + Duration::from_secs(*second);
                !prober.due(now, [(key(1), Some(state))]).is_empty()
            })
            .collect()
    }

    #[test]
    fn resolving_backs_off_to_half_a_minute() {
        let mut prober = Prober::default();
        let seconds = attempts(&mut prober, Instant::now(), NeighbourState::Failed);
        assert_eq!(seconds, [0, 1, 3, 7, 15, 31, 61, 91, 121]);
    }

    #[test]
    fn stale_neighbours_are_verified_now_and_then() {
        let mut prober = Prober::default();
        let seconds = attempts(&mut prober, Instant::now(), NeighbourState::Stale);
        assert!((20..=30).contains(&seconds[0]), "{seconds:?}");
        assert!((4..=6).contains(&seconds.len()), "{seconds:?}");
    }

    #[test]
    fn confirmed_and_permanent_neighbours_are_left_alone() {
        for state in [NeighbourState::Reachable, NeighbourState::Permanent, NeighbourState::Noarp] {
            assert_eq!(attempts(&mut Prober::default(), Instant::now(), state), [0_u64; 0]);
        }
    }

    #[test]
    fn success_forgets_the_back_off() {
        let mut prober = Prober::default();
        let start = Instant::now();
        attempts(&mut prober, start, NeighbourState::Failed);
        prober.due(start, [(key(1), Some(NeighbourState::Reachable))]);
        assert_eq!(prober.due(start, [(key(1), None)]), [key(1)]);
    }

    #[test]
    fn a_shared_gateway_is_asked_for_once() {
        let mut prober = Prober::default();
        let shared = [(key(1), None), (key(1), None)];
        assert_eq!(prober.due(Instant::now(), shared), [key(1)]);
    }

    #[test]
    fn attempts_come_in_bounded_bursts_and_none_is_lost() {
        let mut prober = Prober::default();
        let start = Instant::now();
        let keys: Vec<_> = (0..600_u32)
            .map(|i| NeighbourKey { ifindex: i, address: [10, 0, 0, 1].into() })
            .collect();
        let at = |prober: &mut Prober, millis| {
            let now = start + Duration::from_millis(millis);
            prober.due(now, keys.iter().map(|key| (*key, None)))
        };
        let mut asked = at(&mut prober, 0);
        assert_eq!(asked.len(), 256);
        asked.extend(at(&mut prober, 300));
        asked.extend(at(&mut prober, 600));
        asked.sort();
        assert_eq!(asked, keys);
    }

    #[test]
    fn requests_are_limited_per_address() {
        let mut limiter = RequestLimiter::default();
        let start = Instant::now();
        assert!(limiter.admit(key(1).address, start));
        assert!(!limiter.admit(key(1).address, start + Duration::from_millis(999)));
        assert!(limiter.admit(key(2).address, start));
        assert!(limiter.admit(key(1).address, start + Duration::from_secs(1)));
    }

    #[test]
    fn a_flood_of_addresses_is_bounded() {
        let mut limiter = RequestLimiter::default();
        let start = Instant::now();
        let admitted =
            (0..10_000_u32).filter(|i| limiter.admit(IpAddr::from(i.to_be_bytes()), start)).count();
        assert_eq!(admitted, 4096);
        assert!(limiter.admit(key(1).address, start + Duration::from_secs(1)));
    }
}
