//! An ICMP error about a flow that is balanced: from the network about a target's packet, which the
//! target is to hear of; or from behind us about a client's, which the client is to hear of.
//!
//! An error belongs to a flow if the packet that it quotes does, and goes to where that came from. As
//! with IPVS and Linux's NAT, both the error and what it quotes are translated, so that nobody hears
//! from an address that means nothing to them (RFC 5508 section 4). An error remembers nothing and keeps
//! nothing alive: its sender may have made it up.

mod rewrite;

use bytemuck::{Pod, Zeroable};

use crate::flow::{self, FlowKey, FlowTable, MAX_IDLE, ReturnTable, TCP};
use crate::tables::{Endpoint, EndpointKey, NO_LISTENER, NO_RING, Tables, Target};
use crate::verdict::{DropReason, Verdict};
use crate::wire::icmp::Icmp;
use crate::wire::{Address, Be16, Udp};

use super::decide::{self, Kind};
use super::ip::{ANY, Ip, MAX_HEADERS, Parsed};
use super::parse::{Link, Packet, Ports, whole, whole_mut};
use super::select::{self, is_exception, serving, without_target};
use super::snat::can_leave;
use super::stage::conclude;
use super::{Frame, Next, Outcome, Recall, Step, Stop, emit};

pub use rewrite::Quoting;

/// What the error quotes, and what becomes of both.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Quote {
    /// Offset of the quoted packet's IP header.
    l3: u32,
    /// Offset of its transport header.
    l4: u32,
    /// The error's source and destination.
    outer: [Address; 2],
    /// Those of the quoted packet.
    inner: [Address; 2],
    /// Both ports of the quoted packet.
    ports: Ports,
    zero: u32,
}

impl Quote {
    #[inline(always)]
    fn set_source(&mut self, address: Address, port: Be16) {
        (self.inner[0], self.ports.source) = (address, port);
    }

    #[inline(always)]
    fn set_destination(&mut self, address: Address, port: Be16) {
        (self.inner[1], self.ports.destination) = (address, port);
    }
}

/// Sends an error to whom it is for. One that is about none of our flows passes.
#[inline(always)]
pub fn handle<I: Quoting, F: Frame, T: Tables>(frame: &mut F, tables: &T, step: &mut Step) -> u64 {
    let pass = Next::with(Next::PASS, 0);
    if examine::<I, F>(frame, step) == NOTHING {
        return pass;
    }
    let dropped = choose(tables, step);
    if dropped == OURS {
        return to_target::<I, F, T>(frame, tables, step);
    }
    if dropped != NOTHING {
        return Next::with(Next::DROP, dropped - FIRST_REASON);
    }
    if find_client(tables, step) == NOTHING {
        return pass;
    }
    to_client::<I, F, T>(frame, tables, step)
}

/// It belongs to no flow that we know.
const NOTHING: u32 = 0;
/// It does.
const OURS: u32 = 1;
/// It does, and dies: the number of the reason comes on top.
const FIRST_REASON: u32 = 2;

#[inline(always)]
fn because(reason: DropReason) -> u32 {
    FIRST_REASON + reason as u32
}

/// Leaves where the quoted packet is, and the flow as packets show it that answer it.
#[inline(never)]
fn examine<I: Ip, F: Frame>(frame: &F, step: &mut Step) -> u32 {
    if look_at::<I, F>(whole(frame), step).is_some() { OURS } else { NOTHING }
}

#[inline(always)]
fn look_at<I: Ip, F: Frame>(frame: &F, step: &mut Step) -> Option<()> {
    let packet: Packet<I> = step.place.read(frame)?;
    let l3 = packet.l4 + size_of::<Icmp>();
    let quoted: Parsed<I::Header> = I::parse::<ANY, F>(frame, l3)?;
    let ports: Ports = whole(frame).read(quoted.l4 & MAX_HEADERS as usize)?;
    let (source, destination) = I::addresses(&quoted.header);
    let end = packet.l3 + packet.length;
    // RFC 792: at least eight bytes of what follows the IP header are there.
    let is_there = quoted.l4 + size_of::<Udp>() <= end && end <= frame.len();
    if !is_there || !quoted.is_first || source != packet.destination {
        return None;
    }
    step.recall.key = FlowKey {
        source: destination,
        destination: source,
        source_port: ports.destination,
        destination_port: ports.source,
        protocol: quoted.protocol,
        zero: [0; 3],
    };
    (step.quote.l3, step.quote.l4) = (l3 as u32, quoted.l4 as u32);
    step.quote.outer = [packet.source, packet.destination];
    Some(())
}

