//! The way of a packet: parse -> classify -> admit -> select -> rewrite -> emit.
//!
//! Everything here runs in the kernel: a header is copied out at an offset that the verifier can
//! bound, nothing is indexed by packet data, nothing panics, and nothing is written before it is
//! certain that the packet is ours.

mod emit;
mod ip;
mod parse;
mod reject;
mod reply;
mod request;
mod select;
mod snat;

use bytemuck::{Pod, Zeroable};

use crate::flow::{TCP, UDP};
use crate::tables::{Endpoint, EndpointKey, OPEN, Slot, Tables};
use crate::verdict::{DropReason, Verdict};
use crate::wire::icmp::Icmp;
use crate::wire::{Address, Be16, EtherType};

use ip::{ANY, Ip, PLAIN, V4, V6};
use parse::{Link, Packet, Place};
use reject::Answer;
use snat::Readdress;

/// The bytes of a packet. Every access checks its bounds.
pub trait Frame {
    /// Copies a header out; `None` beyond the packet's end.
    fn read<H: Pod>(&self, at: usize) -> Option<H>;
    /// Writes a header; `None`, and nothing written, beyond the packet's end.
    fn write<H: Pod>(&mut self, at: usize, header: H) -> Option<()>;
    /// Writes a header, and another one `GAP` bytes after the first one's beginning; `None`, and
    /// nothing written, if either is beyond the packet's end.
    fn write_pair<const GAP: usize, A: Pod, B: Pod>(
        &mut self,
        at: usize,
        first: A,
        second: B,
    ) -> Option<()>;
    /// Length, bytes.
    fn len(&self) -> usize;
    /// Whether there is no byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Index of the NIC it came in by.
    fn ingress(&self) -> u32;
    /// Adds bytes of unspecified content at the front (`by` > 0), or takes them away. `None`, and
    /// nothing changed, if there is no room.
    fn grow_front(&mut self, by: i32) -> Option<()>;
    /// Cuts the packet to a length, bytes. `None` if it is shorter.
    fn truncate(&mut self, length: usize) -> Option<()>;
}

/// What the pipeline says: a verdict, or why there is none yet.
type Outcome = Result<Verdict, Stop>;

/// Why a packet goes no further on the straight way.
enum Stop {
    /// It dies, for a reason yet to be counted.
    Drop(DropReason),
    /// It is refused so that the client hears of it, and counted.
    Answer(DropReason),
    /// Its target is a matter of what is remembered of its flow: [`Step::recall`].
    Recall,
    /// It may be a reply to an address that flows to targets come from; else it ends with this
    /// action of [`Next`].
    Snat(u32),
}

impl From<DropReason> for Stop {
    #[inline(always)]
    fn from(reason: DropReason) -> Self {
        Self::Drop(reason)
    }
}

/// Decides what happens to a packet, rewrites it accordingly, and counts it.
///
/// The stages are functions of their own in the kernel too, called one after the other, each with
/// the whole stack (512 bytes) to itself: what a packet does not need costs it nothing, and
/// reading the headers again in a later stage is cheaper than keeping them in memory for it.
#[inline(always)]
pub fn forward<F: Frame, T: Tables>(frame: &mut F, tables: &T) -> Verdict {
    let Some(link) = Link::parse(frame) else { return Verdict::Pass };
    match link.ether_type {
        EtherType::IPV4 => forward_ip::<V4, F, T>(frame, tables, &link),
        EtherType::IPV6 => forward_ip::<V6, F, T>(frame, tables, &link),
        _ => Verdict::Pass,
    }
}

