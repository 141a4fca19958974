//! A packet from a target, and a client that talks to a target's own address.

use crate::flow::{MAX_IDLE, REFRESH, ReturnFlow, ReturnTable};
use crate::tables::{Endpoint, NO_LISTENER, OPEN, Tables};
use crate::verdict::{DropReason, Verdict};

use super::ip::{End, Ip};
use super::parse::{Link, Packet, Place, Transport};
use super::{Found, Frame, Handover, Next, Outcome, Stop, emit};

/// Gives a reply the listener's address back and sends it to the client.
///
/// Replies to ourselves (health checks), of flows that came by no listener, and to clients that
/// talk to the target's own address are not ours: they pass untouched.
#[inline(always)]
pub fn handle<I: Ip, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    link: &Link,
    packet: &Packet<I>,
    transport: &Transport,
    target: &Found,
    step: &mut impl Handover,
) -> Outcome {
    let kind = super::kind_of_address(tables, packet.destination.words());
    if kind != 0 {
        let is_snat = kind & Endpoint::SNAT != 0;
        return if is_snat { Err(Stop::SnatReply(Next::PASS)) } else { Ok(Verdict::Pass) };
    }
    let registered = tables.target(target.index).ok_or(DropReason::TableInconsistent)?;
    if tables.has_direct_flows(target.index, registered)
        && is_direct::<I, F, T>(frame, tables, &packet.place())
    {
        return Ok(Verdict::Pass);
    }
    let mut origin = Origin { listener: target.listener, target: target.index };
    if target.has(Endpoint::SHARED) {
        look_up_origin::<I, F, T>(frame, tables, &packet.place(), &mut origin);
    }
    if origin.listener == NO_LISTENER {
        return Ok(Verdict::Pass);
    }
    let listening = tables.listener(origin.listener).ok_or(DropReason::TableInconsistent)?;
    let ingress = frame.ingress();
    let Some(hop) = tables.route(ingress, listening.address, packet.destination) else {
        return Err(DropReason::NextHopUnresolved.into());
    };
    // Before lengths are looked at: the UDP header of a first fragment has the whole's.
    if packet.is_fragment() {
        return Err(DropReason::Fragmented.into());
    }
    if transport.is_malformed(frame, packet) {
        return Err(DropReason::Malformed.into());
    }
    if packet.length > hop.mtu as usize {
        step.with_step(|step| step.mtu = hop.mtu as u64);
        return Err(Stop::TooBig);
    }
    emit::translate::<I, F>(
        frame,
        packet,
        transport,
        End::Source,
        listening.address,
        listening.port,
    )?;
    let verdict = emit::send(frame, link, hop)?;
    tables.count_reply(origin.listener, origin.target, packet.length as u64);
    Ok(verdict)
}

/// The listener and the target that a reply's flow came by.
struct Origin {
    listener: u32,
    target: u32,
}

/// Of a target that several listeners share, the flow knows.
#[inline(never)]
fn look_up_origin<I: Ip, F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    place: &Place,
    origin: &mut Origin,
) {
    let Some((key, _)) = place.flow::<I, F>(frame) else { return };
    let now = tables.now();
    for table in ReturnTable::ALL {
        let Some(flow) = tables.return_flow(table, &key) else { continue };
        if flow.is_alive(now, MAX_IDLE) {
            let ReturnFlow { last_seen, listener, target } = flow;
            *origin = Origin { listener, target };
            if now.saturating_sub(last_seen) > REFRESH {
                let flow = ReturnFlow { last_seen: now, listener, target };
                tables.remember_return(table, &key, &flow);
            }
        }
        return;
    }
}

/// Whether the client talks to the target's own address.
#[inline(never)]
fn is_direct<I: Ip, F: Frame, T: Tables>(frame: &F, tables: &T, place: &Place) -> bool {
    place.flow::<I, F>(frame).is_some_and(|(key, _)| tables.is_direct_flow(&key))
}

/// A client talks to a target's own address through us: note it, or the replies would be given
/// the listener's address. The target lets in whatever comes from us if we are among the members of
/// a group that it lets in, so its security group is asked here.
#[inline(never)]
pub fn to_target<I: Ip, F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    place: &Place,
    target: u32,
    class: u32,
) -> u64 {
    let pass = Next::with(Next::PASS, 0);
    let Some((key, _)) = place.flow::<I, F>(frame) else { return pass };
    if class != OPEN && !tables.admits(class, key.source) {
        return Next::with(Next::DROP, DropReason::SecurityGroupDenied as u32);
    }
    if target != 0 {
        tables.note_direct_flow(target, &key.reversed());
    }
    pass
}
