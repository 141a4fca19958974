//! Several target groups, zones, slow start, stickiness.

use super::*;

const BALANCER: &str = "[load_balancer.web]\naddresses = [\"10.0.1.100\"]\n";

/// Groups `web` (11, 12), `canary` (13) and `idle`, and listeners on ports 80, 81... that forward as
/// given.
fn config(actions: &[&str]) -> String {
    let listeners: String = actions
        .iter()
        .zip(80..)
        .map(|(action, port)| format!("[[load_balancer.web.listener]]\nport = {port}\n{action}\n"))
        .collect();
    format!(
        "[target_group.web]\ntargets = [\"10.0.2.11\", \"10.0.2.12\"]\n\
         [target_group.canary]\ntargets = [\"10.0.2.13\"]\n[target_group.idle]\n\
         {BALANCER}{listeners}"
    )
}

fn weights(web: u16, canary: u16) -> String {
    format!(
        "target_groups = [{{ name = \"web\", weight = {web} }}, \
         {{ name = \"canary\", weight = {canary} }}]"
    )
}

const WEB: &str = "target_group = \"web\"";
const CANARY: &str = "target_group = \"canary\"";

impl World {
    /// With the targets 11 to 13 healthy.
    fn healthy(actions: &[&str]) -> Self {
        let mut world = Self::new(&config(actions));
        world.check_groups(HealthState::Healthy);
        world
    }

    fn check_groups(&mut self, state: HealthState) {
        for (group, last) in [("web", 11), ("web", 12), ("canary", 13)] {
            self.check(group, last, state);
        }
    }

    fn pass(&mut self, seconds: u64) -> bool {
        self.now += Duration::from_secs(seconds);
        self.state.tick(self.now)
    }

    fn settle_all(&mut self) {
        let pinned = self.state.pinned();
        let findings = Findings { settled: pinned, ..Findings::default() };
        self.state.settle(&findings, self.now + Duration::from_nanos(1));
    }
}

fn slots(desired: &Desired, port: u16) -> Arc<[Slot]> {
    desired.rings[&listener(desired, port).expect("a listener").index].clone()
}

fn way_back(last: u8) -> EndpointKey {
    EndpointKey::new(IpAddr::from([10, 0, 2, last]).into(), Be16::new(8080), flow::TCP)
}

/// Slots that differ learn, with the target of before; the others are untouched. How many learn.
fn assert_learning(before: &[Slot], after: &[Slot]) -> usize {
    let mut moved = 0;
    for (old, new) in before.iter().zip(after) {
        if old.current == new.current {
            assert_eq!(old, new);
        } else {
            moved += 1;
            assert_eq!(*new, Slot::new(new.current, old.current, SlotState::Learning));
        }
    }
    moved
}

#[test]
fn groups_share_new_flows_by_their_weights() {
    let mut world = World::healthy(&[&weights(90, 10)]);
    let desired = world.desired();
    let shares = world.shares(&desired, 80);
    assert_eq!(shares.values().sum::<usize>(), 251);
    for (last, exact) in [(11, 113.0), (12, 113.0), (13, 25.1)] {
        assert!((shares[&last] as f64 - exact).abs() <= 1.0, "{shares:?}");
    }
    let owner = listener(&desired, 80).unwrap();
    for last in [11, 13] {
        assert_eq!(desired.endpoints[&way_back(last)].listener, owner.listener);
    }
}

#[test]
fn a_canary_that_grows_moves_slots_and_breaks_no_flow() {
    let mut world = World::healthy(&[&weights(90, 10)]);
    let before = slots(&world.desired(), 80);
    world.configure(&config(&[&weights(50, 50)]));
    let desired = world.desired();
    assert!((world.shares(&desired, 80)[&13] as f64 - 125.5).abs() <= 1.0);
    let moved = assert_learning(&before, &slots(&desired, 80));
    assert!((100..=150).contains(&moved), "{moved} of 251 slots moved, 100 must");
}

#[test]
fn a_group_of_weight_0_keeps_the_flows_it_has() {
    let mut world = World::healthy(&[&weights(50, 50)]);
    let before = slots(&world.desired(), 80);
    world.configure(&config(&[&weights(50, 0)]));
    let desired = world.desired();
    assert!(!world.shares(&desired, 80).contains_key(&13));
    assert_learning(&before, &slots(&desired, 80));
    assert!(target(&desired, 13, 8080).unwrap().serves());
    assert!(desired.endpoints.contains_key(&way_back(13)));
    let key =
        CheckKey { target_group: "canary".into(), address: [10, 0, 2, 13].into(), port: 8080 };
    assert!(world.state.checks().contains_key(&key), "and is checked");
}

