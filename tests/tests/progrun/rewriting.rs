//! Packets on their way to targets and back.

use etherparse::{Ipv6Extensions, Ipv6RawExtHeader, Ipv6RoutingExtensions, ip_number};
use lb_common::{tables::Endpoint, verdict::DropReason};
use lb_tests::{
    packets::{Checksum, Packet},
    progrun::{device_mac, gateway_mac},
    scene::{Scene, target_mac},
};

use super::*;

const CLIENT: &str = "192.0.10.7:4000";
const CLIENT6: &str = "[2001:db8:10::7]:4000";

#[test]
fn requests_are_translated() {
    let tcp = segment(CLIENT, "10.0.10.100:80");
    let udp = datagram(CLIENT, "10.0.10.100:53");
    let tcp6 = segment(CLIENT6, "[fd00:10::100]:80");
    let udp6 = datagram(CLIENT6, "[fd00:10::100]:53");
    let [to1, to2] = ["10.0.11.21:8080", "10.0.11.22:5353"];
    let [to3, to4] = ["[fd00:11::23]:8080", "[fd00:11::24]:5353"];
    let opening = syn(CLIENT, "10.0.10.100:80");
    let opening6 = syn(CLIENT6, "[fd00:10::100]:80");
    let large = Packet { payload: vec![0x5a; 1460], ..tcp.clone() };
    let odd = Packet { payload: vec![0xff; 1], ..udp.clone() };
    let empty = Packet { payload: Vec::new(), ..udp6.clone() };
    let options = Packet { ipv4_options: vec![1; 12], ..tcp.clone() };
    let most_options = Packet { ipv4_options: vec![1; 40], ..udp.clone() };
    let last_hop = Packet { hop_limit: 2, ..tcp.clone() };
    let one_way = {
        let out = Packet { hop_limit: 63, ..syn(CLIENT, "10.0.10.27:8080") };
        Packet { source_mac: device_mac(10), destination_mac: target_mac(7), ..out }
    };
    let padded = |packet: &Packet| [packet.build(), vec![0; 18]].concat();
    run(
        &Scene::everything(),
        &[
            Step::to("TCP over IPv4", &tcp, &translated(&tcp, 1, to1), (1, 1)),
            Step::to(
                "a new connection is counted",
                &opening,
                &translated(&opening, 1, to1),
                (1, 1),
            ),
            Step::to("UDP over IPv4", &udp, &translated(&udp, 2, to2), (2, 2)),
            Step::to("TCP over IPv6", &tcp6, &translated(&tcp6, 3, to3), (3, 3)),
            Step::to("a SYN over IPv6", &opening6, &translated(&opening6, 3, to3), (3, 3)),
            Step::to("UDP over IPv6", &udp6, &translated(&udp6, 4, to4), (4, 4)),
            Step::to("a full segment", &large, &translated(&large, 1, to1), (1, 1)),
            Step::to("an odd number of bytes", &odd, &translated(&odd, 2, to2), (2, 2)),
            Step::to("an empty datagram", &empty, &translated(&empty, 4, to4), (4, 4)),
            Step::to("IPv4 options", &options, &translated(&options, 1, to1), (1, 1)),
            Step::to(
                "40 bytes of options",
                &most_options,
                &translated(&most_options, 2, to2),
                (2, 2),
            ),
            Step::to("the last hop but one", &last_hop, &translated(&last_hop, 1, to1), (1, 1)),
            Step::to(
                "a target on the NIC it came by",
                &syn(CLIENT, "10.0.10.100:82"),
                &one_way,
                (7, 7),
            )
            .transmitted(),
            Step::frames_to(
                "Ethernet's padding stays and does not count",
                padded(&tcp),
                padded(&translated(&tcp, 1, to1)),
                (1, 1),
            ),
        ],
    );
}

