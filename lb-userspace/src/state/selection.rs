//! Who takes new flows: what health, weights, zones and slow start come to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use lb_common::maglev::{self, Candidate};
use lb_common::wire::Be16;

use crate::config::{self, Protocol};
use crate::health::HealthState;
use crate::netlink::Unresolved;

use super::actions::{Action, Candidates};
use super::rings::{Periods, Ring};
use super::slow_start::STEPS;
use super::{State, TargetKey, listener_keys};

/// Bits of a candidate's weight that tell shares within a group apart.
const PRECISION: u32 = 28;

/// The kernel's tables are written a little after a change is known here, and flows note their
/// last packet to the second.
const SWITCHING: Duration = Duration::from_secs(2);

impl State {
    /// Gives every listener its ring, and the rings' slots to the targets of now.
    pub(super) fn turn_rings(&mut self, now: Instant) {
        let mut rings = std::mem::take(&mut self.rings);
        let candidates = |action: &Action, ring: Option<&Ring>| self.candidates(action, ring);
        let all_periods = self.periods();
        let periods = |action: &Action| all_periods.get(action).copied().unwrap_or_default();
        rings.turn(&self.actions, candidates, periods, self.ring_size, now);
        self.rings = rings;
    }

    /// How long the slots of each action's rings learn: by the idle timeouts of its listeners. Where
    /// none is for UDP, there is nothing to learn less long.
    fn periods(&self) -> BTreeMap<&Action, Periods> {
        let mut longest: BTreeMap<&Action, (Duration, Option<Duration>)> = BTreeMap::new();
        for (key, listener, ..) in listener_keys(&self.config) {
            let Some(action) = self.actions.get(&key) else { continue };
            let (all, udp) = longest.entry(action).or_default();
            let period = listener.idle_timeout + SWITCHING;
            *all = period.max(*all);
            if listener.protocol == Protocol::Udp {
                *udp = Some(period).max(*udp);
            }
        }
        let periods = |(action, (all, udp)): (_, (_, Option<_>))| {
            (action, Periods { learning: all, learning_udp: udp.unwrap_or(all) })
        };
        longest.into_iter().map(periods).collect()
    }

    /// Whether targets that take no new flows of an action may still have some: of its groups, or
    /// of those that its listeners named before.
    fn keeps_flows(&self, action: &Action) -> bool {
        let named = action.groups.iter().map(|group| &group.name);
        let before = self.leaving.keys().filter(|(key, _)| self.actions.get(key) == Some(action));
        let groups: BTreeSet<_> =
            named.chain(before.map(|(_, name)| name)).map(String::as_str).collect();
        self.all_targets().any(|(key, target)| {
            groups.contains(&*key.target_group)
                && self.takes(&key.target_group, action.is_v4, target.address)
        })
    }

    /// The targets that take new flows of an action. Each group has its share by its weight
    /// whatever the health of its targets; a group without a target that could take flows leaves
    /// its share to the others.
    pub(super) fn candidates(&self, action: &Action, ring: Option<&Ring>) -> Candidates {
        let (mut groups, mut newcomers, mut is_unknown) = (Vec::new(), Vec::new(), false);
        for group in action.groups.iter().filter(|group| group.weight > 0) {
            let members = self.members(&group.name, action, ring);
            let is_in_ring = |ring: &Ring| members.iter().any(|m| ring.has_candidate(m.target));
            if members.is_empty() {
                continue;
            }
            if !ring.is_some_and(is_in_ring) && !self.is_group_settled(&group.name, action.is_v4) {
                is_unknown = true;
                continue;
            }
            let (known, new): (Vec<_>, Vec<_>) = members.into_iter().partition(|m| m.is_reachable);
            groups.extend((!known.is_empty()).then_some((group.weight, known)));
            newcomers.extend((!new.is_empty()).then_some((group.weight, new)));
        }
        // A first ring waits for all of them.
        if is_unknown && (ring.is_none() || groups.is_empty()) {
            return Candidates::Unknown;
        }
        // Nothing else is there: their packets are what has the way looked for.
        let candidates = weigh(&if groups.is_empty() { newcomers } else { groups });
        if candidates.is_empty() && !self.keeps_flows(action) {
            return Candidates::Nobody;
        }
        Candidates::Are(candidates)
    }

    /// The targets of a group that take new flows: the healthy ones of the agent's zone, if the
    /// action keeps to it, else all healthy ones, else all.
    fn members(&self, name: &str, action: &Action, ring: Option<&Ring>) -> Vec<Member> {
        let zone = self.config.agent.availability_zone.as_deref().filter(|_| action.is_zonal);
        let registered = || {
            let group = self.registered.get(name).into_iter().flatten();
            group.filter(|(_, t)| self.takes(name, action.is_v4, t.address) && t.weight > 0)
        };
        let healthy = || registered().filter(|(key, _)| self.is_healthy(key));
        let near = || healthy().filter(|(_, target)| is_in_zone(target, zone));
        let chosen: Vec<_> = if near().next().is_some() {
            near().collect()
        } else if healthy().next().is_some() {
            healthy().collect()
        } else {
            registered().collect()
        };
        let member = |(key, target): &(TargetKey, config::Target)| {
            let number = self.targets.get(key)?;
            // Who is not in the ring waits until the way to it is known; who cannot be reached
            // leaves it.
            let is_reachable = match self.hop(target.address) {
                Ok(_) => true,
                Err(no_way) if no_way.is_lasting => false,
                Err(_) => ring.is_some_and(|ring| ring.has_candidate(number)),
            };
            Some(Member {
                target: number,
                identity: maglev::identity(target.address.into(), Be16::new(target.port)),
                weight: u64::from(target.weight) * u64::from(self.slow_start.share(key)),
                is_reachable,
            })
        };
        chosen.into_iter().filter_map(member).collect()
    }

