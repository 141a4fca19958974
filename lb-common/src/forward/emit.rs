//! Rewriting, and sending away.

use crate::flow::UDP;
use crate::tables::NextHop;
use crate::verdict::{DropReason, Verdict};
use crate::wire::checksum::Sum;
use crate::wire::eth::Macs;
use crate::wire::{Address, Be16, EtherType, Tcp, Udp, VlanTag};

use super::Frame;
use super::ip::{End, Ip};
use super::parse::{Link, Packet, Ports, Transport};

/// Gives one end of the packet another address and port, and takes a hop off its life.
///
/// # Errors
/// [`DropReason::TtlExceeded`] before anything is written.
#[inline(always)]
pub fn translate<I: Ip, F: Frame>(
    frame: &mut F,
    packet: &Packet<I>,
    transport: &Transport,
    end: End,
    address: Address,
    port: Be16,
) -> Result<(), DropReason> {
    if I::hops(&packet.header) <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    let Ports { source, destination } = transport.ports;
    let (old_address, old_port, ports) = match end {
        End::Source => (packet.source, source, Ports { source: port, destination }),
        End::Destination => (packet.destination, destination, Ports { source, destination: port }),
    };
    let difference = I::replace_address(Sum::default(), old_address, address);
    I::rewrite(frame, packet.l3, &packet.header, end, address, difference)?;
    let sum = Sum::of(transport.checksum).plus(difference).replace16(old_port, port);
    write_transport(frame, packet, transport, ports, sum)
}

/// Writes both ports, and the checksum of the sum where there was one.
#[inline(always)]
pub fn write_transport<I: Ip, F: Frame>(
    frame: &mut F,
    packet: &Packet<I>,
    transport: &Transport,
    ports: Ports,
    sum: Sum,
) -> Result<(), DropReason> {
    let written = if packet.protocol == UDP {
        let checksum = udp_checksum(transport.checksum, sum);
        frame.write_pair::<{ Udp::CHECKSUM_AT }, _, _>(packet.l4, ports, checksum)
    } else {
        frame.write_pair::<{ Tcp::CHECKSUM_AT }, _, _>(packet.l4, ports, sum.checksum())
    };
    written.ok_or(DropReason::Malformed)
}

/// Zero says that there is none (RFC 768): then it stays so, and no other becomes zero.
#[inline(always)]
pub fn udp_checksum(old: Be16, sum: Sum) -> Be16 {
    let checksum = sum.checksum();
    if old.raw() == 0 {
        old
    } else if checksum.raw() == 0 {
        Be16::from_raw(0xffff)
    } else {
        checksum
    }
}

/// Writes the beginning of the Ethernet header.
#[inline(always)]
fn write_macs<F: Frame>(frame: &mut F, macs: Macs) -> Option<()> {
    let (first, last) = macs.parts();
    frame.write_pair::<{ size_of::<u64>() }, _, _>(0, first, last)
}

/// Gives the frame its next hop's MAC addresses and VLAN tag.
#[inline(always)]
pub fn send<F: Frame>(frame: &mut F, link: &Link, hop: &NextHop) -> Result<Verdict, DropReason> {
    if link.tags == 0 && hop.vlan == 0 {
        write_macs(frame, hop.macs).ok_or(DropReason::Malformed)?;
    } else {
        retag(frame, link, hop)?;
    }
    Ok(leave(frame, hop))
}

/// Whether the packet goes out by the NIC it came in by, or which other.
#[inline(always)]
pub fn leave<F: Frame>(frame: &F, hop: &NextHop) -> Verdict {
    if hop.ifindex == frame.ingress() { Verdict::Transmit } else { Verdict::Redirect(hop.ifindex) }
}

/// Replaces whatever tags the frame has by the next hop's: one or none.
#[inline(always)]
fn retag<F: Frame>(frame: &mut F, link: &Link, hop: &NextHop) -> Result<(), DropReason> {
    const TAG: i32 = size_of::<VlanTag>() as i32;
    let wanted = (hop.vlan != 0) as i32;
    let missing = wanted - link.tags as i32;
    if missing != 0 {
        frame.grow_front(missing * TAG).ok_or(DropReason::NoHeadroom)?;
    }
    if wanted == 0 {
        return write_untagged(frame, hop, link.ether_type).ok_or(DropReason::Malformed);
    }
    write_tagged(frame, hop, link.priority, link.ether_type).ok_or(DropReason::Malformed)
}

/// Writes an Ethernet header.
#[inline(always)]
pub fn write_untagged<F: Frame>(frame: &mut F, hop: &NextHop, ether_type: EtherType) -> Option<()> {
    write_macs(frame, hop.macs)?;
    frame.write(Link::ETHER_TYPE_AT, ether_type)
}

/// Writes an Ethernet header and the next hop's VLAN tag.
#[inline(always)]
pub fn write_tagged<F: Frame>(
    frame: &mut F,
    hop: &NextHop,
    priority: u16,
    ether_type: EtherType,
) -> Option<()> {
    write_macs(frame, hop.macs)?;
    frame.write(Link::ETHER_TYPE_AT, EtherType::VLAN)?;
    let tag = VlanTag { control: Be16::new(priority | hop.vlan), ether_type };
    frame.write(Link::ETHER_TYPE_AT + size_of::<EtherType>(), tag)
}