#[test]
fn checksums_are_updated_and_never_made() {
    let tcp = |checksum| Packet { checksum, ..segment(CLIENT, "10.0.10.100:80") };
    let udp = |checksum| Packet { checksum, ..datagram(CLIENT, "10.0.10.100:53") };
    let tcp6 = |checksum| Packet { checksum, ..segment(CLIENT6, "[fd00:10::100]:80") };
    let cases = [
        ("a wrong TCP checksum", tcp(Checksum::Wrong), "10.0.11.21:8080", 1),
        ("a partial TCP checksum", tcp(Checksum::Partial), "10.0.11.21:8080", 1),
        ("a wrong UDP checksum", udp(Checksum::Wrong), "10.0.11.22:5353", 2),
        ("a partial UDP checksum", udp(Checksum::Partial), "10.0.11.22:5353", 2),
        ("a wrong TCP checksum over IPv6", tcp6(Checksum::Wrong), "[fd00:11::23]:8080", 3),
        ("a partial TCP checksum over IPv6", tcp6(Checksum::Partial), "[fd00:11::23]:8080", 3),
    ];
    let mut steps: Vec<Step> = cases
        .iter()
        .map(|(what, input, to, n)| {
            let output = equally_wrong(input, &translated(input, *n, to));
            Step::frames_to(what, input.build(), output, (*n, *n))
        })
        .collect();
    let none = udp(Checksum::Zero);
    steps.push(Step::to(
        "no UDP checksum stays none",
        &none,
        &translated(&none, 2, "10.0.11.22:5353"),
        (2, 2),
    ));
    let none = Packet { checksum: Checksum::Zero, ..datagram("10.0.11.22:5353", CLIENT) };
    let output = restored(&none, "10.0.10.100:53", 10);
    steps.push(Step::back("no UDP checksum in a reply", &none, &output, (2, 2)));
    // A payload of two bytes that makes the translated datagram's sum come out as zero.
    let becoming_zero = (0..=u16::MAX)
        .map(|word| Packet { payload: word.to_be_bytes().to_vec(), ..udp(Checksum::Right) })
        .find(|packet| {
            let frame = translated(packet, 2, "10.0.11.22:5353").build();
            frame[40..42] == [0xff, 0xff]
        })
        .expect("one of all payloads");
    steps.push(Step::to(
        "a UDP checksum that comes out as zero is sent as 0xffff",
        &becoming_zero,
        &translated(&becoming_zero, 2, "10.0.11.22:5353"),
        (2, 2),
    ));
    let bad_header = patched(segment(CLIENT, "10.0.10.100:80").build(), 24, &[0x12, 0x34]);
    let Ok(header) = <[u8; 2]>::try_from(&segment(CLIENT, "10.0.10.100:80").build()[24..26]) else {
        panic!("two bytes")
    };
    let right = translated(&segment(CLIENT, "10.0.10.100:80"), 1, "10.0.11.21:8080").build();
    let error = 0x1234 + (0xffff - u32::from(u16::from_be_bytes(header)));
    let sum = (u32::from(u16::from_be_bytes([right[24], right[25]])) + error) % 0xffff;
    let output = patched(right, 24, &(sum as u16).to_be_bytes());
    steps.push(Step::frames_to("a wrong IPv4 header checksum", bad_header, output, (1, 1)));
    run(&Scene::everything(), &steps);
}

