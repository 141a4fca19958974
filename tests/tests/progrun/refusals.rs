//! Packets that die, and what their senders hear of it.

use etherparse::{Ipv6Extensions, Ipv6RawExtHeader, ip_number};
use lb_common::verdict::DropReason::{
    Fragmented, Malformed, NoListener, NoTarget, SecurityGroupDenied, TargetDown,
};
use lb_tests::packets::Packet;

use super::*;

const CLIENT: &str = "192.0.10.7:4000";
const CLIENT6: &str = "[2001:db8:10::7]:4000";

fn refused(what: &'static str, packet: &Packet) -> Step {
    Step::answer(what, packet.build(), reset(packet).build(), NoTarget)
}

fn quoted(what: &'static str, packet: &Packet) -> Step {
    Step::answer(what, packet.build(), unreachable(packet), NoTarget)
}

#[test]
fn without_a_target_tcp_is_reset() {
    let (vip, vip6) = ("10.0.10.100:85", "[fd00:10::100]:85");
    let data = |packet| Packet { payload: vec![7; 999], ..packet };
    let wrapping = {
        let mut packet = data(flagged(CLIENT, vip, ""));
        if let Transport::Tcp(header) = &mut packet.transport {
            header.sequence_number = u32::MAX - 2;
        }
        packet
    };
    let with_options = {
        let mut packet = syn(CLIENT, vip);
        if let Transport::Tcp(header) = &mut packet.transport {
            header.set_options_raw(&[2, 4, 5, 0xb4, 1, 3, 3, 7]).unwrap();
        }
        packet
    };
    let ip_options = Packet { ipv4_options: vec![1; 8], ..segment(CLIENT, vip) };
    let raw = Ipv6RawExtHeader::new_raw(ip_number::TCP, &[0; 6]).unwrap();
    let extension = Packet {
        ipv6_extensions: Ipv6Extensions { hop_by_hop_options: Some(raw), ..Default::default() },
        ..syn(CLIENT6, vip6)
    };
    let tagged = Packet { vlans: vec![7], ..syn(CLIENT, vip) };
    let twice = Packet { vlans: vec![7, 8], ..segment(CLIENT6, vip6) };
    let padded = [flagged(CLIENT, vip, "S").build(), vec![0xee; 6]].concat();
    run(
        &Scene::everything(),
        &[
            refused("a SYN", &syn(CLIENT, vip)),
            refused("a SYN over IPv6", &syn(CLIENT6, vip6)),
            refused("a SYN with TCP options", &with_options),
            refused("a SYN with data", &data(syn(CLIENT, vip))),
            refused("a segment with ACK", &segment(CLIENT, vip)),
            refused("a segment with ACK over IPv6", &segment(CLIENT6, vip6)),
            refused("data without ACK", &data(flagged(CLIENT, vip, ""))),
            refused("numbers that wrap around", &wrapping),
            refused("a FIN without ACK", &flagged(CLIENT, vip, "F")),
            refused("a FIN with ACK", &flagged(CLIENT6, vip6, "FA")),
            refused("IP options are not sent back", &ip_options),
            refused("extension headers are not sent back", &extension),
            refused("a tag is kept", &tagged),
            refused("two tags are kept", &twice),
            Step::answer("padding is no data", padded, reset(&syn(CLIENT, vip)).build(), NoTarget),
            Step::drop("a reset is not answered", flagged(CLIENT, vip, "R").build(), NoTarget),
            Step::drop("a reset with ACK neither", flagged(CLIENT6, vip6, "RA").build(), NoTarget),
        ],
    );
}

