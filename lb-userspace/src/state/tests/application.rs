//! What the state says to the kernel, the proxy and the name server of application load balancers.

use lb_common::tables::OPEN;

use super::*;
use crate::proxy::routes::{FULL_SHARE, GroupRoute, TargetState};

const SITE: &str = r#"
[agent]
availability_zone = "c"
[security_group.site]
ingress = [
  { protocol = "tcp", ports = "80", sources = ["10.0.0.0/8"] },
  { protocol = "tcp", ports = "443", sources = ["192.168.0.0/16"] },
]
[target_group.web]
protocol = "http"
port = 8080
targets = [
  { address = "10.0.2.11", availability_zone = "a" },
  { address = "10.0.2.12", availability_zone = "b", weight = 3 },
]
[target_group.api]
protocol = "http"
port = 9090
targets = [{ address = "10.0.2.11", availability_zone = "a" }]
[target_group.spare]
protocol = "http"
port = 9091
targets = ["10.0.2.13"]
[load_balancer.site]
type = "application"
scheme = "internal"
security_groups = ["site"]
addresses = [
  { address = "10.0.1.100", availability_zone = "a" },
  { address = "10.0.1.101", availability_zone = "b" },
  "10.0.1.102",
]
[[load_balancer.site.listener]]
protocol = "http"
port = 80
target_group = "web"
[[load_balancer.site.listener.rule]]
priority = 1
path_pattern = ["/api/*"]
target_group = "api"
[[load_balancer.site.listener]]
protocol = "http"
port = 443
redirect = { port = "80", status = 301 }
"#;

const ADDRESSES: [&str; 3] = ["10.0.1.100", "10.0.1.101", "10.0.1.102"];

impl World {
    fn group(&self, name: &str) -> GroupRoute {
        self.state.routes([0; 32]).groups[name].clone()
    }

    /// States of a group's targets by the last octet.
    fn states(&self, name: &str) -> BTreeMap<u8, TargetState> {
        let last = |address: SocketAddr| match address.ip() {
            IpAddr::V4(address) => address.octets()[3],
            IpAddr::V6(_) => panic!("IPv4 only"),
        };
        let targets = self.group(name).targets.into_iter();
        targets.map(|target| (last(target.address), target.state)).collect()
    }

    fn answered(&self) -> Vec<String> {
        let names = self.state.names();
        assert_eq!(names.len(), 1);
        let (label, addresses) = names.into_iter().next().unwrap();
        assert!(label.starts_with("internal-site-"), "{label}");
        addresses.iter().map(ToString::to_string).collect()
    }
}

#[test]
fn packets_are_admitted_and_passed() {
    let mut world = World::new(SITE);
    world.state.set_owned(ADDRESSES.map(|it| it.parse().unwrap()).into());
    let desired = world.desired();
    let find = |port| {
        desired.endpoints
            [&EndpointKey::new(Address::from(IpAddr::from([10, 0, 1, 100])), Be16::new(port), 6)]
    };
    let (http, https) = (find(80), find(443));
    assert_eq!((http.kind(), https.kind()), (Endpoint::PROXIED, Endpoint::PROXIED));
    assert!(http.class != OPEN && https.class != OPEN && http.class != https.class);
    assert_ne!(http.listener, https.listener);
    assert!(desired.listeners.contains_key(&http.listener));
    // Later fragments may be for either listener.
    let address =
        desired.endpoints[&EndpointKey::of_address(Address::from(IpAddr::from([10, 0, 1, 100])))];
    assert_eq!(address.kind(), Endpoint::OWNED);
    assert!(address.kind & Endpoint::REASSEMBLED != 0);
    assert_eq!(desired.classes[&address.class].len(), 2, "who may come in by one of them");
    // Nothing is forwarded to the proxy's targets.
    let is_unused = |target: &Target| target.port.get() == 9091;
    assert!(desired.targets.values().all(is_unused) && desired.rings.is_empty());
    assert!(desired.endpoints.values().all(|endpoint| endpoint.kind() != Endpoint::TARGET));

    world.configure(&SITE.replace("security_groups = [\"site\"]", ""));
    let desired = world.desired();
    let address =
        desired.endpoints[&EndpointKey::of_address(Address::from(IpAddr::from([10, 0, 1, 100])))];
    assert_eq!((address.class, desired.classes.len()), (OPEN, 0));
    assert!(address.kind & Endpoint::REASSEMBLED != 0);
}