#[test]
fn extension_headers_are_walked() {
    let raw = |next| Ipv6RawExtHeader::new_raw(next, &[0; 6]).unwrap();
    let long = |next| Ipv6RawExtHeader::new_raw(next, &[0; 6 + 8 * 20]).unwrap();
    let with = |extensions| Packet {
        ipv6_extensions: extensions,
        ..segment(CLIENT6, "[fd00:10::100]:80")
    };
    let none = Ipv6Extensions::default;
    let hop = with(Ipv6Extensions { hop_by_hop_options: Some(raw(ip_number::TCP)), ..none() });
    let destination =
        with(Ipv6Extensions { destination_options: Some(long(ip_number::TCP)), ..none() });
    let routing = Some(Ipv6RoutingExtensions {
        routing: raw(ip_number::TCP),
        final_destination_options: Some(raw(ip_number::TCP)),
    });
    let all = with(Ipv6Extensions {
        hop_by_hop_options: Some(raw(ip_number::TCP)),
        destination_options: Some(raw(ip_number::TCP)),
        routing,
        ..none()
    });
    let to = |packet: &Packet| translated(packet, 3, "[fd00:11::23]:8080");
    let mut too_many =
        with(Ipv6Extensions { hop_by_hop_options: Some(raw(ip_number::TCP)), ..none() }).build();
    // Four more destination options behind it, and the length that goes with them.
    too_many.splice(54..54, (0..4).flat_map(|_| [60, 0, 1, 4, 0, 0, 0, 0]));
    too_many[20] = 60;
    let payload = (too_many.len() - 54) as u16;
    let too_many = patched(too_many, 18, &payload.to_be_bytes());
    let mut atomic = segment(CLIENT6, "[fd00:10::100]:80").build();
    let mut atomic_out = to(&segment(CLIENT6, "[fd00:10::100]:80")).build();
    for frame in [&mut atomic, &mut atomic_out] {
        frame.splice(54..54, [6, 0, 0, 0, 1, 2, 3, 4]);
        frame[20] = 44;
        let payload = (frame.len() - 54) as u16;
        frame[18..20].copy_from_slice(&payload.to_be_bytes());
    }
    run(
        &Scene::everything(),
        &[
            Step::to("hop-by-hop options", &hop, &to(&hop), (3, 3)),
            Step::to("long destination options", &destination, &to(&destination), (3, 3)),
            Step::to("hop-by-hop, destination, routing, destination", &all, &to(&all), (3, 3)),
            Step::pass("more extension headers than we follow", too_many),
            Step::frames_to("an atomic fragment is whole", atomic, atomic_out, (3, 3)),
        ],
    );
}

#[test]
fn dsr_changes_mac_addresses_only() {
    let to = |packet: &Packet, target| Packet {
        source_mac: device_mac(11),
        destination_mac: target_mac(target),
        ..packet.clone()
    };
    let tcp = syn(CLIENT, "10.0.10.100:81");
    let tcp6 = segment(CLIENT6, "[fd00:10::100]:81");
    let last = Packet { hop_limit: 1, ..tcp.clone() };
    let wrong = Packet { checksum: Checksum::Wrong, ..tcp6.clone() };
    let own = segment("10.0.11.25:81", CLIENT);
    run(
        &Scene::everything(),
        &[
            Step::to("dsr_l2 over IPv4", &tcp, &to(&tcp, 5), (5, 5)),
            Step::to("dsr_l2 over IPv6", &tcp6, &to(&tcp6, 6), (6, 6)),
            Step::to("a switch takes no hop off", &last, &to(&last, 5), (5, 5)),
            Step::to("nothing is looked at but headers", &wrong, &to(&wrong, 6), (6, 6)),
            Step::pass("what such a target sends itself is not ours", own.build()).ingress(11),
        ],
    );
}

