//! Balancers put together by hand for program runs, and one with everything in it.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use lb_common::{
    flow::{HashKeys, ICMP, ICMPV6, TCP, TCP_IDLE, UDP, UDP_IDLE},
    load::Share,
    snat::{MAX_SNAT_ADDRESSES, SnatSource},
    tables::{
        Endpoint, EndpointKey, Interface, Listener, NO_LISTENER, NO_RING, NextHop, OPEN, Slot,
        Target,
    },
    wire::{
        Address, Be16,
        eth::{Macs, OwnMac},
    },
};
use lb_userspace::{
    dataplane::LoadOptions,
    reconcile::{Desired, Prefix},
};

use crate::{packets::OUR_MAC, progrun::device_mac};

/// What the program is loaded with: small rings, the same hash on every run.
pub const OPTIONS: LoadOptions = LoadOptions {
    hash_seed: 0x5eed,
    ring_size: 61,
    flow_table_size: 1 << 16,
    half_open_table_size: 1 << 16,
    once_seen_table_size: 1 << 16,
    port_pools: 16,
    log: false,
};

/// Sources of tunnels: 172.16.0.0/16 and 100::/64.
const TUNNEL_SOURCES: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(172, 16, 0, 0), Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0));
/// UDP port of tunnels.
pub const GUE_PORT: u16 = 6080;

/// A balancer to be, in readable steps.
#[derive(Clone, Debug, Default)]
pub struct Scene {
    /// What the tables are to hold.
    pub desired: Desired,
}

/// The way to a target.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// The NIC; 0: not resolved.
    pub device: u32,
    /// VLAN id, 0 for none.
    pub vlan: u16,
    /// Largest IP packet, bytes.
    pub mtu: u16,
}

impl Way {
    /// Over a device, untagged, 1500 bytes.
    pub fn by(device: u32) -> Self {
        Self { device, vlan: 0, mtu: 1500 }
    }
}

/// The MAC address behind which a target is.
pub fn target_mac(target: u32) -> [u8; 6] {
    let [_, _, high, low] = target.to_be_bytes();
    [2, 0, 0, 1, high, low]
}

impl Scene {
    /// NICs 10 and 11 are attached, 12 stands for VLAN 100 of 10, 13 is not attached.
    pub fn new() -> Self {
        let mut scene = Self::default();
        let interface = |ifindex, vlan| Interface { ifindex, vlan, mtu: 1500 };
        let interfaces = [(10, interface(10, 0)), (11, interface(11, 0)), (12, interface(10, 100))];
        scene.desired.interfaces = interfaces.into();
        scene.desired.devices = [10, 11].into();
        scene.desired.own_macs = [10, 11].map(|device| (device, OwnMac::new(OUR_MAC))).into();
        for local in ["10.0.10.2", "10.0.11.2", "fd00:10::2", "fd00:11::2"] {
            scene.address(local, Endpoint::LOCAL);
        }
        scene
    }

    /// An address of the machine, of one of the kinds of [`Endpoint`].
    pub fn address(&mut self, address: &str, kind: u8) {
        let address = ip(address).into();
        self.endpoint(Endpoint { address, kind, ..Endpoint::default() });
    }

    /// A target that takes traffic; returns its number.
    pub fn target(&mut self, number: u32, mode: u8, at: &str, way: Way) -> u32 {
        let at: SocketAddr = at.parse().expect("an address and a port");
        let macs = Macs::new(target_mac(number), device_mac(way.device));
        let target = Target {
            address: at.ip().into(),
            port: Be16::new(at.port()),
            mode,
            flags: Target::SERVES | Target::IN_RING,
            hop: NextHop { ifindex: way.device, macs, vlan: way.vlan, mtu: way.mtu },
            ..Target::default()
        };
        let target = match at {
            _ if !target.is_tunnelled() => target,
            SocketAddr::V4(_) => target.through_v4(TUNNEL_SOURCES.0, 16, GUE_PORT),
            SocketAddr::V6(_) => target.through_v6(TUNNEL_SOURCES.1, GUE_PORT),
        };
        self.desired.targets.insert(number, target);
        number
    }

    /// A target stops serving.
    pub fn fail(&mut self, number: u32) {
        self.desired.targets.get_mut(&number).expect("a target").flags = 0;
    }

