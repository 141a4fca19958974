//! The maps, and the pipeline's lookups in them.

mod loads;
mod snat;

use core::arch::asm;
use core::intrinsics::{AtomicOrdering, atomic_xchg};

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_NOEXIST, bpf_fib_lookup as FibLookup, xdp_action};
use aya_ebpf::helpers::{bpf_fib_lookup, bpf_ktime_get_coarse_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{
    Array, DevMapHash, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, RingBuf,
};
use aya_ebpf::programs::XdpContext;
use aya_ebpf::{EbpfContext as _, Global};
use aya_log_ebpf::debug;
use lb_common::flow::{Flow, FlowKey, FlowTable, HashKeys, Keys, ReturnFlow, ReturnTable};
use lb_common::forward::{Handover, Next, Stage, Step};
use lb_common::load::Load;
use lb_common::tables::{
    AdmissionKey, BUCKETS, Bucket, CachedHop, EXCEPTION_WORDS, Endpoint, EndpointKey, FlowChanges,
    GONE, Interface, Listener, MAX_DEVICES, MAX_DIRECT_FLOWS, MAX_LISTENERS, MAX_PREFIXES,
    MAX_RINGS, MAX_TARGETS, NEXT_HOP_CACHE, NIC_PLACES, NextHop, OVERFLOW_ENDPOINTS, Slot, Tables,
    Target, Traffic,
};
use lb_common::verdict::DropReason;
use lb_common::wire::Address;
use lb_common::wire::eth::{Macs, OwnMac};

// Arrays that the agent writes through shared memory, word by word.
#[map]
static ENDPOINTS: Array<Bucket> = Array::with_max_entries(BUCKETS, BPF_F_MMAPABLE);
#[map]
static NIC_MACS: Array<OwnMac> = Array::with_max_entries(NIC_PLACES, BPF_F_MMAPABLE);
#[map]
static TARGETS: Array<Target> = Array::with_max_entries(MAX_TARGETS, BPF_F_MMAPABLE);
#[map]
static LISTENERS: Array<Listener> = Array::with_max_entries(MAX_LISTENERS, BPF_F_MMAPABLE);
/// All rings, one after the other. The agent sizes it: rings times ring size.
#[map]
static SLOTS: Array<Slot> = Array::with_max_entries(MAX_RINGS, BPF_F_MMAPABLE);
/// Flows that the slots' targets are wrong for, by a bit of their hash: those of mapped slots.
#[map]
static EXCEPTIONS: Array<u64> = Array::with_max_entries(EXCEPTION_WORDS, BPF_F_MMAPABLE);
/// Counts every change of routes, neighbours and links; makes cached next hops void.
#[map]
static GENERATION: Array<u32> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
static OVERFLOW: HashMap<EndpointKey, Endpoint> = HashMap::with_max_entries(OVERFLOW_ENDPOINTS, 0);
#[map]
static ADMISSION: LpmTrie<AdmissionKey, u32> = LpmTrie::with_max_entries(MAX_PREFIXES, 0);
#[map]
static INTERFACES: HashMap<u32, Interface> = HashMap::with_max_entries(MAX_DEVICES, 0);
#[map]
static DEVICES: DevMapHash = DevMapHash::with_max_entries(MAX_DEVICES, 0);

// Sized by the agent: `flow_table_size`, `half_open_table_size`, `once_seen_table_size`. Ways back as
// flows and as half-open flows.
#[map]
static FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(1, 0);
#[map]
static HALF_OPEN: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(1, 0);
#[map]
static ONCE_SEEN: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(1, 0);
/// How many entries each of the three got, and how many were taken out again: what is neither
/// there nor taken out was evicted.
#[map]
static FLOW_CHANGES: PerCpuArray<FlowChanges> =
    PerCpuArray::with_max_entries(FlowTable::ALL.len() as u32, 0);
#[map]
static RETURN_FLOWS: LruHashMap<FlowKey, ReturnFlow> = LruHashMap::with_max_entries(1, 0);
#[map]
static FRESH_RETURNS: LruHashMap<FlowKey, ReturnFlow> = LruHashMap::with_max_entries(1, 0);
#[map]
static DIRECT_FLOWS: LruHashMap<FlowKey, u32> = LruHashMap::with_max_entries(MAX_DIRECT_FLOWS, 0);
#[map]
static NEXT_HOPS: PerCpuArray<CachedHop> = PerCpuArray::with_max_entries(NEXT_HOP_CACHE, 0);

#[map]
static LISTENER_TRAFFIC: PerCpuArray<Traffic> = PerCpuArray::with_max_entries(MAX_LISTENERS, 0);
#[map]
static TARGET_TRAFFIC: PerCpuArray<Traffic> = PerCpuArray::with_max_entries(MAX_TARGETS, 0);
#[map]
static DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(DropReason::ALL.len() as u32, 0);

/// Addresses whose next hop was missing, for the agent.
#[map]
static UNRESOLVED: RingBuf = RingBuf::with_byte_size(1 << 14, 0);

/// The programs of the later stages, by number.
#[map]
static STAGES: ProgramArray = ProgramArray::with_max_entries(Stage::ALL.len() as u32, 0);
/// What one stage leaves to the next.
#[map]
static STEP: PerCpuArray<Step> = PerCpuArray::with_max_entries(1, 0);

/// Keys of the flow hash, set by the agent before the program is loaded.
#[unsafe(no_mangle)]
static HASH_KEYS: Global<[u32; HashKeys::LEN]> = Global::new([0; HashKeys::LEN]);
/// Slots of a ring, set by the agent before the program is loaded.
#[unsafe(no_mangle)]
static RING_SIZE: Global<u32> = Global::new(1);

/// The kernel's tables, as one packet sees them.
pub struct Maps<'a> {
    ctx: &'a XdpContext,
}

