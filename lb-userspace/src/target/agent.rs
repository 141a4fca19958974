//! The agent of a target: one task that follows the configuration and the machine's addresses.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Context as _;
use lb_common::target::tables::{OwnFlow, Settings};
use nix::time::ClockId;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{debug, error, info, warn};

use crate::agent::reload::Source;
use crate::agent::watch::Watch;
use crate::agent::{Attaches as _, Nics, Prepared, Signals, interfaces, tell_service_manager};
use crate::api::server::ApiRequest;
use crate::api::snapshot::{self, Snapshot};
use crate::cli::AgentOptions;
use crate::config::{Config, Role};
use crate::netlink::{Netlink, Network, NetworkEvent};

use super::dataplane::{TargetDataplane, TargetLoadOptions};
use super::plan::{Tables, diff};
use super::policy::{Policy, compile};
use super::seed::own_connections;

/// Events that may wait.
const WAITING: usize = 256;
/// A target has fewer flows of its own than a balancer has of clients.
const SHARE_OF_FLOW_TABLE: u32 = 8;

/// Runs a target until it is told to end.
///
/// # Errors
/// What keeps it from starting: usage, privileges, interfaces.
pub(crate) async fn run(
    options: AgentOptions,
    signals: Signals,
    source: Source,
    config: Config,
) -> anyhow::Result<()> {
    let (mut target, mut events) = Target::start(options, signals, source, config).await?;
    target.follow(&mut events).await;
    target.end().await;
    Ok(())
}

struct Target {
    source: Source,
    config: Config,
    dataplane: TargetDataplane,
    nics: Nics,
    /// What the kernel's tables hold.
    current: Tables,
    policy: Policy,
    network: Arc<Network>,
    generation: u64,
    api: JoinHandle<()>,
    netlink: Netlink,
    network_events: mpsc::Sender<NetworkEvent>,
}

struct Events {
    network: mpsc::Receiver<NetworkEvent>,
    api: mpsc::Receiver<ApiRequest>,
    file: Watch,
    signals: Signals,
}

impl Target {
    async fn start(
        options: AgentOptions,
        signals: Signals,
        source: Source,
        config: Config,
    ) -> anyhow::Result<(Self, Events)> {
        let Prepared { nics, mode, server, .. } = Prepared::new(options, &config).await?;
        let flow_table_size = config.agent.flow_table_size / SHARE_OF_FLOW_TABLE;
        let mut dataplane = TargetDataplane::load(&TargetLoadOptions { flow_table_size })?;
        let nics = Nics::attach(&mut dataplane, &nics, mode, None)?;
        let (network_events, network) = mpsc::channel(WAITING);
        let netlink = Netlink::start(network_events.clone()).context("observe the network")?;
        let (api_requests, api) = mpsc::channel(WAITING);
        let events = Events { network, api, file: Watch::new(source.path()), signals };
        let target = Self {
            source,
            config,
            dataplane,
            nics,
            current: Tables::default(),
            policy: Policy::default(),
            network: Arc::default(),
            generation: 0,
            api: tokio::spawn(async move {
                server.serve(api_requests).await;
            }),
            netlink,
            network_events,
        };
        Ok((target, events))
    }

    async fn follow(&mut self, events: &mut Events) {
        loop {
            tokio::select! {
                Some(event) = events.network.recv() => self.on_network(event),
                Some(ApiRequest::Snapshot(reply)) = events.api.recv() => match self.snapshot() {
                    // A reader that went away needs no answer.
                    Ok(snapshot) => drop(reply.send(snapshot)),
                    Err(error) => warn!("no snapshot: {error:#}"),
                },
                () = events.file.changed() => self.reload(false),
                _ = events.signals.hangup.recv() => self.reload(true),
                _ = events.signals.terminate.recv() => break info!("ending on SIGTERM"),
                _ = events.signals.interrupt.recv() => break info!("ending on SIGINT"),
            }
        }
    }