/// As AWS: no failover from group to group.
#[test]
fn a_group_without_a_healthy_target_fails_open_for_its_share() {
    let mut world = World::healthy(&[&weights(90, 10)]);
    let before = world.desired();
    world.check("canary", 13, HealthState::Unhealthy);
    let desired = world.desired();
    assert_eq!(world.shares(&desired, 80), world.shares(&before, 80));
    assert!(target(&desired, 13, 8080).unwrap().serves());
    world.check("web", 11, HealthState::Unhealthy);
    let desired = world.desired();
    let shares = world.shares(&desired, 80);
    assert!((shares[&12] as f64 - 225.9).abs() <= 1.0, "{shares:?}");
}

#[test]
fn a_group_without_a_target_leaves_its_share_to_the_others() {
    let action =
        "target_groups = [{ name = \"canary\", weight = 1 }, { name = \"idle\", weight = 9 }]";
    let mut world = World::healthy(&[action]);
    let desired = world.desired();
    assert_eq!(world.shares(&desired, 80), [(13, 251)].into());
}

#[test]
fn a_group_that_is_named_later_waits_for_its_checks() {
    let mut world = World::new(&config(&[WEB]));
    world.check("web", 11, HealthState::Healthy);
    world.check("web", 12, HealthState::Healthy);
    let before = slots(&world.desired(), 80);
    for action in [weights(50, 50), CANARY.to_owned()] {
        world.configure(&config(&[&action]));
        assert_eq!(slots(&world.desired(), 80), before, "{action}");
    }
    world.check("canary", 13, HealthState::Healthy);
    let desired = world.desired();
    assert_eq!(world.shares(&desired, 80), [(13, 251)].into());
    assert_eq!(assert_learning(&before, &slots(&desired, 80)), 251);
}

#[test]
fn flows_of_a_group_that_is_no_longer_named_drain() {
    let mut world = World::healthy(&[WEB]);
    let owner = listener(&world.desired(), 80).unwrap().listener;
    world.configure(&config(&[CANARY]));
    world.check("canary", 13, HealthState::Healthy);
    let desired = world.desired();
    assert_eq!(desired.endpoints[&way_back(11)].listener, owner);
    assert!(target(&desired, 11, 8080).unwrap().serves());
    assert!(world.pass(300), "the deregistration delay is over");
    assert!(!world.desired().endpoints.contains_key(&way_back(11)));
}

/// New flows find nobody; the ring is what leads known ones to the targets that drain.
#[test]
fn a_ring_without_targets_for_new_flows_stays_while_known_ones_go_on() {
    let empty = |text: &str| {
        let text = text.replace("targets = [\"10.0.2.11\", \"10.0.2.12\"]", "targets = []");
        text.replace("targets = [\"10.0.2.13\"]", "targets = []")
    };
    let both = config(&[&weights(90, 10)]);
    let other_group = config(&["target_group = \"idle\""]);
    for (what, after) in [("no target", empty(&both)), ("another group", other_group)] {
        let mut world = World::healthy(&[&weights(90, 10)]);
        let before = slots(&world.desired(), 80);
        world.configure(&after);
        let desired = world.desired();
        assert!(slots(&desired, 80).iter().all(|slot| slot.current == 0), "{what}");
        assert_eq!(assert_learning(&before, &slots(&desired, 80)), 251, "{what}");
        for last in 11..=13 {
            let flags = target(&desired, last, 8080).unwrap().flags;
            assert_eq!(flags, Target::SERVES, "{what}: {last} serves and is in no ring");
            assert!(desired.endpoints.contains_key(&way_back(last)), "{what}");
        }
        assert!(world.pass(300), "the deregistration delay is over");
        assert_eq!(listener(&world.desired(), 80).unwrap().index, NO_RING, "{what}");
    }
}

#[test]
fn slots_learn_for_the_longest_idle_timeout_of_their_listeners() {
    let text = |web| {
        let patient = "tcp_idle_timeout = \"1000s\"";
        config(&[web, &format!("{WEB}\n{patient}"), CANARY])
    };
    let mut world = World::new(&text(WEB));
    world.check_groups(HealthState::Healthy);
    world.desired();
    let fewer = |text: String| text.replacen("\"10.0.2.11\", ", "", 1);
    world.configure(&fewer(text(WEB)));
    let desired = world.desired();
    let ring = |port| listener(&desired, port).unwrap().index;
    assert_eq!(ring(80), ring(81));
    world.pass(1001);
    assert!(world.state.pinned().is_empty(), "the other listener waits for longer");
    world.pass(1);
    assert!(!world.state.pinned().is_empty());
}

