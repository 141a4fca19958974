//! The maps of a target, and the pipeline's lookups in them.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray};
use lb_common::flow::FlowKey;
use lb_common::tables::{AdmissionKey, EndpointKey};
use lb_common::target::tables::{
    CLASS_WORDS, CLASSES_IN_WORD, MAX_SENDERS, MAX_TUNNEL_ENDS, OwnFlow, Settings, TargetTables,
    Unwrapped,
};
use lb_common::verdict::DropReason;
use lb_common::wire::Address;

// Arrays that the agent writes through shared memory, word by word.
#[map]
static TARGET_SETTINGS: Array<Settings> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Classes, four in a word.
#[map]
static CLASSES: Array<u64> = Array::with_max_entries(CLASS_WORDS, BPF_F_MMAPABLE);

#[map]
static TUNNEL_ENDS: HashMap<EndpointKey, u32> = HashMap::with_max_entries(MAX_TUNNEL_ENDS, 0);
#[map]
static SENDERS: LpmTrie<AdmissionKey, u32> = LpmTrie::with_max_entries(MAX_SENDERS, 0);

// Sized by the agent.
#[map]
static OWN_FLOWS: LruHashMap<FlowKey, OwnFlow> = LruHashMap::with_max_entries(1, 0);
#[map]
static ADMITTED_FLOWS: LruHashMap<FlowKey, u64> = LruHashMap::with_max_entries(1, 0);

#[map]
static UNWRAPPED: PerCpuArray<Unwrapped> = PerCpuArray::with_max_entries(1, 0);
#[map]
static TARGET_DROPS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(DropReason::ALL.len() as u32, 0);

/// The kernel's tables.
pub struct Maps;

/// With a stack frame of its own for the key.
#[inline(never)]
fn admits(class: u32, high: u64, low: u64) -> bool {
    let bits = 8 * size_of::<AdmissionKey>() as u32;
    let key = AdmissionKey::new(class, Address::from_words([high, low]));
    SENDERS.get(Key::new(bits, key)).is_some()
}

impl TargetTables for Maps {
    #[inline(always)]
    fn settings(&self) -> Settings {
        TARGET_SETTINGS.get(0).copied().unwrap_or(Settings { flags: 0, zero: 0 })
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn is_tunnel_end(&self, end: &EndpointKey) -> bool {
        // SAFETY: only its presence matters.
        unsafe { TUNNEL_ENDS.get(end) }.is_some()
    }

    #[inline(always)]
    fn class(&self, index: u32) -> u16 {
        let Some(word) = CLASSES.get(index / CLASSES_IN_WORD) else { return 0 };
        (*word >> (16 * (index % CLASSES_IN_WORD))) as u16
    }

    #[inline(always)]
    fn admits(&self, class: u32, sender: Address) -> bool {
        let [high, low] = sender.words();
        admits(class, high, low)
    }

    #[inline(always)]
    fn own_flow(&self, key: &FlowKey) -> Option<OwnFlow> {
        // SAFETY: copied at once.
        unsafe { OWN_FLOWS.get(key) }.copied()
    }

    #[inline(always)]
    fn remember_own(&self, key: &FlowKey, flow: &OwnFlow) {
        // A full table evicts its oldest entry; that nothing at all could be evicted leaves the
        // flow as if it had been evicted right away.
        let _ = OWN_FLOWS.insert(key, flow, 0);
    }

    #[inline(always)]
    fn admitted(&self, key: &FlowKey) -> Option<u64> {
        // SAFETY: copied at once.
        unsafe { ADMITTED_FLOWS.get(key) }.copied()
    }

    #[inline(always)]
    fn remember_admitted(&self, key: &FlowKey, now: u64) {
        // As for `remember_own`.
        let _ = ADMITTED_FLOWS.insert(key, now, 0);
    }

    #[inline(always)]
    fn count_unwrapped(&self, bytes: u64) {
        if let Some(counter) = UNWRAPPED.get_ptr_mut(0) {
            // SAFETY: this CPU's element; no other run of the program touches it meanwhile.
            let counter = unsafe { &mut *counter };
            counter.packets += 1;
            counter.bytes += bytes;
        }
    }

    #[inline(always)]
    fn count_drop(&self, reason: u32) {
        if let Some(counter) = TARGET_DROPS.get_ptr_mut(reason) {
            // SAFETY: as above.
            unsafe { *counter += 1 };
        }
    }
}
