//! Which target a flow goes to.
//!
//! On a settled slot the hash alone decides, and nothing is read or written for the flow. Only a
//! slot that changed lately remembers flows, and only those that the change could break.

use bytemuck::{Pod, Zeroable};

use crate::flow::{self, Flow, FlowKey, FlowTable, Keys, ReturnFlow, ReturnTable, TCP, UDP};
use crate::tables::{Endpoint, GONE, Slot, Tables, Target, exception_place};
use crate::verdict::DropReason;

use super::decide::{self, Fate, Kind, Known};
use super::ip::Ip;
use super::least;
use super::parse::{Packet, Place, Transport};
use super::{Found, Frame, Handover, Next, Recall, Selected, Step, Stop};

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
    step: &mut impl Handover,
) -> Result<Selected, Stop> {
    let key = packet.flow(transport.ports);
    let hash = hash(tables, &key, listener);
    let chosen = flow::slot(hash, tables.ring_size());
    let slot = slot(tables, listener.index, chosen)?;
    let is_tracked = listener.has(Endpoint::TRACKED);
    if slot.is_settled() && !is_tracked {
        let is_new = transport.is_syn() as u32;
        return Ok(Selected { index: slot.current, is_new, hash: hash as u32 });
    }
    let (ring, listener) = (listener.index, listener.listener);
    let (is_tracked, hash) = (is_tracked as u32, hash as u32);
    let flags = transport.flags as u32;
    step.with_step(|step| {
        step.recall = Recall { slot, chosen, ring, listener, is_tracked, hash, key, flags };
    });
    Err(Stop::Recall)
}