#[test]
fn without_a_target_udp_is_unreachable() {
    let (vip, vip6) = ("10.0.10.100:85", "[fd00:10::100]:85");
    let empty = Packet { payload: Vec::new(), ..datagram(CLIENT, vip) };
    let large = Packet { payload: vec![3; 1472], ..datagram(CLIENT, vip) };
    let tagged = Packet { vlans: vec![7], ..datagram(CLIENT6, vip6) };
    let twice = Packet { vlans: vec![7, 8], ..datagram(CLIENT, vip) };
    let options = Packet { ipv4_options: vec![1; 4], ..datagram(CLIENT, vip) };
    let raw = Ipv6RawExtHeader::new_raw(ip_number::UDP, &[0; 6]).unwrap();
    let extension = Packet {
        ipv6_extensions: Ipv6Extensions { destination_options: Some(raw), ..Default::default() },
        ..datagram(CLIENT6, vip6)
    };
    run(
        &Scene::everything(),
        &[
            quoted("a datagram", &datagram(CLIENT, vip)),
            quoted("a datagram over IPv6", &datagram(CLIENT6, vip6)),
            quoted("an empty datagram", &empty),
            quoted("a large one", &large),
            quoted("a tag is kept", &tagged),
            quoted("two tags are kept", &twice),
            Step::drop("options are not quoted", options.build(), NoTarget),
            Step::drop("extension headers are not quoted", extension.build(), NoTarget),
        ],
    );
}

#[test]
fn a_target_that_no_longer_serves() {
    let tcp = segment(CLIENT, "10.0.10.100:88");
    let opening = syn(CLIENT, "10.0.10.100:88");
    let udp6 = datagram(CLIENT6, "[fd00:10::100]:88");
    run(
        &Scene::everything(),
        &[
            Step::answer("TCP is reset", tcp.build(), reset(&tcp).build(), TargetDown),
            Step::answer("a SYN too", opening.build(), reset(&opening).build(), TargetDown),
            Step::answer("UDP is unreachable", udp6.build(), unreachable(&udp6), TargetDown),
        ],
    );
}

#[test]
fn security_groups() {
    let (vip, vip6) = ("10.0.10.100:84", "[fd00:10::100]:84");
    let to9 = |from| {
        let request = syn(from, vip);
        Step::to("admitted", &request, &translated(&request, 9, "10.0.11.29:8080"), (9, 9))
    };
    let to19 = |from| {
        let request = segment(from, vip6);
        Step::to("admitted", &request, &translated(&request, 19, "[fd00:11::39]:8080"), (19, 19))
    };
    let denied = |from| Step::drop("denied", segment(from, vip).build(), SecurityGroupDenied);
    let denied6 = |from| Step::drop("denied", syn(from, vip6).build(), SecurityGroupDenied);
    let fragment =
        |from| with_ipv4(segment(from, vip).build(), |header| header.more_fragments = true);
    run(
        &Scene::everything(),
        &[
            to9("192.0.10.0:1"),
            to9("192.0.10.255:65535"),
            to9("192.0.11.7:4000"),
            to19("[2001:db8:10::]:1"),
            to19("[2001:db8:10:0:ffff:ffff:ffff:ffff]:1"),
            denied("192.0.9.255:4000"),
            denied("192.0.11.0:4000"),
            denied("192.0.11.6:4000"),
            denied("192.0.11.8:4000"),
            denied("0.0.0.0:4000"),
            denied6("[2001:db8:9:ffff:ffff:ffff:ffff:ffff]:1"),
            denied6("[2001:db8:10:1::]:1"),
            denied6("[::192.0.10.7]:1"),
            Step::drop("a denied fragment", fragment("192.0.9.1:1"), SecurityGroupDenied),
            Step::drop("an admitted fragment", fragment("192.0.10.1:1"), Fragmented),
        ],
    );
}

#[test]
fn our_addresses_show_nothing_but_listeners() {
    let dead = |what, packet: &Packet| Step::drop(what, packet.build(), NoListener);
    let fragment = with_ipv4(segment(CLIENT, "10.0.10.100:22").build(), |header| {
        header.fragment_offset = 100.try_into().unwrap();
    });
    run(
        &Scene::everything(),
        &[
            dead("a port without listener", &syn(CLIENT, "10.0.10.100:22")),
            dead("over IPv6", &syn(CLIENT6, "[fd00:10::100]:22")),
            dead("in a VLAN", &Packet { vlans: vec![7], ..segment(CLIENT, "10.0.10.100:22") }),
            dead("a port that listens in the other protocol", &datagram(CLIENT, "10.0.10.100:80")),
            dead("port 0", &datagram(CLIENT, "10.0.10.100:0")),
            Step::drop("a later fragment", fragment, Fragmented),
        ],
    );
}

