//! Frames, described field by field and built by etherparse.
//!
//! Expectations must not come from lb-common itself, so nothing here uses it.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use etherparse::{
    IpHeaders, Ipv4Header, Ipv4Options, Ipv6Extensions, Ipv6Header, NetSlice, PacketBuilder,
    SlicedPacket, TcpHeader, TransportSlice, UdpHeader, VlanId, ip_number,
};

/// What the frame says in its TCP or UDP checksum.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Checksum {
    /// What it should.
    #[default]
    Right,
    /// Something else.
    Wrong,
    /// The sum of the pseudo header alone, as a sender leaves it that expects its hardware to do
    /// the rest (CHECKSUM_PARTIAL in Linux).
    Partial,
    /// Zero: "no checksum" in UDP over IPv4.
    Zero,
}

/// What follows the IP header.
#[derive(Clone, Debug)]
pub enum Transport {
    /// TCP with these flags, numbers and options; its ports and checksum are overwritten.
    Tcp(Box<TcpHeader>),
    /// UDP.
    Udp,
}

/// The balancer's address, on whatever NIC: what frames come to.
pub const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// A frame to be. Start from [`Packet::tcp`] or [`Packet::udp`] and change fields.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Ethernet source.
    pub source_mac: [u8; 6],
    /// Ethernet destination.
    pub destination_mac: [u8; 6],
    /// VLAN ids, outer first; at most two.
    pub vlans: Vec<u16>,
    /// Source address and port.
    pub source: SocketAddr,
    /// Destination address and port, of the same family.
    pub destination: SocketAddr,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// IPv4 options: at most 40 bytes, a multiple of 4.
    pub ipv4_options: Vec<u8>,
    /// IPv6 extension headers.
    pub ipv6_extensions: Ipv6Extensions,
    /// The protocol.
    pub transport: Transport,
    /// What follows the TCP or UDP header.
    pub payload: Vec<u8>,
    /// The TCP or UDP checksum.
    pub checksum: Checksum,
}

impl Packet {
    /// An empty acknowledgement, as amid a connection.
    pub fn tcp(source: SocketAddr, destination: SocketAddr) -> Self {
        let mut header = TcpHeader::new(0, 0, 1000, 0xffff);
        header.ack = true;
        header.acknowledgment_number = 2000;
        Self::new(source, destination, Transport::Tcp(Box::new(header)))
    }

    /// A TCP segment with these control bits: `F`, `S`, `R`, `A`.
    pub fn flagged(source: SocketAddr, destination: SocketAddr, flags: &str) -> Self {
        let mut packet = Self::tcp(source, destination);
        if let Transport::Tcp(header) = &mut packet.transport {
            header.fin = flags.contains('F');
            header.syn = flags.contains('S');
            header.rst = flags.contains('R');
            header.ack = flags.contains('A');
        }
        packet
    }

    /// The first packet of a connection.
    pub fn syn(source: SocketAddr, destination: SocketAddr) -> Self {
        let mut header = TcpHeader::new(0, 0, 1000, 0xffff);
        header.syn = true;
        Self::new(source, destination, Transport::Tcp(Box::new(header)))
    }

    /// An empty datagram.
    pub fn udp(source: SocketAddr, destination: SocketAddr) -> Self {
        Self::new(source, destination, Transport::Udp)
    }

    fn new(source: SocketAddr, destination: SocketAddr, transport: Transport) -> Self {
        Self {
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: OUR_MAC,
            vlans: Vec::new(),
            source,
            destination,
            hop_limit: 64,
            ipv4_options: Vec::new(),
            ipv6_extensions: Ipv6Extensions::default(),
            transport,
            payload: Vec::new(),
            checksum: Checksum::Right,
        }
    }

