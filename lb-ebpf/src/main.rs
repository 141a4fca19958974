//! The XDP programs of lb: lb-common's pipeline, bound to a packet in the kernel and to maps.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the program macros drop the comments of what they wrap")]

mod frame;
mod maps;
mod runtime;

use aya_ebpf::bindings::xdp_action;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use lb_common::forward::forward;
use lb_common::verdict::Verdict;

use frame::XdpFrame;
use maps::Maps;

/// The balancer, attached to every NIC that clients or targets are behind.
#[xdp]
pub fn lb_balancer(ctx: XdpContext) -> u32 {
    let maps = Maps::new(&ctx);
    match forward(&mut XdpFrame::new(&ctx), &maps) {
        Verdict::Pass => xdp_action::XDP_PASS,
        Verdict::Drop => xdp_action::XDP_DROP,
        Verdict::Transmit => xdp_action::XDP_TX,
        Verdict::Redirect(ifindex) => maps.redirect(ifindex),
    }
}
