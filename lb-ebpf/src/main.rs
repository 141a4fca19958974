//! The XDP programs of lb: lb-common's pipeline, bound to a packet in the kernel and to maps.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features, reason = "the library has no atomic instructions for BPF")]
#![allow(missing_docs, reason = "the program macros drop the comments of what they wrap")]

mod frame;
mod maps;
mod snat;

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

/// The pipeline cannot panic; the verifier refuses the loop if it could.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Some helpers are for programs of a licence compatible with the GPL only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