impl<'a> Maps<'a> {
    /// The tables.
    #[inline(always)]
    pub fn new(ctx: &'a XdpContext) -> Self {
        Self { ctx }
    }

    /// The step as the first stage looks for it.
    #[inline(always)]
    pub fn first(&self) -> Lazy<'_> {
        Lazy { maps: self }
    }

    /// What one stage leaves to the next.
    #[inline(always)]
    pub fn step(&self) -> Option<&'a mut Step> {
        // SAFETY: this CPU's element; no other program run touches it before this one ends.
        STEP.get_ptr_mut(0).map(|step| unsafe { &mut *step })
    }

    /// Goes on with a later stage.
    #[inline(always)]
    pub fn hand_over(&self, ctx: &XdpContext, stage: Stage, next: Next) -> u32 {
        self.first().with_step(|step| step.prepare(next));
        match stage {
            Stage::Answer => jump::<{ Stage::Answer as u32 }>(ctx),
            Stage::Encapsulate => jump::<{ Stage::Encapsulate as u32 }>(ctx),
            Stage::SnatRequest => jump::<{ Stage::SnatRequest as u32 }>(ctx),
            Stage::SnatSearch => jump::<{ Stage::SnatSearch as u32 }>(ctx),
            Stage::SnatOpen => jump::<{ Stage::SnatOpen as u32 }>(ctx),
            Stage::SnatReply => jump::<{ Stage::SnatReply as u32 }>(ctx),
            Stage::IcmpError => jump::<{ Stage::IcmpError as u32 }>(ctx),
            Stage::Echo => jump::<{ Stage::Echo as u32 }>(ctx),
        }
        // It is back: the agent has not put the stage there.
        self.count_drop(DropReason::TableInconsistent as u32);
        xdp_action::XDP_DROP
    }

    /// Sends the packet out of another NIC.
    #[inline(always)]
    pub fn redirect(&self, ifindex: u32) -> u32 {
        match DEVICES.redirect(ifindex, 0) {
            Ok(action) => action,
            Err(_) => {
                self.count_drop(DropReason::NextHopUnresolved as u32);
                xdp_action::XDP_DROP
            }
        }
    }

    /// Off the hot path: only a packet that dies comes here.
    #[inline(never)]
    fn log_drop(&self, reason: u32) {
        debug!(self.ctx, "dropped for reason {}", reason);
    }

    /// Asks the kernel's routes, and remembers the answer. Host code has no part in this: its model
    /// is given the routes.
    #[inline(never)]
    fn look_up_route(&self, source: &Address, query: &RouteQuery, cached: &mut CachedHop) -> i32 {
        // SAFETY: all zero is a valid request.
        let mut request: FibLookup = unsafe { core::mem::zeroed() };
        request.ifindex = query.ingress;
        if query.destination.is_v4() {
            request.family = AF_INET;
            request.__bindgen_anon_3.ipv4_src = source.low32().raw();
            request.__bindgen_anon_4.ipv4_dst = query.destination.low32().raw();
        } else {
            request.family = AF_INET6;
            request.__bindgen_anon_3.ipv6_src = source.quarters();
            request.__bindgen_anon_4.ipv6_dst = query.destination.quarters();
        }
        let size = size_of::<FibLookup>() as i32;
        // SAFETY: the context is the one the kernel gave, the request is as long as said.
        let result =
            unsafe { bpf_fib_lookup(self.ctx.as_ptr(), (&raw mut request).cast(), size, 0) };
        if result != 0 {
            self.report_unresolved(query.destination);
            return result as i32;
        }
        // SAFETY: nothing in the agent or here removes an interface's entry and reuses its memory
        // within a program's run (RCU).
        let Some(interface) = (unsafe { INTERFACES.get(request.ifindex) }) else {
            self.report_unresolved(query.destination);
            return NOT_ATTACHED;
        };
        *cached = CachedHop {
            destination: query.destination,
            generation: query.generation,
            hop: NextHop {
                ifindex: interface.ifindex,
                macs: Macs::new(request.dmac, request.smac),
                vlan: interface.vlan,
                mtu: interface.mtu,
            },
        };
        0
    }

    #[inline(never)]
    fn log_unresolved(&self, result: i32) {
        debug!(self.ctx, "no next hop for a reply: bpf_fib_lookup says {}", result);
    }
}