#[test]
fn flows_that_were_tracked_are_looked_for_before_a_slot_settles() {
    let tracked = |text: String| {
        text.replace("[target_group.web]\n", "[target_group.web]\nflow_tracking = \"always\"\n")
    };
    let mut world = World::new(&tracked(config(&[WEB, CANARY])));
    world.check_groups(HealthState::Healthy);
    assert!(slots(&world.desired(), 80).iter().all(|slot| slot.is_settled()));
    world.configure(&config(&[WEB, CANARY]));
    let desired = world.desired();
    assert!(slots(&desired, 80).iter().all(|slot| slot.state() == SlotState::Pinned));
    assert!(slots(&desired, 81).iter().all(|slot| slot.is_settled()));
}

#[test]
fn targets_that_are_chosen_by_their_connections_are_due_their_weights() {
    let least = |text: String| {
        text.replace(
            "[target_group.web]\n",
            "[target_group.web]\nalgorithm = \"least_connections\"\n",
        )
    };
    let mut world = World::new(&least(config(&[WEB, CANARY])));
    world.check_groups(HealthState::Healthy);
    let desired = world.desired();
    let is_tracked =
        |desired: &Desired, port| listener(desired, port).unwrap().kind & Endpoint::TRACKED != 0;
    assert!(is_tracked(&desired, 80) && !is_tracked(&desired, 81));
    assert!(slots(&desired, 80).iter().all(|slot| slot.is_settled()), "a first ring");
    let numbers: BTreeSet<u32> = slots(&desired, 80).iter().map(|slot| slot.current).collect();
    assert_eq!(desired.shares.keys().copied().collect::<BTreeSet<_>>(), numbers);
    let shares: BTreeSet<_> = desired.shares.values().map(|s| (s.weight, s.group)).collect();
    assert_eq!(shares.len(), 1, "equal weights in one group: {shares:?}");
    assert!(shares.first().unwrap().0 > 0 && shares.first().unwrap().1 > 0);
    assert!(world.state.counts_flows());

    world.configure(&config(&[WEB, CANARY]));
    let desired = world.desired();
    assert!(desired.shares.is_empty() && !is_tracked(&desired, 80));
    assert!(slots(&desired, 80).iter().all(|slot| slot.state() == SlotState::Pinned));
    world.configure(&least(config(&[WEB, CANARY])));
    let desired = world.desired();
    let learns = |slot: &Slot| *slot == Slot::new(slot.current, slot.current, SlotState::Learning);
    assert!(slots(&desired, 80).iter().all(learns), "flows of before go by the hash");
}

/// What one listener has been through is nothing to the other, though both do the same now.
#[test]
fn listeners_of_one_action_share_a_ring_unless_their_flows_lie_differently() {
    let mut world = World::healthy(&[WEB, WEB, CANARY]);
    let desired = world.desired();
    let ring = |desired: &Desired, port| listener(desired, port).unwrap().index;
    assert_eq!(ring(&desired, 80), ring(&desired, 81));
    let of_canary = slots(&desired, 82);

    world.configure(&config(&[WEB, WEB, WEB, WEB]));
    let desired = world.desired();
    assert_eq!(ring(&desired, 80), ring(&desired, 83), "a new listener has no past");
    assert_ne!(ring(&desired, 80), ring(&desired, 82));
    assert!(slots(&desired, 80).iter().all(|slot| slot.is_settled()));
    assert_eq!(assert_learning(&of_canary, &slots(&desired, 82)), 251);

    world.pass(352);
    world.desired();
    world.settle_all();
    let desired = world.desired();
    assert_eq!(ring(&desired, 80), ring(&desired, 82), "nothing is left of the past");
}

