//! How many connections targets have: shared with the agent, each side writes words of its own.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::macros::map;
use aya_ebpf::maps::Array;
use lb_common::load::{Load, Share};
use lb_common::tables::MAX_TARGETS;

#[map]
static LOADS: Array<Load> = Array::with_max_entries(MAX_TARGETS, BPF_F_MMAPABLE);

/// How many connections a target has; all zero beyond the table's end.
#[inline(always)]
pub fn load(target: u32) -> Load {
    let Some(load) = LOADS.get_ptr(target) else {
        return Load { balance: 0, correction: 0, share: Share { weight: 0, group: 0 } };
    };
    // SAFETY: the array's element, whose words are written one by one.
    unsafe {
        Load {
            balance: (&raw const (*load).balance).read_volatile(),
            correction: (&raw const (*load).correction).read_volatile(),
            share: (&raw const (*load).share).read_volatile(),
        }
    }
}

/// Adds to what programs have seen of a target. A function of its own in the kernel too; what it
/// returns is for the verifier's sake.
#[inline(never)]
pub fn change(target: u32, change: u64) -> u32 {
    if let Some(load) = LOADS.get_ptr_mut(target) {
        // SAFETY: the array's element, of which programs write this word only, and only atomically.
        unsafe {
            let balance = &raw mut (*load).balance;
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(balance, change);
        }
    }
    0
}