/// The hash that chooses a flow's slot.
#[inline(always)]
pub fn hash<T: Tables>(tables: &T, key: &FlowKey, listener: &Found) -> u64 {
    if listener.has(Endpoint::BY_SOURCE) {
        tables.keys().source(key.source)
    } else {
        tables.keys().flow(key)
    }
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

/// A slot of a ring.
#[inline(always)]
pub fn slot<T: Tables>(tables: &T, ring: u32, slot: u32) -> Result<Slot, DropReason> {
    let index = ring.wrapping_mul(tables.ring_size()).wrapping_add(slot);
    tables.slot(index).ok_or(DropReason::TableInconsistent)
}

/// The target, if packets of its flows still go to it.
#[inline(always)]
pub fn serving<T: Tables>(tables: &T, index: u32) -> Option<&Target> {
    tables.target(index).filter(|target| target.serves())
}

/// Recalls the flow, and remembers it if it must: it may be older than the slot's last change, or
/// is tracked anyway. Leaves the target, or says why there is none.
#[inline(never)]
pub fn recall<I: Ip, F: Frame, T: Tables>(frame: &F, tables: &T, step: &mut Step) -> u64 {
    if step.place.protocol == UDP as u16 {
        step.recall.flags = datagram_flags::<I, F>(frame, &step.place);
    }
    // Parts that are functions of their own in the kernel too, and look at the flow in memory: what
    // one of them found out the verifier need not follow through the others.
    let recall = &step.recall;
    if recall.is_tracked == 0 && recall.slot.is_mapped() && !is_exception(tables, recall.hash) {
        let is_new = recall.kind().may_be_new() as u32;
        step.selected = Selected { index: recall.slot.current, is_new, hash: recall.hash };
        return Next::with(Next::UNDECIDED, 0);
    }
    match remember(tables, recall) {
        Ok(selected) => {
            step.selected = selected;
            Next::with(Next::UNDECIDED, 0)
        }
        Err(reason) => Next::with(Next::ANSWER, reason as u32),
    }
}

/// # Errors
/// [`DropReason::TargetDown`] when the flow's target no longer serves, [`DropReason::NoTarget`]
/// when there is none for it, [`DropReason::PortAllocationError`] when its 4-tuple is taken at
/// every target tried.
#[inline(always)]
fn remember<T: Tables>(tables: &T, recall: &Recall) -> Result<Selected, DropReason> {
    let mut found = Recalled::nothing();
    let kept = kept(tables, recall, &mut found);
    if kept != MORE && kept != ELSEWHERE {
        return Ok(Selected { index: kept, is_new: 0, hash: recall.hash });
    }
    let mut index = 0;
    let outcome = go_on(tables, recall, kept, &mut found, &mut index);
    if outcome == KNOWN {
        return Ok(Selected { index, is_new: 0, hash: recall.hash });
    }
    if outcome == REFUSED {
        return Err(DropReason::TargetDown);
    }
    if recall.is_tracked != 0 && decide::is_new(recall.slot, recall.kind()) {
        index = least::better_of_two(tables, recall, index);
    }
    if serving(tables, index).is_none() {
        if recall.key.protocol == TCP {
            return Err(without_target(index));
        }
        // A datagram has nothing to lose by another target.
        index = recall.slot.current;
    }
    if recall.is_tracked != 0 {
        let refused = claim(tables, recall, &mut index);
        if refused != CLAIMED {
            return Err(match refused {
                TAKEN => DropReason::PortAllocationError,
                INCONSISTENT => DropReason::TableInconsistent,
                _ => without_target(index),
            });
        }
    }
    let is_new = note(tables, recall, index);
    Ok(Selected { index, is_new, hash: recall.hash })
}

/// Whether what is remembered of a flow may be another target than the slot's.
#[inline(always)]
pub fn is_exception<T: Tables>(tables: &T, hash: u32) -> bool {
    let (word, bit) = exception_place(hash);
    tables.exceptions(word) & bit != 0
}

impl Recall {
    #[inline(always)]
    fn kind(&self) -> Kind {
        Kind::of(self.key.protocol, self.flags as u8)
    }
}

/// The flow is none of those that have shown themselves twice.
const ELSEWHERE: u32 = u32::MAX;
/// It is one of them, and there is more to be done.
const MORE: u32 = 0;

/// Most packets' case, decided at once: the target of a flow that has shown itself twice and of
/// which nothing is to be written now. Else one of the above.
#[inline(always)]
fn kept<T: Tables>(tables: &T, recall: &Recall, found: &mut Recalled) -> u32 {
    let table = FlowTable::Flows;
    let Some(flow) = tables.flow(table, &recall.key) else { return ELSEWHERE };
    let now = tables.now();
    if !flow.is_alive(now, idle(tables, recall.listener)) {
        return ELSEWHERE;
    }
    let flags = tables.target(flow.target).map_or(0, |target| target.flags);
    let fate = decide::fate(&Known { flow, table }, flags, recall.kind(), now);
    if fate == Fate::Kept {
        return flow.target;
    }
    *found = Recalled::new(&flow, table);
    MORE
}

/// What stands for TCP's control bits in a datagram.
#[inline(never)]
fn datagram_flags<I: Ip, F: Frame>(frame: &F, place: &Place) -> u32 {
    let Some((_, transport)) = place.flow::<I, F>(frame) else { return 0 };
    if place.is_quic_initial(frame, &transport) { Kind::QUIC_INITIAL as u32 } else { 0 }
}

/// The flow goes on to its target.
const KNOWN: u32 = 0;
/// Its target is gone.
const REFUSED: u32 = 1;
/// The slot says where it goes.
const UNKNOWN: u32 = 2;

/// Goes on with a remembered flow, or says where an unknown one goes. Returns one of the above.
#[inline(never)]
fn go_on<T: Tables>(
    tables: &T,
    recall: &Recall,
    kept: u32,
    found: &mut Recalled,
    index: &mut u32,
) -> u32 {
    let now = tables.now();
    let key = &recall.key;
    let kind = recall.kind();
    if kept == ELSEWHERE && find(tables, recall, now, found) == Recalled::NOWHERE {
        *index = decide::choice(recall.slot, kind);
        return UNKNOWN;
    }
    let known = found.known();
    *index = known.flow.target;
    let flags = tables.target(known.flow.target).map_or(0, |target| target.flags);
    let fate = decide::fate(&known, flags, kind, now);
    if matches!(fate, Fate::Kept | Fate::Refreshed | Fate::Promoted) {
        update(tables, recall, &known, fate, kind, now);
        return KNOWN;
    }
    // A pinned slot does not remember the new connection: its next packet must not find this.
    let forgotten = tables.forget(known.table, key) != 0;
    if forgotten && known.table == FlowTable::Flows && known.flow.closing == 0 {
        least::ended(tables, known.flow.target);
    }
    if fate == Fate::Refused {
        return REFUSED;
    }
    *index = recall.slot.current;
    UNKNOWN
}

/// Remembers a flow that was not, if it must be; whether it is new, as far as can be told.
#[inline(never)]
fn note<T: Tables>(tables: &T, recall: &Recall, index: u32) -> u32 {
    let kind = recall.kind();
    if let Some(table) = decide::first_table(recall.slot, kind, recall.is_tracked != 0) {
        let closing = (kind == Kind::Ending) as u32;
        let flow = Flow { last_seen: tables.now(), target: index, closing };
        tables.remember(table, &recall.key, &flow);
    }
    kind.may_be_new() as u32
}

/// Why a packet does not go to a target that does not serve. No target has number 0: it stands in
/// rings whose targets all only keep the flows they have.
#[inline(always)]
pub fn without_target(index: u32) -> DropReason {
    if index == 0 { DropReason::NoTarget } else { DropReason::TargetDown }
}

/// A flow that was found, in memory. Number and end in half words, which the verifier forgets: it
/// looks at what follows once, not once for each table.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Recalled {
    last_seen: u64,
    target: u32,
    closing: u16,
    table: u16,
}

