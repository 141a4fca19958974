//! Packets on their way through tunnels.
//!
//! What of an outer header varies with the flow is free within its bounds: a step looks at it first,
//! builds the whole frame around it, and then checks that the frame comes out like that again.

use std::collections::HashSet;

use etherparse::{
    EtherType, Ethernet2Header, IpNumber, Ipv4Header, Ipv6Extensions, Ipv6Header, Ipv6RawExtHeader,
    NetSlice, SingleVlanHeader, SlicedPacket, UdpHeader, VlanId, ip_number,
};
use lb_common::verdict::DropReason;
use lb_tests::{
    packets::{Checksum, Packet},
    progrun::device_mac,
    scene::{GUE_PORT, Scene, target_mac},
};

use super::*;

const CLIENT: &str = "192.0.10.7:4000";
const CLIENT6: &str = "[2001:db8:10::7]:4000";

/// A tunnel of the scene: listener and target of that number.
#[derive(Clone, Copy, Debug)]
struct Tunnel {
    number: u32,
    /// Client and listener.
    inner_v6: bool,
    /// Target.
    outer_v6: bool,
    gue: bool,
    device: u32,
    vlan: Option<u16>,
}

impl Tunnel {
    fn new(number: u32, inner_v6: bool, outer_v6: bool, gue: bool) -> Self {
        Self { number, inner_v6, outer_v6, gue, device: 11, vlan: None }
    }

    /// All of them: each family in each, both kinds.
    fn all() -> [Self; 8] {
        std::array::from_fn(|n| Self::new(60 + n as u32, n >= 4, n % 4 >= 2, n % 2 == 1))
    }

    fn target(&self) -> IpAddr {
        let n = self.number % 100;
        let text = if self.outer_v6 { format!("fd00:11::{n:x}") } else { format!("10.0.11.{n}") };
        text.parse().unwrap()
    }

    fn listener(&self) -> String {
        let vip = if self.inner_v6 { "[fd00:10::100]" } else { "10.0.10.100" };
        format!("{vip}:{}", 40 + self.number)
    }

    fn client(&self) -> &'static str {
        if self.inner_v6 { CLIENT6 } else { CLIENT }
    }

    fn segment(&self) -> Packet {
        segment(self.client(), &self.listener())
    }

    fn datagram(&self) -> Packet {
        let udp = Self { number: self.number + 20, ..*self };
        datagram(self.client(), &udp.listener())
    }

    /// Bytes that it adds.
    fn overhead(&self) -> usize {
        let ip = if self.outer_v6 { 40 } else { 20 };
        ip + if self.gue { 8 } else { 0 }
    }
}

/// What varies with the flow.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
struct Varying {
    source: IpAddr,
    label: u32,
    port: u16,
}

/// Reads it from an encapsulated frame, and checks its bounds.
fn varying(frame: &[u8], tunnel: &Tunnel) -> Varying {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let (source, label): (IpAddr, u32) = match packet.net.unwrap() {
        NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), 0),
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().flow_label().value()),
        NetSlice::Arp(_) => panic!("ARP"),
    };
    match source {
        IpAddr::V4(v4) => assert_eq!(v4.octets()[..2], [172, 16]),
        IpAddr::V6(v6) => assert_eq!(v6.segments()[..6], [0x100, 0, 0, 0, 0, 0]),
    }
    let mut port = 0;
    if tunnel.gue {
        let Some(etherparse::TransportSlice::Udp(udp)) = packet.transport else { panic!("UDP") };
        port = udp.source_port();
        assert!(port >= 49_152, "{port}");
    }
    Varying { source, label, port }
}