#[test]
fn fragments_are_dropped_and_counted() {
    let tcp = segment(CLIENT, "10.0.10.100:80").build();
    let udp = Packet { payload: vec![1; 200], ..datagram(CLIENT, "10.0.10.100:53") }.build();
    let first = |frame: &[u8]| with_ipv4(frame.to_vec(), |header| header.more_fragments = true);
    // The first of two: its UDP header has the length of the whole.
    let first_of_udp = with_ipv4(udp[..14 + 20 + 88].to_vec(), |header| {
        header.more_fragments = true;
        header.total_len = 20 + 88;
    });
    let last = with_ipv4(tcp.clone(), |header| header.fragment_offset = 11.try_into().unwrap());
    let reply = segment("10.0.11.21:8080", CLIENT).build();
    let udp_reply = Packet { payload: vec![1; 200], ..datagram("10.0.11.22:5353", CLIENT) }.build();
    let first_of_udp_reply = with_ipv4(udp_reply[..14 + 20 + 88].to_vec(), |header| {
        header.more_fragments = true;
        header.total_len = 20 + 88;
    });
    let six = |offset_more: [u8; 2]| {
        let mut frame = segment(CLIENT6, "[fd00:10::100]:80").build();
        frame.splice(54..54, [6, 0, offset_more[0], offset_more[1], 1, 2, 3, 4]);
        frame[20] = 44;
        let payload = (frame.len() - 54) as u16;
        patched(frame, 18, &payload.to_be_bytes())
    };
    run(
        &Scene::everything(),
        &[
            Step::drop("the first one of TCP", first(&tcp), Fragmented),
            Step::drop("the first one of UDP", first_of_udp, Fragmented),
            Step::drop("a later one", last, Fragmented),
            Step::drop("the first one of a reply", first(&reply), Fragmented).ingress(11),
            Step::drop("the first one of a UDP reply", first_of_udp_reply, Fragmented).ingress(11),
            Step::drop("the first one over IPv6", six([0, 1]), Fragmented),
            Step::drop("a later one over IPv6", six([0, 8]), Fragmented),
            Step::drop("a middle one over IPv6", six([0, 9]), Fragmented),
        ],
    );
}

#[test]
fn headers_that_lie() {
    let tcp = segment(CLIENT, "10.0.10.100:80").build();
    let udp = datagram(CLIENT, "10.0.10.100:53").build();
    let tcp6 = segment(CLIENT6, "[fd00:10::100]:80").build();
    let reply = segment("10.0.11.21:8080", CLIENT).build();
    let length =
        |frame: &[u8], length| with_ipv4(frame.to_vec(), |header| header.total_len = length);
    let bad = |what, frame: Vec<u8>| Step::drop(what, frame, Malformed);
    run(
        &Scene::everything(),
        &[
            bad("a TCP header of 16 bytes", patched(tcp.clone(), 46, &[0x40])),
            bad("a TCP header longer than its packet", patched(tcp.clone(), 46, &[0xf0])),
            bad("UDP shorter than its header", patched(udp.clone(), 38, &[0, 7])),
            bad("UDP longer than its packet", patched(udp.clone(), 38, &[0, 20])),
            bad("an IPv4 packet longer than its frame", length(&tcp, 52)),
            bad("an IPv4 packet that ends in its TCP header", length(&tcp, 39)),
            bad("an IPv4 packet shorter than its header", length(&tcp, 19)),
            bad("an IPv4 packet without length", length(&tcp, 0)),
            bad("an IPv6 packet longer than its frame", patched(tcp6.clone(), 18, &[0, 32])),
            bad("an IPv6 packet without payload", patched(tcp6, 18, &[0, 0])),
            bad("a reply longer than its frame", length(&reply, 52)).ingress(11),
            bad("a frame that ends in its TCP header", tcp[..14 + 20 + 19].to_vec()),
            bad("a frame that ends in its UDP header", udp[..14 + 20 + 7].to_vec()),
            bad("a frame that ends in its payload", tcp[..tcp.len() - 1].to_vec()),
        ],
    );
}
