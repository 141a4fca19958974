//! ICMP errors about flows that are balanced.

use std::time::Duration;

use lb_common::{
    flow::{FlowKey, FlowTable, TCP},
    verdict::DropReason,
    wire::Be16,
};
use lb_tests::{
    icmp::{Complaint, IcmpError},
    packets::{Checksum, Packet, verify_checksums},
};

use super::*;

/// A listener with one target, and what goes between them and a client.
struct Way {
    client: &'static str,
    listener: &'static str,
    target: &'static str,
    number: u32,
    is_tcp: bool,
    /// A router beyond.
    router: &'static str,
}

const WAYS: [Way; 4] = [
    Way {
        client: "192.0.10.7:4000",
        listener: "10.0.10.100:80",
        target: "10.0.11.21:8080",
        number: 1,
        is_tcp: true,
        router: "203.0.113.9",
    },
    Way {
        client: "192.0.10.7:4000",
        listener: "10.0.10.100:53",
        target: "10.0.11.22:5353",
        number: 2,
        is_tcp: false,
        router: "203.0.113.9",
    },
    Way {
        client: "[2001:db8:10::7]:4000",
        listener: "[fd00:10::100]:80",
        target: "[fd00:11::23]:8080",
        number: 3,
        is_tcp: true,
        router: "2001:db8:ffff::9",
    },
    Way {
        client: "[2001:db8:10::7]:4000",
        listener: "[fd00:10::100]:53",
        target: "[fd00:11::24]:5353",
        number: 4,
        is_tcp: false,
        router: "2001:db8:ffff::9",
    },
];

const COMPLAINTS: [Complaint; 4] = [
    Complaint::PortUnreachable,
    Complaint::TooBig(1400),
    Complaint::TimeExceeded,
    Complaint::ParameterProblem(9),
];

impl Way {
    fn packet(&self, source: &str, destination: &str) -> Packet {
        if self.is_tcp { segment(source, destination) } else { datagram(source, destination) }
    }

    /// What the network says about a reply of the listener's, and how it comes to the target.
    fn about_reply(&self, complaint: Complaint) -> (IcmpError, IcmpError) {
        let seen = self.packet(self.listener, self.client);
        let sent = self.packet(self.target, self.client);
        let error = IcmpError::about(seen, complaint, self.router);
        let delivered = IcmpError {
            destination: at(self.target).ip(),
            quoted: sent,
            ..forwarded(&error, 11, target_mac(self.number))
        };
        (error, delivered)
    }

    /// What is said behind us about a request, and how it comes to the client.
    fn about_request(&self, complaint: Complaint, sender: &str) -> (IcmpError, IcmpError) {
        let seen = self.packet(self.client, self.target);
        let sent = self.packet(self.client, self.listener);
        let error = IcmpError::about(seen, complaint, sender);
        let delivered = IcmpError {
            source: at(self.listener).ip(),
            quoted: sent,
            ..forwarded(&error, 10, gateway_mac(10))
        };
        (error, delivered)
    }

    fn delivered(&self, what: &'static str, pair: &(IcmpError, IcmpError)) -> Step {
        Step::frames_to(what, pair.0.build(), pair.1.build(), (self.number, self.number))
    }

    fn returned(&self, what: &'static str, pair: &(IcmpError, IcmpError)) -> Step {
        let (listener, target) = (self.number, self.number);
        let (action, frame) = (Action::Redirect, pair.1.build());
        let expect = Expect::Reply { action, frame, listener, target };
        Step::new(what, pair.0.build(), expect).ingress(11)
    }
}

/// The error one hop further, out of a device.
fn forwarded(error: &IcmpError, device: u32, to: [u8; 6]) -> IcmpError {
    IcmpError {
        hop_limit: error.hop_limit - 1,
        source_mac: device_mac(device),
        destination_mac: to,
        vlans: Vec::new(),
        ..error.clone()
    }
}

fn pair(
    (a, b): (IcmpError, IcmpError),
    change: impl Fn(IcmpError) -> IcmpError,
) -> (IcmpError, IcmpError) {
    (change(a), change(b))
}

/// How much of the packet is quoted: as little as may be, up to TCP's checksum, that as well, all.
const KEPT: [usize; 4] = [8, 16, 18, 64];

#[test]
fn errors_about_replies_come_to_the_target() {
    let mut steps = Vec::new();
    for way in &WAYS {
        for complaint in COMPLAINTS {
            for kept in KEPT {
                let both = pair(way.about_reply(complaint), |e| IcmpError { kept, ..e });
                verify_checksums(&both.1.build()).unwrap();
                steps.push(way.delivered("about a reply", &both));
            }
        }
        let both = way.about_reply(Complaint::TooBig(1300));
        let tagged = IcmpError { vlans: vec![7, 8], ..both.0.clone() };
        steps.push(way.delivered("with tags", &(tagged, both.1.clone())));
        let other = |e: IcmpError| IcmpError {
            quoted: Packet { checksum: Checksum::Zero, hop_limit: 3, ..e.quoted },
            ..e
        };
        if !way.is_tcp {
            steps.push(way.delivered("a datagram without a checksum", &pair(both, other)));
        }
    }
    run(&Scene::everything(), &steps);
}

