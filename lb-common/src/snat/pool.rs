//! Source ports, given out one flow each.

use core::hint::black_box;
use core::sync::atomic::AtomicU64;

/// Words of a pool: a bit for each port number.
const WORDS: u32 = 1024;
/// Words that are looked at together: a cache line, 512 ports.
const BLOCK: u32 = 8;
/// Blocks of a pool.
const BLOCKS: u32 = WORDS / BLOCK;
/// No port is free.
pub const NO_PORT: u32 = 0;

/// The atomic accesses that BPF has had from the beginning. The compiler's library offers none of
/// them for it.
pub trait Atomics {
    /// Reads a word.
    fn load(word: &AtomicU64) -> u64;
    /// Adds to a word.
    fn add(word: &AtomicU64, value: u64);
}

/// The ports of one address towards one (target address, port, protocol): a bit for each, set while
/// a flow has it.
///
/// It says where to look for a port; whose a port is, the table of flows says: of two CPUs that
/// find the same port free, one gets it in there. That one alone [marks](Self::mark) it here, so
/// adding is as good as setting a bit. Only the agent gives ports back, after the flow's entry is
/// gone.
///
/// The search goes on where the last one ended, so that a port rests as long as it can before it is
/// used again: the target may still hold the old connection in TIME-WAIT (RFC 9293 section 3.6.1).
/// However full the pool is, a search reads each of its 128 cache lines once at most.
#[derive(Debug)]
#[repr(C)]
pub struct PortPool {
    /// How many searches there were.
    searches: AtomicU64,
    /// Fills the cache line that every search writes.
    zero: [u64; 7],
    /// A bit for each port.
    taken: [AtomicU64; WORDS as usize],
}

impl PortPool {
    /// Its size in memory, in words of 8 bytes.
    pub const LENGTH: usize = size_of::<Self>() / 8;

    /// A port from `first` to `last` that no flow has; [`NO_PORT`] if there is none. The ports are in
    /// host byte order, and `first` is neither 0 nor more than `last`.
    #[inline(always)]
    pub fn find<A: Atomics>(&self, first: u32, last: u32) -> u32 {
        let ports = last.wrapping_sub(first).wrapping_add(1);
        let search = A::load(&self.searches) as u32;
        A::add(&self.searches, 1);
        let from = first.wrapping_add(search % if ports == 0 { 1 } else { ports });
        let (begin, start, end) = (first / 512, from / 512, last / 512);
        let mut port = self.free_in::<A>(start, from, last);
        if port == NO_PORT {
            let open = self.open_block::<A>(start, begin, end);
            port = self.free_in::<A>(open, first, last);
        }
        // Of the outer blocks, ports beyond the range may be free.
        if port == NO_PORT {
            port = self.free_in::<A>(begin, first, last);
        }
        if port == NO_PORT {
            port = self.free_in::<A>(end, first, last);
        }
        port
    }

    /// Notes that a flow has the port, which it must have got just now.
    #[inline(always)]
    pub fn mark<A: Atomics>(&self, port: u16) {
        A::add(self.word(port as u32 / 64), 1 << (port % 64));
    }

    /// The next block after `start` in turn, between `begin` and `end`, that is not full; `begin` if
    /// there is none.
    #[inline(always)]
    fn open_block<A: Atomics>(&self, start: u32, begin: u32, end: u32) -> u32 {
        // Without a branch on what is read: the verifier would follow both ways of each.
        let (mut found, mut is_found) = (begin as u64, 0);
        for step in 1..=BLOCKS {
            let block = start.wrapping_add(step) % BLOCKS;
            let (after, before) = (block as i64 - begin as i64 - 1, end as i64 - 1 - block as i64);
            let is_outer = black_box((after | before) >> 63) as u64;
            let free = black_box(!self.common_to::<A>(block));
            let is_open = is_not_zero(free & !is_outer) & !is_found;
            found = (block as u64 & is_open) | (found & !is_open);
            is_found |= is_open;
        }
        found as u32
    }

    /// The bits that all words of a block have set.
    #[inline(always)]
    fn common_to<A: Atomics>(&self, block: u32) -> u64 {
        let word = |n| A::load(self.word(block * BLOCK + n));
        word(0) & word(1) & word(2) & word(3) & word(4) & word(5) & word(6) & word(7)
    }