/// The stages. The first two are compiled twice: most packets are plain, and with constant offsets
/// they cost a third less.
#[inline(always)]
fn forward_ip<I: Answer + Readdress, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    link: &Link,
) -> Verdict {
    let mut step = Step::new();
    let is_plain = link.tags == 0 && I::is_plain(frame);
    let mut next = Next::from(if is_plain {
        to_listener::<PLAIN, I, F, T>(frame, tables, &mut step)
    } else {
        to_listener::<ANY, I, F, T>(frame, tables, &mut step)
    });
    if next.action == Next::RECALL {
        next = Next::from(select::recall::<I, F, T>(frame, tables, &mut step));
        if next.action == Next::DELIVER {
            next = Next::from(deliver::<I, F, T>(frame, tables, &mut step));
        } else if next.action == Next::SNAT {
            next = Next::from(snat::request::<I, F, T>(frame, tables, &mut step));
        }
    } else if next.action == Next::UNDECIDED {
        next = Next::from(if is_plain {
            from_elsewhere::<PLAIN, I, F, T>(frame, tables, &mut step)
        } else {
            from_elsewhere::<ANY, I, F, T>(frame, tables, &mut step)
        });
        if next.action == Next::SNAT {
            next = Next::from(snat::reply::<I, F, T>(frame, tables, &mut step, next.argument));
        }
    }
    match next.action {
        Next::TRANSMIT => Verdict::Transmit,
        Next::REDIRECT => Verdict::Redirect(next.argument),
        Next::DROP => {
            tables.count_drop(next.argument);
            Verdict::Drop
        }
        Next::ANSWER => reject::answer::<I, F, T>(frame, tables, &step.place, next.argument),
        _ => Verdict::Pass,
    }
}

/// How a stage ended: what is to be done next. A stage returns it as one number, which stays in a
/// register.
#[derive(Clone, Copy)]
struct Next {
    action: u32,
    /// By action: an interface, a [`DropReason`], another action.
    argument: u32,
}

impl Next {
    const UNDECIDED: u32 = 0;
    const PASS: u32 = 1;
    const TRANSMIT: u32 = 2;
    const REDIRECT: u32 = 3;
    const DROP: u32 = 4;
    const ANSWER: u32 = 5;
    const RECALL: u32 = 6;
    const DELIVER: u32 = 7;
    const SNAT: u32 = 8;

    #[inline(always)]
    fn with(action: u32, argument: u32) -> u64 {
        (argument as u64) << 32 | action as u64
    }
}

impl From<u64> for Next {
    /// Hidden from the verifier, which would else follow every reason to drop a packet on its own.
    #[inline(always)]
    fn from(next: u64) -> Self {
        let hidden = |half: u64| core::hint::black_box(half as u32);
        Self { action: hidden(next), argument: hidden(next >> 32) }
    }
}

/// What one stage leaves to the next, in memory. Plain numbers that are always written: an enum
/// leaves bytes unset that the compiler copies all the same, and the verifier refuses.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Step {
    recall: Recall,
    place: Place,
    selected: Selected,
}

/// What is asked of the flow table.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Recall {
    /// The slot that the hash chose.
    slot: Slot,
    /// Its number in the ring.
    chosen: u32,
    /// The ring.
    ring: u32,
    /// Index of the listener.
    listener: u32,
    /// Not 0 if the listener tracks every flow.
    is_tracked: u32,
}

/// A flow's target.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Selected {
    /// Its index.
    index: u32,
    /// Not 0 for a flow that is new, as far as can be told.
    is_new: u32,
}

impl Step {
    /// Nothing is known yet. The zero is hidden from the compiler: it would make one call of all
    /// the stores, to a function that clears the bytes one by one.
    #[inline(always)]
    fn new() -> Self {
        bytemuck::cast([core::hint::black_box(0_u64); size_of::<Self>() / 8])
    }

    /// Takes down how a stage ended.
    #[inline(always)]
    fn conclude(&mut self, outcome: Outcome, place: Place) -> u64 {
        match outcome {
            Ok(Verdict::Pass | Verdict::Drop) => Next::with(Next::PASS, 0),
            Ok(Verdict::Transmit) => Next::with(Next::TRANSMIT, 0),
            Ok(Verdict::Redirect(ifindex)) => Next::with(Next::REDIRECT, ifindex),
            Err(Stop::Drop(reason)) => Next::with(Next::DROP, reason as u32),
            Err(Stop::Answer(reason)) => {
                self.place = place;
                Next::with(Next::ANSWER, reason as u32)
            }
            Err(Stop::Recall) => {
                self.place = place;
                Next::with(Next::RECALL, 0)
            }
            Err(Stop::Snat(otherwise)) => Next::with(Next::SNAT, otherwise),
        }
    }
}

