//! Security groups, statefully.

use etherparse::{IcmpEchoHeader, Icmpv4Type, Icmpv6Type, icmpv4, icmpv6, ip_number};
use lb_common::verdict::DropReason;
use lb_tests::{packets::Packet, target_world::TargetWorld};

use super::frames::*;
use super::{ADDRESSES, CONFIG, Step, run, world};

/// Own address, the load balancer's, a network that rules let in, a stranger: by family.
struct Hosts {
    own: &'static str,
    balancer: &'static str,
    office: &'static str,
    stranger: &'static str,
    tunnel: &'static str,
}

const FAMILIES: [Hosts; 2] = [
    Hosts {
        own: "10.0.2.11",
        balancer: "10.0.2.1",
        office: "192.0.2.7",
        stranger: "198.51.100.7",
        tunnel: "172.16.3.4",
    },
    Hosts {
        own: "fd00:2::11",
        balancer: "fd00:2::1",
        office: "2001:db8:2::7",
        stranger: "2001:db8:9::7",
        tunnel: "100::3:4",
    },
];

fn port(address: &str, port: u16) -> String {
    std::net::SocketAddr::new(address.parse().unwrap(), port).to_string()
}

#[test]
fn rules_by_protocol_port_and_source() {
    for Hosts { own, balancer, office, stranger, tunnel } in FAMILIES {
        let syn = |from: &str, to: u16| tcp(&port(from, 4000), &port(own, to), "S");
        let ask = |from: &str, to: u16| udp(&port(from, 4000), &port(own, to));
        run(
            &mut world(),
            vec![
                Step::In("a network's rule", syn(office, 22).build()),
                Step::In("a network's rule", ask(office, 5353).build()),
                Step::denied("another port", syn(office, 23).build()),
                Step::denied("another protocol", ask(office, 22).build()),
                Step::denied("another source", syn(stranger, 22).build()),
                Step::In("from the load balancer's address", syn(balancer, 80).build()),
                Step::In(
                    "from the load balancer's MAC address",
                    balanced(syn(stranger, 80)).build(),
                ),
                Step::In("and in UDP", balanced(ask(stranger, 53)).build()),
                Step::denied("directly", syn(stranger, 80).build()),
                Step::denied("directly, in UDP", ask(stranger, 53).build()),
                Step::denied("not for this port", balanced(syn(stranger, 22)).build()),
                Step::denied("tunnel sources are no sources", syn(tunnel, 80).build()),
            ],
        );
    }
}

fn deny_all() -> TargetWorld {
    let text = "[security_group.none]\n[target_group.web]\nsecurity_group = \"none\"\n\
                targets = [\"10.0.2.11\", \"fd00:2::11\"]";
    TargetWorld::new(text, &ADDRESSES).unwrap()
}

#[test]
fn answers_to_what_the_target_asked_come_in() {
    for Hosts { own, stranger, .. } in FAMILIES {
        let (here, there) = (port(own, 50_000), port(stranger, 443));
        let back = |flags| tcp(&there, &here, flags).build();
        let (resolver, asker) = (port(stranger, 53), port(own, 40_000));
        run(
            &mut deny_all(),
            vec![
                Step::denied("nobody asked", back("SA")),
                Step::Out("amid a connection", tcp(&here, &there, "A").build()),
                Step::denied("which the target did not open", back("A")),
                Step::Out("a reset", tcp(&here, &there, "R").build()),
                Step::denied("opens nothing", back("A")),
                Step::Out("a connection", tcp(&here, &there, "S").build()),
                Step::In("its answer", back("SA")),
                Step::In("its data", back("A")),
                Step::denied("another port", tcp(&port(stranger, 444), &here, "SA").build()),
                Step::denied("another protocol", udp(&there, &here).build()),
                Step::Out("the end", tcp(&here, &there, "FA").build()),
                Step::In("the other's end", back("FA")),
                Step::denied("nobody asked", udp(&resolver, &asker).build()),
                Step::Out("a query", udp(&asker, &resolver).build()),
                Step::In("its answer", udp(&resolver, &asker).build()),
                Step::In(
                    "in a VLAN as well",
                    Packet { vlans: vec![7], ..udp(&resolver, &asker) }.build(),
                ),
                Step::denied("of another host", udp(&port(own, 53), &asker).build()),
            ],
        );
    }
}

#[test]
fn what_the_target_answers_opens_nothing() {
    for Hosts { own, office, .. } in FAMILIES {
        let mut world = world();
        let (client, server) = (port(office, 4000), port(own, 5353));
        run(
            &mut world,
            vec![
                Step::In("asked", udp(&client, &server).build()),
                Step::Out("answered", udp(&server, &client).build()),
            ],
        );
        assert_eq!(world.check_flows().unwrap(), (0, 1));
        // So a narrowed group cuts it off.
        let narrow = CONFIG.replace("192.0.2.0/24", "192.0.3.0/24").replace("db8:2::", "db8:3::");
        world.set(&narrow, &ADDRESSES).unwrap();
        run(&mut world, vec![Step::denied("asked again", udp(&client, &server).build())]);
    }
}

const ECHO: IcmpEchoHeader = IcmpEchoHeader { id: 7, seq: 1 };

fn ping(from: &str, to: &str) -> Vec<u8> {
    icmp(from, to, Icmpv4Type::EchoRequest(ECHO), Icmpv6Type::EchoRequest(ECHO), b"abc")
}

