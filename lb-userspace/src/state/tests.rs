mod application;
mod proxied;
mod selection;

use std::time::Duration;

use lb_common::tables::{NO_LISTENER, Slot, SlotState, Target};
use lb_common::wire::{Address, Be16};

use super::*;
use crate::config::parse;
use crate::netlink::{Interface, LinkLayer, NextHop, Unresolved};

const CONFIG: &str = r#"
[target_group.web]
port = 8080
targets = ["10.0.2.11", "10.0.2.12", { address = "10.0.2.13", weight = 0 }]
[target_group.api]
port = 9090
targets = ["10.0.2.11", "10.0.2.12"]
[target_group.spare]
targets = ["10.0.2.19"]

[security_group.web]
ingress = [
  { protocol = "tcp", ports = "80", sources = ["10.0.0.0/8"] },
  { protocol = "icmp", sources = ["0.0.0.0/0"] },
]

[load_balancer.web]
addresses = ["10.0.1.100"]
security_groups = ["web"]
listener = [
  { protocol = "tcp", port = 80, target_group = "web" },
  { protocol = "tcp", port = 90, target_group = "api" },
]
"#;

struct World {
    state: State,
    now: Instant,
}

impl World {
    fn new(config: &str) -> Self {
        let mut world = Self { state: State::new(251), now: Instant::now() };
        let nic = Interface {
            index: 2,
            name: "eth0".into(),
            layer: LinkLayer::Ethernet,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            up: true,
            vlan: None,
            controller: None,
            lower: None,
            xdp: None,
        };
        let hop = |ifindex| NextHop {
            ifindex,
            vlan: None,
            source_mac: nic.mac,
            destination_mac: [2, 0, 0, 0, 0, 2],
            mtu: 1500,
            source: Some([10, 0, 2, 1].into()),
        };
        let next_hops = (11..20).map(|n| (IpAddr::from([10, 0, 2, n]), Ok(hop(2)))).collect();
        let network = Network { interfaces: [(2, nic)].into(), next_hops, ..Network::default() };
        world.state.set_network(Arc::new(network));
        world.state.set_attached([2].into());
        world.configure(config);
        world
    }

    fn configure(&mut self, config: &str) {
        let config = parse("lb.toml", config).map(|parsed| parsed.config).expect("a right file");
        self.state.set_config(config, self.now);
    }

    fn check(&mut self, group: &str, last: u8, state: HealthState) {
        let port = if group == "api" { 9090 } else { 8080 };
        let key = CheckKey { target_group: group.into(), address: [10, 0, 2, last].into(), port };
        let health = Health { state, reason: None, description: None };
        self.state.set_health(HealthEvent { key, health }, self.now);
    }

    fn check_all(&mut self, state: HealthState) {
        for last in [11, 12, 13] {
            self.check("web", last, state);
            self.check("api", last, state);
        }
    }

    fn desired(&mut self) -> Desired {
        self.state.desired(self.now)
    }

    /// Targets' last octets by the slots of a listener's ring.
    fn shares(&self, desired: &Desired, port: u16) -> BTreeMap<u8, usize> {
        let mut shares = BTreeMap::new();
        for slot in desired.rings[&listener(desired, port).expect("a listener").index].iter() {
            let octets = desired.targets[&slot.current].address.octets();
            *shares.entry(octets[15]).or_default() += 1;
        }
        shares
    }
}

