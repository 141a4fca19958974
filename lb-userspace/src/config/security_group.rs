//! `[security_group.NAME]`: who may send what.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;

use super::address;
use super::model::{IngressRule, RuleProtocol, SecurityGroup};
use super::reader::{Table, Value, Wrong};

pub(super) fn read(mut table: Table<'_>) -> SecurityGroup {
    let help = "write a list of rules, such as [{ protocol = \"tcp\", ports = \"80\", \
                sources = [\"0.0.0.0/0\", \"::/0\"] }]";
    let rules = match table.optional("ingress") {
        Some(value) => value.items(help),
        None => Some(Vec::new()),
    };
    if rules.as_ref().is_some_and(Vec::is_empty) {
        let message = format!("{} has no ingress rule and denies everything", table.name());
        table.warning(message, "add rules to `ingress`");
    }
    table.not_supported_yet(&["members"]);
    table.finish();
    SecurityGroup { ingress: rules.into_iter().flatten().filter_map(rule).collect() }
}

fn rule(value: Value<'_>) -> Option<IngressRule> {
    let mut table = value.table(
        "this rule",
        "write { protocol = \"tcp\", ports = \"80\", sources = [\"0.0.0.0/0\", \"::/0\"] }",
    )?;
    let protocols = [
        ("tcp", RuleProtocol::Tcp),
        ("udp", RuleProtocol::Udp),
        ("icmp", RuleProtocol::Icmp),
        ("all", RuleProtocol::All),
    ];
    let protocol = table
        .required("protocol", "add protocol = \"tcp\", \"udp\", \"icmp\" or \"all\"")
        .and_then(|protocol| protocol.choice(&protocols, &[]));
    let ports = rule_ports(&mut table, protocol);
    let sources = table
        .required("sources", "add sources = [\"0.0.0.0/0\", \"::/0\"] to let everyone in")
        .and_then(sources);
    table.finish();
    Some(IngressRule { protocol: protocol?, ports: ports?, sources: sources? })
}

/// The ports of a rule: TCP and UDP must say which, the others have none to say.
fn rule_ports(
    table: &mut Table<'_>,
    protocol: Option<RuleProtocol>,
) -> Option<RangeInclusive<u16>> {
    let ports = table.optional("ports");
    match (protocol?, ports) {
        (RuleProtocol::Tcp | RuleProtocol::Udp, Some(ports)) => port_range(ports),
        (RuleProtocol::Tcp | RuleProtocol::Udp, None) => {
            let help = "add ports = \"80\", \"8000-8999\", or \"0-65535\" for all of them";
            table.error(format!("{} has no `ports`", table.name()), help);
            None
        }
        (RuleProtocol::Icmp | RuleProtocol::All, Some(ports)) => {
            let message = format!("`ports = {}` has no meaning in this rule", ports.quote());
            ports.error(message, "leave `ports` out: only rules for tcp and udp have ports");
            None
        }
        (RuleProtocol::Icmp | RuleProtocol::All, None) => Some(0..=u16::MAX),
    }
}

fn port_range(value: Value<'_>) -> Option<RangeInclusive<u16>> {
    let help = "write a port or a range of ports in quotes, such as \"80\" or \"8000-8999\"";
    value.parsed(help, |text| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let wrong = || Wrong::new(value.refusal(), help);
        let parse = |port: &str| port.trim().parse::<u16>().map_err(|_| wrong());
        let (first, last) = (parse(first)?, parse(last)?);
        if first > last {
            let message =
                format!("`ports` is {}, a range that ends before it begins", value.quote());
            return Err(Wrong::new(message, format!("write \"{last}-{first}\"")));
        }
        Ok(first..=last)
    })
}

fn sources(value: Value<'_>) -> Option<Vec<IpNet>> {
    let help = "write a list of networks, such as [\"10.0.0.0/8\", \"2001:db8::/32\"]";
    let items = value.items(help)?;
    if items.is_empty() {
        value.error("`sources` is [], so this rule lets nobody in", help);
        return None;
    }
    // Every item is looked at before the first bad one makes the list worthless.
    let sources: Vec<Option<IpNet>> = items.into_iter().map(source).collect();
    sources.into_iter().collect()
}

fn source(value: Value<'_>) -> Option<IpNet> {
    let help = "write a network or an address, such as \"10.0.0.0/8\", \"2001:db8::/32\" or \
                \"192.0.2.7\"";
    let text = value.string(help)?;
    if text.starts_with("sg:") {
        let message = format!("the source {} is not supported yet", value.quote());
        value.error(message, "write networks instead, such as \"10.0.0.0/8\"");
        return None;
    }
    value.parsed(help, |text| parse_network(value, text, help))
}

/// A network, or an address for the network of it alone.
pub(super) fn parse_network(value: Value<'_>, text: &str, help: &str) -> Result<IpNet, Wrong> {
    let network = text
        .parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| Wrong::new(value.refusal(), help))?;
    refuse_mapped(network)?;
    if network != network.trunc() {
        return Err(host_bits(value, network));
    }
    Ok(network)
}

fn refuse_mapped(network: IpNet) -> Result<(), Wrong> {
    let IpNet::V6(v6) = network else { return Ok(()) };
    match (v6.addr().to_ipv4_mapped(), v6.prefix_len().checked_sub(96)) {
        (Some(v4), Some(length)) => {
            Err(address::mapped(&v6.to_string(), &format!("{v4}/{length}")))
        }
        _ => Ok(()),
    }
}

fn host_bits(value: Value<'_>, network: IpNet) -> Wrong {
    Wrong::new(
        format!("{} is an address within a network, not a network", value.quote()),
        format!(
            "write \"{}\" for the network, \"{}\" for the address",
            network.trunc(),
            network.addr()
        ),
    )
}
