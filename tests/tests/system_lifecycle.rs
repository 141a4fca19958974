//! The agent's beginning and end, in order and out of order.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{fmt::Write as _, fs};

use aya::{
    maps::loaded_maps,
    programs::{ProgramInfo, loaded_programs},
};
use lb_tests::{
    agent::{Agent, Home},
    clients,
    netns::Namespace,
    servers::HttpServer,
    site::{Config, PATIENCE, Site},
    topology::{Picture, Topology, target_host},
    wait_until,
};

/// What `ip ARGUMENTS` prints in a namespace.
fn ip(namespace: &Namespace, arguments: &[&str]) -> String {
    let output = namespace.command("ip").args(arguments).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Everything of the machine that the agent could have changed.
fn machine(namespace: &Namespace) -> Vec<String> {
    // What the kernel changes by itself is left out: lifetimes, neighbours, the state of links.
    [
        &["-4", "address"][..],
        &["-6", "address"],
        &["-4", "route", "show", "table", "all"],
        &["-6", "route", "show", "table", "all"],
        &["rule"],
        &["link"],
    ]
    .into_iter()
    .map(|arguments| {
        // The number of a program is another with every start.
        let text = ip(namespace, arguments);
        text.split(' ').filter(|word| !word.starts_with("xdp/id:")).collect::<Vec<_>>().join(" ")
    })
    .collect()
}

fn works(site: &Site) {
    for web in site.web() {
        site.client(|| clients::http_get(None, web, "/").unwrap());
    }
}

/// The number of the XDP program on an interface.
fn program_on(namespace: &Namespace, interface: &str) -> u32 {
    let link = ip(namespace, &["link", "show", interface]);
    let (_, id) = link.split_once("prog/xdp id ").unwrap();
    id.split_whitespace().next().unwrap().parse().unwrap()
}

/// The maps that a program uses.
fn maps_of(program: u32) -> Vec<u32> {
    let mut programs = loaded_programs().filter_map(Result::ok);
    let info = programs.find(|info| info.id() == program).unwrap();
    info.map_ids().unwrap().unwrap()
}

/// The programs that use one of these maps.
fn programs_with(maps: &[u32]) -> Vec<u32> {
    let uses = |info: &ProgramInfo| {
        let used = info.map_ids().ok().flatten().unwrap_or_default();
        used.iter().any(|id| maps.contains(id))
    };
    loaded_programs().filter_map(Result::ok).filter(uses).map(|info| info.id()).collect()
}

/// Identified by number: the agents of other tests have maps of the same names.
#[test]
fn no_map_is_left_behind() {
    let site = Site::start(Picture::TwoNics, 1).unwrap();
    works(&site);
    let program = program_on(&site.topology.balancer, "eth0");
    let maps = maps_of(program);
    assert!(maps.len() > 5, "{maps:?}");
    let left = || {
        let loaded = loaded_maps().filter_map(Result::ok).map(|info| info.id());
        loaded.filter(|id| maps.contains(id)).collect::<Vec<_>>()
    };
    assert_eq!(left().len(), maps.len());
    let stages = programs_with(&maps);
    assert!(stages.len() > 1 && stages.contains(&program), "{stages:?}");
    let Site { agent, topology: _topology, servers: _servers, .. } = site;
    agent.stop().unwrap();
    // The kernel takes the stages out of their array a little later. Who opens that map while it does
    // (as a list of all maps does), and closes it, has the kernel lose count of its users: so first
    // the programs.
    wait_until("end of the programs", PATIENCE, || {
        loaded_programs().filter_map(Result::ok).all(|info| !stages.contains(&info.id()))
    })
    .unwrap();
    wait_until("end of the maps", PATIENCE, || left().is_empty()).unwrap();
}

#[test]
fn native_while_it_runs_and_nothing_left_behind() {
    for picture in [Picture::TwoNics, Picture::OneNic] {
        let topology = Topology::new(picture, 1).unwrap();
        let config = Config::new(&topology, picture).to_string();
        let before = machine(&topology.balancer);
        for _ in 0..2 {
            let agent = Agent::start(&topology.balancer, topology.interfaces, &config).unwrap();
            for interface in topology.interfaces {
                let link = ip(&topology.balancer, &["link", "show", interface]);
                assert!(link.contains(" xdp "), "native: {link}");
                assert!(link.contains("prog/xdp id "), "{link}");
            }
            for interface in agent.status().unwrap()["interfaces"].as_array().unwrap() {
                assert_eq!(interface["mode"], "native");
            }
            assert_ne!(machine(&topology.balancer), before);
            let socket = agent.home().socket();
            assert!(socket.exists());
            agent.stop().unwrap();
            assert!(!socket.exists());
            assert_eq!(machine(&topology.balancer), before);
        }
    }
}

#[test]
fn a_killed_agent_is_followed_by_one_that_recovers() {
    let mut site = Site::start(Picture::TwoNics, 2).unwrap();
    works(&site);
    let Site { agent, topology, .. } = &mut site;
    let home = agent.home().clone();
    let before = machine(&topology.balancer);
    agent.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_until("end of the program", PATIENCE, || {
        !ip(&topology.balancer, &["link"]).contains("xdp")
    })
    .unwrap();
    // Nobody removed the addresses.
    assert!(ip(&topology.balancer, &["address"]).contains("10.0.1.100/32"));

    site.agent =
        Agent::start_in(home, &site.topology.balancer, site.topology.interfaces, &[]).unwrap();
    works(&site);
    // The program has another number, all else is as before.
    let is_same = |before: &Vec<String>| machine(&site.topology.balancer)[..5] == before[..5];
    assert!(is_same(&before), "{:#?}", machine(&site.topology.balancer));

    let Site { agent, topology, servers: _servers, .. } = site;
    agent.stop().unwrap();
    let addresses = ip(&topology.balancer, &["address"]);
    assert!(!addresses.contains("10.0.1.100/"), "{addresses}");
    assert!(!addresses.contains("fd00:1::100/"), "{addresses}");
}

#[test]
fn without_a_file_everything_passes_and_a_newcomer_is_helped() {
    let topology = Topology::new(Picture::TwoNics, 1).unwrap();
    let home = Home::new("").unwrap();
    // An /etc without lb in it, whatever the machine's has.
    let mut command = topology.balancer.command("unshare");
    command.args(["--mount", "sh", "-c", "mount -t tmpfs none /etc && exec \"$@\"", "sh"]);
    command.arg(lb_tests::agent::binary().unwrap());
    command.args(["--iface", "eth0", "--iface", "eth1", "--api-socket"]).arg(home.socket());
    let mut process = lb_tests::netns::Process::spawn(&mut command).unwrap();
    wait_until("ready", PATIENCE, || process.output().contains(" ready")).unwrap();
    let log = process.output();
    assert!(log.contains("there is no configuration file /etc/lb/lb.toml"), "{log}");
    assert!(log.contains("[load_balancer."), "an example: {log}");
    assert!(ip(&topology.balancer, &["link"]).contains(" xdp "));

    for address in target_host(0).both() {
        let web = HttpServer::start(&topology.targets[0], (address, 80).into()).unwrap();
        topology.client.run(|| clients::http_get(None, web.address(), "/").unwrap());
    }
    process.signal(nix::sys::signal::Signal::SIGINT).unwrap();
    assert!(process.wait(PATIENCE).unwrap().success());
}

/// They need not exist: a thousand checks fail on their own clocks, and nothing gets stuck.
#[test]
fn a_thousand_targets() {
    let topology = Topology::new(Picture::OneNic, 1).unwrap();
    let _web = HttpServer::start(&topology.targets[0], target_host(0).v4_port(8080)).unwrap();
    let mut config = String::from(
        "[target_group.many]\nport = 8080\n\
         health_check = { interval = \"2s\", timeout = \"1s\" }\ntargets = [\"10.0.2.11\"",
    );
    for index in 0..999 {
        // Behind the router, which knows no such network.
        write!(config, ", \"10.9.{}.{}\"", index / 250, 1 + index % 250).unwrap();
    }
    writeln!(
        config,
        "]\n[load_balancer.site]\naddresses = [{}]\n[[load_balancer.site.listener]]\nport = 80\n\
         target_group = \"many\"",
        topology.listener
    )
    .unwrap();
    let agent = Agent::start(&topology.balancer, topology.interfaces, &config).unwrap();
    let count = |state: &str| {
        let targets = agent.targets().unwrap();
        targets.as_array().unwrap().iter().filter(|target| target["state"] == state).count()
    };
    wait_until("states", PATIENCE, || (count("healthy"), count("unhealthy")) == (1, 999)).unwrap();
    for _ in 0..10 {
        let server = topology.listener.v4_port(80);
        topology.client.run(|| clients::http_get(None, server, "/").unwrap());
    }
    agent.stop().unwrap();
}

/// Not to be listed by others while a file is being replaced: the socket is the agent's alone.
#[test]
fn the_socket_is_for_root_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let topology = Topology::new(Picture::TwoNics, 0).unwrap();
    let agent = Agent::start(&topology.balancer, topology.interfaces, "# nothing\n").unwrap();
    let mode = fs::metadata(agent.home().socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o007, 0, "{mode:o}");
}