/// Listeners of both families share targets of both families; the way is shorter by the headers.
#[test]
fn tunnels_lead_to_targets_of_either_family() {
    let mut world = World::new(
        r#"
        [agent]
        tunnel_sources = ["172.20.0.0/16", "2001:db8:7::/64"]
        [target_group.web]
        port = 80
        forwarding = "dsr_gue"
        gue_port = 6666
        targets = ["10.0.2.11", "fd00::11"]
        [load_balancer.web]
        addresses = ["10.0.1.100", "fd00::100"]
        listener = [{ port = 80, target_group = "web" }]
        "#,
    );
    let mut network = (**world.state.network()).clone();
    let hop = network.next_hops[&IpAddr::from([10, 0, 2, 11])];
    let v6: IpAddr = "fd00::11".parse().unwrap();
    network.next_hops.insert(v6, hop);
    world.state.set_network(Arc::new(network));
    for address in [IpAddr::from([10, 0, 2, 11]), v6] {
        let key = CheckKey { target_group: "web".into(), address, port: 80 };
        let health = Health { state: HealthState::Healthy, reason: None, description: None };
        world.state.set_health(HealthEvent { key, health }, Instant::now());
    }
    let desired = world.desired();
    for vip in ["10.0.1.100", "fd00::100"] {
        let vip = Address::from(vip.parse::<IpAddr>().unwrap());
        let listener = desired.endpoints[&EndpointKey::new(vip, Be16::new(80), flow::TCP)];
        let mut targets: Vec<u32> =
            desired.rings[&listener.index].iter().map(|slot| slot.current).collect();
        targets.sort_unstable();
        targets.dedup();
        assert_eq!(targets.len(), 2, "{vip:?}");
        for (address, source, mtu) in
            [("10.0.2.11", "172.20.0.0", 1472), ("fd00::11", "2001:db8:7::", 1452)]
        {
            let address = address.parse::<IpAddr>().unwrap().into();
            let mut targets = targets.iter().map(|number| desired.targets[number]);
            let target = targets.find(|target| target.address == address).expect("in the ring");
            assert_eq!(target.mode, Target::DSR_GUE);
            assert!(target.serves());
            match source.parse().unwrap() {
                IpAddr::V4(v4) => {
                    let (fixed, varying, _) = target.tunnel.v4();
                    assert_eq!(fixed.to_ne_bytes(), v4.octets());
                    assert_eq!(varying.to_ne_bytes(), [0, 0, 255, 255]);
                }
                IpAddr::V6(v6) => {
                    assert_eq!(target.tunnel.v6(), Address::from(IpAddr::from(v6)).quarters());
                }
            }
            assert_eq!(target.port.get(), 6666);
            assert_eq!(target.hop.mtu, mtu);
        }
    }
    let replies = desired.endpoints.values().filter(|e| e.kind() == Endpoint::TARGET);
    assert_eq!(replies.count(), 0, "replies go straight to the client");
    assert_eq!(world.state.warnings, [""; 0]);

    let mut network = (**world.state.network()).clone();
    for hop in network.next_hops.values_mut().flatten() {
        hop.mtu = 1300;
    }
    world.state.set_network(Arc::new(network));
    world.desired();
    let warnings = &world.state.warnings;
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].contains("carries packets of 1272 bytes"), "{warnings:?}");
}

fn listener(desired: &Desired, port: u16) -> Option<Endpoint> {
    let address = IpAddr::from([10, 0, 1, 100]).into();
    desired.endpoints.get(&EndpointKey::new(address, Be16::new(port), flow::TCP)).copied()
}

fn target(desired: &Desired, last: u8, port: u16) -> Option<Target> {
    let address = Address::from(IpAddr::from([10, 0, 2, last]));
    let is_it = |target: &&Target| target.address == address && target.port.get() == port;
    desired.targets.values().find(is_it).copied()
}

#[test]
fn a_listener_waits_for_the_first_checks_of_its_own_targets_only() {
    let mut world = World::new(CONFIG);
    assert_eq!(listener(&world.desired(), 80), None);
    world.check("web", 11, HealthState::Healthy);
    world.check("web", 12, HealthState::Healthy);
    assert_eq!(listener(&world.desired(), 80), None);
    world.check("web", 13, HealthState::Initial);
    let desired = world.desired();
    assert!(listener(&desired, 80).is_some());
    assert_eq!(listener(&desired, 90), None);
    assert!(!world.state.is_ready());
    world.check_all(HealthState::Healthy);
    assert!(world.state.is_ready());
}

