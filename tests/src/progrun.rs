//! The balancer's program in the kernel beside the same pipeline on the host, over equal tables.
//!
//! A [`World`] is filled from one [`Desired`]: the kernel's maps by the agent's own
//! [`Dataplane`], the host's [`Model`] by plain copies. Frames go through both
//! (`BPF_PROG_TEST_RUN` and [`forward`]), and both must say and leave the same: verdict, bytes,
//! counters, remembered flows, addresses reported as unresolved.

mod flows;
mod network;
mod pool;

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use anyhow::{Result, bail, ensure};
use aya::programs::{TestRun as _, TestRunOptions};
use lb_common::{
    model::{Bytes, Model},
    tables::{NextHop, Tables as _, Traffic},
    verdict::{DropReason, Verdict},
    wire::{Address, eth::Macs},
};
use lb_userspace::{
    dataplane::LoadOptions,
    reconcile::{Desired, diff},
    state::Counters as _,
};
use nix::time::ClockId;

use crate::history::copy_tables;

use pool::Loaded;

pub use network::{DEVICES, Network, device_mac, gateway_mac};

/// What a program does with a packet. The device of a redirect shows in the frame's MAC address.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Action {
    /// XDP_DROP.
    Drop,
    /// XDP_PASS.
    Pass,
    /// XDP_TX.
    Transmit,
    /// XDP_REDIRECT.
    Redirect,
}

/// What became of a frame.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Outcome {
    /// The verdict.
    pub action: Action,
    /// The frame as the program left it.
    pub frame: Vec<u8>,
    /// Addresses whose next hop was missing.
    pub unresolved: Vec<Address>,
}

/// Every counter that is not zero.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// By listener.
    pub listeners: BTreeMap<u32, Traffic>,
    /// By target.
    pub targets: BTreeMap<u32, Traffic>,
    /// By reason.
    pub drops: BTreeMap<DropReason, u64>,
}

/// Kernel and host with equal tables. To be used inside its [`Network`].
pub struct World<'a> {
    network: &'a Network,
    kernel: Loaded,
    /// The host's tables.
    pub model: Model,
    desired: Desired,
}

impl std::fmt::Debug for World<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").field("desired", &self.desired).finish_non_exhaustive()
    }
}

impl<'a> World<'a> {
    /// Loads the program, and fills the tables.
    ///
    /// # Errors
    ///
    /// What the kernel refuses: the program, or an entry.
    pub fn new(network: &'a Network, options: &LoadOptions, desired: Desired) -> Result<Self> {
        let kernel = Loaded::new(options)?;
        let model = Model::new(options.hash_seed, options.ring_size);
        let mut world = Self { network, kernel, model, desired: Desired::default() };
        world.set(desired)?;
        Ok(world)
    }

    /// Changes the tables, the kernel's by the agent's plan, the host's by copying.
    ///
    /// # Errors
    ///
    /// If the kernel refuses an entry.
    pub fn set(&mut self, desired: Desired) -> Result<()> {
        self.kernel.apply(&diff(&self.desired, &desired))?;
        copy_tables(&mut self.model, &self.desired, &desired);
        self.desired = desired;
        Ok(())
    }

    /// Runs a frame that came in by `ingress` through both sides.
    ///
    /// # Errors
    ///
    /// If they disagree on the verdict, the bytes or the reports; or the kernel refuses the frame.
    pub fn run(&mut self, ingress: u32, frame: &[u8]) -> Result<Outcome> {
        // A reply goes to where its flow came from.
        for address in addresses(frame).into_iter().flatten() {
            self.tell_route(address);
        }
        let model = self.run_model(ingress, frame)?;
        let kernel = self.run_kernel(ingress, frame)?;
        ensure!(
            model == kernel,
            "host and kernel disagree on a frame from device {ingress}:\n{}\nhost: {}\nkernel: {}",
            hex(frame),
            model.show(),
            kernel.show(),
        );
        Ok(model)
    }

    fn tell_route(&mut self, destination: IpAddr) {
        let hop = self.network.device_to(destination).and_then(|device| {
            let interface = self.desired.interfaces.get(&device)?;
            let macs = Macs::new(gateway_mac(device), device_mac(device));
            let (ifindex, vlan, mtu) = (interface.ifindex, interface.vlan, interface.mtu);
            Some(NextHop { ifindex, macs, vlan, mtu })
        });
        match hop {
            Some(hop) => self.model.routes.insert(destination.into(), hop),
            None => self.model.routes.remove(&destination.into()),
        };
    }