    /// A target only keeps the flows it has.
    pub fn drain(&mut self, number: u32) {
        self.desired.targets.get_mut(&number).expect("a target").flags = Target::SERVES;
    }

    /// A listener whose ring has these slots in turn, and the way back from their targets that are
    /// translated.
    pub fn listener(&mut self, number: u32, protocol: u8, at: &str, slots: &[Slot]) {
        self.listener_of(number, protocol, at, slots, OPEN, 0);
    }

    /// A listener of an admission class, with flags of [`Endpoint`].
    pub fn listener_of(
        &mut self,
        number: u32,
        protocol: u8,
        at: &str,
        slots: &[Slot],
        class: u32,
        flags: u8,
    ) {
        let at: SocketAddr = at.parse().expect("an address and a port");
        let (address, port) = (Address::from(at.ip()), Be16::new(at.port()));
        let ring = if slots.is_empty() { NO_RING } else { number };
        let idle = if protocol == TCP { TCP_IDLE } else { UDP_IDLE };
        let listener = Listener { address, port, protocol, idle, ..Listener::default() };
        self.desired.listeners.insert(number, listener);
        self.endpoint(Endpoint {
            address,
            port,
            protocol,
            kind: Endpoint::LISTENER | flags,
            listener: number,
            index: ring,
            class,
        });
        if slots.is_empty() {
            return;
        }
        let targets: BTreeSet<u32> =
            slots.iter().flat_map(|slot| [slot.current, slot.previous()]).collect();
        let size = OPTIONS.ring_size as usize;
        let slots = slots.iter().copied().cycle().take(size).collect();
        self.desired.rings.insert(ring, slots);
        for number_of_target in targets.into_iter().filter(|target| *target != 0) {
            self.way_back(number_of_target, protocol, number, 0);
        }
    }

    /// The way back from a target that is translated, unless it is there.
    fn way_back(&mut self, target: u32, protocol: u8, listener: u32, flags: u8) {
        let Target { address, port, mode, .. } = self.desired.targets[&target];
        let key = EndpointKey::new(address, port, protocol);
        if mode == Target::NAT && !self.desired.endpoints.contains_key(&key) {
            self.endpoint(Endpoint {
                address,
                port,
                protocol,
                kind: Endpoint::TARGET | flags,
                listener,
                index: target,
                class: 0,
            });
        }
    }

    /// A target is chosen by its connections, with this weight among those of a group.
    pub fn due(&mut self, target: u32, weight: u32, group: u32) {
        self.desired.shares.insert(target, Share { weight, group });
    }

    /// A target whose packets come from an address of the machine, with these ports of a pool.
    pub fn source(&mut self, target: u32, address: &str, pool: u32, (first, last): (u16, u16)) {
        let address = Address::from(ip(address));
        let entry = self.desired.targets.get_mut(&target).expect("a target");
        let sources = entry.sources();
        let index = target * MAX_SNAT_ADDRESSES + sources;
        entry.set_sources(sources + 1);
        let source = SnatSource { address, pool, first, last, zero: 0 };
        self.desired.sources.insert(index, source);
        self.desired.pools.insert(pool, 0);
        let known = self.desired.endpoints.get_mut(&EndpointKey::of_address(address));
        let endpoint = known.expect("an address of the machine");
        let is_first = endpoint.kind & Endpoint::SNAT == 0;
        let (first, last) = (u32::from(first), u32::from(last));
        endpoint.kind |= Endpoint::SNAT;
        endpoint.listener = if is_first { first } else { endpoint.listener.min(first) };
        endpoint.index = if is_first { last } else { endpoint.index.max(last) };
    }

    /// A listener with one target of mode [`Target::SNAT`] and the same number.
    pub fn snat_listener(&mut self, number: u32, protocol: u8, at: &str, target: &str) {
        self.target(number, Target::SNAT, target, Way::by(11));
        self.listener_of(number, protocol, at, &[Slot::settled(number)], OPEN, Endpoint::TRACKED);
    }

