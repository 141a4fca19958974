//! What should be true now: the configuration, what health checks found, what the network looks
//! like. One task owns it; every event changes it, and [`State::desired`] says what follows.

mod actions;
mod admission;
mod desired;
mod ending;
mod own_macs;
mod proxied;
mod registry;
mod rings;
mod routes;
mod selection;
mod slow_start;
mod snapshot;
mod snat;
mod target_admissions;
mod tunnels;
mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use lb_common::flow::{self, FlowKey, HashKeys, Keys as _};
use lb_common::tables::{Endpoint, EndpointKey, MAX_LISTENERS, MAX_TARGETS, NO_RING, OPEN};

use crate::config::{self, Config, LoadBalancer, Protocol};
use crate::health::{CheckKey, CheckSpec, Health, HealthEvent, HealthState, Reason};
use crate::netlink::Network;
use crate::proxy::routes::ListenerRoute;
use crate::reconcile::{Desired, Prefix};

use actions::{Action, Rings};
use desired::{Admissions, compile_admissions};
use ending::Ending;
use registry::Registry;
use slow_start::SlowStart;
use target_admissions::TargetAdmissions;

pub use snapshot::{About, Counters};
pub use snat::port_pools;
pub use walk::{Findings, FlowStore, Slots, Walk};

/// A target of a target group.
pub type TargetKey = CheckKey;

/// A port of a load balancer's address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct ListenerKey {
    address: IpAddr,
    protocol: Protocol,
    port: u16,
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
    /// The configuration's targets by group.
    registered: BTreeMap<Arc<str>, Vec<(TargetKey, config::Target)>>,
    /// Their keys.
    known: BTreeSet<TargetKey>,
    /// Groups that a listener names.
    used: BTreeSet<String>,
    /// Those of [`Self::used`] that packets are forwarded to; the proxy opens connections to the
    /// others.
    forwarded: BTreeSet<String>,
    /// The proxy's listeners.
    served: BTreeMap<SocketAddr, ListenerRoute>,
    /// Those of them that accept connections: the first checks of their targets have concluded.
    opened: BTreeSet<SocketAddr>,
    /// Groups of which every target has been checked once.
    known_groups: BTreeSet<Arc<str>>,
    /// What each listener does.
    actions: BTreeMap<ListenerKey, Action>,
    ring_size: u32,
    health: BTreeMap<TargetKey, Health>,
    network: Arc<Network>,
    owned: BTreeSet<IpAddr>,
    attached: BTreeSet<u32>,
    draining: BTreeMap<TargetKey, Draining>,
    /// Groups that a listener no longer names, and until when they keep the flows they have.
    leaving: BTreeMap<(ListenerKey, String), Instant>,
    /// The proxy's listeners that the configuration no longer has.
    ending: BTreeMap<ListenerKey, Ending>,
    slow_start: SlowStart,
    targets: Registry<TargetKey>,
    listeners: Registry<ListenerKey>,
    rings: Rings,
    /// Admitted sources by load balancer, service and family, computed once a configuration.
    admissions: Admissions,
    /// Whom targets let in that carry a security group.
    target_admissions: TargetAdmissions,
    classes: Vec<(u32, Arc<BTreeSet<Prefix>>)>,
    next_class: u32,
    /// Whether listeners track every flow, by number.
    tracked: BTreeMap<u32, bool>,
    /// The one listener that a target was of before others came to share it.
    first_owners: BTreeMap<EndpointKey, (u32, u32)>,
    pools: snat::Pools,
    /// Groups of which every listener remembers every flow, so that they can be counted.
    counted: BTreeSet<Arc<str>>,
    /// Remembered flows by target, once counted.
    flows: Option<BTreeMap<u32, u64>>,
    warnings: Vec<String>,
    /// Those of [`Self::warnings`] that should be acted on.
    alerts: Vec<String>,
}