    /// Whether listeners of a family can use a target of the group.
    fn takes(&self, group: &str, is_v4: bool, target: IpAddr) -> bool {
        let group = self.config.target_groups.get(group);
        target.is_ipv4() == is_v4 || group.is_some_and(|group| group.forwarding.is_tunnel())
    }

    pub(super) fn is_healthy(&self, key: &TargetKey) -> bool {
        self.health.get(key).is_some_and(|health| health.state == HealthState::Healthy)
    }

    /// Whether all is known that a first ring needs of a group: whoever joined it later would get
    /// no datagram of an unknown flow for two minutes.
    fn is_group_settled(&self, name: &str, is_v4: bool) -> bool {
        let group = self.registered.get(name).into_iter().flatten();
        group
            .filter(|(_, target)| self.takes(name, is_v4, target.address))
            .all(|(key, _)| self.is_settled(key))
    }

    /// Whether all is known of a target that its group's first ring needs. Who is healthy has been
    /// reached, so the way to it is about to be known.
    pub(super) fn is_settled(&self, key: &TargetKey) -> bool {
        let has_way = match self.network.next_hops.get(&key.address) {
            _ if self.is_proxied(key) => true,
            None | Some(Err(Unresolved::NoNeighbour { .. })) => false,
            Some(_) => true,
        };
        let health = self.health.get(key);
        health.is_some_and(|health| health.state != HealthState::Healthy || has_way)
    }

    /// Whether a target that becomes healthy now is to get its share step by step: others carry the
    /// load, and the group's ring is not its first; nor, for the proxy, are its first checks.
    pub(super) fn starts_slowly(&self, key: &TargetKey) -> bool {
        let is_proxied = self.is_proxied(key);
        let carries = |(other, target): &(TargetKey, config::Target)| {
            other != key
                && (is_proxied
                    || self.takes(&key.target_group, key.address.is_ipv4(), other.address))
                && target.weight > 0
                && self.is_healthy(other)
                && self.slow_start.share(other) == STEPS
        };
        let in_ring = |is_v4| {
            self.takes(&key.target_group, is_v4, key.address)
                && self.rings.has_group(&key.target_group, is_v4)
        };
        let is_known = is_proxied && self.known_groups.contains(&key.target_group);
        (is_known || in_ring(true) || in_ring(false))
            && self.registered.get(&*key.target_group).into_iter().flatten().any(carries)
    }
}

/// A target that can take flows of its group.
struct Member {
    target: u32,
    identity: u64,
    /// Within its group.
    weight: u64,
    is_reachable: bool,
}

/// A target without a zone stands in every one.
fn is_in_zone(target: &config::Target, zone: Option<&str>) -> bool {
    match (&target.availability_zone, zone) {
        (Some(theirs), Some(ours)) => theirs == ours,
        _ => true,
    }
}

/// Weighs targets of several groups against each other: the share of its group, divided by the
/// weights within it.
fn weigh(groups: &[(u16, Vec<Member>)]) -> Vec<Candidate> {
    let of_group = |(weight, members): &(u16, Vec<Member>)| {
        let total: u64 = members.iter().map(|member| member.weight).sum();
        let share = u64::from(if groups.len() == 1 { 1 } else { *weight });
        let candidate = move |member: &Member| Candidate {
            target: member.target,
            identity: member.identity,
            weight: match groups.len() {
                1 => member.weight,
                _ => share * (member.weight << PRECISION) / total.max(1),
            },
        };
        members.iter().map(candidate).collect::<Vec<_>>()
    };
    groups.iter().flat_map(of_group).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn members(weights: &[u64], first: u32) -> Vec<Member> {
        let member = |(target, weight): (u32, &u64)| Member {
            target,
            identity: u64::from(target) * 7919,
            weight: *weight,
            is_reachable: true,
        };
        (first..).zip(weights).map(member).collect()
    }

    proptest! {
        /// group weight / all groups' × target weight / its group's.
        #[test]
        fn a_share_is_group_weight_times_target_weight(
            groups in prop::collection::vec(
                (1_u16..=999, prop::collection::vec(1_u64..=9990, 1..30)),
                1..6,
            ),
        ) {
            let given: Vec<_> = groups
                .iter()
                .zip(0_u32..)
                .map(|((weight, targets), n)| (*weight, members(targets, n * 100)))
                .collect();
            let candidates = weigh(&given);
            let all: u64 = candidates.iter().map(|candidate| candidate.weight).sum();
            let all_groups: f64 = groups.iter().map(|(weight, _)| f64::from(*weight)).sum();
            let mut weighed = candidates.iter();
            for (weight, targets) in &groups {
                let total: u64 = targets.iter().sum();
                for target in targets {
                    let share = weighed.next().map_or(0, |candidate| candidate.weight) as f64 / all as f64;
                    let exact = f64::from(*weight) / all_groups * *target as f64 / total as f64;
                    prop_assert!((share / exact - 1.0).abs() < 0.01, "{share} for {exact}");
                }
            }
        }
    }
}
