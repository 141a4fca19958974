//! ICMP errors and the packets that they quote, built by etherparse.

use std::net::IpAddr;

use etherparse::{
    Icmpv4Type, Icmpv6Type, PacketBuilder, VlanId,
    icmpv4::{self, DestUnreachableHeader},
    icmpv6,
};

use crate::packets::{OUR_MAC, Packet};

/// What an error says, of either version.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Complaint {
    /// Nobody listens on the port.
    PortUnreachable,
    /// The way carries packets of this many bytes at most.
    TooBig(u16),
    /// The hops are used up.
    TimeExceeded,
    /// The byte at this offset is wrong.
    ParameterProblem(u8),
}

/// An ICMP error. Start from [`IcmpError::about`] and change fields.
#[derive(Clone, Debug)]
pub struct IcmpError {
    /// Ethernet source.
    pub source_mac: [u8; 6],
    /// Ethernet destination.
    pub destination_mac: [u8; 6],
    /// VLAN ids, outer first; at most two.
    pub vlans: Vec<u16>,
    /// Who sends it.
    pub source: IpAddr,
    /// To whom.
    pub destination: IpAddr,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// What it says.
    pub complaint: Complaint,
    /// The packet that it is about.
    pub quoted: Packet,
    /// How much of what follows that packet's IP headers is quoted, bytes.
    pub kept: usize,
}

impl IcmpError {
    /// An error from `source` to the sender of a packet, with eight bytes of its transport header.
    ///
    /// # Panics
    ///
    /// If `source` is no address.
    pub fn about(quoted: Packet, complaint: Complaint, source: &str) -> Self {
        Self {
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: OUR_MAC,
            vlans: Vec::new(),
            source: source.parse().expect("an address"),
            destination: quoted.source.ip(),
            hop_limit: 60,
            complaint,
            quoted,
            kept: 8,
        }
    }

    /// The quoted bytes.
    fn quote(&self) -> Vec<u8> {
        let bare = Packet { vlans: Vec::new(), ..self.quoted.clone() };
        let frame = bare.build();
        let transport = Packet { payload: Vec::new(), ..bare.clone() }.build().len();
        let header = match bare.transport {
            crate::packets::Transport::Tcp(header) => header.header_len(),
            crate::packets::Transport::Udp => 8,
        };
        let end = transport - header + self.kept;
        frame[14..end.min(frame.len())].to_vec()
    }

    /// The frame, Ethernet header first.
    ///
    /// # Panics
    ///
    /// If the fields contradict each other.
    pub fn build(&self) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2(self.source_mac, self.destination_mac);
        let vlan = |id| VlanId::try_new(id).expect("a VLAN id has 12 bits");
        let mut frame = Vec::new();
        let quote = self.quote();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let (source, destination) = (source.octets(), destination.octets());
                let ip = match *self.vlans {
                    [] => ethernet.ipv4(source, destination, self.hop_limit),
                    [id] => {
                        ethernet.single_vlan(vlan(id)).ipv4(source, destination, self.hop_limit)
                    }
                    [outer, inner] => ethernet.double_vlan(vlan(outer), vlan(inner)).ipv4(
                        source,
                        destination,
                        self.hop_limit,
                    ),
                    _ => panic!("more than two VLAN tags"),
                };
                ip.icmpv4(self.complaint.v4()).write(&mut frame, &quote)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let (source, destination) = (source.octets(), destination.octets());
                let ip = match *self.vlans {
                    [] => ethernet.ipv6(source, destination, self.hop_limit),
                    [id] => {
                        ethernet.single_vlan(vlan(id)).ipv6(source, destination, self.hop_limit)
                    }
                    [outer, inner] => ethernet.double_vlan(vlan(outer), vlan(inner)).ipv6(
                        source,
                        destination,
                        self.hop_limit,
                    ),
                    _ => panic!("more than two VLAN tags"),
                };
                ip.icmpv6(self.complaint.v6()).write(&mut frame, &quote)
            }
            _ => panic!("one family"),
        }
        .expect("the quote fits into a packet");
        frame
    }
}

impl Complaint {
    fn v4(self) -> Icmpv4Type {
        match self {
            Self::PortUnreachable => {
                Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port)
            }
            Self::TooBig(next_hop_mtu) => {
                Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
                    next_hop_mtu,
                })
            }
            Self::TimeExceeded => {
                Icmpv4Type::TimeExceeded(icmpv4::TimeExceededCode::TtlExceededInTransit)
            }
            Self::ParameterProblem(at) => Icmpv4Type::ParameterProblem(
                icmpv4::ParameterProblemHeader::PointerIndicatesError(at),
            ),
        }
    }

    fn v6(self) -> Icmpv6Type {
        match self {
            Self::PortUnreachable => {
                Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port)
            }
            Self::TooBig(mtu) => Icmpv6Type::PacketTooBig { mtu: mtu.into() },
            Self::TimeExceeded => {
                Icmpv6Type::TimeExceeded(icmpv6::TimeExceededCode::HopLimitExceeded)
            }
            Self::ParameterProblem(at) => {
                Icmpv6Type::ParameterProblem(icmpv6::ParameterProblemHeader {
                    code: icmpv6::ParameterProblemCode::ErroneousHeaderField,
                    pointer: at.into(),
                })
            }
        }
    }
}