impl State {
    /// Nothing configured, nothing known.
    pub fn new(ring_size: u32) -> Self {
        Self {
            config: Config::default(),
            registered: BTreeMap::new(),
            known: BTreeSet::new(),
            used: BTreeSet::new(),
            forwarded: BTreeSet::new(),
            served: BTreeMap::new(),
            opened: BTreeSet::new(),
            known_groups: BTreeSet::new(),
            actions: BTreeMap::new(),
            ring_size,
            health: BTreeMap::new(),
            network: Arc::default(),
            owned: BTreeSet::new(),
            attached: BTreeSet::new(),
            draining: BTreeMap::new(),
            leaving: BTreeMap::new(),
            ending: BTreeMap::new(),
            slow_start: SlowStart::new(Instant::now()),
            targets: Registry::new(MAX_TARGETS),
            listeners: Registry::new(MAX_LISTENERS),
            rings: Rings::default(),
            admissions: BTreeMap::new(),
            target_admissions: BTreeMap::new(),
            classes: Vec::new(),
            next_class: OPEN + 1,
            tracked: BTreeMap::new(),
            first_owners: BTreeMap::new(),
            pools: snat::Pools::new(),
            counted: BTreeSet::new(),
            flows: None,
            warnings: Vec::new(),
            alerts: Vec::new(),
        }
    }

    /// The configuration in force.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Another configuration. Targets that it no longer has drain, and so do the flows of groups
    /// that a listener no longer names.
    pub fn set_config(&mut self, config: Config, now: Instant) {
        for (name, group) in &self.config.target_groups {
            let Some(new) = config.target_groups.get(name) else { continue };
            let stays: BTreeSet<_> = new.targets.iter().map(|t| (t.address, t.port)).collect();
            for target in &group.targets {
                if !stays.contains(&(target.address, target.port)) {
                    let until = now + new.deregistration_delay;
                    let draining = Draining { target: target.clone(), until };
                    self.draining.insert(key_of(name.as_str().into(), target), draining);
                }
            }
        }
        self.note_leaving(&config, now);
        self.note_ending(&config, now);
        self.config = config;
        self.registered = self.config.target_groups.iter().map(registered).collect();
        self.known = self.registered.values().flatten().map(|(key, _)| key.clone()).collect();
        let listeners = || listener_keys(&self.config);
        let groups = listeners().flat_map(|(_, listener, ..)| &listener.target_groups);
        self.forwarded = groups.map(|group| group.name.clone()).collect();
        let proxied = self.config.load_balancers.values().flat_map(|balancer| &balancer.proxied);
        let groups = proxied.flat_map(config::ProxyListener::target_groups);
        let groups = groups.map(|group| &group.name).chain(&self.forwarded);
        self.used = groups.cloned().collect();
        self.served = routes::listener_routes(&self.config);
        self.known_groups.retain(|name| self.used.contains(&**name));
        let action = |(key, listener, _, balancer): (ListenerKey, _, _, &LoadBalancer)| {
            let action = Action::new(listener, !balancer.cross_zone, key.address.is_ipv4());
            (key, action)
        };
        self.actions = listeners().map(action).collect();
        self.admissions = compile_admissions(&self.config);
        let registered = &self.known;
        self.draining.retain(|key, _| {
            !registered.contains(key) && self.config.target_groups.contains_key(&*key.target_group)
        });
        let draining: Vec<IpAddr> = self.draining.keys().map(|key| key.address).collect();
        self.target_admissions =
            target_admissions::compile(&self.config, &self.target_admissions, &draining);
        self.health.retain(|key, _| registered.contains(key) || self.draining.contains_key(key));
        self.slow_start.retain(|key| {
            let group = self.config.target_groups.get(&*key.target_group)?;
            registered.contains(key).then_some(group.slow_start)
        });
    }

