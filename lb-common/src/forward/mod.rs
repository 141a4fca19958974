//! The way of a packet: parse -> classify -> admit -> select -> rewrite -> emit.
//!
//! Everything here runs in the kernel: a header is copied out at an offset that the verifier can
//! bound, nothing is indexed by packet data, nothing panics, and nothing is written before it is
//! certain that the packet is ours.

/// All zero, for a record of plain numbers (`Pod`) whose size is a multiple of 8. What is passed
/// between functions in memory must be written once before it is read. The zero is hidden from the
/// compiler: it would make one call of all the stores, to a function that clears the bytes one by one.
macro_rules! hidden_zeros {
    () => {
        bytemuck::cast([core::hint::black_box(0_u64); size_of::<Self>() / 8])
    };
}
pub(crate) use hidden_zeros;

mod decide;
mod echo;
mod emit;
mod error;
pub(crate) mod ip;
mod least;
pub(crate) mod parse;
mod proxied;
pub(crate) mod reject;
mod reply;
mod request;
mod select;
mod snat;
mod stage;
mod tunnel;

use bytemuck::Pod;

use crate::flow::{TCP, UDP};
use crate::tables::{Endpoint, EndpointKey, MAX_TARGETS, OPEN, Tables};
use crate::verdict::{DropReason, Verdict};
use crate::wire::icmp::Icmp;
use crate::wire::{Address, Be16, EtherType};

use ip::{ANY, Ip, PLAIN, V4, V6};
use parse::{Link, Packet, Place, whole};
use reject::Answer;
use stage::{Recall, Selected};

pub use stage::{Handover, Next, Stage, Step};

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
    /// Larger than its way carries, which is [`Step::mtu`]; its sender hears of it.
    TooBig,
    /// It is to go through a tunnel to [`Step::selected`].
    Encapsulate,
    /// It is to go to [`Step::selected`] from an address and a port of this machine.
    Snat,
    /// It may be a reply to such an address; else it ends with this action of [`Next`].
    SnatReply(u32),
}

impl From<DropReason> for Stop {
    #[inline(always)]
    fn from(reason: DropReason) -> Self {
        Self::Drop(reason)
    }
}

/// Decides what happens to a packet, rewrites it accordingly, and counts it: all stages.
pub fn forward<F: Frame, T: Tables>(frame: &mut F, tables: &T) -> Verdict {
    let mut step = Step::new();
    let mut next = begin(frame, tables, &mut step);
    while let Some(stage) = next.stage() {
        step.prepare(next);
        next = go_on(stage, frame, tables, &mut step);
    }
    next.verdict(tables)
}

/// The first stage. Its parts are functions of their own in the kernel too, called one after the
/// other: reading the headers again is cheaper than keeping them in memory.
#[inline(always)]
pub fn begin<F: Frame, T: Tables>(frame: &mut F, tables: &T, step: &mut impl Handover) -> Next {
    let pass = Next::from(Next::with(Next::PASS, 0));
    if is_for_others(frame, tables) {
        return pass;
    }
    let Some(link) = Link::parse(frame) else { return pass };
    match link.ether_type {
        EtherType::IPV4 => begin_ip::<V4, F, T>(frame, tables, step, &link),
        EtherType::IPV6 => begin_ip::<V6, F, T>(frame, tables, step, &link),
        _ => pass,
    }
}

/// Whether the frame is for another machine, and only came because a switch floods or the NIC
/// listens to everything. The kernel throws such away (`PACKET_OTHERHOST`), unless it bridges.
/// Whatever we sent in their stead would come once more from whom they are for; with `dsr_l2`, two
/// balancers on a segment would send one packet back and forth for ever.
#[inline(always)]
fn is_for_others<F: Frame, T: Tables>(frame: &F, tables: &T) -> bool {
    match frame.read::<u64>(0) {
        Some(beginning) => tables.own_mac(frame.ingress()).is_foreign(beginning),
        None => false,
    }
}

/// Both parts are compiled twice: most packets are plain, and with constant offsets they cost a
/// third less.
#[inline(always)]
fn begin_ip<I: Answer, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &mut impl Handover,
    link: &Link,
) -> Next {
    let is_plain = link.tags == 0 && I::is_plain(frame);
    let next = if is_plain {
        to_listener::<PLAIN, I, F, T>(frame, tables, step)
    } else {
        to_listener::<ANY, I, F, T>(frame, tables, step)
    };
    if Next::is_recall(next) {
        return recall::<I, F, T>(frame, tables, step);
    }
    if !Found::is_packed(next) {
        return Next::from(next);
    }
    Next::from(if is_plain {
        from_target::<PLAIN, I, F, T>(frame, tables, step, next)
    } else {
        from_target::<ANY, I, F, T>(frame, tables, step, next)
    })
}

