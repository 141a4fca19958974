//! Packets into tunnels, expected by etherparse. The program in the kernel has fixtures of its own,
//! in lb-tests.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::vec;
use std::vec::Vec;

use etherparse::{
    Icmpv4Slice, Icmpv4Type, IpNumber, NetSlice, PacketBuilder, SlicedPacket, TransportSlice,
    icmpv4::DestUnreachableHeader,
};

use crate::flow::{self, TCP};
use crate::forward::forward;
use crate::model::{Bytes, Model};
use crate::tables::{Endpoint, Listener, NextHop, Slot};
use crate::verdict::{DropReason, Verdict};
use crate::wire::eth::Macs;

use super::*;

const NIC: u32 = 3;
const GUE_PORT: u16 = 6080;
const MODES: [u8; 2] = [Target::DSR_IPIP, Target::DSR_GUE];
/// What the NIC carries, bytes.
const MTU: u16 = 1500;
/// Sources of tunnels: 172.16.0.0/16 and 100::/64.
const SOURCES: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(172, 16, 0, 0), Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0));

fn client(is_v4: bool) -> IpAddr {
    if is_v4 { Ipv4Addr::new(192, 0, 2, 7).into() } else { "2001:db8::7".parse().unwrap() }
}

fn vip(is_v4: bool) -> IpAddr {
    if is_v4 { Ipv4Addr::new(10, 0, 1, 100).into() } else { "fd00:1::100".parse().unwrap() }
}

fn target(is_v4: bool) -> IpAddr {
    if is_v4 { Ipv4Addr::new(10, 0, 9, 1).into() } else { "fd00:9::1".parse().unwrap() }
}

/// A listener on port 80 of both families, whose only target is behind a tunnel.
fn balancer(mode: u8, over_v4: bool) -> Model {
    let mut model = Model::new(1, 1);
    let macs = Macs::new([2, 0, 0, 0, 0, 9], [2, 0, 0, 0, 0, 2]);
    let entry = Target {
        address: target(over_v4).into(),
        mode,
        flags: Target::SERVES | Target::IN_RING,
        hop: NextHop { ifindex: NIC, macs, mtu: MTU, ..NextHop::default() },
        ..Target::default()
    };
    let entry = if over_v4 {
        entry.through_v4(SOURCES.0, 16, GUE_PORT)
    } else {
        entry.through_v6(SOURCES.1, GUE_PORT)
    };
    model.targets.insert(1, entry);
    model.rings.insert(0, vec![Slot::settled(1)]);
    for (number, is_v4) in [(1, true), (2, false)] {
        let (address, port) = (vip(is_v4).into(), Be16::new(80));
        let idle = flow::TCP_IDLE;
        let listener = Listener { address, port, protocol: TCP, idle, ..Listener::default() };
        model.listeners.insert(number, listener);
        let kind = Endpoint::LISTENER;
        let protocol = TCP;
        model.endpoints.insert(Endpoint {
            address,
            port,
            protocol,
            kind,
            listener: number,
            ..Endpoint::default()
        });
    }
    model
}

/// A segment of a client's to the listener.
fn request(is_v4: bool, port: u16, hops: u8, traffic_class: u8, length: usize) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let ip = match (client(is_v4), vip(is_v4)) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = etherparse::Ipv4Header::new(
                0,
                hops,
                IpNumber::TCP,
                source.octets(),
                destination.octets(),
            )
            .unwrap();
            header.dscp = (traffic_class >> 2).try_into().unwrap();
            header.ecn = (traffic_class & 3).try_into().unwrap();
            header.dont_fragment = true;
            ethernet.ip(etherparse::IpHeaders::Ipv4(header, Default::default()))
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let header = etherparse::Ipv6Header {
                traffic_class,
                source: source.octets(),
                destination: destination.octets(),
                hop_limit: hops,
                ..Default::default()
            };
            ethernet.ip(etherparse::IpHeaders::Ipv6(header, Default::default()))
        }
        _ => unreachable!("one family"),
    };
    let mut frame = Vec::new();
    ip.tcp(port, 80, 1, 1024).ack(1).write(&mut frame, &vec![7; length]).unwrap();
    frame
}

