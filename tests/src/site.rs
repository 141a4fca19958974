//! What most system tests begin with: a network, servers on every target, an agent in front.

use std::{fmt, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    agent::Agent,
    servers::{HttpServer, Server},
    topology::{Dual, Picture, Topology, target_host},
    wait_until,
};

/// The listener's port of the web servers.
pub const WEB: u16 = 80;
/// The listener's port of the TCP and UDP echo servers.
pub const ECHO: u16 = 7;

/// How long an effect may take that has nothing to wait for but a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// A configuration: load balancer `site` with the target groups `web`, `tcp` and `udp`.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses of the load balancer.
    pub listener: Dual,
    /// Targets by number, each with its weight.
    pub targets: Vec<(u8, u16)>,
    /// Lines of `[agent]`.
    pub agent: String,
    /// Lines of `[load_balancer.site]`.
    pub balancer: String,
    /// Lines of every target group.
    pub group: String,
    /// Lines of the target group web's health check.
    pub health_check: String,
    /// Further tables.
    pub tables: String,
    picture: Picture,
}

impl Config {
    /// All targets of the network, with a weight of 1.
    pub fn new(topology: &Topology, picture: Picture) -> Self {
        let targets = 0..u8::try_from(topology.targets.len()).expect("at most 80 targets");
        Self {
            listener: topology.listener,
            targets: targets.map(|index| (index, 1)).collect(),
            // A million flows, the default, take the kernel a while to make room for.
            agent: "flow_table_size = 65536\n".into(),
            balancer: String::new(),
            group: match picture {
                Picture::Dsr => "forwarding = \"dsr_l2\"\n".into(),
                Picture::OneNic | Picture::TwoNics => String::new(),
            },
            health_check: "protocol = \"http\"\npath = \"/health\"\n".into(),
            tables: String::new(),
            picture,
        }
    }

    /// With these targets instead, each with a weight of 1.
    pub fn with_targets(&self, targets: impl IntoIterator<Item = u8>) -> Self {
        let targets = targets.into_iter().map(|index| (index, 1)).collect();
        Self { targets, ..self.clone() }
    }

    fn write_group(
        &self,
        f: &mut fmt::Formatter<'_>,
        name: &str,
        protocol: &str,
        port: u16,
    ) -> fmt::Result {
        let port = target_port(self.picture, port);
        writeln!(f, "[target_group.{name}]\nprotocol = \"{protocol}\"\nport = {port}")?;
        writeln!(f, "{}targets = [", self.group)?;
        for (index, weight) in &self.targets {
            for address in target_host(*index).both() {
                writeln!(f, "  {{ address = \"{address}\", weight = {weight} }},")?;
            }
        }
        // A second is long for a machine that is busy with other tests.
        writeln!(f, "]\n[target_group.{name}.health_check]\ninterval = \"1s\"\ntimeout = \"1s\"")?;
        let check = if name == "web" { &self.health_check } else { "protocol = \"tcp\"\n" };
        writeln!(f, "healthy_threshold = 2\n{check}")
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "[agent]\n{}", self.agent)?;
        self.write_group(f, "tcp", "tcp", ECHO)?;
        self.write_group(f, "udp", "udp", ECHO)?;
        self.write_group(f, "web", "tcp", WEB)?;
        writeln!(f, "[load_balancer.site]\naddresses = [{}]\n{}", self.listener, self.balancer)?;
        for (protocol, port, group) in
            [("tcp", WEB, "web"), ("tcp", ECHO, "tcp"), ("udp", ECHO, "udp")]
        {
            writeln!(f, "[[load_balancer.site.listener]]")?;
            writeln!(f, "protocol = \"{protocol}\"\nport = {port}\ntarget_group = \"{group}\"")?;
        }
        writeln!(f, "{}", self.tables)
    }
}

/// `nat` changes the port too, direct server return cannot.
pub fn target_port(picture: Picture, listener: u16) -> u16 {
    match picture {
        Picture::Dsr => listener,
        Picture::OneNic | Picture::TwoNics => 8000 + listener,
    }
}

/// The servers of one target: a web server, a TCP and a UDP echo server in each family.
#[derive(Debug)]
pub struct Servers {
    /// Web servers.
    pub web: Vec<HttpServer>,
    /// TCP echo servers.
    pub tcp: Vec<Server>,
    /// UDP echo servers.
    pub udp: Vec<Server>,
}

impl Servers {
    /// Starts them on a target of the network.
    ///
    /// # Errors
    ///
    /// If a port is taken.
    pub fn start(topology: &Topology, picture: Picture, index: u8) -> Result<Self> {
        let namespace = &topology.targets[usize::from(index)];
        let mut addresses = target_host(index).both().to_vec();
        if picture == Picture::Dsr {
            // Health checks come to its own address, clients to the listener's.
            addresses.extend(topology.listener.both());
        }
        let mut servers = Self { web: Vec::new(), tcp: Vec::new(), udp: Vec::new() };
        for address in addresses {
            let at = |port| SocketAddr::new(address, target_port(picture, port));
            servers.web.push(HttpServer::start(namespace, at(WEB))?);
            servers.tcp.push(Server::tcp_echo(namespace, at(ECHO))?);
            servers.udp.push(Server::udp_echo(namespace, at(ECHO))?);
        }
        Ok(servers)
    }

