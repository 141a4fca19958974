//! Rewriting, and sending away.

use crate::flow::UDP;
use crate::tables::NextHop;
use crate::verdict::{DropReason, Verdict};
use crate::wire::checksum::Sum;
use crate::wire::{Address, Be16, EtherType, VlanTag};

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
    I::rewrite(frame, packet.l3, &packet.header, end, address)?;
    frame.write(packet.l4, ports).ok_or(DropReason::Malformed)?;
    let has_checksum = packet.protocol != UDP || transport.checksum.raw() != 0;
    if has_checksum {
        let sum = Sum::of(transport.checksum).replace16(old_port, port);
        let mut checksum = I::replace_address(sum, old_address, address).checksum();
        if packet.protocol == UDP && checksum.raw() == 0 {
            // Zero would say that there is none (RFC 768).
            checksum = Be16::from_raw(0xffff);
        }
        frame.write(transport.checksum_at, checksum).ok_or(DropReason::Malformed)?;
    }
    Ok(())
}

/// Gives the frame its next hop's MAC addresses and VLAN tag.
#[inline(always)]
pub fn send<F: Frame>(frame: &mut F, link: &Link, hop: &NextHop) -> Result<Verdict, DropReason> {
    if link.tags == 0 && hop.vlan == 0 {
        frame.write(0, hop.mac_words()).ok_or(DropReason::Malformed)?;
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
        frame.write(0, hop.mac_words()).ok_or(DropReason::Malformed)?;
        return frame.write(Link::ETHER_TYPE_AT, link.ether_type).ok_or(DropReason::Malformed);
    }
    write_tagged(frame, hop, link.priority, link.ether_type).ok_or(DropReason::Malformed)
}

/// Writes Ethernet and the next hop's VLAN tag.
#[inline(always)]
pub fn write_tagged<F: Frame>(
    frame: &mut F,
    hop: &NextHop,
    priority: u16,
    ether_type: EtherType,
) -> Option<()> {
    frame.write(0, hop.mac_words())?;
    frame.write(Link::ETHER_TYPE_AT, EtherType::VLAN)?;
    let tag = VlanTag { control: Be16::new(priority | hop.vlan), ether_type };
    frame.write(Link::ETHER_TYPE_AT + size_of::<EtherType>(), tag)
}
