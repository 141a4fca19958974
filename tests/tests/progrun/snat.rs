//! Packets whose both ends are rewritten.

use std::{collections::BTreeSet, time::Duration};

use lb_common::{
    snat::MAX_SNAT_ADDRESSES,
    verdict::DropReason::{PortAllocationError, TtlExceeded},
};
use lb_tests::packets::{Checksum, Packet, endpoints};

use super::*;

const CLIENT: &str = "192.0.10.7:4000";
const CLIENT6: &str = "[2001:db8:10::7]:4000";
const VIP: &str = "10.0.10.100:118";
const VIP6: &str = "[fd00:10::100]:118";
/// The target of the TCP listener, and as what it knows its first client.
const TARGET: &str = "10.0.11.245:8080";
const FIRST: &str = "10.0.11.2:20000";
const SECOND: &str = "10.0.11.2:20001";

/// A request as the target of a listener of the same number gets it.
fn outbound(request: &Packet, number: u32, from: &str, to: &str) -> Packet {
    Packet { source: at(from), ..translated(request, number, to) }
}

/// A reply as it goes back to the client.
fn inbound(reply: &Packet, listener: &str, client: &str) -> Packet {
    Packet { destination: at(client), ..restored(reply, listener, 10) }
}

fn to_36(what: &'static str, request: &Packet, from: &str) -> Step {
    Step::to(what, request, &outbound(request, 36, from, TARGET), (36, 36))
}

fn back_36(what: &'static str, reply: &Packet, client: &str) -> Step {
    Step::back(what, reply, &inbound(reply, VIP, client), (36, 36))
}

fn client(port: u16) -> String {
    format!("192.0.10.7:{port}")
}

#[test]
fn both_ends_are_rewritten_both_ways() {
    for (number, vip, client, target, from, is_tcp) in [
        (36, VIP, CLIENT, TARGET, FIRST, true),
        (37, VIP, CLIENT, "10.0.11.246:5353", FIRST, false),
        (38, VIP6, CLIENT6, "[fd00:11::47]:8080", "[fd00:11::2]:20000", true),
        (39, VIP6, CLIENT6, "[fd00:11::48]:5353", "[fd00:11::2]:20000", false),
    ] {
        let opening = if is_tcp { syn(client, vip) } else { datagram(client, vip) };
        let amid = |source, destination| {
            if is_tcp { segment(source, destination) } else { datagram(source, destination) }
        };
        let (request, reply) = (amid(client, vip), amid(target, from));
        let tagged = Packet { vlans: vec![7], ..request.clone() };
        let untagged = Packet { vlans: Vec::new(), ..tagged.clone() };
        let large = Packet { payload: vec![0x5a; 1400], ..reply.clone() };
        let wrong = Packet { checksum: Checksum::Wrong, ..request.clone() };
        let wrong_output = outbound(&wrong, number, from, target);
        let numbers = (number, number);
        let out = |request: &Packet| outbound(request, number, from, target);
        run(
            &Scene::everything(),
            &[
                Step::to("the first packet", &opening, &out(&opening), numbers).with_is_new(true),
                Step::back("its answer", &reply, &inbound(&reply, vip, client), numbers),
                Step::to("what follows", &request, &out(&request), numbers),
                Step::to("known by now", &request, &out(&request), numbers),
                Step::to("tagged", &tagged, &out(&untagged), numbers),
                Step::back("a large one", &large, &inbound(&large, vip, client), numbers),
                Step::frames_to(
                    "a wrong checksum stays as wrong",
                    wrong.build(),
                    equally_wrong(&wrong, &wrong_output),
                    numbers,
                ),
            ],
        );
    }
}

#[test]
fn a_datagram_without_a_checksum_stays_so() {
    let to = "10.0.11.246:5353";
    let request = Packet { checksum: Checksum::Zero, ..datagram(CLIENT, VIP) };
    let reply = Packet { checksum: Checksum::Zero, ..datagram(to, FIRST) };
    run(
        &Scene::everything(),
        &[
            Step::to("there", &request, &outbound(&request, 37, FIRST, to), (37, 37))
                .with_is_new(true),
            Step::back("and back", &reply, &inbound(&reply, VIP, CLIENT), (37, 37)),
        ],
    );
}

