//! The kernel's side of the agent: load, attach, write what a plan says, read the counters.

mod attach;
mod flows;
mod kernel;
mod mapped;
mod pod;
mod snat;

use std::collections::BTreeMap;
use std::iter::repeat;
use std::mem::offset_of;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, anyhow};
use aya::maps::lpm_trie::Key;
use aya::maps::xdp::DevMapHash;
use aya::maps::{
    HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, PerCpuValues, ProgramArray, RingBuf,
};
use aya::programs::{ProgramInfo, Xdp};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use lb_common::endpoints::{EndpointTable, Write};
use lb_common::flow::{FlowTable, HashKeys};
use lb_common::forward::Stage;
use lb_common::load::Load;
use lb_common::tables::{
    AdmissionKey, BUCKETS, Bucket, EXCEPTION_WORDS, Endpoint, EndpointKey, Interface, Listener,
    MAX_LISTENERS, MAX_RINGS, MAX_TARGETS, NIC_PLACES, Slot, Target, Traffic,
};
use lb_common::verdict::DropReason;
use lb_common::wire::eth::OwnMac;

use crate::agent::Attaches;
use crate::config::XdpMode;
use crate::netlink;
use crate::reconcile::{Plan, Prefix, Step};
use crate::state::Counters;

use flows::FlowMeter;

pub use attach::{Attachment, attach as attach_xdp, check_privileges};
pub use flows::{FlowTableUsage, FlowTables, map_name};
pub use kernel::{OLDEST as OLDEST_KERNEL, explain as explain_kernel};
pub use mapped::MappedArray;
pub use pod::Raw;
pub use snat::{PortPools, SnatTables};

/// The eBPF object, as `build.rs` made it.
pub static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf"));
/// The balancer's program in it.
pub const PROGRAM: &str = "lb_balancer";

/// What is fixed while the program is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    /// Key of the flow hash.
    pub hash_seed: u64,
    /// Slots of each ring; a prime.
    pub ring_size: u32,
    /// Capacity of the table of flows, and of that of replies' flows, entries.
    pub flow_table_size: u32,
    /// Pools of source ports: one for each (target address, port, protocol) and source address.
    pub port_pools: u32,
    /// Capacity of the table of half-open flows, entries.
    pub half_open_table_size: u32,
    /// Capacity of the table of flows seen once, entries.
    pub once_seen_table_size: u32,
    /// Whether the program's own messages are wanted (level debug). Compiled into the program as
    /// a constant, so that without it the verifier removes them.
    pub log: bool,
}

/// The word of a target that the kernel writes.
const KERNELS_WORD: usize = offset_of!(Target, is_direct) / 8;

type Owned<K, V> = HashMap<MapData, Raw<K>, Raw<V>>;

/// The loaded program and its maps. Dropping it detaches and frees everything.
pub struct Dataplane {
    ebpf: Ebpf,
    /// With its last descriptor it would forget the programs.
    _stages: ProgramArray<MapData>,
    attachments: Vec<Attachment>,
    ring_size: u32,
    table: EndpointTable,
    endpoints: MappedArray<Bucket>,
    nic_macs: MappedArray<OwnMac>,
    targets: MappedArray<Target>,
    loads: Arc<MappedArray<Load>>,
    listeners: MappedArray<Listener>,
    slots: MappedArray<Slot>,
    exceptions: MappedArray<u64>,
    generation: MappedArray<u32>,
    overflow: Owned<EndpointKey, Endpoint>,
    admission: LpmTrie<MapData, Raw<AdmissionKey>, u32>,
    interfaces: HashMap<MapData, u32, Raw<Interface>>,
    devices: DevMapHash<MapData>,
    flows: FlowMeter,
    snat: snat::Snat,
    listener_traffic: PerCpuArray<MapData, Raw<Traffic>>,
    target_traffic: PerCpuArray<MapData, Raw<Traffic>>,
    drops: PerCpuArray<MapData, u64>,
    unresolved: Option<RingBuf<MapData>>,
}

impl Dataplane {
    /// Loads the program into the kernel, attached to nothing yet.
    ///
    /// # Errors
    /// Missing privileges or memory, a kernel too old, and what the verifier says.
    pub fn load(options: &LoadOptions) -> anyhow::Result<Self> {
        Self::load_object(OBJECT, options).map_err(kernel::explain)
    }