#[test]
fn errors_about_requests_come_to_the_client() {
    let mut steps = Vec::new();
    for way in &WAYS {
        let target = at(way.target).ip().to_string();
        for complaint in COMPLAINTS {
            for kept in KEPT {
                let cut = |e| IcmpError { kept, ..e };
                let both = pair(way.about_request(complaint, &target), cut);
                verify_checksums(&both.1.build()).unwrap();
                steps.push(way.returned("the target's own", &both));
                let both = pair(way.about_request(complaint, way.router), cut);
                steps.push(way.returned("a router's on the way there", &both));
            }
        }
    }
    run(&Scene::everything(), &steps);
}

/// Nothing comes of errors that fit no flow.
#[test]
fn errors_about_nothing_of_ours_pass() {
    let way = &WAYS[0];
    let complaint = Complaint::TimeExceeded;
    let (about_reply, _) = way.about_reply(complaint);
    let (about_request, _) = way.about_request(complaint, way.router);
    let about = |source: &str, destination: &str| {
        IcmpError::about(segment(source, destination), complaint, way.router).build()
    };
    let elsewhere = |error: &IcmpError, to: &str| {
        IcmpError { destination: to.parse().unwrap(), ..error.clone() }.build()
    };
    let cut = {
        let frame = about_reply.build();
        let frame = frame[..frame.len() - 1].to_vec();
        with_ipv4(frame, |header| header.total_len -= 1)
    };
    let beyond = with_ipv4(about_reply.build(), |header| header.total_len += 1);
    let later = {
        let mut frame = about_reply.build();
        // Fragment 1 of the quoted packet.
        frame[14 + 20 + 8 + 7] = 1;
        frame
    };
    let scene = Scene::everything();
    run(
        &scene,
        &[
            Step::pass("a port without a listener", about("10.0.10.100:22", way.client)),
            Step::pass("an address of no listener", about("10.0.10.2:80", way.client)),
            Step::pass("the proxy's", about("10.0.10.110:443", way.client)),
            Step::pass("quoting one that went elsewhere", elsewhere(&about_reply, "10.0.10.2")),
            Step::pass("at a client's neighbour", elsewhere(&about_request, "192.0.10.8"))
                .ingress(11),
            Step::pass("another port of a target", about(way.client, "10.0.11.21:22")).ingress(11),
            Step::pass("the agent's health check", about("10.0.11.2:40000", way.target))
                .ingress(11),
            Step::pass("less than eight bytes", cut),
            Step::pass("longer than its frame", beyond),
            Step::pass("about a later fragment", later),
        ],
    );
}

#[test]
fn errors_that_cannot_be_delivered() {
    let way = &WAYS[0];
    let (error, _) = way.about_reply(Complaint::TimeExceeded);
    let of = |listener: &str| {
        IcmpError { quoted: segment(listener, way.client), ..error.clone() }.build()
    };
    let spent = IcmpError { hop_limit: 1, ..error.clone() }.build();
    let (back, _) = way.about_request(Complaint::TimeExceeded, way.router);
    let spent_back = IcmpError { hop_limit: 1, ..back }.build();
    let large = IcmpError {
        quoted: Packet { payload: vec![0; 1400], ..segment("10.0.10.100:87", way.client) },
        kept: 1200,
        ..error.clone()
    };
    run(
        &Scene::everything(),
        &[
            Step::drop("no target", of("10.0.10.100:85"), DropReason::NoTarget),
            Step::drop("a dead target", of("10.0.10.100:88"), DropReason::TargetDown),
            Step::new(
                "no way to it",
                of("10.0.10.100:86"),
                Expect::Drop(
                    DropReason::NextHopUnresolved,
                    Some("10.0.11.34".parse::<IpAddr>().unwrap()),
                ),
            ),
            Step::drop("no hop left", spent, DropReason::TtlExceeded),
            Step::drop("no hop left on the way back", spent_back, DropReason::TtlExceeded)
                .ingress(11),
            Step::drop("larger than the way", large.build(), DropReason::TooBig),
        ],
    );
}

/// The security group is about who begins: an error comes from any router.
#[test]
fn errors_pass_security_groups() {
    let complaint = Complaint::TooBig(1280);
    let mut steps = Vec::new();
    for (number, client, listener, target, router) in [
        (9, "203.0.113.7:4000", "10.0.10.100:84", "10.0.11.29:8080", "203.0.113.9"),
        (
            19,
            "[2001:db8:11::7]:4000",
            "[fd00:10::100]:84",
            "[fd00:11::39]:8080",
            "2001:db8:ffff::9",
        ),
    ] {
        let way = Way { client, listener, target, number, is_tcp: true, router };
        steps.push(way.delivered("from a stranger", &way.about_reply(complaint)));
    }
    run(&Scene::everything(), &steps);
}

