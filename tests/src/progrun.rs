//! The balancer's program in the kernel beside the same pipeline on the host, over equal tables.
//!
//! A [`World`] is filled from one [`Desired`]: the kernel's maps by the agent's own
//! [`Dataplane`], the host's [`Model`] by plain copies. Frames go through both
//! (`BPF_PROG_TEST_RUN` and [`forward`]), and both must say and leave the same: verdict, bytes,
//! counters, remembered flows, addresses reported as unresolved.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    maps::{HashMap, MapData, RingBuf},
    programs::{TestRun as _, TestRunOptions},
};
use lb_common::{
    flow::{Flow, FlowKey, FlowTable, ReturnFlow, ReturnTable},
    lru::Lru,
    model::{Bytes, Model},
    snat::{SnatFlow, SnatReturn, Stamp},
    tables::{NextHop, Tables as _, Traffic},
    verdict::{DropReason, Verdict},
    wire::{Address, eth::Macs},
};
use lb_userspace::{
    dataplane::{Dataplane, FlowTableUsage, LoadOptions, Raw, map_name},
    reconcile::{Desired, diff},
    state::Counters as _,
};
use nix::time::ClockId;

use crate::{history::copy_tables, netns::Namespace};

/// How far the two sides' clocks may be apart, nanoseconds: they look one after the other.
const CLOCK_SLACK: u64 = 500_000_000;

/// The kernel's tables of ways back.
const RETURNS: [(ReturnTable, &str); ReturnTable::ALL.len()] =
    [(ReturnTable::Established, "RETURN_FLOWS"), (ReturnTable::Fresh, "FRESH_RETURNS")];

/// A gateway: where packets to its prefix go.
#[derive(Clone, Copy, Debug)]
struct Gateway {
    /// The first 24 bits (IPv4) or 64 bits (IPv6) are the prefix.
    network: IpAddr,
    /// The device that the route names.
    device: u32,
}

/// A network namespace whose routes and neighbours are known without asking the kernel.
///
/// There are four devices, `lb10` to `lb13`, named by their indices. Device `d` is on 10.0.d.0/24
/// and fd00:d::/64 as host 2, its MAC address ends in `d`; host 1 is a gateway, whose MAC address
/// ends in `d`, 1. Behind the gateway are 192.0.d.0/24 and 2001:db8:d::/64.
#[derive(Debug)]
pub struct Network {
    namespace: Namespace,
    gateways: Vec<Gateway>,
}

/// Indices of the devices of a [`Network`].
pub const DEVICES: [u32; 4] = [10, 11, 12, 13];

/// The MAC address of a device.
pub fn device_mac(device: u32) -> [u8; 6] {
    [2, 0, 0, 0, 0, device as u8]
}

/// The MAC address of the gateway on a device's segment.
pub fn gateway_mac(device: u32) -> [u8; 6] {
    [2, 0, 0, 0, device as u8, 1]
}

impl Network {
    /// Makes it.
    ///
    /// # Errors
    ///
    /// As for [`Namespace::new`].
    pub fn new() -> Result<Self> {
        let namespace = Namespace::new("progrun")?;
        namespace.sysctl("net/ipv4/ip_forward", "1")?;
        namespace.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        let mut batch = String::new();
        let mut gateways = Vec::new();
        for d in DEVICES {
            let mac = |[a, b, c, d, e, f]: [u8; 6]| {
                format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
            };
            let (own, gateway) = (mac(device_mac(d)), mac(gateway_mac(d)));
            batch += &format!(
                "link add lb{d} index {d} address {own} type veth peer name peer{d}\n\
                 link set lb{d} up\n\
                 link set peer{d} up\n\
                 addr add 10.0.{d}.2/24 dev lb{d}\n\
                 addr add fd00:{d}::2/64 dev lb{d} nodad\n\
                 neigh add 10.0.{d}.1 lladdr {gateway} nud permanent dev lb{d}\n\
                 neigh add fd00:{d}::1 lladdr {gateway} nud permanent dev lb{d}\n\
                 route add 192.0.{d}.0/24 via 10.0.{d}.1\n\
                 route add 2001:db8:{d}::/64 via fd00:{d}::1\n"
            );
            // iproute2 reads the number as hexadecimal digits in an IPv6 address.
            let hex = u16::from_str_radix(&d.to_string(), 16)?;
            gateways.push(Gateway { network: Ipv4Addr::new(192, 0, d as u8, 0).into(), device: d });
            let network = Ipv6Addr::new(0x2001, 0xdb8, hex, 0, 0, 0, 0, 0);
            gateways.push(Gateway { network: network.into(), device: d });
            gateways.push(Gateway { network: Ipv4Addr::new(10, 0, d as u8, 1).into(), device: d });
            let host = Ipv6Addr::new(0xfd00, hex, 0, 0, 0, 0, 0, 1);
            gateways.push(Gateway { network: host.into(), device: d });
        }
        namespace.ip(&batch)?;
        Ok(Self { namespace, gateways })
    }