    /// Targets of [`Self::snat_listener`]s by protocol, with the addresses that they see.
    pub fn snat_targets(&self) -> Vec<(u8, SocketAddr, IpAddr)> {
        let listeners = self.desired.listeners.iter();
        listeners
            .filter_map(|(number, listener)| {
                let target = self.desired.targets.get(number)?;
                let source = self.desired.sources.get(&(number * MAX_SNAT_ADDRESSES))?;
                let at = SocketAddr::new(target.address.into(), target.port.get());
                Some((listener.protocol, at, source.address.into()))
            })
            .collect()
    }

    /// Marks a target as one that several listeners share.
    pub fn share(&mut self, target: u32, protocol: u8, first: u32) {
        let Target { address, port, .. } = self.desired.targets[&target];
        self.desired.endpoints.remove(&EndpointKey::new(address, port, protocol));
        self.way_back(target, protocol, first, Endpoint::SHARED);
    }

    /// Packets to a target's own address need the class, because it carries a security group.
    pub fn guard_target(&mut self, target: u32, protocol: u8, class: u32) {
        let Target { address, port, .. } = self.desired.targets[&target];
        let key = EndpointKey::new(address, port, protocol);
        let kind = Endpoint::GUARD;
        let guard = Endpoint { address, port, protocol, kind, ..Endpoint::default() };
        self.desired.endpoints.entry(key).or_insert(guard).class = class;
    }

    /// Echo requests to an address need the class.
    pub fn guard(&mut self, address: &str, class: u32) {
        let address = ip(address);
        let protocol = if address.is_ipv4() { ICMP } else { ICMPV6 };
        let kind = Endpoint::GUARD;
        self.endpoint(Endpoint {
            address: address.into(),
            protocol,
            kind,
            class,
            ..Endpoint::default()
        });
    }

    /// Prefixes of an admission class; lengths as they are written for the family.
    pub fn class(&mut self, number: u32, prefixes: &[(&str, u8)]) {
        let prefixes = prefixes.iter().map(|(address, bits)| {
            let address = ip(address);
            let mapped = if address.is_ipv4() { 96 } else { 0 };
            Prefix { address: address.into(), bits: bits + mapped }
        });
        self.desired.classes.insert(number, Arc::new(prefixes.collect()));
    }

    fn endpoint(&mut self, endpoint: Endpoint) {
        self.desired.endpoints.insert(endpoint.key(), endpoint);
    }

    /// A listener whose connections end in the proxy. Later fragments to its address need its class.
    pub fn proxied_listener(&mut self, number: u32, at: &str, class: u32) {
        let at: SocketAddr = at.parse().expect("an address and a port");
        let (address, port) = (Address::from(at.ip()), Be16::new(at.port()));
        let listener = Listener { address, port, protocol: TCP, ..Listener::default() };
        self.desired.listeners.insert(number, listener);
        self.endpoint(Endpoint {
            address,
            port,
            protocol: TCP,
            kind: Endpoint::PROXIED,
            listener: number,
            index: 0,
            class,
        });
        let own = self.desired.endpoints.get_mut(&EndpointKey::of_address(address));
        let own = own.expect("an address of the machine");
        own.kind |= Endpoint::REASSEMBLED;
        own.class = class;
    }

    /// Listeners, by protocol and address.
    pub fn listeners(&self) -> Vec<(u8, SocketAddr)> {
        [self.of_kind(Endpoint::LISTENER), self.of_kind(Endpoint::PROXIED)].concat()
    }

    /// Targets whose replies are translated, by protocol and address.
    pub fn ways_back(&self) -> Vec<(u8, SocketAddr)> {
        self.of_kind(Endpoint::TARGET)
    }

    fn of_kind(&self, kind: u8) -> Vec<(u8, SocketAddr)> {
        let wanted = self.desired.endpoints.values().filter(|endpoint| endpoint.kind() == kind);
        wanted
            .map(|endpoint| {
                (endpoint.protocol, (IpAddr::from(endpoint.address), endpoint.port.get()).into())
            })
            .collect()
    }
}

fn ip(address: &str) -> IpAddr {
    address.parse().expect("an address")
}

/// The class that admits 192.0.10.0/24, 192.0.11.7 and 2001:db8:10::/64.
pub const CLASS: u32 = 7;

/// Both protocols that are balanced.
pub const PROTOCOLS: [u8; 2] = [TCP, UDP];

/// The balancer's addresses in [`Scene::everything`].
pub const VIPS: [&str; 2] = ["10.0.10.100", "fd00:10::100"];

