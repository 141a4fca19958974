//! What should be true now: the configuration, what health checks found, what the network looks
//! like. One task owns it; every event changes it, and [`State::desired`] says what follows.

mod admission;
mod desired;
mod registry;
mod rings;
mod snapshot;
mod snat;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use lb_common::flow::{self, FlowKey, HashKeys, Keys as _};
use lb_common::tables::{Endpoint, EndpointKey, MAX_LISTENERS, MAX_TARGETS, NO_RING, OPEN};

use crate::config::{self, Config, Protocol};
use crate::health::{CheckKey, CheckSpec, Health, HealthEvent, HealthState, Reason};
use crate::netlink::{Network, Unresolved};
use crate::reconcile::{Desired, Prefix};

use desired::{Admissions, compile_admissions};
use registry::Registry;
use rings::Ring;

pub use snapshot::{About, Counters};
pub use snat::port_pools;

/// A target of a target group.
pub type TargetKey = CheckKey;

/// A port of a load balancer's address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct ListenerKey {
    address: IpAddr,
    protocol: Protocol,
    port: u16,
}

/// The targets of one family in a target group share a ring.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct RingKey {
    target_group: Arc<str>,
    is_v4: bool,
}

/// A target that was deregistered and still serves the flows it has.
#[derive(Debug, Clone)]
struct Draining {
    target: config::Target,
    until: Instant,
}

/// See the module's documentation.
pub struct State {
    config: Config,
    ring_size: u32,
    health: BTreeMap<TargetKey, Health>,
    network: Arc<Network>,
    owned: BTreeSet<IpAddr>,
    attached: BTreeSet<u32>,
    draining: BTreeMap<TargetKey, Draining>,
    targets: Registry<TargetKey>,
    listeners: Registry<ListenerKey>,
    rings: BTreeMap<RingKey, (u32, Ring)>,
    /// Admitted sources by load balancer, service and family, computed once a configuration.
    admissions: Admissions,
    classes: Vec<(u32, Arc<BTreeSet<Prefix>>)>,
    next_class: u32,
    /// The one listener that a target was of before others came to share it.
    first_owners: BTreeMap<EndpointKey, (u32, u32)>,
    pools: snat::Pools,
    warnings: Vec<String>,
}

impl State {
    /// Nothing configured, nothing known.
    pub fn new(ring_size: u32) -> Self {
        Self {
            config: Config::default(),
            ring_size,
            health: BTreeMap::new(),
            network: Arc::default(),
            owned: BTreeSet::new(),
            attached: BTreeSet::new(),
            draining: BTreeMap::new(),
            targets: Registry::new(MAX_TARGETS),
            listeners: Registry::new(MAX_LISTENERS),
            rings: BTreeMap::new(),
            admissions: BTreeMap::new(),
            classes: Vec::new(),
            next_class: OPEN + 1,
            first_owners: BTreeMap::new(),
            pools: snat::Pools::new(),
            warnings: Vec::new(),
        }
    }

    /// The configuration in force.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Another configuration. Targets that it no longer has drain.
    pub fn set_config(&mut self, config: Config, now: Instant) {
        for (name, group) in &self.config.target_groups {
            let Some(new) = config.target_groups.get(name) else { continue };
            let stays: BTreeSet<_> = new.targets.iter().map(|t| (t.address, t.port)).collect();
            for target in &group.targets {
                if !stays.contains(&(target.address, target.port)) {
                    let until = now + new.deregistration_delay;
                    let draining = Draining { target: target.clone(), until };
                    self.draining.insert(key_of(name, target), draining);
                }
            }
        }
        self.config = config;
        self.admissions = compile_admissions(&self.config);
        let registered: BTreeSet<_> = self.registered().collect();
        self.draining.retain(|key, _| {
            !registered.contains(key) && self.config.target_groups.contains_key(&*key.target_group)
        });
        self.health.retain(|key, _| registered.contains(key) || self.draining.contains_key(key));
    }

    /// What a health check found. Events of targets that are gone change nothing.
    pub fn set_health(&mut self, event: HealthEvent) {
        let group = self.config.target_groups.get(&*event.key.target_group);
        let is_it = |target: &config::Target| {
            (target.address, target.port) == (event.key.address, event.key.port)
        };
        if group.is_some_and(|group| group.targets.iter().any(is_it)) {
            self.health.insert(event.key, event.health);
        }
    }

    /// The network as it is now.
    pub fn set_network(&mut self, network: Arc<Network>) {
        self.network = network;
    }

    /// The network as it is now.
    pub fn network(&self) -> &Arc<Network> {
        &self.network
    }

    /// Addresses that the agent itself added to the machine.
    pub fn set_owned(&mut self, owned: BTreeSet<IpAddr>) {
        self.owned = owned;
    }

    /// NICs that the program is attached to.
    pub fn set_attached(&mut self, attached: BTreeSet<u32>) {
        self.attached = attached;
    }

    /// Addresses of all load balancers.
    pub fn addresses(&self) -> BTreeSet<IpAddr> {
        self.config.load_balancers.values().flat_map(|lb| lb.addresses.iter().copied()).collect()
    }

