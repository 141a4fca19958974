//! The program in the kernel, packet by packet, against expectations built with etherparse; and
//! against the same pipeline on the host.
//!
//! A fixture is a [`Step`]: what it shows, a frame, what becomes of it, what is counted. Steps of a
//! scenario follow one another, with the flows of the steps before remembered.

#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

mod connections;
mod echo;
mod errors;
mod generated;
mod least_connections;
mod mapped;
mod passing;
mod proxied;
mod refusals;
mod rewriting;
mod selection;
mod snat;
mod tunnels;

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    Icmpv4Type, Icmpv6Type, Ipv4Header, Ipv6Header, PacketBuilder, icmpv4, icmpv6, ip_number,
};
use lb_common::{
    tables::{Endpoint, Traffic},
    verdict::DropReason,
};
use lb_tests::{
    packets::{Checksum, Packet, Transport},
    progrun::{Action, Counts, Network, World, device_mac, gateway_mac, hex},
    scene::{OPTIONS, Scene, target_mac},
};

/// What becomes of a frame.
#[derive(Clone, Debug)]
enum Expect {
    /// The kernel gets it, untouched; nothing is counted.
    Pass,
    /// It dies for this reason, and the agent is told of this address.
    Drop(DropReason, Option<IpAddr>),
    /// It goes to a target; whether a flow begins.
    Request { action: Action, frame: Vec<u8>, listener: u32, target: u32, is_new: bool },
    /// The kernel gets it, untouched, for the proxy; whether a flow begins.
    Proxied { listener: u32, is_new: bool },
    /// It goes back to the client.
    Reply { action: Action, frame: Vec<u8>, listener: u32, target: u32 },
    /// It dies for this reason, and the client is told by this frame.
    Answer(DropReason, Vec<u8>),
    /// It is answered by this frame; nothing is counted.
    Echo(Vec<u8>),
}

/// A fixture.
#[derive(Clone, Debug)]
struct Step {
    what: &'static str,
    ingress: u32,
    input: Vec<u8>,
    expect: Expect,
}

/// Runs steps over a scene, one after the other.
fn run(scene: &Scene, steps: &[Step]) {
    in_world(scene, |world| {
        for step in steps {
            check(world, step);
        }
    });
}

