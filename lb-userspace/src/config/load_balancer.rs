//! `[load_balancer.NAME]`: where packets come in.

use std::net::IpAddr;
use std::time::Duration;

use lb_common::flow::{MAX_IDLE, TCP_IDLE, UDP_IDLE};

use super::address::{ADDRESS_HELP, host_address};
use super::model::{
    AddressZones, Attributes, Listener, LoadBalancer, LoadBalancerType, Protocol, Scheme,
    WeightedTargetGroup,
};
use super::reader::{Table, Value};
use super::target_group::protocol;

/// A load balancer as far as it could be read, with where the file has what checks across
/// sections are about.
pub(super) struct Draft<'a> {
    pub(super) scheme: Scheme,
    pub(super) addresses: Vec<(Value<'a>, IpAddr)>,
    pub(super) security_groups: Option<Vec<(Value<'a>, &'a str)>>,
    pub(super) cross_zone: Option<(Value<'a>, bool)>,
    pub(super) listeners: Vec<ListenerDraft<'a>>,
}

/// A listener as far as it could be read.
pub(super) struct ListenerDraft<'a> {
    pub(super) protocol: Option<Protocol>,
    pub(super) port: Option<u16>,
    /// None where they could not be read.
    pub(super) target_groups: Vec<GroupDraft<'a>>,
    pub(super) idle_timeout: Duration,
}

/// A target group of a listener.
pub(super) struct GroupDraft<'a> {
    /// Where the file has its name.
    pub(super) value: Value<'a>,
    pub(super) name: &'a str,
    pub(super) weight: u16,
}

impl Draft<'_> {
    /// The load balancer, where nothing was wrong with it.
    pub(super) fn into_load_balancer(self) -> LoadBalancer {
        let complete = |draft: ListenerDraft<'_>| {
            let groups = draft.target_groups.into_iter();
            let groups = groups
                .map(|group| WeightedTargetGroup { name: group.name.into(), weight: group.weight });
            Some(Listener {
                protocol: draft.protocol?,
                port: draft.port?,
                target_groups: groups.collect(),
                idle_timeout: draft.idle_timeout,
            })
        };
        LoadBalancer {
            kind: LoadBalancerType::Network,
            zones: AddressZones::new(),
            proxied: Vec::new(),
            attributes: Attributes::default(),
            scheme: self.scheme,
            addresses: self.addresses.into_iter().map(|(_, address)| address).collect(),
            security_groups: self
                .security_groups
                .map(|groups| groups.into_iter().map(|(_, name)| name.to_owned()).collect()),
            cross_zone: self.cross_zone.is_none_or(|(_, cross_zone)| cross_zone),
            listeners: self.listeners.into_iter().filter_map(complete).collect(),
        }
    }
}

pub(super) fn read<'a>(mut table: Table<'a>) -> Draft<'a> {
    if let Some(kind) = table.optional("type") {
        kind.choice(&[("network", ())], &["application"]);
    }
    let schemes = [("internal", Scheme::Internal), ("internet-facing", Scheme::InternetFacing)];
    let scheme = table
        .optional("scheme")
        .and_then(|scheme| scheme.choice(&schemes, &[]))
        .unwrap_or(Scheme::Internal);
    let addresses = table
        .required("addresses", "add addresses = [\"10.0.0.100\"], what clients connect to")
        .map(addresses)
        .unwrap_or_default();
    let security_groups = table.optional("security_groups").map(security_groups);
    let listener = table.optional("listener");
    if listener.is_none() {
        let message = format!("{} has no listener and takes no packets", table.name());
        table.warning(message, "add a section [[load_balancer.NAME.listener]]");
    }
    let listeners = listener.map(listeners).unwrap_or_default();
    let cross_zone = table.optional("cross_zone");
    let cross_zone = cross_zone.and_then(|value| Some((value, value.boolean()?)));
    table.finish();
    Draft { scheme, addresses, security_groups, cross_zone, listeners }
}

fn addresses<'a>(value: Value<'a>) -> Vec<(Value<'a>, IpAddr)> {
    let help = "write a list of addresses, such as [\"10.0.0.100\", \"2001:db8::100\"]";
    let Some(items) = value.items(help) else { return Vec::new() };
    if items.is_empty() {
        value.error("`addresses` is [], so no client can connect", help);
    }
    let read = |item: Value<'a>| {
        if item.is_table() {
            item.error("an address as a table is not supported yet", ADDRESS_HELP);
            return None;
        }
        host_address(item).map(|address| (item, address))
    };
    items.into_iter().filter_map(read).collect()
}

fn security_groups<'a>(value: Value<'a>) -> Vec<(Value<'a>, &'a str)> {
    let help = "write a list of security groups' names, such as [\"web-lb\"], or leave the key \
                out to be open to all";
    let Some(items) = value.items(help) else { return Vec::new() };
    if items.is_empty() {
        value.error("`security_groups` is [], neither open nor closed", help);
    }
    let mut groups: Vec<(Value<'a>, &'a str)> = Vec::new();
    for item in items {
        let Some(name) = item.string(help) else { continue };
        if groups.iter().any(|(_, other)| *other == name) {
            item.error(format!("`security_groups` has {} twice", item.quote()), "leave one out");
        }
        groups.push((item, name));
    }
    groups
}

