//! Two targets, a load balancer called `site`, and a client that asks our own responder for names.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Command,
};

use lb_tests::{
    agent::{Agent, Home, binary},
    netns::Namespace,
    servers::HttpServer,
    site::PATIENCE,
    topology::{CLIENTS, Dual, Picture, Topology, target_host},
    wait_until,
};
use serde_json::Value;

use crate::authority::Authority;

/// Where the targets' web servers listen.
pub const PORT: u16 = 8080;
/// How often targets are asked: a second is long for a machine that is busy with other tests.
const CHECK: &str = "interval = \"1s\", timeout = \"1s\", healthy_threshold = 2";

/// All of it. Fields drop in this order.
pub struct World<S> {
    pub agent: Agent,
    pub servers: S,
    pub topology: Topology,
    pub authority: Authority,
    /// The load balancer's name.
    pub name: String,
}

/// Web servers on both targets, in both families.
pub fn web_servers(topology: &Topology) -> Vec<HttpServer> {
    let start = |(target, address)| HttpServer::start(target, address).unwrap();
    sockets(topology, PORT).into_iter().map(start).collect()
}

/// Each target with each of its addresses.
pub fn sockets(topology: &Topology, port: u16) -> Vec<(&Namespace, SocketAddr)> {
    let both = |(target, index)| {
        target_host(index).both().map(|address| (target, SocketAddr::new(address, port)))
    };
    topology.targets.iter().zip(0..).flat_map(both).collect()
}

/// A target group of these targets, its further lines, and further keys of its check.
pub fn group(name: &str, port: u16, targets: &[u8], lines: &str, check: &str) -> String {
    let targets: String =
        targets.iter().map(|&index| format!("{}, ", target_host(index))).collect();
    format!(
        "[target_group.{name}]\nport = {port}\ntargets = [{targets}]\n{lines}\n\
         health_check = {{ {CHECK}{check} }}\n"
    )
}

/// The load balancer with these lines of its own, and its listeners, which come last.
pub fn application(lines: &str, listeners: &str) -> String {
    let addresses = listener();
    format!(
        "[load_balancer.site]\ntype = \"application\"\naddresses = [{addresses}]\n{lines}\n\
         {listeners}"
    )
}

/// The load balancer's addresses.
pub fn listener() -> Dual {
    Dual::new(CLIENTS, 100)
}

impl<S> World<S> {
    pub fn start(
        serve: impl FnOnce(&Topology) -> S,
        config: impl FnOnce(&Authority) -> String,
    ) -> Self {
        Self::start_program(&binary().unwrap(), serve, config)
    }

    /// With another program as the agent.
    pub fn start_program(
        program: &Path,
        serve: impl FnOnce(&Topology) -> S,
        config: impl FnOnce(&Authority) -> String,
    ) -> Self {
        let authority = Authority::new();
        let topology = Topology::new(Picture::TwoNics, 2).unwrap();
        assert_eq!(topology.listener, listener());
        let servers = serve(&topology);
        let config = with_names(&config(&authority));
        let home = Home::new(&config).unwrap();
        let (namespace, interfaces) = (&topology.balancer, topology.interfaces);
        let agent = Agent::start_program(program, home, namespace, interfaces, &[]).unwrap();
        let name = balancer(&agent)["dns_name"].as_str().unwrap().to_owned();
        let server = format!("nameserver {}\n", Dual::new(CLIENTS, 1).v4);
        fs::write(authority.folder().join("resolv.conf"), server).unwrap();
        Self { agent, servers, topology, authority, name }
    }

    /// Another configuration, in force when this returns.
    pub fn reload(&self, config: &str) {
        let reloads = || self.agent.log().matches("configuration reloaded").count();
        let before = reloads();
        self.agent.reload(&with_names(config)).unwrap();
        wait_until("reload", PATIENCE, || reloads() > before).unwrap();
    }

    /// A command of the client, which asks the load balancer's own responder for names. All that
    /// it starts ends with it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = self.topology.client.command("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]);
        command.arg("mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"");
        command.arg(self.authority.folder().join("resolv.conf")).arg(program);
        command
    }

    /// curl's exit code and what it wrote.
    pub fn try_curl(&self, arguments: &[&str]) -> (i32, String) {
        let mut command = self.command("curl");
        command.args(["--silent", "--show-error", "--max-time", "60", "--cacert"]);
        let output = command.arg(self.authority.file()).args(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        let code = output.status.code().unwrap_or_else(|| panic!("{arguments:?}: {errors}"));
        (code, String::from_utf8(output.stdout).unwrap())
    }

    /// What curl wrote.
    pub fn curl(&self, arguments: &[&str]) -> String {
        let (code, text) = self.try_curl(arguments);
        assert_eq!(code, 0, "{arguments:?}: {text}");
        text
    }

    /// As `status --json` shows the load balancer.
    pub fn balancer(&self) -> Value {
        balancer(&self.agent)
    }

    /// A metric of the load balancer.
    pub fn metric(&self, name: &str) -> u64 {
        let metrics = &self.balancer()["metrics"];
        metrics[name].as_u64().unwrap_or_else(|| panic!("{name}: {metrics}"))
    }

    /// The load balancer's addresses with a port.
    pub fn at(&self, port: u16) -> [SocketAddr; 2] {
        listener().both().map(|address: IpAddr| SocketAddr::new(address, port))
    }
}

fn with_names(config: &str) -> String {
    let server = Dual::new(CLIENTS, 1).v4;
    format!(
        "[agent]\nflow_table_size = 65536\n\
         [dns]\nlisten = \"{server}:53\"\nzone = \"elb.internal\"\n{config}"
    )
}

fn balancer(agent: &Agent) -> Value {
    let status = agent.status().unwrap();
    let balancers = status["load_balancers"].as_array().unwrap();
    balancers.iter().find(|it| it["name"] == "site").unwrap().clone()
}
