//! Refusals that the sender can hear: a TCP reset, an ICMP port unreachable, or how large a packet
//! may be.

use crate::flow::TCP;
use crate::tables::Tables;
use crate::verdict::DropReason;
use crate::wire::checksum::Sum;
use crate::wire::eth::Macs;
use crate::wire::icmp::Icmp;
use crate::wire::{Address, Be16, Be32, EtherType, Ethernet, Ipv4, Ipv6, Tcp, Udp, VlanTag};

use super::ip::{Ip, V4, V6};
use super::parse::{Link, Packet, Place, whole};
use super::{Frame, Next, Step};

/// TTL or hop limit of our own packets.
pub const HOPS: u8 = 64;

/// Counts the reason and turns the packet into its refusal, back to where it came from. A packet
/// that must not be answered (a reset, a header with options where it would have to be quoted)
/// is dropped for the same reason.
#[inline(always)]
pub fn answer<I: Answer, F: Frame, T: Tables>(frame: &mut F, tables: &T, step: &Step) -> u64 {
    let place = &step.place;
    let reason = step.argument;
    let refusal = if reason == DropReason::TooBig as u32 {
        quote_back::<I, F>(frame, place, step.mtu as u32)
    } else if place.protocol == TCP as u16 {
        reset::<I, F>(frame, place)
    } else {
        quote_back::<I, F>(frame, place, UNREACHABLE)
    };
    match refusal {
        Refusal::Written => {
            tables.count_drop(reason);
            Next::with(Next::TRANSMIT, 0)
        }
        Refusal::None => Next::with(Next::DROP, reason),
        Refusal::NoRoom => Next::with(Next::DROP, DropReason::NoHeadroom as u32),
    }
}

/// What became of a refusal.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Refusal {
    /// It is in the frame.
    Written = 0,
    /// The packet must not be answered.
    None = 1,
    /// The driver made no room for it.
    NoRoom = 2,
}

/// Writes a reset over the packet. A function of its own in the kernel too, which reads the headers
/// again: so the hot path need not keep them in memory for it.
#[inline(never)]
fn reset<I: Answer, F: Frame>(frame: &mut F, place: &Place) -> Refusal {
    let Some(ethernet) = whole(frame).read::<Ethernet>(0) else { return Refusal::None };
    let Some(packet) = place.read::<I, F>(frame) else { return Refusal::None };
    if packet.transport.is_none_or(|transport| transport.flags & Tcp::RST != 0) {
        return Refusal::None;
    }
    let written = write_reset(frame, &packet);
    finish(frame, &ethernet, written)
}

/// Instead of an MTU: the port is unreachable.
const UNREACHABLE: u32 = 0;

/// Writes an ICMP error around the packet; see [`reset`]. With an MTU: that the packet is too big,
/// but not if a router could have cut it up (RFC 792, RFC 1191 section 4).
#[inline(never)]
fn quote_back<I: Answer, F: Frame>(frame: &mut F, place: &Place, mtu: u32) -> Refusal {
    // From front to back: the compiler would leave out a check that a later one implies, and the
    // verifier does not see that it does.
    let Some(link) = Link::parse(whole(frame)) else { return Refusal::None };
    let Some(front) = Front::read(frame, &link) else { return Refusal::None };
    let Some(packet) = place.read::<I, F>(frame) else { return Refusal::None };
    if packet.l4 != packet.l3 + size_of::<I::Header>() {
        return Refusal::None;
    }
    if mtu != UNREACHABLE && I::may_be_fragmented(&packet.header) {
        return Refusal::None;
    }
    let written = write_error(frame, &front, &packet, mtu);
    finish(frame, &front.ethernet, written)
}

/// Sends it back to where the packet came from.
#[inline(always)]
fn finish<F: Frame>(
    frame: &mut F,
    ethernet: &Ethernet,
    written: Result<(), DropReason>,
) -> Refusal {
    let back = Macs::new(ethernet.source, ethernet.destination);
    if written.is_ok() && frame.write(0, back).is_some() {
        Refusal::Written
    } else {
        Refusal::NoRoom
    }
}

/// What an IP version adds to answer for itself.
pub trait Answer: Ip {
    /// Writes a header of our own from the packet's destination back to its source.
    fn write_header<F: Frame>(
        frame: &mut F,
        at: usize,
        packet: &Packet<Self>,
        protocol: u8,
        payload: usize,
    ) -> Option<()>;
    /// Sum of the pseudo header of TCP, UDP and ICMPv6; nothing for ICMP.
    fn pseudo_header(packet: &Packet<Self>, protocol: u8, payload: usize) -> Sum;
    /// Type and code of its port unreachable.
    const PORT_UNREACHABLE: (u8, u8);
    /// Type and code of its packet too big.
    const TOO_BIG: (u8, u8);
}

