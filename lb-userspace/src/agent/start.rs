//! Starting: everything that can be refused is refused before a packet meets the program.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lb_common::flow::HashKeys;
use tokio::sync::mpsc;
use tracing::{Level, info, warn};

use crate::api::server::Server;
use crate::cli::{AgentOptions, Usage, choose_interfaces};
use crate::config::{Config, XdpMode};
use crate::dataplane::{Dataplane, LoadOptions, check_privileges};
use crate::health::Checker;
use crate::netlink::{
    AddressManager, DEFAULT_STATE_DIRECTORY, Interface, LinkLayer, Netlink, NetworkEvent,
    ReservedPorts, StateDirectory, read_interfaces,
};
use crate::reconcile::Desired;
use crate::state::{State, port_pools};

use super::nics::Nics;
use super::reload::Source;
use super::watch::Watch;
use super::{Agent, Events, Signals, kernel_log};

/// Events that may wait for the owner.
const WAITING: usize = 4096;

/// What an agent of either role needs before it changes anything.
pub(crate) struct Prepared {
    /// The NICs to attach to.
    pub(crate) nics: Vec<Interface>,
    /// How to attach.
    pub(crate) mode: XdpMode,
    /// Where the API's socket is.
    pub(crate) socket: PathBuf,
    /// It answers there.
    pub(crate) server: Server,
}

impl Prepared {
    /// Looks whether all is there.
    ///
    /// # Errors
    /// No interface named or an unknown one, missing privileges, another agent on the socket.
    pub(crate) async fn new(options: AgentOptions, config: &Config) -> anyhow::Result<Self> {
        let names = choose_interfaces(&options.interfaces, &config.agent.interfaces)?;
        check_privileges()?;
        let nics = find(&names).await?;
        let mode = options.xdp_mode.unwrap_or(config.agent.xdp_mode);
        let socket = options.api_socket.unwrap_or_else(|| config.agent.api_socket.clone());
        let server = Server::bind(&socket).await?;
        Ok(Self { nics, mode, socket, server })
    }
}

impl Agent {
    /// Loads and attaches the program, starts all observers.
    pub(super) async fn start(
        options: AgentOptions,
        signals: Signals,
        source: Source,
        config: Config,
    ) -> anyhow::Result<(Self, Events)> {
        let Prepared { nics, mode, socket, server } = Prepared::new(options, &config).await?;
        let state_directory = StateDirectory::claim(Path::new(DEFAULT_STATE_DIRECTORY), &socket)
            .await
            .with_context(|| format!("claim a directory below {DEFAULT_STATE_DIRECTORY}"))?;

        let ring_size = config.agent.maglev_table_size;
        let hash_seed = config.agent.hash_seed.unwrap_or_else(rand::random);
        let mut dataplane = Dataplane::load(&LoadOptions {
            hash_seed,
            ring_size,
            flow_table_size: config.agent.flow_table_size,
            port_pools: port_pools(&config),
            half_open_table_size: config.agent.half_open_table_size,
            once_seen_table_size: config.agent.once_seen_table_size,
            log: tracing::enabled!(target: "lb_ebpf", Level::DEBUG),
        })?;
        kernel_log::follow_messages(&mut dataplane)?;
        let attached: BTreeSet<u32> = nics.iter().map(|nic| nic.index).collect();
        let nics = Nics::attach(&mut dataplane, &nics, mode, Some(state_directory.path()))?;

        let (network_events, mut network) = mpsc::channel(WAITING);
        let netlink = Netlink::start(network_events.clone()).context("observe the network")?;
        let (health_events, health) = mpsc::channel(WAITING);
        let (api_requests, api) = mpsc::channel(WAITING);
        let (unresolved_events, unresolved) = mpsc::channel(WAITING);
        if let Some(reports) = dataplane.take_unresolved() {
            kernel_log::follow_unresolved(reports, unresolved_events)?;
        }

        let mut state = State::new(ring_size);
        state.set_port_pools(port_pools(&config));
        state.set_attached(attached);
        let mut agent = Self {
            state,
            dataplane,
            current: Arc::new(Desired::default()),
            generation: 0,
            keys: HashKeys::from_seed(hash_seed),
            ring_size,
            source,
            warnings: Vec::new(),
            network_problems: Vec::new(),
            alerts: Vec::new(),
            checker: Checker::new(health_events),
            netlink,
            network_events,
            addresses: AddressManager::new(state_directory.path()).context("manage addresses")?,
            nics,
            reserved_ports: ReservedPorts::new(state_directory.path()).context("reserve ports")?,
            port_problem: None,
            state_directory,
            api: tokio::spawn(async move {
                server.serve(api_requests).await;
            }),
            walk: None,
            flow_tables: Default::default(),
            watchman: Default::default(),
            last_walk: Instant::now(),
            last_walk_took: Duration::ZERO,
            snat_walks: super::snat::Walks::default(),
            serving: super::serve::Serving::new(),
            is_ready: false,
        };
        let events = Events {
            health,
            api,
            unresolved,
            file: Watch::new(agent.source.path()),
            signals,
            network: {
                // The first picture comes before the first address is added.
                while let Some(event) = network.recv().await {
                    if let NetworkEvent::Snapshot(snapshot) = event {
                        agent.state.set_network(snapshot);
                        break;
                    }
                }
                network
            },
        };
        welcome(&agent.source, &config);
        agent.set_config(config).await;
        Ok((agent, events))
    }
}

/// The machine's NICs of these names.
async fn find(names: &[String]) -> anyhow::Result<Vec<Interface>> {
    let interfaces = read_interfaces().await.context("list the interfaces")?;
    let mut found: Vec<Interface> = Vec::new();
    for name in names {
        let Some(nic) = interfaces.values().find(|nic| nic.name == *name) else {
            let others: BTreeSet<_> = interfaces.values().map(|nic| nic.name.as_str()).collect();
            let others: Vec<_> = others.into_iter().collect();
            return Err(Usage(format!(
                "there is no interface {name} on this machine; there are: {}",
                others.join(", ")
            ))
            .into());
        };
        if nic.layer != LinkLayer::Ethernet {
            return Err(Usage(format!(
                "{name} carries no Ethernet frames; lb attaches to Ethernet interfaces"
            ))
            .into());
        }
        if found.iter().any(|other| other.index == nic.index) {
            continue;
        }
        if !nic.up {
            warn!(interface = %name, "the interface is down or has no carrier");
        }
        found.push(nic.clone());
    }
    Ok(found)
}

/// Tells a newcomer what to do next.
fn welcome(source: &Source, config: &Config) {
    let path = source.path().display();
    if !source.is_there() {
        info!(
            "there is no configuration file {path}: all traffic passes untouched. To add a load \
             balancer, write one, for example:\n\n{}\nIt is taken over as soon as it is saved \
             (`lb-userspace check {path}` says whether it is right).",
            include_str!("example.toml")
        );
    } else if config.load_balancers.is_empty() {
        info!("{path} has no load balancer: all traffic passes untouched");
    }
}
