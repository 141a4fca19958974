//! Packets to listeners whose connections end in the agent's proxy.

use lb_common::tables::{OPEN, Target};
use lb_common::verdict::DropReason::{Fragmented, Malformed, NoListener, SecurityGroupDenied};
use lb_tests::scene::{PROXY_VIPS, Way};

use super::*;

const CLIENT: &str = "192.0.10.7:4000";
const CLIENT6: &str = "[2001:db8:10::7]:4000";
const STRANGER: &str = "192.0.9.7:4000";
const STRANGER6: &str = "[2001:db8:9::7]:4000";
const VIP: &str = "10.0.10.110:443";
const VIP6: &str = "[fd00:10::110]:443";
const GUARDED: &str = "10.0.10.111:80";
const GUARDED6: &str = "[fd00:10::111]:80";

#[test]
fn they_are_counted_and_pass() {
    let tagged = Packet { vlans: vec![7], ..segment(CLIENT, VIP) };
    let options = Packet { ipv4_options: vec![1; 8], ..syn(CLIENT, VIP) };
    let last_hop = Packet { hop_limit: 1, ..segment(CLIENT, VIP) };
    run(
        &Scene::everything(),
        &[
            Step::proxied("a SYN", &syn(CLIENT, VIP), 120),
            Step::proxied("a segment", &segment(CLIENT, VIP), 120),
            Step::proxied("a SYN over IPv6", &syn(CLIENT6, VIP6), 121),
            Step::proxied("a segment over IPv6", &segment(CLIENT6, VIP6), 121),
            Step::proxied("a FIN", &flagged(CLIENT, VIP, "FA"), 120),
            Step::proxied("a reset", &flagged(CLIENT6, VIP6, "R"), 121),
            Step::proxied("a client that is a target", &segment("10.0.11.21:8080", VIP), 120)
                .ingress(11),
            Step::proxied("tagged", &tagged, 120),
            Step::proxied("with IP options", &options, 120),
            Step::proxied("on its last hop: it is there", &last_hop, 120),
        ],
    );
}

#[test]
fn the_security_group_decides() {
    let denied = |what, packet: Packet| Step::drop(what, packet.build(), SecurityGroupDenied);
    run(
        &Scene::everything(),
        &[
            Step::proxied("admitted", &syn(CLIENT, GUARDED), 122),
            Step::proxied("admitted, later on", &segment(CLIENT, GUARDED), 122),
            Step::proxied("admitted over IPv6", &syn(CLIENT6, GUARDED6), 123),
            denied("a SYN", syn(STRANGER, GUARDED)),
            denied("a segment", segment(STRANGER, GUARDED)),
            denied("a SYN over IPv6", syn(STRANGER6, GUARDED6)),
            denied("tagged", Packet { vlans: vec![7, 8], ..segment(STRANGER6, GUARDED6) }),
        ],
    );
}

#[test]
fn other_ports_of_their_addresses_are_closed() {
    run(
        &Scene::everything(),
        &[
            Step::drop("another port", syn(CLIENT, "10.0.10.110:80").build(), NoListener),
            Step::drop("over IPv6", syn(CLIENT6, "[fd00:10::110]:80").build(), NoListener),
            Step::drop("UDP", datagram(CLIENT, VIP).build(), NoListener),
            Step::pass("replies to the proxy", segment("10.0.11.21:8080", "10.0.11.2:443").build())
                .ingress(11),
            Step::pass("over IPv6", segment("[fd00:11::23]:8080", "[fd00:11::2]:443").build())
                .ingress(11),
            Step::pass(
                "to an address that clients of targets may have, too",
                segment("10.0.11.245:8080", "10.0.11.2:19000").build(),
            )
            .ingress(11),
        ],
    );
}