#[test]
fn routes_have_every_listener_and_the_groups_that_are_named() {
    let mut world = World::new(SITE);
    let open = |world: &World| world.state.routes([7; 32]).listeners.len();
    world.desired();
    assert_eq!(open(&world), 3, "those that redirect have nothing to wait for");
    world.check("web", 11, HealthState::Healthy);
    world.desired();
    assert_eq!(open(&world), 3);
    world.check("api", 11, HealthState::Unhealthy);
    world.desired();
    let routes = world.state.routes([7; 32]);
    assert_eq!(routes.cookie_key, [7; 32]);
    assert_eq!(routes.listeners.len(), 6);
    let zone = |address: &str| {
        let route = &routes.listeners[&SocketAddr::new(address.parse().unwrap(), 80)];
        assert_eq!(&*route.load_balancer, "site");
        assert_eq!((route.listener.port, route.listener.rules.len()), (80, 1));
        route.zone.as_deref().map(str::to_owned)
    };
    // Without a zone of its own an address is in the agent's.
    assert_eq!(ADDRESSES.map(zone), ["a", "b", "c"].map(|zone| Some(zone.to_owned())));
    assert_eq!(routes.groups.keys().map(|name| &**name).collect::<Vec<_>>(), ["api", "web"]);
    let weights: Vec<_> = world.group("web").targets.iter().map(|target| target.weight).collect();
    assert_eq!(weights, [1, 3]);
    let checked: BTreeSet<_> =
        world.state.checks().into_keys().map(|key| key.target_group.to_string()).collect();
    assert_eq!(checked, ["api", "web"].map(str::to_owned).into(), "spare is unused");
    world.configure(&SITE.replace("\"10.0.2.11\", availability", "\"10.0.2.14\", availability"));
    world.desired();
    assert_eq!(open(&world), 6, "what is open stays so");
}

/// New targets have not been checked when they replace all others.
#[test]
fn targets_that_drain_stand_in_for_new_ones() {
    use HealthState::{Healthy, Unhealthy};
    use TargetState::{Draining, InService, OutOfService};
    let mut world = World::new(SITE);
    world.check("web", 11, Healthy);
    world.check("web", 12, Unhealthy);
    let renewed = SITE.replace("10.0.2.11", "10.0.2.21").replace("10.0.2.12", "10.0.2.22");
    world.configure(&renewed);
    let states = [(11, InService), (12, Draining), (21, OutOfService), (22, OutOfService)];
    assert_eq!(world.states("web"), states.into());
    world.check("web", 22, Unhealthy);
    assert_eq!(world.states("web"), states.into());
    world.check("web", 21, Healthy);
    let states = [(11, Draining), (12, Draining), (21, InService), (22, OutOfService)];
    assert_eq!(world.states("web"), states.into());
    // Nobody stands in for a group that is emptied.
    let (start, rest) = renewed.split_once("targets = [").unwrap();
    let (_, end) = rest.split_once("\n]").unwrap();
    world.configure(&format!("{start}targets = [\n]{end}"));
    assert!(world.states("web").values().all(|state| *state == Draining));
}

#[test]
fn a_listener_that_leaves_is_passed_until_it_is_over() {
    let mut world = World::new(SITE);
    let admitted = |desired: &Desired, address: &str| {
        let address: IpAddr = address.parse().unwrap();
        let key = EndpointKey::new(address.into(), Be16::new(80), 6);
        let endpoint = desired.endpoints.get(&key)?;
        assert_eq!(endpoint.kind(), Endpoint::PROXIED);
        Some(desired.classes[&endpoint.class].clone())
    };
    let [first, ..] = ADDRESSES;
    let before = admitted(&world.desired(), first).unwrap();
    // Alone, then with its load balancer.
    world.configure(&SITE.replace("port = 80\ntarget", "port = 81\ntarget"));
    assert_eq!(admitted(&world.desired(), first).as_ref(), Some(&before));
    world.configure("");
    assert_eq!(admitted(&world.desired(), first).as_ref(), Some(&before));
    assert_eq!(world.state.addresses().len(), ADDRESSES.len());
    let over = |at: SocketAddr| at.ip() == first.parse::<IpAddr>().unwrap();
    assert!(world.state.forget_ended(over, world.now));
    assert!(!world.state.forget_ended(over, world.now));
    assert_eq!(admitted(&world.desired(), first), None);
    assert!(admitted(&world.desired(), ADDRESSES[1]).is_some());
    assert_eq!(world.state.addresses().len(), ADDRESSES.len() - 1);
    // One that comes back is no longer over.
    world.configure(SITE);
    assert_eq!(world.state.ending().count(), 2, "port 81");
    world.configure("");
    world.now += Duration::from_secs(1000);
    assert!(world.state.forget_ended(|_| false, world.now), "in the end everything is");
    assert_eq!((world.state.ending().count(), world.state.addresses().len()), (0, 0));
}

