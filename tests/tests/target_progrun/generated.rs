//! Host against kernel on generated frames, in and out.

use std::collections::BTreeSet;
use std::env;

use etherparse::{IcmpEchoHeader, Icmpv4Type, Icmpv6Type, ip_number};
use lb_common::verdict::DropReason;
use lb_tests::{packets::Packet, progrun::Action};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

use super::frames::*;
use super::world;

const FRAMES: u32 = 50_000;
/// The kernel runs no traffic control program on less than an Ethernet and an IP header.
const LEAST_OUT: usize = 14 + 40;
/// Frames between two looks at counters and flows.
const BATCH: u32 = 2_000;

const V4: [&str; 6] =
    ["10.0.2.11", "10.0.2.100", "10.0.2.1", "192.0.2.7", "198.51.100.7", "172.16.3.4"];
const V6: [&str; 6] =
    ["fd00:2::11", "fd00:2::100", "fd00:2::1", "2001:db8:2::7", "2001:db8:9::7", "100::3:4"];
const PORTS: [u16; 8] = [22, 53, 80, 5353, 6080, 67, 68, 50_000];
const FLAGS: [&str; 6] = ["S", "SA", "A", "FA", "R", "RA"];

/// The seed is fixed so that a change is judged by what it changes; `LB_SEED` chooses another one.
#[test]
fn host_and_kernel_agree() {
    let seed = env::var("LB_SEED").map_or(1, |text| text.parse().unwrap());
    println!("LB_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut world = world();
    let mut seen = BTreeSet::new();
    for n in 0..FRAMES {
        let frame = damaged(&mut rng);
        let at = || format!("LB_SEED={seed}, frame {n}");
        if rng.random_bool(0.3) && frame.len() >= LEAST_OUT {
            world.goes_out(&frame).unwrap_or_else(|error| panic!("{}: {error}", at()));
        } else {
            let (action, output) =
                world.comes_in(&frame).unwrap_or_else(|e| panic!("{}: {e}", at()));
            seen.insert((action, output.len() < frame.len()));
        }
        if n % BATCH == BATCH - 1 {
            world.check_flows().unwrap_or_else(|error| panic!("{}: {error}", at()));
            world.counts().unwrap_or_else(|error| panic!("{}: {error}", at()));
        }
    }
    // Agreement over nothing proves nothing.
    let (drops, unwrapped) = world.counts().unwrap();
    let (own, admitted) = world.check_flows().unwrap();
    println!("{drops:?} {unwrapped:?}, {own} own flows, {admitted} admitted");
    assert!(seen.contains(&(Action::Pass, false)) && seen.contains(&(Action::Pass, true)));
    for reason in [DropReason::SecurityGroupDenied, DropReason::Malformed, DropReason::Fragmented] {
        assert!(drops.get(&reason).is_some_and(|count| *count > 50), "{reason:?} in {drops:?}");
    }
    assert!(unwrapped.packets > 500 && own > 100 && admitted > 20);
}

/// A frame, most often as it should be.
fn damaged(rng: &mut StdRng) -> Vec<u8> {
    let mut frame = frame(rng);
    if rng.random_bool(0.2) {
        for _ in 0..rng.random_range(1..3) {
            let at = rng.random_range(12..frame.len());
            frame[at] = rng.random();
        }
    }
    if rng.random_bool(0.1) {
        frame.truncate(rng.random_range(14..=frame.len()));
    }
    frame
}

fn frame(rng: &mut StdRng) -> Vec<u8> {
    let is_v4 = rng.random();
    let hosts = if is_v4 { V4 } else { V6 };
    let mut host = || *hosts.choose(rng).unwrap();
    let (source, destination) = (host(), host());
    let echo = IcmpEchoHeader { id: rng.random_range(0..3), seq: 1 };
    match rng.random_range(0..10) {
        0 => in_ip(source, destination, ip_number::GRE, &[0; 8]),
        1 => icmp(
            source,
            destination,
            Icmpv4Type::EchoRequest(echo),
            Icmpv6Type::EchoRequest(echo),
            b"abc",
        ),
        2 => icmp(
            source,
            destination,
            Icmpv4Type::EchoReply(echo),
            Icmpv6Type::EchoReply(echo),
            b"abc",
        ),
        3 => {
            let quoted = ip_packet(&packet(rng, is_v4));
            let kind = rng.random_range(0..16);
            icmp(
                source,
                destination,
                Icmpv4Type::Unknown { type_u8: kind, code_u8: 0, bytes5to8: [0; 4] },
                Icmpv6Type::Unknown { type_u8: kind, code_u8: 0, bytes5to8: [0; 4] },
                &quoted,
            )
        }
        4 if is_v4 => fragment(source, destination, ip_number::TCP, rng.random_range(0..3)),
        5 | 6 => {
            let inner_v4 = rng.random();
            let inner = packet(rng, inner_v4);
            tunnelled(rng, is_v4, &inner)
        }
        _ => packet(rng, is_v4).build(),
    }
}

/// In a tunnel from a load balancer to the target, most often.
fn tunnelled(rng: &mut StdRng, is_v4: bool, inner: &Packet) -> Vec<u8> {
    let hosts = if is_v4 { V4 } else { V6 };
    let source = if rng.random_bool(0.7) { hosts[5] } else { hosts.choose(rng).unwrap() };
    let destination = if rng.random_bool(0.8) { hosts[0] } else { hosts.choose(rng).unwrap() };
    if rng.random() {
        let mut frame = ipip(source, destination, inner);
        if is_v4 && rng.random_bool(0.3) && inner.vlans.is_empty() {
            frame[20] = 0x20;
        }
        return frame;
    }
    let with = |address: &str, port| std::net::SocketAddr::new(address.parse().unwrap(), port);
    gue(&with(source, 50_000).to_string(), &with(destination, 6080).to_string(), inner)
}

fn packet(rng: &mut StdRng, is_v4: bool) -> Packet {
    let hosts = if is_v4 { V4 } else { V6 };
    let mut end = || {
        let address = hosts.choose(rng).unwrap().parse().unwrap();
        std::net::SocketAddr::new(address, *PORTS.choose(rng).unwrap()).to_string()
    };
    let (source, destination) = (end(), end());
    let mut packet = if rng.random() {
        tcp(&source, &destination, FLAGS.choose(rng).unwrap())
    } else {
        udp(&source, &destination)
    };
    if rng.random_bool(0.3) {
        packet = balanced(packet);
    }
    packet.vlans = vec![7; rng.random_range(0..3)];
    packet.payload.resize(rng.random_range(0..40), 7);
    if is_v4 && rng.random_bool(0.1) {
        packet.ipv4_options = vec![1; 4];
    }
    packet
}
