//! Which target a flow goes to.
//!
//! On a settled slot the hash alone decides, and nothing is read or written for the flow. Only a
//! slot that changed lately remembers flows, and only those that the change could break.

use crate::flow::{self, Flow, FlowKey, Keys, REFRESH, ReturnFlow, TCP};
use crate::tables::{Endpoint, Slot, SlotState, Tables, Target};
use crate::verdict::DropReason;
use crate::wire::Tcp;

use super::ip::Ip;
use super::parse::{Packet, Place, Transport};
use super::{Found, Frame, Next, Recall, Selected, Step, Stop};

/// Slots that a new connection tries when its 4-tuple is taken at a target: of two targets, both
/// are among them but once in 32,768 cases.
const ATTEMPTS: u32 = 16;

/// Chooses the target of a packet's flow, by the hash alone where its slot is settled.
///
/// # Errors
/// [`Stop::Recall`] where it is not, or every flow is tracked: then `recall` says what is asked.
#[inline(always)]
pub fn select<I: Ip, T: Tables>(
    tables: &T,
    packet: &Packet<I>,
    transport: &Transport,
    listener: &Found,
    recall: &mut Recall,
) -> Result<Selected, Stop> {
    let hash = tables.keys().flow(&packet.flow(transport.ports));
    let chosen = flow::slot(hash, tables.ring_size());
    let slot = slot(tables, listener.index, chosen)?;
    let is_tracked = listener.has(Endpoint::TRACKED);
    if slot.is_settled() && !is_tracked {
        return Ok(Selected { index: slot.current, is_new: transport.is_syn() as u32 });
    }
    let (ring, listener) = (listener.index, listener.listener);
    *recall = Recall { slot, chosen, ring, listener, is_tracked: is_tracked as u32 };
    Err(Stop::Recall)
}

/// A client that talked to the target's own address talks to the listener now, from the same
/// address and port: its replies are the listener's again.
#[inline(always)]
pub fn forget_direct<I: Ip, F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    packet: &Packet<I>,
    index: u32,
    target: &Target,
) {
    if tables.has_direct_flows(index, target) {
        forget_direct_flow::<I, F, T>(frame, tables, &packet.place(), index);
    }
}

#[inline(never)]
fn forget_direct_flow<I: Ip, F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    place: &Place,
    index: u32,
) {
    if let Some((key, _)) = place.flow::<I, F>(frame)
        && let Some(target) = tables.target(index)
    {
        tables.forget_direct_flow(&reply_key(&key, target));
    }
}

#[inline(always)]
fn slot<T: Tables>(tables: &T, ring: u32, slot: u32) -> Result<Slot, DropReason> {
    let index = ring.wrapping_mul(tables.ring_size()).wrapping_add(slot);
    tables.slot(index).ok_or(DropReason::TableInconsistent)
}

/// The target, if packets of its flows still go to it.
#[inline(always)]
pub fn serving<T: Tables>(tables: &T, index: u32) -> Option<&Target> {
    tables.target(index).filter(|target| target.serves())
}

/// Recalls the flow, and remembers it if it must: it may be older than the slot's last change, or
/// is tracked anyway.
#[inline(never)]
pub fn recall<I: Ip, F: Frame, T: Tables>(frame: &F, tables: &T, step: &mut Step) -> u64 {
    let Some((key, transport)) = step.place.flow::<I, F>(frame) else {
        return Next::with(Next::PASS, 0);
    };
    match remember(tables, &key, &transport, &step.recall) {
        Ok(selected) => {
            step.selected = selected;
            let mode = tables.target(selected.index).map_or(0, |target| target.mode);
            Next::with(if mode == Target::SNAT { Next::SNAT } else { Next::DELIVER }, 0)
        }
        Err(reason) => Next::with(Next::ANSWER, reason as u32),
    }
}

