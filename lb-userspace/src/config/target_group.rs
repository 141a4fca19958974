//! `[target_group.NAME]`: where packets go.

use std::collections::hash_map::{Entry, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::address::{host_address, parse_host_address};
use super::agent::availability_zone;
use super::health_check;
use super::model::{Forwarding, Protocol, Snat, Target, TargetGroup};
use super::reader::{Table, Value, Wrong};
use super::snat;

/// A target group as far as it could be read.
///
/// Where an error was found `group` has a placeholder; nobody will see it, but checks across
/// sections must not build on it. So they use the fields beside it.
pub(super) struct Draft<'a> {
    pub(super) group: TargetGroup,
    pub(super) protocol: Option<Protocol>,
    pub(super) forwarding: Option<Forwarding>,
    /// Where the file has each of `group.snat.addresses`.
    pub(super) snat_addresses: Vec<(Value<'a>, IpAddr)>,
    /// Where the file has each of `group.targets`.
    pub(super) target_values: Vec<Value<'a>>,
}

const TARGET_HELP: &str = "write \"10.0.2.11\", \"10.0.2.12:8081\", \"2001:db8::1\", \
                           \"[2001:db8::1]:80\" or { address = \"10.0.2.13\", port = 8080 }";
/// Of a port that could not be read.
pub(super) const UNKNOWN_PORT: u16 = 0;
const DEFAULT_PORT: u16 = 8080;
const DEFAULT_WEIGHT: u16 = 1;
/// AWS's bounds of deregistration_delay.timeout_seconds.
const MAX_DEREGISTRATION_DELAY: Duration = Duration::from_secs(3600);

pub(super) fn read<'a>(mut table: Table<'a>) -> Draft<'a> {
    let protocol = match table.optional("protocol") {
        Some(value) => value.choice(
            &[("tcp", Protocol::Tcp), ("udp", Protocol::Udp)],
            &["tcp_udp", "tls", "http", "https"],
        ),
        None => Some(Protocol::Tcp),
    };
    let port = match table.optional("port") {
        Some(port) => port.port().unwrap_or(UNKNOWN_PORT),
        None => DEFAULT_PORT,
    };
    let forwarding = match table.optional("forwarding") {
        Some(value) => value.choice(
            &[("nat", Forwarding::Nat), ("snat", Forwarding::Snat), ("dsr_l2", Forwarding::DsrL2)],
            &["dsr_ipip", "dsr_gue"],
        ),
        None => Some(Forwarding::Nat),
    };
    let (snat_addresses, snat_ports) = snat::read(&mut table, forwarding);
    if let Some(algorithm) = table.optional("algorithm") {
        let later =
            ["least_connections", "round_robin", "least_outstanding_requests", "weighted_random"];
        algorithm.choice(&[("maglev", ())], &later);
    }
    let deregistration_delay = table
        .optional("deregistration_delay")
        .and_then(|delay| delay.duration(Duration::ZERO..=MAX_DEREGISTRATION_DELAY))
        .unwrap_or(Duration::from_secs(300));
    let unhealthy_connection_termination = table
        .optional("unhealthy_connection_termination")
        .and_then(|value| value.boolean())
        .unwrap_or(true);
    let track_every_flow = table
        .optional("flow_tracking")
        .and_then(|tracking| tracking.choice(&[("auto", false), ("always", true)], &[]))
        .unwrap_or(false);
    let (target_values, targets) = targets(table.optional("targets"), port).into_iter().unzip();
    let name = table.name().trim_end_matches(']').to_owned();
    let health_check =
        health_check::read(table.subtable("health_check", format!("{name}.health_check]")));
    table.only_default("gue_port", "6080");
    table.not_supported_yet(&[
        "stickiness",
        "security_group",
        "slow_start",
        "protocol_version",
        "proxy_protocol_v2",
    ]);
    table.finish();
    let group = TargetGroup {
        protocol: protocol.unwrap_or(Protocol::Tcp),
        port,
        forwarding: forwarding.unwrap_or(Forwarding::Nat),
        snat: Snat {
            addresses: snat_addresses.iter().map(|(_, address)| *address).collect(),
            ports: snat_ports,
        },
        deregistration_delay,
        unhealthy_connection_termination,
        track_every_flow,
        targets,
        health_check,
    };
    Draft { group, protocol, forwarding, snat_addresses, target_values }
}

fn targets<'a>(value: Option<Value<'a>>, group_port: u16) -> Vec<(Value<'a>, Target)> {
    let help = "write a list of targets, such as [\"10.0.2.11\", \"10.0.2.12:8081\"]";
    let items = value.and_then(|value| value.items(help)).unwrap_or_default();
    let mut targets: Vec<(Value<'a>, Target)> = Vec::new();
    let mut first_lines = HashMap::new();
    for item in items {
        let Some(target) = target(item, group_port) else { continue };
        match first_lines.entry((target.address, target.port)) {
            Entry::Occupied(first) if target.port != UNKNOWN_PORT => item.error(
                format!("`targets` has {} port {} twice", target.address, target.port),
                format!("leave one out; the first is in line {}", first.get()),
            ),
            entry => {
                entry.or_insert(item.line());
            }
        }
        targets.push((item, target));
    }
    targets
}

fn target(value: Value<'_>, group_port: u16) -> Option<Target> {
    if value.is_table() {
        return target_table(value, group_port);
    }
    let (address, port) = value.parsed(TARGET_HELP, |text| target_string(value, text))?;
    let port = port.unwrap_or(group_port);
    Some(Target { address, port, weight: DEFAULT_WEIGHT, availability_zone: None })
}

/// `ADDRESS` or `ADDRESS:PORT`, with brackets around an IPv6 address that has a port.
fn target_string(value: Value<'_>, text: &str) -> Result<(IpAddr, Option<u16>), Wrong> {
    if text.parse::<IpAddr>().is_ok() {
        return Ok((parse_host_address(value, text)?, None));
    }
    let wrong = || Wrong::new(value.refusal(), TARGET_HELP);
    let socket: SocketAddr = text.parse().map_err(|_| wrong())?;
    if text.contains('%') {
        return Err(wrong()); // A scope id: std reads it, but no target of ours can have one.
    }
    if socket.port() == 0 {
        let message = format!("the target {} has port 0", value.quote());
        return Err(Wrong::new(message, "write a port from 1 to 65535"));
    }
    let address = parse_host_address(value, &socket.ip().to_string())?;
    Ok((address, Some(socket.port())))
}

fn target_table(value: Value<'_>, group_port: u16) -> Option<Target> {
    let mut table = value.table("this target", TARGET_HELP)?;
    let address = table.required("address", "add address = \"10.0.2.13\"").and_then(host_address);
    let port = match table.optional("port") {
        Some(port) => port.port().unwrap_or(UNKNOWN_PORT),
        None => group_port,
    };
    let weight = table
        .optional("weight")
        .and_then(|weight| weight.integer(0..=999))
        .and_then(|weight| u16::try_from(weight).ok())
        .unwrap_or(DEFAULT_WEIGHT);
    let availability_zone = table.optional("availability_zone").and_then(availability_zone);
    table.finish();
    Some(Target { address: address?, port, weight, availability_zone })
}
