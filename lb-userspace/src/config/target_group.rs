//! `[target_group.NAME]`: where packets go.

use std::collections::hash_map::{Entry, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::address::{host_address, parse_host_address};
use super::agent::availability_zone;
use super::application;
use super::health_check::{self, Spoken};
use super::model::{
    Algorithm, Forwarding, Protocol, RequestAlgorithm, Snat, Stickiness, Target, TargetGroup,
};
use super::protocol::{AnyProtocol, of_target_group};
use super::reader::{Table, Value, Wrong, show_duration};
use super::snat;

/// A target group as far as it could be read.
///
/// Where an error was found `group` has a placeholder; nobody will see it, but checks across
/// sections must not build on it. So they use the fields beside it.
pub(super) struct Draft<'a> {
    pub(super) group: TargetGroup,
    pub(super) protocol: Option<AnyProtocol>,
    /// Where the file has `proxy_protocol_v2 = true`.
    pub(super) proxy_protocol: Option<Value<'a>>,
    pub(super) forwarding: Option<Forwarding>,
    /// Where the file has each of `group.snat.addresses`.
    pub(super) snat_addresses: Vec<(Value<'a>, IpAddr)>,
    /// The security group's name, and where the file has it.
    pub(super) security_group: Option<(Value<'a>, &'a str)>,
    pub(super) stickiness: Option<Stickiness>,
    /// Where the file has each of `group.targets`.
    pub(super) target_values: Vec<Value<'a>>,
}

const TARGET_HELP: &str = "write \"10.0.2.11\", \"10.0.2.12:8081\", \"2001:db8::1\", \
                           \"[2001:db8::1]:80\" or { address = \"10.0.2.13\", port = 8080 }";
/// Of a port that could not be read.
pub(super) const UNKNOWN_PORT: u16 = 0;
const DEFAULT_PORT: u16 = 8080;
/// GUE's registered port.
const DEFAULT_GUE_PORT: u16 = 6080;
const DEFAULT_WEIGHT: u16 = 1;
const STICKINESS_HELP: &str = "write stickiness = { type = \"source_ip\" }, or leave the key out";
const MIN_SLOW_START: Duration = Duration::from_secs(30);
const MAX_SLOW_START: Duration = Duration::from_secs(900);
/// AWS's bounds of deregistration_delay.timeout_seconds.
const MAX_DEREGISTRATION_DELAY: Duration = Duration::from_secs(3600);

pub(super) fn read<'a>(mut table: Table<'a>) -> Draft<'a> {
    let protocol = of_target_group(&mut table);
    let is_proxied = protocol.is_some_and(|protocol| protocol.proxied().is_some());
    if let Some(protocol) = protocol.filter(|_| is_proxied) {
        let place = format!("in {protocol} target group");
        let help = "leave it out: the load balancer opens its own connections to these targets";
        table.meaningless(&application::FORWARDED_KEYS, &place, help);
    }
    let port = match table.optional("port") {
        Some(port) => port.port().unwrap_or(UNKNOWN_PORT),
        None => DEFAULT_PORT,
    };
    let forwarding = match table.optional("forwarding") {
        Some(value) => value.choice(
            &[
                ("nat", Forwarding::Nat),
                ("snat", Forwarding::Snat),
                ("dsr_l2", Forwarding::DsrL2),
                ("dsr_ipip", Forwarding::DsrIpip),
                ("dsr_gue", Forwarding::DsrGue),
            ],
            &[],
        ),
        None => Some(Forwarding::Nat),
    };
    let (snat_addresses, snat_ports) = snat::read(&mut table, forwarding);
    let gue_port = gue_port(table.optional("gue_port"), forwarding);
    let (algorithm, request_algorithm) = application::algorithm(&mut table, protocol);
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
    let security_group = table.optional("security_group").and_then(|value| {
        Some((value, value.string("write the name of a security group in quotes")?))
    });
    if protocol == Some(AnyProtocol::Tls) {
        table.meaningless(&["stickiness"], "in a tls target group", "leave it out");
    }
    let sticky = table.optional("stickiness");
    let is_http = protocol.is_some_and(AnyProtocol::is_http);
    let stickiness = match sticky.filter(|_| !is_http) {
        Some(value) => stickiness(value),
        None => Some(Stickiness::None),
    };
    let proxy =
        application::group(&mut table, protocol, request_algorithm, sticky.filter(|_| is_http));
    if let (Some((value, Algorithm::LeastConnections)), Some(Stickiness::SourceIp)) =
        (algorithm, stickiness)
    {
        value.error(
            format!("`algorithm = {}` contradicts `stickiness`", value.quote()),
            "all flows of a client go to one target, or each to the less loaded one: leave out \
             one of the two keys",
        );
    }
    let slow_start = slow_start(&mut table, request_algorithm);
    let (target_values, targets) = targets(table.optional("targets"), port).into_iter().unzip();
    let name = table.name().trim_end_matches(']').to_owned();
    let spoken = Spoken { protocol, version: proxy.settings.version };
    let health_check =
        health_check::read(table.subtable("health_check", format!("{name}.health_check]")), spoken);
    table.finish();
    let group = TargetGroup {
        protocol: protocol.map_or(Protocol::Tcp, AnyProtocol::transport),
        port,
        forwarding: forwarding.unwrap_or(Forwarding::Nat),
        snat: Snat {
            addresses: snat_addresses.iter().map(|(_, address)| *address).collect(),
            ports: snat_ports,
        },
        gue_port,
        deregistration_delay,
        unhealthy_connection_termination,
        algorithm: algorithm.map_or(Algorithm::Maglev, |(_, algorithm)| algorithm),
        track_every_flow,
        security_group: security_group.map(|(_, name)| name.to_owned()),
        stickiness: stickiness.unwrap_or(Stickiness::None),
        slow_start,
        targets,
        health_check,
        proxy: proxy.settings,
    };
    let proxy_protocol = proxy.proxy_protocol;
    Draft {
        group,
        protocol,
        proxy_protocol,
        forwarding,
        snat_addresses,
        security_group,
        stickiness,
        target_values,
    }
}