fn listeners<'a>(value: Value<'a>) -> Vec<ListenerDraft<'a>> {
    let help = "write a section [[load_balancer.NAME.listener]] for each listener, with two \
                brackets";
    let mut listeners: Vec<ListenerDraft<'a>> = Vec::new();
    for item in value.items(help).unwrap_or_default() {
        let Some(mut table) = item.table("this listener", help) else { continue };
        let listener = listener(&mut table);
        let same = |other: &ListenerDraft<'_>| {
            other.protocol == listener.protocol && other.port == listener.port
        };
        if let (Some(protocol), Some(port)) = (listener.protocol, listener.port)
            && listeners.iter().any(same)
        {
            let message =
                format!("this load balancer has two listeners for {protocol} port {port}");
            table.error(message, "leave one out, or give it another port");
        }
        table.finish();
        listeners.push(listener);
    }
    listeners
}

/// Port of a listener that names none.
const DEFAULT_PORT: u16 = 80;

fn listener<'a>(table: &mut Table<'a>) -> ListenerDraft<'a> {
    let protocol = protocol(table);
    let port = match table.optional("port") {
        Some(port) => port.port(),
        None => Some(DEFAULT_PORT),
    };
    let target_groups = target_groups(table);
    table.not_supported_yet(&["certificates", "rule"]);
    let idle_timeout = idle_timeout(table, protocol);
    ListenerDraft { protocol, port, target_groups, idle_timeout }
}

/// The key that is for the listener's protocol.
fn idle_timeout(table: &mut Table<'_>, protocol: Option<Protocol>) -> Duration {
    // AWS's bounds of tcp.idle_timeout.seconds; its UDP timeout cannot be changed.
    let keys = [
        ("tcp_idle_timeout", Protocol::Tcp, 60, TCP_IDLE),
        ("udp_idle_timeout", Protocol::Udp, 10, UDP_IDLE),
    ];
    let mut timeout = Duration::from_secs(TCP_IDLE.into());
    for (key, of, least, default) in keys {
        let value = table.optional(key);
        if protocol.is_some_and(|protocol| protocol != of) {
            if let Some(value) = value {
                value.error(
                    format!("`{key}` is for {of} listeners, this one is none"),
                    "leave it out",
                );
            }
            continue;
        }
        let range = Duration::from_secs(least)..=Duration::from_secs(MAX_IDLE.into());
        let whole = value.and_then(|value| value.whole_seconds(range));
        timeout = whole.unwrap_or(Duration::from_secs(default.into()));
    }
    timeout
}

const GROUPS_HELP: &str = "write [{ name = \"NAME\", weight = 90 }, { name = \"OTHER\", weight = \
                           10 }], or target_group = \"NAME\"";
const NAME_HELP: &str = "write the name of a target group in quotes";
const MAX_WEIGHT: u32 = 999;
const DEFAULT_WEIGHT: u16 = 1;

/// `target_group = NAME`, or `target_groups`.
fn target_groups<'a>(table: &mut Table<'a>) -> Vec<GroupDraft<'a>> {
    match (table.optional("target_group"), table.optional("target_groups")) {
        (Some(value), None) => {
            let name = value.string(NAME_HELP);
            name.map(|name| GroupDraft { value, name, weight: DEFAULT_WEIGHT })
                .into_iter()
                .collect()
        }
        (None, Some(value)) => weighted_groups(value),
        (Some(_), Some(value)) => {
            let message = "this listener has both `target_group` and `target_groups`";
            value.error(message, "leave one of them out");
            Vec::new()
        }
        (None, None) => {
            let message = format!("{} has no `target_group`", table.name());
            table.error(message, "add target_group = \"NAME\", where its packets go");
            Vec::new()
        }
    }
}

fn weighted_groups<'a>(value: Value<'a>) -> Vec<GroupDraft<'a>> {
    let Some(items) = value.items(GROUPS_HELP) else { return Vec::new() };
    let mut groups: Vec<GroupDraft<'a>> = Vec::new();
    for item in &items {
        let Some(group) = weighted_group(*item) else { continue };
        if groups.iter().any(|other| other.name == group.name) {
            let message = format!("`target_groups` has {} twice", group.value.quote());
            group.value.error(message, "leave one out");
        }
        groups.push(group);
    }
    let nowhere = "so packets have nowhere to go";
    if items.is_empty() {
        value.error(format!("`target_groups` is [], {nowhere}"), GROUPS_HELP);
    } else if groups.len() == items.len() && groups.iter().all(|group| group.weight == 0) {
        let message = format!("every weight in `target_groups` is 0, {nowhere}");
        value.error(message, format!("give one of them a weight from 1 to {MAX_WEIGHT}"));
    }
    groups
}

fn weighted_group<'a>(item: Value<'a>) -> Option<GroupDraft<'a>> {
    let mut table = item.table("this target group", GROUPS_HELP)?;
    let weight = match table.optional("weight") {
        Some(weight) => weight.integer(0..=MAX_WEIGHT).and_then(|weight| weight.try_into().ok()),
        None => Some(DEFAULT_WEIGHT),
    };
    let value = table.required("name", "add name = \"NAME\"");
    let name = value.and_then(|value| value.string(NAME_HELP));
    table.finish();
    Some(GroupDraft { value: value?, name: name?, weight: weight? })
}