/// The frame at the target: `inner` is an untagged frame as it would be without the tunnel.
fn encapsulated(inner: &[u8], class: u8, tunnel: &Tunnel, varying: Varying) -> Vec<u8> {
    let inner = &inner[14..];
    // Without Ethernet's padding.
    let length = match inner[0] >> 4 {
        4 => usize::from(u16::from_be_bytes([inner[2], inner[3]])),
        _ => 40 + usize::from(u16::from_be_bytes([inner[4], inner[5]])),
    };
    let udp = UdpHeader {
        source_port: varying.port,
        destination_port: GUE_PORT,
        length: 8 + length as u16,
        checksum: 0,
    };
    let udp = if tunnel.gue { udp.to_bytes().to_vec() } else { Vec::new() };
    let protocol = match (tunnel.gue, inner[0] >> 4) {
        (true, _) => ip_number::UDP,
        (false, 4) => IpNumber(4),
        (false, _) => IpNumber(41),
    };
    let payload = (udp.len() + length) as u16;
    let (ip, ether_type) = match (varying.source, tunnel.target()) {
        (IpAddr::V4(source), IpAddr::V4(target)) => {
            let (source, target) = (source.octets(), target.octets());
            let mut header = Ipv4Header::new(payload, 64, protocol, source, target).unwrap();
            header.dont_fragment = true;
            header.dscp = (class >> 2).try_into().unwrap();
            header.ecn = (class & 3).try_into().unwrap();
            header.header_checksum = header.calc_header_checksum();
            (header.to_bytes().to_vec(), EtherType::IPV4)
        }
        (IpAddr::V6(source), IpAddr::V6(target)) => {
            let header = Ipv6Header {
                traffic_class: class,
                flow_label: varying.label.try_into().unwrap(),
                payload_length: payload,
                next_header: protocol,
                hop_limit: 64,
                source: source.octets(),
                destination: target.octets(),
            };
            (header.to_bytes().to_vec(), EtherType::IPV6)
        }
        _ => panic!("the outer source is of another family than the target"),
    };
    [ethernet(tunnel, ether_type), ip, udp, inner.to_vec()].concat()
}

fn ethernet(tunnel: &Tunnel, ether_type: EtherType) -> Vec<u8> {
    let outer = if tunnel.vlan.is_some() { EtherType::VLAN_TAGGED_FRAME } else { ether_type };
    let ethernet = Ethernet2Header {
        source: device_mac(tunnel.device),
        destination: target_mac(tunnel.number),
        ether_type: outer,
    };
    let mut bytes = ethernet.to_bytes().to_vec();
    if let Some(id) = tunnel.vlan {
        let tag = SingleVlanHeader {
            pcp: Default::default(),
            drop_eligible_indicator: false,
            vlan_id: VlanId::try_new(id).unwrap(),
            ether_type,
        };
        bytes.extend(tag.to_bytes());
    }
    bytes
}

/// A frame goes in, and comes out as `inner` behind an outer header of this class.
fn through(
    world: &mut World<'_>,
    what: &'static str,
    input: Vec<u8>,
    inner: &[u8],
    class: u8,
    tunnel: &Tunnel,
) -> Varying {
    let outcome = world.run(10, &input).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(outcome.frame.len() > input.len(), "{what}: {:?}", outcome.action);
    let varying = varying(&outcome.frame, tunnel);
    let frame = encapsulated(inner, class, tunnel, varying);
    let mut step = Step::frames_to(what, input, frame, (tunnel.number, tunnel.number));
    if tunnel.device == 10 {
        step = step.transmitted();
    }
    check(world, &step);
    varying
}

/// With one hop less.
fn aged(packet: &Packet) -> Packet {
    Packet { hop_limit: packet.hop_limit - 1, ..packet.clone() }
}

/// Through a tunnel that changes nothing but the hop.
fn plain(world: &mut World<'_>, what: &'static str, packet: &Packet, tunnel: &Tunnel) -> Varying {
    let inner = Packet { vlans: Vec::new(), ..aged(packet) };
    through(world, what, packet.build(), &inner.build(), 0, tunnel)
}

