//! What keeps the agent from starting, and what it says then.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    fs,
    os::{
        fd::{FromRawFd as _, OwnedFd},
        unix::fs::PermissionsExt as _,
    },
    process::{Command, Output},
};

use lb_tests::{
    agent::{Agent, Home, binary},
    netns::{Namespace, link},
    programs::{Attached, Floor},
    topology::{Picture, Topology},
};
use nix::libc;

/// A configuration without anything.
const NOTHING: &str = "# nothing\n";

/// Runs the agent, which is expected to end by itself; returns its exit code and what it said.
fn run(balancer: &Namespace, home: &Home, arguments: &[&str]) -> (i32, String) {
    let mut command = balancer.command("timeout");
    command.arg("20").arg(binary().unwrap());
    command.arg("--config").arg(home.config()).arg("--api-socket").arg(home.socket());
    outcome(command.args(arguments))
}

fn outcome(command: &mut Command) -> (i32, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = [stdout, stderr].concat();
    (status.code().unwrap(), String::from_utf8_lossy(&text).into_owned())
}

fn assert_says(outcome: &(i32, String), code: i32, parts: &[&str]) {
    assert_eq!(outcome.0, code, "{}", outcome.1);
    for part in parts {
        assert!(outcome.1.contains(part), "{part:?} is missing: {}", outcome.1);
    }
}

#[test]
fn an_interface_that_does_not_exist() {
    let topology = Topology::new(Picture::TwoNics, 0).unwrap();
    let home = Home::new(NOTHING).unwrap();
    let outcome = run(&topology.balancer, &home, &["--iface", "eth7"]);
    assert_says(&outcome, 2, &["no interface eth7", "there are: eth0, eth1, lo"]);
    let outcome = run(&topology.balancer, &home, &["--iface", "lo"]);
    assert_says(&outcome, 2, &["lo carries no Ethernet frames"]);
    let outcome = run(&topology.balancer, &home, &[]);
    assert_says(&outcome, 2, &["--iface"]);
}

#[test]
fn a_foreign_xdp_program_is_left_alone() {
    let topology = Topology::new(Picture::TwoNics, 0).unwrap();
    let home = Home::new(NOTHING).unwrap();
    let mut foreign = Attached::load(Floor::Pass).unwrap();
    foreign.attach(&topology.balancer, "eth1").unwrap();
    let outcome = run(&topology.balancer, &home, &["--iface", "eth0", "--iface", "eth1"]);
    let advice = "`bpftool link detach id ";
    assert_says(&outcome, 1, &["eth1 already has an XDP program", advice]);
    let links = topology.balancer.command("ip").args(["link"]).output().unwrap();
    let links = String::from_utf8(links.stdout).unwrap();
    assert_eq!(links.matches(" xdp ").count(), 1, "the foreign one only: {links}");

    // The advice helps.
    let (_, id) = outcome.1.split_once(advice).unwrap();
    detach_link(id.split_once('`').unwrap().0.parse().unwrap());
    Agent::start_in(home, &topology.balancer, topology.interfaces, &[]).unwrap().stop().unwrap();
}

/// What `bpftool link detach id ID` does.
fn detach_link(id: u32) {
    // Numbers of <linux/bpf.h>; both commands take one number first.
    const LINK_GET_FD_BY_ID: libc::c_long = 30;
    const LINK_DETACH: libc::c_long = 34;
    let bpf = |command: libc::c_long, number: u32| {
        let attributes = [u64::from(number), 0];
        let size = size_of_val(&attributes);
        // SAFETY: the attributes are as long as said, and the kernel only reads them.
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size) }
    };
    let link = u32::try_from(bpf(LINK_GET_FD_BY_ID, id)).expect("the link exists");
    assert_eq!(bpf(LINK_DETACH, link), 0, "{}", std::io::Error::last_os_error());
    // SAFETY: nobody else has this descriptor.
    drop(unsafe { OwnedFd::from_raw_fd(link.cast_signed()) });
}

#[test]
fn a_user_without_privileges() {
    let topology = Topology::new(Picture::TwoNics, 0).unwrap();
    let home = Home::new(NOTHING).unwrap();
    // Where nobody may execute it.
    let place = tempfile::tempdir().unwrap();
    let copy = place.path().join("lb-userspace");
    fs::copy(binary().unwrap(), &copy).unwrap();
    for path in [place.path(), home.config().parent().unwrap()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = topology.balancer.command("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&copy);
    command.arg("--config").arg(home.config()).arg("--api-socket").arg(home.socket());
    let outcome = outcome(command.args(["--iface", "eth0"]));
    assert_says(&outcome, 1, &["needs root", "sudo"]);
}

#[test]
fn a_second_agent() {
    let topology = Topology::new(Picture::TwoNics, 0).unwrap();
    let agent = Agent::start(&topology.balancer, &["eth0"], NOTHING).unwrap();
    let outcome = run(&topology.balancer, agent.home(), &["--iface", "eth1"]);
    let socket = agent.home().socket();
    assert_says(&outcome, 1, &[&socket.display().to_string(), "another agent"]);
    // The first has lost nothing.
    agent.status().unwrap();
    agent.stop().unwrap();
}

#[test]
fn a_bad_configuration() {
    let topology = Topology::new(Picture::TwoNics, 0).unwrap();
    let home = Home::new("[load_balancer.web]\naddresses = [\"10.0.0.300\"]\nport = 80\n").unwrap();
    let outcome = run(&topology.balancer, &home, &["--iface", "eth0"]);
    assert_says(
        &outcome,
        2,
        &["lb.toml:2:", "10.0.0.300", "lb.toml:3:1: error: unknown key `port`"],
    );

    let home = Home::new(NOTHING).unwrap();
    fs::remove_file(home.config()).unwrap();
    let outcome = run(&topology.balancer, &home, &["--iface", "eth0"]);
    assert_says(&outcome, 2, &["lb.toml"]);
}

#[test]
fn no_agent_to_ask() {
    let home = Home::new(NOTHING).unwrap();
    for command in ["status", "targets"] {
        let mut command_line = Command::new(binary().unwrap());
        command_line.arg(command).env("LB_API_SOCKET", home.socket());
        let socket = home.socket().display().to_string();
        assert_says(&outcome(&mut command_line), 1, &[&socket]);
    }
}

#[test]
fn an_interface_without_native_xdp() {
    let balancer = Namespace::new("balancer").unwrap();
    let other = Namespace::new("other").unwrap();
    link((&balancer, "eth0"), (&other, "eth0")).unwrap();
    // A veth refuses native XDP while its peer's frames could be too large for it.
    other.ip("link set eth0 mtu 9000").unwrap();
    let home = Home::new(NOTHING).unwrap();
    let outcome = run(&balancer, &home, &["--iface", "eth0", "--xdp-mode", "native"]);
    assert_says(&outcome, 1, &["eth0", "MTU", "--xdp-mode generic"]);

    // By default: generic, and it says so.
    let agent = Agent::start_in(home, &balancer, &["eth0"], &[]).unwrap();
    assert_eq!(agent.status().unwrap()["interfaces"][0]["mode"], "generic");
    let log = agent.stop().unwrap();
    for expected in ["falling back to generic mode", "MTU", "ip link set eth0 mtu 1500"] {
        assert!(log.contains(expected), "no {expected:?} in:\n{log}");
    }
}
