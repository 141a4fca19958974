//! How the stages follow one another.
//!
//! The first stage ([`super::begin`]) is all that most packets need. What only some need comes in
//! later stages, each of which is a program of its own in the kernel, reached by a tail call: it has
//! all the stack to itself, the verifier looks at it once and not once for every way that leads to
//! it, and what it lacks costs the others nothing. On the host they are called one after the other.

use bytemuck::{Pod, Zeroable};

use crate::flow::FlowKey;
use crate::tables::{Slot, Tables};
use crate::verdict::{DropReason, Verdict};

use super::error::Quote;
use super::parse::Place;
use super::{Outcome, Stop};

/// A stage after the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Stage {
    /// Refuses a packet so that the client hears of it.
    Answer = 0,
    /// Sends a packet to its target through a tunnel.
    Encapsulate = 1,
    /// Sends a packet to its target from an address and a port of this machine.
    SnatRequest = 2,
    /// Looks for a source port that no flow has.
    SnatSearch = 3,
    /// Gives a new flow the port that was found, and sends its first packet.
    SnatOpen = 4,
    /// Sends a target's packet to the client whose flow has its destination port.
    SnatReply = 5,
    /// Sends an ICMP error to whom it is for.
    IcmpError = 6,
    /// Answers a ping.
    Echo = 7,
}

impl Stage {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Answer,
        Self::Encapsulate,
        Self::SnatRequest,
        Self::SnatSearch,
        Self::SnatOpen,
        Self::SnatReply,
        Self::IcmpError,
        Self::Echo,
    ];

    /// The name of its program.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Answer => "lb_answer",
            Self::Encapsulate => "lb_encapsulate",
            Self::SnatRequest => "lb_snat_request",
            Self::SnatSearch => "lb_snat_search",
            Self::SnatOpen => "lb_snat_open",
            Self::SnatReply => "lb_snat_reply",
            Self::IcmpError => "lb_icmp_error",
            Self::Echo => "lb_echo",
        }
    }
}

/// How a stage ended: what is to be done next. A function returns it as one number, which stays in
/// a register.
#[derive(Clone, Copy)]
pub struct Next {
    action: u32,
    /// By action: an interface, a [`DropReason`], another action, an attempt to get a port.
    argument: u32,
}

impl Next {
    pub(super) const UNDECIDED: u32 = 0;
    pub(super) const PASS: u32 = 1;
    pub(super) const TRANSMIT: u32 = 2;
    const REDIRECT: u32 = 3;
    pub(super) const DROP: u32 = 4;
    /// The first stage goes on with what is remembered of the flow.
    const RECALL: u32 = Self::STAGES - 1;
    /// The first of the stages.
    const STAGES: u32 = 8;
    pub(super) const ANSWER: u32 = Self::STAGES + Stage::Answer as u32;
    const ENCAPSULATE: u32 = Self::STAGES + Stage::Encapsulate as u32;
    const SNAT_REQUEST: u32 = Self::STAGES + Stage::SnatRequest as u32;
    pub(super) const SNAT_SEARCH: u32 = Self::STAGES + Stage::SnatSearch as u32;
    pub(super) const SNAT_OPEN: u32 = Self::STAGES + Stage::SnatOpen as u32;
    const SNAT_REPLY: u32 = Self::STAGES + Stage::SnatReply as u32;
    pub(super) const ICMP_ERROR: u32 = Self::STAGES + Stage::IcmpError as u32;
    pub(super) const ECHO: u32 = Self::STAGES + Stage::Echo as u32;

    #[inline(always)]
    pub(super) fn with(action: u32, argument: u32) -> u64 {
        (argument as u64) << 32 | action as u64
    }

    #[inline(always)]
    pub(super) fn is_undecided(self) -> bool {
        self.action == Self::UNDECIDED
    }

    /// Whether a function has returned that the flow must be recalled.
    #[inline(always)]
    pub(super) fn is_recall(next: u64) -> bool {
        next as u32 == Self::RECALL
    }

    /// Whether a function has returned that a later stage comes next.
    #[inline(always)]
    pub(super) fn is_stage(next: u64) -> bool {
        next as u32 >= Self::STAGES
    }