/// A later stage.
#[inline(always)]
pub fn go_on<F: Frame, T: Tables>(
    stage: Stage,
    frame: &mut F,
    tables: &T,
    step: &mut Step,
) -> Next {
    Next::from(match (stage, step.place.is_v4()) {
        (Stage::Answer, true) => reject::answer::<V4, F, T>(frame, tables, step),
        (Stage::Answer, false) => reject::answer::<V6, F, T>(frame, tables, step),
        (Stage::Encapsulate, true) => encapsulate::<V4, F, T>(frame, tables, step),
        (Stage::Encapsulate, false) => encapsulate::<V6, F, T>(frame, tables, step),
        (Stage::SnatRequest, true) => snat::request::<V4, F, T>(frame, tables, step),
        (Stage::SnatRequest, false) => snat::request::<V6, F, T>(frame, tables, step),
        (Stage::SnatSearch, _) => snat::search(tables, step),
        (Stage::SnatOpen, true) => snat::open::<V4, F, T>(frame, tables, step),
        (Stage::SnatOpen, false) => snat::open::<V6, F, T>(frame, tables, step),
        (Stage::IcmpError, true) => error::handle::<V4, F, T>(frame, tables, step),
        (Stage::IcmpError, false) => error::handle::<V6, F, T>(frame, tables, step),
        (Stage::Echo, true) => echo::answer::<V4, F>(frame, step),
        (Stage::Echo, false) => echo::answer::<V6, F>(frame, step),
        (Stage::SnatReply, true) => snat::reply::<V4, F, T>(frame, tables, step),
        (Stage::SnatReply, false) => snat::reply::<V6, F, T>(frame, tables, step),
    })
}

/// Whose packet is it? A listener's is decided here, with a target by the hash alone. Nothing is
/// written before all is certain: what is not ours passes untouched.
#[inline(never)]
fn to_listener<const SHAPE: bool, I: Answer, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &mut impl Handover,
) -> u64 {
    let Some((link, packet)) = parse::<SHAPE, I, F>(frame) else {
        return Next::with(Next::PASS, 0);
    };
    let outcome = match &packet.transport {
        _ if packet.protocol == I::ICMP => {
            let place = packet.place();
            let next = guard::<I, F, T>(frame, tables, &place, packet.fragment as u32);
            if Next::is_stage(next) {
                step.with_step(|step| step.place = place);
            }
            return next;
        }
        None => without_ports(tables, &packet),
        Some(transport) => {
            let port = transport.ports.destination;
            let key = EndpointKey::new(packet.destination, port, packet.protocol);
            let endpoint = lookup(tables, &key);
            match endpoint.kind() {
                Endpoint::LISTENER => {
                    request::handle(frame, tables, &link, &packet, transport, &endpoint, step)
                }
                Endpoint::TARGET | Endpoint::GUARD => {
                    let Found { index, class, .. } = endpoint;
                    return reply::to_target::<I, F, T>(
                        frame,
                        tables,
                        &packet.place(),
                        index,
                        class,
                    );
                }
                Endpoint::PROXIED => {
                    let (place, Found { listener, class, .. }) = (packet.place(), endpoint);
                    return proxied::handle::<I, F, T>(frame, tables, &place, listener, class);
                }
                _ => {
                    let port = transport.ports.source;
                    let key = EndpointKey::new(packet.source, port, packet.protocol);
                    let source = lookup(tables, &key);
                    if source.kind() == Endpoint::TARGET {
                        return source.packed();
                    }
                    of_nobody(tables, &packet)
                }
            }
        }
    };
    stage::conclude(step, outcome, packet.place())
}

/// Recalls a packet's flow and sends it to its target.
#[inline(always)]
fn recall<I: Answer, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &mut impl Handover,
) -> Next {
    let Some(step) = step.step() else {
        return Next::from(Next::with(Next::DROP, DropReason::TableInconsistent as u32));
    };
    let next = Next::from(select::recall::<I, F, T>(frame, tables, step));
    if !next.is_undecided() {
        return next;
    }
    Next::from(if step.place.is_plain::<I>() {
        deliver::<PLAIN, I, F, T>(frame, tables, step)
    } else {
        deliver::<ANY, I, F, T>(frame, tables, step)
    })
}

/// Sends a packet to its target through a tunnel.
#[inline(always)]
fn encapsulate<I: Ip, F: Frame, T: Tables>(frame: &mut F, tables: &T, step: &mut Step) -> u64 {
    if step.place.is_plain::<I>() {
        tunnel::encapsulate::<PLAIN, I, F, T>(frame, tables, step)
    } else {
        tunnel::encapsulate::<ANY, I, F, T>(frame, tables, step)
    }
}

/// Sends a packet to the target that was recalled for it.
#[inline(never)]
fn deliver<const SHAPE: bool, I: Answer, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &mut Step,
) -> u64 {
    let pass = Next::with(Next::PASS, 0);
    let Some((link, packet)) = read_again::<SHAPE, I, F>(frame, &step.place) else { return pass };
    let Some(transport) = &packet.transport else { return pass };
    let selected = (step.recall.listener, step.selected);
    let outcome = request::deliver(frame, tables, &link, &packet, transport, selected, step);
    stage::conclude(step, outcome, packet.place())
}