fn stickiness(value: Value<'_>) -> Option<Stickiness> {
    let mut table = value.table("stickiness", STICKINESS_HELP)?;
    let kind = table.required("type", STICKINESS_HELP).and_then(|kind| {
        let cookies = ["lb_cookie", "app_cookie"].into_iter();
        if let Some(name) = cookies.into_iter().find(|name| kind.is(name)) {
            let message = format!("`type = \"{name}\"` is for target groups of http and https");
            kind.error(message, STICKINESS_HELP);
            return None;
        }
        kind.choice(&[("source_ip", Stickiness::SourceIp)], &[])
    });
    if let Some(duration) = table.optional("duration") {
        duration.error(
            format!("`duration = {}` has no meaning with type source_ip", duration.quote()),
            "leave it out: an address keeps its target for as long as the target takes new flows",
        );
    }
    table.finish();
    kind
}

/// AWS's bounds of slow_start.duration_seconds; 0 switches it off.
fn slow_start(table: &mut Table<'_>, algorithm: RequestAlgorithm) -> Duration {
    let Some(value) = table.optional("slow_start") else { return Duration::ZERO };
    let (least, most) = (show_duration(MIN_SLOW_START), show_duration(MAX_SLOW_START));
    let help = format!("write a duration from {least} to {most} in quotes, or \"0s\" for none");
    let Some(text) = value.string(&help) else { return Duration::ZERO };
    let duration = humantime::parse_duration(text).ok();
    let within = MIN_SLOW_START..=MAX_SLOW_START;
    let right = duration.filter(|duration| duration.is_zero() || within.contains(duration));
    match right {
        None => value.refuse(help),
        Some(duration) if !duration.is_zero() && algorithm != RequestAlgorithm::RoundRobin => {
            value.error(
                "`slow_start` has no meaning with this algorithm",
                "leave it out, or use algorithm = \"round_robin\", whose shares can grow",
            );
        }
        Some(_) => {}
    }
    right.unwrap_or_default()
}

fn gue_port(value: Option<Value<'_>>, forwarding: Option<Forwarding>) -> u16 {
    let Some(value) = value else { return DEFAULT_GUE_PORT };
    let port = value.port().unwrap_or(DEFAULT_GUE_PORT);
    if port != DEFAULT_GUE_PORT && forwarding.is_some_and(|it| it != Forwarding::DsrGue) {
        value.warning(
            format!("`gue_port = {port}` has no effect"),
            "leave `gue_port` out, or use forwarding = \"dsr_gue\"",
        );
    }
    port
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
