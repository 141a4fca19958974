//! From bytes to headers. `None` means: not for us to judge, the packet passes untouched.

use crate::flow::{FlowKey, TCP, UDP};
use crate::wire::quic::LongHeader;
use crate::wire::{Address, Be16, EtherType, Ethernet, Tcp, Udp, VlanTag};

use super::Frame;
use super::ip::{Ip, MAX_HEADERS, Parsed};

/// Ethernet and its VLAN tags.
pub struct Link {
    /// EtherType behind all tags.
    pub ether_type: EtherType,
    /// VLAN tags, 0 to 2.
    pub tags: usize,
    /// The outer tag's priority and drop-eligible bits, in place; 0 without a tag.
    pub priority: u16,
    /// Offset of what follows Ethernet and tags.
    pub l3: usize,
}

impl Link {
    /// Offset of the first EtherType.
    pub const ETHER_TYPE_AT: usize = 12;

    /// Of a frame without tags.
    #[inline(always)]
    pub fn untagged<I: Ip>() -> Self {
        Self { ether_type: I::ETHER_TYPE, tags: 0, priority: 0, l3: size_of::<Ethernet>() }
    }

    /// Reads the Ethernet header and up to two tags.
    #[inline(always)]
    pub fn parse<F: Frame>(frame: &F) -> Option<Self> {
        let ethernet: Ethernet = frame.read(0)?;
        let mut link = Self {
            ether_type: ethernet.ether_type,
            tags: 0,
            priority: 0,
            l3: size_of::<Ethernet>(),
        };
        if ethernet.ether_type.is_vlan() {
            let mut tagged = Tagged::default();
            read_tags(frame, &mut tagged);
            link.ether_type = tagged.ether_type;
            link.tags = (tagged.tags & 3) as usize;
            link.priority = tagged.priority;
            link.l3 = (tagged.l3 & 0x1f) as usize;
        }
        Some(link)
    }
}

/// What VLAN tags say. In half words, see [`super::ip`].
#[derive(Default)]
struct Tagged {
    ether_type: EtherType,
    tags: u16,
    priority: u16,
    l3: u16,
}

/// A function of its own in the kernel too. Leaves the EtherType 0, which nobody knows, for a
/// frame that ends within its tags.
#[inline(never)]
fn read_tags<F: Frame>(frame: &F, tagged: &mut Tagged) {
    let frame = whole(frame);
    let at = size_of::<Ethernet>();
    let Some(outer) = frame.read::<VlanTag>(at) else { return };
    tagged.priority = outer.control.get() & VlanTag::PRIORITY_MASK;
    let at = at + size_of::<VlanTag>();
    if !outer.ether_type.is_vlan() {
        (tagged.ether_type, tagged.tags, tagged.l3) = (outer.ether_type, 1, at as u16);
        return;
    }
    let Some(inner) = frame.read::<VlanTag>(at) else { return };
    let at = at + size_of::<VlanTag>();
    (tagged.ether_type, tagged.tags, tagged.l3) = (inner.ether_type, 2, at as u16);
}

/// IP and transport.
pub struct Packet<I: Ip> {
    /// The IP header.
    pub header: I::Header,
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// IP protocol number.
    pub protocol: u8,
    /// Offset of the IP header.
    pub l3: usize,
    /// Offset of the transport header.
    pub l4: usize,
    /// IP header and payload as claimed, bytes.
    pub length: usize,
    /// Not 0 in a fragment.
    pub fragment: u16,
    /// TCP or UDP; `None` for other protocols, later fragments and truncated headers.
    pub transport: Option<Transport>,
}

/// The part of TCP and UDP that matters here.
#[derive(Clone, Copy)]
pub struct Transport {
    /// Both ports.
    pub ports: Ports,
    /// The checksum.
    pub checksum: Be16,
    /// TCP's control bits; 0 for UDP.
    pub flags: u8,
    /// What the header claims as its length (TCP) or the datagram's (UDP), bytes.
    claimed: usize,
}

/// Ports as they lie on the wire.
#[derive(Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Ports {
    /// Source port.
    pub source: Be16,
    /// Destination port.
    pub destination: Be16,
}

impl Transport {
    /// Whether a header lies about a length. Asked only once the packet is known to be ours.
    #[inline(always)]
    pub fn is_malformed<I: Ip, F: Frame>(&self, frame: &F, packet: &Packet<I>) -> bool {
        let least = if packet.protocol == TCP { size_of::<Tcp>() } else { size_of::<Udp>() };
        let end = packet.l3 + packet.length;
        self.claimed < least || packet.l4 + self.claimed > end || end > frame.len()
    }

    /// Whether this datagram opens a QUIC connection, as far as its first bytes tell.
    #[inline(always)]
    pub fn is_quic_initial<F: Frame>(&self, frame: &F, l4: usize) -> bool {
        frame
            .read::<LongHeader>(l4 + size_of::<Udp>())
            .is_some_and(|header| header.is_initial(Be16::new(self.claimed as u16)))
    }

