//! A packet in the kernel.

use core::marker::PhantomData;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail};
use aya_ebpf::programs::XdpContext;
use lb_common::forward::Frame;

/// The packet that an XDP program was called for.
///
/// Pointers into it are made anew for every access: a helper that moves the packet's ends makes
/// the older ones void.
pub struct XdpFrame<'a> {
    ctx: XdpContext,
    _packet: PhantomData<&'a mut ()>,
}

impl<'a> XdpFrame<'a> {
    /// The packet of a context.
    #[inline(always)]
    pub fn new(ctx: &'a XdpContext) -> Self {
        Self { ctx: XdpContext::new(ctx.ctx), _packet: PhantomData }
    }

    /// A pointer to a whole `H` at the offset.
    #[inline(always)]
    fn pointer<H>(&self, at: usize) -> Option<*mut H> {
        let start = self.ctx.data() + at;
        if start + size_of::<H>() > self.ctx.data_end() {
            return None;
        }
        Some(start as *mut H)
    }
}

impl Frame for XdpFrame<'_> {
    #[inline(always)]
    fn read<H: bytemuck::Pod>(&self, at: usize) -> Option<H> {
        let pointer = self.pointer::<H>(at)?;
        // SAFETY: the bounds were checked, and every bit pattern is an `H`. The packet may be at
        // any address: BPF loads need no alignment on the machines XDP runs on, and reading
        // through an aligned pointer is what makes the compiler load words instead of bytes.
        Some(unsafe { pointer.read() })
    }

    #[inline(always)]
    fn write<H: bytemuck::Pod>(&mut self, at: usize, header: H) -> Option<()> {
        let pointer = self.pointer::<H>(at)?;
        // SAFETY: as for `read`; the packet is this program's alone.
        unsafe { pointer.write(header) };
        Some(())
    }

    #[inline(always)]
    fn write_pair<const GAP: usize, A: bytemuck::Pod, B: bytemuck::Pod>(
        &mut self,
        at: usize,
        first: A,
        second: B,
    ) -> Option<()> {
        const { assert!(size_of::<A>() <= GAP) };
        let start = self.ctx.data() + at;
        if start + GAP + size_of::<B>() > self.ctx.data_end() {
            return None;
        }
        // SAFETY: as for `write`; the first ends before the second begins.
        unsafe {
            (start as *mut A).write(first);
            ((start + GAP) as *mut B).write(second);
        }
        Some(())
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.ctx.data_end() - self.ctx.data()
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        self.ctx.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn grow_front(&mut self, by: i32) -> Option<()> {
        // SAFETY: the context is the one the kernel gave; it checks the amount.
        let result = unsafe { bpf_xdp_adjust_head(self.ctx.as_ptr().cast(), -by) };
        (result == 0).then_some(())
    }

    #[inline(always)]
    fn truncate(&mut self, length: usize) -> Option<()> {
        let now = self.len();
        // SAFETY: a variable of our own. Volatile, so that the difference of the two pointers is
        // taken before anything else is done to it: the verifier allows nothing else.
        let now = unsafe { core::ptr::read_volatile(&now) };
        let excess = now.checked_sub(length)?;
        // SAFETY: as for `grow_front`.
        let result = unsafe { bpf_xdp_adjust_tail(self.ctx.as_ptr().cast(), -(excess as i32)) };
        (result == 0).then_some(())
    }
}