/// Goes on with the program of a stage; comes back only if there is none. Of a number that it knows
/// beforehand the kernel makes a direct jump. The comment in the machine's language is a different
/// one for each stage: so the compiler does not make one call of all.
#[inline(always)]
fn jump<const STAGE: u32>(ctx: &XdpContext) {
    // SAFETY: nothing here waits to be dropped, and a comment does nothing.
    unsafe {
        STAGES.tail_call(ctx, STAGE);
        asm!("// stage {}", const STAGE, options(nomem, nostack, preserves_flags));
    }
}

/// The step, looked up when it is needed.
pub struct Lazy<'a> {
    maps: &'a Maps<'a>,
}

impl Handover for Lazy<'_> {
    #[inline(always)]
    fn step(&mut self) -> Option<&mut Step> {
        self.maps.step()
    }
}

/// The way out is a NIC that lb is not attached to; beside the results of `bpf_fib_lookup`.
const NOT_ATTACHED: i32 = -1;

/// What a route is asked for.
struct RouteQuery {
    destination: Address,
    ingress: u32,
    generation: u32,
}

/// Off the path of open listeners, with a stack frame of its own for the key.
#[inline(never)]
fn admits(class: u32, high: u64, low: u64) -> bool {
    let bits = 8 * size_of::<AdmissionKey>() as u32;
    let key = AdmissionKey::new(class, Address::from_words([high, low]));
    ADMISSION.get(Key::new(bits, key)).is_some()
}

#[inline(always)]
fn flow_map(table: FlowTable) -> &'static LruHashMap<FlowKey, Flow> {
    match table {
        FlowTable::Flows => &FLOWS,
        FlowTable::HalfOpen => &HALF_OPEN,
        FlowTable::OnceSeen => &ONCE_SEEN,
    }
}

#[inline(always)]
fn return_map(table: ReturnTable) -> &'static LruHashMap<FlowKey, ReturnFlow> {
    match table {
        ReturnTable::Established => &RETURN_FLOWS,
        ReturnTable::Fresh => &FRESH_RETURNS,
    }
}

/// Each of these is a function of its own in the kernel too, told the table by number: what follows
/// is looked at once by the verifier. What they return is for the verifier's sake as well.
#[inline(never)]
fn insert_flow(table: u32, key: &FlowKey, flow: &Flow) -> u32 {
    let table = FlowTable::of(table);
    if flow_map(table).insert(key, flow, BPF_NOEXIST as u64).is_ok() {
        count_change(table, |changes| changes.created += 1);
        return 0;
    }
    let replaced = if table == FlowTable::Flows { open_target(key) } else { 0 };
    // It is there, or nothing at all could be evicted: that leaves the flow as if it had been
    // evicted right away.
    let _ = flow_map(table).insert(key, flow, 0);
    replaced
}

/// The target of a flow that is remembered and not closing; 0: there is none.
#[inline(always)]
fn open_target(key: &FlowKey) -> u32 {
    // SAFETY: copied at once.
    match unsafe { FLOWS.get(key) } {
        Some(flow) if flow.closing == 0 => flow.target,
        _ => 0,
    }
}

#[inline(never)]
fn refresh_flow(table: u32, key: &FlowKey, last_seen: u64, closing: u32) -> u32 {
    // In place: an update would put the entry elsewhere in its bucket, where the agent's walk could
    // miss it. The target stays as it is.
    let Some(entry) = flow_map(FlowTable::of(table)).get_ptr_mut(key) else { return GONE };
    // SAFETY: the map's element. Should it be evicted and used again right now, another flow is
    // taken for alive a little longer, or for over a little sooner.
    unsafe {
        (&raw mut (*entry).last_seen).write_volatile(last_seen);
        let end = &raw mut (*entry).closing;
        let before = end.read_volatile();
        if before == closing {
            return before;
        }
        // Of several CPUs one is told of the change: a connection is counted once.
        atomic_xchg::<u32, { AtomicOrdering::Relaxed }>(end, closing)
    }
}