    /// Runs `f` inside.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.namespace.run(f)
    }

    /// Adds to it by commands of `ip`, one a line; a [`World`] knows nothing of that.
    ///
    /// # Errors
    ///
    /// With what `ip` said.
    pub fn ip(&self, batch: &str) -> Result<()> {
        self.namespace.ip(batch)
    }

    /// The device by which packets to `address` leave, if the kernel has a way.
    fn device_to(&self, address: IpAddr) -> Option<u32> {
        self.gateways.iter().find(|gateway| gateway.leads_to(address)).map(|gateway| gateway.device)
    }
}

impl Gateway {
    fn leads_to(&self, address: IpAddr) -> bool {
        match (self.network, address) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let bits = if network.octets()[3] == 0 { 8 } else { 0 };
                network.to_bits() >> bits == address.to_bits() >> bits
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                let bits = if network.segments()[7] == 0 { 64 } else { 0 };
                network.to_bits() >> bits == address.to_bits() >> bits
            }
            _ => false,
        }
    }
}

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
    kernel: Dataplane,
    reports: RingBuf<MapData>,
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
        let mut kernel = Dataplane::load(options)?;
        let reports = kernel.take_unresolved().context("taken once")?;
        let model = Model::new(options.hash_seed, options.ring_size);
        let mut world = Self { network, kernel, reports, model, desired: Desired::default() };
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
        while let Some(report) = self.reports.next() {
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

    /// Checks that both sides remember the same flows.
    ///
    /// # Errors
    ///
    /// If they do not; last times may differ by what lies between the two looks at the clock.
    pub fn check_flows(&mut self) -> Result<()> {
        for table in FlowTable::ALL {
            let flows: BTreeMap<FlowKey, Flow> = self.dump(map_name(table))?;
            let known = contents(&self.model.flow_table(table).borrow());
            same(map_name(table), &known, &flows, |a, b| {
                let times = [a.last_seen, b.last_seen];
                times[0].abs_diff(times[1]) < CLOCK_SLACK
                    && Flow { last_seen: times[1], ..*a } == *b
            })?;
        }
        for (table, name) in RETURNS {
            let returns: BTreeMap<FlowKey, ReturnFlow> = self.dump(name)?;
            let known = contents(&self.model.return_table(table).borrow());
            same(name, &known, &returns, |a, b| {
                let times = [a.last_seen, b.last_seen];
                times[0].abs_diff(times[1]) < CLOCK_SLACK
                    && ReturnFlow { last_seen: times[1], ..*a } == *b
            })?;
        }
        for target in self.desired.shares.keys() {
            let (host, kernel) = (self.model.load(*target), self.kernel.load_of(*target));
            ensure!(host == kernel, "target {target}: host {host:?}, kernel {kernel:?}");
        }
        let direct: BTreeMap<FlowKey, u32> = self.dump("DIRECT_FLOWS")?;
        let known = self.model.direct_flows.borrow();
        let known: BTreeMap<FlowKey, u32> = known.iter().map(|key| (*key, 1)).collect();
        same("direct flow", &known, &direct, |a, b| a == b)?;
        self.check_snat()
    }

    /// Checks that both sides remember the same flows whose both ends are rewritten, and that exactly
    /// their ports are taken.
    fn check_snat(&self) -> Result<()> {
        let tables = self.kernel.snat_tables()?;
        let (flows, returns) = (tables.flows().collect(), tables.returns().collect());
        let same_stamp = |a: Stamp, b: Stamp| {
            a.state() == b.state() && a.time().abs_diff(b.time()) < CLOCK_SLACK
        };
        let model = &self.model.snat;
        same("snat flow", &model.flows.borrow(), &flows, |a: &SnatFlow, b: &SnatFlow| {
            same_stamp(a.stamp, b.stamp) && SnatFlow { stamp: b.stamp, ..*a } == *b
        })?;
        same(
            "snat return",
            &model.returns.borrow(),
            &returns,
            |a: &SnatReturn, b: &SnatReturn| {
                same_stamp(a.stamp, b.stamp) && SnatReturn { stamp: b.stamp, ..*a } == *b
            },
        )?;
        for (number, pool) in &model.pools {
            let of_pool = returns.iter().filter(|(_, flow)| flow.pool == *number);
            let ports: BTreeSet<u16> = of_pool.map(|(key, _)| key.destination_port.get()).collect();
            let kernel = tables.pools().get(*number).context("a pool")?;
            for (side, pool) in [("host", &**pool), ("kernel", kernel)] {
                let taken: BTreeSet<u16> = pool.ports().collect();
                ensure!(taken == ports, "pool {number}, {side}: {taken:?}, flows have {ports:?}");
            }
        }
        Ok(())
    }

    /// Makes both sides believe that the last packet of every flow whose both ends are rewritten came
    /// as long ago as `ago` says, which is asked once a flow.
    ///
    /// # Errors
    ///
    /// If the kernel's tables do not take it.
    pub fn age_snat(&mut self, mut ago: impl FnMut() -> Duration) -> Result<()> {
        let now = monotonic()?;
        let returns: Vec<_> =
            self.model.snat.returns.borrow().iter().map(|(k, f)| (*k, *f)).collect();
        for (reply, mut back) in returns {
            let stamp =
                |old: Stamp, ago: Duration| Stamp::new(now - ago.as_nanos() as u64, old.state());
            let ago = ago();
            back.stamp = stamp(back.stamp, ago);
            self.model.snat.returns.borrow_mut().insert(reply, back);
            self.map::<SnatReturn>("SNAT_RETURNS")?.insert(Raw(reply), Raw(back), 0)?;
            let listener = self.desired.listeners.get(&back.listener).context("a listener")?;
            let key = FlowKey {
                source: back.client,
                source_port: back.client_port,
                destination: listener.address,
                destination_port: listener.port,
                ..reply
            };
            let Some(mut flow) = self.model.snat.flows.borrow().get(&key).copied() else {
                continue;
            };
            if flow.port == reply.destination_port && flow.address == reply.destination {
                flow.stamp = stamp(flow.stamp, ago);
                self.model.snat.flows.borrow_mut().insert(key, flow);
                self.map::<SnatFlow>("SNAT_FLOWS")?.insert(Raw(key), Raw(flow), 0)?;
            }
        }
        Ok(())
    }

    /// Does what the agent's walk does, on both sides: removes flows that are over.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn walk_snat(&mut self) -> Result<()> {
        let now = monotonic()?;
        let mut tables = self.kernel.snat_tables()?;
        let model = &self.model.snat;
        model.flows.borrow_mut().retain(|key, flow| {
            let is_over = flow.stamp.is_over(now, key.protocol, flow.idle);
            if is_over {
                tables.remove_flow(key, |flow| flow.stamp.is_over(now, key.protocol, flow.idle));
            }
            !is_over
        });
        let over: Vec<_> = model
            .returns
            .borrow()
            .iter()
            .filter(|(key, back)| back.stamp.is_over(now, key.protocol, back.idle))
            .map(|(key, back)| (*key, *back))
            .collect();
        for (key, back) in over {
            tables.remove_return(&key, &back)?;
            model.returns.borrow_mut().remove(&key);
            model.pools[&back.pool].release(key.destination_port.get());
        }
        Ok(())
    }

    /// A walk has made another map of exceptions.
    pub fn map_exceptions(&mut self, words: &[u64]) {
        self.model.map_exceptions(words);
        self.kernel.map_exceptions(words);
    }

    /// A walk has found that targets have so many connections more than both sides know.
    ///
    /// # Errors
    ///
    /// If there is no such target.
    pub fn correct(&mut self, corrections: &BTreeMap<u32, u64>) -> Result<()> {
        self.model.correct(corrections);
        self.kernel.correct(corrections)
    }

    /// Makes both sides remember a flow that was last seen some time ago.
    ///
    /// # Errors
    ///
    /// If the kernel's table does not take it.
    pub fn remember(
        &mut self,
        key: FlowKey,
        target: u32,
        closing: u32,
        ago: Duration,
    ) -> Result<()> {
        let flow = Flow { last_seen: monotonic()? - ago.as_nanos() as u64, target, closing };
        self.model.flow_table(FlowTable::Flows).borrow_mut().insert(key, flow);
        let mut map = self.map::<Flow>(map_name(FlowTable::Flows))?;
        Ok(map.insert(Raw(key), Raw(flow), 0)?)
    }

    /// Makes all that both sides remember as old as `age` says, by key.
    ///
    /// # Errors
    ///
    /// If the kernel's table does not take it.
    pub fn age(&mut self, mut age: impl FnMut(&FlowKey) -> Duration) -> Result<()> {
        let now = monotonic()?;
        for table in FlowTable::ALL {
            let flows = contents(&self.model.flow_table(table).borrow());
            for (key, flow) in flows {
                let flow = Flow { last_seen: now - age(&key).as_nanos() as u64, ..flow };
                self.model.flow_table(table).borrow_mut().insert(key, flow);
                self.map::<Flow>(map_name(table))?.insert(Raw(key), Raw(flow), 0)?;
            }
        }
        Ok(())
    }

    /// The same for ways back.
    ///
    /// # Errors
    ///
    /// If the kernel's table does not take it.
    pub fn age_returns(&mut self, mut age: impl FnMut() -> Duration) -> Result<()> {
        let now = monotonic()?;
        for (table, name) in RETURNS {
            let flows = contents(&self.model.return_table(table).borrow());
            for (key, flow) in flows {
                let flow = ReturnFlow { last_seen: now - age().as_nanos() as u64, ..flow };
                self.model.return_table(table).borrow_mut().insert(key, flow);
                self.map::<ReturnFlow>(name)?.insert(Raw(key), Raw(flow), 0)?;
            }
        }
        Ok(())
    }

    /// Makes both sides remember the way back of an established flow that was last seen some time
    /// ago.
    ///
    /// # Errors
    ///
    /// If the kernel's table does not take it.
    pub fn remember_return(
        &mut self,
        key: FlowKey,
        listener: u32,
        target: u32,
        ago: Duration,
    ) -> Result<()> {
        let flow = ReturnFlow { last_seen: monotonic()? - ago.as_nanos() as u64, listener, target };
        self.model.return_table(ReturnTable::Established).borrow_mut().insert(key, flow);
        let mut map = self.map::<ReturnFlow>("RETURN_FLOWS")?;
        Ok(map.insert(Raw(key), Raw(flow), 0)?)
    }

    /// Makes both sides forget every flow.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn forget_all(&mut self) -> Result<()> {
        for table in FlowTable::ALL {
            self.model.flow_table(table).borrow_mut().clear();
            self.clear::<Flow>(map_name(table))?;
        }
        self.model.direct_flows.borrow_mut().clear();
        for (table, name) in RETURNS {
            self.model.return_table(table).borrow_mut().clear();
            self.clear::<ReturnFlow>(name)?;
        }
        self.clear::<u32>("DIRECT_FLOWS")
    }

    /// How full the kernel's tables of flows are.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn usage(&mut self) -> Result<[FlowTableUsage; FlowTable::ALL.len()]> {
        self.kernel.flow_table_usage()
    }

    /// How many flows a table of the kernel's holds.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn entries(&mut self, table: FlowTable) -> Result<usize> {
        Ok(self.dump::<Flow>(map_name(table))?.len())
    }

    fn map<V: bytemuck::Pod>(&mut self, name: &str) -> Result<FlowMap<'_, V>> {
        let map = self.kernel.ebpf().map_mut(name).with_context(|| format!("no map {name}"))?;
        Ok(map.try_into()?)
    }

    fn dump<V: bytemuck::Pod>(&mut self, name: &str) -> Result<BTreeMap<FlowKey, V>> {
        let entries = self.map::<V>(name)?;
        let entries = entries.iter().map(|entry| entry.map(|(key, value)| (key.0, value.0)));
        Ok(entries.collect::<Result<_, _>>()?)
    }

    fn clear<V: bytemuck::Pod>(&mut self, name: &str) -> Result<()> {
        for key in self.dump::<V>(name)?.into_keys() {
            self.map::<V>(name)?.remove(&Raw(key))?;
        }
        Ok(())
    }
}

type FlowMap<'a, V> = HashMap<&'a mut MapData, Raw<FlowKey>, Raw<V>>;

fn contents<V: Copy>(table: &Lru<FlowKey, V>) -> BTreeMap<FlowKey, V> {
    table.iter().map(|(key, value)| (*key, *value)).collect()
}

fn same<V: std::fmt::Debug>(
    what: &str,
    model: &BTreeMap<FlowKey, V>,
    kernel: &BTreeMap<FlowKey, V>,
    equal: impl Fn(&V, &V) -> bool,
) -> Result<()> {
    for key in model.keys().chain(kernel.keys()) {
        let (host, kernel) = (model.get(key), kernel.get(key));
        let agree = host.zip(kernel).is_some_and(|(host, kernel)| equal(host, kernel));
        ensure!(agree, "{what} {key:?}: host {host:?}, kernel {kernel:?}");
    }
    Ok(())
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
