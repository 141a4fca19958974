//! The configuration file changes while the agent runs.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{fs::OpenOptions, io::Write as _};

use lb_tests::{
    clients,
    site::{PATIENCE, Site},
    topology::{Dual, Picture, client_host},
    wait_until,
};
use nix::sys::signal::Signal;

fn works(site: &Site) {
    for web in site.web() {
        site.client(|| clients::http_get(None, web, "/").unwrap());
    }
}

fn reloads(site: &Site) -> usize {
    site.agent.log().matches("configuration reloaded").count()
}

fn reload_error(site: &Site) -> Option<String> {
    let status = site.agent.status().unwrap();
    status["agent"]["reload_error"].as_str().map(ToOwned::to_owned)
}

#[test]
fn sighup_reloads() {
    let site = Site::start(Picture::TwoNics, 1).unwrap();
    assert_eq!(reloads(&site), 0);
    site.agent.signal(Signal::SIGHUP).unwrap();
    wait_until("reload", PATIENCE, || reloads(&site) == 1).unwrap();
    works(&site);
}

#[test]
fn listeners_and_addresses_come_and_go() {
    let mut site = Site::start(Picture::TwoNics, 1).unwrap();
    let one = site.config.clone();
    let address = Dual::new(1, 101);
    let mut two = one.clone();
    two.tables = format!(
        "[load_balancer.other]\naddresses = [{address}]\n\
         [[load_balancer.other.listener]]\nport = 8888\ntarget_group = \"web\"\n"
    );
    for _ in 0..2 {
        site.reload(two.clone()).unwrap();
        for server in [address.v4_port(8888), address.v6_port(8888)] {
            let source = std::net::SocketAddr::new(client_host().like(server.ip()), 4321);
            let get = || clients::http_get(Some(source), server, "/client").unwrap();
            assert_eq!(site.client(get).text(), source.to_string());
        }
        works(&site);

        site.reload(one.clone()).unwrap();
        let addresses = site.topology.balancer.command("ip").args(["address"]).output().unwrap();
        let addresses = String::from_utf8(addresses.stdout).unwrap();
        assert!(!addresses.contains("10.0.1.101/"), "{addresses}");
        assert!(!addresses.contains("fd00:1::101/"), "{addresses}");
        works(&site);
    }
}

#[test]
fn a_broken_file_changes_nothing_and_is_told() {
    let mut site = Site::start(Picture::TwoNics, 1).unwrap();
    let generation = |site: &Site| site.agent.status().unwrap()["agent"]["generation"].clone();
    let before = generation(&site);
    assert_eq!(reload_error(&site), None);

    let right = site.config.to_string();
    let wrong = right.replacen("port = ", "prot = ", 1);
    site.agent.reload(&wrong).unwrap();
    wait_until("refusal", PATIENCE, || reload_error(&site).is_some()).unwrap();
    let line = 1 + wrong.lines().position(|line| line.starts_with("prot = ")).unwrap();
    let place = format!("lb.toml:{line}:1: error: unknown key `prot`");
    let error = reload_error(&site).unwrap();
    assert!(error.contains(&place), "{error}");
    assert!(site.agent.log().contains(&place), "{}", site.agent.log());
    let human = site.agent.client(&["status"]).unwrap().output().unwrap();
    let human = String::from_utf8(human.stdout).unwrap();
    assert!(human.contains("unknown key `prot`"), "{human}");
    assert_eq!(generation(&site), before);
    works(&site);

    let config = site.config.clone();
    site.reload(config).unwrap();
    assert_eq!(reload_error(&site), None);
    works(&site);
}

#[test]
fn an_empty_file_is_refused() {
    let site = Site::start(Picture::TwoNics, 1).unwrap();
    site.agent.reload("").unwrap();
    wait_until("refusal", PATIENCE, || reload_error(&site).is_some()).unwrap();
    assert!(reload_error(&site).unwrap().contains("is empty"));
    works(&site);
}

/// Half of the file is right by itself: it would end all load balancers.
#[test]
fn a_file_that_is_being_written_is_not_read() {
    let site = Site::start(Picture::TwoNics, 1).unwrap();
    let path = site.agent.home().config();
    let mut file = OpenOptions::new().write(true).truncate(true).open(path).unwrap();
    for piece in ["[agent]\n", "# to be continued\n"] {
        file.write_all(piece.as_bytes()).unwrap();
        file.flush().unwrap();
        for _ in 0..100 {
            works(&site);
        }
    }
    assert_eq!((reloads(&site), reload_error(&site)), (0, None));
    let text = site.config.to_string();
    file.write_all(text.strip_prefix("[agent]\n").unwrap().as_bytes()).unwrap();
    drop(file);
    wait_until("reload", PATIENCE, || reloads(&site) == 1).unwrap();
    works(&site);
}

#[test]
fn weights_move_traffic() {
    let mut site = Site::start(Picture::TwoNics, 2).unwrap();
    let mut config = site.config.clone();
    config.targets = vec![(0, 1), (1, 0)];
    site.reload(config).unwrap();
    for web in site.web() {
        for _ in 0..20 {
            let answer = site.client(|| clients::http_get(None, web, "/").unwrap());
            assert_eq!(answer.text(), "hello world from target0");
        }
    }
}
