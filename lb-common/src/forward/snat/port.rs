//! A port for each flow: looked for in the bitmap of its address, made its own by an entry in the
//! table of flows.

use bytemuck::{Pod, Zeroable};

use crate::flow::FlowKey;
use crate::snat::{Entered, MAX_SNAT_ADDRESSES, NO_PORT, SnatFlow, SnatReturn, Stamp};
use crate::tables::{Tables, Target};
use crate::verdict::DropReason;
use crate::wire::Be16;

use super::super::decide::{self, Kind};
use super::super::ip::Ip;
use super::super::parse::Place;
use super::super::select::serving;
use super::super::{Frame, Next, Selected, Step};
use super::{Ends, Readdress, lead, send_request};

/// Looks for a port for a new flow. Needs nothing of the packet, so that the verifier follows the
/// search once and not for every shape of packet.
#[inline(never)]
pub fn search<T: Tables>(tables: &T, step: &Step) -> u64 {
    let attempt = Attempt::read(step.argument);
    let mut port = NO_PORT as u16;
    let sources = free_port(tables, step, attempt, &mut port);
    let number = attempt.number.wrapping_add(1);
    if port as u32 == NO_PORT && !number.is_multiple_of(sources) {
        return Next::with(Next::SNAT_SEARCH, Attempt { number, port: 0 }.argument());
    }
    Next::with(Next::SNAT_OPEN, Attempt { number: attempt.number, port: port as u32 }.argument())
}

/// An attempt to get a port: first of the address that the flow's hash says, then of the others.
#[derive(Clone, Copy)]
struct Attempt {
    /// Counts addresses, and how often another CPU was quicker: a round of all addresses each time.
    number: u32,
    /// The port that was found, or [`NO_PORT`].
    port: u32,
}

impl Attempt {
    /// How often another CPU may be quicker before the packet is refused.
    const ROUNDS: u32 = 4;

    #[inline(always)]
    fn read(argument: u32) -> Self {
        Self { number: argument >> 16, port: argument & 0xffff }
    }

    #[inline(always)]
    fn argument(self) -> u32 {
        self.number << 16 | self.port
    }

    /// The same address again.
    #[inline(always)]
    fn again(self, sources: u32) -> Self {
        Self { number: self.number.wrapping_add(sources), port: NO_PORT }
    }

    /// Index of the address tried.
    #[inline(always)]
    fn source(self, selected: &Selected, sources: u32) -> u32 {
        let source = selected.hash.wrapping_add(self.number) % sources;
        selected.index.wrapping_mul(MAX_SNAT_ADDRESSES).wrapping_add(source)
    }
}

/// How many addresses there are to take ports of; 1 at least.
#[inline(always)]
fn sources(target: &Target) -> u32 {
    let sources = target.sources();
    if sources == 0 { 1 } else { sources }
}

/// Leaves a free port; returns how many addresses there are. The port in a half word, which the
/// verifier does not track: it would follow each of the many ways to one to the end.
#[inline(never)]
fn free_port<T: Tables>(tables: &T, step: &Step, attempt: Attempt, port: &mut u16) -> u32 {
    let Some(target) = tables.target(step.selected.index) else { return 1 };
    let sources = sources(target);
    if let Some(source) = tables.source(attempt.source(&step.selected, sources))
        && let Some(pool) = tables.pool(source.pool)
    {
        *port = pool.find::<T::Atomics>(source.first as u32, source.last as u32) as u16;
    }
    sources
}

/// The first packet of a flow: it gets the port that was found, unless another CPU was quicker.
#[inline(never)]
pub fn open<I: Readdress, F: Frame, T: Tables>(frame: &mut F, tables: &T, step: &mut Step) -> u64 {
    let mut ends = Ends::unknown();
    let otherwise = take_port::<I, F, T>(frame, tables, step, &mut ends);
    if ends.is_known == 0 {
        return otherwise;
    }
    send_request::<I, F, T>(frame, tables, step, &ends)
}