fn pong(from: &str, to: &str, id: u16) -> Vec<u8> {
    let echo = IcmpEchoHeader { id, seq: 1 };
    icmp(from, to, Icmpv4Type::EchoReply(echo), Icmpv6Type::EchoReply(echo), b"abc")
}

#[test]
fn pings() {
    for Hosts { own, office, stranger, .. } in FAMILIES {
        run(
            &mut world(),
            vec![
                Step::In("allowed", ping(office, own)),
                Step::denied("not allowed", ping(stranger, own)),
                Step::denied("nobody asked", pong(stranger, own, 7)),
                Step::Out("the target asks", ping(own, stranger)),
                Step::In("its answer", pong(stranger, own, 7)),
                Step::denied("another's answer", pong(stranger, own, 8)),
            ],
        );
    }
}

/// A router's error about a packet.
fn unreachable(router: &str, own: &str, about: &Packet) -> Vec<u8> {
    let mut quoted = ip_packet(about);
    quoted.truncate(quoted.len().min(64));
    icmp(
        router,
        own,
        Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::FragmentationNeeded {
            next_hop_mtu: 1400,
        }),
        Icmpv6Type::PacketTooBig { mtu: 1400 },
        &quoted,
    )
}

#[test]
fn errors_about_flows_that_may_come_in() {
    for Hosts { own, office, stranger, .. } in FAMILIES {
        let router = if own.contains('.') { "203.0.113.1" } else { "2001:db8:ff::1" };
        let sent = tcp(&port(own, 50_000), &port(stranger, 443), "SA");
        let query = udp(&port(own, 40_000), &port(stranger, 53));
        let answer = tcp(&port(own, 22), &port(office, 4000), "A");
        run(
            &mut world(),
            vec![
                Step::denied("about nothing", unreachable(router, own, &sent)),
                Step::Out(
                    "a connection",
                    tcp(&port(own, 50_000), &port(stranger, 443), "S").build(),
                ),
                Step::In("about it", unreachable(router, own, &sent)),
                Step::Out("a query", query.build()),
                Step::In("about it", unreachable(router, own, &query)),
                Step::In("about an answer to a client", unreachable(router, own, &answer)),
                Step::denied(
                    "about an answer to nobody",
                    unreachable(router, own, &tcp(&port(own, 22), &port(stranger, 4000), "A")),
                ),
            ],
        );
    }
}

#[test]
fn what_a_host_cannot_live_without() {
    let raw = |kind| Icmpv6Type::Unknown { type_u8: kind, code_u8: 0, bytes5to8: [0; 4] };
    let nothing = Icmpv4Type::Unknown { type_u8: 8, code_u8: 0, bytes5to8: [0; 4] };
    let neighbour = |kind, hops: u8| {
        let mut frame = icmp("fe80::1", "fd00:2::11", nothing.clone(), raw(kind), &[0; 16]);
        frame[14 + 7] = hops;
        frame
    };
    let mut arp = vec![0; 42];
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    let mut steps = vec![
        Step::In("ARP", arp),
        Step::In("DHCP", udp("10.0.2.1:67", "255.255.255.255:68").build()),
        Step::In("DHCPv6", udp("[fe80::1]:547", "[fe80::2]:546").build()),
        Step::denied("not DHCP", udp("10.0.2.1:68", "10.0.2.11:67").build()),
        Step::denied("not DHCPv6", udp("[fe80::1]:67", "[fe80::2]:68").build()),
        Step::denied(
            "neighbour discovery from afar",
            neighbour(icmpv6::TYPE_NEIGHBOR_SOLICITATION, 254),
        ),
        Step::In("multicast listener discovery", neighbour(130, 1)),
    ];
    steps.extend((133..=137).map(|kind| Step::In("neighbour discovery", neighbour(kind, 255))));
    run(&mut deny_all(), steps);
}

#[test]
fn fragments_and_other_protocols() {
    let own = "10.0.2.11";
    let office = "192.0.2.7";
    let mut cut = tcp("192.0.2.7:4000", "10.0.2.11:22", "S").build();
    cut.truncate(14 + 20 + 8);
    let gre = |from: &str, to: &str| in_ip(from, to, ip_number::GRE, &[0; 8]);
    run(
        &mut world(),
        vec![
            Step::In("nothing comes of it alone", fragment(office, own, ip_number::UDP, 185)),
            Step::Dropped(
                "it would overwrite the flags",
                fragment(office, own, ip_number::TCP, 1),
                DropReason::Malformed,
            ),
            Step::Dropped("no ports", cut, DropReason::Malformed),
            Step::denied("no rule is for it", gre("198.51.100.7", own)),
            Step::Out("the target began", gre(own, "198.51.100.7")),
            Step::In("its answer", gre("198.51.100.7", own)),
        ],
    );
}

#[test]
fn without_a_group_nothing_is_touched_or_remembered() {
    let open = CONFIG.replace("security_group = \"target\"", "");
    let mut world = TargetWorld::new(&open, &ADDRESSES).unwrap();
    let steps = vec![
        Step::In("anything", tcp("198.51.100.7:4000", "10.0.2.11:9", "S").build()),
        Step::Out("anything", tcp("10.0.2.11:9", "198.51.100.7:4000", "S").build()),
    ];
    run(&mut world, steps);
    assert_eq!(world.check_flows().unwrap(), (0, 0));
}
