//! What a load balancer adds to the time of a request, on the way of packets and on the way of
//! requests: a client, the agent and a target in namespaces, one request at a time.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use lb_tests::agent::{Agent, Home};
use lb_tests::netns::Process;
use lb_tests::topology::{CLIENTS, Dual, Picture, Topology, target_host};
use tempfile::TempDir;

use super::load::{Load, Measured};
use super::servers::target_config;

/// Where the target's web server listens.
const TARGET_PORT: u16 = 8080;
/// The application load balancer's address; the network one's is the topology's.
const APPLICATION: u8 = 101;

/// A network with a client, a balancer with both kinds of load balancers, and a target.
pub struct Network {
    topology: Topology,
    _agent: Agent,
    _target: Process,
    _folder: TempDir,
}

/// A way from the client to the target.
pub struct Way {
    /// What the table calls it.
    pub name: &'static str,
    at: SocketAddr,
}

impl Network {
    /// Starts everything; `agent` is the program.
    ///
    /// # Errors
    /// If something does not start.
    pub fn start(agent: &Path) -> Result<Self> {
        let topology = Topology::new(Picture::TwoNics, 1)?;
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("target.conf");
        let address = target_host(0).v4_port(TARGET_PORT);
        fs::write(&file, target_config(folder.path(), address))?;
        let mut nginx = topology.targets[0].command("nginx");
        nginx.arg("-p").arg(folder.path()).arg("-c").arg(&file);
        let target = Process::spawn(&mut nginx).context("start nginx")?;
        let home = Home::new(&config(&topology))?;
        let agent =
            Agent::start_program(agent, home, &topology.balancer, topology.interfaces, &[])?;
        Ok(Self { topology, _agent: agent, _target: target, _folder: folder })
    }

    /// Without a load balancer, and with either kind.
    pub fn ways(&self) -> [Way; 3] {
        [
            Way { name: "routed, no load balancer", at: target_host(0).v4_port(TARGET_PORT) },
            Way { name: "network load balancer", at: self.topology.listener.v4_port(80) },
            Way {
                name: "application load balancer",
                at: Dual::new(CLIENTS, APPLICATION).v4_port(80),
            },
        ]
    }

    /// Sends one request after the other for so long.
    ///
    /// # Errors
    /// If the answers are wrong.
    pub fn measure(&self, way: &Way, length: Duration) -> Result<Measured> {
        let wrk = self.topology.client.command("wrk");
        Load::ONE.run(wrk, &format!("http://{}/", way.at), length)
    }
}

fn config(topology: &Topology) -> String {
    let target = target_host(0).v4;
    let (network, application) = (topology.listener.v4, Dual::new(CLIENTS, APPLICATION).v4);
    let check = "health_check = { protocol = \"http\", interval = \"1s\", timeout = \"1s\" }";
    format!(
        "[agent]
flow_table_size = 65536
[target_group.packets]
port = {TARGET_PORT}
targets = [\"{target}\"]
{check}
[target_group.requests]
protocol = \"http\"
port = {TARGET_PORT}
targets = [\"{target}\"]
{check}
[load_balancer.network]
addresses = [\"{network}\"]
listener = [{{ protocol = \"tcp\", port = 80, target_group = \"packets\" }}]
[load_balancer.application]
type = \"application\"
addresses = [\"{application}\"]
listener = [{{ protocol = \"http\", port = 80, target_group = \"requests\" }}]
"
    )
}
