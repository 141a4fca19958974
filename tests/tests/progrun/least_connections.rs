//! New connections to the less loaded of two targets, and what counts as a connection.

use std::collections::BTreeMap;

use lb_common::{
    flow::{self, FlowKey, FlowTable, HashKeys, Keys as _, TCP},
    tables::Tables as _,
    wire::Be16,
};

use super::*;

/// Both families: the listeners' address, the client's, TCP and UDP listener, the first target.
const FAMILIES: [(&str, &str, [u32; 2], u32); 2] = [
    ("10.0.10.100:130", "192.0.10.7", [110, 111], 110),
    ("[fd00:10::100]:130", "[2001:db8:10::7]", [112, 113], 112),
];

/// Address and port of a target of these listeners.
fn target_at(target: u32) -> String {
    if target < 112 {
        format!("10.0.11.{}:8080", 120 + target)
    } else {
        format!("[fd00:11::{target}]:8080")
    }
}

fn to(what: &'static str, request: &Packet, listener: u32, target: u32) -> Step {
    let output = translated(request, target, &target_at(target));
    Step::to(what, request, &output, (listener, target))
}

/// How many connections the targets have, as both sides know it.
fn connections(world: &World<'_>, first: u32) -> [u32; 2] {
    [first, first + 1].map(|target| world.model.load(target).connections())
}

/// The agent's walk has found so many connections of the two targets.
fn find(world: &mut World<'_>, first: u32, found: [u32; 2]) {
    let correction = |(target, found): (u32, u32)| {
        let balance = world.model.load(target).balance;
        (target, u64::from(found).wrapping_sub(balance))
    };
    let corrections: BTreeMap<_, _> = (first..).zip(found).map(correction).collect();
    world.correct(&corrections).unwrap();
    assert_eq!(connections(world, first), found);
}

#[test]
fn a_new_connection_goes_to_the_target_with_fewer() {
    in_world(&Scene::everything(), |world| {
        for (vip, client, [tcp, udp], first) in FAMILIES {
            for (found, chosen) in [([7, 3], first + 1), ([3, 7], first)] {
                find(world, first, found);
                // Few: one in 256 meets one of the targets only.
                for port in 2000..2006 {
                    let from = format!("{client}:{}", port + 100 * chosen as u16);
                    check(world, &to("a SYN", &syn(&from, vip), tcp, chosen));
                    let udp_to = to("a datagram", &datagram(&from, vip), udp, chosen);
                    check(world, &udp_to.with_is_new(true));
                }
            }
            assert_eq!(connections(world, first), [3, 7], "one packet makes no connection");
        }
    });
}

/// It stays where it began, whatever becomes of the numbers.
#[test]
fn an_established_connection_stays() {
    in_world(&Scene::everything(), |world| {
        for (vip, client, [tcp, udp], first) in FAMILIES {
            let from = format!("{client}:3000");
            find(world, first, [0, 9]);
            check(world, &to("a SYN", &syn(&from, vip), tcp, first));
            let new = to("a datagram", &datagram(&from, vip), udp, first);
            check(world, &new.with_is_new(true));
            for found in [[100, 0], [0, 100]] {
                find(world, first, found);
                check(world, &to("sent again", &syn(&from, vip), tcp, first).with_is_new(false));
                check(world, &to("data", &segment(&from, vip), tcp, first));
                let known = to("another", &datagram(&from, vip), udp, first);
                check(world, &known.with_is_new(false));
            }
            check(world, &to("FIN", &flagged(&from, vip, "FA"), tcp, first));
            find(world, first, [100, 0]);
            check(world, &to("its last ACK", &flagged(&from, vip, "A"), tcp, first));
            check(world, &to("its port, used again", &syn(&from, vip), tcp, first + 1));
        }
    });
}