    /// Notes the groups that listeners will no longer name.
    fn note_leaving(&mut self, config: &Config, now: Instant) {
        let named: BTreeSet<_> = listener_keys(config)
            .flat_map(|(key, listener, ..)| {
                listener.target_groups.iter().map(move |group| (key.clone(), group.name.clone()))
            })
            .collect();
        let listeners: BTreeSet<_> = named.iter().map(|(key, _)| key).collect();
        for (key, listener, ..) in listener_keys(&self.config) {
            for group in &listener.target_groups {
                let Some(new) = config.target_groups.get(&group.name) else { continue };
                if listeners.contains(&key) {
                    let until = now + new.deregistration_delay;
                    self.leaving.entry((key.clone(), group.name.clone())).or_insert(until);
                }
            }
        }
        self.leaving.retain(|leaving, _| {
            !named.contains(leaving)
                && listeners.contains(&leaving.0)
                && config.target_groups.contains_key(&leaving.1)
        });
    }

    /// What a health check found. Events of targets that are gone change nothing.
    pub fn set_health(&mut self, event: HealthEvent, now: Instant) {
        let HealthEvent { key, health } = event;
        if !self.known.contains(&key) {
            return;
        }
        let slow_start = self.config.target_groups.get(&*key.target_group).map(|g| g.slow_start);
        if health.state != HealthState::Healthy {
            self.slow_start.end(&key);
        } else if let Some(duration) = slow_start.filter(|duration| !duration.is_zero())
            && !self.is_healthy(&key)
            && self.starts_slowly(&key)
        {
            self.slow_start.begin(key.clone(), duration, now);
        }
        self.health.insert(key, health);
        self.note_known_groups();
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

    /// Addresses of all load balancers, also of listeners that end.
    pub fn addresses(&self) -> BTreeSet<IpAddr> {
        let balancers = self.config.load_balancers.values();
        let configured = balancers.flat_map(|balancer| balancer.addresses.iter().copied());
        configured.chain(self.ending.keys().map(|key| key.address)).collect()
    }

    /// Targets to be kept resolved.
    pub fn destinations(&self) -> BTreeSet<IpAddr> {
        let registered = self.config.target_groups.values().flat_map(|group| &group.targets);
        let draining = self.draining.values().map(|draining| &draining.target);
        registered.chain(draining).map(|target| target.address).collect()
    }

    /// Targets to be checked: those of groups that a listener uses.
    pub fn checks(&self) -> BTreeMap<CheckKey, CheckSpec> {
        let used = self.registered.iter().filter(|(name, _)| self.used.contains(&***name));
        used.flat_map(|(name, targets)| {
            let group = self.config.target_groups.get(&**name);
            let spec = move |(key, target): &(TargetKey, config::Target)| {
                Some((key.clone(), CheckSpec::new(group?, target)))
            };
            targets.iter().filter_map(spec)
        })
        .collect()
    }

    /// Whether every listener has what it needs to forward: its targets' first checks have
    /// concluded, and the way to the healthy ones is known as far as it will be.
    pub fn is_ready(&self) -> bool {
        self.checks().keys().all(|key| self.is_settled(key))
    }

    /// Lets time pass: slots age, drained targets go, shares grow. Whether anything changed.
    pub fn tick(&mut self, now: Instant) -> bool {
        let came_free = self.targets.has_come_free(now) || self.listeners.has_come_free(now);
        let before = self.draining.len() + self.leaving.len();
        self.draining.retain(|_, draining| draining.until > now);
        self.leaving.retain(|_, until| *until > now);
        let is_over = self.draining.len() + self.leaving.len() != before;
        if is_over {
            // Should it come back, its first check decides anew.
            let (known, draining) = (&self.known, &self.draining);
            self.health.retain(|key, _| known.contains(key) || draining.contains_key(key));
        }
        let mut changed = came_free || is_over;
        changed |= self.slow_start.tick(now);
        for (_, ring) in self.rings.iter_mut() {
            changed |= ring.tick(now);
        }
        changed
    }

    /// What of the last [`Self::desired`] does not forward and will not without somebody's help,
    /// or not for minutes.
    pub fn alerts(&self) -> &[String] {
        &self.alerts
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
        if !self.used.contains(&*key.target_group) {
            let description = Some("no listener forwards to the target group".into());
            return Health {
                state: HealthState::Unused,
                reason: Some(Reason::NotInUse),
                description,
            };
        }
        known.unwrap_or_else(Health::initial)
    }

    /// Whether live flows can be counted: some group remembers every one.
    pub fn counts_flows(&self) -> bool {
        !self.counted.is_empty()
    }

    /// How many flows are remembered, by target.
    pub fn set_flows(&mut self, flows: BTreeMap<u32, u64>) {
        self.flows = Some(flows);
    }

    /// The live flows of a target, as of the last count; `None` where not every flow is remembered.
    fn flows_of(&self, key: &TargetKey) -> Option<u64> {
        let flows = self.flows.as_ref().filter(|_| self.counted.contains(&key.target_group))?;
        Some(flows.get(&self.targets.get(key)?).copied().unwrap_or(0))
    }

    /// Pinned slots, by ring: candidates for settling. Taken before a walk over the flows begins.
    pub fn pinned(&self) -> BTreeMap<u32, BTreeSet<u32>> {
        let pinned = self.rings.iter().map(|(number, ring)| (number, ring.pinned()));
        pinned.filter(|(_, slots)| !slots.is_empty()).collect()
    }

    /// Whether some pinned slots have not been looked at by a walk.
    pub fn has_unexplored_slots(&self) -> bool {
        self.rings.iter().any(|(_, ring)| ring.is_unexplored())
    }

    /// What a walk that began at `begun` has found of the slots of rings, unless they have been
    /// changed since.
    pub fn settle(&mut self, findings: &Findings, begun: Instant) {
        for (number, ring) in self.rings.iter_mut().filter(|(_, ring)| ring.is_as_of(begun)) {
            if let Some(slots) = findings.settled.get(&number) {
                ring.settle(slots);
            }
            if let Some(slots) = findings.mapped.get(&number) {
                ring.map(slots);
            }
        }
    }
}

/// The ring that a flow goes by, and its hash, of which the upper half chooses the slot.
fn place_of(desired: &Desired, keys: &HashKeys, key: &FlowKey) -> Option<(u32, u64)> {
    let listener = EndpointKey::new(key.destination, key.destination_port, key.protocol);
    let endpoint = desired.endpoints.get(&listener)?;
    let is_listener = endpoint.kind() == Endpoint::LISTENER && endpoint.index != NO_RING;
    let by_source = endpoint.kind & Endpoint::BY_SOURCE != 0;
    let hash = if by_source { keys.source(key.source) } else { keys.flow(key) };
    is_listener.then_some((endpoint.index, hash))
}

/// Every listener on every address of its load balancer, which comes with its name.
fn listener_keys(
    config: &Config,
) -> impl Iterator<Item = (ListenerKey, &config::Listener, &String, &LoadBalancer)> {
    config.load_balancers.iter().flat_map(|(name, balancer)| {
        balancer.listeners.iter().flat_map(move |listener| {
            balancer.addresses.iter().map(move |address| {
                let config::Listener { protocol, port, .. } = *listener;
                (ListenerKey { address: *address, protocol, port }, listener, name, balancer)
            })
        })
    })
}

fn registered(
    (name, group): (&String, &config::TargetGroup),
) -> (Arc<str>, Vec<(TargetKey, config::Target)>) {
    let name: Arc<str> = name.as_str().into();
    let target = |target: &config::Target| (key_of(name.clone(), target), target.clone());
    let targets = group.targets.iter().map(target).collect();
    (name, targets)
}

fn key_of(target_group: Arc<str>, target: &config::Target) -> TargetKey {
    CheckKey { target_group, address: target.address, port: target.port }
}

fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => flow::TCP,
        Protocol::Udp => flow::UDP,
    }
}

#[cfg(test)]
mod tests;
