//! XDP programs of the tests and of the benchmark.
//!
//! `pass` goes onto every veth peer of a balancer: without a program there, whatever the balancer
//! sends by `XDP_TX` or `XDP_REDIRECT` is lost. `drop`, `swap` and `encap` are the floors that a
//! benchmark is read against. `wrapper` makes a fresh packet and calls the program under test.
#![no_std]
#![no_main]
#![expect(missing_docs, reason = "#[xdp] drops the documentation of the programs")]

#[path = "../../../lb-ebpf/src/panic.rs"]
mod panic;
mod template;

use aya_ebpf::{
    bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX},
    helpers::bpf_xdp_adjust_head,
    macros::{map, xdp},
    maps::{Array, ProgramArray},
    programs::XdpContext,
};

use crate::template::{FIRST_PORT, HEADERS_SIZE, PORT_BITS, Template};

/// What the loader tells the kernel.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// What the wrapper makes; entry 0 is the only one.
#[map]
static TEMPLATE: Array<Template> = Array::with_max_entries(1, 0);

/// Slot 0 holds the program that the wrapper calls.
#[map]
static PROGRAMS: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// Leaves the packet to the kernel.
#[xdp]
pub fn pass(_: XdpContext) -> u32 {
    XDP_PASS
}

/// Floor: the cost of the wrapper alone.
#[xdp]
pub fn drop(_: XdpContext) -> u32 {
    XDP_DROP
}

/// Floor of forwarding by rewriting: swaps the MAC addresses and sends the packet back.
#[xdp]
pub fn swap(ctx: XdpContext) -> u32 {
    try_swap(&ctx).unwrap_or(XDP_ABORTED)
}

/// Floor of forwarding by tunnel: constant IPIP encapsulation.
#[xdp]
pub fn encap(ctx: XdpContext) -> u32 {
    try_encap(&ctx).unwrap_or(XDP_ABORTED)
}

/// Writes the next flow's packet over whatever the previous run left, then calls the program in
/// slot 0 of [`PROGRAMS`]. `BPF_PROG_TEST_RUN` resets nothing between its repeats.
#[xdp]
pub fn wrapper(ctx: XdpContext) -> u32 {
    if try_make_packet(&ctx).is_none() {
        return XDP_ABORTED;
    }
    // SAFETY: nothing here waits to be dropped; control comes back only if the slot is empty.
    unsafe { PROGRAMS.tail_call(&ctx, 0) };
    XDP_ABORTED
}

#[inline(always)]
fn try_swap(ctx: &XdpContext) -> Option<u32> {
    // Two MAC addresses in 16-bit words: NET_IP_ALIGN leaves them no better alignment.
    let macs = Bytes::of(ctx).at::<[[u16; 3]; 2]>(0)?.cast::<u16>();
    for i in 0..3 {
        // SAFETY: `at` checked the bounds, and this program alone has the packet.
        unsafe {
            let (destination, source) = (*macs.add(i), *macs.add(i + 3));
            *macs.add(i) = source;
            *macs.add(i + 3) = destination;
        }
    }
    Some(XDP_TX)
}

/// Ethernet and IPv4 as 16-bit words, from and to addresses that belong to nobody.
const OUTER_HEADERS: [u16; 17] = [
    u16::to_be(0x0200),
    0,
    u16::to_be(0x0002),
    u16::to_be(0x0200),
    0,
    u16::to_be(0x0001),
    u16::to_be(0x0800),
    u16::to_be(0x4500),
    0, // total length
    0,
    u16::to_be(0x4000), // don't fragment
    u16::to_be(0x4004), // TTL 64, IPIP
    0,                  // checksum
    u16::to_be(0xc612), // 198.18.0.1, of the range for benchmarks (RFC 2544)
    u16::to_be(0x0001),
    u16::to_be(0xc612), // 198.18.0.2
    u16::to_be(0x0002),
];
const ETHERNET_SIZE: u16 = 14;
const IPV4_SIZE: u16 = 20;
const TOTAL_LENGTH: usize = 8;
const CHECKSUM: usize = 12;