/// A packet in a tunnel, as etherparse reads it.
struct Read {
    source: IpAddr,
    destination: IpAddr,
    traffic_class: u8,
    hops: u8,
    /// Source port of GUE.
    port: Option<u16>,
    inner: Vec<u8>,
}

/// Takes the outer headers off, which must be right.
fn read(frame: &[u8]) -> Read {
    assert_eq!(frame[..12], [2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 2], "MAC addresses");
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let (source, destination, traffic_class, hops, payload): (IpAddr, IpAddr, _, _, _) =
        match packet.net.unwrap() {
            NetSlice::Ipv4(ip) => {
                let header = ip.header().to_header();
                assert_eq!(header.header_checksum, header.calc_header_checksum());
                assert!(header.dont_fragment);
                let class = header.dscp.value() << 2 | header.ecn.value();
                let ends = (header.source.into(), header.destination.into());
                (ends.0, ends.1, class, header.time_to_live, ip.payload().clone())
            }
            NetSlice::Ipv6(ip) => {
                let header = ip.header().to_header();
                let ends = (header.source.into(), header.destination.into());
                (ends.0, ends.1, header.traffic_class, header.hop_limit, ip.payload().clone())
            }
            NetSlice::Arp(_) => panic!("ARP"),
        };
    let (port, inner) = match packet.transport {
        Some(TransportSlice::Udp(udp)) => {
            assert_eq!((udp.destination_port(), udp.checksum()), (GUE_PORT, 0));
            (Some(udp.source_port()), udp.payload().to_vec())
        }
        _ => {
            let inner_is_v4 = payload.payload[0] >> 4 == 4;
            let number = if inner_is_v4 { IpNumber::IPV4 } else { IpNumber::IPV6 };
            assert_eq!(payload.ip_number, number);
            (None, payload.payload.to_vec())
        }
    };
    Read { source, destination, traffic_class, hops, port, inner }
}

fn forwarded(model: &Model, bytes: Vec<u8>) -> Read {
    let mut frame = Bytes { bytes, ingress: NIC };
    assert_eq!(forward(&mut frame, model), Verdict::Transmit, "{:?}", model.drops);
    read(&frame.bytes)
}

/// IPv4 or IPv6 inside, IPv4 or IPv6 outside, by either mode.
fn each_way(mut test: impl FnMut(u8, bool, bool)) {
    for mode in MODES {
        for (inner_v4, over_v4) in [(true, true), (false, false), (true, false), (false, true)] {
            test(mode, inner_v4, over_v4);
        }
    }
}

#[test]
fn the_packet_goes_whole_and_a_hop_older_behind_an_outer_header() {
    each_way(|mode, inner_v4, over_v4| {
        let model = balancer(mode, over_v4);
        let read = forwarded(&model, request(inner_v4, 40_000, 9, 0, 100));
        assert_eq!(read.inner, request(inner_v4, 40_000, 8, 0, 100)[14..], "{mode} {inner_v4}");
        assert_eq!(read.destination, target(over_v4));
        assert_eq!(read.port.is_some(), mode == Target::DSR_GUE);
        assert_eq!(read.hops, 64, "the tunnel's own");
        let is_ours = match read.source {
            IpAddr::V4(source) => source.octets()[..2] == SOURCES.0.octets()[..2],
            IpAddr::V6(source) => source.octets()[..8] == SOURCES.1.octets()[..8],
        };
        assert!(is_ours, "{}", read.source);
    });
}

#[test]
fn the_type_of_service_is_copied() {
    each_way(|mode, inner_v4, over_v4| {
        let model = balancer(mode, over_v4);
        for class in [0, 1, 3, 0xb8, 0xbb, 0xff] {
            let read = forwarded(&model, request(inner_v4, 40_000, 64, class, 0));
            assert_eq!(read.traffic_class, class);
        }
    });
}

