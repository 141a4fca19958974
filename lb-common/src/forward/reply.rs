//! A packet from a target, and a client that talks to a target's own address.

use crate::flow::{FlowKey, REFRESH};
use crate::tables::{Endpoint, NO_LISTENER, Route, Tables};
use crate::verdict::{DropReason, Verdict};

use super::ip::{End, Ip};
use super::parse::{Link, Packet, Transport};
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
    let (listener, index) = match origin(tables, &key, target) {
        Some(origin) => origin,
        None => return Ok(Verdict::Pass),
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
    tables.count_reply(listener, index, packet.length as u64);
    Ok(verdict)
}

/// The listener and the target that a reply's flow came by.
#[inline(always)]
fn origin<T: Tables>(tables: &T, key: &FlowKey, target: &Endpoint) -> Option<(u32, u32)> {
    if target.kind & Endpoint::SHARED != 0 {
        let now = tables.now();
        if let Some(mut flow) = tables.return_flow(key)
            && flow.is_alive(now, key.protocol)
        {
            if now.wrapping_sub(flow.last_seen) > REFRESH {
                flow.last_seen = now;
                tables.remember_return(key, &flow);
            }
            return Some((flow.listener, flow.target));
        }
    }
    (target.listener != NO_LISTENER).then_some((target.listener, target.index))
}

/// A client talks to a target's own address through us: note it, or the replies would be given
/// the listener's address.
#[inline(always)]
pub fn note_direct<I: Ip, T: Tables>(
    tables: &T,
    packet: &Packet<I>,
    transport: &Transport,
    target: &Endpoint,
) -> Outcome {
    let ports = transport.ports;
    let reply = FlowKey {
        source: packet.destination,
        destination: packet.source,
        source_port: ports.destination,
        destination_port: ports.source,
        protocol: packet.protocol,
        zero: [0; 3],
    };
    tables.note_direct_flow(target.index, &reply);
    Ok(Verdict::Pass)
}