#[test]
fn targets_serve_by_their_health() {
    use HealthState::{Healthy, Initial, Unhealthy};
    use TargetState::{Draining, InService, OutOfService};
    let mut world = World::new(SITE);
    assert_eq!(world.states("web"), [(11, OutOfService), (12, OutOfService)].into());
    assert!(!world.state.is_ready());
    // Its first check failed, and then more of them.
    for state in [Initial, Unhealthy] {
        world.check("web", 11, state);
        let states = [(11, InService), (12, OutOfService)];
        assert_eq!(world.states("web"), states.into(), "fails open");
    }
    world.check("web", 12, Healthy);
    assert_eq!(world.states("web"), [(11, OutOfService), (12, InService)].into());
    world.check("api", 11, Healthy);
    assert!(world.state.is_ready(), "no way to targets is waited for");
    world.check("web", 12, Unhealthy);
    assert_eq!(world.states("web"), [(11, InService), (12, InService)].into(), "fails open");

    let without = SITE.replace("  { address = \"10.0.2.11\", availability_zone = \"a\" },\n", "");
    world.configure(&without);
    assert_eq!(world.states("web"), [(11, Draining), (12, InService)].into());
    world.now += Duration::from_secs(301);
    world.state.tick(world.now);
    assert_eq!(world.states("web"), [(12, InService)].into());
}

/// A healthy target of weight 0 takes no requests, so it does not keep others from it.
#[test]
fn weight_0_is_nobody_s_stand_in() {
    use HealthState::{Healthy, Unhealthy};
    let mut world = World::new(&SITE.replace("weight = 3", "weight = 0"));
    world.check("web", 11, Unhealthy);
    world.check("web", 12, Healthy);
    assert_eq!(world.states("web")[&11], TargetState::InService);
}

#[test]
fn who_joins_others_starts_slowly() {
    use HealthState::{Healthy, Unhealthy};
    let slow = SITE.replacen("port = 8080\n", "port = 8080\nslow_start = \"30s\"\n", 1);
    let mut world = World::new(&slow);
    let shares = |world: &World| {
        world.group("web").targets.iter().map(|target| target.share).collect::<Vec<_>>()
    };
    world.check("web", 11, Healthy);
    world.check("web", 12, Healthy);
    assert_eq!(shares(&world), [FULL_SHARE; 2], "the first checks of all");
    world.check("web", 12, Unhealthy);
    world.check("web", 12, Healthy);
    assert_eq!(shares(&world), [FULL_SHARE, 1]);
    world.now += Duration::from_secs(15);
    world.state.tick(world.now);
    assert!((4..=6).contains(&shares(&world)[1]));
    world.now += Duration::from_secs(20);
    world.state.tick(world.now);
    assert_eq!(shares(&world), [FULL_SHARE; 2]);
}

#[test]
fn zones_without_a_healthy_target_are_not_answered() {
    use HealthState::{Healthy, Unhealthy};
    let mut world = World::new(SITE);
    let [a, b, none] = ADDRESSES;
    assert_eq!(world.answered(), ADDRESSES, "nothing is known yet");
    world.check("web", 11, Healthy);
    world.check("web", 12, Unhealthy);
    world.check("api", 11, Healthy);
    assert_eq!(world.answered(), [a, none]);
    world.check("web", 12, Healthy);
    assert_eq!(world.answered(), ADDRESSES);
    world.check("api", 11, Unhealthy);
    assert_eq!(world.answered(), [b, none], "a group of zone a has nobody there");
    world.check("web", 12, Unhealthy);
    assert_eq!(world.answered(), ADDRESSES, "no zone has what it takes");
    let fixed = "[load_balancer.site]\ntype = \"application\"\nscheme = \"internal\"\n\
        addresses = [{ address = \"10.0.1.100\", availability_zone = \"a\" }]\n\
        listener = [{ protocol = \"http\", port = 80, fixed_response = { status = 200 } }]\n";
    world.configure(fixed);
    assert_eq!(world.answered(), [a], "without groups");
}
