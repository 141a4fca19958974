//! Errors about flows, expected by etherparse and by what a packet of the same flow meets. The program
//! in the kernel has fixtures of its own, in lb-tests.

use std::net::IpAddr;
use std::vec::Vec;

use etherparse::{
    Icmpv4Type, Icmpv6Type, NetSlice, PacketBuilder, SlicedPacket, TransportSlice,
    icmpv4::DestUnreachableHeader,
};

use crate::flow::{Flow, SECOND, UDP};
use crate::forward::forward;
use crate::model::{Bytes, Model};
use crate::tables::{Listener, NextHop, Slot, SlotState};

use super::*;

const NIC: u32 = 3;
const TARGETS: u32 = 7;
const SLOTS: u32 = 61;

fn vip(is_v4: bool) -> IpAddr {
    if is_v4 { [10, 0, 1, 100].into() } else { "fd00:1::100".parse().unwrap() }
}

fn client(is_v4: bool) -> IpAddr {
    if is_v4 { [192, 0, 2, 7].into() } else { "2001:db8::7".parse().unwrap() }
}

fn target(is_v4: bool, n: u32) -> IpAddr {
    if is_v4 { [10, 0, 9, n as u8].into() } else { std::format!("fd00:9::{n:x}").parse().unwrap() }
}

/// Port 80 of both protocols, in front of seven targets; slots in this state, of which every third
/// had another target before.
fn balancer(is_v4: bool, state: SlotState, flags: u8) -> Model {
    let mut model = Model::new(7, SLOTS);
    model.now.set(1000 * SECOND);
    for n in 1..=TARGETS {
        let target = Target {
            address: target(is_v4, n).into(),
            port: Be16::new(8080),
            mode: Target::NAT,
            flags: Target::SERVES | Target::IN_RING,
            hop: NextHop { ifindex: NIC, mtu: 1500, ..NextHop::default() },
            ..Target::default()
        };
        model.targets.insert(n, target);
    }
    let slot = |n: u32| {
        let current = 1 + n % TARGETS;
        let previous = 1 + (n + n.is_multiple_of(3) as u32) % TARGETS;
        if state == SlotState::Settled {
            Slot::settled(current)
        } else {
            Slot::new(current, previous, state)
        }
    };
    model.rings.insert(0, (0..SLOTS).map(slot).collect());
    for (number, protocol) in [(1, TCP), (2, UDP)] {
        let (address, port) = (vip(is_v4).into(), Be16::new(80));
        let idle = flow::TCP_IDLE;
        let listener = Listener { address, port, protocol, idle, ..Listener::default() };
        model.listeners.insert(number, listener);
        model.endpoints.insert(Endpoint {
            address,
            port,
            protocol,
            kind: Endpoint::LISTENER | flags,
            listener: number,
            ..Endpoint::default()
        });
    }
    model
}

fn packet(protocol: u8, from: (IpAddr, u16), to: (IpAddr, u16)) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let ip = match (from.0, to.0) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            ethernet.ipv4(source.octets(), destination.octets(), 64)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            ethernet.ipv6(source.octets(), destination.octets(), 64)
        }
        _ => unreachable!("one family"),
    };
    let mut frame = Vec::new();
    if protocol == TCP {
        ip.tcp(from.1, to.1, 1, 1024).ack(1).write(&mut frame, b"hello").unwrap();
    } else {
        ip.udp(from.1, to.1).write(&mut frame, b"hello").unwrap();
    }
    frame
}

/// An error about a packet, from its destination.
fn error(quoted: &[u8], from: IpAddr, to: IpAddr) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let mut frame = Vec::new();
    match (from, to) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let header = DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1400 };
            let ip = ethernet.ipv4(source.octets(), destination.octets(), 64);
            ip.icmpv4(Icmpv4Type::DestinationUnreachable(header)).write(&mut frame, &quoted[14..])
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let ip = ethernet.ipv6(source.octets(), destination.octets(), 64);
            ip.icmpv6(Icmpv6Type::PacketTooBig { mtu: 1400 }).write(&mut frame, &quoted[14..])
        }
        _ => unreachable!("one family"),
    }
    .unwrap();
    frame
}

fn run(model: &Model, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
    let mut frame = Bytes { bytes, ingress: NIC };
    let verdict = forward(&mut frame, model);
    (verdict, frame.bytes)
}

