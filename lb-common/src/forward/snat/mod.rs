//! Packets whose both ends are rewritten: the target sees an address and a port of this machine, and
//! answers there.
//!
//! A listener with such targets tracks every flow: its packets have been through
//! [`select`](super::select).

mod port;

use bytemuck::{Pod, Zeroable};

use crate::flow::FlowKey;
use crate::snat::{SnatFlow, SnatReturn, Stamp};
use crate::tables::{Endpoint, EndpointKey, Tables, Target};
use crate::verdict::DropReason;
use crate::wire::checksum::Sum;
use crate::wire::{Address, Be16, Ipv4, Ipv6};

use super::ip::{ANY, Ip, V4, V6};
use super::parse::{Link, Packet, Ports, Transport, whole, whole_mut};
use super::select::serving;
use super::stage::conclude;
use super::{Frame, Next, Outcome, Selected, Step, Stop, emit};

pub use port::{open, search};

/// What a packet's ends become. Plain numbers that are always written, see [`Step`]; in this order, so
/// that no address lies beside its port and is copied with it, byte by byte.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Ends {
    source: Address,
    destination: Address,
    source_port: Be16,
    destination_port: Be16,
    /// Not 0 once the rest is known.
    is_known: u32,
}

impl Ends {
    #[inline(always)]
    fn unknown() -> Self {
        hidden_zeros!()
    }
}

/// A client's packet whose target has been chosen. That of a flow without a port goes on to [`search`].
#[inline(never)]
pub fn request<I: Readdress, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &mut Step,
) -> u64 {
    let mut ends = Ends::unknown();
    find_flow::<I, F, T>(frame, tables, step, &mut ends);
    if ends.is_known == 0 {
        return before_search::<I, F, T>(frame, tables, step);
    }
    send_request::<I, F, T>(frame, tables, step, &ends)
}

/// A flow without a port gets one, unless its packet dies on the way.
#[inline(never)]
fn before_search<I: Ip, F: Frame, T: Tables>(frame: &F, tables: &T, step: &Step) -> u64 {
    let Some(packet) = step.place.read::<I, F>(frame) else {
        return Next::with(Next::DROP, DropReason::Malformed as u32);
    };
    let Some(target) = serving(tables, step.selected.index) else {
        return Next::with(Next::ANSWER, DropReason::TargetDown as u32);
    };
    match can_leave(tables, target, &packet) {
        Ok(()) => Next::with(Next::SNAT_SEARCH, 0),
        Err(reason) => Next::with(Next::DROP, reason as u32),
    }
}

/// Finds the flow's source address and port, where it has them.
#[inline(never)]
fn find_flow<I: Ip, F: Frame, T: Tables>(frame: &F, tables: &T, step: &mut Step, ends: &mut Ends) {
    let Some((key, transport)) = step.place.flow::<I, F>(frame) else { return };
    let now = tables.now();
    if let Some(flow) = tables.snat_flow(&key)
        && flow.stamp.is_alive(now, key.protocol, flow.idle)
        // A SYN on a connection that is closing opens a new one, from another port: the target may
        // still know the old one.
        && !(transport.is_syn() && flow.stamp.state() == Stamp::CLOSING)
        && let Some(target) = serving(tables, flow.target)
        && renew(tables, &key, &flow, target, transport.flags, now)
    {
        step.selected.index = flow.target;
        lead(ends, target, flow.address, flow.port);
    }
}

#[inline(always)]
fn lead(ends: &mut Ends, target: &Target, address: Address, port: Be16) {
    *ends = Ends {
        source: address,
        destination: target.address,
        source_port: port,
        destination_port: target.port,
        is_known: 1,
    };
}

/// Writes the flow's time and state down where they changed, first for its target's packets: while
/// the flow lives, so does the entry that holds the port. `false` if that one is gone.
#[inline(always)]
fn renew<T: Tables>(
    tables: &T,
    key: &FlowKey,
    flow: &SnatFlow,
    target: &Target,
    flags: u8,
    now: u64,
) -> bool {
    let state = flow.stamp.after_request(flags, now);
    if state == flow.stamp.state() && !flow.stamp.is_stale(now) {
        return true;
    }
    let stamp = Stamp::new(now, state);
    let reply = FlowKey::of_replies(target, flow.address, flow.port, key.protocol);
    tables.stamp_snat_return(&reply, stamp) && tables.stamp_snat(key, stamp)
}