#[test]
fn every_family_in_every_family() {
    in_world(&Scene::everything(), |world| {
        for tunnel in Tunnel::all() {
            let tcp = tunnel.segment();
            let one = plain(world, "TCP", &tcp, &tunnel);
            let large = Packet { payload: vec![0x5a; 900], ..tcp.clone() };
            let same = plain(world, "more of the same flow", &large, &tunnel);
            assert_eq!(one, same, "{tunnel:?}");
            let udp = Tunnel { number: tunnel.number + 20, ..tunnel };
            plain(world, "UDP", &tunnel.datagram(), &udp);
            let none = Packet { checksum: Checksum::Zero, ..tunnel.datagram() };
            plain(world, "a UDP checksum of zero is not touched", &none, &udp);
            for checksum in [Checksum::Wrong, Checksum::Partial] {
                let packet = Packet { checksum, ..tcp.clone() };
                plain(world, "the packet's checksum is not touched", &packet, &tunnel);
            }
        }
    });
}

#[test]
fn new_connections_are_counted() {
    in_world(&Scene::everything(), |world| {
        for tunnel in Tunnel::all() {
            let opening = syn(tunnel.client(), &tunnel.listener());
            let outcome = world.run(10, &opening.build()).unwrap();
            let seen = varying(&outcome.frame, &tunnel);
            let frame = encapsulated(&aged(&opening).build(), 0, &tunnel, seen);
            let (n, is_new) = (tunnel.number, true);
            let step = Step::frames_to("a SYN", opening.build(), frame, (n, n));
            check(world, &step.with_is_new(is_new));
        }
    });
}

/// RFC 6040 section 4.1, normal mode: the outer header begins with the inner one's ECN bits. DSCP is
/// copied with them.
#[test]
fn type_of_service_is_copied() {
    let with_class = |frame: Vec<u8>, class: u8| match frame[14] >> 4 {
        4 => with_ipv4(frame, |header| {
            header.dscp = (class >> 2).try_into().unwrap();
            header.ecn = (class & 3).try_into().unwrap();
        }),
        _ => patched(frame, 14, &[0x60 | class >> 4, class << 4]),
    };
    in_world(&Scene::everything(), |world| {
        for tunnel in Tunnel::all() {
            for class in [0b01, 0b10, 0b11, 0b1011_1000, 0xff, 0x1f] {
                let input = with_class(tunnel.segment().build(), class);
                let inner = with_class(aged(&tunnel.segment()).build(), class);
                through(world, "a class", input, &inner, class, &tunnel);
            }
        }
    });
}

#[test]
fn headers_of_every_shape_travel_whole() {
    let raw = Ipv6RawExtHeader::new_raw(ip_number::TCP, &[0; 6]).unwrap();
    let extensions = Ipv6Extensions { hop_by_hop_options: Some(raw), ..Default::default() };
    in_world(&Scene::everything(), |world| {
        for tunnel in Tunnel::all() {
            let tcp = tunnel.segment();
            let special = if tunnel.inner_v6 {
                Packet { ipv6_extensions: extensions.clone(), ..tcp.clone() }
            } else {
                Packet { ipv4_options: vec![1; 40], ..tcp.clone() }
            };
            plain(world, "options or extension headers", &special, &tunnel);
            let last = Packet { hop_limit: 2, ..tcp.clone() };
            plain(world, "the last hop but one", &last, &tunnel);
            for vlans in [vec![7], vec![7, 8]] {
                let tagged = Packet { vlans, ..tcp.clone() };
                plain(world, "tags are removed", &tagged, &tunnel);
            }
            let pad = |packet: &Packet| [packet.build(), vec![0; 18]].concat();
            let (input, inner) = (pad(&tcp), pad(&aged(&tcp)));
            through(world, "padding is not counted", input, &inner, 0, &tunnel);
        }
    });
}

#[test]
fn vlans_and_nics_of_targets() {
    let tagged = [
        Tunnel { vlan: Some(200), ..Tunnel::new(70, false, false, false) },
        Tunnel { vlan: Some(200), ..Tunnel::new(71, true, true, true) },
    ];
    in_world(&Scene::everything(), |world| {
        for tunnel in tagged {
            plain(world, "a tag is added", &tunnel.segment(), &tunnel);
            for vlans in [vec![7], vec![7, 8]] {
                let packet = Packet { vlans, ..tunnel.segment() };
                plain(world, "tags are replaced", &packet, &tunnel);
            }
        }
        let back = Tunnel { device: 10, ..Tunnel::new(72, false, true, true) };
        plain(world, "a target on the NIC it came by", &back.segment(), &back);
    });
}