/// RFC 9293 section 3.10.7.1: the reset takes its number from the segment's acknowledgment, or
/// else acknowledges all of the segment.
#[inline(always)]
fn write_reset<I: Answer, F: Frame>(frame: &mut F, packet: &Packet<I>) -> Result<(), DropReason> {
    let tcp: Tcp = frame.read(packet.l4).ok_or(DropReason::Malformed)?;
    let has_ack = tcp.flags & Tcp::ACK != 0;
    let occupied = ((tcp.flags & Tcp::SYN != 0) as u32)
        .wrapping_add((tcp.flags & Tcp::FIN != 0) as u32)
        .wrapping_add(data_length(packet, &tcp));
    let mut reset = Tcp {
        source: tcp.destination,
        destination: tcp.source,
        sequence: if has_ack { tcp.acknowledgment } else { Be32::default() },
        acknowledgment: if has_ack {
            Be32::default()
        } else {
            Be32::new(tcp.sequence.get().wrapping_add(occupied))
        },
        data_offset: (size_of::<Tcp>() as u8 / 4) << 4,
        flags: if has_ack { Tcp::RST } else { Tcp::RST | Tcp::ACK },
        window: Be16::default(),
        checksum: Be16::default(),
        urgent: Be16::default(),
    };
    reset.checksum = I::pseudo_header(packet, TCP, size_of::<Tcp>())
        .add16(reset.source)
        .add16(reset.destination)
        .add32(reset.sequence.raw())
        .add32(reset.acknowledgment.raw())
        .add16(Be16::new((reset.data_offset as u16) << 8 | reset.flags as u16))
        .checksum();
    let l4 = packet.l3 + size_of::<I::Header>();
    I::write_header(frame, packet.l3, packet, TCP, size_of::<Tcp>())
        .ok_or(DropReason::Malformed)?;
    frame.write(l4, reset).ok_or(DropReason::Malformed)?;
    frame.truncate(l4 + size_of::<Tcp>()).ok_or(DropReason::NoHeadroom)
}

/// Bytes of data in the segment.
#[inline(always)]
fn data_length<I: Ip>(packet: &Packet<I>, tcp: &Tcp) -> u32 {
    let headers = packet.l4 - packet.l3 + tcp.header_length();
    packet.length.wrapping_sub(headers) as u32
}

/// RFC 792, RFC 4443 section 3: the refused packet's IP header and 8 bytes more are quoted, so the
/// new headers go in front of them. The MTU follows the checksum, in the last bytes of four (RFC
/// 1191 section 4, RFC 4443 section 3.2).
#[inline(always)]
fn write_error<I: Answer, F: Frame>(
    frame: &mut F,
    front: &Front,
    packet: &Packet<I>,
    mtu: u32,
) -> Result<(), DropReason> {
    let quoted = size_of::<I::Header>() + size_of::<Udp>();
    let added = size_of::<I::Header>() + size_of::<Icmp>();
    let udp: Udp = frame.read(packet.l4).ok_or(DropReason::Malformed)?;
    frame.truncate(packet.l3 + quoted).ok_or(DropReason::NoHeadroom)?;
    frame.grow_front(added as i32).ok_or(DropReason::NoHeadroom)?;
    front.write(frame).ok_or(DropReason::Malformed)?;

    let payload = size_of::<Icmp>() + quoted;
    let (kind, code) = if mtu == UNREACHABLE { I::PORT_UNREACHABLE } else { I::TOO_BIG };
    let rest = Be32::new(mtu);
    let header = I::pseudo_header(packet, I::ICMP, payload)
        .add16(Be16::new((kind as u16) << 8 | code as u16))
        .add32(rest.raw());
    let checksum = quote(header, &packet.header, &udp).checksum();
    let icmp = Icmp { kind, code, checksum, rest };
    I::write_header(frame, packet.l3, packet, I::ICMP, payload).ok_or(DropReason::Malformed)?;
    frame.write(packet.l3 + size_of::<I::Header>(), icmp).ok_or(DropReason::Malformed)
}

/// Adds the quoted headers to a sum.
#[inline(always)]
fn quote<H: bytemuck::Pod>(sum: Sum, header: &H, udp: &Udp) -> Sum {
    let words: &[u32] = bytemuck::cast_slice(core::slice::from_ref(header));
    let mut sum = sum;
    for word in words {
        sum = sum.add32(*word);
    }
    sum.add16(udp.source).add16(udp.destination).add16(udp.length).add16(udp.checksum)
}