/// The addresses of its listeners whose connections end in the proxy.
pub const PROXY_VIPS: [&str; 4] = ["10.0.10.110", "fd00:10::110", "10.0.10.111", "fd00:10::111"];

impl Scene {
    /// Every kind of listener and target that there is. A listener's target has its number.
    pub fn everything() -> Self {
        let mut scene = Self::new();
        for vip in VIPS {
            scene.address(vip, Endpoint::OWNED);
            scene.guard(vip, CLASS);
        }
        scene.class(CLASS, &[("192.0.10.0", 24), ("192.0.11.7", 32), ("2001:db8:10::", 64)]);
        scene.settled_listeners();
        scene.listeners_without_a_way();
        scene.unsettled_listeners();
        scene.tracked_listeners();
        scene.overflowing_listeners();
        scene.tunnel_listeners();
        scene.sticky_listeners();
        scene.least_connections_listeners();
        scene.snat_listeners();
        scene.proxied_listeners();
        scene
    }

    /// Listeners 120 and 121 at an address without a group, 122 and 123 at one with; both addresses are
    /// theirs alone.
    fn proxied_listeners(&mut self) {
        for (n, address, port, class) in [
            (120, PROXY_VIPS[0], 443, OPEN),
            (121, PROXY_VIPS[1], 443, OPEN),
            (122, PROXY_VIPS[2], 80, CLASS),
            (123, PROXY_VIPS[3], 80, CLASS),
        ] {
            self.address(address, Endpoint::OWNED);
            self.proxied_listener(n, &SocketAddr::new(ip(address), port).to_string(), class);
        }
    }

    /// Listeners 36 to 39 rewrite both ends; 36 and 38 have few ports.
    fn snat_listeners(&mut self) {
        for (n, protocol, at, target, source, ports) in [
            (36, TCP, "10.0.10.100:118", "10.0.11.245:8080", "10.0.11.2", (20_000, 20_063)),
            (37, UDP, "10.0.10.100:118", "10.0.11.246:5353", "10.0.11.2", (20_000, 20_999)),
            (38, TCP, "[fd00:10::100]:118", "[fd00:11::47]:8080", "fd00:11::2", (20_000, 20_003)),
            (39, UDP, "[fd00:10::100]:118", "[fd00:11::48]:5353", "fd00:11::2", (20_000, 20_999)),
        ] {
            self.snat_listener(n, protocol, at, target);
            self.source(n, source, n - 36, ports);
        }
    }

    fn settled_listeners(&mut self) {
        let by11 = Way::by(11);
        let nat = |s: &mut Self, n, protocol, at, target, way| {
            s.target(n, Target::NAT, target, way);
            s.listener(n, protocol, at, &[Slot::settled(n)]);
        };
        nat(self, 1, TCP, "10.0.10.100:80", "10.0.11.21:8080", by11);
        nat(self, 2, UDP, "10.0.10.100:53", "10.0.11.22:5353", by11);
        nat(self, 3, TCP, "[fd00:10::100]:80", "[fd00:11::23]:8080", by11);
        nat(self, 4, UDP, "[fd00:10::100]:53", "[fd00:11::24]:5353", by11);
        for (n, at, target) in
            [(5, "10.0.10.100:81", "10.0.11.25:81"), (6, "[fd00:10::100]:81", "[fd00:11::26]:81")]
        {
            self.target(n, Target::DSR_L2, target, by11);
            self.listener(n, TCP, at, &[Slot::settled(n)]);
        }
        nat(self, 7, TCP, "10.0.10.100:82", "10.0.10.27:8080", Way::by(10));
        nat(self, 8, TCP, "10.0.10.100:83", "10.0.11.28:8080", Way { vlan: 200, ..by11 });
        for (n, at, target) in [
            (9, "10.0.10.100:84", "10.0.11.29:8080"),
            (19, "[fd00:10::100]:84", "[fd00:11::39]:8080"),
        ] {
            self.target(n, Target::NAT, target, by11);
            self.listener_of(n, TCP, at, &[Slot::settled(n)], CLASS, 0);
        }
    }