/// From the second packet to FIN or RST; and again if it lives on.
#[test]
fn what_counts_as_a_connection() {
    in_world(&Scene::everything(), |world| {
        for (vip, client, [tcp, udp], first) in FAMILIES {
            let from = |port: u16| format!("{client}:{port}");
            let mut expect = |what: &'static str, packet: &Packet, target, found: [u32; 2]| {
                let is_udp = matches!(packet.transport, Transport::Udp);
                let listener = if is_udp { udp } else { tcp };
                let is_new = what.starts_with("new: ");
                check(world, &to(what, packet, listener, target).with_is_new(is_new));
                assert_eq!(connections(world, first), found, "{what}");
            };
            let of = |port, flags| flagged(&from(port), vip, flags);
            let (one, other) = (first, first + 1);
            // Who has fewer gets it; of equals, the slot's: port and seed were chosen for this one.
            let port = (1000..).find(|port| slot_has(&from(*port), vip, tcp, one)).unwrap();
            expect("new: a SYN", &syn(&from(port), vip), one, [0, 0]);
            expect("sent again", &syn(&from(port), vip), one, [0, 0]);
            expect("the handshake ends", &of(port, "A"), one, [1, 0]);
            expect("data", &segment(&from(port), vip), one, [1, 0]);
            expect("new: another one", &syn(&from(2), vip), other, [1, 0]);
            expect("that ends at once", &of(2, "R"), other, [1, 0]);
            expect("new: a third", &syn(&from(3), vip), other, [1, 0]);
            expect("is established", &of(3, "A"), other, [1, 1]);
            expect("FIN", &of(3, "FA"), other, [1, 0]);
            expect("sent again", &of(3, "FA"), other, [1, 0]);
            expect("the last ACK", &of(3, "A"), other, [1, 0]);
            expect("new: UDP", &datagram(&from(5), vip), other, [1, 0]);
            expect("a second datagram", &datagram(&from(5), vip), other, [1, 1]);
            expect("RST", &of(port, "R"), one, [0, 1]);
            expect("new: its port, used again", &syn(&from(port), vip), one, [0, 1]);
            expect("established", &of(port, "A"), one, [1, 1]);
            world.forget_all().unwrap();
        }
    });
}

/// Whether the slot of a flow has this target: where it goes if the targets are equal.
fn slot_has(from: &str, vip: &str, listener: u32, target: u32) -> bool {
    let (source, destination) = (at(from), at(vip));
    let key = FlowKey {
        source: source.ip().into(),
        destination: destination.ip().into(),
        source_port: Be16::new(source.port()),
        destination_port: Be16::new(destination.port()),
        protocol: TCP,
        zero: [0; 3],
    };
    let hash = HashKeys::from_seed(OPTIONS.hash_seed).flow(&key);
    let slot = flow::slot(hash, OPTIONS.ring_size) as usize;
    Scene::everything().desired.rings[&listener][slot].current == target
}

/// A flood of SYNs, or of single datagrams, makes no target look loaded.
#[test]
fn floods_do_not_count() {
    in_world(&Scene::everything(), |world| {
        for (vip, client, _, first) in FAMILIES {
            for port in 0..3000 {
                let from = format!("{client}:{}", 1000 + port);
                world.run(10, &syn(&from, vip).build()).unwrap();
                world.run(10, &datagram(&from, vip).build()).unwrap();
            }
            assert_eq!(connections(world, first), [0, 0]);
        }
        assert_eq!(world.entries(FlowTable::HalfOpen).unwrap(), 6000);
        world.check_flows().unwrap();
    });
}

/// Groups have their shares by the hash; within a group its targets are compared, by their weights.
#[test]
fn within_the_group_that_the_hash_chooses() {
    in_world(&Scene::everything(), |world| {
        // Three times the weight: of 29 and 10, the first has fewer.
        for (found, fewer, more) in [([29, 10], 114, 115), ([31, 10], 115, 114)] {
            find(world, 114, found);
            let mut got: BTreeMap<u32, u32> = BTreeMap::new();
            for port in 0..60 {
                let from = format!("192.0.10.{}:{}", found[0], 1024 + 1009 * port);
                let outcome = world.run(10, &syn(&from, "10.0.10.100:131").build()).unwrap();
                *got.entry(u32::from(outcome.frame[33]) - 120).or_default() += 1;
            }
            let of = |target| got.get(&target).copied().unwrap_or(0);
            // By the hash 48 of 60 are the group's, and 12 the other's. Of five slots one is 115's:
            // in eight a sixth of those whose first choice is 114 do not meet it.
            assert!(of(fewer) > 30 && of(more) < 12 && of(116) > 3, "{got:?}");
        }
    });
}
