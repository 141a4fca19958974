//! From bytes to headers. `None` means: not for us to judge, the packet passes untouched.

use crate::flow::{FlowKey, TCP, UDP};
use crate::wire::eth::Macs;
use crate::wire::{Address, Be16, EtherType, Ethernet, Tcp, Udp, VlanTag};

use super::ip::{Ip, Parsed};
use super::Frame;

/// Ethernet and its VLAN tags.
pub struct Link {
    /// Both MAC addresses.
    pub macs: Macs,
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

    /// Reads the Ethernet header and up to two tags.
    #[inline(always)]
    pub fn parse<F: Frame>(frame: &F) -> Option<Self> {
        let ethernet: Ethernet = frame.read(0)?;
        let mut link = Self {
            macs: ethernet.macs,
            ether_type: ethernet.ether_type,
            tags: 0,
            priority: 0,
            l3: size_of::<Ethernet>(),
        };
        if ethernet.ether_type.is_vlan() {
            let outer: VlanTag = frame.read(size_of::<Ethernet>())?;
            link.priority = outer.control.get() & VlanTag::PRIORITY_MASK;
            link.ether_type = outer.ether_type;
            link.tags = 1;
            link.l3 += size_of::<VlanTag>();
            if outer.ether_type.is_vlan() {
                let inner: VlanTag = frame.read(link.l3)?;
                link.ether_type = inner.ether_type;
                link.tags = 2;
                link.l3 += size_of::<VlanTag>();
            }
        }
        Some(link)
    }
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
    /// Whether this is a fragment.
    pub is_fragment: bool,
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
    /// Offset of the checksum in the frame.
    pub checksum_at: usize,
    /// TCP's control bits; 0 for UDP.
    pub flags: u8,
    /// Whether the header claims lengths that cannot be.
    pub is_malformed: bool,
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
    /// Whether this opens a TCP connection.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.flags & (Tcp::SYN | Tcp::ACK) == Tcp::SYN
    }
}

impl<I: Ip> Packet<I> {
    /// Reads IP and transport headers.
    #[inline(always)]
    pub fn parse<F: Frame>(frame: &F, link: &Link) -> Option<Self> {
        let Parsed { header, source, destination, protocol, l4, is_fragment, is_first, length } =
            I::parse(frame, link.l3)?;
        let transport = if is_first { transport(frame, protocol, link.l3, l4, length) } else { None };
        Some(Self {
            header,
            source,
            destination,
            protocol,
            l3: link.l3,
            l4,
            length,
            is_fragment,
            transport,
        })
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

/// Reads the transport header and holds its claims against the frame: a header that lies about a
/// length is malformed, which matters only once the packet is known to be ours.
#[inline(always)]
fn transport<F: Frame>(
    frame: &F,
    protocol: u8,
    l3: usize,
    l4: usize,
    length: usize,
) -> Option<Transport> {
    let end = l3 + length;
    let is_cut = end > frame.len();
    match protocol {
        TCP => {
            let tcp: Tcp = frame.read(l4)?;
            let header = tcp.header_length();
            Some(Transport {
                ports: Ports { source: tcp.source, destination: tcp.destination },
                checksum: tcp.checksum,
                checksum_at: l4 + Tcp::CHECKSUM_AT,
                flags: tcp.flags,
                is_malformed: is_cut || header < size_of::<Tcp>() || l4 + header > end,
            })
        }
        UDP => {
            let udp: Udp = frame.read(l4)?;
            let datagram = udp.length.get() as usize;
            Some(Transport {
                ports: Ports { source: udp.source, destination: udp.destination },
                checksum: udp.checksum,
                checksum_at: l4 + Udp::CHECKSUM_AT,
                flags: 0,
                is_malformed: is_cut || datagram < size_of::<Udp>() || l4 + datagram > end,
            })
        }
        _ => None,
    }
}