/// A return flow that is there only gets the new time, in place: an update is ten times as much work.
#[inline(never)]
fn enter_return(table: ReturnTable, key: &FlowKey, flow: &ReturnFlow) -> i32 {
    let map = return_map(table);
    if let Some(entry) = map.get_ptr_mut(key) {
        // SAFETY: the map's element. See `refresh_flow`.
        unsafe {
            let same = (*entry).listener == flow.listener && (*entry).target == flow.target;
            if same {
                (&raw mut (*entry).last_seen).write_volatile(flow.last_seen);
                return 0;
            }
        }
    }
    // As for `insert_flow`.
    let _ = map.insert(key, flow, 0);
    0
}

#[inline(never)]
fn remove_flow(table: u32, key: &FlowKey) -> u32 {
    let table = FlowTable::of(table);
    let is_removed = flow_map(table).remove(key).is_ok();
    if is_removed {
        count_change(table, |changes| changes.removed += 1);
    }
    is_removed as u32
}

#[inline(always)]
fn count_change(table: FlowTable, change: impl FnOnce(&mut FlowChanges)) {
    if let Some(changes) = FLOW_CHANGES.get_ptr_mut(table as u32) {
        // SAFETY: this CPU's element; no other program run touches it before this one ends.
        change(unsafe { &mut *changes });
    }
}

/// Changes a counter of this CPU.
#[inline(always)]
fn update(counter: Option<*mut Traffic>, change: impl FnOnce(&mut Traffic)) {
    if let Some(counter) = counter {
        // SAFETY: this CPU's element; no other program run touches it before this one ends.
        change(unsafe { &mut *counter });
    }
}

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// The keys in the program's read-only data.
pub struct RodataKeys;

impl Keys for RodataKeys {
    #[inline(always)]
    fn key<const N: usize>(&self) -> u32 {
        let first = (&raw const HASH_KEYS).cast::<u32>();
        // SAFETY: `N` is less than `LEN`. Volatile, because the agent sets the value after the
        // compiler has seen it; one at a time, because a load of all would load the unused too.
        unsafe { first.add(N).read_volatile() }
    }
}