    fn listeners_without_a_way(&mut self) {
        for (n, vip) in [(10, VIPS[0]), (12, "[fd00:10::100]")] {
            self.listener(n, TCP, &format!("{vip}:85"), &[]);
            self.listener(n + 1, UDP, &format!("{vip}:85"), &[]);
        }
        for (n, protocol, at, target, way) in [
            (14, TCP, "10.0.10.100:86", "10.0.11.34:8080", Way::by(0)),
            (15, TCP, "10.0.10.100:87", "10.0.11.35:8080", Way { mtu: 1000, ..Way::by(11) }),
            (16, TCP, "10.0.10.100:88", "10.0.11.36:8080", Way::by(11)),
            (17, UDP, "[fd00:10::100]:88", "[fd00:11::37]:8080", Way::by(11)),
            (18, TCP, "10.0.10.100:89", "10.0.13.38:8080", Way::by(13)),
        ] {
            self.target(n, Target::NAT, target, way);
            self.listener(n, protocol, at, &[Slot::settled(n)]);
        }
        self.fail(16);
        self.fail(17);
    }

    fn unsettled_listeners(&mut self) {
        use lb_common::tables::SlotState::{Learning, LearningTcp, Pinned};
        for (n, protocol, at, state) in [
            (20, TCP, "10.0.10.100:90", Learning),
            (22, UDP, "10.0.10.100:90", Learning),
            (24, UDP, "10.0.10.100:91", LearningTcp),
            (26, TCP, "10.0.10.100:91", LearningTcp),
            (28, TCP, "10.0.10.100:92", Pinned),
            (32, UDP, "10.0.10.100:92", Pinned),
        ] {
            for target in [n, n + 1] {
                let at = format!("10.0.11.{}:8080", 40 + target);
                self.target(target, Target::NAT, &at, Way::by(11));
            }
            self.listener(n, protocol, at, &[Slot::new(n, n + 1, state)]);
        }
    }

    /// Listeners 30, 31 and 33 share targets 40 and 41; 34 and 35 track theirs alone.
    fn tracked_listeners(&mut self) {
        for n in 40..44 {
            self.target(n, Target::NAT, &format!("10.0.11.{}:8080", 100 + n), Way::by(11));
        }
        self.target(44, Target::NAT, "[fd00:11::44]:8080", Way::by(11));
        let slots =
            |targets: &[u32]| targets.iter().copied().map(Slot::settled).collect::<Vec<_>>();
        for (n, protocol, at, targets) in [
            (30, TCP, "10.0.10.100:93", slots(&[40])),
            (31, TCP, "10.0.10.100:94", slots(&[40, 41])),
            (33, TCP, "10.0.10.100:95", slots(&[40])),
            (34, UDP, "10.0.10.100:93", slots(&[42])),
            (35, TCP, "[fd00:10::100]:93", slots(&[44])),
        ] {
            self.listener_of(n, protocol, at, &targets, OPEN, Endpoint::TRACKED);
        }
        self.share(40, TCP, 30);
        self.share(41, TCP, NO_LISTENER);
    }

    /// Listeners 60 to 67: each family in each, by both kinds of tunnel, TCP and (with 20 more) UDP.
    /// Then ways of a special kind.
    fn tunnel_listeners(&mut self) {
        use lb_common::tables::SlotState::{Learning, Settled};
        let by11 = Way::by(11);
        let mut tunnel = |n: u32, protocol, vip: usize, mode, v6: bool, way, state| {
            let at = if v6 { format!("[fd00:11::{n:x}]:80") } else { format!("10.0.11.{n}:80") };
            self.target(n, mode, &at, way);
            let vip = SocketAddr::new(ip(VIPS[vip]), 40 + n as u16);
            self.listener(n, protocol, &vip.to_string(), &[Slot::new(n, 0, state)]);
        };
        for n in 60..68 {
            let mode = if n % 2 == 0 { Target::DSR_IPIP } else { Target::DSR_GUE };
            let (vip, is_v6) = ((n as usize - 60) / 4, n % 4 >= 2);
            tunnel(n, TCP, vip, mode, is_v6, by11, Settled);
            tunnel(n + 20, UDP, vip, mode, is_v6, by11, Settled);
        }
        tunnel(70, TCP, 0, Target::DSR_IPIP, false, Way { vlan: 200, ..by11 }, Settled);
        tunnel(71, TCP, 1, Target::DSR_GUE, true, Way { vlan: 200, ..by11 }, Settled);
        tunnel(72, TCP, 0, Target::DSR_GUE, true, Way::by(10), Settled);
        tunnel(73, TCP, 0, Target::DSR_IPIP, false, by11, Learning);
        tunnel(74, UDP, 1, Target::DSR_GUE, false, by11, Learning);
        tunnel(75, TCP, 0, Target::DSR_IPIP, true, Way::by(0), Settled);
    }