#[test]
fn more_histories_than_rings_are_borne() {
    let actions: Vec<String> = (1..=256).map(|weight| weights(999, weight)).collect();
    let mut world = World::healthy(&actions.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(world.desired().rings.len(), 256);
    let other: Vec<String> = (1..=256).map(|weight| weights(weight, 999)).collect();
    world.configure(&config(&other.iter().map(String::as_str).collect::<Vec<_>>()));
    let desired = world.desired();
    for port in 80..80 + 256 {
        let shares = world.shares(&desired, port);
        assert!(shares[&13] > 150, "{shares:?}");
    }
}

fn zonal(zones: [&str; 3]) -> String {
    let target = |(zone, last): (&str, u8)| {
        let zone = match zone {
            "" => String::new(),
            zone => format!(", availability_zone = \"{zone}\""),
        };
        format!("{{ address = \"10.0.2.{last}\"{zone} }},")
    };
    let targets: String = zones.into_iter().zip(11..).map(target).collect();
    format!(
        "[agent]\navailability_zone = \"a\"\n[target_group.web]\ntargets = [{targets}]\n\
         {BALANCER}cross_zone = false\nlistener = [{{ target_group = \"web\" }}]\n\
         [load_balancer.all]\naddresses = [\"10.0.1.101\"]\n\
         listener = [{{ target_group = \"web\" }}]\n"
    )
}

#[test]
fn without_crossing_zones_the_agent_s_zone_serves_while_it_can() {
    let mut world = World::new(&zonal(["a", "b", ""]));
    for last in 11..14 {
        world.check("web", last, HealthState::Healthy);
    }
    let desired = world.desired();
    let lasts = |shares: BTreeMap<u8, usize>| shares.into_keys().collect::<Vec<_>>();
    assert_eq!(lasts(world.shares(&desired, 80)), [11, 13], "13 is in every zone");
    let all = EndpointKey::new(IpAddr::from([10, 0, 1, 101]).into(), Be16::new(80), flow::TCP);
    let ring = &desired.rings[&desired.endpoints[&all].index];
    let targets: BTreeSet<_> = ring.iter().map(|slot| slot.current).collect();
    assert_eq!(targets.len(), 3, "another load balancer of the group crosses zones");

    for (last, left) in [(11, &[13][..]), (13, &[12][..]), (12, &[11, 12, 13][..])] {
        world.check("web", last, HealthState::Unhealthy);
        let desired = world.desired();
        assert_eq!(lasts(world.shares(&desired, 80)), left, "without {last}");
    }
    world.check("web", 11, HealthState::Healthy);
    let desired = world.desired();
    assert_eq!(lasts(world.shares(&desired, 80)), [11]);
}

fn slow(duration: &str) -> String {
    format!(
        "[target_group.web]\nslow_start = \"{duration}\"\ntargets = [\"10.0.2.11\", \"10.0.2.12\"]\n\
         {BALANCER}listener = [{{ target_group = \"web\" }}]\n"
    )
}

#[test]
fn a_target_that_recovers_gets_its_share_step_by_step() {
    let mut world = World::new(&slow("100s"));
    world.check("web", 11, HealthState::Healthy);
    world.check("web", 12, HealthState::Healthy);
    let first = world.desired();
    assert!(world.shares(&first, 80)[&12] >= 125, "a first ring has whole shares");

    world.check("web", 12, HealthState::Unhealthy);
    world.desired();
    world.check("web", 12, HealthState::Healthy);
    for step in 1..=10_u32 {
        let desired = world.desired();
        let share = world.shares(&desired, 80)[&12] as f64;
        let exact = 251.0 * f64::from(step) / f64::from(step + 10);
        assert!((share - exact).abs() <= 1.0, "{share} in step {step}");
        assert!((0..9).all(|_| !world.pass(1)), "no change between steps");
        assert_eq!(world.pass(1), step < 10);
    }
}

#[test]
fn who_starts_slowly_starts_again_when_it_fails_and_not_at_all_alone() {
    let mut world = World::new(&slow("100s"));
    world.check("web", 11, HealthState::Healthy);
    world.check("web", 12, HealthState::Unhealthy);
    world.desired();
    let share = |world: &mut World| {
        let desired = world.desired();
        world.shares(&desired, 80).remove(&12)
    };
    world.check("web", 12, HealthState::Healthy);
    world.pass(50);
    assert!(share(&mut world) > Some(80));
    world.check("web", 12, HealthState::Unhealthy);
    assert_eq!(share(&mut world), None);
    world.check("web", 12, HealthState::Healthy);
    assert!(share(&mut world) < Some(30), "from the beginning");

    world.check("web", 11, HealthState::Unhealthy);
    world.check("web", 12, HealthState::Unhealthy);
    world.check("web", 12, HealthState::Healthy);
    assert_eq!(share(&mut world), Some(251));
    world.check("web", 11, HealthState::Healthy);
    assert!(share(&mut world) > Some(200), "the first one back carries the load");
}

#[test]
fn a_target_that_is_added_starts_slowly_and_switching_it_off_ends_that() {
    let one = slow("100s").replace(", \"10.0.2.12\"", "");
    let mut world = World::new(&one);
    world.check("web", 11, HealthState::Healthy);
    world.desired();
    world.configure(&slow("100s"));
    world.desired();
    world.check("web", 12, HealthState::Healthy);
    let desired = world.desired();
    assert!(world.shares(&desired, 80)[&12] < 30);
    world.configure(&slow("0s"));
    let desired = world.desired();
    assert!(world.shares(&desired, 80)[&12] >= 125);
}

#[test]
fn stickiness_is_a_flag_of_the_listener() {
    let sticky = config(&[WEB]).replace(
        "[target_group.web]\n",
        "[target_group.web]\nstickiness = { type = \"source_ip\" }\n",
    );
    let mut world = World::new(&sticky);
    world.check_groups(HealthState::Healthy);
    let desired = world.desired();
    assert_eq!(listener(&desired, 80).unwrap().kind, Endpoint::LISTENER | Endpoint::BY_SOURCE);

    let key = |port: u16, to: u16| FlowKey {
        source: IpAddr::from([192, 0, 2, 7]).into(),
        destination: IpAddr::from([10, 0, 1, 100]).into(),
        source_port: Be16::new(port),
        destination_port: Be16::new(to),
        protocol: flow::TCP,
        zero: [0; 3],
    };
    let keys = HashKeys::from_seed(1);
    let slots = |desired: &Desired| -> BTreeSet<_> {
        (1000..1100)
            .map(|port| {
                place_of(desired, &keys, &key(port, 80))
                    .map(|(ring, hash)| (ring, flow::slot(hash, 251)))
            })
            .collect()
    };
    assert_eq!(slots(&desired).len(), 1, "the walk looks where packets do");
    assert!(slots(&World::healthy(&[WEB]).desired()).len() > 50);
}

#[test]
fn live_flows_are_known_where_every_listener_remembers_them() {
    let tracked = config(&[WEB, CANARY])
        .replace("[target_group.web]\n", "[target_group.web]\nflow_tracking = \"always\"\n");
    let mut world = World::new(&tracked);
    world.check_groups(HealthState::Healthy);
    world.desired();
    assert!(world.state.counts_flows());
    let key = |group: &str, last| CheckKey {
        target_group: group.into(),
        address: [10, 0, 2, last].into(),
        port: 8080,
    };
    assert_eq!(world.state.flows_of(&key("web", 11)), None, "not counted yet");
    let number = world.state.targets.get(&key("web", 11)).unwrap();
    world.state.set_flows([(number, 7)].into());
    assert_eq!(world.state.flows_of(&key("web", 11)), Some(7));
    assert_eq!(world.state.flows_of(&key("web", 12)), Some(0));
    assert_eq!(world.state.flows_of(&key("canary", 13)), None);

    let mut world = World::healthy(&[WEB]);
    world.desired();
    assert!(!world.state.counts_flows());
}

/// Says how long it takes: `cargo test a_thousand -- --nocapture`.
#[test]
fn a_thousand_targets_become_healthy_in_one_change() {
    let address = |n: u16| IpAddr::from([10, 9, (n / 250) as u8, (n % 250) as u8 + 1]);
    let targets: String = (0..1000).map(|n| format!("\"{}\",", address(n))).collect();
    let text = format!(
        "[target_group.web]\ntargets = [{targets}]\n{BALANCER}\
         listener = [{{ target_group = \"web\" }}]\n"
    );
    let mut world = World::new(&text);
    let mut network = Network::clone(world.state.network());
    let hop = *network.next_hops.values().next().unwrap();
    network.next_hops = (0..1000).map(|n| (address(n), hop)).collect();
    world.state.set_network(Arc::new(network));
    world.state.ring_size = 16381;
    world.desired();

    let begun = Instant::now();
    for n in 0..1000 {
        let key = CheckKey { target_group: "web".into(), address: address(n), port: 8080 };
        world.state.set_health(HealthEvent { key, health: Health::healthy() }, world.now);
    }
    let desired = world.desired();
    println!("1000 targets healthy, tables made in {:?}", begun.elapsed());
    let ring = slots(&desired, 80);
    let used: BTreeSet<u32> = ring.iter().map(|slot| slot.current).collect();
    assert_eq!(used.len(), 1000);
    assert!(ring.iter().all(|slot| slot.is_settled()), "one change, one ring");
}