    /// Whether this opens a TCP connection.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.flags & (Tcp::SYN | Tcp::ACK) == Tcp::SYN
    }
}

impl<I: Ip> Packet<I> {
    /// Reads IP and transport headers.
    #[inline(always)]
    pub fn parse<const SHAPE: bool, F: Frame>(frame: &F, link: &Link) -> Option<Self> {
        let Parsed { header, protocol, l4, fragment, is_first } =
            I::parse::<SHAPE, F>(frame, link.l3)?;
        let (source, destination) = I::addresses(&header);
        Some(Self {
            source,
            destination,
            protocol,
            l3: link.l3,
            l4,
            length: I::length(&header),
            fragment,
            header,
            transport: if is_first { transport(frame, protocol, l4) } else { None },
        })
    }

    /// Where it was read.
    #[inline(always)]
    pub fn place(&self) -> Place {
        Place {
            l3: self.l3 as u16,
            l4: self.l4 as u16,
            protocol: self.protocol as u16,
            is_v4: I::IS_V4 as u16,
        }
    }

    /// Whether this is a fragment.
    #[inline(always)]
    pub fn is_fragment(&self) -> bool {
        self.fragment != 0
    }

    /// The flow, as this packet's direction sees it.
    #[inline(always)]
    pub fn flow(&self, ports: Ports) -> FlowKey {
        FlowKey {
            source: self.source,
            destination: self.destination,
            source_port: ports.source,
            destination_port: ports.destination,
            protocol: self.protocol,
            zero: [0; 3],
        }
    }
}

/// Where the headers of a packet are: what functions off the hot path are told, so that the hot
/// path need not keep the headers in memory for them.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Place {
    /// Offset of the IP header.
    pub l3: u16,
    /// Offset of the transport header.
    pub l4: u16,
    /// IP protocol number.
    pub protocol: u16,
    /// 1 for IPv4, 0 for IPv6.
    is_v4: u16,
}

impl Place {
    /// Whether the packet is IPv4.
    #[inline(always)]
    pub fn is_v4(&self) -> bool {
        self.is_v4 != 0
    }

    /// Whether the packet is of the shape [`super::ip::PLAIN`].
    #[inline(always)]
    pub fn is_plain<I: Ip>(&self) -> bool {
        let l3 = size_of::<Ethernet>();
        self.l3 == l3 as u16 && self.l4 == (l3 + size_of::<I::Header>()) as u16
    }

    /// Reads the headers once more.
    #[inline(always)]
    pub fn read<I: Ip, F: Frame>(&self, frame: &F) -> Option<Packet<I>> {
        let frame = whole(frame);
        // The masks change nothing; they are for the verifier.
        let (l3, l4) = ((self.l3 & 0x1f) as usize, (self.l4 & MAX_HEADERS) as usize);
        let protocol = self.protocol as u8;
        let header: I::Header = frame.read(l3)?;
        let (source, destination) = I::addresses(&header);
        Some(Packet {
            source,
            destination,
            protocol,
            l3,
            l4,
            length: I::length(&header),
            fragment: 0,
            header,
            transport: transport(frame, protocol, l4),
        })
    }

    /// Reads the flow and its transport header once more.
    #[inline(always)]
    pub fn flow<I: Ip, F: Frame>(&self, frame: &F) -> Option<(FlowKey, Transport)> {
        let packet = self.read::<I, F>(frame)?;
        let transport = packet.transport?;
        Some((packet.flow(transport.ports), transport))
    }

    /// See [`Transport::is_quic_initial`].
    #[inline(always)]
    pub fn is_quic_initial<F: Frame>(&self, frame: &F, transport: &Transport) -> bool {
        let l4 = (self.l4 & MAX_HEADERS) as usize;
        self.protocol == UDP as u16 && transport.is_quic_initial(whole(frame), l4)
    }
}

/// Keeps the compiler from handing a function the packet's two pointers instead of the frame, as
/// half words that the verifier does not take for pointers.
#[inline(always)]
pub fn whole<F: Frame>(frame: &F) -> &F {
    core::hint::black_box(frame)
}

/// As [`whole`].
#[inline(always)]
pub fn whole_mut<F: Frame>(frame: &mut F) -> &mut F {
    core::hint::black_box(frame)
}

/// Reads the transport header.
#[inline(always)]
fn transport<F: Frame>(frame: &F, protocol: u8, l4: usize) -> Option<Transport> {
    match protocol {
        TCP => {
            let tcp: Tcp = frame.read(l4)?;
            Some(Transport {
                ports: Ports { source: tcp.source, destination: tcp.destination },
                checksum: tcp.checksum,
                flags: tcp.flags,
                claimed: tcp.header_length(),
            })
        }
        UDP => {
            let udp: Udp = frame.read(l4)?;
            Some(Transport {
                ports: Ports { source: udp.source, destination: udp.destination },
                checksum: udp.checksum,
                flags: 0,
                claimed: udp.length.get() as usize,
            })
        }
        _ => None,
    }
}
