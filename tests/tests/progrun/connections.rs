//! What is remembered of connections, and what it decides.

use std::time::Duration;

use lb_common::{
    flow::{FlowKey, FlowTable, TCP, UDP},
    tables::{Slot, Target},
    verdict::DropReason::{PortAllocationError, TargetDown},
    wire::Be16,
};
use lb_tests::{
    packets::Packet,
    scene::{CLASS, Way},
};
use lb_userspace::dataplane::LoadOptions;

use super::*;

pub fn key(protocol: u8, source: &str, destination: &str) -> FlowKey {
    let (source, destination) = (at(source), at(destination));
    FlowKey {
        source: source.ip().into(),
        destination: destination.ip().into(),
        source_port: Be16::new(source.port()),
        destination_port: Be16::new(destination.port()),
        protocol,
        zero: [0; 3],
    }
}

fn client(port: u16) -> String {
    format!("192.0.10.7:{port}")
}

/// From the client's port to the unsettled listener, on to a target of 10.0.11.40 + number.
fn on_to(what: &'static str, request: &Packet, listener: u32, target: u32) -> Step {
    let to = format!("10.0.11.{}:8080", 40 + target);
    let output = translated(request, target, &to);
    let is_udp = matches!(request.transport, Transport::Udp);
    let step = Step::to(what, request, &output, (listener, target));
    // Of UDP, what is not known is new.
    if is_udp { step.with_is_new(true) } else { step }
}

pub fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// After a change, a connection that begins goes to the new target, one that is older to the old.
#[test]
fn a_learning_slot_tells_old_connections_from_new_ones() {
    let vip = "10.0.10.100:90";
    let amid = |port| segment(&client(port), vip);
    let datagram = |port| datagram(&client(port), vip);
    run(
        &Scene::everything(),
        &[
            on_to("a SYN: new", &syn(&client(1), vip), 20, 20),
            on_to("what follows it", &amid(1), 20, 20),
            on_to("amid a connection: old", &amid(2), 20, 21),
            on_to("what follows that", &amid(2), 20, 21),
            on_to("a SYN-ACK is no beginning", &flagged(&client(3), vip, "SA"), 20, 21),
            on_to("a lone FIN: old", &flagged(&client(4), vip, "FA"), 20, 21),
            on_to("a SYN on a connection that is closing: new", &syn(&client(4), vip), 20, 20),
            on_to("a SYN on a connection that lives", &syn(&client(2), vip), 20, 21)
                .with_is_new(false),
            on_to("UDP: old, for all we know", &datagram(5), 22, 23),
            on_to("and then known", &datagram(5), 22, 23).with_is_new(false),
        ],
    );
}

#[test]
fn a_learning_slot_tells_a_new_quic_connection() {
    let vip = "10.0.10.100:90";
    let short_header = |port| {
        let payload = vec![0x43; 1200];
        Packet { payload, ..datagram(&client(port), vip) }
    };
    run(
        &Scene::everything(),
        &[
            on_to("an Initial: new", &quic_initial(&client(1), vip), 22, 22),
            on_to("what follows it", &short_header(1), 22, 22).with_is_new(false),
            on_to("amid a connection: old", &short_header(2), 22, 23),
            on_to("an Initial on it", &quic_initial(&client(2), vip), 22, 23).with_is_new(false),
        ],
    );
}

#[test]
fn later_only_tcp_is_old() {
    let vip = "10.0.10.100:91";
    run(
        &Scene::everything(),
        &[
            on_to("UDP: new", &datagram(&client(1), vip), 24, 24),
            on_to("TCP: old", &segment(&client(1), vip), 26, 27),
            on_to("TCP that begins: new", &syn(&client(2), vip), 26, 26),
        ],
    );
}

#[test]
fn a_pinned_slot_knows_its_exceptions() {
    let vip = "10.0.10.100:92";
    in_world(&Scene::everything(), |world| {
        check(world, &on_to("unknown: current", &segment(&client(1), vip), 28, 28));
        assert_eq!(world.model.remembered(), 0, "and not remembered");
        world.remember(key(TCP, &client(2), vip), 29, 0, seconds(5)).unwrap();
        check(world, &on_to("known", &segment(&client(2), vip), 28, 29));
        world.remember(key(UDP, &client(2), vip), 33, 0, seconds(5)).unwrap();
        check(world, &on_to("known UDP", &datagram(&client(2), vip), 32, 33).with_is_new(false));
        check(world, &on_to("unknown UDP", &datagram(&client(3), vip), 32, 32));
    });
}

