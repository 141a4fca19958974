//! The kernel's side of a target: load, attach, write what a plan says, read the counters.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use aya::maps::lpm_trie::Key;
use aya::maps::{HashMap, LpmTrie, MapData, PerCpuArray};
use aya::programs::links::LinkOrder;
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, Xdp};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use lb_common::flow::FlowKey;
use lb_common::tables::{AdmissionKey, EndpointKey};
use lb_common::target::tables::{CLASS_WORDS, OwnFlow, Settings, Unwrapped};
use lb_common::verdict::DropReason;
use tracing::debug;

use crate::agent::Attaches;
use crate::config::XdpMode;
use crate::dataplane::{
    Attachment, MappedArray, Raw, attach_xdp, explain_kernel, map_removed, mapped, take,
};
use crate::netlink::Interface;

use super::clsact;
use super::plan::{Plan, Sender, Step};

/// The eBPF object of a target, as `build.rs` made it.
pub static TARGET_OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-target"));
/// The program on the way in.
pub const WAY_IN: &str = "lb_target";
const WAY_OUT: &str = "lb_target_out";

/// What is fixed while the programs are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TargetLoadOptions {
    /// Capacity of the table of own flows, and of that of admitted ones; entries.
    pub flow_table_size: u32,
}

/// A program on the way out of a NIC. Dropping it detaches the program.
#[derive(Debug)]
struct WayOut {
    ifindex: u32,
    added_clsact: bool,
    _link: SchedClassifierLink,
}

/// The loaded programs and their maps. Dropping it detaches and frees everything.
pub struct TargetDataplane {
    // Links go before the programs that they are of.
    attachments: Vec<Attachment>,
    ways_out: Vec<WayOut>,
    settings: MappedArray<Settings>,
    places: MappedArray<u64>,
    tunnel_ends: HashMap<MapData, Raw<EndpointKey>, u32>,
    senders: LpmTrie<MapData, Raw<AdmissionKey>, u32>,
    own_flows: HashMap<MapData, Raw<FlowKey>, Raw<OwnFlow>>,
    admitted_flows: HashMap<MapData, Raw<FlowKey>, u64>,
    unwrapped: PerCpuArray<MapData, Raw<Unwrapped>>,
    drops: PerCpuArray<MapData, u64>,
    ebpf: Ebpf,
}

impl TargetDataplane {
    /// Loads the programs into the kernel, attached to nothing yet.
    ///
    /// # Errors
    /// Missing privileges or memory, a kernel too old, and what the verifier says.
    pub fn load(options: &TargetLoadOptions) -> anyhow::Result<Self> {
        Self::load_object(options).map_err(explain_kernel)
    }

    fn load_object(options: &TargetLoadOptions) -> anyhow::Result<Self> {
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("OWN_FLOWS", options.flow_table_size)
            .map_max_entries("ADMITTED_FLOWS", options.flow_table_size)
            .load(TARGET_OBJECT)
            .context("load the maps into the kernel")?;
        way_in(&mut ebpf)?.load().context("load the XDP program into the kernel")?;
        way_out(&mut ebpf)?.load().context("load the traffic control program into the kernel")?;
        Ok(Self {
            settings: mapped(&mut ebpf, "TARGET_SETTINGS", 1)?,
            places: mapped(&mut ebpf, "CLASSES", CLASS_WORDS)?,
            tunnel_ends: take(&mut ebpf, "TUNNEL_ENDS")?.try_into()?,
            senders: take(&mut ebpf, "SENDERS")?.try_into()?,
            own_flows: take(&mut ebpf, "OWN_FLOWS")?.try_into()?,
            admitted_flows: take(&mut ebpf, "ADMITTED_FLOWS")?.try_into()?,
            unwrapped: take(&mut ebpf, "UNWRAPPED")?.try_into()?,
            drops: take(&mut ebpf, "TARGET_DROPS")?.try_into()?,
            attachments: Vec::new(),
            ways_out: Vec::new(),
            ebpf,
        })
    }

    /// The program on the way in, for program runs.
    ///
    /// # Errors
    /// Never, once loaded.
    pub fn way_in(&mut self) -> anyhow::Result<&mut Xdp> {
        way_in(&mut self.ebpf)
    }

    /// The program on the way out, for program runs.
    ///
    /// # Errors
    /// Never, once loaded.
    pub fn way_out(&mut self) -> anyhow::Result<&mut SchedClassifier> {
        way_out(&mut self.ebpf)
    }