/// Whether a packet can go to the target, for all that is known.
#[inline(always)]
pub fn can_leave<I: Ip, T: Tables>(
    tables: &T,
    target: &Target,
    packet: &Packet<I>,
) -> Result<(), DropReason> {
    if target.hop.ifindex == 0 {
        tables.report_unresolved(target.address);
        return Err(DropReason::NextHopUnresolved);
    }
    if packet.length > target.hop.mtu as usize {
        return Err(DropReason::TooBig);
    }
    if I::hops(&packet.header) <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    Ok(())
}

#[inline(never)]
fn send_request<I: Readdress, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &mut Step,
    ends: &Ends,
) -> u64 {
    let outcome = write_request::<I, F, T>(frame, tables, step, ends);
    let place = step.place;
    conclude(step, outcome, place)
}

#[inline(always)]
fn write_request<I: Readdress, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &Step,
    ends: &Ends,
) -> Outcome {
    let link = Link::parse(frame).ok_or(DropReason::Malformed)?;
    let packet: Packet<I> = step.place.read(frame).ok_or(DropReason::Malformed)?;
    let transport = packet.transport.ok_or(DropReason::Malformed)?;
    let Selected { index, is_new, .. } = step.selected;
    let target = tables.target(index).ok_or(DropReason::TableInconsistent)?;
    can_leave(tables, target, &packet)?;
    translate(frame, &packet, &transport, ends)?;
    let verdict = emit::send(frame, &link, &target.hop)?;
    tables.count_request(step.recall.listener, index, packet.length as u64, is_new);
    Ok(verdict)
}

/// A packet to an address of this machine that flows to targets come from. One that belongs to none
/// of them is not ours: the stage before says whether it passes, or is dropped as no listener's.
#[inline(never)]
pub fn reply<I: Readdress, F: Frame, T: Tables>(frame: &mut F, tables: &T, step: &mut Step) -> u64 {
    let mut ends = Ends::unknown();
    let mut origin = Origin { listener: 0, target: 0 };
    find_client::<I, F, T>(frame, tables, &mut ends, &mut origin);
    if ends.is_known == 0 {
        return Next::with(step.argument, DropReason::NoListener as u32);
    }
    send_reply::<I, F, T>(frame, tables, step, &ends, &origin)
}

/// The listener and the target that a flow came by.
struct Origin {
    listener: u32,
    target: u32,
}

#[inline(never)]
fn find_client<I: Ip, F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    ends: &mut Ends,
    origin: &mut Origin,
) {
    let Some((_, packet)) = super::parse::<ANY, I, F>(frame) else { return };
    let Some(transport) = packet.transport else { return };
    let key = packet.flow(transport.ports);
    let own = super::lookup(tables, &EndpointKey::of_address(key.destination));
    let port = key.destination_port.get() as u32;
    if !own.has(Endpoint::SNAT) || port < own.listener || port > own.index {
        return;
    }
    let now = tables.now();
    let Some(back) = tables.snat_return(&key) else { return };
    if !back.stamp.is_alive(now, key.protocol, back.idle) {
        return;
    }
    let Some(listener) = tables.listener(back.listener) else { return };
    *origin = Origin { listener: back.listener, target: back.target };
    *ends = Ends {
        source: listener.address,
        destination: back.client,
        source_port: listener.port,
        destination_port: back.client_port,
        is_known: 1,
    };
    renew_return(tables, &key, &back, transport.flags, ends, now);
}

/// As [`renew`], for a packet of the target. A change of state is written for the client's packets
/// too, unless the client's port has begun another flow since.
#[inline(always)]
fn renew_return<T: Tables>(
    tables: &T,
    key: &FlowKey,
    back: &SnatReturn,
    flags: u8,
    ends: &Ends,
    now: u64,
) {
    let state = back.stamp.after_reply(flags, now);
    let is_changed = state != back.stamp.state();
    if !is_changed && !back.stamp.is_stale(now) {
        return;
    }
    let stamp = Stamp::new(now, state);
    tables.stamp_snat_return(key, stamp);
    if is_changed {
        stamp_request(tables, key, ends, stamp);
    }
}

#[inline(never)]
fn stamp_request<T: Tables>(tables: &T, reply: &FlowKey, ends: &Ends, stamp: Stamp) {
    let key = FlowKey {
        source: ends.destination,
        destination: ends.source,
        source_port: ends.destination_port,
        destination_port: ends.source_port,
        protocol: reply.protocol,
        zero: [0; 3],
    };
    if let Some(flow) = tables.snat_flow(&key)
        && flow.port == reply.destination_port
        && flow.address == reply.destination
    {
        tables.stamp_snat(&key, stamp);
    }
}

