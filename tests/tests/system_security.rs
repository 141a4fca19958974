//! Security groups: who may come in, and what a change of them does.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{fmt::Write as _, net::SocketAddr, time::Duration};

use lb_tests::{
    clients::{self, TIMEOUT},
    site::{Config, ECHO, PATIENCE, Site},
    topology::{Dual, Picture, client_host},
    wait_until,
};

const DENIED: &str = "SecurityGroupDenied";
/// Long enough for an answer that would come.
const SHORT: Duration = Duration::from_millis(300);

/// A site with group `lb` attached.
fn guarded(rules: &str) -> Site {
    Site::start_with(Picture::TwoNics, 2, |config| guard(config, rules)).unwrap()
}

fn guard(config: &mut Config, rules: &str) {
    config.balancer = "security_groups = [\"lb\"]\n".into();
    config.tables = format!("[security_group.lb]\ningress = [{rules}]\n");
}

fn rule(protocol: &str, ports: Option<&str>, host: Dual) -> String {
    let ports = ports.map(|ports| format!("ports = \"{ports}\", ")).unwrap_or_default();
    format!("{{ protocol = \"{protocol}\", {ports}sources = [{host}] }},\n")
}

fn can_echo(site: &Site, from: Dual) -> [bool; 2] {
    site.echo().map(|echo| {
        let source = SocketAddr::new(from.like(echo.ip()), 0);
        let ask = || clients::udp_ping(Some(source), echo, b"may I?", SHORT).is_ok();
        // The first answer is lost where the balancer does not know the client's MAC address yet.
        site.client(|| (0..3).any(|_| ask()))
    })
}

/// A client that may not come in, while the usual one may.
fn refused_stranger(site: &Site) -> Dual {
    let stranger = site.topology.add_client(66).unwrap();
    assert_eq!(can_echo(site, client_host()), [true; 2]);
    assert_eq!(site.drops(DENIED).unwrap(), 0);
    assert_eq!(can_echo(site, stranger), [false; 2]);
    assert_eq!(site.drops(DENIED).unwrap(), 6);
    stranger
}

#[test]
fn only_what_a_rule_allows_comes_in() {
    let rules = rule("tcp", Some("1-100"), client_host()) + &rule("udp", Some("7"), client_host());
    let site = guarded(&rules);
    let stranger = refused_stranger(&site);
    for web in site.web() {
        let from = |host: Dual| Some(SocketAddr::new(host.like(web.ip()), 0));
        site.client(|| clients::http_get(from(client_host()), web, "/").unwrap());
        site.client(|| clients::http_get(from(stranger), web, "/").unwrap_err());
        // No rule, no echo.
        site.client(|| clients::ping(web.ip()).unwrap_err());
    }
    assert!(site.drops(DENIED).unwrap() > 6);
    // The targets' own addresses are no business of the load balancer's group.
    site.client(|| clients::ping(Dual::new(2, 11).v4.into()).unwrap());
}

#[test]
fn direct_server_return_is_guarded_too() {
    let rules = rule("tcp", Some("80"), client_host()) + &rule("udp", Some("7"), client_host());
    let site = Site::start_with(Picture::Dsr, 2, |config| guard(config, &rules)).unwrap();
    let stranger = refused_stranger(&site);
    for web in site.web() {
        let from = |host: Dual| Some(SocketAddr::new(host.like(web.ip()), 0));
        site.client(|| clients::http_get(from(client_host()), web, "/").unwrap());
        site.client(|| clients::http_get(from(stranger), web, "/").unwrap_err());
    }
    let datagrams = site.servers.iter().flatten().map(|servers| servers.datagrams()).sum::<u64>();
    assert_eq!(datagrams, 2, "no target heard of the stranger");
}

#[test]
fn a_group_without_rules_denies_everything() {
    let site = guarded("");
    assert_eq!(can_echo(&site, client_host()), [false; 2]);
    assert_eq!(site.drops(DENIED).unwrap(), 6);
}

#[test]
fn without_a_group_everybody_comes_in_and_may_ping() {
    let site = Site::start(Picture::OneNic, 1).unwrap();
    // The balancer learns the way to its router when the first answer goes there.
    let comes_in = || can_echo(&site, client_host()) == [true; 2];
    wait_until("everybody", PATIENCE, comes_in).unwrap();
    for address in site.topology.listener.both() {
        site.client(|| clients::ping(address).unwrap());
    }
}

#[test]
fn a_change_takes_effect_at_once() {
    let all = |host| {
        rule("tcp", Some("0-65535"), host)
            + &rule("udp", Some("7"), host)
            + &rule("icmp", None, host)
    };
    let mut site = guarded(&all(client_host()));
    let [echo, _] = site.echo();
    for address in site.topology.listener.both() {
        site.client(|| clients::ping(address).unwrap());
    }
    let connection = site.client(|| clients::connect(None, echo).unwrap());
    clients::echo(&connection, b"allowed").unwrap();

    let other = site.topology.add_client(66).unwrap();
    let mut narrow = site.config.clone();
    guard(&mut narrow, &all(other));
    site.reload(narrow).unwrap();
    assert_eq!(can_echo(&site, client_host()), [false; 2]);
    assert_eq!(can_echo(&site, other), [true; 2]);
    site.client(|| clients::ping(echo.ip()).unwrap_err());
    clients::echo(&connection, b"cut off").unwrap_err();

    let mut wide = site.config.clone();
    guard(&mut wide, &(all(other) + &all(client_host())));
    site.reload(wide).unwrap();
    assert_eq!(can_echo(&site, client_host()), [true; 2]);
    assert_eq!(can_echo(&site, other), [true; 2]);
    site.client(|| clients::ping(echo.ip()).unwrap());
}

#[test]
fn ten_thousand_prefixes() {
    let mut sources = String::new();
    for n in 0..5000 {
        let (high, low) = (n / 256, n % 256);
        write!(sources, "\"11.{high}.{low}.0/24\", \"fd11:{n:x}::/48\", ").unwrap();
    }
    let rules = |more: &str| {
        format!("{{ protocol = \"udp\", ports = \"{ECHO}\", sources = [{sources}{more}] }}")
    };
    let mut site = guarded(&rules(""));
    assert_eq!(can_echo(&site, client_host()), [false; 2]);

    let mut config = site.config.clone();
    guard(&mut config, &rules(&format!("{}, ", client_host())));
    site.reload(config).unwrap();
    assert_eq!(can_echo(&site, client_host()), [true; 2]);
    let stranger = site.topology.add_client(66).unwrap();
    assert_eq!(can_echo(&site, stranger), [false; 2]);

    // Back to few, and to none.
    let mut config = site.config.clone();
    guard(&mut config, &rule("udp", Some("7"), stranger));
    site.reload(config).unwrap();
    wait_until("few rules", PATIENCE, || can_echo(&site, stranger) == [true; 2]).unwrap();
    assert_eq!(can_echo(&site, client_host()), [false; 2]);
}

#[test]
fn connections_of_strangers_hang_rather_than_being_refused() {
    let site = guarded(&rule("tcp", Some("443"), client_host()));
    let [web, _] = site.web();
    let error = site.client(|| clients::connect(None, web).unwrap_err());
    let kind = error.downcast::<std::io::Error>().unwrap().kind();
    assert_eq!(kind, std::io::ErrorKind::TimedOut, "after {TIMEOUT:?}");
}