    /// Loads another build of [`OBJECT`], to compare the two. Its maps must be the same.
    ///
    /// # Errors
    /// As [`Self::load`]; or if it is no such object.
    pub fn load_object(object: &[u8], options: &LoadOptions) -> anyhow::Result<Self> {
        let keys = HashKeys::from_seed(options.hash_seed);
        let log_level: u8 = if options.log { u8::MAX } else { 0 };
        let slots = MAX_RINGS * options.ring_size;
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("SLOTS", slots)
            .map_max_entries(map_name(FlowTable::Flows), options.flow_table_size)
            .map_max_entries(map_name(FlowTable::HalfOpen), options.half_open_table_size)
            .map_max_entries(map_name(FlowTable::OnceSeen), options.once_seen_table_size)
            .map_max_entries("RETURN_FLOWS", options.flow_table_size)
            .map_max_entries("FRESH_RETURNS", options.half_open_table_size)
            .map_max_entries("SNAT_FLOWS", options.flow_table_size)
            .map_max_entries("SNAT_RETURNS", options.flow_table_size)
            .map_max_entries("PORT_POOLS", options.port_pools)
            .override_global("HASH_KEYS", &keys.words()[..], true)
            .override_global("RING_SIZE", &options.ring_size, true)
            .override_global("AYA_LOG_LEVEL", &log_level, true)
            .load(object)
            .context("load the maps into the kernel")?;
        program(&mut ebpf, PROGRAM)?.load().context("load the XDP program into the kernel")?;
        let stages = load_stages(&mut ebpf)?;
        Ok(Self {
            _stages: stages,
            ring_size: options.ring_size,
            table: EndpointTable::new(keys),
            endpoints: mapped(&mut ebpf, "ENDPOINTS", BUCKETS)?,
            nic_macs: mapped(&mut ebpf, "NIC_MACS", NIC_PLACES)?,
            targets: mapped(&mut ebpf, "TARGETS", MAX_TARGETS)?,
            loads: Arc::new(mapped(&mut ebpf, "LOADS", MAX_TARGETS)?),
            listeners: mapped(&mut ebpf, "LISTENERS", MAX_LISTENERS)?,
            slots: mapped(&mut ebpf, "SLOTS", slots)?,
            exceptions: mapped(&mut ebpf, "EXCEPTIONS", EXCEPTION_WORDS)?,
            generation: mapped(&mut ebpf, "GENERATION", 1)?,
            overflow: take(&mut ebpf, "OVERFLOW")?.try_into()?,
            admission: take(&mut ebpf, "ADMISSION")?.try_into()?,
            interfaces: take(&mut ebpf, "INTERFACES")?.try_into()?,
            devices: take(&mut ebpf, "DEVICES")?.try_into()?,
            flows: FlowMeter::new(&mut ebpf)?,
            snat: snat::Snat::new(&mut ebpf, options.port_pools)?,
            listener_traffic: take(&mut ebpf, "LISTENER_TRAFFIC")?.try_into()?,
            target_traffic: take(&mut ebpf, "TARGET_TRAFFIC")?.try_into()?,
            drops: take(&mut ebpf, "DROPS")?.try_into()?,
            unresolved: Some(take(&mut ebpf, "UNRESOLVED")?.try_into()?),
            attachments: Vec::new(),
            ebpf,
        })
    }

    /// The loaded program of the first stage, for program runs.
    ///
    /// # Errors
    /// Never, once loaded.
    pub fn program(&mut self) -> anyhow::Result<&mut Xdp> {
        program(&mut self.ebpf, PROGRAM)
    }