    /// Listeners 100 to 107 choose by the source address among targets 100 to 103, or 104 to 107 in
    /// IPv6:
    /// settled ones for TCP and UDP, one that learns, one that tracks.
    fn sticky_listeners(&mut self) {
        use lb_common::tables::SlotState::Learning;
        for n in 100..104 {
            self.target(n, Target::NAT, &format!("10.0.11.{}:8080", 120 + n), Way::by(11));
            self.target(n + 4, Target::NAT, &format!("[fd00:11::{n}]:8080"), Way::by(11));
        }
        for (first, vip) in [(100, VIPS[0]), (104, "[fd00:10::100]")] {
            let settled: Vec<_> = (first..first + 4).map(Slot::settled).collect();
            let learning = [Slot::new(first, first + 1, Learning)];
            for (n, protocol, port, slots, flags) in [
                (first, TCP, 96, &settled[..], 0),
                (first + 1, UDP, 96, &settled[..], 0),
                (first + 2, TCP, 97, &learning[..], 0),
                (first + 3, TCP, 98, &settled[..], Endpoint::TRACKED),
            ] {
                let at = format!("{vip}:{port}");
                self.listener_of(n, protocol, &at, slots, OPEN, Endpoint::BY_SOURCE | flags);
            }
        }
    }

    /// Listeners that choose by connections: 110 for TCP and 111 for UDP, between targets 110 and 111
    /// of equal weight; 112 and 113 in IPv6, between 112 and 113. 114 has two groups, 114 with
    /// three times 115's weight, and 116 by the hash alone.
    fn least_connections_listeners(&mut self) {
        for n in [110, 111, 114, 115, 116] {
            self.target(n, Target::NAT, &format!("10.0.11.{}:8080", 120 + n), Way::by(11));
        }
        for n in [112, 113] {
            self.target(n, Target::NAT, &format!("[fd00:11::{n}]:8080"), Way::by(11));
        }
        for (target, weight, group) in
            [(110, 1, 1), (111, 1, 1), (112, 1, 1), (113, 1, 1), (114, 3, 2), (115, 1, 2)]
        {
            self.due(target, weight, group);
        }
        for (n, protocol, vip, targets) in [
            (110, TCP, "10.0.10.100:130", &[110, 111][..]),
            (111, UDP, "10.0.10.100:130", &[110, 111]),
            (112, TCP, "[fd00:10::100]:130", &[112, 113]),
            (113, UDP, "[fd00:10::100]:130", &[112, 113]),
            (114, TCP, "10.0.10.100:131", &[114, 114, 114, 115, 116]),
        ] {
            let slots: Vec<_> = targets.iter().copied().map(Slot::settled).collect();
            self.listener_of(n, protocol, vip, &slots, OPEN, Endpoint::TRACKED);
        }
    }

    /// Listeners 50 to 53, more than fit into the one bucket that they belong in.
    fn overflowing_listeners(&mut self) {
        let keys = HashKeys::from_seed(OPTIONS.hash_seed);
        let bucket =
            |port| EndpointKey::new(ip(VIPS[0]).into(), Be16::new(port), TCP).bucket(&keys);
        let taken = |scene: &Self, bucket| {
            scene.desired.endpoints.keys().any(|key| key.bucket(&keys) == bucket)
        };
        let first = (10_000..).find(|port| !taken(self, bucket(*port))).expect("a free bucket");
        let ports = (first..=u16::MAX).filter(|port| bucket(*port) == bucket(first));
        for (n, port) in (50..).zip(ports.take(4)) {
            self.target(n, Target::NAT, &format!("10.0.11.{}:8080", 150 + n), Way::by(11));
            self.listener(n, TCP, &format!("{}:{port}", VIPS[0]), &[Slot::settled(n)]);
        }
    }
}
