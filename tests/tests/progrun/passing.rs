//! What is none of ours passes untouched.

use etherparse::{ArpPacket, Icmpv4Type, Icmpv6Type, PacketBuilder};
use lb_common::verdict::DropReason;
use lb_tests::packets::OUR_MAC;

use super::*;

const CLIENT: &str = "192.0.10.7:4000";
const CLIENT6: &str = "[2001:db8:10::7]:4000";

fn frame<E: std::fmt::Debug>(write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Vec<u8> {
    let mut frame = Vec::new();
    write(&mut frame).unwrap();
    frame
}

fn icmp(kind: Icmpv4Type) -> Vec<u8> {
    let builder =
        PacketBuilder::ethernet2([2; 6], OUR_MAC).ipv4([203, 0, 113, 1], [10, 0, 10, 100], 64);
    frame(|f| builder.icmpv4(kind).write(f, &[0x45; 28]))
}

fn icmp6(source: &str, kind: Icmpv6Type) -> Vec<u8> {
    let [source, destination] =
        [source, "fd00:10::100"].map(|text| text.parse::<std::net::Ipv6Addr>().unwrap().octets());
    let builder = PacketBuilder::ethernet2([2; 6], OUR_MAC).ipv6(source, destination, 255);
    frame(|f| builder.icmpv6(kind).write(f, &[0x60; 48]))
}

fn arp() -> Vec<u8> {
    let request = ArpPacket::new(
        etherparse::ArpHardwareId::ETHERNET,
        etherparse::EtherType::IPV4,
        etherparse::ArpOperation::REQUEST,
        &[2; 6],
        &[10, 0, 10, 1],
        &[0; 6],
        &[10, 0, 10, 100],
    );
    let builder = PacketBuilder::ethernet2([2; 6], [0xff; 6]).arp(request.unwrap());
    frame(|f| builder.write(f))
}

#[test]
fn what_is_not_ours_passes() {
    let unreachable = icmp(Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port));
    let too_big = icmp6("2001:db8:ffff::1", Icmpv6Type::PacketTooBig { mtu: 1400 });
    let solicitation = {
        let mut frame =
            icmp6("fe80::1", Icmpv6Type::EchoReply(etherparse::IcmpEchoHeader { id: 0, seq: 0 }));
        frame[54] = 135;
        frame
    };
    let tcp = segment(CLIENT, "10.0.10.100:80").build();
    let mut three_tags = Packet { vlans: vec![1, 2], ..segment(CLIENT, "10.0.10.100:80") }.build();
    three_tags.splice(12..12, [0x81, 0, 0, 9]);
    let sctp = with_ipv4(tcp.clone(), |header| header.protocol = 132.into());
    run(
        &Scene::everything(),
        &[
            Step::pass("ARP", arp()),
            Step::pass("a neighbour solicitation", solicitation),
            Step::pass("ICMP errors, whoever sends them", unreachable),
            Step::pass("packet too big", too_big),
            Step::pass("another protocol to our address", sctp),
            Step::pass("a port of another address", segment(CLIENT, "10.0.10.2:22").build()),
            Step::pass("forwarded traffic", segment(CLIENT, "198.51.100.1:80").build()),
            Step::pass("forwarded IPv6", datagram(CLIENT6, "[2001:db8:ffff::1]:53").build()),
            Step::pass(
                "the listener's port in another protocol elsewhere",
                datagram(CLIENT, "10.0.10.2:80").build(),
            ),
            Step::pass("another port of a target", segment("10.0.11.21:22", CLIENT).build())
                .ingress(11),
            Step::pass(
                "a target's port in another protocol",
                datagram("10.0.11.21:8080", CLIENT).build(),
            )
            .ingress(11),
            Step::pass("an unknown EtherType", patched(tcp.clone(), 12, &[0x88, 0xcc])),
            Step::pass(
                "a frame that ends in its tag",
                tcp[..14].iter().copied().chain([0x81; 2]).collect::<Vec<_>>(),
            ),
            Step::pass("a bare Ethernet header", tcp[..14].to_vec()),
            Step::pass("a frame that ends in its IP header", tcp[..30].to_vec()),
            Step::pass("an IP header of another version", patched(tcp.clone(), 14, &[0x65])),
            Step::pass("an IP header that is too short", patched(tcp.clone(), 14, &[0x44])),
            Step::pass("three tags", three_tags),
        ],
    );
}