/// Runs `f` over a scene.
fn in_world(scene: &Scene, f: impl FnOnce(&mut World<'_>) + Send) {
    let network = Network::new().unwrap();
    network.run(|| f(&mut World::new(&network, &OPTIONS, scene.desired.clone()).unwrap()));
}

/// Keeps a step's frame as an input of the fuzzer, in the folder that `LB_CORPUS` names: `ingress` 10
/// or 11 is the lowest bit of the first byte.
fn keep(step: &Step) {
    let Some(folder) = std::env::var_os("LB_CORPUS") else { return };
    let name: String =
        step.what.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let input = [vec![(step.ingress - 10) as u8], step.input.clone()].concat();
    std::fs::write(std::path::Path::new(&folder).join(name), input).unwrap();
}

/// Checks everything that a step says.
fn check(world: &mut World<'_>, step: &Step) {
    let what = step.what;
    keep(step);
    let before = world.counts().unwrap();
    let outcome = world.run(step.ingress, &step.input).unwrap_or_else(|e| panic!("{what}: {e}"));
    world.check_flows().unwrap_or_else(|error| panic!("{what}: {error}"));
    let counted = world.counts().unwrap_or_else(|error| panic!("{what}: {error}"));

    let (action, frame) = match &step.expect {
        Expect::Pass | Expect::Proxied { .. } => (Action::Pass, &step.input),
        // What is left of a dropped frame is nobody's business.
        Expect::Drop(..) => (Action::Drop, &outcome.frame),
        Expect::Request { action, frame, .. } | Expect::Reply { action, frame, .. } => {
            (*action, frame)
        }
        Expect::Answer(_, frame) | Expect::Echo(frame) => (Action::Transmit, frame),
    };
    let bytes = ip_bytes(&step.input);
    assert_eq!(outcome.action, action, "{what}; counted {:?}", counted.drops);
    let show = || format!("{what}\nis\n{}\nshould be\n{}", hex(&outcome.frame), hex(frame));
    assert!(outcome.frame == *frame, "{}", show());
    let reports: Vec<IpAddr> = outcome.unresolved.iter().map(|address| (*address).into()).collect();
    let expected = match step.expect {
        Expect::Drop(_, unresolved) => unresolved.into_iter().collect(),
        _ => Vec::new(),
    };
    assert_eq!(reports, expected, "{what}");
    assert_eq!(counted, after(before, &step.expect, bytes), "{what}");
}

/// The counters after a packet of `bytes`.
fn after(mut counts: Counts, expect: &Expect, bytes: u64) -> Counts {
    let mut count = |listener, target, add: &dyn Fn(&mut Traffic)| {
        add(counts.listeners.entry(listener).or_default());
        add(counts.targets.entry(target).or_default());
    };
    match *expect {
        Expect::Pass | Expect::Echo(_) => {}
        Expect::Drop(reason, _) | Expect::Answer(reason, _) => {
            *counts.drops.entry(reason).or_default() += 1;
        }
        Expect::Request { listener, target, is_new, .. } => count(listener, target, &|traffic| {
            traffic.packets += 1;
            traffic.bytes += bytes;
            traffic.new_flows += u64::from(is_new);
        }),
        Expect::Proxied { listener, is_new } => {
            let traffic = counts.listeners.entry(listener).or_default();
            traffic.packets += 1;
            traffic.bytes += bytes;
            traffic.new_flows += u64::from(is_new);
        }
        Expect::Reply { listener, target, .. } => count(listener, target, &|traffic| {
            traffic.reply_packets += 1;
            traffic.reply_bytes += bytes;
        }),
    }
    counts
}

/// Length of the IP packet in a frame, by its header.
fn ip_bytes(frame: &[u8]) -> u64 {
    match etherparse::SlicedPacket::from_ethernet(frame).ok().and_then(|packet| packet.net) {
        Some(etherparse::NetSlice::Ipv4(ip)) => u64::from(ip.header().total_len()),
        Some(etherparse::NetSlice::Ipv6(ip)) => 40 + u64::from(ip.header().payload_length()),
        _ => 0,
    }
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A segment amid a connection, with data.
fn segment(source: &str, destination: &str) -> Packet {
    Packet { payload: b"hello world".to_vec(), ..Packet::tcp(at(source), at(destination)) }
}

/// The first segment of a connection.
fn syn(source: &str, destination: &str) -> Packet {
    Packet::syn(at(source), at(destination))
}

/// A segment with these control bits: `F`, `S`, `R`, `A`.
fn flagged(source: &str, destination: &str, flags: &str) -> Packet {
    Packet::flagged(at(source), at(destination), flags)
}

/// A datagram with data.
fn datagram(source: &str, destination: &str) -> Packet {
    Packet { payload: b"hello world".to_vec(), ..Packet::udp(at(source), at(destination)) }
}

/// A client's first datagram of QUIC version 1, as far as it is not encrypted.
fn quic_initial(client: &str, vip: &str) -> Packet {
    let mut payload = vec![0; 1200];
    payload[..6].copy_from_slice(&[0xc3, 0, 0, 0, 1, 8]);
    Packet { payload, ..datagram(client, vip) }
}

/// A request as its target gets it through device 11.
fn translated(request: &Packet, target: u32, to: &str) -> Packet {
    Packet {
        destination: at(to),
        hop_limit: request.hop_limit - 1,
        source_mac: device_mac(11),
        destination_mac: target_mac(target),
        ..request.clone()
    }
}

/// A reply as it goes back to the client's gateway on a device.
fn restored(reply: &Packet, listener: &str, device: u32) -> Packet {
    Packet {
        source: at(listener),
        hop_limit: reply.hop_limit - 1,
        source_mac: device_mac(device),
        destination_mac: gateway_mac(device),
        ..reply.clone()
    }
}

impl Step {
    fn new(what: &'static str, input: impl Into<Vec<u8>>, expect: Expect) -> Self {
        Self { what, ingress: 10, input: input.into(), expect }
    }

    /// From a client on device 10 to a target on another; numbers of listener and target.
    fn to(what: &'static str, input: &Packet, output: &Packet, to: (u32, u32)) -> Self {
        Self::frames_to(what, input.build(), output.build(), to).with_is_new(is_syn(input))
    }

    fn frames_to(what: &'static str, input: Vec<u8>, frame: Vec<u8>, to: (u32, u32)) -> Self {
        let (listener, target) = to;
        let action = Action::Redirect;
        Self::new(what, input, Expect::Request { action, frame, listener, target, is_new: false })
    }

    /// From a target on device 11 to a client behind device 10.
    fn back(what: &'static str, input: &Packet, output: &Packet, from: (u32, u32)) -> Self {
        let (listener, target) = from;
        let (action, frame) = (Action::Redirect, output.build());
        let expect = Expect::Reply { action, frame, listener, target };
        Self { ingress: 11, ..Self::new(what, input.build(), expect) }
    }

    fn pass(what: &'static str, input: impl Into<Vec<u8>>) -> Self {
        Self::new(what, input, Expect::Pass)
    }

    /// From a client to a listener of the proxy.
    fn proxied(what: &'static str, input: &Packet, listener: u32) -> Self {
        Self::new(what, input.build(), Expect::Proxied { listener, is_new: is_syn(input) })
    }

    fn drop(what: &'static str, input: impl Into<Vec<u8>>, reason: DropReason) -> Self {
        Self::new(what, input, Expect::Drop(reason, None))
    }

    fn unresolved(what: &'static str, input: &Packet, address: &str) -> Self {
        let address = address.parse().unwrap();
        Self::new(what, input.build(), Expect::Drop(DropReason::NextHopUnresolved, Some(address)))
    }

    fn answer(
        what: &'static str,
        input: impl Into<Vec<u8>>,
        output: Vec<u8>,
        reason: DropReason,
    ) -> Self {
        Self::new(what, input, Expect::Answer(reason, output))
    }

    fn ingress(self, ingress: u32) -> Self {
        Self { ingress, ..self }
    }

    /// Out of the NIC that it came in by.
    fn transmitted(mut self) -> Self {
        if let Expect::Request { action, .. } | Expect::Reply { action, .. } = &mut self.expect {
            *action = Action::Transmit;
        }
        self
    }

    fn with_is_new(mut self, new: bool) -> Self {
        if let Expect::Request { is_new, .. } = &mut self.expect {
            *is_new = new;
        }
        self
    }
}

fn is_syn(packet: &Packet) -> bool {
    matches!(&packet.transport, Transport::Tcp(header) if header.syn && !header.ack)
}

/// The reset that answers a segment, from its destination to its source.
fn reset(refused: &Packet) -> Packet {
    let Transport::Tcp(header) = &refused.transport else { panic!("TCP alone has resets") };
    let mut answer = flagged("0.0.0.0:1", "0.0.0.0:1", "R");
    let Transport::Tcp(reset) = &mut answer.transport else { panic!("TCP") };
    reset.window_size = 0;
    reset.acknowledgment_number = 0;
    if header.ack {
        reset.sequence_number = header.acknowledgment_number;
    } else {
        reset.ack = true;
        reset.sequence_number = 0;
        let occupied = refused.payload.len() as u32 + u32::from(header.syn) + u32::from(header.fin);
        reset.acknowledgment_number = header.sequence_number.wrapping_add(occupied);
    }
    Packet {
        source: refused.destination,
        destination: refused.source,
        source_mac: refused.destination_mac,
        destination_mac: refused.source_mac,
        vlans: refused.vlans.clone(),
        ..answer
    }
}

/// The port unreachable that answers a datagram, quoting its headers.
fn unreachable(refused: &Packet) -> Vec<u8> {
    quoting(
        refused,
        Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port),
        Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port),
    )
}