    /// The frame, Ethernet header first.
    ///
    /// # Panics
    ///
    /// If the fields contradict each other: mixed families, three tags, odd options.
    pub fn build(&self) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2(self.source_mac, self.destination_mac);
        let vlan = |id| VlanId::try_new(id).expect("a VLAN id has 12 bits");
        let ip = match *self.vlans {
            [] => ethernet.ip(self.ip_headers()),
            [id] => ethernet.single_vlan(vlan(id)).ip(self.ip_headers()),
            [outer, inner] => ethernet.double_vlan(vlan(outer), vlan(inner)).ip(self.ip_headers()),
            _ => panic!("more than two VLAN tags"),
        };
        let (source, destination) = (self.source.port(), self.destination.port());
        let mut frame = Vec::new();
        match &self.transport {
            Transport::Tcp(header) => {
                let mut header = header.as_ref().clone();
                header.source_port = source;
                header.destination_port = destination;
                ip.tcp_header(header).write(&mut frame, &self.payload)
            }
            Transport::Udp => ip.udp(source, destination).write(&mut frame, &self.payload),
        }
        .expect("the payload fits into a packet");
        self.set_checksum(&mut frame);
        frame
    }

    fn ip_headers(&self) -> IpHeaders {
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => IpHeaders::Ipv4(
                Ipv4Header {
                    source: source.octets(),
                    destination: destination.octets(),
                    time_to_live: self.hop_limit,
                    dont_fragment: true,
                    options: Ipv4Options::try_from(&self.ipv4_options[..])
                        .expect("options are up to ten words"),
                    ..Default::default()
                },
                Default::default(),
            ),
            (IpAddr::V6(source), IpAddr::V6(destination)) => IpHeaders::Ipv6(
                Ipv6Header {
                    source: source.octets(),
                    destination: destination.octets(),
                    hop_limit: self.hop_limit,
                    ..Default::default()
                },
                self.ipv6_extensions.clone(),
            ),
            _ => panic!("one address of each family"),
        }
    }

    fn set_checksum(&self, frame: &mut [u8]) {
        let (header_length, offset, protocol) = match &self.transport {
            Transport::Tcp(header) => (header.header_len(), 16, ip_number::TCP),
            Transport::Udp => (UdpHeader::LEN, 6, ip_number::UDP),
        };
        let length = header_length + self.payload.len();
        let start = frame.len() - length + offset;
        let field = &mut frame[start..start + 2];
        let right = u16::from_be_bytes([field[0], field[1]]);
        let checksum = match self.checksum {
            Checksum::Right => right,
            Checksum::Wrong => right ^ 0x5555,
            Checksum::Partial => self.pseudo_header_sum(protocol.0, length),
            Checksum::Zero => 0,
        };
        field.copy_from_slice(&checksum.to_be_bytes());
    }

    fn pseudo_header_sum(&self, protocol: u8, length: usize) -> u16 {
        let mut bytes = match self.ip_headers() {
            IpHeaders::Ipv4(header, _) => [header.source, header.destination].concat(),
            IpHeaders::Ipv6(header, _) => [header.source, header.destination].concat(),
        };
        bytes.extend([0, protocol]);
        bytes.extend(u32::try_from(length).expect("a packet is short").to_be_bytes());
        let words = bytes.chunks_exact(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
        let sum: u32 = words.sum();
        let sum = (sum & 0xffff) + (sum >> 16);
        ((sum & 0xffff) + (sum >> 16)) as u16
    }
}

/// Where a frame comes from and goes to, by its IP and TCP or UDP headers.
///
/// # Errors
///
/// If it has no such headers.
pub fn endpoints(frame: &[u8]) -> Result<(SocketAddr, SocketAddr)> {
    let packet = SlicedPacket::from_ethernet(frame)?;
    let (source, destination): (IpAddr, IpAddr) = match packet.net.context("no IP header")? {
        NetSlice::Ipv4(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into())
        }
        NetSlice::Ipv6(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into())
        }
        NetSlice::Arp(_) => anyhow::bail!("ARP"),
    };
    let (from, to) = match packet.transport.context("no transport header")? {
        TransportSlice::Tcp(tcp) => (tcp.source_port(), tcp.destination_port()),
        TransportSlice::Udp(udp) => (udp.source_port(), udp.destination_port()),
        other => anyhow::bail!("no ports: {other:?}"),
    };
    Ok(((source, from).into(), (destination, to).into()))
}