/// Whose packet is it? A listener's is decided here, with a target by the hash alone. Nothing is
/// written before all is certain: what is not ours passes untouched.
#[inline(never)]
fn to_listener<const SHAPE: bool, I: Answer, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &mut Step,
) -> u64 {
    let Some((link, packet)) = parse::<SHAPE, I, F>(frame) else {
        return Next::with(Next::PASS, 0);
    };
    let outcome = match &packet.transport {
        _ if packet.protocol == I::ICMP => guard(frame, tables, &packet),
        None => without_ports(tables, &packet),
        Some(transport) => {
            let port = transport.ports.destination;
            let key = EndpointKey::new(packet.destination, port, packet.protocol);
            let endpoint = lookup(tables, &key);
            match endpoint.kind() {
                Endpoint::LISTENER => {
                    request::handle(frame, tables, &link, &packet, transport, &endpoint, step)
                }
                Endpoint::TARGET => {
                    reply::note_direct::<I, F, T>(frame, tables, &packet.place(), endpoint.index);
                    Ok(Verdict::Pass)
                }
                _ => return Next::with(Next::UNDECIDED, 0),
            }
        }
    };
    step.conclude(outcome, packet.place())
}

/// Sends a packet to the target that was recalled for it.
#[inline(never)]
fn deliver<I: Answer, F: Frame, T: Tables>(frame: &mut F, tables: &T, step: &mut Step) -> u64 {
    let pass = Next::with(Next::PASS, 0);
    let Some(link) = Link::parse(frame) else { return pass };
    let Some(packet) = step.place.read::<I, F>(frame) else { return pass };
    let Some(transport) = &packet.transport else { return pass };
    let (selected, listener) = (step.selected, step.recall.listener);
    let outcome = request::deliver(frame, tables, &link, &packet, transport, listener, selected);
    step.conclude(outcome, packet.place())
}

/// A target's reply, or a packet that is none of ours.
#[inline(never)]
fn from_elsewhere<const SHAPE: bool, I: Answer, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &mut Step,
) -> u64 {
    let pass = Next::with(Next::PASS, 0);
    let Some((link, packet)) = parse::<SHAPE, I, F>(frame) else { return pass };
    let Some(transport) = &packet.transport else { return pass };
    let port = transport.ports.source;
    let endpoint = lookup(tables, &EndpointKey::new(packet.source, port, packet.protocol));
    let outcome = if endpoint.kind() == Endpoint::TARGET {
        reply::handle(frame, tables, &link, &packet, transport, &endpoint)
    } else {
        of_nobody(tables, &packet)
    };
    step.conclude(outcome, packet.place())
}

/// A packet from no target and to no listener.
#[inline(always)]
fn of_nobody<I: Ip, T: Tables>(tables: &T, packet: &Packet<I>) -> Outcome {
    let kind = kind_of_address(tables, packet.destination.words());
    let is_owned = kind & Endpoint::KIND == Endpoint::OWNED;
    if kind & Endpoint::SNAT != 0 {
        return Err(Stop::Snat(if is_owned { Next::DROP } else { Next::PASS }));
    }
    if is_owned { Err(DropReason::NoListener.into()) } else { Ok(Verdict::Pass) }
}

#[inline(always)]
fn parse<const SHAPE: bool, I: Ip, F: Frame>(frame: &F) -> Option<(Link, Packet<I>)> {
    let link = if SHAPE == PLAIN { Link::untagged::<I>() } else { Link::parse(frame)? };
    let packet = Packet::parse::<SHAPE, F>(frame, &link)?;
    Some((link, packet))
}

/// A packet without ports: a later fragment, a truncated header, another protocol.
#[inline(always)]
fn without_ports<I: Ip, T: Tables>(tables: &T, packet: &Packet<I>) -> Outcome {
    let balanced = packet.protocol == TCP || packet.protocol == UDP;
    if balanced && is_owned(tables, packet) {
        let is_fragment = packet.is_fragment();
        return Err(if is_fragment { DropReason::Fragmented } else { DropReason::Malformed }.into());
    }
    Ok(Verdict::Pass)
}

/// Whether the agent itself added the destination address to this machine: ports without a
/// listener must not show the machine's own services there.
#[inline(always)]
fn is_owned<I: Ip, T: Tables>(tables: &T, packet: &Packet<I>) -> bool {
    kind_of_address(tables, packet.destination.words()) & Endpoint::KIND == Endpoint::OWNED
}

