//! A packet from a target, and a client that talks to a target's own address.

use crate::flow::REFRESH;
use crate::tables::{Endpoint, Route, Tables};
use crate::verdict::{DropReason, Verdict};

use super::ip::{End, Ip};
use super::parse::{Link, Packet, Ports, Transport};
use super::{Frame, Outcome, emit};

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
    target: &Endpoint,
) -> Outcome {
    if super::is_local(tables, packet.destination) {
        return Ok(Verdict::Pass);
    }
    let key = packet.flow(transport.ports);
    if tables.has_direct_flows(target.index) && tables.is_direct_flow(&key) {
        return Ok(Verdict::Pass);
    }
    let listener = if target.kind & Endpoint::SHARED != 0 {
        let now = tables.now();
        match tables.return_flow(&key).filter(|flow| flow.is_alive(now, key.protocol)) {
            Some(mut flow) => {
                if now.wrapping_sub(flow.last_seen) > REFRESH {
                    flow.last_seen = now;
                    tables.remember_return(&key, &flow);
                }
                flow.listener
            }
            None => return Ok(Verdict::Pass),
        }
    } else {
        target.listener
    };
    let listening = tables.listener(listener).ok_or(DropReason::TableInconsistent)?;
    let hop = match tables.route(frame.ingress(), listening.address, packet.destination) {
        Route::Via(hop) => hop,
        Route::Unresolved => return Err(DropReason::NextHopUnresolved),
    };
    if transport.is_malformed {
        return Err(DropReason::Malformed);
    }
    if packet.is_fragment {
        return Err(DropReason::Fragmented);
    }
    if packet.length > hop.mtu as usize {
        return Err(DropReason::TooBig);
    }
    emit::translate::<I, F>(frame, packet, transport, End::Source, listening.address, listening.port)?;
    let verdict = emit::send(frame, link, &hop)?;
    tables.count_reply(listener, target.index, packet.length as u64);
    Ok(verdict)
}

/// A client talks to a target's own address through us: note it, or the replies would be given
/// the listener's address. Targets of tracked flows need no note.
#[inline(always)]
pub fn note_direct<I: Ip, T: Tables>(
    tables: &T,
    packet: &Packet<I>,
    transport: &Transport,
    target: &Endpoint,
) -> Outcome {
    if target.kind & Endpoint::SHARED == 0 {
        let mut reply = packet.flow(Ports {
            source: transport.ports.destination,
            destination: transport.ports.source,
        });
        (reply.source, reply.destination) = (packet.destination, packet.source);
        tables.note_direct_flow(target.index, &reply);
    }
    Ok(Verdict::Pass)
}