/// What a switch floods because it does not know where the receiver is.
#[test]
fn frames_for_other_machines_pass() {
    let to_other = |packet: Packet| Packet { destination_mac: [2, 0, 0, 0, 0, 3], ..packet };
    let to = |mac, packet: Packet| Packet { destination_mac: mac, ..packet };
    let request = segment(CLIENT, "10.0.10.100:80");
    let tagged = Packet { vlans: vec![100], ..request.clone() };
    let sent = Packet { destination: at("10.0.11.21:8080"), ..request.clone() };
    let reply = segment("10.0.11.21:8080", CLIENT);
    let everybody = [0xff; 6];
    let mut scene = Scene::everything();
    let steps = [
        Step::pass("a request", to_other(request.clone()).build()),
        Step::pass("a tagged one", to_other(tagged).build()),
        Step::pass("over IPv6", to_other(segment(CLIENT6, "[fd00:10::100]:80")).build()),
        Step::pass("UDP", to_other(datagram(CLIENT, "10.0.10.100:53")).build()),
        Step::pass("a forbidden one", to_other(segment(CLIENT, "10.0.10.100:22")).build()),
        Step::pass("a reply", to_other(reply.clone()).build()).ingress(11),
        Step::pass("to a target itself", to_other(sent).build()),
        // The kernel would hand these to its sockets.
        Step::drop(
            "a group's frame to a closed port",
            to(everybody, segment(CLIENT, "10.0.10.100:22")).build(),
            DropReason::NoListener,
        ),
    ];
    run(&scene, &steps);

    scene.desired.own_macs.remove(&11);
    let back = restored(&reply, "10.0.10.100:80", 10);
    let other = to_other(reply);
    run(&scene, &[Step::back("the NIC has other addresses too", &other, &back, (1, 1))]);
}

/// An IPv4 address in an IPv6 header must not be taken for IPv4: it would pass by the rules of the
/// other family.
#[test]
fn mapped_addresses_on_the_wire_are_not_ours() {
    let with = |source: &str, destination: &str| {
        let octets = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
        let builder =
            PacketBuilder::ethernet2([2; 6], OUR_MAC).ipv6(octets(source), octets(destination), 64);
        frame(|f| builder.tcp(4000, 80, 1, 1024).write(f, b""))
    };
    let reply = {
        let frame = with("::ffff:10.0.11.21", "2001:db8:10::7");
        patched(frame, 54, &8080_u16.to_be_bytes())
    };
    run(
        &Scene::everything(),
        &[
            Step::pass("as the destination", with("2001:db8:10::7", "::ffff:10.0.10.100")),
            Step::pass("as the source", with("::ffff:192.0.10.7", "fd00:10::100")),
            Step::pass("as a target", reply).ingress(11),
        ],
    );
}

/// Trap: our own health checks come back from the targets' ports.
#[test]
fn replies_to_ourselves_are_not_rewritten() {
    run(
        &Scene::everything(),
        &[
            Step::pass(
                "a health check's SYN-ACK",
                flagged("10.0.11.21:8080", "10.0.11.2:40000", "SA").build(),
            )
            .ingress(11),
            Step::pass(
                "to an address that we added",
                segment("10.0.11.21:8080", "10.0.10.100:40000").build(),
            )
            .ingress(11),
            Step::pass("over IPv6", segment("[fd00:11::23]:8080", "[fd00:11::2]:40000").build())
                .ingress(11),
            Step::pass("UDP", datagram("10.0.11.22:5353", "10.0.11.2:40000").build()).ingress(11),
        ],
    );
}