#[inline(never)]
fn send_reply<I: Readdress, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &mut Step,
    ends: &Ends,
    origin: &Origin,
) -> u64 {
    let outcome = write_reply::<I, F, T>(frame, tables, step, ends, origin);
    let place = step.place;
    conclude(step, outcome, place)
}

#[inline(always)]
fn write_reply<I: Readdress, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &mut Step,
    ends: &Ends,
    origin: &Origin,
) -> Outcome {
    let Some(hop) = tables.route(frame.ingress(), ends.source, ends.destination) else {
        return Err(DropReason::NextHopUnresolved.into());
    };
    let (link, packet) = super::parse::<ANY, I, F>(frame).ok_or(DropReason::Malformed)?;
    let transport = packet.transport.ok_or(DropReason::Malformed)?;
    // Before lengths are looked at: the UDP header of a first fragment has the whole's.
    if packet.is_fragment() {
        return Err(DropReason::Fragmented.into());
    }
    if transport.is_malformed(whole(frame), &packet) {
        return Err(DropReason::Malformed.into());
    }
    if packet.length > hop.mtu as usize {
        step.mtu = hop.mtu as u64;
        return Err(Stop::TooBig);
    }
    if I::hops(&packet.header) <= 1 {
        return Err(DropReason::TtlExceeded.into());
    }
    let frame = whole_mut(frame);
    translate(frame, &packet, &transport, ends)?;
    let verdict = emit::send(frame, &link, hop)?;
    tables.count_reply(origin.listener, origin.target, packet.length as u64);
    Ok(verdict)
}

/// Gives the packet both its ends, and takes a hop off its life, of which it has two at least.
#[inline(always)]
fn translate<I: Readdress, F: Frame>(
    frame: &mut F,
    packet: &Packet<I>,
    transport: &Transport,
    ends: &Ends,
) -> Result<(), DropReason> {
    let ports = Ports { source: ends.source_port, destination: ends.destination_port };
    I::readdress(frame, packet.l3, &packet.header, ends.source, ends.destination)?;
    let sum = Sum::of(transport.checksum)
        .replace16(transport.ports.source, ports.source)
        .replace16(transport.ports.destination, ports.destination);
    let sum = I::replace_address(sum, packet.source, ends.source);
    let sum = I::replace_address(sum, packet.destination, ends.destination);
    emit::write_transport(frame, packet, transport, ports, sum)
}

/// Writing both addresses of an IP header at once.
pub trait Readdress: Ip {
    /// Writes both, and decrements TTL or hop limit.
    fn readdress<F: Frame>(
        frame: &mut F,
        l3: usize,
        header: &Self::Header,
        source: Address,
        destination: Address,
    ) -> Result<(), DropReason>;
}

impl Readdress for V4 {
    #[inline(always)]
    fn readdress<F: Frame>(
        frame: &mut F,
        l3: usize,
        header: &Ipv4,
        source: Address,
        destination: Address,
    ) -> Result<(), DropReason> {
        let (source, destination) = (source.low32(), destination.low32());
        let mut ttl = header.ttl;
        ttl.ttl = ttl.ttl.wrapping_sub(1);
        ttl.checksum = Sum::of(ttl.checksum)
            .decrement_upper()
            .replace32(header.source, source)
            .replace32(header.destination, destination)
            .checksum();
        frame.write(l3 + Ipv4::TTL_AT, ttl).ok_or(DropReason::Malformed)?;
        frame.write(l3 + Ipv4::SOURCE_AT, source).ok_or(DropReason::Malformed)?;
        frame.write(l3 + Ipv4::DESTINATION_AT, destination).ok_or(DropReason::Malformed)
    }
}

impl Readdress for V6 {
    #[inline(always)]
    fn readdress<F: Frame>(
        frame: &mut F,
        l3: usize,
        header: &Ipv6,
        source: Address,
        destination: Address,
    ) -> Result<(), DropReason> {
        let hop_limit = header.hop_limit.wrapping_sub(1);
        frame.write(l3 + Ipv6::HOP_LIMIT_AT, hop_limit).ok_or(DropReason::Malformed)?;
        frame.write(l3 + Ipv6::SOURCE_AT, source.quarters()).ok_or(DropReason::Malformed)?;
        let destination = destination.quarters();
        frame.write(l3 + Ipv6::DESTINATION_AT, destination).ok_or(DropReason::Malformed)
    }
}
