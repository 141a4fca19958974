//! The maps of source address translation, and the pipeline's lookups in them.

use core::intrinsics::{AtomicOrdering, atomic_xadd};
use core::sync::atomic::AtomicU64;

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap};
use lb_common::flow::FlowKey;
use lb_common::snat::{
    Atomics, Entered, MAX_SNAT_ADDRESSES, PortPool, SnatFlow, SnatReturn, SnatSource, SnatTables,
    Stamp,
};
use lb_common::tables::MAX_TARGETS;

use super::Maps;

#[map]
static SNAT_SOURCES: Array<SnatSource> =
    Array::with_max_entries(MAX_TARGETS * MAX_SNAT_ADDRESSES, BPF_F_MMAPABLE);
/// Sized by the agent: one for each target's port and source address.
#[map]
static PORT_POOLS: Array<PortPool> = Array::with_max_entries(1, BPF_F_MMAPABLE);

// Sized by the agent: `flow_table_size`. They hold what cannot be found out again, so nothing is
// evicted: a flow that finds them full is refused. Their memory is taken as it is needed.
#[map]
static SNAT_FLOWS: HashMap<FlowKey, SnatFlow> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
#[map]
static SNAT_RETURNS: HashMap<FlowKey, SnatReturn> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

/// The kernel's error number for what is there already.
const EEXIST: i32 = -17;

/// Writes a stamp in place, in one store: no other field of an entry ever changes.
#[inline(always)]
fn write(stamp: Option<*mut Stamp>, value: Stamp) -> bool {
    let Some(stamp) = stamp else { return false };
    // SAFETY: the first field of an entry of the map. The agent removes dead entries only, a while
    // after they died; should another flow's entry be in its place all the same, then that one
    // lives longer or shorter.
    unsafe { stamp.write_volatile(value) };
    true
}

/// The kernel's atomic instructions, of which the library has none for this target.
pub struct BpfAtomics;

impl Atomics for BpfAtomics {
    #[inline(always)]
    fn load(word: &AtomicU64) -> u64 {
        // SAFETY: a word that is only ever accessed atomically, as an aligned load of it is.
        unsafe { word.as_ptr().read_volatile() }
    }

    #[inline(always)]
    fn add(word: &AtomicU64, value: u64) {
        // SAFETY: as for `load`.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(word.as_ptr(), value) };
    }
}

impl SnatTables for Maps<'_> {
    type Atomics = BpfAtomics;

    #[inline(always)]
    fn source(&self, index: u32) -> Option<&SnatSource> {
        SNAT_SOURCES.get(index)
    }

    #[inline(always)]
    fn pool(&self, number: u32) -> Option<&PortPool> {
        PORT_POOLS.get(number)
    }

    #[inline(always)]
    fn snat_flow(&self, key: &FlowKey) -> Option<SnatFlow> {
        // SAFETY: copied at once.
        unsafe { SNAT_FLOWS.get(key) }.copied()
    }

    #[inline(always)]
    fn snat_return(&self, key: &FlowKey) -> Option<SnatReturn> {
        // SAFETY: copied at once.
        unsafe { SNAT_RETURNS.get(key) }.copied()
    }

    #[inline(always)]
    fn remember_snat(&self, key: &FlowKey, flow: &SnatFlow) -> bool {
        SNAT_FLOWS.insert(key, flow, 0).is_ok()
    }

    #[inline(always)]
    fn enter_snat_return(&self, key: &FlowKey, flow: &SnatReturn) -> Entered {
        match SNAT_RETURNS.insert(key, flow, BPF_NOEXIST.into()) {
            Ok(()) => Entered::New,
            Err(EEXIST) => Entered::Taken,
            Err(_) => Entered::Full,
        }
    }

    #[inline(always)]
    fn forget_snat_return(&self, key: &FlowKey) {
        // Gone already is as good.
        let _ = SNAT_RETURNS.remove(key);
    }

    #[inline(always)]
    fn stamp_snat(&self, key: &FlowKey, stamp: Stamp) -> bool {
        write(SNAT_FLOWS.get_ptr_mut(key).map(|flow| flow.cast()), stamp)
    }

    #[inline(always)]
    fn stamp_snat_return(&self, key: &FlowKey, stamp: Stamp) -> bool {
        write(SNAT_RETURNS.get_ptr_mut(key).map(|flow| flow.cast()), stamp)
    }
}
