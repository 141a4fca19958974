//! Which target a flow goes to.
//!
//! On a settled slot the hash alone decides, and nothing is read or written for the flow. Only a
//! slot that changed lately remembers flows, and only those that the change could break.

use crate::flow::{Flow, FlowKey, HashKeys, REFRESH, ReturnFlow, TCP};
use crate::tables::{Endpoint, Slot, SlotState, Tables, Target};
use crate::verdict::DropReason;
use crate::wire::Tcp;

use super::ip::Ip;
use super::parse::{Packet, Transport};

/// A flow's target.
pub struct Selected<'a> {
    /// The target.
    pub target: &'a Target,
    /// Its index.
    pub index: u32,
    /// Whether the flow is new, as far as can be told.
    pub is_new: bool,
}

/// Slots that a new connection tries when its 4-tuple is taken at a target.
const ATTEMPTS: u32 = 4;

/// Chooses the target of a packet's flow.
///
/// # Errors
/// [`DropReason::TargetDown`] when the flow's target no longer serves,
/// [`DropReason::PortAllocationError`] when its 4-tuple is taken at every target tried.
#[inline(always)]
pub fn select<'a, I: Ip, T: Tables>(
    tables: &'a T,
    packet: &Packet<I>,
    transport: &Transport,
    listener: &Endpoint,
) -> Result<Selected<'a>, DropReason> {
    let key = packet.flow(transport.ports);
    let size = tables.ring_size();
    let chosen = HashKeys::slot(tables.hash_keys().flow(&key), size);
    let slot = slot(tables, listener, chosen)?;
    let is_tracked = listener.kind & Endpoint::TRACKED != 0;
    let selected = if slot.is_settled() && !is_tracked {
        serving(tables, slot.current, transport.is_syn())?
    } else {
        remembered(tables, &key, transport, listener, chosen, slot)?
    };
    if tables.has_direct_flows(selected.index) {
        tables.forget_direct_flow(&reply_key(&key, selected.target));
    }
    Ok(selected)
}

#[inline(always)]
fn slot<T: Tables>(tables: &T, listener: &Endpoint, slot: u32) -> Result<Slot, DropReason> {
    let index = listener.index.wrapping_mul(tables.ring_size()).wrapping_add(slot);
    tables.slot(index).ok_or(DropReason::TableInconsistent)
}

#[inline(always)]
fn serving<T: Tables>(tables: &T, index: u32, is_new: bool) -> Result<Selected<'_>, DropReason> {
    let target = tables.target(index).ok_or(DropReason::TableInconsistent)?;
    if target.serves() { Ok(Selected { target, index, is_new }) } else { Err(DropReason::TargetDown) }
}

/// The slow way: the flow may be older than the slot's last change, or is tracked anyway.
#[inline(always)]
fn remembered<'a, T: Tables>(
    tables: &'a T,
    key: &FlowKey,
    transport: &Transport,
    listener: &Endpoint,
    chosen: u32,
    slot: Slot,
) -> Result<Selected<'a>, DropReason> {
    let now = tables.now();
    let is_tracked = listener.kind & Endpoint::TRACKED != 0;
    // A SYN on a connection that is closing opens a new one (RFC 9293 section 3.6.1).
    let known = tables.flow(key).filter(|flow| {
        flow.is_alive(now, key.protocol) && !(transport.is_syn() && flow.closing != 0)
    });
    if let Some(flow) = known {
        match serving(tables, flow.target, false) {
            Ok(selected) => {
                refresh(tables, key, transport, listener, &flow, selected.target, now);
                return Ok(selected);
            }
            Err(reason) => {
                tables.forget(key);
                if key.protocol == TCP && !transport.is_syn() {
                    return Err(reason);
                }
            }
        }
    }
    let is_new = transport.is_syn() || key.protocol != TCP;
    let index = if is_previous(&slot, transport, key.protocol) { slot.previous() } else { slot.current };
    let selected = match serving(tables, index, is_new) {
        Ok(selected) => selected,
        // A datagram has nothing to lose by another target.
        Err(_) if key.protocol != TCP => serving(tables, slot.current, is_new)?,
        Err(reason) => return Err(reason),
    };
    let selected =
        if is_tracked { claim(tables, key, listener, chosen, selected, now)? } else { selected };
    if is_tracked || slot.state() != SlotState::Pinned {
        let closing = transport.is_closing() as u32;
        tables.remember(key, &Flow { last_seen: now, target: selected.index, closing });
    }
    Ok(selected)
}