impl Recalled {
    const NOWHERE: u32 = FlowTable::ALL.len() as u32;

    #[inline(always)]
    fn nothing() -> Self {
        hidden_zeros!()
    }

    #[inline(always)]
    fn new(flow: &Flow, table: FlowTable) -> Self {
        let Flow { last_seen, target, closing } = *flow;
        Self { last_seen, target, closing: closing as u16, table: table as u16 }
    }

    #[inline(always)]
    fn known(&self) -> Known {
        let Self { last_seen, target, closing, table } = *self;
        let flow = Flow { last_seen, target, closing: closing as u32 };
        Known { flow, table: FlowTable::of(table as u32) }
    }
}

/// What the other tables remember of a flow, if it is alive; returns the table's number or
/// [`Recalled::NOWHERE`].
#[inline(never)]
fn find<T: Tables>(tables: &T, recall: &Recall, now: u64, found: &mut Recalled) -> u32 {
    let idle = idle(tables, recall.listener);
    for table in [FlowTable::HalfOpen, FlowTable::OnceSeen] {
        if table == FlowTable::HalfOpen && recall.key.protocol != TCP {
            continue;
        }
        if let Some(flow) = tables.flow(table, &recall.key)
            && flow.is_alive(now, idle)
        {
            *found = Recalled::new(&flow, table);
            return found.table as u32;
        }
    }
    Recalled::NOWHERE
}

/// The idle timeout of a listener's flows, seconds; 0 if there is no such listener.
#[inline(always)]
fn idle<T: Tables>(tables: &T, listener: u32) -> u32 {
    tables.listener(listener).map_or(0, |listener| listener.idle)
}

/// Notes the time and the end of a known flow.
#[inline(always)]
fn update<T: Tables>(tables: &T, recall: &Recall, known: &Known, fate: Fate, kind: Kind, now: u64) {
    let key = &recall.key;
    let target = known.flow.target;
    let flow = Flow { last_seen: now, target, closing: decide::closing(&known.flow, kind, now) };
    match fate {
        Fate::Promoted => {
            // In one of the tables at any time: the agent's walk goes through them in this order.
            let replaced = tables.remember(FlowTable::Flows, key, &flow);
            tables.forget(known.table, key);
            least::opened(tables, target);
            if replaced != 0 {
                least::ended(tables, replaced);
            }
        }
        Fate::Refreshed => {
            let before = tables.refresh(known.table, key, &flow);
            if known.table == FlowTable::Flows && before != GONE && before != flow.closing {
                if flow.closing == 0 {
                    least::opened(tables, target);
                } else {
                    least::ended(tables, target);
                }
            }
        }
        _ => return,
    }
    if recall.is_tracked != 0
        && let Some(entry) = tables.target(target)
        && entry.mode == Target::NAT
    {
        // Evicted on its own, the other direction is restored here.
        let return_flow = ReturnFlow { last_seen: now, listener: recall.listener, target };
        let reply = reply_key(key, entry);
        if fate == Fate::Promoted {
            tables.remember_return(ReturnTable::Established, &reply, &return_flow);
            tables.forget_fresh_return(&reply);
        } else {
            tables.remember_return(ReturnTable::beside(known.table), &reply, &return_flow);
        }
    }
}