#[test]
fn healthy_targets_of_a_weight_take_new_flows_and_all_do_when_none_is_healthy() {
    let mut world = World::new(CONFIG);
    world.check_all(HealthState::Healthy);
    let desired = world.desired();
    assert_eq!(world.shares(&desired, 80).keys().collect::<Vec<_>>(), [&11, &12]);
    assert!(target(&desired, 13, 8080).expect("weight 0").serves());

    world.check("web", 11, HealthState::Unhealthy);
    let desired = world.desired();
    assert_eq!(world.shares(&desired, 80), [(12, 251)].into());
    assert!(!target(&desired, 11, 8080).expect("unhealthy").serves());
    assert!(target(&desired, 11, 9090).expect("of the other group").serves());

    world.check("web", 12, HealthState::Unhealthy);
    world.check("web", 13, HealthState::Unhealthy);
    let desired = world.desired();
    assert_eq!(world.shares(&desired, 80).keys().collect::<Vec<_>>(), [&11, &12]);
    assert!(target(&desired, 11, 8080).expect("fails open").serves());
}

#[test]
fn termination_switched_off_leaves_an_unhealthy_target_its_flows() {
    let config =
        CONFIG.replacen("port = 8080", "port = 8080\nunhealthy_connection_termination = false", 1);
    let mut world = World::new(&config);
    world.check_all(HealthState::Healthy);
    world.check("web", 11, HealthState::Unhealthy);
    let desired = world.desired();
    assert_eq!(world.shares(&desired, 80), [(12, 251)].into());
    assert!(target(&desired, 11, 8080).expect("unhealthy").serves());
}

#[test]
fn a_ring_that_is_shown_is_never_written_over() {
    let mut world = World::new(CONFIG);
    world.check_all(HealthState::Healthy);
    let before = world.desired();
    for group in ["web", "api"] {
        world.check(group, 11, HealthState::Unhealthy);
    }
    let after = world.desired();
    let shown: BTreeSet<u32> = [80, 90].map(|port| listener(&before, port).unwrap().index).into();
    let next: BTreeSet<u32> = [80, 90].map(|port| listener(&after, port).unwrap().index).into();
    assert_eq!(shown.len() + next.len(), 4);
    assert!(shown.is_disjoint(&next), "{shown:?} {next:?}");
}

#[test]
fn a_changed_slot_learns_with_its_previous_target() {
    let mut world = World::new(CONFIG);
    world.check_all(HealthState::Healthy);
    let before = world.desired();
    world.check("web", 11, HealthState::Unhealthy);
    let after = world.desired();
    let old = &before.rings[&listener(&before, 80).unwrap().index];
    let new = &after.rings[&listener(&after, 80).unwrap().index];
    for (old, new) in old.iter().zip(new.iter()) {
        let kept = old.current == new.current;
        let learning = Slot::new(new.current, old.current, SlotState::Learning);
        assert_eq!(*new, if kept { *old } else { learning });
    }
}

#[test]
fn a_removed_target_drains_for_its_delay() {
    let mut world = World::new(CONFIG);
    world.check_all(HealthState::Healthy);
    world.desired();
    let fewer = CONFIG.replacen("\"10.0.2.11\", ", "", 1);
    world.configure(&fewer);
    let desired = world.desired();
    assert_eq!(world.shares(&desired, 80), [(12, 251)].into());
    assert!(target(&desired, 11, 8080).expect("draining").serves());
    let key = CheckKey { target_group: "web".into(), address: [10, 0, 2, 11].into(), port: 8080 };
    assert_eq!(world.state.health_of(&key).state, HealthState::Draining);
    assert!(!world.state.checks().contains_key(&key));

    world.now += Duration::from_secs(300);
    assert!(world.state.tick(world.now));
    assert_eq!(target(&world.desired(), 11, 8080), None);
}