#[test]
fn a_silent_flow_is_forgotten() {
    let vip = "10.0.10.100:92";
    in_world(&Scene::everything(), |world| {
        // An entry lives a second longer than its timeout, and the kernel's clock lags behind ours by
        // a timer interrupt.
        for (what, protocol, closing, ago, target) in [
            ("TCP within its timeout", TCP, 0, 349, 1),
            ("TCP beyond it", TCP, 0, 352, 0),
            ("UDP within its timeout", UDP, 0, 119, 1),
            ("UDP beyond it", UDP, 0, 122, 0),
            ("TCP that closed", TCP, 1, 9, 1),
            ("TCP that closed a while ago", TCP, 1, 11, 0),
        ] {
            world
                .remember(
                    key(protocol, &client(1), vip),
                    if protocol == TCP { 29 } else { 33 },
                    closing,
                    seconds(ago),
                )
                .unwrap();
            let step = if protocol == TCP {
                on_to(what, &segment(&client(1), vip), 28, 28 + target)
            } else {
                on_to(what, &datagram(&client(1), vip), 32, 32 + target).with_is_new(target == 0)
            };
            check(world, &step);
            world.forget_all().unwrap();
        }
    });
}

#[test]
fn the_flow_of_a_target_that_no_longer_serves() {
    let vip = "10.0.10.100:92";
    let mut scene = Scene::everything();
    scene.fail(29);
    scene.fail(33);
    in_world(&scene, |world| {
        let amid = segment(&client(1), vip);
        world.remember(key(TCP, &client(1), vip), 29, 0, seconds(1)).unwrap();
        check(world, &Step::answer("TCP is reset", amid.build(), reset(&amid).build(), TargetDown));
        assert_eq!(world.model.remembered(), 0, "and forgotten");
        check(world, &on_to("so what follows is new to us", &amid, 28, 28));
        world.remember(key(TCP, &client(2), vip), 29, 0, seconds(1)).unwrap();
        check(world, &on_to("a SYN has nothing to lose", &syn(&client(2), vip), 28, 28));
        world.remember(key(UDP, &client(1), vip), 33, 0, seconds(1)).unwrap();
        check(world, &on_to("UDP goes to another", &datagram(&client(1), vip), 32, 32));
    });
}

/// Of a learning slot, too.
#[test]
fn a_previous_target_that_no_longer_serves() {
    let vip = "10.0.10.100:90";
    let mut scene = Scene::everything();
    scene.fail(21);
    scene.fail(23);
    let amid = segment(&client(1), vip);
    run(
        &scene,
        &[
            Step::answer("TCP is reset", amid.build(), reset(&amid).build(), TargetDown),
            on_to("UDP goes to the current one", &datagram(&client(1), vip), 22, 22),
        ],
    );
}

fn tracked(what: &'static str, request: &Packet, listener: u32, target: u32) -> Step {
    let to = format!("10.0.11.{}:8080", 100 + target);
    Step::to(what, request, &translated(request, target, &to), (listener, target))
}

/// Two listeners, one target, the same client address and port: one 4-tuple at the target.
#[test]
fn the_same_client_by_two_listeners() {
    let reply = |from: &str| segment(from, &client(1));
    let [of30, of31] = ["10.0.10.100:93", "10.0.10.100:94"];
    let third = syn(&client(1), "10.0.10.100:95");
    run(
        &Scene::everything(),
        &[
            tracked("the first takes the target", &syn(&client(1), of30), 30, 40),
            Step::back(
                "its replies are the first's",
                &reply("10.0.11.140:8080"),
                &restored(&reply("10.0.11.140:8080"), of30, 10),
                (30, 40),
            ),
            tracked("the second takes the next one", &syn(&client(1), of31), 31, 41),
            Step::back(
                "whose replies are the second's",
                &reply("10.0.11.141:8080"),
                &restored(&reply("10.0.11.141:8080"), of31, 10),
                (31, 41),
            ),
            Step::answer(
                "the third has none",
                third.build(),
                reset(&third).build(),
                PortAllocationError,
            ),
            tracked("the first goes on", &segment(&client(1), of30), 30, 40),
            tracked("the second goes on", &segment(&client(1), of31), 31, 41),
            tracked(
                "from another port there is no conflict",
                &syn(&client(2), "10.0.10.100:95"),
                33,
                40,
            ),
        ],
    );
}