/// The target is the flow's.
const CLAIMED: u32 = 0;
/// All that were tried have the client's address and port already.
const TAKEN: u32 = 1;
/// The one in turn does not serve.
const DOWN: u32 = 2;
/// A slot is missing.
const INCONSISTENT: u32 = 3;

/// The same client address and port, through two listeners to one target, would be one 4-tuple
/// there: the later connection takes the next target on the ring. Returns one of the above.
#[inline(never)]
fn claim<T: Tables>(tables: &T, recall: &Recall, index: &mut u32) -> u32 {
    let key = &recall.key;
    let now = tables.now();
    let size = tables.ring_size();
    // Neighbouring slots often hold the same target: step far.
    let step = size / (ATTEMPTS + 1) + 1;
    let mut next = recall.chosen;
    for _ in 0..ATTEMPTS {
        let Some(target) = serving(tables, *index) else { return DOWN };
        if target.mode != Target::NAT {
            return CLAIMED;
        }
        let reply = reply_key(key, target);
        let flow = ReturnFlow { last_seen: now, listener: recall.listener, target: *index };
        if claim_way_back(tables, key, &reply, &flow) == CLAIMED {
            return CLAIMED;
        }
        next = next.wrapping_add(step);
        next = if next >= size { next - size } else { next };
        let Ok(slot) = slot(tables, recall.ring, next) else { return INCONSISTENT };
        *index = slot.current;
    }
    TAKEN
}

/// Notes the way back of a new flow, if none is in its place that lives. One that was noted when a
/// flow was established stays there: it would be found first.
#[inline(never)]
fn claim_way_back<T: Tables>(tables: &T, key: &FlowKey, reply: &FlowKey, flow: &ReturnFlow) -> u32 {
    let mut place = ReturnTable::Fresh;
    for table in ReturnTable::ALL {
        if let Some(known) = tables.return_flow(table, reply) {
            let is_other = known.listener != flow.listener;
            if is_other && is_in_use(tables, key, &known, flow.last_seen) {
                return TAKEN;
            }
            place = table;
            break;
        }
    }
    tables.remember_return(place, reply, flow);
    CLAIMED
}

/// Whether the connection by which the client's port is known at a target still lives: neither is
/// it closed, nor is its listener gone.
#[inline(never)]
fn is_in_use<T: Tables>(tables: &T, key: &FlowKey, flow: &ReturnFlow, now: u64) -> bool {
    let Some(listener) = tables.listener(flow.listener) else { return false };
    let other = FlowKey { destination: listener.address, destination_port: listener.port, ..*key };
    let lives = |table| {
        tables
            .flow(table, &other)
            .is_some_and(|other| other.target == flow.target && other.is_alive(now, listener.idle))
    };
    flow.is_alive(now, listener.idle) && FlowTable::ALL.into_iter().any(lives)
}

/// The flow as a target's replies show it.
#[inline(always)]
fn reply_key(key: &FlowKey, target: &Target) -> FlowKey {
    FlowKey::of_replies(target, key.source, key.source_port, key.protocol)
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use etherparse::PacketBuilder;

    use crate::flow::{Flow, SECOND};
    use crate::forward::forward;
    use crate::model::{Bytes, Model};
    use crate::tables::{Listener, NextHop, SlotState};
    use crate::verdict::Verdict;
    use crate::wire::{Address, Be16, Tcp};

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
            idle: flow::TCP_IDLE,
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
                flags: Target::SERVES | Target::IN_RING,
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
        model.remember(FlowTable::Flows, &key, &closing);
        assert_eq!(target_of(&model, Tcp::ACK), 1, "the last packets of the old connection");
        assert_eq!(target_of(&model, Tcp::SYN), 2);
        assert_eq!(target_of(&model, Tcp::ACK), 2);
    }
}