/// Whether an unknown flow is taken to be older than the slot's change.
#[inline(always)]
fn is_previous(slot: &Slot, transport: &Transport, protocol: u8) -> bool {
    if slot.previous() == 0 || transport.is_syn() {
        return false;
    }
    match slot.state() {
        SlotState::Learning => true,
        SlotState::LearningTcp => protocol == TCP,
        SlotState::Settled | SlotState::Pinned => false,
    }
}

/// Notes the time and the end of a known flow. Not for every packet: the entry's cache line would
/// move from CPU to CPU.
#[inline(always)]
fn refresh<T: Tables>(
    tables: &T,
    key: &FlowKey,
    transport: &Transport,
    listener: &Endpoint,
    flow: &Flow,
    target: &Target,
    now: u64,
) {
    // Data after a reset or FIN that another end did not accept shows that the flow lives on.
    let closing = if transport.flags & Tcp::RST != 0 || transport.flags & Tcp::FIN != 0 {
        1
    } else if transport.flags & Tcp::ACK != 0 && flow.closing != 0 && now.wrapping_sub(flow.last_seen) > REFRESH
    {
        0
    } else {
        flow.closing
    };
    if closing == flow.closing && now.wrapping_sub(flow.last_seen) <= REFRESH {
        return;
    }
    tables.remember(key, &Flow { last_seen: now, target: flow.target, closing });
    if listener.kind & Endpoint::TRACKED != 0 && target.mode == Target::NAT {
        // Evicted on its own, the other direction is restored here.
        let reply = reply_key(key, target);
        let return_flow = ReturnFlow { last_seen: now, listener: listener.listener, zero: 0 };
        tables.remember_return(&reply, &return_flow);
    }
}

/// The same client address and port, through two listeners to one target, would be one 4-tuple
/// there: the later connection takes the next target on the ring.
#[inline(always)]
fn claim<'a, T: Tables>(
    tables: &'a T,
    key: &FlowKey,
    listener: &Endpoint,
    chosen: u32,
    first: Selected<'a>,
    now: u64,
) -> Result<Selected<'a>, DropReason> {
    let is_new = first.is_new;
    let mut candidate = first;
    for attempt in 1..=ATTEMPTS {
        if candidate.target.mode != Target::NAT {
            return Ok(candidate);
        }
        let reply = reply_key(key, candidate.target);
        let taken = tables.return_flow(&reply).is_some_and(|flow| {
            flow.listener != listener.listener && flow.is_alive(now, key.protocol)
        });
        if !taken {
            let flow = ReturnFlow { last_seen: now, listener: listener.listener, zero: 0 };
            tables.remember_return(&reply, &flow);
            return Ok(candidate);
        }
        // Neighbouring slots often hold the same target: step far.
        let size = tables.ring_size();
        let next = (chosen as u64 + attempt as u64 * (size as u64 / (ATTEMPTS as u64 + 1) + 1)) as u32;
        let next = if next >= size { next - size } else { next };
        candidate = serving(tables, slot(tables, listener, next)?.current, is_new)?;
    }
    Err(DropReason::PortAllocationError)
}

/// The flow as a target's replies show it.
#[inline(always)]
fn reply_key(key: &FlowKey, target: &Target) -> FlowKey {
    FlowKey {
        source: target.address,
        destination: key.source,
        source_port: target.port,
        destination_port: key.source_port,
        protocol: key.protocol,
        zero: [0; 3],
    }
}
