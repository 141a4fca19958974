//! Which target a new flow goes to: by the source address alone, and among groups of several
//! forwarding modes.

use std::collections::{BTreeMap, BTreeSet};

use etherparse::{NetSlice, SlicedPacket};
use lb_common::{
    flow::{TCP, UDP},
    tables::{Endpoint, OPEN, Slot, Target},
};
use lb_tests::scene::{VIPS, Way};

use super::*;

/// Where a packet goes, by the headers of what comes out.
fn target_of(world: &mut World<'_>, request: &Packet) -> IpAddr {
    let outcome = world.run(10, &request.build()).unwrap();
    assert_eq!(outcome.action, Action::Redirect);
    match SlicedPacket::from_ethernet(&outcome.frame).unwrap().net {
        Some(NetSlice::Ipv4(ip)) => ip.header().destination_addr().into(),
        Some(NetSlice::Ipv6(ip)) => ip.header().destination_addr().into(),
        other => panic!("{other:?}"),
    }
}

fn clients(count: u16) -> impl Iterator<Item = [String; 2]> {
    (0..count).map(|n| [format!("192.0.{}.{}", n / 200, n % 200 + 1), format!("2001:db8:{n:x}::1")])
}

/// The listeners have the same slots, as listeners of one target group do.
#[test]
fn a_sticky_client_has_one_target_whatever_its_ports_and_the_listener() {
    in_world(&Scene::everything(), |world| {
        for family in [0, 1] {
            let mut targets = BTreeMap::new();
            for client in clients(30) {
                let (client, vip) = match (&client[family], VIPS[family]) {
                    (client, vip) if family == 0 => (client.clone(), vip.to_owned()),
                    (client, vip) => (format!("[{client}]"), format!("[{vip}]")),
                };
                let chosen: BTreeSet<IpAddr> = (0..4_u16)
                    .flat_map(|n| {
                        let from = format!("{client}:{}", 1024 + 15_001 * n);
                        [
                            syn(&from, &format!("{vip}:96")),
                            segment(&from, &format!("{vip}:96")),
                            datagram(&from, &format!("{vip}:96")),
                            syn(&from, &format!("{vip}:98")),
                        ]
                    })
                    .map(|request| target_of(world, &request))
                    .collect();
                assert_eq!(chosen.len(), 1, "{client}: {chosen:?}");
                *targets.entry(*chosen.first().unwrap()).or_insert(0) += 1;
            }
            // The hash is the same on every run, so this is no matter of luck.
            assert_eq!(targets.len(), 4, "clients spread over all targets: {targets:?}");
        }
    });
}

#[test]
fn without_stickiness_the_ports_count() {
    let mut scene = Scene::new();
    let slots: Vec<_> = (1..=4)
        .map(|n| {
            Slot::settled(scene.target(n, Target::NAT, &format!("10.0.11.{n}:80"), Way::by(11)))
        })
        .collect();
    scene.listener(1, TCP, "10.0.10.100:80", &slots);
    in_world(&scene, |world| {
        let chosen: BTreeSet<_> = (1024..1084)
            .map(|port| target_of(world, &syn(&format!("192.0.10.7:{port}"), "10.0.10.100:80")))
            .collect();
        assert_eq!(chosen.len(), 4);
    });
}

/// A slot that learns knows the client's flows by their ports all the same.
#[test]
fn a_sticky_slot_that_learns_remembers_flows_one_by_one() {
    let to = |request: &Packet, target: u32| {
        translated(request, target, &format!("10.0.11.{}:8080", 120 + target))
    };
    let step = |what, request: Packet, target| {
        let output = to(&request, target);
        Step::to(what, &request, &output, (102, target))
    };
    let [one, two] = ["192.0.10.7:1", "192.0.10.7:2"];
    let vip = "10.0.10.100:97";
    run(
        &Scene::everything(),
        &[
            step("amid a connection: old", segment(one, vip), 101),
            step("a new one of the same client", syn(two, vip), 100),
            step("which stays there", segment(two, vip), 100),
            step("and the old one there", segment(one, vip), 101),
        ],
    );
}

/// Groups of one listener may forward in different ways: that is the target's affair.
#[test]
fn a_listener_s_groups_may_forward_in_different_ways() {
    for (vip, targets) in [
        ("10.0.10.100:80", ["10.0.11.1:8080", "10.0.11.2:80"]),
        ("[fd00:10::100]:80", ["[fd00:11::1]:8080", "[fd00:11::2]:80"]),
    ] {
        for flags in [0, Endpoint::TRACKED] {
            for protocol in [TCP, UDP] {
                let mut scene = Scene::new();
                scene.target(1, Target::NAT, targets[0], Way::by(11));
                scene.target(2, Target::DSR_L2, targets[1], Way::by(11));
                let slots = [1, 2].map(Slot::settled);
                scene.listener_of(1, protocol, vip, &slots, OPEN, flags);
                mixed(&scene, protocol, at(vip), targets[0]);
            }
        }
    }
}

/// Every flow comes out as one of both modes has it, and both occur.
fn mixed(scene: &Scene, protocol: u8, vip: SocketAddr, nat: &str) {
    in_world(scene, |world| {
        let mut seen = [0; 2];
        for port in 2000..2040 {
            let client = if vip.is_ipv4() { "192.0.10.7" } else { "2001:db8::7" };
            let from = SocketAddr::new(client.parse().unwrap(), port).to_string();
            let request = match protocol {
                TCP => syn(&from, &vip.to_string()),
                _ => datagram(&from, &vip.to_string()),
            };
            let outcome = world.run(10, &request.build()).unwrap();
            let as_nat = translated(&request, 1, nat);
            let as_dsr = Packet {
                source_mac: device_mac(11),
                destination_mac: target_mac(2),
                hop_limit: request.hop_limit,
                ..request.clone()
            };
            let forms = [as_nat.build(), as_dsr.build()];
            let form = forms.iter().position(|form| *form == outcome.frame);
            seen[form.unwrap_or_else(|| panic!("{}", hex(&outcome.frame)))] += 1;
        }
        // One of them missing in 40 flows: 2 × 2^-40.
        assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
    });
}