    /// Carries out a plan, in its order.
    ///
    /// # Errors
    /// A full map, or memory running out; the steps before stay in force.
    pub fn apply(&mut self, plan: &Plan) -> anyhow::Result<()> {
        for step in &plan.steps {
            self.step(step).with_context(|| format!("write to the kernel: {step:?}"))?;
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> anyhow::Result<()> {
        match step {
            Step::AddSender(class, sender) => {
                self.senders.insert(&trie_key(*class, sender), 1, 0)?;
            }
            Step::RemoveSender(class, sender) => {
                map_removed(self.senders.remove(&trie_key(*class, sender)))?;
            }
            Step::SetPlaces(word, places) => self.places.store(*word, places),
            Step::AddTunnelEnd(end) => self.tunnel_ends.insert(Raw(*end), 1, 0)?,
            Step::RemoveTunnelEnd(end) => map_removed(self.tunnel_ends.remove(&Raw(*end)))?,
            Step::SetSettings(settings) => self.settings.store(0, settings),
        }
        Ok(())
    }

    /// Remembers a flow as one that this machine opened.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remember_own(&mut self, key: FlowKey, flow: OwnFlow) -> anyhow::Result<()> {
        Ok(self.own_flows.insert(Raw(key), Raw(flow), 0)?)
    }

    /// Every flow that this machine opened, as far as it is remembered.
    pub fn own_flows(&self) -> BTreeMap<FlowKey, OwnFlow> {
        self.own_flows.iter().filter_map(Result::ok).map(|(key, flow)| (key.0, flow.0)).collect()
    }

    /// When flows without connections were last let in by a rule, monotonic nanoseconds.
    pub fn admitted_flows(&self) -> BTreeMap<FlowKey, u64> {
        self.admitted_flows.iter().filter_map(Result::ok).map(|(key, last)| (key.0, last)).collect()
    }

    /// What came out of tunnels.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn unwrapped(&self) -> anyhow::Result<Unwrapped> {
        let values = self.unwrapped.get(&0, 0)?;
        Ok(values.iter().fold(Unwrapped::default(), |sum, Raw(cpu)| Unwrapped {
            packets: sum.packets + cpu.packets,
            bytes: sum.bytes + cpu.bytes,
        }))
    }

    /// Packets that died.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn drops(&self) -> anyhow::Result<BTreeMap<DropReason, u64>> {
        DropReason::ALL
            .into_iter()
            .map(|reason| Ok((reason, self.drops.get(&(reason as u32), 0)?.iter().sum())))
            .collect()
    }

    /// Detaches, and takes back what attaching had to add.
    pub async fn detach(self) -> Vec<anyhow::Error> {
        let added: Vec<u32> =
            self.ways_out.iter().filter(|out| out.added_clsact).map(|out| out.ifindex).collect();
        drop(self);
        let mut errors = Vec::new();
        for ifindex in added {
            errors.extend(clsact::remove(ifindex).await.err());
        }
        errors
    }
}

impl Attaches for TargetDataplane {
    /// Both programs, the one on the way out first.
    fn attach(&mut self, nic: &Interface, mode: XdpMode) -> anyhow::Result<&Attachment> {
        let way_out = attach_way_out(way_out(&mut self.ebpf)?, nic)?;
        self.attachments.push(attach_xdp(way_in(&mut self.ebpf)?, nic, mode)?);
        self.ways_out.push(way_out);
        self.attachments.last().context("just attached")
    }

    fn detach_all_but(&mut self, stays: impl Fn(u32) -> bool) -> Vec<Attachment> {
        // What was added to a NIC went with it.
        self.ways_out.retain(|out| stays(out.ifindex));
        self.attachments.extract_if(.., |attachment| !stays(attachment.ifindex)).collect()
    }

    fn attachments(&self) -> &[Attachment] {
        &self.attachments
    }
}

/// By TCX, which ends with its owner; else by a filter of the clsact discipline.
fn attach_way_out(program: &mut SchedClassifier, nic: &Interface) -> anyhow::Result<WayOut> {
    let tcx = TcAttachOptions::TcxOrder(LinkOrder::default());
    match program.attach_with_options(&nic.name, TcAttachType::Egress, tcx) {
        Ok(id) => {
            let link = program.take_link(id)?;
            return Ok(WayOut { ifindex: nic.index, added_clsact: false, _link: link });
        }
        Err(ProgramError::SyscallError(error)) => {
            debug!(interface = %nic.name, %error, "no TCX: attaching by netlink");
        }
        Err(error) => bail!("attach to the way out of {}: {error}", nic.name),
    }
    let added_clsact = clsact::add(&nic.name, WAY_OUT)?;
    let options = TcAttachOptions::Netlink(NlOptions::default());
    let id = program
        .attach_with_options(&nic.name, TcAttachType::Egress, options)
        .with_context(|| format!("attach to the way out of {}", nic.name))?;
    Ok(WayOut { ifindex: nic.index, added_clsact, _link: program.take_link(id)? })
}

fn trie_key(class: u16, sender: &Sender) -> Key<Raw<AdmissionKey>> {
    let bits = AdmissionKey::CLASS_BITS + u32::from(sender.bits);
    let class = u32::from(class) | sender.space;
    Key::new(bits, Raw(AdmissionKey::new(class, sender.address)))
}

fn way_in(ebpf: &mut Ebpf) -> anyhow::Result<&mut Xdp> {
    let program = ebpf.program_mut(WAY_IN).context("the object lacks its XDP program")?;
    Ok(program.try_into()?)
}

fn way_out(ebpf: &mut Ebpf) -> anyhow::Result<&mut SchedClassifier> {
    let program = ebpf.program_mut(WAY_OUT).context("the object lacks its program for tc")?;
    Ok(program.try_into()?)
}