/// Leaves the target whose packet to a listener's client is quoted, by way of what that client's
/// next packet would find.
#[inline(never)]
fn choose<T: Tables>(tables: &T, step: &mut Step) -> u32 {
    let key = &step.recall.key;
    let endpoint = EndpointKey::new(key.destination, key.destination_port, key.protocol);
    let listener = super::lookup(tables, &endpoint);
    if listener.kind() != Endpoint::LISTENER {
        return NOTHING;
    }
    if listener.index == NO_RING {
        return because(DropReason::NoTarget);
    }
    let hash = select::hash(tables, key, &listener);
    let chosen = flow::slot(hash, tables.ring_size());
    let Ok(slot) = select::slot(tables, listener.index, chosen) else {
        return because(DropReason::TableInconsistent);
    };
    step.recall.slot = slot;
    step.recall.listener = listener.listener;
    step.recall.is_tracked = listener.has(Endpoint::TRACKED) as u32;
    step.selected.hash = hash as u32;
    step.selected.is_new = 0;
    step.selected.index = known_target(tables, &step.recall, hash as u32);
    OURS
}

/// The target of a flow as its next packet would find it.
#[inline(never)]
fn known_target<T: Tables>(tables: &T, recall: &Recall, hash: u32) -> u32 {
    let is_tracked = recall.is_tracked != 0;
    let is_plain =
        recall.slot.is_settled() || (recall.slot.is_mapped() && !is_exception(tables, hash));
    if is_tracked || !is_plain {
        let idle = tables.listener(recall.listener).map_or(0, |listener| listener.idle);
        let now = tables.now();
        for table in FlowTable::ALL {
            if let Some(flow) = tables.flow(table, &recall.key)
                && flow.is_alive(now, idle)
            {
                return flow.target;
            }
        }
    }
    let kind = if recall.key.protocol == TCP { Kind::Amid } else { Kind::Datagram };
    decide::choice(recall.slot, kind)
}

#[inline(never)]
fn to_target<I: Quoting, F: Frame, T: Tables>(frame: &mut F, tables: &T, step: &mut Step) -> u64 {
    let outcome = send_to_target::<I, F, T>(frame, tables, step);
    let place = step.place;
    conclude(step, outcome, place)
}

#[inline(always)]
fn send_to_target<I: Quoting, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &mut Step,
) -> Outcome {
    let index = step.selected.index;
    let Some(target) = serving(tables, index) else { return Err(without_target(index).into()) };
    let (is_snat, is_nat) = (target.mode == Target::SNAT, target.mode == Target::NAT);
    if is_snat && find_source(tables, step, target) == NOTHING {
        return Ok(Verdict::Pass);
    }
    if is_nat {
        lead(step, target);
    }
    let link = Link::parse(whole(frame)).ok_or(DropReason::Malformed)?;
    let packet: Packet<I> = step.place.read(frame).ok_or(DropReason::Malformed)?;
    can_leave(tables, target, &packet)?;
    if target.is_tunnelled() {
        return Err(Stop::Encapsulate);
    }
    if is_nat || is_snat {
        rewrite::both::<I, F>(frame, step)?;
    }
    let verdict = emit::send(whole_mut(frame), &link, &target.hop)?;
    tables.count_request(step.recall.listener, index, packet.length as u64, 0);
    Ok(verdict)
}

/// The quoted packet as a target sent it that sees its clients' addresses.
#[inline(always)]
fn lead(step: &mut Step, target: &Target) {
    let key = &step.recall.key;
    step.quote.outer[1] = target.address;
    step.quote.set_source(target.address, target.port);
    step.quote.set_destination(key.source, key.source_port);
}

/// The same for a target that sees one of our addresses, with a port for each flow.
#[inline(never)]
fn find_source<T: Tables>(tables: &T, step: &mut Step, target: &Target) -> u32 {
    let key = &step.recall.key;
    let Some(flow) = tables.snat_flow(key) else { return NOTHING };
    let is_alive = flow.stamp.is_alive(tables.now(), key.protocol, flow.idle);
    if !is_alive || flow.target != step.selected.index {
        return NOTHING;
    }
    step.quote.outer[0] = flow.address;
    step.quote.outer[1] = target.address;
    step.quote.set_source(target.address, target.port);
    step.quote.set_destination(flow.address, flow.port);
    OURS
}