    /// Targets to be kept resolved.
    pub fn destinations(&self) -> BTreeSet<IpAddr> {
        let registered = self.config.target_groups.values().flat_map(|group| &group.targets);
        let draining = self.draining.values().map(|draining| &draining.target);
        registered.chain(draining).map(|target| target.address).collect()
    }

    /// Targets to be checked: those of groups that a listener uses.
    pub fn checks(&self) -> BTreeMap<CheckKey, CheckSpec> {
        let used = self.used_groups();
        let groups =
            self.config.target_groups.iter().filter(|(name, _)| used.contains(name.as_str()));
        groups
            .flat_map(|(name, group)| {
                let spec = |target| CheckSpec::new(&group.health_check, target);
                group.targets.iter().map(move |target| (key_of(name, target), spec(target)))
            })
            .collect()
    }

    /// Whether every listener has what it needs to forward: its targets' first checks have
    /// concluded, and the way to the healthy ones is known as far as it will be.
    pub fn is_ready(&self) -> bool {
        self.checks().keys().all(|key| self.is_settled(key))
    }

    /// Whether all is known of a target that its group's first ring needs. Who is healthy has been
    /// reached, so the way to it is about to be known.
    fn is_settled(&self, key: &TargetKey) -> bool {
        let has_way = match self.network.next_hops.get(&key.address) {
            None | Some(Err(Unresolved::NoNeighbour { .. })) => false,
            Some(_) => true,
        };
        let health = self.health.get(key);
        health.is_some_and(|health| health.state != HealthState::Healthy || has_way)
    }

    /// Lets time pass: slots age, drained targets go. Whether anything changed.
    pub fn tick(&mut self, now: Instant) -> bool {
        let before = self.draining.len();
        self.draining.retain(|_, draining| draining.until > now);
        let mut changed = self.draining.len() != before;
        for (_, ring) in self.rings.values_mut() {
            changed |= ring.tick(now);
        }
        changed
    }

    /// The health of a target as the world is told it.
    fn health_of(&self, key: &TargetKey) -> Health {
        let known = self.health.get(key).cloned();
        if self.draining.contains_key(key) {
            let was_unhealthy = known.is_some_and(|h| h.state == HealthState::Unhealthy);
            let state =
                if was_unhealthy { HealthState::UnhealthyDraining } else { HealthState::Draining };
            let description = Some("deregistered, keeps the flows it has".into());
            return Health { state, reason: Some(Reason::DeregistrationInProgress), description };
        }
        if !self.used_groups().contains(&*key.target_group) {
            let description = Some("no listener forwards to the target group".into());
            return Health {
                state: HealthState::Unused,
                reason: Some(Reason::NotInUse),
                description,
            };
        }
        known.unwrap_or_else(Health::initial)
    }

    fn used_groups(&self) -> BTreeSet<&str> {
        let listeners = self.config.load_balancers.values().flat_map(|lb| &lb.listeners);
        listeners.map(|listener| listener.target_group.as_str()).collect()
    }

    fn registered(&self) -> impl Iterator<Item = TargetKey> {
        let groups = self.config.target_groups.iter();
        groups.flat_map(|(name, group)| group.targets.iter().map(|target| key_of(name, target)))
    }

    /// Pinned slots, by ring: candidates for settling. Taken before a walk over the flows begins.
    pub fn pinned(&self) -> BTreeMap<u32, BTreeSet<u32>> {
        let pinned = self.rings.values().map(|(number, ring)| (*number, ring.pinned()));
        pinned.filter(|(_, slots)| !slots.is_empty()).collect()
    }

    /// Settles the slots of rings, unless the ring has been replaced meanwhile.
    pub fn settle(&mut self, settled: &BTreeMap<u32, BTreeSet<u32>>) {
        for (number, ring) in self.rings.values_mut() {
            if let Some(slots) = settled.get(number) {
                ring.settle(slots);
            }
        }
    }
}

/// Where a flow's packets go by the hash alone: the ring and the slot.
pub fn slot_of(desired: &Desired, keys: &HashKeys, key: &FlowKey, size: u32) -> Option<(u32, u32)> {
    let listener = EndpointKey::new(key.destination, key.destination_port, key.protocol);
    let endpoint = desired.endpoints.get(&listener)?;
    let is_listener = endpoint.kind() == Endpoint::LISTENER && endpoint.index != NO_RING;
    is_listener.then(|| (endpoint.index, flow::slot(keys.flow(key), size)))
}

/// Every listener on every address of its load balancer, with the load balancer's name.
fn listener_keys(
    config: &Config,
) -> impl Iterator<Item = (ListenerKey, &config::Listener, &String)> {
    config.load_balancers.iter().flat_map(|(name, balancer)| {
        balancer.listeners.iter().flat_map(move |listener| {
            balancer.addresses.iter().map(move |address| {
                let config::Listener { protocol, port, .. } = *listener;
                (ListenerKey { address: *address, protocol, port }, listener, name)
            })
        })
    })
}

fn key_of(target_group: &str, target: &config::Target) -> TargetKey {
    CheckKey { target_group: target_group.into(), address: target.address, port: target.port }
}

fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => flow::TCP,
        Protocol::Udp => flow::UDP,
    }
}

#[cfg(test)]
mod tests;
