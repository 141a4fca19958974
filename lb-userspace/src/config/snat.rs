//! `snat_addresses` and `snat_ports` of a target group.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use lb_common::snat::MAX_SNAT_ADDRESSES;

use super::address::host_address;
use super::load_balancer;
use super::model::Forwarding;
use super::reader::{Table, Value, Wrong};
use super::target_group;

/// 50,000 ports, and some left for the machine's own connections.
const DEFAULT_PORTS: RangeInclusive<u16> = 10_000..=59_999;
/// Below are the ports of services.
const FIRST_PORT: u16 = 1024;

/// Reads both keys, which belong to `forwarding = "snat"`.
pub(super) fn read<'a>(
    table: &mut Table<'a>,
    forwarding: Option<Forwarding>,
) -> (Vec<(Value<'a>, IpAddr)>, RangeInclusive<u16>) {
    let (addresses, ports) = (table.optional("snat_addresses"), table.optional("snat_ports"));
    let is_other = forwarding.is_some_and(|forwarding| forwarding != Forwarding::Snat);
    let range = ports.and_then(|ports| Some((ports, port_range(ports)?)));
    let changed = range.as_ref().filter(|(_, range)| *range != DEFAULT_PORTS);
    for value in addresses.iter().chain(changed.map(|(value, _)| value)).filter(|_| is_other) {
        value.error(
            format!("`{}` has no meaning without forwarding = \"snat\"", value.key()),
            format!("leave `{}` out, or write forwarding = \"snat\"", value.key()),
        );
    }
    let ports = range.map_or(DEFAULT_PORTS, |(_, range)| range);
    (addresses.map(read_addresses).unwrap_or_default(), ports)
}

fn read_addresses(value: Value<'_>) -> Vec<(Value<'_>, IpAddr)> {
    let help = "write a list of addresses of this machine, such as [\"10.0.2.1\", \"2001:db8::1\"]";
    let Some(items) = value.items(help) else { return Vec::new() };
    if items.is_empty() {
        value.error(
            "`snat_addresses` is [], so no flow has a source address",
            "name one, or leave `snat_addresses` out for this machine's own address",
        );
    }
    let mut addresses: Vec<(Value<'_>, IpAddr)> = Vec::new();
    for item in items {
        let Some(address) = host_address(item) else { continue };
        if let Some((first, _)) = addresses.iter().find(|(_, known)| *known == address) {
            let help = format!("leave one out; the first is in line {}", first.line());
            item.error(format!("`snat_addresses` has {address} twice"), help);
        }
        let family = addresses.iter().filter(|(_, known)| known.is_ipv4() == address.is_ipv4());
        if family.count() == MAX_SNAT_ADDRESSES as usize {
            let version = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            let message =
                format!("{} is one {version} address more than a group can have", item.quote());
            item.error(message, format!("name at most {MAX_SNAT_ADDRESSES} of a family"));
        }
        addresses.push((item, address));
    }
    addresses
}

fn port_range(value: Value<'_>) -> Option<RangeInclusive<u16>> {
    let help = "write a range of ports from 1024 to 65535 in quotes, such as \"10000-59999\"";
    value.parsed(help, |text| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let parse = |port: &str| port.trim().parse::<u16>().ok().filter(|port| *port >= FIRST_PORT);
        let (Some(first), Some(last)) = (parse(first), parse(last)) else {
            return Err(Wrong::new(value.refusal(), help));
        };
        if first > last {
            let message =
                format!("`snat_ports` is {}, a range that ends before it begins", value.quote());
            return Err(Wrong::new(message, format!("write \"{last}-{first}\"")));
        }
        Ok(first..=last)
    })
}

/// Replies come back to these addresses and ports: no target may have one, nor may a listener. And
/// they come back only to a machine that has the address.
pub(super) fn check(
    groups: &[(&str, target_group::Draft<'_>)],
    load_balancers: &[(&str, load_balancer::Draft<'_>)],
) {
    let mut targets: BTreeMap<IpAddr, usize> = BTreeMap::new();
    for (_, group) in groups {
        for (value, target) in group.target_values.iter().zip(&group.group.targets) {
            targets.entry(target.address).or_insert_with(|| value.line());
        }
    }
    for (_, group) in groups {
        for (value, address) in &group.snat_addresses {
            if let Some(line) = targets.get(address) {
                value.error(
                    format!("{} is a target\'s address", value.quote()),
                    format!("name addresses of this machine; the target is in line {line}"),
                );
            } else {
                check_listeners(*value, *address, &group.group.snat.ports, load_balancers);
                value.warning_unless_local(
                    *address,
                    format!("{} is not an address of this machine", value.quote()),
                    "add it to an interface, or replies will not come back",
                );
            }
        }
    }
}

fn check_listeners(
    value: Value<'_>,
    address: IpAddr,
    ports: &RangeInclusive<u16>,
    load_balancers: &[(&str, load_balancer::Draft<'_>)],
) {
    for (name, balancer) in load_balancers {
        if !balancer.addresses.iter().any(|(_, known)| *known == address) {
            continue;
        }
        if let Some(port) = balancer.ports().find(|port| ports.contains(port)) {
            value.error(
                format!(
                    "{} is an address of load balancer \"{name}\", whose port {port} is one of \
                     `snat_ports`",
                    value.quote()
                ),
                format!("use another address, or `snat_ports` without {port}"),
            );
        }
    }
}
