//! What follows from the state for the kernel's tables.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lb_common::flow;
use lb_common::maglev::{self, Candidate};
use lb_common::tables::{
    self, Endpoint, EndpointKey, Listener, MAX_RINGS, NO_LISTENER, NO_RING, OPEN, Target,
};
use lb_common::wire::eth::Macs;
use lb_common::wire::{Address, Be16};

use crate::config::{self, Config, Forwarding, Protocol, TargetGroup};
use crate::health::{Health, HealthState};
use crate::netlink::{NextHop, Unresolved};
use crate::reconcile::{Desired, Prefix};

use super::admission::{Service, admitted};
use super::rings::{Periods, Ring};
use super::tunnels::{mode, too_narrow};
use super::{ListenerKey, RingKey, State, TargetKey, key_of, listener_keys, protocol_number};

/// The kernel's tables are written a little after a change is known here, and flows note their
/// last packet to the second.
const SWITCHING: Duration = Duration::from_secs(2);

/// Admitted sources by load balancer, service and family (IPv4 or not); `None`: everybody.
pub type Admissions = BTreeMap<(String, Service, bool), Admission>;
/// Who is admitted; `None`: everybody.
type Admission = Option<Arc<BTreeSet<Prefix>>>;

impl State {
    /// Everything the kernel's tables should hold. Gives out numbers and turns rings, so it is
    /// called once for every change.
    pub fn desired(&mut self, now: Instant) -> Desired {
        self.warnings.clear();
        self.alerts.clear();
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
        let listeners = self.config.load_balancers.values().flat_map(|lb| &lb.listeners);
        let idle = listeners.map(|listener| listener.idle_timeout).max().unwrap_or_default();
        self.targets.remember_for(idle);
        self.listeners.remember_for(idle);
        let rest = self.targets.quarantine();
        let targets: BTreeSet<_> = self.registered().chain(self.draining.keys().cloned()).collect();
        self.targets.retain(&targets, now);
        let name = |key: &TargetKey| {
            format!("{} of {}", SocketAddr::new(key.address, key.port), key.target_group)
        };
        let left_out = targets.iter().filter(|key| self.targets.number(key, now).is_none());
        self.alerts.extend(left_out_of("targets", left_out.map(name).collect(), rest));
        let listeners: BTreeSet<_> = listener_keys(&self.config).map(|(key, ..)| key).collect();
        self.listeners.retain(&listeners, now);
        self.tracked.retain(|number| self.listeners.has(*number));
        let name =
            |key: &ListenerKey| format!("{} port {} {}", key.address, key.port, key.protocol);
        let left_out = listeners.iter().filter(|key| self.listeners.number(key, now).is_none());
        self.alerts.extend(left_out_of("listeners", left_out.map(name).collect(), rest));
        self.warnings.extend(self.alerts.iter().cloned());
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
            let periods = self.periods(&key);
            if candidates.is_empty() && !self.keeps_flows(&key) {
                self.rings.remove(&key);
            } else if let Some((number, ring)) = self.rings.get_mut(&key) {
                ring.set_periods(periods);
                let before = Arc::clone(ring.slots());
                ring.change(candidates, now);
                if !Arc::ptr_eq(&before, ring.slots()) {
                    // A whole new ring beside the old one, shown to each listener in one store.
                    match free_ring() {
                        Some(free) => *number = free,
                        None => tracing::debug!(number, "no spare ring: slots change in place"),
                    }
                }
            } else if !candidates.is_empty()
                && self.is_ring_settled(&key)
                && let Some(number) = free_ring()
            {
                let ring = Ring::new(candidates, self.ring_size, periods, now);
                self.rings.insert(key, (number, ring));
            }
        }
    }

    /// How long the slots of a ring learn: by the idle timeouts of the listeners that use it.
    fn periods(&self, key: &RingKey) -> Periods {
        let of = |protocol: Option<Protocol>| {
            let listeners = self.config.load_balancers.values().flat_map(|lb| &lb.listeners);
            let matching = listeners.filter(|listener| {
                listener.target_group == *key.target_group
                    && protocol.is_none_or(|protocol| listener.protocol == protocol)
            });
            matching.map(|listener| listener.idle_timeout).max().unwrap_or_default() + SWITCHING
        };
        Periods { learning: of(None), learning_udp: of(Some(Protocol::Udp)) }
    }

    /// Whether targets that take no new flows may still have some.
    fn keeps_flows(&self, key: &RingKey) -> bool {
        self.all_targets().any(|(target, _)| {
            target.target_group == key.target_group && target.address.is_ipv4() == key.is_v4
        })
    }

    /// The targets that take new flows: the healthy ones, or all of them if none is healthy. Who
    /// is not in the ring waits until the way to it is known; who cannot be reached leaves it.
    fn candidates(&self, key: &RingKey) -> Vec<Candidate> {
        let Some(group) = self.config.target_groups.get(&*key.target_group) else {
            return Vec::new();
        };
        let registered = group
            .targets
            .iter()
            .filter(|target| key.takes(group, target) && target.weight > 0)
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
            let can_be_reached = match self.hop(target.address) {
                Ok(_) => true,
                Err(no_way) if no_way.is_lasting => false,
                Err(_) => ring.is_some_and(|ring| ring.has_candidate(number)),
            };
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
            let mut takes = group.targets.iter().filter(|target| key.takes(group, target));
            takes.all(|target| self.is_settled(&key_of(&key.target_group, target)))
        })
    }

    fn put_targets(&mut self, desired: &mut Desired) {
        let (mut warnings, mut alerts) = (Vec::new(), Vec::new());
        for (key, target) in self.all_targets() {
            let (Some(number), Some(group)) =
                (self.targets.get(&key), self.config.target_groups.get(&*key.target_group))
            else {
                continue;
            };
            let hop = match self.hop(target.address) {
                Ok(hop) => hop,
                Err(no_way) => {
                    let warning = format!(
                        "target {} of {}: {}",
                        SocketAddr::new(target.address, target.port),
                        key.target_group,
                        no_way.problem
                    );
                    let is_healthy = |health: &Health| health.state == HealthState::Healthy;
                    if no_way.is_lasting && self.health.get(&key).is_some_and(is_healthy) {
                        alerts.push(warning.clone());
                    }
                    warnings.push(warning);
                    tables::NextHop::default()
                }
            };
            let entry = Target {
                address: target.address.into(),
                port: Be16::new(target.port),
                mode: mode(group.forwarding),
                flags: self.flags(&key, group),
                hop,
                ..Target::default()
            };
            let entry = self.through_tunnel(entry, target.address, group);
            if let Some(warning) = too_narrow(&entry, &key, group) {
                warnings.push(warning);
            }
            desired.targets.insert(number, entry);
        }
        self.warnings.append(&mut warnings);
        self.alerts.append(&mut alerts);
    }

    /// Registered and draining targets.
    pub(super) fn all_targets(&self) -> impl Iterator<Item = (TargetKey, &config::Target)> {
        let registered = self.config.target_groups.iter().flat_map(|(name, group)| {
            group.targets.iter().map(move |target| (key_of(name, target), target))
        });
        registered
            .chain(self.draining.iter().map(|(key, draining)| (key.clone(), &draining.target)))
    }

    /// Whether a target takes new flows: it is in the ring. And whether packets of the flows that
    /// it has still go to it: it is in the ring, draining, of weight 0, or unhealthy while
    /// connection termination is off.
    fn flags(&self, key: &TargetKey, group: &TargetGroup) -> u8 {
        let in_ring = self.targets.get(key).is_some_and(|number| {
            [true, false].into_iter().any(|is_v4| {
                let ring = RingKey { target_group: key.target_group.clone(), is_v4 };
                self.rings.get(&ring).is_some_and(|(_, ring)| ring.has_candidate(number))
            })
        });
        let is_unhealthy =
            self.health.get(key).is_some_and(|health| health.state == HealthState::Unhealthy);
        let serves = in_ring || !is_unhealthy || !group.unhealthy_connection_termination;
        (u8::from(serves) * Target::SERVES) | (u8::from(in_ring) * Target::IN_RING)
    }

    /// The way to a target, or why there is none.
    pub(super) fn hop(&self, address: IpAddr) -> Result<tables::NextHop, NoWay> {
        let lasting = |problem| NoWay { problem, is_lasting: true };
        let passing = |problem| NoWay { problem, is_lasting: false };
        let name = |ifindex: u32| {
            self.network.interfaces.get(&ifindex).map_or("?", |nic| nic.name.as_str())
        };
        let hop = match self.network.next_hops.get(&address) {
            Some(Ok(hop)) => hop,
            None => return Err(passing("its next hop is not known yet".into())),
            Some(Err(unresolved)) => {
                return Err(match *unresolved {
                    Unresolved::NoNeighbour { .. } => passing(unresolved.to_string()),
                    Unresolved::Local => lasting(
                        "it is an address of the balancer itself, which lb does not forward to: \
                         use a server on another machine, or in a namespace or container of its own"
                            .into(),
                    ),
                    Unresolved::NoRoute => {
                        lasting("no route leads there: add one with `ip route add`".into())
                    }
                    Unresolved::LinkDown { ifindex } => {
                        let name = name(ifindex);
                        lasting(format!(
                            "{name}, which it is behind, is down or has no carrier: \
                             `ip link set {name} up`, or look after the cable"
                        ))
                    }
                    Unresolved::UnsupportedLink { ifindex } => lasting(format!(
                        "{}, which it is behind, carries no plain or once-tagged Ethernet frames: \
                         have a route through another interface",
                        name(ifindex)
                    )),
                });
            }
        };
        if !self.attached.contains(&hop.ifindex) {
            let name = name(hop.ifindex);
            return Err(lasting(format!(
                "it is behind {name}, which lb is not attached to: add --iface {name}"
            )));
        }
        let NextHop { ifindex, vlan, source_mac, destination_mac, mtu } = *hop;
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
                Listener {
                    address,
                    port: Be16::new(key.port),
                    protocol,
                    zero: 0,
                    idle: u32::try_from(listener.idle_timeout.as_secs()).unwrap_or(u32::MAX),
                },
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
            let is_tracked = group.track_every_flow || is_shared;
            let was_tracked = if is_tracked {
                self.tracked.insert(number);
                false
            } else {
                self.tracked.remove(&number)
            };
            if was_tracked && let Some((_, ring)) = self.rings.get_mut(&ring) {
                ring.unsettle();
            }
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

/// Why packets cannot be sent to a target.
pub struct NoWay {
    /// The reason, and what helps.
    pub problem: String,
    /// Whether somebody has to do something about it; else it is about to pass, or the target is
    /// down.
    pub is_lasting: bool,
}

fn left_out_of(kind: &str, names: Vec<String>, rest: Duration) -> Option<String> {
    const SHOWN: usize = 5;
    let count = names.len();
    let more = if count > SHOWN { format!(" and {} more", count - SHOWN) } else { String::new() };
    (count > 0).then(|| {
        format!(
            "{count} {kind} are left out, as too many came and went lately: a place in the table \
             rests {} s before another takes it, then they follow by themselves. Left out: {}{more}",
            rest.as_secs(),
            names[..count.min(SHOWN)].join(", ")
        )
    })
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