/// It is a datagram like another here: its flow lives for longer than one that closes.
#[test]
fn a_quic_client_s_first_datagram_opens_a_flow() {
    let to = "10.0.11.246:5353";
    let there = |what, request: &Packet, from, is_new| {
        Step::to(what, request, &outbound(request, 37, from, to), (37, 37)).with_is_new(is_new)
    };
    in_world(&Scene::everything(), |world| {
        check(world, &there("the first", &quic_initial(CLIENT, VIP), FIRST, true));
        world.age_snat(|| Duration::from_secs(20)).unwrap();
        check(world, &there("a while later", &datagram(CLIENT, VIP), FIRST, false));
    });
}

/// The port of a connection that ends is not the next one's, not even for the same client.
#[test]
fn every_connection_has_a_port_of_its_own() {
    let amid = segment(CLIENT, VIP);
    let end = flagged(CLIENT, VIP, "FA");
    let late = segment(TARGET, FIRST);
    run(
        &Scene::everything(),
        &[
            to_36("one", &syn(CLIENT, VIP), FIRST),
            to_36("sent again", &syn(CLIENT, VIP), FIRST).with_is_new(false),
            to_36("another client", &syn(&client(4001), VIP), SECOND),
            to_36("the first goes on", &amid, FIRST),
            to_36("and ends", &end, FIRST),
            to_36("its last words", &amid, FIRST),
            to_36("the same client anew", &syn(CLIENT, VIP), "10.0.11.2:20002"),
            back_36("the old connection's last words", &late, CLIENT),
            to_36("what follows", &amid, "10.0.11.2:20002"),
        ],
    );
}

#[test]
fn what_belongs_to_no_flow_passes_untouched() {
    let to_self = |from: &str, to: &str| segment(from, to).build();
    let pass = |what, frame: Vec<u8>| Step::pass(what, frame).ingress(11);
    run(
        &Scene::everything(),
        &[
            to_36("a flow", &syn(CLIENT, VIP), FIRST),
            pass("a port without a flow", to_self(TARGET, SECOND)),
            pass("an answer to a health check", to_self(TARGET, "10.0.11.2:60001")),
            pass("from another port", to_self("10.0.11.245:8081", FIRST)),
            pass("from another host", to_self("10.0.11.244:8080", FIRST)),
            pass("another protocol", datagram(TARGET, FIRST).build()),
            pass("a target of nat", to_self("10.0.11.21:8080", FIRST)),
        ],
    );
}

/// The agent's own addresses show no service of the machine, whoever asks.
#[test]
fn an_address_that_the_agent_added_can_be_a_source() {
    let mut scene = Scene::everything();
    scene.desired.targets.get_mut(&36).unwrap().set_sources(0);
    scene.source(36, "10.0.10.100", 4, (30_000, 30_001));
    let reply = segment(TARGET, "10.0.10.100:30000");
    let unasked = segment(TARGET, "10.0.10.100:30001");
    let drop = Step::drop("none of a flow", unasked.build(), DropReason::NoListener);
    run(
        &scene,
        &[
            to_36("there", &syn(CLIENT, VIP), "10.0.10.100:30000"),
            back_36("and back", &reply, CLIENT),
            drop.ingress(11),
        ],
    );
}

#[test]
fn without_a_port_the_client_is_told() {
    let mut scene = Scene::everything();
    scene.source(37, "10.0.11.2", 5, (20_100, 20_100));
    for (key, source) in &mut scene.desired.sources {
        if [36, 37].map(|target| target * MAX_SNAT_ADDRESSES).contains(key) {
            source.last = source.first + 1;
        }
    }
    let refused = syn(&client(3), VIP);
    let datagram = |port| datagram(&client(port), VIP);
    in_world(&scene, |world| {
        check(world, &to_36("one port", &syn(&client(1), VIP), FIRST));
        check(world, &to_36("the other", &syn(&client(2), VIP), SECOND));
        let answer = reset(&refused).build();
        check(world, &Step::answer("none", refused.build(), answer, PortAllocationError));
        let mut seen = BTreeSet::new();
        for port in 1..=3 {
            let outcome = world.run(10, &datagram(port).build()).unwrap();
            assert!(seen.insert(endpoints(&outcome.frame).unwrap().0), "two addresses, 3 ports");
        }
        let refused = datagram(4);
        let answer = unreachable(&refused);
        check(world, &Step::answer("none", refused.build(), answer, PortAllocationError));

        // Opening flows are short-lived.
        world.age_snat(|| Duration::from_secs(13)).unwrap();
        world.walk_snat().unwrap();
        // The search goes on where the refused one began.
        check(world, &to_36("a port is free again", &syn(&client(3), VIP), SECOND));
    });
}

