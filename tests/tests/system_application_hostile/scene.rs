//! The load balancer of these tests: two web servers, and beside one of them a server that does
//! what its path says.

use std::{net::SocketAddr, path::Path};

use lb_tests::{
    agent::binary,
    servers::{HttpServer, Server},
    topology::{Topology, target_host},
};
use tokio::runtime;

use crate::{
    authority::Authority,
    target,
    world::{PORT, World, application, group, web_servers},
};

/// Where the hostile server listens.
pub const HOSTILE: u16 = 8081;

/// All servers; they live for as long as the world.
pub struct Servers {
    _web: Vec<HttpServer>,
    _hostile: Vec<Server>,
}

/// A load balancer on ports 80 and 443.
pub type Scene = World<Servers>;

/// Rules and groups: what begins with `/hostile` goes to the hostile server, the rest to the others.
pub fn config(authority: &Authority, lines: &str) -> String {
    config_with(authority, lines, "")
}

/// The same with more rules for each listener.
pub fn config_with(authority: &Authority, lines: &str, rules: &str) -> String {
    let certificate = authority.issue("*.elb.internal");
    let rule = "[[load_balancer.site.listener.rule]]\npriority = 1\n\
                path_pattern = [\"/hostile/*\"]\ntarget_group = \"hostile\"\n";
    let listener = |lines: &str| {
        format!("[[load_balancer.site.listener]]\n{lines}\ntarget_group = \"web\"\n{rule}{rules}")
    };
    let listeners = listener("protocol = \"http\"")
        + &listener(&format!("protocol = \"https\"\ncertificates = [{certificate}]"));
    let check = format!(", path = \"/health\", port = {PORT}");
    let http = "protocol = \"http\"";
    group("web", PORT, &[0, 1], http, &check)
        + &group("hostile", HOSTILE, &[0], http, &check)
        + &application(lines, &listeners)
}

/// Starts it with these lines of the load balancer.
pub fn start(lines: &str) -> Scene {
    start_program(&binary().unwrap(), lines)
}

/// The same with another program as the agent.
pub fn start_program(program: &Path, lines: &str) -> Scene {
    World::start_program(program, servers, |authority| config(authority, lines))
}

/// Its servers.
pub fn servers(topology: &Topology) -> Servers {
    let hostile = |address| {
        let at = SocketAddr::new(address, HOSTILE);
        Server::connections(&topology.targets[0], at, target::serve).unwrap()
    };
    Servers { _web: web_servers(topology), _hostile: target_host(0).both().map(hostile).into() }
}

/// The same configuration without the second target of `web`.
pub fn without_target_1(config: &str) -> String {
    let gone = format!("targets = [{}, {}, ]", target_host(0), target_host(1));
    assert!(config.contains(&gone), "{config}");
    config.replace(&gone, &format!("targets = [{}, ]", target_host(0)))
}

impl Scene {
    /// Where plain HTTP is spoken.
    pub fn http(&self) -> SocketAddr {
        self.at(80)[0]
    }

    /// Where TLS is spoken.
    pub fn https(&self) -> SocketAddr {
        self.at(443)[0]
    }

    /// Does something as the client.
    pub fn client<T: Send>(&self, work: impl AsyncFnOnce() -> T + Send) -> T {
        inside(self, work)
    }
}

/// Does something as the client of a world.
pub fn inside<S, T: Send>(world: &World<S>, work: impl AsyncFnOnce() -> T + Send) -> T {
    world.topology.client.run(|| {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(work())
    })
}
