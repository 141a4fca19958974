//! The programs of a target: lb-common's target pipeline, bound to packets in the kernel and to
//! maps. An object of its own, so that a target has none of the balancer's maps.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the program macros drop the comments of what they wrap")]

mod frame;
mod maps;
#[path = "../panic.rs"]
mod panic;
#[path = "../frame.rs"]
mod xdp_frame;

use aya_ebpf::bindings::{TC_ACT_UNSPEC, xdp_action};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use lb_common::target::{admit_target, record};
use lb_common::verdict::Verdict;

use frame::SkbFrame;
use maps::Maps;
use xdp_frame::XdpFrame;

/// Some helpers are for programs of a licence compatible with the GPL only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// On the way in, attached to every NIC that the load balancer's packets come by.
#[xdp]
pub fn lb_target(ctx: XdpContext) -> u32 {
    match admit_target(&mut XdpFrame::new(&ctx), &Maps) {
        Verdict::Drop => xdp_action::XDP_DROP,
        _ => xdp_action::XDP_PASS,
    }
}

/// On the way out of the same NICs. Others' programs and filters come next, whatever it saw.
#[classifier]
pub fn lb_target_out(ctx: TcContext) -> i32 {
    record(&SkbFrame::new(&ctx), &Maps);
    TC_ACT_UNSPEC
}