impl Tables for Maps<'_> {
    type Keys = RodataKeys;

    #[inline(always)]
    fn keys(&self) -> &RodataKeys {
        &RodataKeys
    }

    #[inline(always)]
    fn ring_size(&self) -> u32 {
        RING_SIZE.load()
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // As of the last timer interrupt, a few milliseconds ago at most: what is remembered is good
        // for seconds, and the exact clock costs every tracked packet 15 ns more (docs/adr/0011).
        // SAFETY: a helper without arguments.
        unsafe { bpf_ktime_get_coarse_ns() }
    }

    #[inline(always)]
    fn own_mac(&self, nic: u32) -> OwnMac {
        NIC_MACS.get(nic % NIC_PLACES).copied().unwrap_or(OwnMac::UNKNOWN)
    }

    #[inline(always)]
    fn bucket(&self, index: u32) -> Option<&Bucket> {
        ENDPOINTS.get(index)
    }

    #[inline(always)]
    fn overflow(&self, key: &EndpointKey) -> Option<Endpoint> {
        // SAFETY: copied at once; an entry that is replaced meanwhile is one or the other.
        unsafe { OVERFLOW.get(key) }.copied()
    }

    #[inline(always)]
    fn listener(&self, index: u32) -> Option<&Listener> {
        LISTENERS.get(index)
    }

    #[inline(always)]
    fn target(&self, index: u32) -> Option<&Target> {
        TARGETS.get(index)
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<Slot> {
        SLOTS.get(index).copied()
    }

    #[inline(always)]
    fn exceptions(&self, word: u32) -> u64 {
        EXCEPTIONS.get(word).copied().unwrap_or(u64::MAX)
    }

    #[inline(always)]
    fn admits(&self, class: u32, source: Address) -> bool {
        let [high, low] = source.words();
        admits(class, high, low)
    }

    #[inline(always)]
    fn flow(&self, table: FlowTable, key: &FlowKey) -> Option<Flow> {
        // SAFETY: copied at once.
        unsafe { flow_map(table).get(key) }.copied()
    }

    #[inline(always)]
    fn remember(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> u32 {
        insert_flow(table as u32, key, flow)
    }

    #[inline(always)]
    fn refresh(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> u32 {
        refresh_flow(table as u32, key, flow.last_seen, flow.closing)
    }

    #[inline(always)]
    fn forget(&self, table: FlowTable, key: &FlowKey) -> u32 {
        remove_flow(table as u32, key)
    }

    #[inline(always)]
    fn load(&self, target: u32) -> Load {
        loads::load(target)
    }

    #[inline(always)]
    fn change_load(&self, target: u32, change: u64) {
        loads::change(target, change);
    }

    #[inline(always)]
    fn return_flow(&self, table: ReturnTable, key: &FlowKey) -> Option<ReturnFlow> {
        // SAFETY: copied at once.
        unsafe { return_map(table).get(key) }.copied()
    }

    #[inline(always)]
    fn remember_return(&self, table: ReturnTable, key: &FlowKey, flow: &ReturnFlow) {
        enter_return(table, key, flow);
    }

    #[inline(always)]
    fn forget_fresh_return(&self, key: &FlowKey) {
        // Gone already is as good.
        let _ = FRESH_RETURNS.remove(key);
    }

    #[inline(always)]
    fn has_direct_flows(&self, _index: u32, target: &Target) -> bool {
        target.is_direct != 0
    }

    #[inline(always)]
    fn note_direct_flow(&self, target: u32, key: &FlowKey) {
        // As for `remember`; first the entry, then the flag that leads to it.
        let _ = DIRECT_FLOWS.insert(key, 1, 0);
        if let Some(target) = TARGETS.get_ptr_mut(target) {
            // SAFETY: the array's element, of which programs write this word only, and only 1.
            unsafe { (&raw mut (*target).is_direct).write_volatile(1) };
        }
    }

    #[inline(always)]
    fn is_direct_flow(&self, key: &FlowKey) -> bool {
        // SAFETY: only its presence matters.
        unsafe { DIRECT_FLOWS.get(key) }.is_some()
    }

    #[inline(always)]
    fn forget_direct_flow(&self, key: &FlowKey) {
        // Gone already is as good.
        let _ = DIRECT_FLOWS.remove(key);
    }

    #[inline(always)]
    fn route(&self, ingress: u32, source: Address, destination: Address) -> Option<&NextHop> {
        let generation = GENERATION.get(0).copied().unwrap_or(0);
        let key = EndpointKey::of_address(destination);
        let index = (self.keys().endpoint(&key) >> (64 - NEXT_HOP_CACHE.ilog2())) as u32;
        // SAFETY: this CPU's element; no other program run touches it before this one ends.
        let cached = unsafe { &mut *NEXT_HOPS.get_ptr_mut(index)? };
        let is_known = cached.destination == destination
            && cached.generation == generation
            && cached.hop.ifindex != 0;
        if !is_known {
            let query = RouteQuery { destination, ingress, generation };
            let result = self.look_up_route(&source, &query, cached);
            if result != 0 {
                self.log_unresolved(result);
                return None;
            }
        }
        Some(&cached.hop)
    }

    #[inline(always)]
    fn report_unresolved(&self, address: Address) {
        // A full buffer means that the agent knows plenty of them.
        let _ = UNRESOLVED.output::<Address>(address, 0);
    }

    #[inline(always)]
    fn count_request(&self, listener: u32, target: u32, bytes: u64, new_flows: u32) {
        let count = |traffic: &mut Traffic| {
            traffic.packets += 1;
            traffic.bytes += bytes;
            traffic.new_flows += new_flows as u64;
        };
        update(LISTENER_TRAFFIC.get_ptr_mut(listener), count);
        update(TARGET_TRAFFIC.get_ptr_mut(target), count);
    }

    #[inline(always)]
    fn count_proxied(&self, listener: u32, bytes: u64, new_flows: u32) {
        update(LISTENER_TRAFFIC.get_ptr_mut(listener), |traffic| {
            traffic.packets += 1;
            traffic.bytes += bytes;
            traffic.new_flows += new_flows as u64;
        });
    }

    #[inline(always)]
    fn count_reply(&self, listener: u32, target: u32, bytes: u64) {
        let count = |traffic: &mut Traffic| {
            traffic.reply_packets += 1;
            traffic.reply_bytes += bytes;
        };
        update(LISTENER_TRAFFIC.get_ptr_mut(listener), count);
        update(TARGET_TRAFFIC.get_ptr_mut(target), count);
    }

    #[inline(always)]
    fn count_drop(&self, reason: u32) {
        if let Some(counter) = DROPS.get_ptr_mut(reason) {
            // SAFETY: this CPU's element.
            unsafe { *counter += 1 };
        }
        self.log_drop(reason);
    }
}
