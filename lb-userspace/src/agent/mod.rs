//! The agent: starts everything, owns the state, carries every event through to the kernel, and
//! takes everything down at the end.

mod flows;
mod kernel_log;
mod nics;
mod port_holder;
pub(crate) mod reload;
mod serve;
mod snat;
mod start;
pub(crate) mod watch;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lb_common::flow::{FlowTable, HashKeys};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{debug, error, info, warn};

use crate::api::server::ApiRequest;
use crate::api::snapshot::Snapshot;
use crate::cli::AgentOptions;
use crate::config::{Config, Forwarding, Role};
use crate::dataplane::{Dataplane, FlowTableUsage};
use crate::health::{Checker, HealthEvent};
use crate::netlink::{
    AddressManager, IpFamily, Netlink, NetworkEvent, ReservedPorts, StateDirectory,
    missing_forwarding,
};
use crate::reconcile::{self, Desired};
use crate::state::{About, Findings, State, Walk};
use crate::target;

use reload::Source;
use watch::Watch;

pub(crate) use nics::{Attaches, Nics, interfaces};
pub(crate) use start::Prepared;

/// How often time passes for the state: slots age, draining ends.
const TICK: Duration = Duration::from_secs(1);
/// How long the health events of one burst are gathered before the tables follow: short beside the
/// shortest check, long beside a change of all rings.
const GATHER: Duration = Duration::from_millis(20);
/// Time between two walks over the flow table, while exceptions keep slots from settling.
const WALK: Duration = Duration::from_secs(30);
/// The same while flows are counted for `targets`.
const COUNT: Duration = Duration::from_secs(10);
/// The same while there are pinned slots that no walk has looked at: packets of theirs are looked up
/// in every table.
const SOON: Duration = Duration::from_secs(1);
/// Part of the time that walks may take: one in so many.
const WALKS_SHARE: u32 = 20;

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
        // First of all: whatever is done from here on is undone at the end, also if the end comes
        // before the start is over.
        let signals = Signals::listen()?;
        let (source, mut config) = Source::open(options.config.clone())?;
        config.agent.role = options.role.unwrap_or(config.agent.role);
        if config.agent.role == Role::Target {
            return target::run(options, signals, source, config).await;
        }
        let (mut agent, mut events) = Agent::start(options, signals, source, config).await?;
        agent.follow(&mut events).await;
        agent.end(&mut events.signals).await;
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
    warnings: Vec<String>,
    network_problems: Vec<String>,
    /// What the log has been told of what does not forward.
    alerts: Vec<String>,

    checker: Checker,
    netlink: Netlink,
    network_events: mpsc::Sender<NetworkEvent>,
    addresses: AddressManager,
    nics: Nics,
    reserved_ports: ReservedPorts,
    port_problem: Option<String>,
    /// Given up last: what is noted in it has been put back by then.
    state_directory: StateDirectory,
    api: JoinHandle<()>,

    /// When it began, and what it will have found.
    walk: Option<(Instant, JoinHandle<(Findings, Duration)>)>,
    flow_tables: [FlowTableUsage; FlowTable::ALL.len()],
    watchman: flows::Watchman,
    last_walk: Instant,
    last_walk_took: Duration,
    snat_walks: snat::Walks,
    serving: serve::Serving,
    is_ready: bool,
}

/// Everything that wakes the owner.
struct Events {
    health: mpsc::Receiver<HealthEvent>,
    network: mpsc::Receiver<NetworkEvent>,
    api: mpsc::Receiver<ApiRequest>,
    unresolved: mpsc::Receiver<IpAddr>,
    file: Watch,
    signals: Signals,
}

/// Signals that the agent knows.
pub(crate) struct Signals {
    pub(crate) hangup: Signal,
    pub(crate) terminate: Signal,
    pub(crate) interrupt: Signal,
    /// Logs are to be opened again; of no meaning for a target.
    pub(crate) user1: Signal,
}

impl Signals {
    /// From now on they are kept until somebody looks for them, and end nothing by themselves.
    fn listen() -> anyhow::Result<Self> {
        let on = |kind| signal(kind).context("listen for signals");
        Ok(Self {
            hangup: on(SignalKind::hangup())?,
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            user1: on(SignalKind::user_defined1())?,
        })
    }
}