#[test]
fn a_target_of_two_listeners_has_its_flows_tracked() {
    let config = CONFIG
        .replace("addresses = [\"10.0.1.100\"]", "addresses = [\"10.0.1.100\", \"10.0.1.101\"]");
    let mut world = World::new(CONFIG);
    world.check_all(HealthState::Healthy);
    let alone = world.desired();
    let way = EndpointKey::new(IpAddr::from([10, 0, 2, 11]).into(), Be16::new(8080), flow::TCP);
    let owner = listener(&alone, 80).unwrap();
    assert_eq!(owner.kind, Endpoint::LISTENER);
    assert_eq!(alone.endpoints[&way].kind, Endpoint::TARGET);
    assert_eq!(alone.endpoints[&way].listener, owner.listener);

    world.configure(&config);
    let shared = world.desired();
    assert_eq!(listener(&shared, 80).unwrap().kind, Endpoint::LISTENER | Endpoint::TRACKED);
    assert_eq!(shared.endpoints[&way].kind, Endpoint::TARGET | Endpoint::SHARED);
    assert_eq!(
        shared.endpoints[&way].listener, owner.listener,
        "older flows are the first owner's"
    );

    let mut fresh = World::new(&config);
    fresh.check_all(HealthState::Healthy);
    assert_eq!(fresh.desired().endpoints[&way].listener, NO_LISTENER);
}

#[test]
fn security_groups_guard_listeners_and_echo() {
    let mut world = World::new(CONFIG);
    world.check_all(HealthState::Healthy);
    let desired = world.desired();
    let web = listener(&desired, 80).unwrap().class;
    let api = listener(&desired, 90).unwrap().class;
    assert_eq!(desired.classes[&web].len(), 1);
    assert!(desired.classes[&api].is_empty(), "no rule for its port: nobody");
    let echo = EndpointKey::new(IpAddr::from([10, 0, 1, 100]).into(), Be16::new(0), flow::ICMP);
    assert_eq!(desired.endpoints[&echo].class, OPEN);

    world.configure(&CONFIG.replace("10.0.0.0/8", "10.0.0.0/9"));
    let narrowed = world.desired();
    assert_ne!(
        listener(&narrowed, 80).unwrap().class,
        web,
        "another class, complete before it is shown"
    );
    assert_eq!(listener(&narrowed, 90).unwrap().class, api);
}

#[test]
fn a_target_behind_another_nic_is_reported_with_the_remedy() {
    let mut world = World::new(CONFIG);
    world.state.set_attached([7].into());
    world.check_all(HealthState::Healthy);
    let desired = world.desired();
    assert_eq!(target(&desired, 11, 8080).unwrap().hop.ifindex, 0);
    let warning =
        world.state.warnings.iter().find(|w| w.contains("10.0.2.11:8080")).expect("a warning");
    assert!(warning.ends_with("add --iface eth0"), "{warning}");
}

#[test]
fn a_group_without_a_listener_is_unused_and_not_checked() {
    let world = World::new(CONFIG);
    let key = CheckKey { target_group: "spare".into(), address: [10, 0, 2, 19].into(), port: 8080 };
    assert_eq!(world.state.health_of(&key).state, HealthState::Unused);
    assert!(!world.state.checks().contains_key(&key));
}

#[test]
fn a_first_ring_waits_for_the_way_to_healthy_targets() {
    let mut world = World::new(CONFIG);
    let known = Arc::clone(world.state.network());
    let mut unknown = Network::clone(&known);
    unknown.next_hops.remove(&IpAddr::from([10, 0, 2, 12]));
    world.state.set_network(Arc::new(unknown.clone()));
    world.check_all(HealthState::Healthy);
    assert_eq!(listener(&world.desired(), 80), None);
    assert!(!world.state.is_ready());

    world.state.set_network(known);
    let desired = world.desired();
    assert_eq!(world.shares(&desired, 80).keys().collect::<Vec<_>>(), [&11, &12]);
    assert!(world.state.is_ready());

    // A neighbour that falls silent keeps its slots until its checks say more.
    world.state.set_network(Arc::new(unknown));
    let desired = world.desired();
    assert_eq!(world.shares(&desired, 80).keys().collect::<Vec<_>>(), [&11, &12]);
}

const SNAT: &str = r#"
[target_group.web]
port = 8080
forwarding = "snat"
targets = ["10.0.2.11", "10.0.2.12"]
[target_group.same]
port = 8080
forwarding = "snat"
snat_ports = "20000-20999"
targets = ["10.0.2.11"]

