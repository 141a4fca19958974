//! A packet to a listener.

use crate::tables::{NO_RING, Tables, Target};
use crate::verdict::DropReason;

use super::ip::{End, Ip};
use super::parse::{Link, Packet, Transport};
use super::select::{forget_direct, select, serving, without_target};
use super::{Found, Frame, Handover, Outcome, Selected, Stop, admit, emit};

/// Admits the packet, chooses its target and sends it there.
#[inline(always)]
pub fn handle<I: Ip, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    link: &Link,
    packet: &Packet<I>,
    transport: &Transport,
    listener: &Found,
    step: &mut impl Handover,
) -> Outcome {
    admit(tables, packet, listener)?;
    // Before lengths are looked at: the UDP header of a first fragment has the whole's.
    if packet.is_fragment() {
        return Err(DropReason::Fragmented.into());
    }
    if transport.is_malformed(frame, packet) {
        return Err(DropReason::Malformed.into());
    }
    if listener.index == NO_RING {
        return Err(Stop::Answer(DropReason::NoTarget));
    }
    let selected = select(tables, packet, transport, listener, step)?;
    deliver(frame, tables, link, packet, transport, (listener.listener, selected), step)
}

/// Sends the packet to its target.
#[inline(always)]
pub fn deliver<I: Ip, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    link: &Link,
    packet: &Packet<I>,
    transport: &Transport,
    (listener, selected): (u32, Selected),
    step: &mut impl Handover,
) -> Outcome {
    let Selected { index, is_new, .. } = selected;
    let Some(target) = serving(tables, index) else {
        return Err(Stop::Answer(without_target(index)));
    };
    forget_direct(frame, tables, packet, index, target);
    if target.hop.ifindex == 0 {
        tables.report_unresolved(target.address);
        return Err(DropReason::NextHopUnresolved.into());
    }
    if packet.length > target.hop.mtu as usize {
        step.with_step(|step| step.mtu = target.hop.mtu as u64);
        return Err(Stop::TooBig);
    }
    if target.mode == Target::NAT {
        let (address, port) = (target.address, target.port);
        emit::translate(frame, packet, transport, End::Destination, address, port)?;
    } else if target.mode >= Target::SNAT {
        step.with_step(|step| (step.recall.listener, step.selected) = (listener, selected));
        return Err(if target.is_tunnelled() { Stop::Encapsulate } else { Stop::Snat });
    }
    let verdict = emit::send(frame, link, &target.hop)?;
    tables.count_request(listener, index, packet.length as u64, is_new);
    Ok(verdict)
}
