//! A packet on its way out of the kernel.

use aya_ebpf::programs::TcContext;
use lb_common::forward::Frame;

/// The headers that are looked at: Ethernet, tags, IPv6 with the extension headers that are
/// followed, TCP.
const HEADERS: u32 = 256;

/// The packet that a traffic control program was called for; it is read, never written.
pub struct SkbFrame<'a> {
    ctx: &'a TcContext,
}

impl<'a> SkbFrame<'a> {
    /// The packet of a context.
    #[inline(always)]
    pub fn new(ctx: &'a TcContext) -> Self {
        let length = ctx.len();
        let wanted = if length < HEADERS { length } else { HEADERS };
        if ctx.data() + wanted as usize > ctx.data_end() {
            // Headers that stay out of reach leave the packet unrecorded.
            let _ = ctx.pull_data(wanted);
        }
        Self { ctx }
    }
}

impl Frame for SkbFrame<'_> {
    #[inline(always)]
    fn read<H: bytemuck::Pod>(&self, at: usize) -> Option<H> {
        let start = self.ctx.data() + at;
        if start + size_of::<H>() > self.ctx.data_end() {
            return None;
        }
        // SAFETY: the bounds were checked, and every bit pattern is an `H`; for alignment see
        // `XdpFrame`.
        Some(unsafe { (start as *const H).read() })
    }

    #[inline(always)]
    fn write<H: bytemuck::Pod>(&mut self, _at: usize, _header: H) -> Option<()> {
        None
    }

    #[inline(always)]
    fn write_pair<const GAP: usize, A, B>(
        &mut self,
        _at: usize,
        _first: A,
        _second: B,
    ) -> Option<()>
    where
        A: bytemuck::Pod,
        B: bytemuck::Pod,
    {
        None
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.ctx.len() as usize
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn grow_front(&mut self, _by: i32) -> Option<()> {
        None
    }

    #[inline(always)]
    fn truncate(&mut self, _length: usize) -> Option<()> {
        None
    }
}