/// What answers a packet that is larger than the way to its target carries.
fn too_big(refused: &Packet, mtu: usize) -> Vec<u8> {
    let next_hop_mtu = mtu as u16;
    let header = icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu };
    quoting(
        refused,
        Icmpv4Type::DestinationUnreachable(header),
        Icmpv6Type::PacketTooBig { mtu: mtu as u32 },
    )
}

/// The ICMP error of the packet's family from its destination to its source, quoting its headers.
fn quoting(refused: &Packet, v4: Icmpv4Type, v6: Icmpv6Type) -> Vec<u8> {
    let frame = refused.build();
    let l3 = 14 + 4 * refused.vlans.len();
    let macs = (refused.destination_mac, refused.source_mac);
    let ethernet = PacketBuilder::ethernet2(macs.0, macs.1);
    let mut answer = Vec::new();
    match (refused.source.ip(), refused.destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header =
                Ipv4Header::new(0, 64, ip_number::ICMP, destination.octets(), source.octets())
                    .unwrap();
            header.dont_fragment = true;
            let quoted = &frame[l3..l3 + 28];
            let builder = ethernet.ip(etherparse::IpHeaders::Ipv4(header, Default::default()));
            builder.icmpv4(v4).write(&mut answer, quoted).unwrap();
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let header = Ipv6Header {
                source: destination.octets(),
                destination: source.octets(),
                hop_limit: 64,
                ..Default::default()
            };
            let quoted = &frame[l3..l3 + 48];
            let builder = ethernet.ip(etherparse::IpHeaders::Ipv6(header, Default::default()));
            builder.icmpv6(v6).write(&mut answer, quoted).unwrap();
        }
        _ => panic!("one family"),
    }
    // The tags as they came.
    answer.splice(12..12, frame[12..l3 - 2].iter().copied());
    answer
}