/// Leaves the client whose packet to a target is quoted, and the listener that it came by.
#[inline(never)]
fn find_client<T: Tables>(tables: &T, step: &mut Step) -> u32 {
    let key = &step.recall.key;
    let kind = super::kind_of_address(tables, key.destination.words());
    if kind & Endpoint::SNAT != 0 {
        return find_snat_client(tables, step);
    }
    let endpoint = EndpointKey::new(key.source, key.source_port, key.protocol);
    let target = super::lookup(tables, &endpoint);
    if kind != 0 || target.kind() != Endpoint::TARGET {
        return NOTHING;
    }
    step.recall.listener = target.listener;
    step.selected.index = target.index;
    if target.has(Endpoint::SHARED) {
        look_up_origin(tables, step);
    }
    let Some(registered) = tables.target(target.index) else { return NOTHING };
    let key = &step.recall.key;
    if tables.has_direct_flows(target.index, registered) && tables.is_direct_flow(key) {
        return NOTHING;
    }
    let client = (key.destination, key.destination_port);
    step.quote.set_source(client.0, client.1);
    lead_to_listener(tables, step)
}

/// The listener's address for the target's, in the quoted packet; and in the error for whoever sent
/// it: the target itself, or a router on the way there.
#[inline(always)]
fn lead_to_listener<T: Tables>(tables: &T, step: &mut Step) -> u32 {
    if step.recall.listener == NO_LISTENER {
        return NOTHING;
    }
    let Some(listener) = tables.listener(step.recall.listener) else { return NOTHING };
    step.quote.outer[0] = listener.address;
    step.quote.set_destination(listener.address, listener.port);
    OURS
}

/// Of a target that several listeners share, the flow knows.
#[inline(never)]
fn look_up_origin<T: Tables>(tables: &T, step: &mut Step) -> u32 {
    let now = tables.now();
    for table in ReturnTable::ALL {
        let Some(flow) = tables.return_flow(table, &step.recall.key) else { continue };
        if flow.is_alive(now, MAX_IDLE) {
            step.recall.listener = flow.listener;
            step.selected.index = flow.target;
        }
        break;
    }
    0
}

/// The client that has a port of one of our addresses.
#[inline(never)]
fn find_snat_client<T: Tables>(tables: &T, step: &mut Step) -> u32 {
    let Some(back) = tables.snat_return(&step.recall.key) else { return NOTHING };
    if !back.stamp.is_alive(tables.now(), step.recall.key.protocol, back.idle) {
        return NOTHING;
    }
    step.recall.listener = back.listener;
    step.selected.index = back.target;
    step.quote.outer[1] = back.client;
    step.quote.set_source(back.client, back.client_port);
    lead_to_listener(tables, step)
}

#[inline(never)]
fn to_client<I: Quoting, F: Frame, T: Tables>(frame: &mut F, tables: &T, step: &mut Step) -> u64 {
    let outcome = send_to_client::<I, F, T>(frame, tables, step);
    let place = step.place;
    conclude(step, outcome, place)
}

#[inline(always)]
fn send_to_client<I: Quoting, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &mut Step,
) -> Outcome {
    let [source, destination] = step.quote.outer;
    let Some(hop) = tables.route(frame.ingress(), source, destination) else {
        return Err(DropReason::NextHopUnresolved.into());
    };
    let link = Link::parse(whole(frame)).ok_or(DropReason::Malformed)?;
    let packet: Packet<I> = step.place.read(frame).ok_or(DropReason::Malformed)?;
    if packet.length > hop.mtu as usize {
        return Err(DropReason::TooBig.into());
    }
    if I::hops(&packet.header) <= 1 {
        return Err(DropReason::TtlExceeded.into());
    }
    rewrite::both::<I, F>(frame, step)?;
    let verdict = emit::send(whole_mut(frame), &link, hop)?;
    let (listener, target) = (step.recall.listener, step.selected.index);
    tables.count_reply(listener, target, packet.length as u64);
    Ok(verdict)
}

#[cfg(test)]
mod tests;
