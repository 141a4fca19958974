//! The agent: starts everything, owns the state, carries every event through to the kernel, and
//! takes everything down at the end.

mod flows;
mod kernel_log;
mod reload;
mod snat;
mod start;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lb_common::flow::HashKeys;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{debug, error, info, warn};

use crate::api::server::ApiRequest;
use crate::api::snapshot::{self, AttachMode, Snapshot};
use crate::cli::AgentOptions;
use crate::config::{Config, Forwarding};
use crate::dataplane::Dataplane;
use crate::health::{Checker, HealthEvent};
use crate::netlink::{
    AddressManager, IpFamily, Netlink, NetworkEvent, ReservedPorts, VlanOffload, missing_forwarding,
};
use crate::reconcile::{self, Desired};
use crate::state::{About, State};

use reload::{Source, Watch};

/// How often time passes for the state: slots age, draining ends.
const TICK: Duration = Duration::from_secs(1);
/// Time between two walks over the flow table, while slots wait for one.
const WALK: Duration = Duration::from_secs(30);

/// Runs the agent until it is told to end.
///
/// # Errors
/// What keeps it from starting: usage, configuration, privileges, interfaces. Once it runs, it
/// ends by a signal only.
pub fn run(options: AgentOptions) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        let (mut agent, mut events) = Agent::start(options).await?;
        agent.follow(&mut events).await;
        agent.end().await;
        Ok(())
    })
}

/// The owner of the state.
struct Agent {
    state: State,
    dataplane: Dataplane,
    /// What the kernel's tables hold.
    current: Arc<Desired>,
    generation: u64,
    keys: HashKeys,
    ring_size: u32,

    source: Source,
    reload_error: Option<String>,
    warnings: Vec<String>,
    network_problems: Vec<String>,

    checker: Checker,
    netlink: Netlink,
    network_events: mpsc::Sender<NetworkEvent>,
    addresses: AddressManager,
    vlan_offload: VlanOffload,
    reserved_ports: ReservedPorts,
    port_problem: Option<String>,
    api: JoinHandle<()>,

    walk: Option<JoinHandle<flows::Settled>>,
    last_walk: Instant,
    snat_walks: snat::Walks,
    started: u64,
    is_ready: bool,
}