    /// How many datagrams they took.
    pub fn datagrams(&self) -> u64 {
        self.udp.iter().map(Server::served).sum()
    }
}

/// All of it, running. Parts may be taken out and put back.
#[derive(Debug)]
pub struct Site {
    /// The agent; it goes first.
    pub agent: Agent,
    /// What it was started with.
    pub config: Config,
    /// By target; `None`: killed.
    pub servers: Vec<Option<Servers>>,
    /// The network; it goes last.
    pub topology: Topology,
    picture: Picture,
}

impl Site {
    /// A network with that many targets, all healthy, behind an agent.
    ///
    /// # Errors
    ///
    /// If a part does not start.
    pub fn start(picture: Picture, targets: u8) -> Result<Self> {
        Self::start_with(picture, targets, |_| {})
    }

    /// The same with a configuration that `change` has changed.
    ///
    /// # Errors
    ///
    /// If a part does not start.
    pub fn start_with(
        picture: Picture,
        targets: u8,
        change: impl FnOnce(&mut Config),
    ) -> Result<Self> {
        let topology = Topology::new(picture, targets)?;
        let servers = (0..targets).map(|index| Servers::start(&topology, picture, index).map(Some));
        let servers = servers.collect::<Result<_>>()?;
        let mut config = Config::new(&topology, picture);
        change(&mut config);
        let agent = Agent::start(&topology.balancer, topology.interfaces, &config.to_string())?;
        Ok(Self { agent, config, servers, topology, picture })
    }

    /// The listener's addresses with [`WEB`].
    pub fn web(&self) -> [SocketAddr; 2] {
        self.topology.listener.both().map(|address| (address, WEB).into())
    }

    /// The listener's addresses with [`ECHO`].
    pub fn echo(&self) -> [SocketAddr; 2] {
        self.topology.listener.both().map(|address| (address, ECHO).into())
    }

    /// Does something as the client.
    pub fn client<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.topology.client.run(f)
    }

    /// Kills the servers of a target; its ports are closed.
    pub fn kill_servers(&mut self, index: u8) {
        self.servers[usize::from(index)] = None;
    }

    /// Starts the servers of a target again.
    ///
    /// # Errors
    ///
    /// If a port is taken.
    pub fn start_servers(&mut self, index: u8) -> Result<()> {
        let servers = Servers::start(&self.topology, self.picture, index)?;
        self.servers[usize::from(index)] = Some(servers);
        Ok(())
    }

    /// Replaces the configuration file and waits until the agent has taken it over.
    ///
    /// # Errors
    ///
    /// If it has not in time.
    pub fn reload(&mut self, config: Config) -> Result<()> {
        let reloads = |agent: &Agent| agent.log().matches("configuration reloaded").count();
        let before = reloads(&self.agent);
        self.agent.reload(&config.to_string())?;
        wait_until("reload", PATIENCE, || reloads(&self.agent) > before)
            .with_context(|| self.agent.log())?;
        self.config = config;
        Ok(())
    }

    /// Waits until a target of group `web` is in that state, in both families.
    ///
    /// # Errors
    ///
    /// If it is not in time.
    pub fn wait_for_web(&self, index: u8, state: &str) -> Result<()> {
        let addresses = target_host(index).both().map(|address| address.to_string());
        let is_there = || {
            let targets = self.agent.targets().unwrap_or_default();
            let targets = targets.as_array().map(Vec::as_slice).unwrap_or_default();
            let mut of_web = targets.iter().filter(|target| {
                target["target_group"] == "web"
                    && addresses.iter().any(|address| target["address"] == **address)
            });
            of_web.clone().count() == 2 && of_web.all(|target| target["state"] == state)
        };
        wait_until(&format!("target {index} {state}"), PATIENCE, is_there)
            .with_context(|| format!("{:?}\n{}", self.agent.targets(), self.agent.log()))
    }

    /// How many packets the agent says were dropped for `reason`.
    ///
    /// # Errors
    ///
    /// If the agent does not answer.
    pub fn drops(&self, reason: &str) -> Result<u64> {
        Ok(self.agent.status()?["drops"][reason].as_u64().unwrap_or(0))
    }

    /// A target as `targets --json` shows it.
    ///
    /// # Errors
    ///
    /// If the agent does not answer or knows no such target.
    pub fn target(&self, group: &str, address: impl fmt::Display) -> Result<Value> {
        let address = address.to_string();
        let targets = self.agent.targets()?;
        let is_it =
            |target: &&Value| target["target_group"] == group && target["address"] == *address;
        let target = targets.as_array().and_then(|targets| targets.iter().find(is_it));
        target.cloned().with_context(|| format!("no {address} in {group}: {targets}"))
    }
}
