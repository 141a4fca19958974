//! What follows from the state for the proxy.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::config::{self, Config};
use crate::health::HealthState;
use crate::proxy::Routes;
use crate::proxy::routes::{FULL_SHARE, GroupRoute, ListenerRoute, TargetRoute, TargetState};

use super::slow_start::STEPS;
use super::{State, TargetKey};

const _: () = assert!(FULL_SHARE == STEPS);

/// The proxy's listeners, computed once a configuration.
pub fn listener_routes(config: &Config) -> BTreeMap<SocketAddr, ListenerRoute> {
    let mut routes = BTreeMap::new();
    let own_zone: Option<Arc<str>> = config.agent.availability_zone.as_deref().map(Arc::from);
    for (name, balancer) in &config.load_balancers {
        let load_balancer: Arc<str> = name.as_str().into();
        let attributes = Arc::new(balancer.attributes.clone());
        for listener in &balancer.proxied {
            let listener = Arc::new(listener.clone());
            for address in &balancer.addresses {
                let zone = balancer.zones.get(address).map(|zone| Arc::from(zone.as_str()));
                let route = ListenerRoute {
                    load_balancer: load_balancer.clone(),
                    listener: listener.clone(),
                    attributes: attributes.clone(),
                    zone: zone.or_else(|| own_zone.clone()),
                    cross_zone: balancer.cross_zone,
                };
                routes.insert(SocketAddr::new(*address, listener.port), route);
            }
        }
    }
    routes
}

impl State {
    /// Everything that the proxy should serve now.
    pub fn routes(&self, cookie_key: [u8; 32]) -> Routes {
        let listeners = self.served.iter().filter(|(at, _)| self.opened.contains(*at));
        let listeners: BTreeMap<_, _> = listeners.map(|(at, route)| (*at, route.clone())).collect();
        let groups: BTreeSet<&str> = self
            .served
            .values()
            .flat_map(|route| route.listener.target_groups())
            .map(|group| group.name.as_str())
            .collect();
        let route = |name: &str| {
            let settings = self.config.target_groups.get(name)?;
            Some((Arc::from(name), self.group_route(name, settings)))
        };
        Routes { groups: groups.into_iter().filter_map(route).collect(), cookie_key, listeners }
    }

    fn group_route(&self, name: &str, group: &config::TargetGroup) -> GroupRoute {
        let registered = self.registered.get(name).into_iter().flatten();
        let registered = registered.map(|(key, target)| (key, target));
        let takes_any =
            registered.clone().any(|(key, target)| target.weight > 0 && self.is_healthy(key));
        let draining = self.draining.iter().filter(|(key, _)| &*key.target_group == name);
        let draining = draining.map(|(key, draining)| (key, &draining.target));
        let route = |key: &TargetKey, target: &config::Target, state| TargetRoute {
            address: SocketAddr::new(target.address, target.port),
            weight: target.weight.into(),
            share: self.slow_start.share(key),
            zone: target.availability_zone.as_deref().map(Arc::from),
            state,
        };
        // Those that drain stand in for new ones until it is known how these are.
        let is_new = |(key, target): (&TargetKey, &config::Target)| {
            target.weight > 0 && !self.health.contains_key(key)
        };
        let stand_in = !takes_any && registered.clone().any(is_new);
        let stand_in = stand_in && draining.clone().any(|(key, _)| self.is_healthy(key));
        let takes_any = takes_any || stand_in;
        let drains = |key: &TargetKey| {
            if stand_in && self.is_healthy(key) {
                TargetState::InService
            } else {
                TargetState::Draining
            }
        };
        let targets = registered
            .map(|(key, target)| route(key, target, self.target_state(key, takes_any)))
            .chain(draining.map(|(key, target)| route(key, target, drains(key))))
            .collect();
        GroupRoute { settings: group.proxy.clone(), slow_start: group.slow_start, targets }
    }

    /// Opens the proxy's listeners of which every group is known: a target is healthy, or all have
    /// been checked once. They stay open.
    pub(super) fn open_listeners(&mut self) {
        let mut opened = std::mem::take(&mut self.opened);
        let is_known = |name: &str| {
            let mut targets = self.registered.get(name).into_iter().flatten();
            let all = targets.clone().all(|(key, _)| self.health.contains_key(key));
            all || targets.any(|(key, _)| self.is_healthy(key))
        };
        opened.retain(|at| self.served.contains_key(at));
        for (at, route) in &self.served {
            let mut groups = route.listener.target_groups();
            if !opened.contains(at) && groups.all(|group| is_known(&group.name)) {
                opened.insert(*at);
            }
        }
        self.opened = opened;
    }

    /// Where no target is healthy, all take requests whose first check has concluded: what failed it
    /// may do better than nobody.
    fn target_state(&self, key: &TargetKey, takes_any: bool) -> TargetState {
        match self.health.get(key).map(|health| health.state) {
            Some(HealthState::Healthy) => TargetState::InService,
            Some(_) if !takes_any => TargetState::InService,
            _ => TargetState::OutOfService,
        }
    }

    /// Names of load balancers, and the addresses that are answered now.
    pub fn names(&self) -> BTreeMap<String, Vec<IpAddr>> {
        let balancers = self.config.load_balancers.iter();
        balancers
            .map(|(name, it)| (crate::dns::label(name, it.scheme), self.answered(it)))
            .collect()
    }

    /// The addresses of zones that have what it takes; all if none has.
    fn answered(&self, balancer: &config::LoadBalancer) -> Vec<IpAddr> {
        let forwarded = balancer.listeners.iter().flat_map(|listener| &listener.target_groups);
        let proxied = balancer.proxied.iter().flat_map(config::ProxyListener::target_groups);
        let groups: BTreeSet<&str> =
            forwarded.chain(proxied).map(|group| group.name.as_str()).collect();
        let zones: BTreeSet<&str> = balancer.zones.values().map(String::as_str).collect();
        let serving: BTreeSet<&str> =
            zones.into_iter().filter(|zone| self.serves_in(zone, &groups)).collect();
        let is_answered = |address: &&IpAddr| match balancer.zones.get(*address) {
            Some(zone) => serving.is_empty() || serving.contains(zone.as_str()),
            None => true,
        };
        balancer.addresses.iter().filter(is_answered).copied().collect()
    }

    /// Whether a zone has a healthy target, and one of each group that has any there. Groups without
    /// a target anywhere say nothing of zones.
    fn serves_in(&self, zone: &str, groups: &BTreeSet<&str>) -> bool {
        let (mut has_targets, mut has_healthy) = (false, false);
        for name in groups {
            let targets = self.registered.get(*name).into_iter().flatten();
            has_targets |= targets.clone().next().is_some();
            let mut here = targets
                .filter(|(_, target)| target.availability_zone.as_deref().is_none_or(|z| z == zone))
                .peekable();
            if here.peek().is_none() {
                continue;
            }
            if !here.any(|(key, _)| self.is_healthy(key)) {
                return false;
            }
            has_healthy = true;
        }
        has_healthy || !has_targets
    }

    /// Notes the groups of which every target has been checked once: who becomes healthy there from
    /// now on joins others.
    pub(super) fn note_known_groups(&mut self) {
        let health = &self.health;
        let is_known = |targets: &Vec<(TargetKey, config::Target)>| {
            targets.iter().all(|(key, _)| health.contains_key(key))
        };
        let known = self.registered.iter().filter(|(_, targets)| is_known(targets));
        let known: Vec<Arc<str>> = known.map(|(name, _)| name.clone()).collect();
        self.known_groups.extend(known);
    }
}
