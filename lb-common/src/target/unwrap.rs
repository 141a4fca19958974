//! Taking the tunnel header off: IP in IP (RFC 2003, RFC 2473) and GUE variant 1
//! (draft-ietf-intarea-gue section 4), an IP packet directly behind a UDP header.

use crate::flow::UDP;
use crate::forward::Frame;
use crate::forward::ip::{ANY, Ip, MAX_HEADERS, V4, V6};
use crate::forward::parse::{Link, Packet};
use crate::forward::reject::Front;
use crate::tables::EndpointKey;
use crate::tunnel::Tunnel;
use crate::verdict::DropReason;
use crate::wire::{Be16, EtherType, Udp};

use super::tables::{SENDERS, Settings, TargetTables, space};
use super::{Step, Version};

const IPV4: u8 = Tunnel::IPV4;
const IPV6: u8 = Tunnel::IPV6;

/// Looks for a tunnel header that a load balancer put on the packet.
///
/// Other tunnels are packets like any other: nothing is decided here.
#[inline(never)]
pub fn find<I: Version, F: Frame, T: TargetTables>(frame: &F, tables: &T, step: &mut Step) -> u32 {
    let Some(link) = Link::parse(frame) else { return Step::UNDECIDED };
    let Some(packet) = Packet::<I>::parse::<ANY, F>(frame, &link) else { return Step::UNDECIDED };
    let flags = tables.settings().flags;
    let port = match (packet.protocol, &packet.transport) {
        (IPV4 | IPV6, _) if flags & Settings::UNWRAPS_IPIP != 0 => Be16::new(0),
        (UDP, Some(transport)) if flags & Settings::UNWRAPS_GUE != 0 => transport.ports.destination,
        _ => return Step::UNDECIDED,
    };
    if !tables.is_tunnel_end(&EndpointKey::new(packet.destination, port, packet.protocol)) {
        return Step::UNDECIDED;
    }
    let space = if I::IS_V4 { space::TUNNEL_V4 } else { space::TUNNEL_V6 };
    if !tables.admits(SENDERS as u32 | space, packet.source) {
        return Step::UNDECIDED;
    }
    step.via = packet.source;
    step.space = space;
    match inside(frame, &packet) {
        Ok(Some(inner)) => {
            step.stripped = inner.at - link.l3 as u16;
            step.inner = inner.ether_type;
            Step::UNWRAP
        }
        // GUE, but another variant: a control message, or one with a header of its own.
        Ok(None) => Step::UNDECIDED,
        Err(reason) => {
            step.argument = reason as u32;
            Step::DROP
        }
    }
}

/// The packet in a packet.
struct Inner {
    /// Its offset in the frame.
    at: u16,
    ether_type: EtherType,
}

/// Finds the inner packet, which must lie in the outer one with all of its length.
#[inline(always)]
fn inside<I: Ip, F: Frame>(frame: &F, outer: &Packet<I>) -> Result<Option<Inner>, DropReason> {
    if outer.is_fragment() {
        return Err(DropReason::Fragmented);
    }
    let mut at = outer.l4;
    let end = outer.l3 + outer.length;
    let mut wanted = outer.protocol;
    if outer.protocol == UDP {
        let transport = outer.transport.as_ref().ok_or(DropReason::Malformed)?;
        if transport.is_malformed(frame, outer) {
            return Err(DropReason::Malformed);
        }
        at += size_of::<Udp>();
        wanted = 0;
    }
    if end > frame.len() || at > MAX_HEADERS as usize {
        return Err(DropReason::Malformed);
    }
    // IP's version is in the same bits as GUE's variant, of which 1 has the upper two bits 01. Two
    // bytes, because the verifier does not follow the compiler's check for one.
    let first: Be16 = frame.read(at).ok_or(DropReason::Malformed)?;
    let (length, ether_type) = match ((first.get() >> 12) as u8, wanted) {
        (4, IPV4 | 0) => (length::<V4, F>(frame, at), EtherType::IPV4),
        (6, IPV6 | 0) => (length::<V6, F>(frame, at), EtherType::IPV6),
        (version, 0) if version >> 2 != 1 => return Ok(None),
        _ => return Err(DropReason::Malformed),
    };
    let length = length.ok_or(DropReason::Malformed)?;
    if length < size_of::<crate::wire::Ipv4>() || at + length > end {
        return Err(DropReason::Malformed);
    }
    Ok(Some(Inner { at: at as u16, ether_type }))
}

#[inline(always)]
fn length<I: Ip, F: Frame>(frame: &F, at: usize) -> Option<usize> {
    Some(I::length(&frame.read::<I::Header>(at)?))
}

/// Moves Ethernet header and tags up to the inner packet.
#[inline(never)]
pub fn strip<F: Frame, T: TargetTables>(frame: &mut F, tables: &T, step: &mut Step) -> u32 {
    match try_strip(frame, step) {
        Ok(bytes) => {
            tables.count_unwrapped(bytes as u64);
            Step::UNDECIDED
        }
        Err(reason) => {
            step.argument = reason as u32;
            Step::DROP
        }
    }
}

/// The inner packet's length, bytes, with what follows it in the frame.
#[inline(always)]
fn try_strip<F: Frame>(frame: &mut F, step: &Step) -> Result<usize, DropReason> {
    let link = Link::parse(frame).ok_or(DropReason::Malformed)?;
    let front = Front::read(frame, &link).ok_or(DropReason::Malformed)?;
    let front = front.before(step.inner);
    let by = (step.stripped & MAX_HEADERS) as i32;
    frame.grow_front(-by).ok_or(DropReason::NoHeadroom)?;
    front.write(frame).ok_or(DropReason::Malformed)?;
    Ok(frame.len() - link.l3)
}