#[inline(always)]
fn try_encap(ctx: &XdpContext) -> Option<u32> {
    let length = Bytes::of(ctx).length() as u16;
    adjust_head(ctx, -i32::from(IPV4_SIZE))?;
    let outer = Bytes::of(ctx).at::<[u16; OUTER_HEADERS.len()]>(0)?.cast::<u16>();
    let total_length = (length - ETHERNET_SIZE + IPV4_SIZE).to_be();
    // SAFETY: `at` checked the bounds. A test run's frame began on a multiple of eight, so this
    // one begins on a multiple of four. Volatile, or this becomes 17 copies of two bytes.
    unsafe {
        for (i, pair) in const { OUTER_HEADERS.as_chunks::<2>().0 }.iter().enumerate() {
            let ([a, b], [c, d]) = (pair[0].to_ne_bytes(), pair[1].to_ne_bytes());
            outer.cast::<u32>().add(i).write_volatile(u32::from_ne_bytes([a, b, c, d]));
        }
        *outer.add(OUTER_HEADERS.len() - 1) = OUTER_HEADERS[OUTER_HEADERS.len() - 1];
        *outer.add(TOTAL_LENGTH) = total_length;
        *outer.add(CHECKSUM) = checksum(const { sum_of_outer() }, total_length, 0);
    }
    Some(XDP_TX)
}

/// The sum of the outer IPv4 header, its total length being zero.
const fn sum_of_outer() -> u16 {
    let mut sum = 0;
    let mut i = ETHERNET_SIZE as usize / 2;
    while i < OUTER_HEADERS.len() {
        sum += OUTER_HEADERS[i] as u32;
        i += 1;
    }
    fold(sum)
}

#[inline(always)]
fn try_make_packet(ctx: &XdpContext) -> Option<()> {
    let template = TEMPLATE.get_ptr_mut(0)?;
    // SAFETY: a value of an array map lives as long as the map, and a test run is on one CPU.
    let template = unsafe { &mut *template };

    let longer = Bytes::of(ctx).length().wrapping_sub(u64::from(template.frame_length));
    if longer != 0 {
        adjust_head(ctx, longer as i32)?;
    }

    let flow = template.next;
    let next = flow + template.stride;
    template.next = if next >= template.flows { next - template.flows } else { next };

    let packet = Bytes::of(ctx);
    let headers = packet.at::<[u64; HEADERS_SIZE / 8]>(0)?.cast::<u64>();
    for (i, word) in template.headers.iter().enumerate() {
        // SAFETY: `at` checked the bounds. A test run's frame begins on a multiple of eight, and
        // the head was just put back there. Volatile, or this becomes a call of a slow memcpy.
        unsafe { headers.add(i).write_volatile(*word) };
    }

    let address = ((flow >> PORT_BITS) as u16).to_be();
    let port = (FIRST_PORT | (flow & ((1 << PORT_BITS) - 1)) as u16).to_be();
    packet.put(template.address, address)?;
    packet.put(template.port, port)?;
    if template.ip_checksum != 0 {
        packet.put(template.ip_checksum, checksum(template.ip_sum, address, 0))?;
    }
    let l4_checksum = match checksum(template.l4_sum, address, port) {
        // Zero would mean "no checksum" in UDP (RFC 768); the same number to TCP's receiver.
        0 => 0xffff,
        other => other,
    };
    packet.put(template.l4_checksum, l4_checksum)
}

/// The checksum over words whose one's complement sum is `sum`, and two more (RFC 1071).
#[inline(always)]
const fn checksum(sum: u16, a: u16, b: u16) -> u16 {
    !fold(sum as u32 + a as u32 + b as u32)
}

/// The one's complement sum of both halves. A second carry is possible.
#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum + (sum >> 16)) as u16
}

/// Moves the start of the packet: forward by `by` bytes, backward if negative.
#[inline(always)]
fn adjust_head(ctx: &XdpContext, by: i32) -> Option<()> {
    // SAFETY: the context is the kernel's own; no pointer into the packet is kept across the call.
    let result = unsafe { bpf_xdp_adjust_head(ctx.ctx, by) };
    (result == 0).then_some(())
}

/// Where the packet lies, until the next `adjust_head`.
#[derive(Clone, Copy)]
struct Bytes {
    start: usize,
    end: usize,
}

impl Bytes {
    #[inline(always)]
    fn of(ctx: &XdpContext) -> Self {
        Self { start: ctx.data(), end: ctx.data_end() }
    }

    /// In 64 bits: with fewer, the compiler cuts the pointers first, which the verifier forbids.
    #[inline(always)]
    fn length(self) -> u64 {
        (self.end - self.start) as u64
    }

    /// A `T` at `offset`, `None` if the packet ends before it.
    #[inline(always)]
    fn at<T>(self, offset: usize) -> Option<*mut T> {
        let start = self.start + offset;
        (start + size_of::<T>() <= self.end).then_some(start as *mut T)
    }

    /// Writes the 16 bits at `offset`, which is even.
    #[inline(always)]
    fn put(self, offset: u16, value: u16) -> Option<()> {
        // The verifier adds to a packet pointer only what has a constant bound.
        let field = self.at::<u16>(usize::from(offset) & 0x7e)?;
        // SAFETY: `at` checked the bounds, and this program alone has the packet.
        unsafe { *field = value };
        Some(())
    }
}
