//! What follows from the state for the kernel's tables.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lb_common::flow;
use lb_common::load::Share;
use lb_common::tables::{
    self, Endpoint, EndpointKey, Listener, NO_LISTENER, NO_RING, OPEN, Target,
};
use lb_common::wire::eth::Macs;
use lb_common::wire::{Address, Be16};

use crate::config::{self, Algorithm, Config, Forwarding, Stickiness, TargetGroup};
use crate::health::{Health, HealthState};
use crate::netlink::{NextHop, Unresolved};
use crate::reconcile::{Desired, Prefix};

use super::actions::Candidates;
use super::admission::{Service, admitted};
use super::own_macs::own_macs;
use super::proxied::proxied_keys;
use super::tunnels::{mode, too_narrow};
use super::{ListenerKey, State, TargetKey, listener_keys, protocol_number};

/// Admitted sources by load balancer, service and family (IPv4 or not); `None`: everybody.
pub type Admissions = BTreeMap<(String, Service, bool), Admission>;
/// Who is admitted; `None`: everybody.
pub type Admission = Option<Arc<BTreeSet<Prefix>>>;

impl State {
    /// Everything the kernel's tables should hold. Gives out numbers and turns rings, so it is
    /// called once for every change.
    pub fn desired(&mut self, now: Instant) -> Desired {
        self.warnings.clear();
        self.alerts.clear();
        self.open_listeners();
        let mut desired = Desired::default();
        self.put_interfaces(&mut desired);
        desired.own_macs = own_macs(&self.network.interfaces, &self.attached);
        self.number(now);
        self.turn_rings(now);
        self.put_targets(&mut desired);
        self.put_addresses(&mut desired);
        self.put_shares(&mut desired);
        self.put_sources(&mut desired);
        self.put_listeners(&mut desired, now);
        for (number, ring) in self.rings.iter() {
            desired.rings.insert(number, ring.slots().clone());
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
        let targets: BTreeSet<_> = self.known.iter().chain(self.draining.keys()).cloned().collect();
        self.targets.retain(&targets, now);
        let name = |key: &TargetKey| {
            format!("{} of {}", SocketAddr::new(key.address, key.port), key.target_group)
        };
        let left_out = targets.iter().filter(|key| self.targets.number(key, now).is_none());
        self.alerts.extend(left_out_of("targets", left_out.map(name).collect(), rest));
        let forwarded = listener_keys(&self.config).map(|(key, ..)| key);
        let proxied = proxied_keys(&self.config).map(|(key, ..)| key);
        let ending = self.ending.keys().cloned();
        let listeners: BTreeSet<_> = forwarded.chain(proxied).chain(ending).collect();
        self.listeners.retain(&listeners, now);
        self.tracked.retain(|number, _| self.listeners.has(*number));
        let name =
            |key: &ListenerKey| format!("{} port {} {}", key.address, key.port, key.protocol);
        let left_out = listeners.iter().filter(|key| self.listeners.number(key, now).is_none());
        self.alerts.extend(left_out_of("listeners", left_out.map(name).collect(), rest));
        self.warnings.extend(self.alerts.iter().cloned());
    }

    fn put_targets(&mut self, desired: &mut Desired) {
        let (mut warnings, mut alerts) = (Vec::new(), Vec::new());
        let in_ring: BTreeSet<u32> =
            self.rings.iter().flat_map(|(_, ring)| ring.members()).copied().collect();
        for (key, target) in self.all_targets().filter(|(key, _)| !self.is_proxied(key)) {
            let (Some(number), Some(group)) =
                (self.targets.get(key), self.config.target_groups.get(&*key.target_group))
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
                    if no_way.is_lasting && self.health.get(key).is_some_and(is_healthy) {
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
                flags: self.flags(key, in_ring.contains(&number), group),
                hop,
                ..Target::default()
            };
            let entry = self.through_tunnel(entry, target.address, group);
            if let Some(warning) = too_narrow(&entry, key, group) {
                warnings.push(warning);
            }
            desired.targets.insert(number, entry);
        }
        self.warnings.append(&mut warnings);
        self.alerts.append(&mut alerts);
    }

    /// Registered and draining targets.
    pub(super) fn all_targets(&self) -> impl Iterator<Item = (&TargetKey, &config::Target)> {
        let registered = self.registered.values().flatten().map(|(key, target)| (key, target));
        registered.chain(self.draining.iter().map(|(key, draining)| (key, &draining.target)))
    }

    /// Whether a target takes new flows: it is in a ring. And whether packets of the flows that it
    /// has still go to it: it is in a ring, draining, of weight 0, or unhealthy while connection
    /// termination is off.
    fn flags(&self, key: &TargetKey, in_ring: bool, group: &TargetGroup) -> u8 {
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

    /// What targets are due that are chosen by their connections. Those that drain are compared
    /// with nobody, but counted: they may come back.
    fn put_shares(&self, desired: &mut Desired) {
        for (group, (name, settings)) in (1..).zip(&self.config.target_groups) {
            if settings.algorithm != Algorithm::LeastConnections {
                continue;
            }
            for (key, target) in self.all_targets().filter(|(key, _)| &*key.target_group == name) {
                if let Some(number) = self.targets.get(key) {
                    let weight = u32::from(target.weight) * self.slow_start.share(key);
                    desired.shares.insert(number, Share { weight, group });
                }
            }
        }
    }

    fn put_listeners(&mut self, desired: &mut Desired, now: Instant) {
        let mut classes = Classes { old: std::mem::take(&mut self.classes), new: Vec::new() };
        let ways_back = self.ways_back();
        let sharing: BTreeSet<u32> = ways_back
            .values()
            .filter(|ways| ways.len() > 1)
            .flat_map(|ways| ways.iter().map(|(listener, _)| *listener))
            .collect();
        let mut uncounted = BTreeSet::new();
        for (key, listener, balancer, _) in listener_keys(&self.config) {
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
            let ring_number = self.rings.of(&key).map(|(number, _)| number);
            if ring_number.is_none() && self.waits(&key) {
                // Its first ring comes with its targets' first checks.
                continue;
            }
            let class =
                classes.number(admission(&self.admissions, &key, balancer), &mut self.next_class);
            let is_tracked =
                sharing.contains(&number) || self.any_group(listener, |g| g.tracks_every_flow());
            if !is_tracked {
                uncounted.extend(listener.target_groups.iter().map(|group| group.name.clone()));
            }
            let by_connections =
                self.any_group(listener, |g| g.algorithm == Algorithm::LeastConnections);
            let was_tracked = self.tracked.insert(number, is_tracked).unwrap_or(is_tracked);
            if let Some(ring) = self.rings.of_mut(&key) {
                match (was_tracked, is_tracked) {
                    (true, false) => ring.unsettle(now),
                    (false, true) if by_connections => ring.learn(now),
                    _ => {}
                }
            }
            let by_source =
                self.any_group(listener, |group| group.stickiness == Stickiness::SourceIp);
            let flag = |is_set: bool, flag: u8| if is_set { flag } else { 0 };
            let endpoint = Endpoint {
                address,
                port: Be16::new(key.port),
                protocol,
                kind: Endpoint::LISTENER
                    | flag(is_tracked, Endpoint::TRACKED)
                    | flag(by_source, Endpoint::BY_SOURCE),
                listener: number,
                index: ring_number.unwrap_or(NO_RING),
                class,
            };
            desired.endpoints.insert(endpoint.key(), endpoint);
        }
        self.put_proxied(desired, &mut classes);
        self.put_guards(desired, &mut classes);
        let names = self.registered.keys();
        let is_counted =
            |name: &&Arc<str>| self.forwarded.contains(&***name) && !uncounted.contains(&***name);
        self.counted = names.filter(is_counted).cloned().collect();
        self.put_ways_back(ways_back, desired);
        self.put_target_admissions(desired, &mut classes);
        desired.classes = classes.new.iter().cloned().collect();
        self.classes = classes.new;
    }

    /// Echo requests to load balancers that have security groups.
    fn put_guards(&mut self, desired: &mut Desired, classes: &mut Classes) {
        for (name, balancer) in &self.config.load_balancers {
            for address in &balancer.addresses {
                let is_v4 = address.is_ipv4();
                let Some(admission) = self.admissions.get(&(name.clone(), Service::Echo, is_v4))
                else {
                    continue;
                };
                let guard = Endpoint {
                    address: Address::from(*address),
                    protocol: if is_v4 { flow::ICMP } else { flow::ICMPV6 },
                    kind: Endpoint::GUARD,
                    class: classes.number(Some(admission), &mut self.next_class),
                    ..Endpoint::default()
                };
                desired.endpoints.insert(guard.key(), guard);
            }
        }
    }

    /// Which (listener, target) a packet from a target's address and port can be a reply of.
    fn ways_back(&self) -> BTreeMap<EndpointKey, Vec<(u32, u32)>> {
        let mut ways: BTreeMap<EndpointKey, Vec<(u32, u32)>> = BTreeMap::new();
        let draining = self.draining.iter().map(|(key, draining)| (key, &draining.target));
        let mut draining_of: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for (key, target) in draining {
            draining_of.entry(&*key.target_group).or_default().push((key, target));
        }
        let named = listener_keys(&self.config).flat_map(|(key, listener, ..)| {
            let groups = listener.target_groups.iter();
            groups.map(move |group| (key.clone(), group.name.as_str()))
        });
        let leaving = self.leaving.keys().map(|(key, name)| (key.clone(), name.as_str()));
        for (key, name) in named.chain(leaving) {
            let Some(group) = self.config.target_groups.get(name) else { continue };
            let Some(number) = self.listeners.get(&key) else { continue };
            if group.forwarding != Forwarding::Nat {
                continue;
            }
            let registered = self.registered.get(name).into_iter().flatten();
            let registered = registered.map(|(key, target)| (key, target));
            let draining = draining_of.get(name).into_iter().flatten().copied();
            let is_v4 = key.address.is_ipv4();
            for (target_key, target) in
                registered.chain(draining).filter(|(_, target)| target.address.is_ipv4() == is_v4)
            {
                let Some(target_number) = self.targets.get(target_key) else { continue };
                let protocol = protocol_number(key.protocol);
                let way = EndpointKey::new(target.address.into(), Be16::new(target.port), protocol);
                ways.entry(way).or_default().push((number, target_number));
            }
        }
        ways
    }

    /// Whether a listener without a ring is to get one.
    fn waits(&self, key: &ListenerKey) -> bool {
        let Some(action) = self.actions.get(key) else { return false };
        match self.candidates(action, None) {
            Candidates::Are(candidates) => !candidates.is_empty(),
            Candidates::Unknown => true,
            Candidates::Nobody => false,
        }
    }

    fn any_group(&self, listener: &config::Listener, is: impl Fn(&TargetGroup) -> bool) -> bool {
        let groups = &self.config.target_groups;
        listener.target_groups.iter().any(|group| groups.get(&group.name).is_some_and(&is))
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
pub struct Classes {
    old: Vec<(u32, Arc<BTreeSet<Prefix>>)>,
    new: Vec<(u32, Arc<BTreeSet<Prefix>>)>,
}

impl Classes {
    /// The class of an admission; `next` is the first number that was never given out.
    pub fn number(&mut self, admission: Option<&Admission>, next: &mut u32) -> u32 {
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

/// Who may come in by a listener of a load balancer; `None`: everybody.
pub fn admission<'a>(
    admissions: &'a Admissions,
    key: &ListenerKey,
    balancer: &str,
) -> Option<&'a Admission> {
    let service = Service::Port(key.protocol, key.port);
    admissions.get(&(balancer.to_owned(), service, key.address.is_ipv4()))
}

/// Compiles the security groups of every load balancer that has some.
pub fn compile_admissions(config: &Config) -> Admissions {
    let mut admissions = BTreeMap::new();
    for (name, balancer) in &config.load_balancers {
        let Some(names) = &balancer.security_groups else { continue };
        let groups: Vec<_> =
            names.iter().filter_map(|name| config.security_groups.get(name)).collect();
        let ports = balancer.listeners.iter().map(|l| Service::Port(l.protocol, l.port));
        let proxied = balancer.proxied.iter().map(|l| Service::Port(config::Protocol::Tcp, l.port));
        for service in ports.chain(proxied).chain([Service::Echo]) {
            for is_v4 in [true, false] {
                let prefixes =
                    admitted(&groups, &config.security_groups, service, is_v4).map(Arc::new);
                admissions.insert((name.clone(), service, is_v4), prefixes);
            }
        }
    }
    admissions
}