    /// The stage that comes next, if any.
    #[inline(always)]
    pub fn stage(self) -> Option<Stage> {
        match self.action {
            Self::ANSWER => Some(Stage::Answer),
            Self::ENCAPSULATE => Some(Stage::Encapsulate),
            Self::SNAT_REQUEST => Some(Stage::SnatRequest),
            Self::SNAT_SEARCH => Some(Stage::SnatSearch),
            Self::SNAT_OPEN => Some(Stage::SnatOpen),
            Self::SNAT_REPLY => Some(Stage::SnatReply),
            Self::ICMP_ERROR => Some(Stage::IcmpError),
            Self::ECHO => Some(Stage::Echo),
            _ => None,
        }
    }

    /// The verdict, if no stage comes next; counts a packet that dies.
    #[inline(always)]
    pub fn verdict<T: Tables>(self, tables: &T) -> Verdict {
        match self.action {
            Self::TRANSMIT => Verdict::Transmit,
            Self::REDIRECT => Verdict::Redirect(self.argument),
            Self::DROP => {
                tables.count_drop(self.argument);
                Verdict::Drop
            }
            _ => Verdict::Pass,
        }
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

/// What one stage leaves to the next. In the kernel it is this CPU's element of a map, which still
/// holds what earlier packets left: a stage reads only what the one before it wrote.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Step {
    pub(super) recall: Recall,
    pub(super) place: Place,
    pub(super) selected: Selected,
    /// By stage: a [`DropReason`], an action of [`Next`], an attempt to get a port.
    pub(super) argument: u32,
    pub(super) quote: Quote,
    /// [`DropReason::TooBig`]: what the way carries, bytes.
    pub(super) mtu: u64,
}

/// What is asked of the flow table.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Recall {
    /// The flow.
    pub key: FlowKey,
    /// The slot that the hash chose.
    pub slot: Slot,
    /// Its number in the ring.
    pub chosen: u32,
    /// The ring.
    pub ring: u32,
    /// Index of the listener.
    pub listener: u32,
    /// Not 0 if the listener tracks every flow.
    pub is_tracked: u32,
    /// See [`Selected::hash`].
    pub hash: u32,
    /// TCP's control bits; 0 for UDP.
    pub flags: u32,
}

/// A flow's target.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Selected {
    /// Its index.
    pub index: u32,
    /// Not 0 for a flow that is new, as far as can be told.
    pub is_new: u32,
    /// Half of the flow's hash, the one that does not choose the slot.
    pub hash: u32,
}

/// Where the [`Step`] is. The first stage looks for it only if the packet needs one.
pub trait Handover {
    /// The step; the kernel's is there, though the verifier does not know it.
    fn step(&mut self) -> Option<&mut Step>;

    /// Writes the step.
    #[inline(always)]
    fn with_step(&mut self, write: impl FnOnce(&mut Step)) {
        if let Some(step) = self.step() {
            write(step);
        }
    }
}

impl Handover for Step {
    #[inline(always)]
    fn step(&mut self) -> Option<&mut Step> {
        Some(self)
    }
}

impl Step {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self::zeroed()
    }

    /// Tells the stage that comes next.
    #[inline(always)]
    pub fn prepare(&mut self, next: Next) {
        self.argument = next.argument;
    }
}

/// Says how a stage ended, and leaves what the next one needs.
#[inline(always)]
pub(super) fn conclude(step: &mut impl Handover, outcome: Outcome, place: Place) -> u64 {
    let next = match outcome {
        Ok(Verdict::Pass | Verdict::Drop) => Next::with(Next::PASS, 0),
        Ok(Verdict::Transmit) => Next::with(Next::TRANSMIT, 0),
        Ok(Verdict::Redirect(ifindex)) => Next::with(Next::REDIRECT, ifindex),
        Err(Stop::Drop(reason)) => Next::with(Next::DROP, reason as u32),
        Err(Stop::Answer(reason)) => Next::with(Next::ANSWER, reason as u32),
        Err(Stop::Recall) => Next::with(Next::RECALL, 0),
        Err(Stop::TooBig) => Next::with(Next::ANSWER, DropReason::TooBig as u32),
        Err(Stop::Encapsulate) => Next::with(Next::ENCAPSULATE, 0),
        Err(Stop::Snat) => Next::with(Next::SNAT_REQUEST, 0),
        Err(Stop::SnatReply(otherwise)) => Next::with(Next::SNAT_REPLY, otherwise),
    };
    // Not in the arms: the compiler would keep what some of them have not set.
    if next as u32 >= Next::RECALL {
        step.with_step(|step| step.place = place);
    }
    next
}

impl Default for Step {
    fn default() -> Self {
        Self::new()
    }
}