#[test]
fn flows_differ_in_their_outer_source_and_keep_it() {
    each_way(|mode, inner_v4, over_v4| {
        let model = balancer(mode, over_v4);
        let of = |port, length| {
            let read = forwarded(&model, request(inner_v4, port, 64, 0, length));
            (read.source, read.port)
        };
        let flows: BTreeSet<(IpAddr, Option<u16>)> =
            (40_000..40_100).map(|port| of(port, 0)).collect();
        // Of 100 in 65,536 places, as many meet less than once in a million runs.
        assert!(flows.len() > 95, "{} outer sources of 100 flows", flows.len());
        assert_eq!(of(40_000, 0), of(40_000, 500));
        if mode == Target::DSR_GUE {
            let ports: BTreeSet<_> = flows.iter().map(|(_, port)| *port).collect();
            assert!(ports.len() > 90, "{} outer ports", ports.len());
        }
    });
}

#[test]
fn a_packet_at_its_last_hop_dies() {
    each_way(|mode, inner_v4, over_v4| {
        let model = balancer(mode, over_v4);
        let input = request(inner_v4, 40_000, 1, 0, 0);
        let mut frame = Bytes { bytes: input, ingress: NIC };
        assert_eq!(forward(&mut frame, &model), Verdict::Drop);
        assert_eq!(*model.drops.borrow(), [(DropReason::TtlExceeded, 1)].into());
    });
}

/// As large as the way carries with the outer header, and a byte larger.
#[test]
fn a_packet_too_big_for_the_tunnel_is_answered() {
    each_way(|mode, inner_v4, over_v4| {
        let model = balancer(mode, over_v4);
        let outer = if over_v4 { 20 } else { 40 } + if mode == Target::DSR_GUE { 8 } else { 0 };
        let room = usize::from(MTU) - outer;
        let headers = if inner_v4 { 20 } else { 40 } + 20;
        let fits = room - headers;
        let largest = forwarded(&model, request(inner_v4, 40_000, 64, 0, fits));
        assert_eq!(largest.inner.len(), room, "{mode} {inner_v4} {over_v4}");

        let mut frame = Bytes { bytes: request(inner_v4, 40_000, 64, 0, fits + 1), ingress: NIC };
        assert_eq!(forward(&mut frame, &model), Verdict::Transmit);
        assert_eq!(*model.drops.borrow(), [(DropReason::TooBig, 1)].into());
        assert_eq!(told(&frame.bytes), (vip(inner_v4), client(inner_v4), room));
    });
}

/// Who says that a packet was too big, to whom, and what would have been right.
fn told(frame: &[u8]) -> (IpAddr, IpAddr, usize) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    match (packet.net.unwrap(), packet.transport.unwrap()) {
        (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into(), mtu(&icmp))
        }
        (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
            let etherparse::Icmpv6Type::PacketTooBig { mtu } = icmp.icmp_type() else {
                panic!("{:?}", icmp.icmp_type())
            };
            let ends = (ip.header().source_addr().into(), ip.header().destination_addr().into());
            (ends.0, ends.1, mtu as usize)
        }
        other => panic!("{other:?}"),
    }
}

fn mtu(icmp: &Icmpv4Slice<'_>) -> usize {
    match icmp.icmp_type() {
        Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
            next_hop_mtu,
        }) => next_hop_mtu.into(),
        other => panic!("{other:?}"),
    }
}

/// Ethernet pads short frames: what is behind the packet stays behind it.
#[test]
fn padding_is_none_of_the_packet() {
    each_way(|mode, inner_v4, over_v4| {
        let model = balancer(mode, over_v4);
        let mut frame = Bytes { bytes: request(inner_v4, 40_000, 64, 0, 33), ingress: NIC };
        frame.bytes.extend([0xee; 5]);
        assert_eq!(forward(&mut frame, &model), Verdict::Transmit);
        let read = read(&frame.bytes);
        assert_eq!(read.inner, request(inner_v4, 40_000, 63, 0, 33)[14..]);
        assert_eq!(frame.bytes[frame.bytes.len() - 5..], [0xee; 5]);
    });
}