#[test]
fn a_shared_targets_replies_go_back_as_the_flow_came() {
    let reply = |to: &str| segment("10.0.11.140:8080", to);
    let by33 = restored(&reply(&client(9)), "10.0.10.100:95", 10);
    let unknown = restored(&reply(&client(10)), "10.0.10.100:93", 10);
    run(
        &Scene::everything(),
        &[
            tracked("by the third listener", &syn(&client(9), "10.0.10.100:95"), 33, 40),
            Step::back("and back by it", &reply(&client(9)), &by33, (33, 40)),
            Step::back(
                "unknown: of the only listener before",
                &reply(&client(10)),
                &unknown,
                (30, 40),
            ),
            Step::pass(
                "unknown, and there was none before",
                segment("10.0.11.141:8080", &client(10)).build(),
            )
            .ingress(11),
        ],
    );
}

#[test]
fn always_tracked_both_ways() {
    in_world(&Scene::everything(), |world| {
        let vip = "[fd00:10::100]:93";
        let six = "[2001:db8:10::7]:4000";
        let request = syn(six, vip);
        let output = translated(&request, 44, "[fd00:11::44]:8080");
        check(world, &Step::to("TCP over IPv6", &request, &output, (35, 44)));
        let udp = datagram(&client(1), "10.0.10.100:93");
        check(world, &tracked("UDP is new once", &udp, 34, 42).with_is_new(true));
        check(world, &tracked("then known", &udp, 34, 42));
        assert_eq!(world.model.remembered(), 2);
        assert_eq!(world.model.remembered_returns(), 2);
        // Seen a while ago: both entries are refreshed.
        world.remember(key(UDP, &client(1), "10.0.10.100:93"), 42, 0, seconds(30)).unwrap();
        world.forget_all().unwrap();
        world.remember(key(UDP, &client(1), "10.0.10.100:93"), 42, 0, seconds(30)).unwrap();
        check(world, &tracked("a lost way back is restored", &udp, 34, 42));
        assert_eq!(world.model.remembered_returns(), 1);
    });
}

/// A way back that another listener's flow left long ago is free.
#[test]
fn an_old_claim_is_no_claim() {
    in_world(&Scene::everything(), |world| {
        let back = key(TCP, "10.0.11.140:8080", &client(1));
        world.remember_return(back, 30, 40, seconds(351)).unwrap();
        check(world, &tracked("too old", &syn(&client(1), "10.0.10.100:95"), 33, 40));
        world.forget_all().unwrap();
        world.remember_return(back, 30, 40, seconds(340)).unwrap();
        world.remember(key(TCP, &client(1), "10.0.10.100:93"), 40, 0, seconds(340)).unwrap();
        let request = syn(&client(1), "10.0.10.100:95");
        let answer = reset(&request).build();
        check(world, &Step::answer("alive", request.build(), answer, PortAllocationError));
    });
}

/// Trap: a client that talks to a target's own address through us must get that address back.
#[test]
fn a_client_that_talks_to_the_target_itself() {
    let vip = "10.0.10.100:80";
    let target = "10.0.11.21:8080";
    let direct = segment(&client(1), target);
    let reply = |port| segment(target, &client(port));
    let listener = segment(&client(1), vip);
    run(
        &Scene::everything(),
        &[
            Step::back(
                "before, replies are the listener's",
                &reply(1),
                &restored(&reply(1), vip, 10),
                (1, 1),
            ),
            Step::pass("to the target itself", direct.build()),
            Step::pass("and back untouched", reply(1).build()).ingress(11),
            Step::back(
                "another port is the listener's",
                &reply(2),
                &restored(&reply(2), vip, 10),
                (1, 1),
            ),
            Step::to(
                "the same client comes by the listener",
                &listener,
                &translated(&listener, 1, target),
                (1, 1),
            ),
            Step::back(
                "then replies are the listener's again",
                &reply(1),
                &restored(&reply(1), vip, 10),
                (1, 1),
            ),
        ],
    );
}