/// A packet from a target, which is [packed](Found::packed).
#[inline(never)]
fn from_target<const SHAPE: bool, I: Answer, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &mut impl Handover,
    source: u64,
) -> u64 {
    let pass = Next::with(Next::PASS, 0);
    let Some((link, packet)) = parse::<SHAPE, I, F>(frame) else { return pass };
    let Some(transport) = &packet.transport else { return pass };
    let source = Found::unpacked(core::hint::black_box(source));
    let outcome = reply::handle(frame, tables, &link, &packet, transport, &source, step);
    stage::conclude(step, outcome, packet.place())
}

/// A packet from no target and to no listener.
#[inline(always)]
fn of_nobody<I: Ip, T: Tables>(tables: &T, packet: &Packet<I>) -> Outcome {
    let kind = kind_of_address(tables, packet.destination.words());
    let is_owned = kind & Endpoint::KIND == Endpoint::OWNED;
    if kind & Endpoint::SNAT != 0 {
        return Err(Stop::SnatReply(if is_owned { Next::DROP } else { Next::PASS }));
    }
    if is_owned { Err(DropReason::NoListener.into()) } else { Ok(Verdict::Pass) }
}

#[inline(always)]
fn parse<const SHAPE: bool, I: Ip, F: Frame>(frame: &F) -> Option<(Link, Packet<I>)> {
    let link = if SHAPE == PLAIN { Link::untagged::<I>() } else { Link::parse(frame)? };
    let packet = Packet::parse::<SHAPE, F>(frame, &link)?;
    Some((link, packet))
}

/// The headers of a packet that another stage has parsed.
#[inline(always)]
fn read_again<const SHAPE: bool, I: Ip, F: Frame>(
    frame: &F,
    place: &Place,
) -> Option<(Link, Packet<I>)> {
    if SHAPE == PLAIN {
        return parse::<PLAIN, I, F>(frame);
    }
    Some((Link::parse(frame)?, place.read::<I, F>(frame)?))
}

/// A packet without ports: a later fragment, a truncated header, another protocol.
#[inline(always)]
fn without_ports<I: Ip, T: Tables>(tables: &T, packet: &Packet<I>) -> Outcome {
    let balanced = packet.protocol == TCP || packet.protocol == UDP;
    if balanced && is_owned(tables, packet) {
        let is_fragment = packet.is_fragment();
        if packet.protocol == TCP && packet.fragment & I::FRAGMENT_OFFSET != 0 {
            return proxied::later_fragment(tables, packet);
        }
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

/// Echo requests to an address with security groups need a rule, and are answered where the agent added
/// the address; neighbour discovery always passes. Errors about our flows are looked at elsewhere.
#[inline(never)]
fn guard<I: Ip, F: Frame, T: Tables>(frame: &F, tables: &T, place: &Place, fragment: u32) -> u64 {
    let pass = Next::with(Next::PASS, 0);
    let Some(packet) = place.read::<I, F>(frame) else { return pass };
    let Some(icmp) = whole(frame).read::<Icmp>(packet.l4) else { return pass };
    if fragment != 0 {
        return pass;
    }
    if I::is_error(icmp.kind) {
        return Next::with(Next::ICMP_ERROR, 0);
    }
    if icmp.kind != I::ECHO_REQUEST {
        return pass;
    }
    let key = EndpointKey::new(packet.destination, Default::default(), packet.protocol);
    let endpoint = lookup(tables, &key);
    if endpoint.kind() == Endpoint::GUARD && admit(tables, &packet, &endpoint).is_err() {
        return Next::with(Next::DROP, DropReason::SecurityGroupDenied as u32);
    }
    if is_owned(tables, &packet) { Next::with(Next::ECHO, 0) } else { pass }
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

    /// What a reply needs of a target, as one number, which a function returns in a register. Its
    /// last byte is no [`Next`]'s.
    #[inline(always)]
    fn packed(&self) -> u64 {
        let flags = self.kind & !(Endpoint::KIND as u32) & 0xff;
        (self.listener as u64) << 32 | (self.index << 16 | flags << 8 | Next::UNDECIDED) as u64
    }

    #[inline(always)]
    fn is_packed(next: u64) -> bool {
        next as u8 as u32 == Next::UNDECIDED
    }

    #[inline(always)]
    fn unpacked(packed: u64) -> Self {
        let low = packed as u32;
        let kind = (low >> 8) & 0xff | Endpoint::TARGET as u32;
        Self { kind, listener: (packed >> 32) as u32, index: low >> 16, class: OPEN }
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

/// A packed target's number has 16 bits.
const _: () = assert!(MAX_TARGETS <= 1 << 16);

#[inline(always)]
fn matches(endpoint: &Endpoint, key: &EndpointKey) -> bool {
    endpoint.address == key.address
        && endpoint.port == key.port
        && endpoint.protocol == key.protocol
        && endpoint.kind() != 0
}