    /// All programs: their names and what the kernel says of them.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn programs(&mut self) -> anyhow::Result<Vec<(&'static str, ProgramInfo)>> {
        let names = [PROGRAM].into_iter().chain(Stage::ALL.map(Stage::program));
        names.map(|name| Ok((name, program(&mut self.ebpf, name)?.info()?))).collect()
    }

    /// The object, for the log of the eBPF side.
    pub fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Addresses whose next hop the kernel missed. Can be taken once.
    pub fn take_unresolved(&mut self) -> Option<RingBuf<MapData>> {
        self.unresolved.take()
    }

    /// Carries out a plan, in its order.
    ///
    /// # Errors
    /// A full map, or memory running out; the steps before stay in force.
    pub fn apply(&mut self, plan: &Plan) -> anyhow::Result<()> {
        for step in &plan.steps {
            self.step(step).with_context(|| format!("write to the kernel: {step}"))?;
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> anyhow::Result<()> {
        if self.snat.step(step) {
            return Ok(());
        }
        match step {
            Step::SetInterface(index, interface) => {
                self.interfaces.insert(index, Raw(*interface), 0)?;
            }
            Step::RemoveInterface(index) => map_removed(self.interfaces.remove(index))?,
            Step::AddDevice(index) => self.devices.insert(*index, *index, None, 0)?,
            Step::RemoveDevice(index) => map_removed(self.devices.remove(*index))?,
            Step::SetOwnMac(place, mac) => self.nic_macs.store(*place, mac),
            Step::ForgetOwnMac(place) => self.nic_macs.store(*place, &OwnMac::UNKNOWN),
            Step::SetTarget(index, target) => {
                self.targets.store_front(*index, target, KERNELS_WORD);
            }
            Step::ClearTarget(index) => {
                self.targets.store(*index, &Target::default());
                self.zero(*index, Counter::Target)?;
            }
            Step::SetShare(index, share) => {
                let share: u64 = bytemuck::cast(*share);
                self.load_word(*index, offset_of!(Load, share))?.store(share, Ordering::SeqCst);
            }
            Step::ClearShare(index) => self.loads.store(*index, &Load::default()),
            Step::SetListener(index, listener) => self.listeners.store(*index, listener),
            Step::ClearListener(index) => {
                self.listeners.store(*index, &Listener::default());
                self.zero(*index, Counter::Listener)?;
            }
            Step::SetRing(ring, slots) => {
                let first = ring * self.ring_size;
                for (slot, index) in slots.iter().zip(first..) {
                    self.slots.store(index, slot);
                }
            }
            Step::AddPrefix(class, prefix) => {
                self.admission.insert(&trie_key(*class, prefix), 1, 0)?;
            }
            Step::RemovePrefix(class, prefix) => {
                map_removed(self.admission.remove(&trie_key(*class, prefix)))?;
            }
            Step::SetEndpoint(endpoint) => {
                for write in self.table.insert(*endpoint) {
                    self.write_endpoint(&write)?;
                }
            }
            Step::RemoveEndpoint(key) => {
                for write in self.table.remove(key) {
                    self.write_endpoint(&write)?;
                }
            }
            // Done above.
            Step::SetSource(..) | Step::ClearSource(_) | Step::ResetPool(..) => {}
        }
        Ok(())
    }

    fn write_endpoint(&mut self, write: &Write) -> anyhow::Result<()> {
        match write {
            Write::Place { bucket, place, endpoint } => {
                let words = self.endpoints.words(*bucket);
                let place = words.get(place * 4..place * 4 + 4).context("a bucket of the table")?;
                let [high, low, key, value]: [u64; 4] = bytemuck::cast(*endpoint);
                // The third word makes the endpoint visible: port, protocol, kind. Where another
                // one stood, it goes first; the second lookup word (ring, class) is one store.
                let flags =
                    Endpoint { kind: endpoint.kind & Endpoint::OVERFLOW, ..Endpoint::default() };
                let [_, _, hidden, _]: [u64; 4] = bytemuck::cast(flags);
                let stays = place[0].load(Ordering::Relaxed) == high
                    && place[1].load(Ordering::Relaxed) == low;
                if !stays || endpoint.kind() == 0 {
                    place[2].store(hidden, Ordering::SeqCst);
                    place[0].store(high, Ordering::SeqCst);
                    place[1].store(low, Ordering::SeqCst);
                }
                place[3].store(value, Ordering::SeqCst);
                place[2].store(key, Ordering::SeqCst);
            }
            Write::Overflow(endpoint) => {
                self.overflow.insert(Raw(endpoint.key()), Raw(*endpoint), 0)?;
            }
            Write::RemoveOverflow(key) => map_removed(self.overflow.remove(&Raw(*key)))?,
        }
        Ok(())
    }

    /// Makes every next hop void that the kernel's side has cached.
    pub fn invalidate_next_hops(&self) {
        let next = self.generation.load(0).unwrap_or(0).wrapping_add(1);
        self.generation.store(0, &next);
    }

    /// The tables of flows, for a walk in another thread.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn flow_tables(&self) -> anyhow::Result<FlowTables> {
        self.flows.open(self.loads.clone())
    }

    /// How full the tables of flows are, in the order of their numbers. To be asked often: of what
    /// came and went between two questions nothing is known.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn flow_table_usage(&mut self) -> anyhow::Result<[FlowTableUsage; FlowTable::ALL.len()]> {
        self.flows.look()
    }

    /// Writes the map of exceptions; what it does not say is none. Slots that were mapped before
    /// stay so: theirs are among the new ones.
    pub fn map_exceptions(&self, words: &[u64]) {
        for (index, word) in (0..EXCEPTION_WORDS).zip(words.iter().chain(repeat(&0))) {
            let known = self.exceptions.words(index);
            known.iter().for_each(|known| known.store(*word, Ordering::SeqCst));
        }
    }

    /// Puts right how many connections targets have, by what a walk counted.
    ///
    /// # Errors
    /// If there is no such target.
    pub fn correct(&self, corrections: &BTreeMap<u32, u64>) -> anyhow::Result<()> {
        for (target, correction) in corrections {
            let word = self.load_word(*target, offset_of!(Load, correction))?;
            word.store(*correction, Ordering::SeqCst);
        }
        Ok(())
    }

    /// How many connections a target has, as the programs know it.
    pub fn load_of(&self, target: u32) -> Load {
        self.loads.load(target).unwrap_or_default()
    }

    fn load_word(&self, target: u32, offset: usize) -> anyhow::Result<&AtomicU64> {
        self.loads.words(target).get(offset / 8).context("no such target")
    }

    /// The tables of flows whose both ends are rewritten, for a walk in another thread.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn snat_tables(&self) -> anyhow::Result<SnatTables> {
        self.snat.tables()
    }

    fn zero(&mut self, index: u32, counter: Counter) -> anyhow::Result<()> {
        let zeroes =
            vec![Raw(Traffic::default()); aya::util::nr_cpus().map_err(|(_, error)| error)?];
        let values = PerCpuValues::try_from(zeroes)?;
        match counter {
            Counter::Listener => self.listener_traffic.set(index, values, 0)?,
            Counter::Target => self.target_traffic.set(index, values, 0)?,
        }
        Ok(())
    }
}

