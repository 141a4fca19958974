//! Pings of addresses that the agent added.

use std::net::IpAddr;

use etherparse::{IcmpEchoHeader, PacketBuilder, VlanId};
use lb_common::verdict::DropReason::SecurityGroupDenied;
use lb_tests::packets::{OUR_MAC, verify_checksums};

use super::*;

const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ECHO: IcmpEchoHeader = IcmpEchoHeader { id: 0x1234, seq: 7 };

/// An echo request or its reply.
#[derive(Clone)]
struct Ping {
    is_reply: bool,
    source_mac: [u8; 6],
    destination_mac: [u8; 6],
    vlan: Option<u16>,
    source: IpAddr,
    destination: IpAddr,
    hop_limit: u8,
    payload: Vec<u8>,
}

impl Ping {
    fn new(source: &str, destination: &str) -> Self {
        Self {
            is_reply: false,
            source_mac: PEER_MAC,
            destination_mac: OUR_MAC,
            vlan: None,
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            hop_limit: 57,
            payload: b"are you there?".to_vec(),
        }
    }

    fn reply(&self) -> Self {
        Self {
            is_reply: true,
            source_mac: self.destination_mac,
            destination_mac: self.source_mac,
            source: self.destination,
            destination: self.source,
            hop_limit: 64,
            ..self.clone()
        }
    }

    fn build(&self) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2(self.source_mac, self.destination_mac);
        let vlan = self.vlan.map(|id| VlanId::try_new(id).unwrap());
        let mut frame = Vec::new();
        match (self.source, self.destination) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let (from, to) = (from.octets(), to.octets());
                let ip = match vlan {
                    Some(vlan) => ethernet.single_vlan(vlan).ipv4(from, to, self.hop_limit),
                    None => ethernet.ipv4(from, to, self.hop_limit),
                };
                let kind = if self.is_reply {
                    Icmpv4Type::EchoReply(ECHO)
                } else {
                    Icmpv4Type::EchoRequest(ECHO)
                };
                ip.icmpv4(kind).write(&mut frame, &self.payload).unwrap();
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let (from, to) = (from.octets(), to.octets());
                let ip = match vlan {
                    Some(vlan) => ethernet.single_vlan(vlan).ipv6(from, to, self.hop_limit),
                    None => ethernet.ipv6(from, to, self.hop_limit),
                };
                let kind = if self.is_reply {
                    Icmpv6Type::EchoReply(ECHO)
                } else {
                    Icmpv6Type::EchoRequest(ECHO)
                };
                ip.icmpv6(kind).write(&mut frame, &self.payload).unwrap();
            }
            _ => panic!("one family"),
        }
        frame
    }
}

fn answered(what: &'static str, ping: &Ping) -> Step {
    let reply = ping.reply().build();
    verify_checksums(&reply).unwrap();
    Step::new(what, ping.build(), Expect::Echo(reply))
}

const ADDRESSES: [(&str, &str); 2] =
    [("192.0.10.9", "10.0.10.100"), ("2001:db8:10::1", "fd00:10::100")];

#[test]
fn pings_are_answered() {
    let mut steps = Vec::new();
    for (client, vip) in ADDRESSES {
        let ping = Ping::new(client, vip);
        steps.push(answered("a ping", &ping));
        steps.push(answered("without data", &Ping { payload: Vec::new(), ..ping.clone() }));
        let odd = Ping { payload: vec![7; 1401], ..ping.clone() };
        steps.push(answered("of an odd length", &odd));
        steps.push(answered("tagged", &Ping { vlan: Some(9), ..ping.clone() }));
        steps.push(answered("on its last hop", &Ping { hop_limit: 1, ..ping.clone() }));
        let mut padded = ping.build();
        padded.extend([0; 9]);
        let mut reply = ping.reply().build();
        reply.extend([0; 9]);
        steps.push(Step::new("with padding", padded, Expect::Echo(reply)));
        // What was corrupted on the way stays so.
        let (mut input, mut output) = (ping.build(), ping.reply().build());
        for frame in [&mut input, &mut output] {
            *frame.last_mut().unwrap() ^= 0x55;
        }
        steps.push(Step::new("with a wrong checksum", input, Expect::Echo(output)));
    }
    run(&Scene::everything(), &steps);
}

#[test]
fn other_pings_are_the_kernels() {
    let mut steps = Vec::new();
    for ((client, vip), own) in ADDRESSES.into_iter().zip(["10.0.10.2", "fd00:10::2"]) {
        let ping = Ping::new(client, vip);
        steps.push(Step::pass("of the machine's own address", Ping::new(client, own).build()));
        steps.push(Step::pass("a reply", ping.reply().reply().build()));
        let everybody = Ping { destination_mac: [0xff; 6], ..ping.clone() };
        steps.push(Step::pass("to everybody", everybody.build()));
        let mut frame = ping.build();
        frame.pop();
        steps.push(Step::pass("cut short", frame));
    }
    let (client, vip) = ADDRESSES[0];
    let ping = Ping::new(client, vip).build();
    let fragment = with_ipv4(ping.clone(), |header| header.more_fragments = true);
    steps.push(Step::pass("a fragment, to be put together", fragment));
    let mut options = patched(ping, 14, &[0x46]);
    options.splice(34..34, [1; 4]);
    let options = with_ipv4(options, |header| header.total_len += 4);
    steps.push(Step::pass("with options", options));
    run(&Scene::everything(), &steps);
}

#[test]
fn pings_need_a_rule_where_there_are_groups() {
    let denied =
        |client, vip| Step::drop("a stranger", Ping::new(client, vip).build(), SecurityGroupDenied);
    run(
        &Scene::everything(),
        &[
            answered("admitted", &Ping::new("192.0.10.9", "10.0.10.100")),
            denied("203.0.113.1", "10.0.10.100"),
            answered("admitted over IPv6", &Ping::new("2001:db8:10::1", "fd00:10::100")),
            denied("2001:db8:11::1", "fd00:10::100"),
            answered("an address without groups", &Ping::new("203.0.113.1", "10.0.10.110")),
        ],
    );
}
