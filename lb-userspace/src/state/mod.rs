//! What should be true now: the configuration, what health checks found, what the network looks
//! like. One task owns it; every event changes it, and [`State::desired`] says what follows.

mod admission;
mod registry;
mod rings;
mod snapshot;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use lb_common::flow::{self, FlowKey, HashKeys, Keys as _};
use lb_common::maglev::{self, Candidate};
use lb_common::tables::{
    self, Endpoint, EndpointKey, Listener, MAX_LISTENERS, MAX_RINGS, MAX_TARGETS, NO_LISTENER,
    NO_RING, OPEN, Target,
};
use lb_common::wire::eth::Macs;
use lb_common::wire::{Address, Be16};

use crate::config::{self, Config, Forwarding, Protocol, TargetGroup};
use crate::health::{CheckKey, CheckSpec, Health, HealthEvent, HealthState, Reason};
use crate::netlink::{Network, NextHop, Unresolved};
use crate::reconcile::{Desired, Prefix};

use admission::{Service, admitted};
use registry::Registry;
use rings::Ring;

pub use snapshot::{About, Counters};

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
    admissions: BTreeMap<(String, Service, bool), Option<Arc<BTreeSet<Prefix>>>>,
    classes: Vec<(u32, Arc<BTreeSet<Prefix>>)>,
    next_class: u32,
    /// The one listener that a target was of before others came to share it.
    first_owners: BTreeMap<EndpointKey, (u32, u32)>,
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
        let groups = self.config.target_groups.iter().filter(|(name, _)| used.contains(name.as_str()));
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
        let has_way = |key: &TargetKey| match self.network.next_hops.get(&key.address) {
            None | Some(Err(Unresolved::NoNeighbour { .. })) => false,
            Some(_) => true,
        };
        self.checks().keys().all(|key| {
            let health = self.health.get(key);
            health.is_some_and(|health| health.state != HealthState::Healthy || has_way(key))
        })
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
            return Health { state: HealthState::Unused, reason: Some(Reason::NotInUse), description };
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

    /// Everything the kernel's tables should hold. Gives out numbers and turns rings, so it is
    /// called once for every change.
    pub fn desired(&mut self, now: Instant) -> Desired {
        self.warnings.clear();
        let mut desired = Desired::default();
        self.put_interfaces(&mut desired);
        self.number(now);
        self.turn_rings(now);
        self.put_targets(&mut desired);
        self.put_addresses(&mut desired);
        self.put_listeners(&mut desired);
        for (number, ring) in self.rings.values() {
            desired.rings.insert(*number, ring.slots().clone());
        }
        desired
    }

    fn put_interfaces(&self, desired: &mut Desired) {
        for (index, nic) in &self.network.interfaces {
            let (parent, vlan) = nic.vlan.as_ref().map_or((*index, 0), |vlan| (vlan.parent, vlan.id));
            if self.attached.contains(&parent) {
                let mtu = u16::try_from(nic.mtu).unwrap_or(u16::MAX);
                desired.interfaces.insert(*index, tables::Interface { ifindex: parent, vlan, mtu });
                desired.devices.insert(parent);
            }
        }
    }

    /// Gives every target and listener its number, and takes back those of others.
    fn number(&mut self, now: Instant) {
        let targets: BTreeSet<_> = self.registered().chain(self.draining.keys().cloned()).collect();
        self.targets.retain(&targets, now);
        for key in &targets {
            if self.targets.number(key, now).is_none() {
                self.warnings.push(format!(
                    "target {}:{} of {} is left out: too many targets came and went lately",
                    key.address, key.port, key.target_group
                ));
            }
        }
        let listeners: BTreeSet<_> = listener_keys(&self.config).map(|(key, ..)| key).collect();
        self.listeners.retain(&listeners, now);
        for key in &listeners {
            if self.listeners.number(key, now).is_none() {
                self.warnings.push(format!(
                    "listener {} {} port {} is left out: too many listeners came and went lately",
                    key.address, key.protocol, key.port
                ));
            }
        }
    }

    /// Makes the ring of every target group in use, or gives its slots to other targets.
    fn turn_rings(&mut self, now: Instant) {
        let keys: BTreeSet<RingKey> = listener_keys(&self.config)
            .map(|(key, listener, _)| RingKey {
                target_group: listener.target_group.as_str().into(),
                is_v4: key.address.is_ipv4(),
            })
            .collect();
        // A number that this turn sets free may still be what a listener names: until the tables are
        // as wanted, its slots stay as they are.
        let mut taken: BTreeSet<u32> = self.rings.values().map(|(number, _)| *number).collect();
        let mut free_ring = || (0..MAX_RINGS).find(|number| taken.insert(*number));
        self.rings.retain(|key, _| keys.contains(key));
        for key in keys {
            let candidates = self.candidates(&key);
            if candidates.is_empty() {
                self.rings.remove(&key);
            } else if let Some((number, ring)) = self.rings.get_mut(&key) {
                let before = Arc::clone(ring.slots());
                ring.change(candidates, now);
                if !Arc::ptr_eq(&before, ring.slots()) {
                    // A whole new ring beside the old one, shown to each listener in one store.
                    match free_ring() {
                        Some(free) => *number = free,
                        None => tracing::debug!(number, "no spare ring: slots change in place"),
                    }
                }
            } else if self.has_concluded(&key)
                && let Some(number) = free_ring()
            {
                let ring = Ring::new(candidates, self.ring_size, now);
                self.rings.insert(key, (number, ring));
            }
        }
    }

    /// The targets that take new flows: the healthy ones, or all of them if none is healthy. A
    /// newcomer is none before the way to it is known.
    fn candidates(&self, key: &RingKey) -> Vec<Candidate> {
        let Some(group) = self.config.target_groups.get(&*key.target_group) else {
            return Vec::new();
        };
        let registered = group
            .targets
            .iter()
            .filter(|target| target.address.is_ipv4() == key.is_v4 && target.weight > 0)
            .map(|target| (key_of(&key.target_group, target), target));
        let healthy = |(key, _): &(TargetKey, _)| {
            self.health.get(key).is_some_and(|health| health.state == HealthState::Healthy)
        };
        let fails_open = !registered.clone().any(|target| healthy(&target));
        let (mut candidates, mut newcomers) = (Vec::new(), Vec::new());
        let ring = self.rings.get(key).map(|(_, ring)| ring);
        for (key, target) in registered.filter(|target| fails_open || healthy(target)) {
            let Some(number) = self.targets.get(&key) else { continue };
            let identity = maglev::identity(target.address.into(), Be16::new(target.port));
            let candidate = Candidate { target: number, identity, weight: target.weight.into() };
            let is_known = ring.is_some_and(|ring| ring.has_candidate(number));
            let can_be_reached = is_known || self.hop(target.address).is_ok();
            if can_be_reached { &mut candidates } else { &mut newcomers }.push(candidate);
        }
        // Nothing else is there: their packets are what has the way looked for.
        if candidates.is_empty() { newcomers } else { candidates }
    }

    /// Whether the first check of all of the ring's targets has concluded.
    fn has_concluded(&self, key: &RingKey) -> bool {
        let group = self.config.target_groups.get(&*key.target_group);
        group.is_none_or(|group| {
            let mut family = group.targets.iter().filter(|t| t.address.is_ipv4() == key.is_v4);
            family.all(|target| self.health.contains_key(&key_of(&key.target_group, target)))
        })
    }

    fn put_targets(&mut self, desired: &mut Desired) {
        let mut warnings = Vec::new();
        for (key, target) in self.all_targets() {
            let (Some(number), Some(group)) =
                (self.targets.get(&key), self.config.target_groups.get(&*key.target_group))
            else {
                continue;
            };
            let hop = match self.hop(target.address) {
                Ok(hop) => hop,
                Err(problem) => {
                    warnings.push(format!(
                        "target {} of {}: {problem}",
                        std::net::SocketAddr::new(target.address, target.port),
                        key.target_group
                    ));
                    tables::NextHop::default()
                }
            };
            let entry = Target {
                address: target.address.into(),
                port: Be16::new(target.port),
                mode: match group.forwarding {
                    Forwarding::Nat => Target::NAT,
                    Forwarding::DsrL2 => Target::DSR_L2,
                },
                flags: if self.serves(&key, target, group) { Target::SERVES } else { 0 },
                hop,
                ..Target::default()
            };
            desired.targets.insert(number, entry);
        }
        self.warnings.append(&mut warnings);
    }

    /// Registered and draining targets.
    fn all_targets(&self) -> impl Iterator<Item = (TargetKey, &config::Target)> {
        let registered = self.config.target_groups.iter().flat_map(|(name, group)| {
            group.targets.iter().map(move |target| (key_of(name, target), target))
        });
        registered.chain(self.draining.iter().map(|(key, draining)| (key.clone(), &draining.target)))
    }

    /// Whether packets of the flows that a target has still go to it: it is in the ring, draining,
    /// of weight 0, or unhealthy while connection termination is off.
    fn serves(&self, key: &TargetKey, target: &config::Target, group: &TargetGroup) -> bool {
        let ring = RingKey {
            target_group: key.target_group.clone(),
            is_v4: target.address.is_ipv4(),
        };
        let number = self.targets.get(key);
        let in_ring = self.rings.get(&ring).is_some_and(|(_, ring)| {
            ring.slots().iter().any(|slot| Some(slot.current) == number)
        });
        let is_unhealthy =
            self.health.get(key).is_some_and(|health| health.state == HealthState::Unhealthy);
        in_ring || !is_unhealthy || !group.unhealthy_connection_termination
    }

    /// The way to a target, or why there is none.
    fn hop(&self, address: IpAddr) -> Result<tables::NextHop, String> {
        let hop = match self.network.next_hops.get(&address) {
            Some(Ok(hop)) => hop,
            Some(Err(unresolved)) => return Err(format!("{unresolved}")),
            None => return Err("its next hop is not known yet".into()),
        };
        if !self.attached.contains(&hop.ifindex) {
            let name = self.network.interfaces.get(&hop.ifindex).map_or("?", |nic| nic.name.as_str());
            return Err(format!("it is behind {name}, which lb is not attached to: add --iface {name}"));
        }
        let NextHop { ifindex, vlan, source_mac, destination_mac, mtu } = *hop;
        let macs = Macs { destination: destination_mac, source: source_mac };
        Ok(tables::NextHop { ifindex, macs, vlan: vlan.unwrap_or(0), mtu })
    }

    /// The machine's own addresses: packets to them are its own.
    fn put_addresses(&self, desired: &mut Desired) {
        for address in self.network.addresses.keys().chain(&self.owned) {
            let kind = if self.owned.contains(address) { Endpoint::OWNED } else { Endpoint::LOCAL };
            let key = EndpointKey::of_address((*address).into());
            let endpoint = Endpoint { address: key.address, kind, ..Endpoint::default() };
            desired.endpoints.insert(key, endpoint);
        }
    }

    fn put_listeners(&mut self, desired: &mut Desired) {
        let mut classes = Classes { old: std::mem::take(&mut self.classes), new: Vec::new() };
        let ways_back = self.ways_back();
        for (key, listener, balancer) in listener_keys(&self.config) {
            let Some(group) = self.config.target_groups.get(&listener.target_group) else { continue };
            let Some(number) = self.listeners.get(&key) else { continue };
            let address = Address::from(key.address);
            let protocol = protocol_number(key.protocol);
            desired.listeners.insert(
                number,
                Listener { address, port: Be16::new(key.port), protocol, zero: [0; 5] },
            );
            let is_v4 = key.address.is_ipv4();
            let ring = RingKey { target_group: listener.target_group.as_str().into(), is_v4 };
            let ring_number = self.rings.get(&ring).map(|(number, _)| *number);
            if ring_number.is_none() && !self.candidates(&ring).is_empty() {
                // Its first ring comes with its targets' first checks.
                continue;
            }
            let service = Service::Port(key.protocol, key.port);
            let admission = self.admissions.get(&(balancer.clone(), service, is_v4));
            let class = classes.number(admission, &mut self.next_class);
            let is_shared = ways_back.values().any(|ways| {
                ways.len() > 1 && ways.iter().any(|(listener, _)| *listener == number)
            });
            let tracked =
                if group.track_every_flow || is_shared { Endpoint::TRACKED } else { 0 };
            let endpoint = Endpoint {
                address,
                port: Be16::new(key.port),
                protocol,
                kind: Endpoint::LISTENER | tracked,
                listener: number,
                index: ring_number.unwrap_or(NO_RING),
                class,
            };
            desired.endpoints.insert(endpoint.key(), endpoint);

            if let Some(admission) = self.admissions.get(&(balancer.clone(), Service::Echo, is_v4)) {
                let protocol = if is_v4 { flow::ICMP } else { flow::ICMPV6 };
                let class = classes.number(Some(admission), &mut self.next_class);
                let guard = Endpoint {
                    address,
                    protocol,
                    kind: Endpoint::GUARD,
                    class,
                    ..Endpoint::default()
                };
                desired.endpoints.insert(guard.key(), guard);
            }
        }
        self.put_ways_back(ways_back, desired);
        desired.classes = classes.new.iter().cloned().collect();
        self.classes = classes.new;
    }

    /// Which (listener, target) a packet from a target's address and port can be a reply of.
    fn ways_back(&self) -> BTreeMap<EndpointKey, Vec<(u32, u32)>> {
        let mut ways: BTreeMap<EndpointKey, Vec<(u32, u32)>> = BTreeMap::new();
        for (key, listener, _) in listener_keys(&self.config) {
            let name = &listener.target_group;
            let Some(group) = self.config.target_groups.get(name) else { continue };
            let Some(number) = self.listeners.get(&key) else { continue };
            if group.forwarding != Forwarding::Nat {
                continue;
            }
            let draining = self.draining.iter().filter(|(key, _)| *key.target_group == **name);
            let targets = group.targets.iter().chain(draining.map(|(_, draining)| &draining.target));
            for target in targets.filter(|t| t.address.is_ipv4() == key.address.is_ipv4()) {
                let Some(target_number) = self.targets.get(&key_of(name, target)) else { continue };
                let protocol = protocol_number(key.protocol);
                let way = EndpointKey::new(target.address.into(), Be16::new(target.port), protocol);
                ways.entry(way).or_default().push((number, target_number));
            }
        }
        ways
    }

    fn put_ways_back(
        &mut self,
        ways_back: BTreeMap<EndpointKey, Vec<(u32, u32)>>,
        desired: &mut Desired,
    ) {
        self.first_owners.retain(|key, _| ways_back.contains_key(key));
        for (key, ways) in ways_back {
            let (flags, owner) = match ways[..] {
                [owner] => {
                    self.first_owners.insert(key, owner);
                    (0, Some(owner))
                }
                // Flows older than the sharing are of the first owner, while it is still one.
                _ => {
                    let first = self.first_owners.get(&key).copied();
                    (Endpoint::SHARED, first.filter(|owner| ways.contains(owner)))
                }
            };
            let fallback = (NO_LISTENER, ways.first().map_or(0, |(_, target)| *target));
            let (listener, index) = owner.unwrap_or(fallback);
            let endpoint = Endpoint {
                address: key.address,
                port: key.port,
                protocol: key.protocol,
                kind: Endpoint::TARGET | flags,
                listener,
                index,
                class: 0,
            };
            desired.endpoints.insert(key, endpoint);
        }
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

/// Admission classes while they are given out: equal contents get equal numbers, and keep them.
struct Classes {
    old: Vec<(u32, Arc<BTreeSet<Prefix>>)>,
    new: Vec<(u32, Arc<BTreeSet<Prefix>>)>,
}

impl Classes {
    fn number(
        &mut self,
        admission: Option<&Option<Arc<BTreeSet<Prefix>>>>,
        next: &mut u32,
    ) -> u32 {
        let Some(Some(prefixes)) = admission else { return OPEN };
        let is_same = |(_, known): &&(u32, Arc<BTreeSet<Prefix>>)| {
            Arc::ptr_eq(known, prefixes) || known == prefixes
        };
        if let Some((number, _)) = self.new.iter().find(is_same) {
            return *number;
        }
        let class = self.old.iter().find(is_same).cloned().unwrap_or_else(|| {
            *next += 1;
            (*next - 1, prefixes.clone())
        });
        self.new.push(class.clone());
        class.0
    }
}

fn compile_admissions(
    config: &Config,
) -> BTreeMap<(String, Service, bool), Option<Arc<BTreeSet<Prefix>>>> {
    let mut admissions = BTreeMap::new();
    for (name, balancer) in &config.load_balancers {
        let Some(names) = &balancer.security_groups else { continue };
        let groups: Vec<_> =
            names.iter().filter_map(|name| config.security_groups.get(name)).collect();
        let ports = balancer.listeners.iter().map(|l| Service::Port(l.protocol, l.port));
        for service in ports.chain([Service::Echo]) {
            for is_v4 in [true, false] {
                let prefixes = admitted(&groups, service, is_v4).map(Arc::new);
                admissions.insert((name.clone(), service, is_v4), prefixes);
            }
        }
    }
    admissions
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