/// Everything that wakes the owner.
struct Events {
    health: mpsc::Receiver<HealthEvent>,
    network: mpsc::Receiver<NetworkEvent>,
    api: mpsc::Receiver<ApiRequest>,
    unresolved: mpsc::Receiver<IpAddr>,
    file: Watch,
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Agent {
    /// Carries events through, one after the other, until a signal ends it.
    async fn follow(&mut self, events: &mut Events) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                Some(event) = events.network.recv() => self.on_network(event).await,
                Some(event) = events.health.recv() => {
                    self.on_health(event);
                    // A thousand first checks conclude at about the same time.
                    while let Ok(event) = events.health.try_recv() {
                        self.on_health(event);
                    }
                    self.reconcile();
                }
                Some(ApiRequest::Snapshot(reply)) = events.api.recv() => match self.snapshot() {
                    // A reader that went away needs no answer.
                    Ok(snapshot) => drop(reply.send(snapshot)),
                    Err(error) => warn!("no snapshot: {error:#}"),
                },
                Some(address) = events.unresolved.recv() => self.netlink.resolve_now(address),
                () = events.file.changed() => self.reload(false).await,
                _ = events.hangup.recv() => self.reload(true).await,
                _ = tick.tick() => self.on_tick().await,
                _ = events.terminate.recv() => break info!("ending on SIGTERM"),
                _ = events.interrupt.recv() => break info!("ending on SIGINT"),
            }
        }
    }

    async fn on_network(&mut self, event: NetworkEvent) {
        match event {
            NetworkEvent::RoutesChanged => self.dataplane.invalidate_next_hops(),
            NetworkEvent::Snapshot(network) => {
                self.dataplane.invalidate_next_hops();
                self.state.set_network(network);
                self.manage_addresses().await;
                self.check_forwarding();
                self.reconcile();
            }
            NetworkEvent::Lost => {
                warn!("the observer of the network ended: starting another");
                match Netlink::start(self.network_events.clone()) {
                    Ok(netlink) => self.netlink = netlink,
                    Err(error) => error!("no observer of the network: {error}"),
                }
                self.netlink.want(self.state.destinations());
            }
        }
    }

    fn on_health(&mut self, event: HealthEvent) {
        let HealthEvent { key, health } = &event;
        let target = std::net::SocketAddr::new(key.address, key.port);
        let reason = health.description.as_deref().unwrap_or_default();
        info!(%target, group = %key.target_group, state = %health.state, reason, "target");
        self.state.set_health(event);
    }

    async fn on_tick(&mut self) {
        let now = Instant::now();
        if self.state.tick(now) {
            self.netlink.want(self.state.destinations());
            self.reconcile();
        }
        if self.walk.as_ref().is_some_and(JoinHandle::is_finished)
            && let Some(walk) = self.walk.take()
        {
            match walk.await {
                Ok(settled) => {
                    self.state.settle(&settled);
                    self.reconcile();
                }
                Err(error) => error!("the walk over the flow table ended early: {error}"),
            }
        }
        if self.walk.is_none() && now.duration_since(self.last_walk) >= WALK {
            self.last_walk = now;
            self.start_walk();
        }
        self.walk_snat(now).await;
    }

    fn start_walk(&mut self) {
        let pinned = self.state.pinned();
        if pinned.is_empty() {
            return;
        }
        match self.dataplane.flow_table() {
            Ok(table) => {
                let walk = flows::Walk {
                    table,
                    tables: self.current.clone(),
                    keys: self.keys,
                    ring_size: self.ring_size,
                    pinned,
                };
                self.walk = Some(tokio::task::spawn_blocking(move || walk.run()));
            }
            Err(error) => error!("no walk over the flow table: {error:#}"),
        }
    }

    /// Reads the configuration again. What is wrong with it changes nothing that runs.
    async fn reload(&mut self, is_asked: bool) {
        let config = match self.source.read_again(is_asked, self.state.config()) {
            Ok(Some(config)) => config,
            Ok(None) => return,
            Err(error) => {
                error!(
                    "the configuration is not taken over, the running one stays in force:\n{error:#}"
                );
                self.reload_error = Some(format!("{error:#}"));
                return;
            }
        };
        self.reload_error = None;
        self.set_config(config).await;
        info!("configuration reloaded");
    }

    async fn set_config(&mut self, config: Config) {
        self.state.set_config(config, Instant::now());
        self.reserve_ports();
        self.manage_addresses().await;
        self.check_forwarding();
        self.netlink.want(self.state.destinations());
        self.checker.reconcile(self.state.checks());
        self.reconcile();
    }

    /// Adds the listeners' addresses to the machine, and takes back those that are none any more.
    async fn manage_addresses(&mut self) {
        let manages = self.state.config().agent.manage_addresses;
        let wanted = if manages { self.state.addresses() } else { BTreeSet::new() };
        let attached: Vec<u32> =
            self.dataplane.attachments().iter().map(|nic| nic.ifindex).collect();
        let problems = match self.addresses.reconcile(&wanted, &attached).await {
            Ok(errors) => errors.iter().map(ToString::to_string).collect(),
            Err(error) => vec![format!("the machine's addresses cannot be managed: {error}")],
        };
        for problem in &problems {
            if !self.warnings.contains(problem) {
                warn!("{problem}");
            }
        }
        self.warnings = problems;
        self.state.set_owned(self.addresses.owned());
    }

    /// Replies of NAT leave by the kernel's routes, which wants forwarding switched on.
    fn check_forwarding(&mut self) {
        let config = self.state.config();
        let routes = config
            .target_groups
            .values()
            .any(|group| matches!(group.forwarding, Forwarding::Nat | Forwarding::Snat));
        let mut problems = Vec::new();
        let families = [
            (IpFamily::V4, self.state.addresses().iter().any(IpAddr::is_ipv4)),
            (IpFamily::V6, self.state.addresses().iter().any(IpAddr::is_ipv6)),
        ];
        for nic in self.dataplane.attachments() {
            for (family, _) in families.into_iter().filter(|(_, used)| routes && *used) {
                match missing_forwarding(&nic.name, family) {
                    Ok(Some(sysctl)) => problems.push(format!(
                        "forwarding is off on {}: replies of nat and snat targets are dropped as \
                         NextHopUnresolved until you run `sysctl -w {sysctl}=1`",
                        nic.name
                    )),
                    Ok(None) => {}
                    Err(error) => debug!(interface = nic.name, "forwarding not readable: {error}"),
                }
            }
        }
        for problem in &problems {
            if !self.network_problems.contains(problem) {
                warn!("{problem}");
            }
        }
        self.network_problems = problems;
    }

    /// Brings the kernel's tables to what should be true now.
    fn reconcile(&mut self) {
        let desired = self.state.desired(Instant::now());
        let plan = reconcile::diff(&self.current, &desired);
        if !plan.steps.is_empty() {
            for step in &plan.steps {
                debug!("{step}");
            }
            if let Err(error) = self.dataplane.apply(&plan) {
                // The next change tries the same writes again.
                error!("the kernel's tables are not as they should be: {error:#}");
                return;
            }
            self.generation += 1;
            self.current = Arc::new(desired);
        }
        if !self.is_ready && self.state.is_ready() {
            self.is_ready = true;
            info!("ready");
            if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
                debug!("the service manager was not told: {error}");
            }
        }
    }

    fn snapshot(&mut self) -> anyhow::Result<Snapshot> {
        self.check_forwarding();
        let interfaces = self.dataplane.attachments().iter().map(|nic| snapshot::Interface {
            name: nic.name.clone(),
            index: nic.ifindex,
            mode: if nic.is_native { AttachMode::Native } else { AttachMode::Generic },
        });
        let about = About {
            agent: snapshot::Agent {
                version: env!("CARGO_PKG_VERSION").into(),
                pid: std::process::id(),
                started: self.started,
                configuration: self.configuration(),
                generation: self.generation,
                reload_error: self.reload_error.clone(),
            },
            interfaces: interfaces.collect(),
            warnings: self
                .warnings
                .iter()
                .chain(&self.network_problems)
                .chain(&self.port_problem)
                .cloned()
                .collect(),
        };
        self.state.snapshot(about, &self.dataplane)
    }

    fn configuration(&self) -> Option<PathBuf> {
        self.source.is_there().then(|| self.source.path().to_owned())
    }

    /// Takes everything down: program and maps go with the data plane.
    async fn end(mut self) {
        if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Stopping]) {
            debug!("the service manager was not told: {error}");
        }
        self.api.abort();
        drop(self.checker);
        match self.addresses.release().await {
            Ok(errors) => errors.iter().for_each(|error| warn!("{error}")),
            Err(error) => warn!("addresses stay on the machine: {error}"),
        }
        if let Err(error) = self.vlan_offload.restore() {
            warn!("rxvlan stays off: {error}");
        }
        if let Err(error) = self.reserved_ports.restore() {
            warn!("ports stay reserved: {error}");
        }
    }
}

fn on(kind: SignalKind) -> anyhow::Result<Signal> {
    signal(kind).context("listen for signals")
}
