//! What follows from the state for the kernel's tables.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use lb_common::flow;
use lb_common::maglev::{self, Candidate};
use lb_common::tables::{
    self, Endpoint, EndpointKey, Listener, MAX_RINGS, NO_LISTENER, NO_RING, OPEN, Target,
};
use lb_common::wire::eth::Macs;
use lb_common::wire::{Address, Be16};

use crate::config::{self, Config, Forwarding, TargetGroup};
use crate::health::HealthState;
use crate::netlink::NextHop;
use crate::reconcile::{Desired, Prefix};

use super::admission::{Service, admitted};
use super::rings::Ring;
use super::{RingKey, State, TargetKey, key_of, listener_keys, protocol_number};

/// Admitted sources by load balancer, service and family (IPv4 or not); `None`: everybody.
pub type Admissions = BTreeMap<(String, Service, bool), Admission>;
/// Who is admitted; `None`: everybody.
type Admission = Option<Arc<BTreeSet<Prefix>>>;

impl State {
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
        self.put_sources(&mut desired);
        self.put_listeners(&mut desired);
        for (number, ring) in self.rings.values() {
            desired.rings.insert(*number, ring.slots().clone());
        }
        desired
    }

    fn put_interfaces(&self, desired: &mut Desired) {
        for (index, nic) in &self.network.interfaces {
            let (parent, vlan) =
                nic.vlan.as_ref().map_or((*index, 0), |vlan| (vlan.parent, vlan.id));
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
            } else if self.is_ring_settled(&key)
                && let Some(number) = free_ring()
            {
                let ring = Ring::new(candidates, self.ring_size, now);
                self.rings.insert(key, (number, ring));
            }
        }
    }

    /// The targets that take new flows: the healthy ones, or all of them if none is healthy. Who
    /// comes to a ring that is there already waits until the way to it is known.
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
            let is_known = ring.is_none_or(|ring| ring.has_candidate(number));
            let can_be_reached = is_known || self.hop(target.address).is_ok();
            if can_be_reached { &mut candidates } else { &mut newcomers }.push(candidate);
        }
        // Nothing else is there: their packets are what has the way looked for.
        if candidates.is_empty() { newcomers } else { candidates }
    }

    /// Whether all is known that a first ring needs: whoever joined it later would get no datagram
    /// of an unknown flow for two minutes.
    fn is_ring_settled(&self, key: &RingKey) -> bool {
        let group = self.config.target_groups.get(&*key.target_group);
        group.is_none_or(|group| {
            let mut family = group.targets.iter().filter(|t| t.address.is_ipv4() == key.is_v4);
            family.all(|target| self.is_settled(&key_of(&key.target_group, target)))
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
                        SocketAddr::new(target.address, target.port),
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
                    Forwarding::Snat => Target::SNAT,
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
    pub(super) fn all_targets(&self) -> impl Iterator<Item = (TargetKey, &config::Target)> {
        let registered = self.config.target_groups.iter().flat_map(|(name, group)| {
            group.targets.iter().map(move |target| (key_of(name, target), target))
        });
        registered
            .chain(self.draining.iter().map(|(key, draining)| (key.clone(), &draining.target)))
    }

    /// Whether packets of the flows that a target has still go to it: it is in the ring, draining,
    /// of weight 0, or unhealthy while connection termination is off.
    fn serves(&self, key: &TargetKey, target: &config::Target, group: &TargetGroup) -> bool {
        let ring =
            RingKey { target_group: key.target_group.clone(), is_v4: target.address.is_ipv4() };
        let in_ring = self.targets.get(key).is_some_and(|number| {
            self.rings.get(&ring).is_some_and(|(_, ring)| ring.has_candidate(number))
        });
        let is_unhealthy =
            self.health.get(key).is_some_and(|health| health.state == HealthState::Unhealthy);
        in_ring || !is_unhealthy || !group.unhealthy_connection_termination
    }

    /// The way to a target, or why there is none.
    pub(super) fn hop(&self, address: IpAddr) -> Result<tables::NextHop, String> {
        let hop = match self.network.next_hops.get(&address) {
            Some(Ok(hop)) => hop,
            Some(Err(unresolved)) => return Err(format!("{unresolved}")),
            None => return Err("its next hop is not known yet".into()),
        };
        if !self.attached.contains(&hop.ifindex) {
            let name =
                self.network.interfaces.get(&hop.ifindex).map_or("?", |nic| nic.name.as_str());
            return Err(format!(
                "it is behind {name}, which lb is not attached to: add --iface {name}"
            ));
        }
        let NextHop { ifindex, vlan, source_mac, destination_mac, mtu, .. } = *hop;
        let macs = Macs::new(destination_mac, source_mac);
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
            let Some(group) = self.config.target_groups.get(&listener.target_group) else {
                continue;
            };
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
            let is_shared = ways_back
                .values()
                .any(|ways| ways.len() > 1 && ways.iter().any(|(listener, _)| *listener == number));
            let is_tracked =
                group.track_every_flow || is_shared || group.forwarding == Forwarding::Snat;
            let tracked = if is_tracked { Endpoint::TRACKED } else { 0 };
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

            if let Some(admission) = self.admissions.get(&(balancer.clone(), Service::Echo, is_v4))
            {
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
            let targets =
                group.targets.iter().chain(draining.map(|(_, draining)| &draining.target));
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
}

/// Admission classes while they are given out: equal contents get equal numbers, and keep them.
struct Classes {
    old: Vec<(u32, Arc<BTreeSet<Prefix>>)>,
    new: Vec<(u32, Arc<BTreeSet<Prefix>>)>,
}

impl Classes {
    fn number(&mut self, admission: Option<&Admission>, next: &mut u32) -> u32 {
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

/// Compiles the security groups of every load balancer that has some.
pub fn compile_admissions(config: &Config) -> Admissions {
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