#[test]
fn a_client_that_talks_to_the_target_itself_over_ipv6_and_udp() {
    let (client6, target6) = ("[2001:db8:10::7]:4000", "[fd00:11::23]:8080");
    let reply6 = segment(target6, client6);
    let reply = datagram("10.0.11.22:5353", &client(1));
    let request = datagram(&client(1), "10.0.10.100:53");
    run(
        &Scene::everything(),
        &[
            Step::pass("over IPv6", segment(client6, target6).build()),
            Step::pass("and back", reply6.build()).ingress(11),
            Step::pass("UDP", datagram(&client(1), "10.0.11.22:5353").build()),
            Step::pass("and back", reply.build()).ingress(11),
            Step::to(
                "by the listener",
                &request,
                &translated(&request, 2, "10.0.11.22:5353"),
                (2, 2),
            ),
            Step::back("and back", &reply, &restored(&reply, "10.0.10.100:53", 10), (2, 2)),
        ],
    );
}

/// Its replies go on, whoever asked: they may be answers to what came through the load balancer.
#[test]
fn a_target_with_a_security_group_is_not_for_everybody() {
    let mut scene = Scene::new();
    scene.class(CLASS, &[("192.0.10.0", 24), ("2001:db8:10::", 64)]);
    let targets = [
        (1, Target::NAT, "10.0.10.100:80", "10.0.11.21:8080"),
        (2, Target::NAT, "[fd00:10::100]:80", "[fd00:11::22]:8080"),
        (3, Target::DSR_L2, "10.0.10.100:81", "10.0.11.23:81"),
        (4, Target::DSR_L2, "[fd00:10::100]:81", "[fd00:11::24]:81"),
    ];
    let mut steps = Vec::new();
    for (number, mode, listener, target) in targets {
        scene.target(number, mode, target, Way::by(11));
        scene.listener(number, TCP, listener, &[Slot::settled(number)]);
        scene.guard_target(number, TCP, CLASS);
        let is_v4 = target.starts_with('1');
        let (friend, stranger) = if is_v4 {
            ("192.0.10.7:4000", "192.0.12.7:4000")
        } else {
            ("[2001:db8:10::7]:4000", "[2001:db8:12::7]:4000")
        };
        let denied = DropReason::SecurityGroupDenied;
        steps.extend([
            Step::drop("a stranger's connection", syn(stranger, target).build(), denied),
            Step::drop("and its data", segment(stranger, target).build(), denied),
            Step::pass("who is let in", segment(friend, target).build()),
            Step::pass("another port", segment(stranger, &target.replace(":8", ":9")).build()),
        ]);
        if mode == Target::NAT {
            let request = segment(stranger, listener);
            let balanced = translated(&request, number, target);
            steps.push(Step::to(
                "through the load balancer",
                &request,
                &balanced,
                (number, number),
            ));
        }
    }
    run(&scene, &steps);
}

/// The first of these SYNs makes an entry, and so on; the kernel's tables have 1024 places here.
const FLOOD: u16 = 20_000;

/// A flood of SYNs, or of ACKs, to a slot that learns pushes out its like and nothing else.
#[test]
fn floods_push_out_only_their_like() {
    let small = LoadOptions { half_open_table_size: 1024, once_seen_table_size: 1024, ..OPTIONS };
    let network = Network::new().unwrap();
    network.run(|| {
        let vip = "10.0.10.100:90";
        let scene = Scene::everything();
        let mut world = World::new(&network, &small, scene.desired).unwrap();
        let flood = |world: &mut World<'_>, flags: Option<&str>| {
            for n in 0..FLOOD {
                // The host's tables forget nothing: no flow of one flood may be known from another.
                let first = if flags.is_some() { 100 } else { 200 };
                let from = format!("192.0.10.{}:{}", first + n % 50, 2000 + n);
                let packet =
                    flags.map_or_else(|| syn(&from, vip), |flags| flagged(&from, vip, flags));
                world.run(10, &packet.build()).unwrap();
            }
        };
        // Old connections, of which two packets were seen, and new ones that are established.
        for port in 1..=100 {
            check(&mut world, &on_to("old", &segment(&client(port), vip), 20, 21));
            check(&mut world, &on_to("again", &segment(&client(port), vip), 20, 21));
            check(&mut world, &on_to("new", &syn(&client(1000 + port), vip), 20, 20));
            let ack = flagged(&client(1000 + port), vip, "A");
            check(&mut world, &on_to("established", &ack, 20, 20));
        }
        assert_eq!(world.entries(FlowTable::Flows).unwrap(), 200);
        flood(&mut world, None);
        flood(&mut world, Some("A"));
        let [flows, half_open, once_seen] = world.usage().unwrap();
        println!("{flows:?} {half_open:?} {once_seen:?}");
        assert_eq!((flows.evictions, flows.entries), (0, 200));
        for (table, usage) in [(FlowTable::HalfOpen, half_open), (FlowTable::OnceSeen, once_seen)] {
            let gone = u64::from(FLOOD) - world.entries(table).unwrap() as u64;
            // What the kernel keeps back for each CPU is not counted as full.
            assert!(usage.evictions <= gone && usage.evictions + 1024 > gone, "{usage:?}, {gone}");
        }
        for port in 1..=100 {
            let old = world.run(10, &segment(&client(port), vip).build()).unwrap();
            let new = world.run(10, &segment(&client(1000 + port), vip).build()).unwrap();
            assert_eq!(old.frame[33], 61, "old connection {port}");
            assert_eq!(new.frame[33], 60, "new connection {port}");
        }
    });
}

