//! Which target a flow goes to.
//!
//! On a settled slot the hash alone decides, and nothing is read or written for the flow. Only a
//! slot that changed lately remembers flows, and only those that the change could break.

use crate::flow::{self, Flow, FlowKey, Keys, REFRESH, ReturnFlow, TCP};
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
    let chosen = flow::slot(tables.keys().flow(&key), tables.ring_size());
    let slot = slot(tables, listener.index, chosen)?;
    let is_tracked = listener.kind & Endpoint::TRACKED != 0;
    let selected = if slot.is_settled() && !is_tracked {
        serving(tables, slot.current, transport.is_syn())?
    } else {
        let listener_index = listener.listener;
        let (flags, ring) = (transport.flags, listener.index);
        let ask = Ask { flags, is_tracked, listener: listener_index, ring, chosen, slot };
        let mut answer = Answer { index: 0, is_new: false };
        remembered(tables, &key, &ask, &mut answer).map_or(Ok(()), Err)?;
        serving(tables, answer.index, answer.is_new)?
    };
    if tables.has_direct_flows(selected.index) {
        tables.forget_direct_flow(&reply_key(&key, selected.target));
    }
    Ok(selected)
}

#[inline(always)]
fn slot<T: Tables>(tables: &T, ring: u32, slot: u32) -> Result<Slot, DropReason> {
    let index = ring.wrapping_mul(tables.ring_size()).wrapping_add(slot);
    tables.slot(index).ok_or(DropReason::TableInconsistent)
}

#[inline(always)]
fn serving<T: Tables>(tables: &T, index: u32, is_new: bool) -> Result<Selected<'_>, DropReason> {
    let target = tables.target(index).ok_or(DropReason::TableInconsistent)?;
    if target.serves() { Ok(Selected { target, index, is_new }) } else { Err(DropReason::TargetDown) }
}

/// What [`remembered`] is asked.
struct Ask {
    /// TCP's control bits.
    flags: u8,
    /// Whether the listener tracks every flow.
    is_tracked: bool,
    /// Index of the listener.
    listener: u32,
    /// The ring.
    ring: u32,
    /// The slot's number in it.
    chosen: u32,
    /// The slot.
    slot: Slot,
}

impl Ask {
    #[inline(always)]
    fn is_syn(&self) -> bool {
        self.flags & (Tcp::SYN | Tcp::ACK) == Tcp::SYN
    }

    #[inline(always)]
    fn closing(&self) -> u32 {
        (self.flags & (Tcp::FIN | Tcp::RST) != 0) as u32
    }
}

/// What [`remembered`] answers.
struct Answer {
    index: u32,
    is_new: bool,
}

/// The slow way: the flow may be older than the slot's last change, or is tracked anyway.
///
/// A function of its own in the kernel too, with a stack frame of its own; hence the out
/// parameter: BPF functions return one register.
#[inline(never)]
fn remembered<T: Tables>(
    tables: &T,
    key: &FlowKey,
    ask: &Ask,
    answer: &mut Answer,
) -> Option<DropReason> {
    match remember(tables, key, ask) {
        Ok(found) => {
            *answer = found;
            None
        }
        Err(reason) => Some(reason),
    }
}

#[inline(always)]
fn remember<T: Tables>(tables: &T, key: &FlowKey, ask: &Ask) -> Result<Answer, DropReason> {
    let now = tables.now();
    // A SYN on a connection that is closing opens a new one (RFC 9293 section 3.6.1).
    let known = tables
        .flow(key)
        .filter(|flow| flow.is_alive(now, key.protocol) && !(ask.is_syn() && flow.closing != 0));
    if let Some(flow) = known {
        match serving(tables, flow.target, false) {
            Ok(selected) => {
                refresh(tables, key, ask, &flow, selected.target, now);
                return Ok(Answer { index: flow.target, is_new: false });
            }
            Err(reason) => {
                tables.forget(key);
                if key.protocol == TCP && !ask.is_syn() {
                    return Err(reason);
                }
            }
        }
    }
    let is_new = ask.is_syn() || key.protocol != TCP;
    let slot = ask.slot;
    let index = if is_previous(&slot, ask, key.protocol) { slot.previous() } else { slot.current };
    let selected = match serving(tables, index, is_new) {
        Ok(selected) => selected,
        // A datagram has nothing to lose by another target.
        Err(_) if key.protocol != TCP => serving(tables, slot.current, is_new)?,
        Err(reason) => return Err(reason),
    };
    let index = if ask.is_tracked { claim(tables, key, ask, selected, now)? } else { selected.index };
    if ask.is_tracked || slot.state() != SlotState::Pinned {
        tables.remember(key, &Flow { last_seen: now, target: index, closing: ask.closing() });
    }
    Ok(Answer { index, is_new })
}

/// Whether an unknown flow is taken to be older than the slot's change.
#[inline(always)]
fn is_previous(slot: &Slot, ask: &Ask, protocol: u8) -> bool {
    if slot.previous() == 0 || ask.is_syn() {
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
    ask: &Ask,
    flow: &Flow,
    target: &Target,
    now: u64,
) {
    let is_stale = now.wrapping_sub(flow.last_seen) > REFRESH;
    // Data a while after a FIN or a reset that the other end did not accept: the flow lives on.
    let closing = if is_stale { ask.closing() } else { flow.closing | ask.closing() };
    if closing == flow.closing && !is_stale {
        return;
    }
    tables.remember(key, &Flow { last_seen: now, target: flow.target, closing });
    if ask.is_tracked && target.mode == Target::NAT {
        // Evicted on its own, the other direction is restored here.
        let return_flow = ReturnFlow { last_seen: now, listener: ask.listener, target: flow.target };
        tables.remember_return(&reply_key(key, target), &return_flow);
    }
}

/// The same client address and port, through two listeners to one target, would be one 4-tuple
/// there: the later connection takes the next target on the ring.
#[inline(always)]
fn claim<T: Tables>(
    tables: &T,
    key: &FlowKey,
    ask: &Ask,
    first: Selected<'_>,
    now: u64,
) -> Result<u32, DropReason> {
    let size = tables.ring_size();
    // Neighbouring slots often hold the same target: step far.
    let step = size / (ATTEMPTS + 1) + 1;
    let mut next = ask.chosen;
    let mut candidate = first;
    for _ in 0..ATTEMPTS {
        if candidate.target.mode != Target::NAT {
            return Ok(candidate.index);
        }
        let reply = reply_key(key, candidate.target);
        let taken = tables
            .return_flow(&reply)
            .is_some_and(|flow| flow.listener != ask.listener && flow.is_alive(now, key.protocol));
        if !taken {
            let flow = ReturnFlow { last_seen: now, listener: ask.listener, target: candidate.index };
            tables.remember_return(&reply, &flow);
            return Ok(candidate.index);
        }
        next = next.wrapping_add(step);
        next = if next >= size { next - size } else { next };
        candidate = serving(tables, slot(tables, ask.ring, next)?.current, false)?;
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