#[test]
fn slots_that_learn() {
    in_world(&Scene::everything(), |world| {
        let tcp = Tunnel::new(73, false, false, false);
        let once = plain(world, "TCP that is not known", &tcp.segment(), &tcp);
        let again = plain(world, "TCP that is known", &tcp.segment(), &tcp);
        assert_eq!(once, again);
        let udp = Tunnel::new(74, true, false, true);
        let datagram = datagram(CLIENT6, &udp.listener());
        // The first look makes it a known flow.
        plain(world, "UDP", &datagram, &udp);
    });
}

/// 600 flows of one client: two of them meet by chance once in 16,384 (ports) or 65,536 (IPv4
/// sources); more than 100 that meet would be no chance.
#[test]
fn flows_differ_in_what_varies() {
    in_world(&Scene::everything(), |world| {
        for tunnel in Tunnel::all() {
            let seen: Vec<Varying> = (10_000..10_600)
                .map(|port| {
                    let mut packet = tunnel.segment();
                    packet.source.set_port(port);
                    varying(&world.run(10, &packet.build()).unwrap().frame, &tunnel)
                })
                .collect();
            let count =
                |of: fn(&Varying) -> u128| seen.iter().map(of).collect::<HashSet<_>>().len();
            let sources = count(|varying| match varying.source {
                IpAddr::V4(v4) => v4.to_bits().into(),
                IpAddr::V6(v6) => v6.to_bits(),
            });
            assert!(sources > 500, "{sources} sources: {tunnel:?}");
            if tunnel.gue {
                let ports = count(|varying| varying.port.into());
                assert!(ports > 500, "{ports} ports: {tunnel:?}");
            }
            if tunnel.outer_v6 {
                let labels = count(|varying| varying.label.into());
                assert!(labels > 500, "{labels} labels: {tunnel:?}");
            }
        }
    });
}

#[test]
fn too_big_for_the_tunnel() {
    in_world(&Scene::everything(), |world| {
        for tunnel in Tunnel::all() {
            let mtu = 1500 - tunnel.overhead();
            let of_length = |packet: Packet, length: usize| {
                let headers = Packet { payload: Vec::new(), ..packet.clone() }.build().len() - 14;
                Packet { payload: vec![7; length - headers], ..packet }
            };
            let fits = of_length(tunnel.segment(), mtu);
            plain(world, "as large as can be", &fits, &tunnel);
            for packet in [tunnel.segment(), tunnel.datagram()] {
                let packet = of_length(packet, mtu + 1);
                let answer = too_big(&packet, mtu);
                let what = "a byte too large";
                check(world, &Step::answer(what, packet.build(), answer, DropReason::TooBig));
            }
            let tagged = Packet { vlans: vec![7, 8], ..of_length(tunnel.segment(), 1500) };
            let answer = too_big(&tagged, mtu);
            let what = "too large, with tags";
            check(world, &Step::answer(what, tagged.build(), answer, DropReason::TooBig));
            if !tunnel.inner_v6 {
                let packet = of_length(tunnel.segment(), mtu + 1).build();
                let packet = with_ipv4(packet, |header| header.dont_fragment = false);
                check(world, &Step::drop("may be fragmented", packet, DropReason::TooBig));
                let options = Packet { ipv4_options: vec![1; 4], ..fits.clone() };
                check(world, &Step::drop("options", options.build(), DropReason::TooBig));
            }
        }
    });
}

#[test]
fn ways_that_do_not_lead_anywhere() {
    in_world(&Scene::everything(), |world| {
        for tunnel in Tunnel::all() {
            for hop_limit in [1, 0] {
                let packet = Packet { hop_limit, ..tunnel.segment() };
                let what = "no hop left";
                check(world, &Step::drop(what, packet.build(), DropReason::TtlExceeded));
            }
        }
        let no_way = Tunnel::new(75, false, true, false);
        let target = no_way.target().to_string();
        check(world, &Step::unresolved("no next hop", &no_way.segment(), &target));
    });
}