    fn run_model(&self, ingress: u32, frame: &[u8]) -> Result<Outcome> {
        self.model.now.set(monotonic()?);
        let mut bytes = Bytes { bytes: frame.to_vec(), ingress };
        let action = match self.model.run(&mut bytes) {
            Verdict::Pass => Action::Pass,
            Verdict::Drop => Action::Drop,
            Verdict::Transmit => Action::Transmit,
            Verdict::Redirect(device) if self.desired.devices.contains(&device) => Action::Redirect,
            Verdict::Redirect(_) => {
                self.model.count_drop(DropReason::NextHopUnresolved as u32);
                Action::Drop
            }
        };
        Ok(Outcome { action, frame: bytes.bytes, unresolved: self.model.unresolved.take() })
    }

    fn run_kernel(&mut self, ingress: u32, frame: &[u8]) -> Result<Outcome> {
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context: [u32; 6] = [0, frame.len() as u32, 0, ingress, 0, 0];
        let mut output = vec![0; frame.len() + 256];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut output),
            ctx_in: Some(bytemuck::bytes_of(&context)),
            ..TestRunOptions::default()
        };
        let result = self.kernel.program()?.test_run(options)?;
        output.truncate(result.data_size_out as usize);
        let action = match result.return_value {
            1 => Action::Drop,
            2 => Action::Pass,
            3 => Action::Transmit,
            4 => Action::Redirect,
            other => bail!("verdict {other}"),
        };
        let mut unresolved = Vec::new();
        while let Some(report) = self.kernel.report() {
            let octets: [u8; 16] = report[..].try_into()?;
            unresolved.push(octets.into());
        }
        Ok(Outcome { action, frame: output, unresolved })
    }

    /// All counters, which must be equal.
    ///
    /// # Errors
    ///
    /// If they are not.
    pub fn counts(&self) -> Result<Counts> {
        let model = Counts {
            listeners: self.model.listener_traffic.borrow().clone(),
            targets: self.model.target_traffic.borrow().clone(),
            drops: self.model.drops.borrow().clone(),
        };
        let mut kernel = Counts { drops: self.kernel.drops()?, ..Counts::default() };
        kernel.drops.retain(|_, count| *count != 0);
        for index in self.desired.listeners.keys() {
            kernel.listeners.insert(*index, self.kernel.listener(*index)?);
        }
        for index in self.desired.targets.keys() {
            kernel.targets.insert(*index, self.kernel.target(*index)?);
        }
        kernel.listeners.retain(|_, traffic| *traffic != Traffic::default());
        kernel.targets.retain(|_, traffic| *traffic != Traffic::default());
        ensure!(model == kernel, "counters differ:\nhost {model:?}\nkernel {kernel:?}");
        Ok(model)
    }
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        // What a failed test leaves is not to be trusted.
        if std::thread::panicking() {
            return;
        }
        let plan = diff(&self.desired, &Desired::default());
        if let Err(error) = self.kernel.give_back(&plan) {
            println!("the program is not used again: {error:#}");
        }
    }
}

impl Outcome {
    fn show(&self) -> String {
        format!("{:?}, unresolved {:?}\n{}", self.action, self.unresolved, hex(&self.frame))
    }
}

/// What `bpf_ktime_get_ns` counts, nanoseconds.
///
/// # Errors
///
/// Never, on Linux.
pub fn monotonic() -> Result<u64> {
    Ok(Duration::from(ClockId::CLOCK_MONOTONIC.now()?).as_nanos() as u64)
}

/// Where an IP packet comes from and goes to, as far as there is one.
fn addresses(frame: &[u8]) -> Option<[IpAddr; 2]> {
    let mut l3 = 14;
    while matches!(frame.get(l3 - 2..l3)?, [0x81, 0x00] | [0x88, 0xa8]) && l3 < 22 {
        l3 += 4;
    }
    match frame.get(l3 - 2..l3)? {
        [0x08, 0x00] => {
            let [source, destination]: [[u8; 4]; 2] =
                bytemuck::pod_read_unaligned::<[[u8; 4]; 2]>(frame.get(l3 + 12..l3 + 20)?);
            Some([source.into(), destination.into()])
        }
        [0x86, 0xdd] => {
            let [source, destination]: [[u8; 16]; 2] =
                bytemuck::pod_read_unaligned::<[[u8; 16]; 2]>(frame.get(l3 + 8..l3 + 40)?);
            Some([source.into(), destination.into()])
        }
        _ => None,
    }
}

/// A frame as `text2pcap` and Wireshark's import read it.
pub fn hex(frame: &[u8]) -> String {
    let line = |(n, bytes): (usize, &[u8])| {
        let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{:06x} {}", 16 * n, bytes.join(" "))
    };
    frame.chunks(16).enumerate().map(line).collect::<Vec<_>>().join("\n")
}