    fn on_network(&mut self, event: NetworkEvent) {
        match event {
            NetworkEvent::RoutesChanged => {}
            NetworkEvent::Snapshot(network) => {
                let is_first = self.generation == 0;
                self.nics.follow(&mut self.dataplane, &network);
                self.network = network;
                self.set_tables();
                if is_first && self.generation != 0 {
                    info!("ready");
                    tell_service_manager(sd_notify::NotifyState::Ready);
                }
            }
            NetworkEvent::Lost => {
                warn!("the observer of the network ended: starting another");
                match Netlink::start(self.network_events.clone()) {
                    Ok(netlink) => self.netlink = netlink,
                    Err(error) => error!("no observer of the network: {error}"),
                }
            }
        }
    }

    /// Reads the configuration again. What is wrong with it changes nothing that runs.
    fn reload(&mut self, is_asked: bool) {
        let Some(config) = self.source.reload(is_asked, &self.config) else { return };
        self.config = config;
        self.set_tables();
        info!("configuration reloaded");
    }

    /// Brings the kernel's tables to what configuration and addresses say.
    fn set_tables(&mut self) {
        let addresses: BTreeSet<IpAddr> = self.network.addresses.keys().copied().collect();
        let policy = compile(&self.config, &addresses, &self.current);
        for warning in &policy.warnings {
            if !self.policy.warnings.contains(warning) {
                warn!("{warning}");
            }
        }
        if self.generation != 0 && policy.tables == self.current {
            self.policy = policy;
            return;
        }
        if let Err(error) = self.apply(&policy.tables) {
            // The next change tries the same writes again.
            error!("the kernel's tables are not as they should be: {error:#}");
            return;
        }
        self.generation += 1;
        self.current = policy.tables.clone();
        info!(
            target_groups = policy.target_groups.join(", "),
            security_groups = policy.security_groups.join(", "),
            "this machine is a target"
        );
        self.policy = policy;
    }

    /// Before rules are enforced for the first time, the connections that are open must be known.
    fn apply(&mut self, tables: &Tables) -> anyhow::Result<()> {
        let (before, after) = (self.current.settings.flags, tables.settings.flags);
        if after & Settings::ENFORCES != 0 && before & Settings::ENFORCES == 0 {
            let mut recording = self.current.clone();
            recording.settings.flags |= Settings::RECORDS;
            self.dataplane.apply(&diff(&self.current, &recording))?;
            self.current = recording;
            let now = std::time::Duration::from(ClockId::CLOCK_MONOTONIC.now()?);
            let now = u64::try_from(now.as_nanos())?;
            let open = own_connections().context("list the open connections")?;
            debug!(connections = open.len(), "open connections of this machine's own");
            for key in open {
                self.dataplane.remember_own(key, OwnFlow::new(now))?;
            }
        }
        self.dataplane.apply(&diff(&self.current, tables))
    }

    fn snapshot(&self) -> anyhow::Result<Snapshot> {
        let unwrapped = self.dataplane.unwrapped()?;
        let drops = self.dataplane.drops()?;
        let policy = &self.policy;
        let status = snapshot::Status {
            agent: self.source.describe(Role::Target, self.generation),
            interfaces: interfaces(self.dataplane.attachments()),
            load_balancers: Vec::new(),
            own_target: Some(snapshot::OwnTarget {
                addresses: policy.addresses.iter().copied().collect(),
                target_groups: policy.target_groups.clone(),
                security_groups: policy.security_groups.clone(),
                unwrapped_packets: unwrapped.packets,
                unwrapped_bytes: unwrapped.bytes,
            }),
            flow_tables: Vec::new(),
            drops: drops.into_iter().map(|(reason, n)| (reason.name().into(), n)).collect(),
            warnings: self.nics.problems().chain(&policy.warnings).cloned().collect(),
        };
        let target_groups = self.config.target_groups.keys().cloned().collect();
        Ok(Snapshot { status, target_groups, targets: Vec::new() })
    }

    /// Takes everything down: programs and maps go with the data plane.
    async fn end(self) {
        tell_service_manager(sd_notify::NotifyState::Stopping);
        self.api.abort();
        for error in self.dataplane.detach().await {
            warn!("{error:#}");
        }
    }
}