fn destination(frame: &[u8]) -> IpAddr {
    match SlicedPacket::from_ethernet(frame).unwrap().net.unwrap() {
        NetSlice::Ipv4(ip) => ip.header().destination_addr().into(),
        NetSlice::Ipv6(ip) => ip.header().destination_addr().into(),
        NetSlice::Arp(_) => unreachable!("IP"),
    }
}

/// The packet that the error quotes, if the checksums are right.
fn quoted(frame: &[u8]) -> Vec<u8> {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    match (packet.net.unwrap(), packet.transport.unwrap()) {
        (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            assert_eq!(icmp.checksum(), icmp.icmp_type().calc_checksum(icmp.payload()));
            icmp.payload().to_vec()
        }
        (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
            let (from, to) = (ip.header().source(), ip.header().destination());
            let right = icmp.icmp_type().calc_checksum(from, to, icmp.payload()).unwrap();
            assert_eq!(icmp.checksum(), right);
            icmp.payload().to_vec()
        }
        other => panic!("{other:?}"),
    }
}

/// The heart of it: an error goes where a packet of its flow goes, quoting what that target sent.
#[test]
fn an_error_follows_its_flow() {
    use SlotState::{Learning, LearningTcp, Pinned, Settled};
    for is_v4 in [true, false] {
        for state in [Settled, Learning, LearningTcp, Pinned] {
            for flags in [0, Endpoint::BY_SOURCE, Endpoint::TRACKED] {
                for port in 1000..1060 {
                    let protocol = if port % 2 == 0 { TCP } else { UDP };
                    let (client, vip) = ((client(is_v4), port), (vip(is_v4), 80));
                    let model = balancer(is_v4, state, flags);
                    let reply = packet(protocol, vip, client);
                    let (verdict, delivered) = run(&model, error(&reply, client.0, vip.0));
                    assert_eq!(verdict, Verdict::Transmit);
                    assert_eq!(model.remembered(), 0, "nothing is remembered by an error");

                    let (_, request) = run(&model, packet(protocol, client, vip));
                    let to = destination(&request);
                    assert_eq!(destination(&delivered), to, "{state:?} {flags:#x} {port}");
                    assert!(quoted(&delivered) == packet(protocol, (to, 8080), client)[14..]);
                }
            }
        }
    }
}

/// The other way.
#[test]
fn an_error_from_behind_comes_to_the_client() {
    for is_v4 in [true, false] {
        for protocol in [TCP, UDP] {
            let mut model = balancer(is_v4, SlotState::Settled, 0);
            let target = (target(is_v4, 1), 8080);
            model.endpoints.insert(Endpoint {
                address: target.0.into(),
                port: Be16::new(target.1),
                protocol,
                kind: Endpoint::TARGET,
                listener: if protocol == TCP { 1 } else { 2 },
                index: 1,
                class: 0,
            });
            let (client, vip) = ((client(is_v4), 4000), (vip(is_v4), 80));
            let hop = NextHop { ifindex: NIC, mtu: 1500, ..NextHop::default() };
            model.routes.insert(client.0.into(), hop);
            let seen = packet(protocol, client, target);
            let (verdict, returned) = run(&model, error(&seen, target.0, client.0));
            assert_eq!(verdict, Verdict::Transmit);
            assert_eq!(destination(&returned), client.0);
            assert!(quoted(&returned) == packet(protocol, client, vip)[14..]);

            // A client that talks to the target itself.
            let direct = run(&model, packet(protocol, client, target));
            assert_eq!(direct.0, Verdict::Pass);
            let unchanged = error(&seen, target.0, client.0);
            assert_eq!(run(&model, unchanged.clone()), (Verdict::Pass, unchanged));
        }
    }
}

/// A dead target of a remembered flow: the error dies too, and is not answered by another error.
#[test]
fn a_dead_target_hears_nothing() {
    let mut model = balancer(true, SlotState::Pinned, 0);
    model.targets.get_mut(&4).unwrap().flags = 0;
    let (client, vip) = ((client(true), 4000), (vip(true), 80));
    let key = FlowKey {
        source: client.0.into(),
        destination: vip.0.into(),
        source_port: Be16::new(client.1),
        destination_port: Be16::new(vip.1),
        protocol: TCP,
        zero: [0; 3],
    };
    let flow = Flow { last_seen: model.now.get(), target: 4, closing: 0 };
    model.remember(FlowTable::Flows, &key, &flow);
    let (verdict, _) = run(&model, error(&packet(TCP, vip, client), client.0, vip.0));
    assert_eq!(verdict, Verdict::Drop);
    assert_eq!(*model.drops.borrow(), [(DropReason::TargetDown, 1)].into());
}