/// Takes the port for the flow; if that cannot be: what is to be done.
#[inline(never)]
fn take_port<I: Ip, F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    step: &Step,
    ends: &mut Ends,
) -> u64 {
    let malformed = Next::with(Next::DROP, DropReason::Malformed as u32);
    let mut asked = Asked::nothing();
    if ask::<I, F>(frame, &step.place, &mut asked) == 0 {
        return malformed;
    }
    let Some(target) = serving(tables, step.selected.index) else {
        return Next::with(Next::ANSWER, DropReason::TargetDown as u32);
    };
    let entered = enter(tables, &asked, step, target, ends);
    if entered == Entered::New as u32 {
        return Next::with(Next::UNDECIDED, 0);
    }
    let again = Attempt::read(step.argument).again(sources(target));
    if entered == Entered::Taken as u32 && again.number < Attempt::ROUNDS * MAX_SNAT_ADDRESSES {
        return Next::with(Next::SNAT_SEARCH, again.argument());
    }
    // Not a flow of that target, then.
    if let Some(table) = decide::first_table(step.recall.slot, asked.kind(), true) {
        tables.forget(table, &asked.key);
    }
    Next::with(Next::ANSWER, DropReason::PortAllocationError as u32)
}

/// Remembers the flow for both directions, which makes the port its own. One of [`Entered`].
#[inline(never)]
fn enter<T: Tables>(
    tables: &T,
    asked: &Asked,
    step: &Step,
    target: &Target,
    ends: &mut Ends,
) -> u32 {
    const NOWHERE: u32 = Entered::Full as u32;
    let attempt = Attempt::read(step.argument);
    let Some(source) = tables.source(attempt.source(&step.selected, sources(target))) else {
        return NOWHERE;
    };
    let Some(pool) = tables.pool(source.pool) else { return NOWHERE };
    let Some(listener) = tables.listener(step.recall.listener) else { return NOWHERE };
    if attempt.port == NO_PORT {
        return NOWHERE;
    }
    let key = &asked.key;
    let state = if asked.kind() == Kind::Ending { Stamp::CLOSING } else { Stamp::OPENING };
    let (stamp, address) = (Stamp::new(tables.now(), state), source.address);
    let (port, index, idle) = (Be16::new(attempt.port as u16), step.selected.index, listener.idle);
    let back = SnatReturn {
        stamp,
        client: key.source,
        client_port: key.source_port,
        idle: idle as u16,
        listener: step.recall.listener,
        target: index,
        pool: source.pool,
    };
    let reply = FlowKey::of_replies(target, address, port, key.protocol);
    let entered = tables.enter_snat_return(&reply, &back);
    if entered != Entered::New {
        return entered as u32;
    }
    let flow = SnatFlow { stamp, address, target: index, port, idle: idle as u16 };
    if !tables.remember_snat(key, &flow) {
        tables.forget_snat_return(&reply);
        return NOWHERE;
    }
    pool.mark::<T::Atomics>(attempt.port as u16);
    lead(ends, target, address, port);
    Entered::New as u32
}

/// What a packet says of its flow, in memory.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Asked {
    /// Its addresses and ports.
    key: FlowKey,
    /// TCP control bits; for UDP [`Kind::QUIC_INITIAL`] or 0.
    flags: u8,
    zero: [u8; 7],
}

impl Asked {
    /// Nothing yet.
    #[inline(always)]
    fn nothing() -> Self {
        hidden_zeros!()
    }

    /// What it means for its flow.
    #[inline(always)]
    fn kind(&self) -> Kind {
        Kind::of(self.key.protocol, self.flags)
    }
}

/// Reads the flow once more, with stack of its own; 0 if it is not there.
#[inline(never)]
fn ask<I: Ip, F: Frame>(frame: &F, place: &Place, asked: &mut Asked) -> u32 {
    let Some((key, transport)) = place.flow::<I, F>(frame) else { return 0 };
    let is_initial = place.is_quic_initial(frame, &transport);
    let flags = if is_initial { Kind::QUIC_INITIAL } else { transport.flags };
    (asked.key, asked.flags) = (key, flags);
    1
}