    /// A port of a block, from `first` to `last`, that no flow has. A function of its own in the
    /// kernel too.
    #[inline(never)]
    fn free_in<A: Atomics>(&self, block: u32, first: u32, last: u32) -> u32 {
        let (mut bits, mut of) = (0, 0);
        for n in 0..BLOCK {
            let number = block.wrapping_mul(BLOCK).wrapping_add(n);
            let free = !A::load(self.word(number)) & inside(number, first, last);
            let is_first = is_not_zero(free) & !is_not_zero(bits);
            bits |= free & is_first;
            of |= number as u64 & is_first;
        }
        let port = (of * 64).wrapping_add(lowest(bits) as u64);
        (port & is_not_zero(bits)) as u32
    }

    #[inline(always)]
    fn word(&self, index: u32) -> &AtomicU64 {
        &self.taken[(index % WORDS) as usize]
    }
}

/// All bits set if any is, else none; hidden from the compiler, which would make branches of it.
#[inline(always)]
fn is_not_zero(bits: u64) -> u64 {
    let sign = (bits | bits.wrapping_neg()) >> 63;
    black_box(sign).wrapping_neg()
}

/// The bits of a word of a bitmap that lie from bit `first` to bit `last` of the whole. No branches.
#[inline(always)]
fn inside(word: u32, first: u32, last: u32) -> u64 {
    let begin = word as i64 * 64;
    let from = clamped(first as i64 - begin);
    let to = clamped(last as i64 + 1 - begin);
    lowest_bits(to) & !lowest_bits(from)
}

/// A number, or the nearest one from 0 to 64.
#[inline(always)]
fn clamped(number: i64) -> u64 {
    let positive = number & !black_box(number >> 63);
    let beyond = positive - 64;
    (64 + (beyond & black_box(beyond >> 63))) as u64
}

/// So many bits, 64 at most.
#[inline(always)]
fn lowest_bits(count: u64) -> u64 {
    (1_u64 << (count & 63)).wrapping_sub(1) | (count >> 6).wrapping_neg()
}

/// The number of the lowest bit that is set. By counting the bits below it in parallel: the
/// compiler's own way is a table, which a BPF program does not have.
#[inline(always)]
fn lowest(bits: u64) -> u32 {
    let bit = black_box(bits & bits.wrapping_neg());
    let below = bit.wrapping_sub(1);
    let pairs = below.wrapping_sub((below >> 1) & 0x5555_5555_5555_5555);
    let fours = (pairs & 0x3333_3333_3333_3333).wrapping_add((pairs >> 2) & 0x3333_3333_3333_3333);
    let bytes = fours.wrapping_add(fours >> 4) & 0x0f0f_0f0f_0f0f_0f0f;
    (bytes.wrapping_mul(0x0101_0101_0101_0101) >> 56) as u32
}

#[cfg(any(test, feature = "std"))]
pub use host::HostAtomics;

#[cfg(any(test, feature = "std"))]
mod host {
    use core::sync::atomic::Ordering::SeqCst;
    use std::boxed::Box;

    use super::*;

    /// The host's instructions.
    #[derive(Debug)]
    pub struct HostAtomics;

    impl Atomics for HostAtomics {
        fn load(word: &AtomicU64) -> u64 {
            word.load(SeqCst)
        }

        fn add(word: &AtomicU64, value: u64) {
            word.fetch_add(value, SeqCst);
        }
    }

    impl PortPool {
        /// A pool whose ports are all free.
        pub fn new() -> Box<Self> {
            Box::new(Self {
                searches: AtomicU64::new(0),
                zero: [0; 7],
                taken: core::array::from_fn(|_| AtomicU64::new(0)),
            })
        }

        /// Gives a port back.
        pub fn release(&self, port: u16) {
            self.word(u32::from(port) / 64).fetch_and(!(1 << (port % 64)), SeqCst);
        }

        /// Makes all ports free; the search begins anew at this one, counted from the first.
        pub fn reset(&self, start: u16) {
            self.taken.iter().for_each(|word| word.store(0, SeqCst));
            self.searches.store(start.into(), SeqCst);
        }