#[test]
fn vlan_tags_are_pushed_rewritten_and_popped() {
    let plain = segment(CLIENT, "10.0.10.100:80");
    let tagged = |packet: &Packet, vlans: &[u16]| Packet { vlans: vlans.into(), ..packet.clone() };
    // Priority 5, drop eligible.
    let urgent = |frame: Vec<u8>| {
        let control = frame[14] | 0xb0;
        patched(frame, 14, &[control])
    };
    let popped = translated(&plain, 1, "10.0.11.21:8080");
    let to8 = segment(CLIENT, "10.0.10.100:83");
    let out8 = Packet { vlans: vec![200], ..translated(&to8, 8, "10.0.11.28:8080") };
    let reply = segment("10.0.11.21:8080", "192.0.12.7:4000");
    let reply_out = Packet {
        vlans: vec![100],
        destination_mac: gateway_mac(12),
        source_mac: device_mac(12),
        ..restored(&reply, "10.0.10.100:80", 12)
    };
    let six = segment(CLIENT6, "[fd00:10::100]:80");
    let six_out = translated(&six, 3, "[fd00:11::23]:8080");
    run(
        &Scene::everything(),
        &[
            Step::to("a tag is popped", &tagged(&plain, &[7]), &popped, (1, 1)),
            Step::to("a priority tag is popped", &tagged(&plain, &[0]), &popped, (1, 1)),
            Step::to("both tags are popped", &tagged(&plain, &[7, 8]), &popped, (1, 1)),
            Step::to("both tags of IPv6 are popped", &tagged(&six, &[7, 8]), &six_out, (3, 3)),
            Step::to("a tag is pushed", &to8, &out8, (8, 8)),
            Step::frames_to(
                "a tag is rewritten, its priority kept",
                urgent(tagged(&to8, &[7]).build()),
                urgent(out8.build()),
                (8, 8),
            ),
            Step::frames_to(
                "two tags become one, the outer priority kept",
                urgent(tagged(&to8, &[7, 8]).build()),
                urgent(out8.build()),
                (8, 8),
            ),
            Step::frames_to(
                "a service tag is popped",
                patched(tagged(&plain, &[7]).build(), 12, &[0x88, 0xa8]),
                popped.build(),
                (1, 1),
            ),
            Step::back("a reply into a VLAN", &reply, &reply_out, (1, 1)),
            Step::back(
                "a reply from one VLAN into another",
                &tagged(&reply, &[9]),
                &reply_out,
                (1, 1),
            ),
        ],
    );
}

#[test]
fn replies_get_the_listeners_address_back() {
    let tcp = segment("10.0.11.21:8080", CLIENT);
    let udp = datagram("10.0.11.22:5353", CLIENT);
    let tcp6 = segment("[fd00:11::23]:8080", CLIENT6);
    let udp6 = datagram("[fd00:11::24]:5353", CLIENT6);
    let synack = flagged("10.0.11.21:8080", CLIENT, "SA");
    let same_nic = segment("10.0.11.21:8080", "192.0.11.7:4000");
    let same_nic_out = restored(&same_nic, "10.0.10.100:80", 11);
    let on_link = segment("10.0.11.21:8080", "10.0.10.1:4000");
    let on_link_out = restored(&on_link, "10.0.10.100:80", 10);
    run(
        &Scene::everything(),
        &[
            Step::back("TCP over IPv4", &tcp, &restored(&tcp, "10.0.10.100:80", 10), (1, 1)),
            Step::back("a SYN-ACK", &synack, &restored(&synack, "10.0.10.100:80", 10), (1, 1)),
            Step::back("UDP over IPv4", &udp, &restored(&udp, "10.0.10.100:53", 10), (2, 2)),
            Step::back("TCP over IPv6", &tcp6, &restored(&tcp6, "[fd00:10::100]:80", 10), (3, 3)),
            Step::back("UDP over IPv6", &udp6, &restored(&udp6, "[fd00:10::100]:53", 10), (4, 4)),
            Step::back("out of the same NIC", &same_nic, &same_nic_out, (1, 1)).transmitted(),
            Step::back("to a client on the segment", &on_link, &on_link_out, (1, 1)),
        ],
    );
}

/// The next hop of a reply is cached by CPU; another client in the same place of the cache, or a
/// change of the network, must not get an old one.
#[test]
fn replies_to_many_clients_go_to_each_ones_gateway() {
    in_world(&Scene::everything(), |world| {
        for round in 0..2 {
            for host in 0..1200_u32 {
                let device = 10 + host % 2;
                let client = format!("192.0.{device}.{}:{}", host % 251, 1024 + host);
                let reply = segment("10.0.11.21:8080", &client);
                let output = restored(&reply, "10.0.10.100:80", device);
                let step = Step::back("reply", &reply, &output, (1, 1));
                let outcome = world.run(11, &step.input).unwrap();
                assert_eq!(outcome.frame, output.build(), "round {round}, {client}");
            }
        }
    });
}

