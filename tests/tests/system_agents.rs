//! Several agents on one machine, NICs that come and go, and starts that are cut short.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{fs, thread, time::Duration};

use lb_tests::{
    agent::{Agent, Home, binary},
    clients,
    netns::{Namespace, Process, link},
    servers::HttpServer,
    site::{PATIENCE, Site, target_port},
    topology::Picture,
    wait_until,
};
use nix::sys::signal::Signal;

fn addresses(namespace: &Namespace) -> String {
    let output = namespace.command("ip").args(["-o", "address"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn balancer(address: &str) -> String {
    format!("[load_balancer.web]\naddresses = [\"{address}\"]\n")
}

/// A namespace with two NICs, each with a subnet.
fn two_nics() -> (Namespace, Namespace) {
    let (here, there) = (Namespace::new("balancer").unwrap(), Namespace::new("there").unwrap());
    for (name, subnet) in [("eth0", 1), ("eth1", 2)] {
        link((&here, name), (&there, name)).unwrap();
        here.ip(&format!("address add 10.0.{subnet}.1/24 dev {name}")).unwrap();
    }
    (here, there)
}

#[test]
fn each_agent_keeps_its_own_addresses() {
    let (here, _there) = two_nics();
    let one = Agent::start(&here, &["eth0"], &balancer("10.0.1.100")).unwrap();
    let two = Agent::start(&here, &["eth1"], &balancer("10.0.2.100")).unwrap();
    let both = |text: &str| text.contains("10.0.1.100/32") && text.contains("10.0.2.100/32");
    assert!(both(&addresses(&here)), "{}", addresses(&here));

    // Killed, it is followed by one that takes over its own and nothing else.
    let home = one.kill().unwrap();
    assert!(both(&addresses(&here)), "{}", addresses(&here));
    fs::write(home.config(), balancer("10.0.1.101")).unwrap();
    let one = Agent::start_in(home, &here, &["eth0"], &[]).unwrap();
    let now = addresses(&here);
    assert!(!now.contains("10.0.1.100/") && now.contains("10.0.1.101/32"), "{now}");
    assert!(now.contains("10.0.2.100/32"), "{now}");

    two.stop().unwrap();
    let now = addresses(&here);
    assert!(now.contains("10.0.1.101/32") && !now.contains("10.0.2.100/"), "{now}");
    one.stop().unwrap();
    assert!(!addresses(&here).contains("10.0.1.101/"), "{}", addresses(&here));
}

#[test]
fn a_second_agent_on_the_same_nic_is_told_whose_program_is_there() {
    let (here, _there) = two_nics();
    let one = Agent::start(&here, &["eth0"], "").unwrap();
    let home = Home::new("").unwrap();
    let mut command = here.command(binary().unwrap());
    command.arg("--config").arg(home.config()).arg("--api-socket").arg(home.socket());
    let output = command.args(["--iface", "eth0"]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(errors.contains("eth0 already has lb's program"), "{errors}");
    assert!(errors.contains("another lb agent"), "{errors}");
    one.stop().unwrap();
}

#[test]
fn a_nic_that_comes_back_is_attached_again() {
    let (here, there) = two_nics();
    let mut agent = Agent::start(&here, &["eth0", "eth1"], &balancer("10.0.1.100")).unwrap();
    let interfaces =
        |agent: &Agent| agent.status().unwrap()["interfaces"].as_array().unwrap().len();
    assert_eq!(interfaces(&agent), 2);
    for _ in 0..2 {
        here.ip("link delete eth0").unwrap();
        wait_until("the end of eth0", PATIENCE, || interfaces(&agent) == 1).unwrap();
        let warnings = agent.status().unwrap()["warnings"].to_string();
        assert!(warnings.contains("eth0 is gone"), "{warnings}");

        link((&here, "eth0"), (&there, "eth0")).unwrap();
        here.ip("address add 10.0.1.1/24 dev eth0").unwrap();
        wait_until("eth0 attached", PATIENCE, || interfaces(&agent) == 2).unwrap();
        let link = here.command("ip").args(["link", "show", "eth0"]).output().unwrap();
        let link = String::from_utf8(link.stdout).unwrap();
        assert!(link.contains("prog/xdp"), "{link}");
        let warnings = agent.status().unwrap()["warnings"].to_string();
        assert!(!warnings.contains("eth0 is gone"), "{warnings}");
        // Its listener address is where it was.
        let is_back = || {
            let now = addresses(&here);
            now.lines().any(|line| line.contains("10.0.1.100/32") && line.contains("eth0"))
        };
        wait_until("the listener's address", PATIENCE, is_back).unwrap();
    }
    agent.wait_for_log("the interface is back").unwrap();
    let log = agent.stop().unwrap();
    assert_eq!(log.matches("eth0 is gone: lb attaches again").count(), 2, "{log}");
}

/// Whenever SIGTERM comes, nothing is left behind.
#[test]
fn a_start_that_is_cut_short_leaves_nothing_behind() {
    let (here, _there) = two_nics();
    for wait in [0, 20, 50, 100, 200, 400] {
        let home = Home::new(&balancer("10.0.1.100")).unwrap();
        let mut command = here.command(binary().unwrap());
        command.arg("--config").arg(home.config()).arg("--api-socket").arg(home.socket());
        let mut process = Process::spawn(command.args(["--iface", "eth0"])).unwrap();
        // From the moment on that the socket is there.
        wait_until("the socket", PATIENCE, || home.socket().exists()).unwrap();
        thread::sleep(Duration::from_millis(wait));
        process.signal(Signal::SIGTERM).unwrap();
        let status = process.wait(PATIENCE).unwrap();
        assert!(status.success(), "after {wait} ms: {status}: {}", process.output());
        assert!(!home.socket().exists(), "after {wait} ms: {}", process.output());
        assert!(!addresses(&here).contains("10.0.1.100/"), "{}", addresses(&here));
    }
}

/// A target behind a NIC that lb is not attached to, and the balancer itself.
#[test]
fn who_cannot_be_reached_gets_no_traffic() {
    let mut site = Site::start(Picture::OneNic, 1).unwrap();
    let own = site.topology.balancer.command("ip").args(["-4", "-o", "address"]).output().unwrap();
    let own = String::from_utf8(own.stdout).unwrap();
    let own = own.lines().find(|line| line.contains("eth0")).unwrap();
    let own = own.split_whitespace().nth(3).unwrap().split('/').next().unwrap().to_owned();
    let _server = {
        let port = target_port(Picture::OneNic, 80);
        let address = format!("{own}:{port}").parse().unwrap();
        HttpServer::start(&site.topology.balancer, address).unwrap()
    };
    let right = site.config.to_string();
    let (before, web) = right.split_once("[target_group.web]").unwrap();
    let web = web.replacen("targets = [", &format!("targets = [\"{own}\", "), 1);
    let home = Home::new(&format!("{before}[target_group.web]{web}")).unwrap();
    site.agent.stop().unwrap();
    site.agent =
        Agent::start_in(home, &site.topology.balancer, site.topology.interfaces, &[]).unwrap();
    site.agent.wait_for_target(&own, "healthy").unwrap();
    for _ in 0..20 {
        site.client(|| clients::http_get(None, site.web()[0], "/").unwrap());
    }
    let log = site.agent.log();
    assert!(log.contains("WARN") && log.contains("an address of the balancer itself"), "{log}");
}

/// Frames that an XDP program sends into a veth arrive only if its other end has a program too: an
/// agent without load balancers will do, as the README says.
#[test]
fn an_agent_without_load_balancers_serves_the_far_ends_of_veths() {
    let [client, here, server] =
        ["client", "balancer", "server"].map(|role| Namespace::new(role).unwrap());
    link((&client, "eth0"), (&here, "eth0")).unwrap();
    link((&server, "eth0"), (&here, "eth1")).unwrap();
    for (namespace, commands) in [
        (&here, "address add 10.0.1.1/24 dev eth0\naddress add 10.0.2.1/24 dev eth1"),
        (&client, "address add 10.0.1.10/24 dev eth0\nroute add default via 10.0.1.1"),
        (&server, "address add 10.0.2.11/24 dev eth0\nroute add default via 10.0.2.1"),
    ] {
        namespace.ip(commands).unwrap();
    }
    here.sysctl("net/ipv4/ip_forward", "1").unwrap();
    let _server = HttpServer::start(&server, "10.0.2.11:8080".parse().unwrap()).unwrap();
    let config = "[target_group.web]\ntargets = [\"10.0.2.11\"]\n\
                  [load_balancer.web]\naddresses = [\"10.0.1.100\"]\n\
                  [[load_balancer.web.listener]]\nport = 80\ntarget_group = \"web\"\n";
    let agent = Agent::start(&here, &["eth0", "eth1"], config).unwrap();
    agent.wait_for_target("10.0.2.11", "healthy").unwrap();
    let get = || clients::http_get(None, "10.0.1.100:80".parse().unwrap(), "/");
    assert!(client.run(get).is_err(), "the far ends have no program");

    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).unwrap();
    let peer = "[agent]\nflow_table_size = 1024\n";
    assert!(readme.contains(peer), "the README shows that file");
    let _ends = [&client, &server].map(|end| Agent::start(end, &["eth0"], peer).unwrap());
    for _ in 0..10 {
        client.run(|| get().unwrap());
    }
}
