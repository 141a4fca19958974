//! Taking the tunnel header off: IP in IP (RFC 2003, RFC 2473) and GUE variant 1
//! (draft-ietf-intarea-gue section 4), an IP packet directly behind a UDP header.

use crate::flow::UDP;
use crate::forward::Frame;
use crate::forward::ip::{ANY, Ip, MAX_HEADERS, Parsed, V4, V6};
use crate::forward::parse::{Link, whole};
use crate::forward::reject::Front;
use crate::tables::EndpointKey;
use crate::tunnel::Tunnel;
use crate::verdict::DropReason;
use crate::wire::{Be16, EtherType, Ipv4, Udp};

use super::tables::{SENDERS, Settings, TargetTables, space};
use super::{Step, Version};

const IPV4: u8 = Tunnel::IPV4;
const IPV6: u8 = Tunnel::IPV6;

/// Looks for a tunnel header that a load balancer put on the packet.
///
/// Other tunnels are packets like any other: nothing is decided here.
#[inline(never)]
pub fn find<I: Version, F: Frame, T: TargetTables>(frame: &F, tables: &T, step: &mut Step) -> u32 {
    let frame = whole(frame);
    let Some(link) = Link::parse(frame) else { return Step::UNDECIDED };
    let parsed: Option<Parsed<I::Header>> = I::parse::<ANY, F>(frame, link.l3);
    let Some(parsed) = parsed else { return Step::UNDECIDED };
    let (source, destination) = I::addresses(&parsed.header);
    let end = link.l3 + I::length(&parsed.header);
    let mut outer = Outer {
        l3: link.l3,
        at: parsed.l4,
        end,
        protocol: parsed.protocol,
        is_fragment: parsed.fragment != 0,
        is_malformed: false,
    };
    let mut port = Be16::from_raw(0);
    let flags = tables.settings().flags;
    match parsed.protocol {
        IPV4 | IPV6 if flags & Settings::UNWRAPS_IPIP != 0 => {}
        UDP if flags & Settings::UNWRAPS_GUE != 0 && parsed.is_first => {
            let Some(udp) = frame.read::<Udp>(parsed.l4) else { return Step::UNDECIDED };
            let claimed = udp.length.get() as usize;
            port = udp.destination;
            outer.is_malformed = claimed < size_of::<Udp>() || parsed.l4 + claimed > end;
            outer.at = parsed.l4 + size_of::<Udp>();
        }
        _ => return Step::UNDECIDED,
    }
    if !tables.is_tunnel_end(&EndpointKey::new(destination, port, outer.protocol)) {
        return Step::UNDECIDED;
    }
    let space = if I::IS_V4 { space::TUNNEL_V4 } else { space::TUNNEL_V6 };
    if !tables.admits(SENDERS as u32 | space, source) {
        return Step::UNDECIDED;
    }
    step.via = source;
    step.space = space;
    match look_inside(frame, &outer, step) {
        Ok(action) => action,
        Err(reason) => {
            step.argument = reason as u32;
            Step::DROP
        }
    }
}

/// A packet with a packet in it.
struct Outer {
    /// Offset of its IP header.
    l3: usize,
    /// Offset of the inner packet.
    at: usize,
    /// Where it ends in the frame.
    end: usize,
    protocol: u8,
    is_fragment: bool,
    /// Whether its UDP header lies about its length.
    is_malformed: bool,
}

/// Finds the inner packet, which must lie in the outer one with all of its length.
#[inline(always)]
fn look_inside<F: Frame>(frame: &F, outer: &Outer, step: &mut Step) -> Result<u32, DropReason> {
    if outer.is_fragment {
        return Err(DropReason::Fragmented);
    }
    let (at, end) = (outer.at, outer.end);
    if outer.is_malformed || end > frame.len() || at > MAX_HEADERS as usize {
        return Err(DropReason::Malformed);
    }
    let wanted = if outer.protocol == UDP { 0 } else { outer.protocol };
    // IP's version is in the same bits as GUE's variant, of which 1 has the upper two bits 01. Two
    // bytes, because the verifier does not follow the compiler's check for one.
    let first: Be16 = frame.read(at).ok_or(DropReason::Malformed)?;
    let length = match ((first.get() >> 12) as u8, wanted) {
        (4, IPV4 | 0) => {
            step.inner = EtherType::IPV4;
            length::<V4, F>(frame, at)
        }
        (6, IPV6 | 0) => {
            step.inner = EtherType::IPV6;
            length::<V6, F>(frame, at)
        }
        // GUE, but another variant: a control message, or one with a header of its own.
        (version, 0) if version >> 2 != 1 => return Ok(Step::UNDECIDED),
        _ => return Err(DropReason::Malformed),
    };
    if length < size_of::<Ipv4>() || at + length > end {
        return Err(DropReason::Malformed);
    }
    step.stripped = (at - outer.l3) as u16;
    Ok(Step::UNWRAP)
}

/// The length in an IP header, bytes; 0 if it is cut short.
#[inline(always)]
fn length<I: Ip, F: Frame>(frame: &F, at: usize) -> usize {
    frame.read::<I::Header>(at).map_or(0, |header| I::length(&header))
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