impl Agent {
    /// Carries events through, one after the other, until a signal ends it.
    async fn follow(&mut self, events: &mut Events) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut gathered = None;
        loop {
            tokio::select! {
                Some(event) = events.network.recv() => self.on_network(event).await,
                Some(event) = events.health.recv() => {
                    self.on_health(event);
                    while let Ok(event) = events.health.try_recv() {
                        self.on_health(event);
                    }
                    // A thousand checks conclude at about the same time, not at the same time.
                    gathered = gathered.or_else(|| Some(tokio::time::Instant::now() + GATHER));
                }
                () = until(gathered) => {
                    gathered = None;
                    self.reconcile();
                }
                Some(ApiRequest::Snapshot(reply)) = events.api.recv() => {
                    // What is told is true of the tables already.
                    if gathered.take().is_some() {
                        self.reconcile();
                    }
                    match self.snapshot() {
                        // A reader that went away needs no answer.
                        Ok(snapshot) => drop(reply.send(snapshot)),
                        Err(error) => warn!("no snapshot: {error:#}"),
                    }
                }
                Some(address) = events.unresolved.recv() => self.netlink.resolve_now(address),
                () = events.file.changed() => self.reload(false).await,
                _ = events.signals.hangup.recv() => self.reload(true).await,
                _ = events.signals.user1.recv() => self.serving.reopen_logs(),
                _ = tick.tick() => self.on_tick().await,
                _ = events.signals.terminate.recv() => break info!("ending on SIGTERM"),
                _ = events.signals.interrupt.recv() => break info!("ending on SIGINT"),
            }
        }
    }

    async fn on_network(&mut self, event: NetworkEvent) {
        match event {
            NetworkEvent::RoutesChanged => self.dataplane.invalidate_next_hops(),
            NetworkEvent::Snapshot(network) => {
                self.dataplane.invalidate_next_hops();
                self.nics.follow(&mut self.dataplane, &network);
                let attached = self.dataplane.attachments().iter().map(|nic| nic.ifindex);
                self.state.set_attached(attached.collect());
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
        self.state.set_health(event, Instant::now());
    }

    async fn on_tick(&mut self) {
        let now = Instant::now();
        if self.state.tick(now) {
            self.netlink.want(self.state.destinations());
            self.reconcile();
        }
        let ended = self.serving.ended(self.state.ending());
        if self.state.forget_ended(|at| ended.contains(&at), now) {
            self.manage_addresses().await;
            self.reconcile();
        }
        match self.dataplane.flow_table_usage() {
            Ok(usage) => {
                self.watchman.look(&usage, now);
                self.flow_tables = usage;
            }
            Err(error) => error!("the flows cannot be counted: {error:#}"),
        }
        if let Some((begun, walk)) = self.walk.take_if(|(_, walk)| walk.is_finished()) {
            match walk.await {
                Ok((findings, took)) => {
                    self.last_walk_took = took;
                    self.settle(&findings, begun);
                    self.state.set_flows(findings.flows);
                    let mut corrections = findings.corrections;
                    // A place that was cleared meanwhile stays clear.
                    corrections.retain(|target, _| self.current.shares.contains_key(target));
                    if let Err(error) = self.dataplane.correct(&corrections) {
                        error!("the targets' connections cannot be told: {error:#}");
                    }
                }
                Err(error) => error!("the walk over the flow table ended early: {error}"),
            }
        }
        if self.walk.is_none() && now.duration_since(self.last_walk) >= self.walks_pause() {
            self.last_walk = now;
            self.start_walk();
        }
        self.walk_snat(now).await;
        self.serving.look(&self.state);
    }

    /// Time between the beginnings of two walks.
    fn walks_pause(&self) -> Duration {
        let pause = if self.state.has_unexplored_slots() {
            SOON
        } else if self.state.counts_flows() {
            COUNT
        } else {
            WALK
        };
        pause.max(self.last_walk_took * WALKS_SHARE)
    }

    /// What a walk has found of pinned slots: first the map, then the slots that go by it.
    fn settle(&mut self, findings: &Findings, begun: Instant) {
        if findings.settled.is_empty() {
            return;
        }
        self.dataplane.map_exceptions(&findings.exceptions);
        self.state.settle(findings, begun);
        self.reconcile();
    }

    fn start_walk(&mut self) {
        let pinned = self.state.pinned();
        // What is over makes room for others only when somebody takes it out.
        let is_half_full = |table: &FlowTableUsage| table.entries > u64::from(table.size / 2);
        let is_full = self.flow_tables.iter().any(is_half_full);
        if pinned.is_empty() && !is_full && !self.state.counts_flows() {
            return;
        }
        let begun = Instant::now();
        match self.dataplane.flow_tables() {
            Ok(flows) => {
                let walk = Walk {
                    tables: self.current.clone(),
                    keys: self.keys,
                    ring_size: self.ring_size,
                    pinned,
                };
                let walk = tokio::task::spawn_blocking(move || {
                    let findings = flows::walk(walk, flows);
                    (findings, begun.elapsed())
                });
                self.walk = Some((begun, walk));
            }
            Err(error) => error!("no walk over the flow table: {error:#}"),
        }
    }

    /// Reads the configuration again. What is wrong with it changes nothing that runs.
    async fn reload(&mut self, is_asked: bool) {
        let running = self.state.config();
        let Some(config) = self.source.reload(is_asked, running) else { return };
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
        let forwarded = self.state.forwarded_groups();
        let routes = forwarded
            .iter()
            .filter_map(|name| config.target_groups.get(name))
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
        self.tell_alerts();
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
        self.serving.follow(&self.state);
        if !self.is_ready && self.state.is_ready() {
            self.is_ready = true;
            let problems = self.serving.problems().count();
            if problems > 0 {
                warn!(problems, "not everything works, `status` tells what");
            }
            info!("ready");
            tell_service_manager(sd_notify::NotifyState::Ready);
        }
    }

    fn tell_alerts(&mut self) {
        let alerts = self.state.alerts();
        for alert in alerts.iter().filter(|alert| !self.alerts.contains(alert)) {
            warn!("{alert}");
        }
        for alert in self.alerts.iter().filter(|alert| !alerts.contains(alert)) {
            info!("no longer so: {alert}");
        }
        self.alerts = alerts.to_vec();
    }

    fn snapshot(&mut self) -> anyhow::Result<Snapshot> {
        self.check_forwarding();
        let about = About {
            agent: self.source.describe(Role::Balancer, self.generation),
            interfaces: interfaces(self.dataplane.attachments()),
            flow_tables: flows::in_status(&self.flow_tables),
            warnings: self
                .nics
                .problems()
                .chain(&self.warnings)
                .chain(&self.network_problems)
                .chain(&self.port_problem)
                .chain(self.serving.problems())
                .cloned()
                .collect(),
        };
        let mut snapshot = self.state.snapshot(about, &self.dataplane)?;
        self.serving.complete(&mut snapshot)?;
        Ok(snapshot)
    }

    /// Takes everything down: program and maps go with the data plane. Requests in progress may end
    /// before, unless a second signal comes.
    async fn end(mut self, signals: &mut Signals) {
        tell_service_manager(sd_notify::NotifyState::Stopping);
        tokio::select! {
            () = self.serving.end(self.state.addresses()) => {}
            _ = signals.terminate.recv() => {}
            _ = signals.interrupt.recv() => {}
        }
        self.api.abort();
        drop(self.checker);
        match self.addresses.release().await {
            Ok(errors) => errors.iter().for_each(|error| warn!("{error}")),
            Err(error) => warn!("addresses stay on the machine: {error}"),
        }
        if let Err(error) = self.nics.restore() {
            warn!("rxvlan stays off: {error}");
        }
        if let Err(error) = self.reserved_ports.restore() {
            warn!("ports stay reserved: {error}");
        }
        drop(self.state_directory);
    }
}

/// Waits for a moment; without one, for ever.
async fn until(moment: Option<tokio::time::Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Tells systemd, if it is what started the agent.
pub(crate) fn tell_service_manager(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        debug!("the service manager was not told: {error}");
    }
}