[load_balancer.web]
addresses = ["10.0.1.100"]
listener = [
  { protocol = "tcp", port = 80, target_group = "web" },
  { protocol = "tcp", port = 90, target_group = "same" },
]
"#;

fn own_address(desired: &Desired) -> Option<Endpoint> {
    let address = IpAddr::from([10, 0, 2, 1]).into();
    desired.endpoints.get(&EndpointKey::of_address(address)).copied()
}

#[test]
fn targets_of_snat_get_sources_and_share_pools() {
    let mut world = World::new(SNAT);
    world.check_all(HealthState::Healthy);
    world.check("same", 11, HealthState::Healthy);
    let desired = world.desired();
    assert_eq!(desired.sources.len(), 3);
    let pools: BTreeSet<u32> = desired.sources.values().map(|source| source.pool).collect();
    assert_eq!(pools.len(), 2, "one target by two groups has one set of ports");
    assert_eq!(pools, desired.pools.keys().copied().collect());
    for listening in [80, 90] {
        assert!(listener(&desired, listening).unwrap().kind & Endpoint::TRACKED != 0);
    }
    let own = own_address(&desired).unwrap();
    assert_eq!((own.kind, own.listener), (Endpoint::LOCAL | Endpoint::SNAT, 10_000));
    assert_eq!(own.index, 59_999);
    assert_eq!(target(&desired, 11, 8080).unwrap().sources(), 1);
}

/// Flows outlive what gave them their ports.
#[test]
fn a_pool_stays_until_its_flows_are_over() {
    let mut world = World::new(SNAT);
    world.check_all(HealthState::Healthy);
    let pools = world.desired().pools;
    world.configure("");
    let desired = world.desired();
    assert_eq!(desired.pools, pools);
    assert!(own_address(&desired).is_some_and(|own| own.kind & Endpoint::SNAT != 0));
    let in_use: BTreeSet<u32> = pools.keys().copied().take(1).collect();
    assert!(!world.state.release_pools(&in_use), "that walk may be older than the change");
    assert!(world.state.release_pools(&in_use));
    assert!(world.desired().pools.keys().eq(in_use.iter()));
    assert!(!world.state.release_pools(&BTreeSet::new()));
    assert!(world.state.release_pools(&BTreeSet::new()));
    assert_eq!(own_address(&world.desired()), None);
    assert!(!world.state.has_pools());
}

/// What a group's ports were before, and what another group's are, is looked up as well.
#[test]
fn ranges_of_one_pool_live_side_by_side() {
    let ranges = |world: &World| {
        let mut ports = world.state.snat_ports();
        ports.sort_by_key(|range| *range.start());
        ports.dedup();
        ports
    };
    let with_ports = |ports: &str| SNAT.replacen("forwarding = \"snat\"", ports, 1);
    let mut world = World::new(&with_ports("forwarding = \"snat\"\nsnat_ports = \"2000-2999\""));
    world.check_all(HealthState::Healthy);
    world.check("same", 11, HealthState::Healthy);
    let own = own_address(&world.desired()).unwrap();
    assert_eq!((own.listener, own.index), (2000, 20_999));
    assert_eq!(ranges(&world), [2000..=2999, 20_000..=20_999]);

    let in_use: BTreeSet<u32> = world.desired().pools.keys().copied().collect();
    world.configure(&with_ports("forwarding = \"snat\"\nsnat_ports = \"4000-4999\""));
    let own = own_address(&world.desired()).unwrap();
    assert_eq!((own.listener, own.index), (2000, 20_999), "flows go on");
    for _ in 0..3 {
        assert!(!world.state.release_pools(&in_use));
    }
    assert_eq!(ranges(&world), [2000..=2999, 4000..=4999, 20_000..=20_999]);
    assert!(!world.state.release_pools(&BTreeSet::new()));
    assert!(world.state.release_pools(&BTreeSet::new()), "when they are over");
    assert_eq!(ranges(&world), [4000..=4999, 20_000..=20_999]);
    assert_eq!(own_address(&world.desired()).unwrap().listener, 4000);
}