#[test]
fn endpoints_beyond_their_bucket_are_found() {
    let scene = Scene::everything();
    let ours: Vec<Endpoint> = scene.desired.endpoints.values().copied().collect();
    let steps: Vec<Step> = (50..54)
        .map(|n| {
            let is_it = |e: &&Endpoint| e.kind() == Endpoint::LISTENER && e.listener == n;
            let port = ours.iter().find(is_it).expect("a listener").port.get();
            let request = segment(CLIENT, &format!("10.0.10.100:{port}"));
            let output = translated(&request, n, &format!("10.0.11.{}:8080", 150 + n));
            Step::to("one of four in a bucket of two", &request, &output, (n, n))
        })
        .collect();
    run(&scene, &steps);
}

#[test]
fn ways_that_do_not_lead_anywhere() {
    use DropReason::{TooBig, TtlExceeded};
    let large =
        |bytes: usize| Packet { payload: vec![1; bytes - 40], ..segment(CLIENT, "10.0.10.100:87") };
    let fits = large(1000);
    let last = |packet: Packet| Packet { hop_limit: 1, ..packet };
    let zero = |packet: Packet| Packet { hop_limit: 0, ..packet };
    let reply = |to| segment("10.0.11.21:8080", to);
    let large_reply = Packet { payload: vec![1; 1461], ..reply(CLIENT) };
    run(
        &Scene::everything(),
        &[
            Step::unresolved(
                "a target without next hop",
                &syn(CLIENT, "10.0.10.100:86"),
                "10.0.11.34",
            ),
            Step::to(
                "as large as its way",
                &fits,
                &translated(&fits, 15, "10.0.11.35:8080"),
                (15, 15),
            ),
            Step::answer("one byte more", large(1001).build(), too_big(&large(1001), 1000), TooBig),
            Step::drop("no hop left", last(segment(CLIENT, "10.0.10.100:80")).build(), TtlExceeded),
            Step::drop(
                "less than none",
                zero(segment(CLIENT, "10.0.10.100:80")).build(),
                TtlExceeded,
            ),
            Step::drop(
                "none over IPv6",
                last(segment(CLIENT6, "[fd00:10::100]:80")).build(),
                TtlExceeded,
            ),
            Step::drop("none for a reply", last(reply(CLIENT)).build(), TtlExceeded).ingress(11),
            Step::answer(
                "a reply too big",
                large_reply.build(),
                too_big(&large_reply, 1500),
                TooBig,
            )
            .ingress(11),
            Step::unresolved("a client without a route", &reply("198.18.0.1:4000"), "198.18.0.1")
                .ingress(11),
            Step::unresolved(
                "a client that is not resolved",
                &reply("10.0.10.66:4000"),
                "10.0.10.66",
            )
            .ingress(11),
            Step::unresolved(
                "a client behind a NIC that is not ours",
                &reply("192.0.13.7:4000"),
                "192.0.13.7",
            )
            .ingress(11),
            Step::unresolved(
                "an IPv6 client without a route",
                &segment("[fd00:11::23]:8080", "[2001:db8:ffff::1]:4000"),
                "2001:db8:ffff::1",
            )
            .ingress(11),
        ],
    );
}

/// The agent resolves no target behind such a NIC; should one be removed at this very moment, the
/// packet counts as sent, and as dropped.
#[test]
fn a_nic_that_is_not_attached() {
    in_world(&Scene::everything(), |world| {
        let outcome = world.run(10, &syn(CLIENT, "10.0.10.100:89").build()).unwrap();
        assert_eq!(outcome.action, Action::Drop);
        let counts = world.counts().unwrap();
        assert_eq!(counts.drops, [(DropReason::NextHopUnresolved, 1)].into());
        assert_eq!(counts.targets[&18].packets, 1);
    });
}