/// The way back of an established connection stays, too, where several listeners share its target.
#[test]
fn floods_push_out_no_way_back() {
    let small = LoadOptions { flow_table_size: 1024, half_open_table_size: 1024, ..OPTIONS };
    let network = Network::new().unwrap();
    network.run(|| {
        let vip = "10.0.10.100:94";
        let mut world = World::new(&network, &small, Scene::everything().desired).unwrap();
        let targets: Vec<u8> = (1..=100)
            .map(|port| {
                let opened = world.run(10, &syn(&client(port), vip).build()).unwrap();
                world.run(10, &flagged(&client(port), vip, "A").build()).unwrap();
                opened.frame[33]
            })
            .collect();
        for n in 0..FLOOD {
            let from = format!("192.0.10.{}:{}", 100 + n % 50, 2000 + n);
            world.run(10, &syn(&from, vip).build()).unwrap();
        }
        for (port, target) in (1..=100).zip(targets) {
            let reply = segment(&format!("10.0.11.{target}:8080"), &client(port));
            let outcome = world.run(11, &reply.build()).unwrap();
            assert_eq!(outcome.action, Action::Redirect, "to port {port}, from {target}");
            assert_eq!(outcome.frame, restored(&reply, vip, 10).build());
        }
    });
}

/// A SYN needs a target in the ring; what a draining target has goes on.
#[test]
fn a_draining_target_gets_no_new_connection() {
    let vip = "10.0.10.100:90";
    let mut scene = Scene::everything();
    scene.drain(21);
    in_world(&scene, |world| {
        check(world, &on_to("an old connection", &segment(&client(1), vip), 20, 21));
        check(world, &on_to("its port, used again", &syn(&client(1), vip), 20, 20));
        check(world, &on_to("and established", &segment(&client(1), vip), 20, 20));
        check(world, &on_to("another old one", &segment(&client(2), vip), 20, 21));
        check(world, &on_to("goes on", &segment(&client(2), vip), 20, 21));
    });
}

/// From SYN to FIN, through the tables.
#[test]
fn a_flow_moves_from_table_to_table() {
    let vip = "10.0.10.100:90";
    in_world(&Scene::everything(), |world| {
        let mut expect = |what, packet: &Packet, target, entries: [usize; 3]| {
            check(world, &on_to(what, packet, 20, target));
            let found = FlowTable::ALL.map(|table| world.entries(table).unwrap());
            assert_eq!(found, entries, "{what}");
        };
        let of = |port, flags| flagged(&client(port), vip, flags);
        expect("a SYN", &syn(&client(1), vip), 20, [0, 1, 0]);
        expect("it is established", &of(1, "A"), 20, [1, 0, 0]);
        expect("it ends", &of(1, "FA"), 20, [1, 0, 0]);
        expect("the port is used again", &syn(&client(1), vip), 20, [0, 1, 0]);
        expect("it is aborted", &of(1, "R"), 20, [0, 1, 0]);
        expect("an old one", &of(2, "A"), 21, [0, 1, 1]);
        expect("shows itself", &of(2, "A"), 21, [1, 1, 0]);
        expect("a lone FIN", &of(3, "FA"), 21, [1, 1, 1]);
        expect("and its last ACK", &of(3, "A"), 21, [1, 1, 1]);
    });
}