/// What the address is, with its flags: 0 if it is none of this machine's. A function of its own in
/// the kernel too, with stack of its own.
#[inline(never)]
fn kind_of_address<T: Tables>(tables: &T, [high, low]: [u64; 2]) -> u8 {
    let found = lookup(tables, &EndpointKey::of_address(Address::from_words([high, low])));
    found.kind as u8 & (Endpoint::KIND | Endpoint::SNAT)
}

/// Echo requests to an address with security groups need a rule; errors and neighbour discovery
/// always pass.
#[inline(always)]
fn guard<I: Ip, F: Frame, T: Tables>(frame: &F, tables: &T, packet: &Packet<I>) -> Outcome {
    let Some(icmp) = frame.read::<Icmp>(packet.l4) else { return Ok(Verdict::Pass) };
    if packet.is_fragment() || icmp.kind != I::ECHO_REQUEST {
        return Ok(Verdict::Pass);
    }
    let key = EndpointKey::new(packet.destination, Default::default(), packet.protocol);
    let endpoint = lookup(tables, &key);
    if endpoint.kind() == Endpoint::GUARD {
        admit(tables, packet, &endpoint)?;
    }
    Ok(Verdict::Pass)
}

/// The security groups: a listener without one costs nothing.
#[inline(always)]
fn admit<I: Ip, T: Tables>(
    tables: &T,
    packet: &Packet<I>,
    endpoint: &Found,
) -> Result<(), DropReason> {
    let admitted = endpoint.class == OPEN || tables.admits(endpoint.class, packet.source);
    if admitted { Ok(()) } else { Err(DropReason::SecurityGroupDenied) }
}

/// What an endpoint's key leads to: the second half of an [`Endpoint`].
#[derive(Clone, Copy)]
struct Found {
    kind: u32,
    listener: u32,
    index: u32,
    class: u32,
}

impl Found {
    /// An `Option` would have the compiler look into what is not there, which the verifier refuses.
    const NOTHING: Self = Self { kind: 0, listener: 0, index: 0, class: 0 };

    #[inline(always)]
    fn new(endpoint: &Endpoint) -> Self {
        let Endpoint { kind, listener, index, class, .. } = *endpoint;
        Self { kind: kind as u32, listener, index, class }
    }

    #[inline(always)]
    fn kind(&self) -> u8 {
        self.kind as u8 & Endpoint::KIND
    }

    #[inline(always)]
    fn has(&self, flag: u8) -> bool {
        self.kind & flag as u32 != 0
    }
}

/// Finds an endpoint in its bucket, and beyond it only if the bucket says so.
#[inline(always)]
fn lookup<T: Tables>(tables: &T, key: &EndpointKey) -> Found {
    let Some(bucket) = tables.bucket(key.bucket(tables.keys())) else { return Found::NOTHING };
    let [first, second] = &bucket.endpoints;
    if matches(first, key) {
        return Found::new(first);
    }
    if matches(second, key) {
        return Found::new(second);
    }
    if first.kind & Endpoint::OVERFLOW == 0 {
        return Found::NOTHING;
    }
    let mut found = Found::NOTHING;
    let ([high, low], port) = (key.address.words(), key.port.raw() as u32);
    look_up_overflow(tables, high, low, port << 8 | key.protocol as u32, &mut found);
    found
}

/// A function of its own in the kernel too, with stack of its own; the key in registers.
#[inline(never)]
fn look_up_overflow<T: Tables>(
    tables: &T,
    high: u64,
    low: u64,
    port_protocol: u32,
    found: &mut Found,
) {
    let address = Address::from_words([high, low]);
    let port = Be16::from_raw((port_protocol >> 8) as u16);
    if let Some(endpoint) = tables.overflow(&EndpointKey::new(address, port, port_protocol as u8)) {
        *found = Found::new(&endpoint);
    }
}

#[inline(always)]
fn matches(endpoint: &Endpoint, key: &EndpointKey) -> bool {
    endpoint.address == key.address
        && endpoint.port == key.port
        && endpoint.protocol == key.protocol
        && endpoint.kind() != 0
}