        /// Whether a flow has the port.
        pub fn is_taken(&self, port: u16) -> bool {
            self.word(u32::from(port) / 64).load(SeqCst) >> (port % 64) & 1 != 0
        }

        /// The ports that flows have.
        pub fn ports(&self) -> impl Iterator<Item = u16> {
            let words = (0..=u16::MAX).step_by(64).zip(&self.taken);
            let taken = words.filter(|(_, word)| word.load(SeqCst) != 0);
            taken.flat_map(|(first, _)| (first..=first | 63).filter(|port| self.is_taken(*port)))
        }

        /// Whether no flow has a port.
        pub fn is_empty(&self) -> bool {
            self.taken.iter().all(|word| word.load(SeqCst) == 0)
        }
    }

    impl Clone for PortPool {
        fn clone(&self) -> Self {
            let copy = |word: &AtomicU64| AtomicU64::new(word.load(SeqCst));
            Self {
                searches: copy(&self.searches),
                zero: self.zero,
                taken: core::array::from_fn(|n| copy(&self.taken[n])),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn take(pool: &PortPool, first: u32, last: u32) -> u32 {
        let port = pool.find::<HostAtomics>(first, last);
        if port != NO_PORT {
            pool.mark::<HostAtomics>(port as u16);
        }
        port
    }

    #[test]
    fn every_port_of_a_range_is_given_out_once() {
        for (first, last) in [
            (10_000, 59_999),
            (1, 65_535),
            (1024, 1024),
            (127, 128),
            (511, 512),
            (64, 191),
            (1024, 2047),
            (1023, 2048),
        ] {
            let pool = PortPool::new();
            pool.reset(12_345);
            let ports: BTreeSet<u32> = (first..=last).map(|_| take(&pool, first, last)).collect();
            assert_eq!(ports, (first..=last).collect());
            assert_eq!(take(&pool, first, last), NO_PORT, "{first}-{last}");
            let middle = ((first + last) / 2) as u16;
            pool.release(middle);
            assert_eq!(take(&pool, first, last), u32::from(middle), "the only one that is free");
        }
    }

    /// A port that was given back is the last one to be used again.
    #[test]
    fn a_port_rests_as_long_as_possible() {
        let pool = PortPool::new();
        let first = take(&pool, 10_000, 59_999);
        pool.release(first as u16);
        let until_again = (1..).find(|_| take(&pool, 10_000, 59_999) == first);
        assert_eq!(until_again, Some(50_000));
    }

    #[test]
    fn two_ranges_of_one_pool_do_not_share_a_port() {
        let pool = PortPool::new();
        let one: BTreeSet<u32> = (0..60).map(|_| take(&pool, 2000, 2099)).collect();
        let two: BTreeSet<u32> = (0..60).map(|_| take(&pool, 2050, 2149)).collect();
        assert!(one.is_disjoint(&two));
        assert_eq!((one.len(), two.len()), (60, 60));
    }

    proptest! {
        /// Against a plain set: what is given out is free and in the range, and something is given
        /// out while anything is free.
        #[test]
        fn agrees_with_an_oracle(
            start in any::<u16>(),
            (first, last) in (1_u32..=65_535).prop_flat_map(|first| {
                (Just(first), first..=65_535_u32.min(first + 300))
            }),
            operations in prop::collection::vec(prop::option::weighted(0.4, any::<prop::sample::Index>()), 1..900),
        ) {
            let pool = PortPool::new();
            pool.reset(start);
            let mut taken = BTreeSet::new();
            for operation in operations {
                match operation {
                    Some(index) if !taken.is_empty() => {
                        let ports: Vec<u32> = taken.iter().copied().collect();
                        let port = *index.get(&ports);
                        taken.remove(&port);
                        pool.release(port as u16);
                    }
                    _ => {
                        let port = take(&pool, first, last);
                        if port == NO_PORT {
                            prop_assert_eq!(taken.len() as u32, last - first + 1);
                        } else {
                            prop_assert!((first..=last).contains(&port));
                            prop_assert!(taken.insert(port), "{} twice", port);
                        }
                    }
                }
            }
            prop_assert!(pool.ports().map(u32::from).eq(taken.iter().copied()));
        }
    }
}