/// # Errors
/// [`DropReason::TargetDown`] when the flow's target no longer serves,
/// [`DropReason::PortAllocationError`] when its 4-tuple is taken at every target tried.
#[inline(always)]
fn remember<T: Tables>(
    tables: &T,
    key: &FlowKey,
    transport: &Transport,
    recall: &Recall,
) -> Result<Selected, DropReason> {
    let now = tables.now();
    if let Some(flow) = tables.flow(key).filter(|flow| flow.is_alive(now, key.protocol)) {
        // A SYN on a connection that is closing opens a new one (RFC 9293 section 3.6.1).
        let is_reopened = transport.is_syn() && flow.closing != 0;
        if !is_reopened && let Some(target) = serving(tables, flow.target) {
            refresh(tables, key, transport, recall, &flow, target, now);
            return Ok(Selected { index: flow.target, is_new: 0 });
        }
        // A pinned slot does not remember the new connection: its next packet must not find this.
        tables.forget(key);
        if key.protocol == TCP && !transport.is_syn() {
            return Err(DropReason::TargetDown);
        }
    }
    let slot = recall.slot;
    let mut index =
        if is_previous(&slot, transport, key.protocol) { slot.previous() } else { slot.current };
    if serving(tables, index).is_none() {
        if key.protocol == TCP {
            return Err(DropReason::TargetDown);
        }
        // A datagram has nothing to lose by another target.
        index = slot.current;
    }
    if recall.is_tracked != 0 {
        index = claim(tables, key, recall, index, now)?;
    }
    if recall.is_tracked != 0 || slot.state() != SlotState::Pinned {
        tables.remember(key, &Flow { last_seen: now, target: index, closing: closing(transport) });
    }
    let is_new = (transport.is_syn() || key.protocol != TCP) as u32;
    Ok(Selected { index, is_new })
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
    recall: &Recall,
    flow: &Flow,
    target: &Target,
    now: u64,
) {
    let is_stale = now.wrapping_sub(flow.last_seen) > REFRESH;
    // Data a while after a FIN or a reset that the other end did not accept: the flow lives on.
    let closing = closing(transport) | if is_stale { 0 } else { flow.closing };
    if closing == flow.closing && !is_stale {
        return;
    }
    tables.remember(key, &Flow { last_seen: now, target: flow.target, closing });
    if recall.is_tracked != 0 && target.mode == Target::NAT {
        // Evicted on its own, the other direction is restored here.
        let return_flow =
            ReturnFlow { last_seen: now, listener: recall.listener, target: flow.target };
        tables.remember_return(&reply_key(key, target), &return_flow);
    }
}

/// 1 for a packet that ends a TCP connection.
#[inline(always)]
fn closing(transport: &Transport) -> u32 {
    (transport.flags & (Tcp::FIN | Tcp::RST) != 0) as u32
}

/// The same client address and port, through two listeners to one target, would be one 4-tuple
/// there: the later connection takes the next target on the ring.
#[inline(always)]
fn claim<T: Tables>(
    tables: &T,
    key: &FlowKey,
    recall: &Recall,
    first: u32,
    now: u64,
) -> Result<u32, DropReason> {
    let size = tables.ring_size();
    // Neighbouring slots often hold the same target: step far.
    let step = size / (ATTEMPTS + 1) + 1;
    let mut next = recall.chosen;
    let mut index = first;
    for _ in 0..ATTEMPTS {
        let Some(target) = serving(tables, index) else { return Err(DropReason::TargetDown) };
        if target.mode != Target::NAT {
            return Ok(index);
        }
        let reply = reply_key(key, target);
        let taken = tables.return_flow(&reply).is_some_and(|flow| {
            flow.listener != recall.listener
                && flow.is_alive(now, key.protocol)
                && is_in_use(tables, key, &flow, now)
        });
        if !taken {
            let flow = ReturnFlow { last_seen: now, listener: recall.listener, target: index };
            tables.remember_return(&reply, &flow);
            return Ok(index);
        }
        next = next.wrapping_add(step);
        next = if next >= size { next - size } else { next };
        index = slot(tables, recall.ring, next)?.current;
    }
    Err(DropReason::PortAllocationError)
}