/// Ethernet and tags, carried to a new place.
pub(crate) struct Front {
    ethernet: Ethernet,
    tags: usize,
    outer: VlanTag,
    inner: VlanTag,
}

impl Front {
    const OUTER_AT: usize = size_of::<Ethernet>();
    const INNER_AT: usize = Self::OUTER_AT + size_of::<VlanTag>();

    #[inline(always)]
    pub(crate) fn read<F: Frame>(frame: &F, link: &Link) -> Option<Self> {
        let (mut outer, mut inner) = (VlanTag::default(), VlanTag::default());
        if link.tags > 0 {
            outer = frame.read(Self::OUTER_AT)?;
        }
        if link.tags > 1 {
            inner = frame.read(Self::INNER_AT)?;
        }
        Some(Self { ethernet: frame.read(0)?, tags: link.tags, outer, inner })
    }

    /// The same in front of another packet.
    #[inline(always)]
    pub(crate) fn before(mut self, ether_type: EtherType) -> Self {
        match self.tags {
            0 => self.ethernet.ether_type = ether_type,
            1 => self.outer.ether_type = ether_type,
            _ => self.inner.ether_type = ether_type,
        }
        self
    }

    #[inline(always)]
    pub(crate) fn write<F: Frame>(&self, frame: &mut F) -> Option<()> {
        frame.write(0, self.ethernet)?;
        if self.tags > 0 {
            frame.write(Self::OUTER_AT, self.outer)?;
        }
        if self.tags > 1 {
            frame.write(Self::INNER_AT, self.inner)?;
        }
        Some(())
    }
}

impl Answer for V4 {
    const PORT_UNREACHABLE: (u8, u8) = (Icmp::UNREACHABLE, Icmp::PORT_UNREACHABLE);
    const TOO_BIG: (u8, u8) = (Icmp::UNREACHABLE, Icmp::FRAGMENTATION_NEEDED);

    #[inline(always)]
    fn write_header<F: Frame>(
        frame: &mut F,
        at: usize,
        packet: &Packet<Self>,
        protocol: u8,
        payload: usize,
    ) -> Option<()> {
        let mut header = Ipv4 {
            version_ihl: 0x45,
            total_length: Be16::new((size_of::<Ipv4>() + payload) as u16),
            fragment: Be16::new(Ipv4::DONT_FRAGMENT),
            source: packet.header.destination,
            destination: packet.header.source,
            ..Ipv4::default()
        };
        header.ttl.ttl = HOPS;
        header.ttl.protocol = protocol;
        header.ttl.checksum = Sum::default()
            .add16(Be16::new(0x4500))
            .add16(header.total_length)
            .add16(header.fragment)
            .add16(Be16::new((HOPS as u16) << 8 | protocol as u16))
            .add32(header.source.raw())
            .add32(header.destination.raw())
            .checksum();
        frame.write(at, header)
    }

    #[inline(always)]
    fn pseudo_header(packet: &Packet<Self>, protocol: u8, payload: usize) -> Sum {
        if protocol == Self::ICMP {
            return Sum::default();
        }
        Sum::default()
            .add32(packet.header.source.raw())
            .add32(packet.header.destination.raw())
            .add16(Be16::new(protocol as u16))
            .add16(Be16::new(payload as u16))
    }
}

impl Answer for V6 {
    const PORT_UNREACHABLE: (u8, u8) = (Icmp::V6_UNREACHABLE, Icmp::V6_PORT_UNREACHABLE);
    const TOO_BIG: (u8, u8) = (Icmp::V6_TOO_BIG, 0);

    #[inline(always)]
    fn write_header<F: Frame>(
        frame: &mut F,
        at: usize,
        packet: &Packet<Self>,
        protocol: u8,
        payload: usize,
    ) -> Option<()> {
        let header = Ipv6 {
            version_class_label: Be32::new(6 << 28),
            payload_length: Be16::new(payload as u16),
            next_header: protocol,
            hop_limit: HOPS,
            source: packet.header.destination,
            destination: packet.header.source,
        };
        frame.write(at, header)
    }

    #[inline(always)]
    fn pseudo_header(packet: &Packet<Self>, protocol: u8, payload: usize) -> Sum {
        add_v6(add_v6(Sum::default(), packet.source), packet.destination)
            .add16(Be16::new(protocol as u16))
            .add16(Be16::new(payload as u16))
    }
}

/// Adds all 16 bytes, whatever the address looks like.
#[inline(always)]
fn add_v6(sum: Sum, address: Address) -> Sum {
    let [a, b, c, d] = address.quarters();
    sum.add32(a).add32(b).add32(c).add32(d)
}
