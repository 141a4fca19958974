//! Frames, built by etherparse.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    Icmpv4Type, Icmpv6Type, IpFragOffset, IpHeaders, IpNumber, Ipv4Header, Ipv6Header,
    PacketBuilder, ip_number,
};
use lb_tests::packets::Packet;

/// The load balancer's NIC on the target's segment, which is among its group's members.
pub const BALANCER: [u8; 6] = [2, 0, 0x0a, 0, 2, 1];

pub fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A TCP segment with these control bits: `F`, `S`, `R`, `A`.
pub fn tcp(source: &str, destination: &str, flags: &str) -> Packet {
    Packet::flagged(at(source), at(destination), flags)
}

pub fn udp(source: &str, destination: &str) -> Packet {
    Packet { payload: b"hello world".to_vec(), ..Packet::udp(at(source), at(destination)) }
}

/// From the load balancer's NIC.
pub fn balanced(packet: Packet) -> Packet {
    Packet { source_mac: BALANCER, ..packet }
}

/// Length of Ethernet header and tags.
fn link_length(packet: &Packet) -> usize {
    14 + 4 * packet.vlans.len()
}

/// The IP packet in a frame.
pub fn ip_packet(packet: &Packet) -> Vec<u8> {
    packet.build()[link_length(packet)..].to_vec()
}

fn ip_headers(source: IpAddr, destination: IpAddr) -> IpHeaders {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => IpHeaders::Ipv4(
            Ipv4Header {
                source: source.octets(),
                destination: destination.octets(),
                time_to_live: 64,
                dont_fragment: true,
                ..Default::default()
            },
            Default::default(),
        ),
        (IpAddr::V6(source), IpAddr::V6(destination)) => IpHeaders::Ipv6(
            Ipv6Header {
                source: source.octets(),
                destination: destination.octets(),
                hop_limit: 64,
                ..Default::default()
            },
            Default::default(),
        ),
        _ => panic!("one address of each family"),
    }
}

/// Bytes of a protocol in an IP packet in a frame; addresses as text.
pub fn in_ip(source: &str, destination: &str, protocol: IpNumber, payload: &[u8]) -> Vec<u8> {
    let headers = ip_headers(source.parse().unwrap(), destination.parse().unwrap());
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]).ip(headers);
    builder.write(&mut frame, protocol, payload).unwrap();
    frame
}

/// An IP packet in IP in a frame.
pub fn ipip(source: &str, destination: &str, inner: &Packet) -> Vec<u8> {
    let protocol = if inner.source.is_ipv4() { ip_number::IPV4 } else { ip_number::IPV6 };
    with_tags(inner, in_ip(source, destination, protocol, &ip_packet(inner)))
}

/// An IP packet in UDP in a frame; addresses with ports.
pub fn gue(source: &str, destination: &str, inner: &Packet) -> Vec<u8> {
    let payload = ip_packet(inner);
    let outer = Packet { payload, ..Packet::udp(at(source), at(destination)) };
    with_tags(inner, outer.build())
}

/// Gives an outer frame the link header of the inner packet.
fn with_tags(inner: &Packet, outer: Vec<u8>) -> Vec<u8> {
    let tags = &inner.build()[..link_length(inner)];
    let mut frame = [tags, &outer[14..]].concat();
    let ether_type = [outer[12], outer[13]];
    let end = tags.len();
    frame[end - 2..end].copy_from_slice(&ether_type);
    frame
}

/// An ICMP or ICMPv6 message in a frame.
pub fn icmp(
    source: &str,
    destination: &str,
    v4: Icmpv4Type,
    v6: Icmpv6Type,
    data: &[u8],
) -> Vec<u8> {
    let headers = ip_headers(source.parse().unwrap(), destination.parse().unwrap());
    let is_v4 = matches!(headers, IpHeaders::Ipv4(..));
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]).ip(headers);
    let mut frame = Vec::new();
    if is_v4 {
        builder.icmpv4(v4).write(&mut frame, data).unwrap();
    } else {
        builder.icmpv6(v6).write(&mut frame, data).unwrap();
    }
    frame
}

/// A later fragment of an IPv4 packet; `offset` in units of 8 bytes.
pub fn fragment(source: &str, destination: &str, protocol: IpNumber, offset: u16) -> Vec<u8> {
    let mut frame = in_ip(source, destination, protocol, &[0; 64]);
    let (mut header, _) = Ipv4Header::from_slice(&frame[14..]).unwrap();
    header.dont_fragment = false;
    header.fragment_offset = IpFragOffset::try_new(offset).unwrap();
    header.header_checksum = header.calc_header_checksum();
    frame[14..34].copy_from_slice(&header.to_bytes());
    frame
}