/// Whether the connection by which the client's port is known at a target still lives: neither is
/// it closed, nor is its listener gone.
#[inline(never)]
fn is_in_use<T: Tables>(tables: &T, key: &FlowKey, flow: &ReturnFlow, now: u64) -> bool {
    let Some(listener) = tables.listener(flow.listener) else { return false };
    let other = FlowKey { destination: listener.address, destination_port: listener.port, ..*key };
    tables
        .flow(&other)
        .is_some_and(|other| other.target == flow.target && other.is_alive(now, key.protocol))
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

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use etherparse::PacketBuilder;

    use crate::flow::{Flow, SECOND};
    use crate::forward::forward;
    use crate::model::{Bytes, Model};
    use crate::tables::{Listener, NextHop};
    use crate::verdict::Verdict;
    use crate::wire::{Address, Be16};

    use super::*;

    const CLIENT: [u8; 4] = [10, 0, 1, 10];
    const VIP: [u8; 4] = [10, 0, 1, 100];
    const NIC: u32 = 3;

    fn address(octets: [u8; 4]) -> Address {
        core::net::IpAddr::from(octets).into()
    }

    /// Two targets, 10.0.2.1 and 10.0.2.2, behind a ring of one slot.
    fn balancer(slot: Slot) -> Model {
        let mut model = Model::new(1, 1);
        model.now.set(1000 * SECOND);
        let listener = Listener {
            address: address(VIP),
            port: Be16::new(80),
            protocol: TCP,
            ..Listener::default()
        };
        model.listeners.insert(0, listener);
        model.endpoints.insert(Endpoint {
            address: listener.address,
            port: listener.port,
            protocol: TCP,
            kind: Endpoint::LISTENER,
            ..Endpoint::default()
        });
        for n in [1, 2] {
            let target = Target {
                address: address([10, 0, 2, n]),
                port: Be16::new(8080),
                mode: Target::NAT,
                flags: Target::SERVES,
                hop: NextHop { ifindex: NIC, mtu: 1500, ..NextHop::default() },
                ..Target::default()
            };
            model.targets.insert(n.into(), target);
        }
        model.rings.insert(0, vec![slot]);
        model
    }

    /// Last byte of the address of the target that a packet with these flags goes to.
    fn target_of(model: &Model, flags: u8) -> u8 {
        let mut builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
            .ipv4(CLIENT, VIP, 64)
            .tcp(40000, 80, 1, 1024);
        if flags & Tcp::SYN != 0 {
            builder = builder.syn();
        }
        if flags & Tcp::ACK != 0 {
            builder = builder.ack(1);
        }
        let mut bytes = Vec::new();
        builder.write(&mut bytes, &[]).unwrap();
        let mut frame = Bytes { bytes, ingress: NIC };
        assert_eq!(forward(&mut frame, model), Verdict::Transmit);
        frame.bytes[14 + 19]
    }

    #[test]
    fn a_port_used_again_in_a_pinned_slot_stays_with_its_new_target() {
        let model = balancer(Slot::new(2, 2, SlotState::Pinned));
        let key = FlowKey {
            source: address(CLIENT),
            destination: address(VIP),
            source_port: Be16::new(40000),
            destination_port: Be16::new(80),
            protocol: TCP,
            zero: [0; 3],
        };
        let closing = Flow { last_seen: 999 * SECOND, target: 1, closing: 1 };
        model.remember(&key, &closing);
        assert_eq!(target_of(&model, Tcp::ACK), 1, "the last packets of the old connection");
        assert_eq!(target_of(&model, Tcp::SYN), 2);
        assert_eq!(target_of(&model, Tcp::ACK), 2);
    }
}
