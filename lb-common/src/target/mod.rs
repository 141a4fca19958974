//! The way of a packet on a target: unwrap -> examine -> judge, and what the target sends itself.
//!
//! Two programs share the tables. The one on the way in ([`admit_target`]) takes the tunnel header
//! off what a load balancer sent, and lets in only what the target's security groups allow. The
//! one on the way out ([`record`]) remembers the flows that the target opens itself, so that their
//! replies come in whatever the rules say. Nothing here changes a packet but its tunnel header.
//!
//! The rules for code that runs in the kernel are those of [`forward`](crate::forward).

mod examine;
mod judge;
#[cfg(any(test, feature = "std"))]
pub mod model;
mod outgoing;
pub mod tables;
#[cfg(test)]
mod tests;
mod unwrap;

use bytemuck::{Pod, Zeroable};

use crate::flow::FlowKey;
use crate::forward::ip::{Ip, V4, V6};
use crate::forward::parse::Link;
use crate::forward::{Frame, hidden_zeros};
use crate::verdict::Verdict;
use crate::wire::{Address, EtherType};

use tables::{Settings, TargetTables};

pub use outgoing::record;

/// Decides whether a packet reaches the target's network stack; takes tunnel headers off.
///
/// The verdict is [`Verdict::Pass`] or [`Verdict::Drop`].
#[inline(always)]
pub fn admit_target<F: Frame, T: TargetTables>(frame: &mut F, tables: &T) -> Verdict {
    let settings = tables.settings();
    if settings.flags == 0 {
        return Verdict::Pass;
    }
    let mut step = Step::undecided();
    let mut action = Step::UNDECIDED;
    if settings.flags & Settings::UNWRAPS != 0 {
        action = match ether_type(frame) {
            Some(EtherType::IPV4) => unwrap::find::<V4, F, T>(frame, tables, &mut step),
            Some(EtherType::IPV6) => unwrap::find::<V6, F, T>(frame, tables, &mut step),
            _ => Step::UNDECIDED,
        };
        if action == Step::UNWRAP {
            action = unwrap::strip(frame, tables, &mut step);
        }
    }
    if action == Step::UNDECIDED && settings.flags & Settings::ENFORCES != 0 {
        action = match ether_type(frame) {
            Some(EtherType::IPV4) => examine_ip::<V4, F>(frame, &mut step),
            Some(EtherType::IPV6) => examine_ip::<V6, F>(frame, &mut step),
            // ARP, and what is no IP: rules say nothing about it.
            _ => Step::PASS,
        };
        if action == Step::JUDGE {
            action = judge::judge(tables, &mut step);
        }
    }
    if action == Step::DROP {
        tables.count_drop(step.argument);
        return Verdict::Drop;
    }
    Verdict::Pass
}

/// The parts are functions of their own in the kernel too, called one after the other.
#[inline(always)]
fn examine_ip<I: Version, F: Frame>(frame: &F, step: &mut Step) -> u32 {
    let mut action = examine::examine::<I, F>(frame, step);
    if action == Step::ICMP {
        action = examine::examine_icmp::<I, F>(frame, step);
    }
    if action == Step::QUOTE {
        action = examine::examine_quote::<I, F>(frame, step);
    }
    action
}

#[inline(always)]
fn ether_type<F: Frame>(frame: &F) -> Option<EtherType> {
    Link::parse(frame).map(|link| link.ether_type)
}

/// What one stage leaves to the next, in memory: plain numbers that are always written, see
/// [`forward`](crate::forward). What is to be done next is what a stage returns: from a function
/// that returns nothing the verifier may see a pointer come back, which it refuses.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Step {
    /// By what the sender is known beside the packet's source, see [`tables::space`].
    via: Address,
    /// [`Self::JUDGE`]: the flow that is judged, from the peer to the target. [`Self::ICMP`]: the
    /// same without its numbers.
    flow: FlowKey,
    /// See `via`.
    space: u32,
    /// [`Self::DROP`]: the number of a [`DropReason`](crate::verdict::DropReason).
    argument: u32,
    /// [`Self::ICMP`]: TTL or hop limit.
    hops: u32,
    /// [`Self::JUDGE`]: place of the rules' class, see [`tables::class_index`].
    class_index: u32,
    /// [`Self::UNWRAP`]: bytes between the link header and the inner packet.
    stripped: u16,
    /// [`Self::UNWRAP`]: EtherType of the inner packet.
    inner: EtherType,
    /// [`Self::ICMP`], [`Self::QUOTE`]: offset of the ICMP header.
    l4: u16,
    zero: u16,
}

impl Step {
    const UNDECIDED: u32 = 0;
    const PASS: u32 = 1;
    const DROP: u32 = 2;
    const UNWRAP: u32 = 3;
    const JUDGE: u32 = 4;
    const ICMP: u32 = 5;
    const QUOTE: u32 = 6;

    /// Nothing is known yet.
    #[inline(always)]
    fn undecided() -> Self {
        hidden_zeros!()
    }
}

/// What the two IP versions' control protocols and fragments do differently.
trait Version: Ip {
    /// Where a fragment belongs in the whole, in units of 8 bytes; `fragment` as
    /// [`Parsed`](crate::forward::ip::Parsed) has it.
    fn fragment_offset(fragment: u16) -> u16;
    /// Whether a message of its ICMP keeps the segment going: neighbour discovery, which nobody
    /// beyond the segment can send (RFC 4861 section 11.2), and multicast listener discovery (RFC
    /// 3810), without which a switch that snoops would hold neighbour discovery back.
    fn is_of_the_segment(kind: u8, hops: u8) -> bool;
}

impl Version for V4 {
    #[inline(always)]
    fn fragment_offset(fragment: u16) -> u16 {
        fragment & crate::wire::Ipv4::FRAGMENT_OFFSET
    }

    #[inline(always)]
    fn is_of_the_segment(_kind: u8, _hops: u8) -> bool {
        false
    }
}

impl Version for V6 {
    #[inline(always)]
    fn fragment_offset(fragment: u16) -> u16 {
        fragment >> 3
    }

    #[inline(always)]
    fn is_of_the_segment(kind: u8, hops: u8) -> bool {
        match kind {
            133..=137 => hops == 255,
            130..=132 | 143 => true,
            _ => false,
        }
    }
}