/// Only the MAC addresses change, as of a request.
#[test]
fn errors_with_direct_server_return() {
    let mut steps = Vec::new();
    for (number, client, listener, router) in [
        (5, "192.0.10.7:4000", "10.0.10.100:81", "203.0.113.9"),
        (6, "[2001:db8:10::7]:4000", "[fd00:10::100]:81", "2001:db8:ffff::9"),
    ] {
        let error = IcmpError::about(segment(listener, client), Complaint::TooBig(1400), router);
        let delivered = IcmpError {
            source_mac: device_mac(11),
            destination_mac: target_mac(number),
            ..error.clone()
        };
        let (input, output) = (error.build(), delivered.build());
        steps.push(Step::frames_to("dsr_l2", input, output, (number, number)));
    }
    run(&Scene::everything(), &steps);
}

#[test]
fn errors_with_source_address_translation() {
    let mut steps = Vec::new();
    for (number, client, listener, target, own, is_tcp, router) in [
        (
            36,
            "192.0.10.7:4000",
            "10.0.10.100:118",
            "10.0.11.245:8080",
            "10.0.11.2:20000",
            true,
            "203.0.113.9",
        ),
        (
            39,
            "[2001:db8:10::7]:4000",
            "[fd00:10::100]:118",
            "[fd00:11::48]:5353",
            "[fd00:11::2]:20000",
            false,
            "2001:db8:ffff::9",
        ),
    ] {
        let way = Way { client, listener, target, number, is_tcp, router };
        let complaint = Complaint::TooBig(1400);
        let (error, _) = way.about_reply(complaint);
        let (back, returned) = way.about_request(complaint, way.router);
        let back = IcmpError { destination: at(own).ip(), quoted: way.packet(own, target), ..back };
        let returned = IcmpError { destination: at(client).ip(), ..returned };
        steps.push(Step::pass("about no flow", error.build()));
        steps.push(Step::pass("about no flow, from behind", back.build()).ingress(11));

        let request = way.packet(client, listener);
        let sent = Packet { source: at(own), ..translated(&request, number, target) };
        steps.push(
            Step::to("a flow begins", &request, &sent, (number, number)).with_is_new(!is_tcp),
        );
        let delivered = IcmpError {
            source: at(own).ip(),
            destination: at(target).ip(),
            quoted: way.packet(target, own),
            ..forwarded(&error, 11, target_mac(number))
        };
        steps.push(way.delivered("about a reply", &(error, delivered)));
        steps.push(way.returned("about a request", &(back, returned)));
    }
    run(&Scene::everything(), &steps);
}

/// A flow that is remembered at another target than its slot's.
#[test]
fn errors_follow_remembered_flows() {
    let error = |listener| {
        let quoted = segment(listener, "192.0.10.7:4000");
        IcmpError::about(quoted, Complaint::TooBig(1400), "203.0.113.9")
    };
    let delivered = |error: &IcmpError, target: u32| {
        let at = at(&format!("10.0.11.{}:8080", 40 + target));
        IcmpError {
            destination: at.ip(),
            quoted: Packet { source: at, ..error.quoted.clone() },
            ..forwarded(error, 11, target_mac(target))
        }
    };
    let step = |what, listener, (number, target)| {
        let error = error(listener);
        let frame = delivered(&error, target).build();
        Step::frames_to(what, error.build(), frame, (number, target))
    };
    in_world(&Scene::everything(), |world| {
        let (learning, pinned) = ("10.0.10.100:90", "10.0.10.100:92");
        check(world, &step("an old flow, while the slot learns", learning, (20, 21)));
        check(world, &step("an unknown flow of a pinned slot", pinned, (28, 28)));
        let entries = world.entries(FlowTable::Flows).unwrap();
        let key = |listener| FlowKey {
            source: at("192.0.10.7:4000").ip().into(),
            destination: at(listener).ip().into(),
            source_port: Be16::new(4000),
            destination_port: Be16::new(at(listener).port()),
            protocol: TCP,
            zero: [0; 3],
        };
        assert_eq!(entries, 0, "nothing is remembered by an error");
        world.remember(key(learning), 20, 0, Duration::ZERO).unwrap();
        world.remember(key(pinned), 29, 0, Duration::ZERO).unwrap();
        check(world, &step("a new one, remembered", learning, (20, 20)));
        check(world, &step("an old one, remembered", pinned, (28, 29)));
    });
}

/// A reply that does not fit on the way to the client: the target hears of it.
#[test]
fn replies_that_are_too_big() {
    let mut steps = Vec::new();
    for way in &WAYS {
        let large = |source, destination| Packet {
            payload: vec![7; 1473],
            ..way.packet(source, destination)
        };
        let reply = large(way.target, way.client);
        let answer = too_big(&reply, 1500);
        steps.push(Step::answer("nat", reply.build(), answer, DropReason::TooBig).ingress(11));
    }
    run(&Scene::everything(), &steps);
}