/// Takes the way to 10.0.2.12 away.
fn without_way(world: &mut World, why: Unresolved) {
    let mut network = Network::clone(world.state.network());
    network.next_hops.insert([10, 0, 2, 12].into(), Err(why));
    world.state.set_network(Arc::new(network));
}

#[test]
fn who_cannot_be_reached_gets_no_slots_from_the_start_on() {
    for why in [Unresolved::Local, Unresolved::NoRoute, Unresolved::LinkDown { ifindex: 2 }] {
        let mut world = World::new(CONFIG);
        without_way(&mut world, why);
        world.check_all(HealthState::Healthy);
        let desired = world.desired();
        assert_eq!(world.shares(&desired, 80), [(11, 251)].into(), "{why:?}");
        assert!(world.state.is_ready());
        assert_eq!(world.state.alerts().len(), 2, "of both groups: {:?}", world.state.alerts());
        assert!(world.state.alerts()[0].starts_with("target 10.0.2.12:9090 of api: "));

        // The same when the way goes while it has slots.
        let mut world = World::new(CONFIG);
        world.check_all(HealthState::Healthy);
        let desired = world.desired();
        assert_eq!(world.shares(&desired, 80).len(), 2);
        assert!(world.state.alerts().is_empty());
        without_way(&mut world, why);
        let desired = world.desired();
        assert_eq!(world.shares(&desired, 80), [(11, 251)].into(), "{why:?}");
    }
}

#[test]
fn who_is_behind_another_nic_gets_no_slots_unless_nobody_else_is_there() {
    let mut world = World::new(CONFIG);
    let mut network = Network::clone(world.state.network());
    let elsewhere =
        NextHop { ifindex: 3, ..network.next_hops[&IpAddr::from([10, 0, 2, 11])].unwrap() };
    network.next_hops.insert([10, 0, 2, 12].into(), Ok(elsewhere));
    world.state.set_network(Arc::new(network));
    world.check_all(HealthState::Healthy);
    let desired = world.desired();
    assert_eq!(world.shares(&desired, 80), [(11, 251)].into());

    world.check("web", 11, HealthState::Unhealthy);
    let desired = world.desired();
    assert_eq!(world.shares(&desired, 80), [(12, 251)].into());
}

#[test]
fn as_many_listeners_as_check_allows_and_all_of_them_replaced() {
    let listeners = |first: usize| {
        let ports = (first..first + config::MAX_ENDPOINTS).map(|port| {
            format!("[[load_balancer.web.listener]]\nport = {port}\ntarget_group = \"web\"\n")
        });
        "[target_group.web]\nport = 80\n[load_balancer.web]\naddresses = [\"10.0.1.100\"]\n"
            .to_owned()
            + &ports.collect::<String>()
    };
    let mut world = World::new(&listeners(1));
    let all_forward = |world: &mut World, first: usize| {
        let desired = world.desired();
        let is_there = |port: &usize| listener(&desired, *port as u16).is_some();
        (first..first + config::MAX_ENDPOINTS).filter(is_there).count()
    };
    assert_eq!(all_forward(&mut world, 1), config::MAX_ENDPOINTS);
    for round in 1..3 {
        let first = 1 + round * config::MAX_ENDPOINTS;
        world.configure(&listeners(first));
        assert_eq!(all_forward(&mut world, first), config::MAX_ENDPOINTS);
        assert!(world.state.alerts().is_empty());
    }

    // What is too much is said, and follows by itself.
    let first = 1 + 3 * config::MAX_ENDPOINTS;
    world.configure(&listeners(first));
    assert_eq!(all_forward(&mut world, first), config::MAX_ENDPOINTS - 1);
    let alert = &world.state.alerts()[0];
    assert!(alert.starts_with("1 listeners are left out"), "{alert}");
    assert!(alert.ends_with("10.0.1.100 port 16384 tcp"), "{alert}");
    assert!(!world.state.tick(world.now));
    world.now += world.state.listeners.quarantine();
    assert!(world.state.tick(world.now));
    assert_eq!(all_forward(&mut world, first), config::MAX_ENDPOINTS);
    assert!(world.state.alerts().is_empty());
}