/// `output`, whose checksum is as wrong as `input`'s, measured in ones' complement: what updating a
/// checksum by differences (RFC 1624) comes to.
fn equally_wrong(input: &Packet, output: &Packet) -> Vec<u8> {
    let offset = |packet: &Packet| match &packet.transport {
        Transport::Tcp(header) => (header.header_len() + packet.payload.len()) - 16,
        Transport::Udp => 8 + packet.payload.len() - 6,
    };
    let field = |packet: &Packet, checksum| {
        let frame = Packet { checksum, ..packet.clone() }.build();
        let start = frame.len() - offset(packet);
        u32::from(u16::from_be_bytes([frame[start], frame[start + 1]]))
    };
    let error = field(input, input.checksum) + (0xffff - field(input, Checksum::Right));
    let sum = (field(output, Checksum::Right) + error) % 0xffff;
    let mut frame = output.build();
    let start = frame.len() - offset(output);
    frame[start..start + 2].copy_from_slice(&(sum as u16).to_be_bytes());
    frame
}

/// A frame with some of its bytes overwritten; offsets from the Ethernet header on.
fn patched(frame: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = frame;
    frame[offset..offset + bytes.len()].copy_from_slice(bytes);
    frame
}

/// An untagged IPv4 frame with its header changed and its checksum put right.
fn with_ipv4(frame: Vec<u8>, change: impl FnOnce(&mut Ipv4Header)) -> Vec<u8> {
    let (mut header, _) = Ipv4Header::from_slice(&frame[14..]).unwrap();
    let length = header.header_len();
    change(&mut header);
    header.header_checksum = header.calc_header_checksum();
    let bytes = header.to_bytes();
    patched(frame, 14, &bytes[..length])
}