/// The kernel puts fragments together. Only first ones say what port they are for.
#[test]
fn fragments_pass_if_their_senders_may() {
    let part = |from, to, offset: u16, more| {
        with_ipv4(segment(from, to).build(), |header| {
            header.fragment_offset = offset.try_into().unwrap();
            header.more_fragments = more;
        })
    };
    let six = |from, to, offset_more: u16| {
        let mut frame = segment(from, to).build();
        let [high, low] = offset_more.to_be_bytes();
        frame.splice(54..54, [6, 0, high, low, 1, 2, 3, 4]);
        frame[20] = 44;
        let payload = (frame.len() - 54) as u16;
        patched(frame, 18, &payload.to_be_bytes())
    };
    let first = |what, frame: Vec<u8>, listener| {
        Step::new(what, frame, Expect::Proxied { listener, is_new: false })
    };
    let cut = {
        let frame = part(CLIENT, VIP, 0, true);
        with_ipv4(frame[..14 + 20 + 16].to_vec(), |header| header.total_len = 36)
    };
    let datagram = with_ipv4(datagram(CLIENT, VIP).build(), |header| {
        header.fragment_offset = 5.try_into().unwrap();
    });
    run(
        &Scene::everything(),
        &[
            first("the first", part(CLIENT, VIP, 0, true), 120),
            first("the first over IPv6", six(CLIENT6, VIP6, 1), 121),
            Step::pass("a middle one", part(CLIENT, VIP, 5, true)),
            Step::pass("the last", part(CLIENT, VIP, 5, false)),
            Step::pass("a middle one over IPv6", six(CLIENT6, VIP6, 5 << 3 | 1)),
            Step::pass("the last over IPv6", six(CLIENT6, VIP6, 5 << 3)),
            Step::drop("a first one that ends in TCP's header", cut, Fragmented),
            Step::drop("a datagram's", datagram, Fragmented),
            first("the first, admitted", part(CLIENT, GUARDED, 0, true), 122),
            Step::pass("the last, admitted", part(CLIENT, GUARDED, 5, false)),
            Step::pass("the last, admitted over IPv6", six(CLIENT6, GUARDED6, 5 << 3)),
            Step::drop("the first", part(STRANGER, GUARDED, 0, true), SecurityGroupDenied),
            Step::drop("the last", part(STRANGER, GUARDED, 5, false), SecurityGroupDenied),
            Step::drop("over IPv6", six(STRANGER6, GUARDED6, 5 << 3), SecurityGroupDenied),
            Step::drop(
                "nothing proxied there",
                part(CLIENT, "10.0.10.100:80", 5, false),
                Fragmented,
            ),
            Step::drop(
                "a header that is cut off",
                segment(CLIENT, VIP).build()[..14 + 20 + 16].to_vec(),
                Malformed,
            ),
        ],
    );
}

/// What the proxy's connections to a target and the balanced ones of the same target have in common
/// is the target's address and port.
#[test]
fn a_target_of_both_kinds_of_listeners() {
    let mut scene = Scene::new();
    scene.address(PROXY_VIPS[0], Endpoint::OWNED);
    scene.target(1, Target::NAT, "10.0.11.21:8080", Way::by(11));
    scene.listener(1, 6, "10.0.10.110:8080", &[lb_common::tables::Slot::settled(1)]);
    scene.proxied_listener(2, VIP, OPEN);
    let request = syn(CLIENT, "10.0.10.110:8080");
    let reply = segment("10.0.11.21:8080", CLIENT);
    run(
        &scene,
        &[
            Step::to("balanced", &request, &translated(&request, 1, "10.0.11.21:8080"), (1, 1)),
            Step::back("back", &reply, &restored(&reply, "10.0.10.110:8080", 10), (1, 1)),
            Step::proxied("proxied", &syn(CLIENT, VIP), 2),
            Step::pass("the proxy's", segment("10.0.11.21:8080", "10.0.11.2:40000").build())
                .ingress(11),
            Step::pass(
                "also from the load balancer's own address",
                segment("10.0.11.21:8080", "10.0.10.110:40000").build(),
            )
            .ingress(11),
        ],
    );
}