impl Attaches for Dataplane {
    fn attach(&mut self, nic: &netlink::Interface, mode: XdpMode) -> anyhow::Result<&Attachment> {
        let attachment = attach::attach(program(&mut self.ebpf, PROGRAM)?, nic, mode)?;
        self.attachments.push(attachment);
        self.attachments.last().context("just attached")
    }

    fn detach_all_but(&mut self, stays: impl Fn(u32) -> bool) -> Vec<Attachment> {
        self.attachments.extract_if(.., |attachment| !stays(attachment.ifindex)).collect()
    }

    fn attachments(&self) -> &[Attachment] {
        &self.attachments
    }
}

impl Counters for Dataplane {
    fn listener(&self, number: u32) -> anyhow::Result<Traffic> {
        Ok(sum(&self.listener_traffic.get(&number, 0)?))
    }

    fn target(&self, number: u32) -> anyhow::Result<Traffic> {
        Ok(sum(&self.target_traffic.get(&number, 0)?))
    }

    fn drops(&self) -> anyhow::Result<BTreeMap<DropReason, u64>> {
        DropReason::ALL
            .into_iter()
            .map(|reason| Ok((reason, self.drops.get(&(reason as u32), 0)?.iter().sum())))
            .collect()
    }
}

enum Counter {
    Listener,
    Target,
}

fn sum(values: &PerCpuValues<Raw<Traffic>>) -> Traffic {
    values.iter().fold(Traffic::default(), |sum, Raw(cpu)| Traffic {
        packets: sum.packets + cpu.packets,
        bytes: sum.bytes + cpu.bytes,
        reply_packets: sum.reply_packets + cpu.reply_packets,
        reply_bytes: sum.reply_bytes + cpu.reply_bytes,
        new_flows: sum.new_flows + cpu.new_flows,
        zero: [0; 3],
    })
}

/// A plan that is carried out again after an error finds some of its removals done.
pub(crate) fn map_removed(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        other => other,
    }
}

fn trie_key(class: u32, prefix: &Prefix) -> Key<Raw<AdmissionKey>> {
    let bits = AdmissionKey::CLASS_BITS + u32::from(prefix.bits);
    Key::new(bits, Raw(AdmissionKey::new(class, prefix.address)))
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut Xdp> {
    let program = ebpf.program_mut(name);
    Ok(program.with_context(|| format!("the object lacks the program {name}"))?.try_into()?)
}

/// Loads the programs of the later stages and puts them where the first finds them.
fn load_stages(ebpf: &mut Ebpf) -> anyhow::Result<ProgramArray<MapData>> {
    let mut stages = ProgramArray::try_from(take(ebpf, "STAGES")?)?;
    for stage in Stage::ALL {
        let name = stage.program();
        let program = program(ebpf, name)?;
        program.load().with_context(|| format!("load the XDP program {name} into the kernel"))?;
        stages.set(stage as u32, program.fd()?, 0)?;
    }
    Ok(stages)
}

pub(crate) fn take(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<Map> {
    ebpf.take_map(name).ok_or_else(|| anyhow!("the object lacks the map {name}"))
}

pub(crate) fn mapped<T: bytemuck::Pod>(
    ebpf: &mut Ebpf,
    name: &str,
    length: u32,
) -> anyhow::Result<MappedArray<T>> {
    match take(ebpf, name)? {
        Map::Array(data) => MappedArray::new(data.fd().as_fd(), length),
        other => Err(anyhow!("{name} is no array but {other:?}")),
    }
}