/// Checks the IPv4, TCP, UDP and ICMP checksums of a frame.
///
/// # Errors
///
/// If one is wrong or missing, or the frame cannot be parsed.
pub fn verify_checksums(frame: &[u8]) -> Result<()> {
    let packet = SlicedPacket::from_ethernet(frame)?;
    let net = packet.net.context("no IP header")?;
    if let NetSlice::Ipv4(ip) = &net {
        let header = ip.header().to_header();
        let (is, right) = (header.header_checksum, header.calc_header_checksum());
        ensure!(is == right, "IPv4 checksum is {is:#06x} instead of {right:#06x}");
    }
    let (is, right) = match packet.transport.context("no transport header")? {
        TransportSlice::Tcp(tcp) => {
            let right = match &net {
                NetSlice::Ipv4(ip) => {
                    tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination())?
                }
                NetSlice::Ipv6(ip) => {
                    tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination())?
                }
                NetSlice::Arp(_) => anyhow::bail!("ARP"),
            };
            (tcp.checksum(), right)
        }
        TransportSlice::Udp(udp) => {
            let (header, payload) = (udp.to_header(), udp.payload());
            let right = match &net {
                NetSlice::Ipv4(ip) => {
                    header.calc_checksum_ipv4(&ip.header().to_header(), payload)?
                }
                NetSlice::Ipv6(ip) => {
                    header.calc_checksum_ipv6(&ip.header().to_header(), payload)?
                }
                NetSlice::Arp(_) => anyhow::bail!("ARP"),
            };
            (udp.checksum(), right)
        }
        TransportSlice::Icmpv4(icmp) => {
            (icmp.checksum(), icmp.icmp_type().calc_checksum(icmp.payload()))
        }
        TransportSlice::Icmpv6(icmp) => {
            let NetSlice::Ipv6(ip) = &net else { anyhow::bail!("ICMPv6 over IPv4") };
            let (source, destination) = (ip.header().source(), ip.header().destination());
            let kind = icmp.icmp_type();
            (icmp.checksum(), kind.calc_checksum(source, destination, icmp.payload())?)
        }
        other => anyhow::bail!("no checksum known: {other:?}"),
    };
    ensure!(is == right, "transport checksum is {is:#06x} instead of {right:#06x}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packets() -> [Packet; 4] {
        let v4 = ("10.0.1.10:4000".parse().unwrap(), "10.0.1.100:80".parse().unwrap());
        let v6 = ("[fd00:1::10]:4000".parse().unwrap(), "[fd00:1::100]:80".parse().unwrap());
        let tagged = |packet| Packet { vlans: vec![7, 8], payload: b"abc".to_vec(), ..packet };
        [
            Packet { ipv4_options: vec![1; 4], ..Packet::syn(v4.0, v4.1) },
            tagged(Packet::udp(v4.0, v4.1)),
            tagged(Packet::tcp(v6.0, v6.1)),
            Packet::udp(v6.0, v6.1),
        ]
    }

    #[test]
    fn a_frame_has_the_endpoints_and_the_checksums_it_was_given() {
        for packet in packets() {
            let frame = packet.build();
            verify_checksums(&frame).unwrap();
            assert_eq!(endpoints(&frame).unwrap(), (packet.source, packet.destination));
            for checksum in [Checksum::Wrong, Checksum::Partial, Checksum::Zero] {
                let frame = Packet { checksum, ..packet.clone() }.build();
                assert!(verify_checksums(&frame).is_err(), "{checksum:?} of {packet:?}");
            }
        }
    }

    /// What the hardware does: it sums everything from the transport header on, the field included.
    #[test]
    fn a_partial_checksum_is_completed_by_summing_the_rest() {
        for packet in packets() {
            let partial = Packet { checksum: Checksum::Partial, ..packet.clone() }.build();
            let (length, offset) = match &packet.transport {
                Transport::Tcp(header) => (header.header_len() + packet.payload.len(), 16),
                Transport::Udp => (UdpHeader::LEN + packet.payload.len(), 6),
            };
            let start = partial.len() - length;
            let mut segment = partial[start..].to_vec();
            segment.resize(length.next_multiple_of(2), 0);
            let words =
                segment.chunks_exact(2).map(|w| u64::from(u16::from_be_bytes([w[0], w[1]])));
            let sum = words.sum::<u64>() % 0xffff;
            let right = &packet.build()[start + offset..][..2];
            assert_eq!((!(sum as u16)).to_be_bytes(), right, "{packet:?}");
        }
    }
}
