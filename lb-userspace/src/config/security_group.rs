//! `[security_group.NAME]`: who may send what.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;

use super::address;
use super::model::{IngressRule, RuleProtocol, SecurityGroup};
use super::reader::{Table, Value, Wrong};
use super::security_group_member::members;

/// A security group as far as it could be read.
pub(super) struct Draft<'a> {
    pub(super) group: SecurityGroup,
    /// Security groups that it has as sources, and where the file has them.
    pub(super) references: Vec<(Value<'a>, &'a str)>,
}

/// Begins a source that is a security group.
const GROUP_PREFIX: &str = "sg:";

pub(super) fn read<'a>(mut table: Table<'a>) -> Draft<'a> {
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
    let members = table.optional("members").map(members).unwrap_or_default();
    table.finish();
    let mut references = Vec::new();
    let rules = rules.into_iter().flatten().filter_map(|value| rule(value, &mut references));
    let group = SecurityGroup { ingress: rules.collect(), members };
    Draft { group, references }
}

fn rule<'a>(value: Value<'a>, references: &mut Vec<(Value<'a>, &'a str)>) -> Option<IngressRule> {
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
        .and_then(|value| sources(value, references));
    table.finish();
    let (mut networks, mut groups) = (Vec::new(), Vec::new());
    for source in sources? {
        match source {
            Source::Network(network) => networks.push(network),
            Source::Group(name) => groups.push(name.to_owned()),
        }
    }
    Some(IngressRule { protocol: protocol?, ports: ports?, sources: networks, groups })
}

/// One of a rule's sources.
enum Source<'a> {
    Network(IpNet),
    Group(&'a str),
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

fn sources<'a>(
    value: Value<'a>,
    references: &mut Vec<(Value<'a>, &'a str)>,
) -> Option<Vec<Source<'a>>> {
    let help = "write a list of networks, such as [\"10.0.0.0/8\", \"2001:db8::/32\"]";
    let items = value.items(help)?;
    if items.is_empty() {
        value.error("`sources` is [], so this rule lets nobody in", help);
        return None;
    }
    // Every item is looked at before the first bad one makes the list worthless.
    let sources: Vec<Option<Source<'_>>> =
        items.into_iter().map(|item| source(item, references)).collect();
    sources.into_iter().collect()
}

fn source<'a>(value: Value<'a>, references: &mut Vec<(Value<'a>, &'a str)>) -> Option<Source<'a>> {
    let help = "write a network or an address, such as \"10.0.0.0/8\", \"2001:db8::/32\" or \
                \"192.0.2.7\", or a security group, such as \"sg:web-lb\"";
    if let Some(name) = value.string(help)?.strip_prefix(GROUP_PREFIX) {
        references.push((value, name));
        return Some(Source::Group(name));
    }
    value.parsed(help, |text| parse_network(value, text, help)).map(Source::Network)
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