#[test]
fn a_packet_that_dies_takes_no_port() {
    let last_hop = Packet { hop_limit: 1, ..syn(CLIENT, VIP) };
    let mut scene = Scene::everything();
    scene.desired.targets.get_mut(&38).unwrap().hop.ifindex = 0;
    run(
        &scene,
        &[
            Step::drop("its last hop", last_hop.build(), TtlExceeded),
            Step::unresolved("no way", &syn(CLIENT6, VIP6), "fd00:11::47"),
            to_36("the first port is free", &syn(&client(2), VIP), FIRST),
        ],
    );
}

#[test]
fn a_silent_flow_is_forgotten_and_its_port_rests() {
    let amid = segment(CLIENT, VIP);
    let reply = segment(TARGET, FIRST);
    in_world(&Scene::everything(), |world| {
        check(world, &to_36("a connection", &syn(CLIENT, VIP), FIRST));
        check(world, &to_36("that is established", &amid, FIRST));
        world.age_snat(|| Duration::from_secs(349)).unwrap();
        world.walk_snat().unwrap();
        check(world, &back_36("within its timeout", &reply, CLIENT));
        world.age_snat(|| Duration::from_secs(352)).unwrap();
        check(world, &Step::pass("beyond it", reply.build()).ingress(11));
        check(world, &to_36("its client has another port", &amid, SECOND));
        world.walk_snat().unwrap();
        check(world, &to_36("the first rests", &syn(&client(2), VIP), "10.0.11.2:20002"));
    });
}

/// A reset by the target ends the flow for both directions.
#[test]
fn a_target_s_reset_gives_the_port_back_soon() {
    let refusal = flagged(TARGET, FIRST, "R");
    in_world(&Scene::everything(), |world| {
        check(world, &to_36("a connection", &syn(CLIENT, VIP), FIRST));
        check(world, &to_36("that is established", &segment(CLIENT, VIP), FIRST));
        check(world, &back_36("and refused", &refusal, CLIENT));
        world.age_snat(|| Duration::from_secs(13)).unwrap();
        world.walk_snat().unwrap();
        assert!(world.model.snat.pools[&0].is_empty());
    });
}

/// Every port of the range, in the kernel.
#[test]
fn fifty_thousand_flows_to_one_target() {
    let mut scene = Scene::everything();
    let source = scene.desired.sources.get_mut(&(36 * MAX_SNAT_ADDRESSES)).unwrap();
    (source.first, source.last) = (10_000, 59_999);
    let address = scene.desired.endpoints.values_mut();
    for endpoint in address.filter(|endpoint| endpoint.kind & Endpoint::SNAT != 0) {
        (endpoint.listener, endpoint.index) = (10_000, 59_999);
    }
    let mut frame = syn(CLIENT, VIP).build();
    in_world(&scene, |world| {
        let mut ports = BTreeSet::new();
        let mut open = |world: &mut World<'_>, n: u32| {
            // 192.0.10.0 and on, 1000 ports each; the checksum is none of the balancer's business.
            frame[14 + 15] = (n / 1000) as u8;
            frame[14 + 20..][..2].copy_from_slice(&(1000 + (n % 1000) as u16).to_be_bytes());
            world.run(10, &frame).unwrap()
        };
        for n in 0..50_000 {
            let outcome = open(world, n);
            assert_eq!(outcome.action, Action::Redirect, "flow {n}");
            ports.insert(endpoints(&outcome.frame).unwrap().0);
        }
        assert_eq!(ports.len(), 50_000);
        assert_eq!(open(world, 50_000).action, Action::Transmit, "refused");
        assert_eq!(world.counts().unwrap().drops, [(PortAllocationError, 1)].into());
    });
}
