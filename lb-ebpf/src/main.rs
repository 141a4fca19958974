//! The XDP programs of lb: lb-common's pipeline, bound to a packet in the kernel and to maps.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch, core_intrinsics)]
#![allow(internal_features, reason = "the library has no atomic instructions for BPF")]
#![allow(missing_docs, reason = "the program macros drop the comments of what they wrap")]

mod frame;
mod maps;
mod panic;

use aya_ebpf::bindings::xdp_action;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use lb_common::forward::{Next, Stage, begin, go_on};
use lb_common::verdict::Verdict;

use frame::XdpFrame;
use maps::Maps;

/// Some helpers are for programs of a licence compatible with the GPL only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// The balancer's first stage, attached to every NIC that clients or targets are behind.
#[xdp]
pub fn lb_balancer(ctx: XdpContext) -> u32 {
    let maps = Maps::new(&ctx);
    let next = begin(&mut XdpFrame::new(&ctx), &maps, &mut maps.first());
    end(&ctx, &maps, next)
}

/// Refuses a packet so that the client hears of it.
#[xdp]
pub fn lb_answer(ctx: XdpContext) -> u32 {
    later(&ctx, Stage::Answer)
}

/// Sends a packet to its target through a tunnel.
#[xdp]
pub fn lb_encapsulate(ctx: XdpContext) -> u32 {
    later(&ctx, Stage::Encapsulate)
}

/// Sends a packet to its target from an address and a port of this machine.
#[xdp]
pub fn lb_snat_request(ctx: XdpContext) -> u32 {
    later(&ctx, Stage::SnatRequest)
}

/// Looks for a source port that no flow has.
#[xdp]
pub fn lb_snat_search(ctx: XdpContext) -> u32 {
    later(&ctx, Stage::SnatSearch)
}

/// Gives a new flow the port that was found, and sends its first packet.
#[xdp]
pub fn lb_snat_open(ctx: XdpContext) -> u32 {
    later(&ctx, Stage::SnatOpen)
}

/// Sends a target's packet to the client whose flow has its destination port.
#[xdp]
pub fn lb_snat_reply(ctx: XdpContext) -> u32 {
    later(&ctx, Stage::SnatReply)
}

/// Sends an ICMP error to whom it is for.
#[xdp]
pub fn lb_icmp_error(ctx: XdpContext) -> u32 {
    later(&ctx, Stage::IcmpError)
}

/// Answers a ping.
#[xdp]
pub fn lb_echo(ctx: XdpContext) -> u32 {
    later(&ctx, Stage::Echo)
}

/// A stage that another program has handed over to.
#[inline(always)]
fn later(ctx: &XdpContext, stage: Stage) -> u32 {
    let maps = Maps::new(ctx);
    let Some(step) = maps.step() else { return xdp_action::XDP_DROP };
    let next = go_on(stage, &mut XdpFrame::new(ctx), &maps, step);
    end(ctx, &maps, next)
}

/// The verdict, or the next stage.
#[inline(always)]
fn end(ctx: &XdpContext, maps: &Maps<'_>, next: Next) -> u32 {
    if let Some(stage) = next.stage() {
        return maps.hand_over(ctx, stage, next);
    }
    match next.verdict(maps) {
        Verdict::Pass => xdp_action::XDP_PASS,
        Verdict::Drop => xdp_action::XDP_DROP,
        Verdict::Transmit => xdp_action::XDP_TX,
        Verdict::Redirect(ifindex) => maps.redirect(ifindex),
    }
}
