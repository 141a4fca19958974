//! Tunnel headers are taken off where a load balancer put them on, and nowhere else.

use etherparse::ip_number;
use lb_common::verdict::DropReason;
use lb_tests::{packets::Packet, target_world::TargetWorld};

use super::frames::*;
use super::{ADDRESSES, CONFIG, Step, run, world};

/// Every family in every family.
fn pairs() -> [(&'static str, &'static str, Packet); 4] {
    let v4 = tcp("198.51.100.7:4000", "10.0.2.100:80", "S");
    let v6 = tcp("[2001:db8:9::7]:4000", "[fd00:2::100]:80", "S");
    [
        ("172.16.3.4", "10.0.2.11", v4.clone()),
        ("172.16.3.4", "10.0.2.11", v6.clone()),
        ("100::3:4", "fd00:2::11", v4),
        ("100::3:4", "fd00:2::11", v6),
    ]
}

fn with_port(address: &str, port: u16) -> String {
    std::net::SocketAddr::new(address.parse().unwrap(), port).to_string()
}

#[test]
fn both_tunnels_in_all_families_tagged_or_not() {
    let mut steps = Vec::new();
    for (source, destination, inner) in pairs() {
        for vlans in [vec![], vec![7], vec![7, 8]] {
            let inner = Packet { vlans, payload: b"GET /".to_vec(), ..inner.clone() };
            let bytes = inner.build();
            steps.push(Step::Unwrapped("IPIP", ipip(source, destination, &inner), bytes.clone()));
            let (from, to) = (with_port(source, 50_000), with_port(destination, 6080));
            steps.push(Step::Unwrapped("GUE", gue(&from, &to, &inner), bytes));
        }
    }
    run(&mut world(), steps);
}

#[test]
fn rules_look_at_the_inner_packet() {
    let from = "172.16.3.4";
    let client = |port: u16| tcp("198.51.100.7:4000", &with_port("10.0.2.100", port), "S");
    let office = tcp("192.0.2.7:4000", "10.0.2.100:22", "S");
    run(
        &mut world(),
        vec![
            Step::denied("no rule for the port", ipip(from, "10.0.2.11", &client(81))),
            Step::denied("one, but not for tunnels", ipip(from, "10.0.2.11", &client(22))),
            Step::Unwrapped(
                "one for the inner source",
                ipip(from, "10.0.2.11", &office),
                office.build(),
            ),
            Step::denied("not through the load balancer", client(80).build()),
        ],
    );
}

#[test]
fn others_tunnels_are_packets_like_any_other() {
    let inner = tcp("198.51.100.7:4000", "10.0.2.100:80", "S");
    let to_gue = "10.0.2.11:6080";
    let other_port = gue("172.16.3.4:50000", "10.0.2.11:6081", &inner);
    let steps = || {
        vec![
            ipip("198.51.100.7", "10.0.2.11", &inner),
            ipip("172.17.0.1", "10.0.2.11", &inner),
            ipip("172.16.3.4", "10.0.2.12", &inner),
            gue("198.51.100.7:50000", to_gue, &inner),
            other_port.clone(),
            ipip("100:0:0:1::1", "fd00:2::11", &inner),
        ]
    };
    let enforced = steps().into_iter().map(|frame| Step::denied("a stranger's", frame));
    run(&mut world(), enforced.collect());
    let open = CONFIG.replace("security_group = \"target\"", "");
    let mut open = TargetWorld::new(&open, &ADDRESSES).unwrap();
    run(&mut open, steps().into_iter().map(|frame| Step::In("untouched", frame)).collect());
    let allowed = CONFIG.replace(
        "  { protocol = \"icmp\"",
        "  { protocol = \"all\", sources = [\"198.51.100.0/24\"] },\n  { protocol = \"icmp\"",
    );
    let mut allowed = TargetWorld::new(&allowed, &ADDRESSES).unwrap();
    let frame = ipip("198.51.100.7", "10.0.2.11", &inner);
    run(&mut allowed, vec![Step::In("as it is, by a rule for all protocols", frame)]);
}

#[test]
fn lies_about_lengths_are_dropped() {
    let inner = Packet { payload: vec![7; 20], ..tcp("198.51.100.7:4000", "10.0.2.100:80", "S") };
    let whole = ipip("172.16.3.4", "10.0.2.11", &inner);
    let (l3, l3_inner) = (14, 34);
    let patched = |at: usize, byte: u8| {
        let mut frame = whole.clone();
        frame[at] = byte;
        frame
    };
    let malformed = |what, frame| Step::Dropped(what, frame, DropReason::Malformed);
    let in_udp = gue("172.16.3.4:50000", "10.0.2.11:6080", &inner);
    let mut short_udp = in_udp.clone();
    short_udp[l3 + 20 + 5] += 1;
    let mut control = in_udp.clone();
    control[l3 + 20 + 8] = 0x21;
    let bare = |payload: &[u8]| in_ip("172.16.3.4", "10.0.2.11", ip_number::IPV4, payload);
    run(
        &mut world(),
        vec![
            malformed("cut short", whole[..whole.len() - 1].to_vec()),
            malformed(
                "the inner length is too long",
                patched(l3_inner + 3, whole[l3_inner + 3] + 1),
            ),
            malformed("the inner length is less than a header", patched(l3_inner + 3, 19)),
            malformed("the inner version is another", patched(l3_inner, 0x65)),
            malformed("the outer length is less than the headers", patched(l3 + 3, 40)),
            malformed("nothing inside", bare(&[])),
            malformed("half a header inside", bare(&ip_packet(&inner)[..19])),
            malformed("the UDP length is too long", short_udp),
            // Another variant of GUE, or of nothing: a packet like any other.
            Step::denied("not variant 1", control),
            Step::Dropped(
                "the first fragment of a tunnelled packet",
                {
                    let mut frame = whole.clone();
                    frame[l3 + 6] = 0x20;
                    frame
                },
                DropReason::Fragmented,
            ),
        ],
    );
}

#[test]
fn padding_behind_a_short_packet_stays() {
    let inner = udp("198.51.100.7:4000", "10.0.2.100:53");
    let mut padded = ipip("172.16.3.4", "10.0.2.11", &inner);
    padded.extend([0; 6]);
    let expected = [inner.build(), vec![0; 6]].concat();
    run(&mut world(), vec![Step::Unwrapped("padded", padded, expected)]);
}
