//! `[load_balancer.NAME]`: where packets come in.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use lb_common::flow::{MAX_IDLE, TCP_IDLE, UDP_IDLE};

use super::address::{ADDRESS_HELP, host_address};
use super::agent::availability_zone;
use super::application;
use super::forward::{GroupDraft, target_groups};
use super::model::{
    AddressZones, Attributes, Listener, LoadBalancer, LoadBalancerType, Protocol, Scheme,
};
use super::protocol::{AnyProtocol, of_listener};
use super::reader::{Table, Value};

/// A load balancer as far as it could be read, with where the file has what checks across
/// sections are about.
pub(super) struct Draft<'a> {
    /// `None` where it could not be read.
    pub(super) kind: Option<LoadBalancerType>,
    pub(super) scheme: Scheme,
    pub(super) addresses: Vec<(Value<'a>, IpAddr)>,
    pub(super) security_groups: Option<Vec<(Value<'a>, &'a str)>>,
    pub(super) zones: AddressZones,
    pub(super) cross_zone: Option<(Value<'a>, bool)>,
    /// Those whose packets are forwarded.
    pub(super) listeners: Vec<ListenerDraft<'a>>,
    /// Those whose connections end in the proxy.
    pub(super) proxied: Vec<application::Draft<'a>>,
    pub(super) attributes: Attributes,
    /// Where the file has `access_logs`.
    pub(super) access_logs: Option<Value<'a>>,
}

/// A listener as far as it could be read.
pub(super) struct ListenerDraft<'a> {
    pub(super) protocol: Option<Protocol>,
    pub(super) port: Option<u16>,
    /// None where they could not be read.
    pub(super) target_groups: Vec<GroupDraft<'a>>,
    pub(super) idle_timeout: Duration,
}

impl<'a> Draft<'a> {
    /// Every target group that a listener names.
    pub(super) fn groups(&self) -> impl Iterator<Item = &GroupDraft<'a>> {
        let forwarded = self.listeners.iter().flat_map(|listener| &listener.target_groups);
        forwarded.chain(self.proxied.iter().flat_map(|listener| &listener.groups))
    }

    pub(super) fn listener_count(&self) -> usize {
        self.listeners.len() + self.proxied.len()
    }

    /// Ports, whatever listens there.
    pub(super) fn ports(&self) -> impl Iterator<Item = u16> {
        let forwarded = self.listeners.iter().map(|listener| listener.port);
        forwarded.chain(self.proxied.iter().map(|listener| listener.port)).flatten()
    }

    /// The load balancer, where nothing was wrong with it.
    pub(super) fn into_load_balancer(self) -> LoadBalancer {
        let complete = |draft: ListenerDraft<'_>| {
            Some(Listener {
                protocol: draft.protocol?,
                port: draft.port?,
                target_groups: draft.target_groups.iter().map(Into::into).collect(),
                idle_timeout: draft.idle_timeout,
            })
        };
        LoadBalancer {
            kind: self.kind.unwrap_or(LoadBalancerType::Network),
            zones: self.zones,
            proxied: self.proxied.into_iter().filter_map(|draft| draft.listener).collect(),
            attributes: self.attributes,
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
    let kinds =
        [("network", LoadBalancerType::Network), ("application", LoadBalancerType::Application)];
    let kind = table.optional("type");
    let kind = kind.map_or(Some(LoadBalancerType::Network), |kind| kind.choice(&kinds, &[]));
    let schemes = [("internal", Scheme::Internal), ("internet-facing", Scheme::InternetFacing)];
    let scheme = table
        .optional("scheme")
        .and_then(|scheme| scheme.choice(&schemes, &[]))
        .unwrap_or(Scheme::Internal);
    let mut zones = AddressZones::new();
    let addresses = table
        .required("addresses", "add addresses = [\"10.0.0.100\"], what clients connect to")
        .map(|value| addresses(value, &mut zones))
        .unwrap_or_default();
    let security_groups = table.optional("security_groups").map(security_groups);
    let listener = table.optional("listener");
    if listener.is_none() {
        let message = format!("{} has no listener and takes no packets", table.name());
        table.warning(message, "add a section [[load_balancer.NAME.listener]]");
    }
    let (attributes, access_logs) = application::attributes(&mut table, kind);
    let (listeners, proxied) =
        listener.map(|value| listeners(value, kind, attributes.http2)).unwrap_or_default();
    let cross_zone = table.optional("cross_zone");
    let cross_zone = cross_zone.and_then(|value| Some((value, value.boolean()?)));
    table.finish();
    Draft {
        kind,
        scheme,
        addresses,
        security_groups,
        zones,
        cross_zone,
        listeners,
        proxied,
        attributes,
        access_logs,
    }
}

fn addresses<'a>(value: Value<'a>, zones: &mut AddressZones) -> Vec<(Value<'a>, IpAddr)> {
    let help = "write a list of addresses, such as [\"10.0.0.100\", \"2001:db8::100\"]";
    let Some(items) = value.items(help) else { return Vec::new() };
    if items.is_empty() {
        value.error("`addresses` is [], so no client can connect", help);
    }
    let mut read = |item: Value<'a>| {
        if item.is_table() {
            return zoned_address(item, zones);
        }
        host_address(item).map(|address| (item, address))
    };
    items.into_iter().filter_map(&mut read).collect()
}

/// An address that stands in a zone.
fn zoned_address<'a>(value: Value<'a>, zones: &mut AddressZones) -> Option<(Value<'a>, IpAddr)> {
    let mut table = value.table("this address", ADDRESS_HELP)?;
    let address = table.required("address", "add address = \"10.0.0.100\"");
    let zone = table.optional("availability_zone").and_then(availability_zone);
    table.finish();
    let address_value = address?;
    let address = host_address(address_value)?;
    if let Some(zone) = zone {
        zones.insert(address, zone);
    }
    Some((address_value, address))
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

type Listeners<'a> = (Vec<ListenerDraft<'a>>, Vec<application::Draft<'a>>);

fn listeners<'a>(value: Value<'a>, kind: Option<LoadBalancerType>, http2: bool) -> Listeners<'a> {
    let help = "write a section [[load_balancer.NAME.listener]] for each listener, with two \
                brackets";
    let mut listeners: Listeners<'a> = (Vec::new(), Vec::new());
    let mut taken: BTreeSet<(Protocol, u16)> = BTreeSet::new();
    for item in value.items(help).unwrap_or_default() {
        let Some(mut table) = item.table("this listener", help) else { continue };
        let protocol = of_listener(&mut table, kind);
        let port = if let Some(protocol) = protocol.and_then(AnyProtocol::proxied) {
            let draft = application::listener(&mut table, protocol, http2);
            let port = draft.port;
            listeners.1.push(draft);
            port
        } else {
            let draft = listener(&mut table, protocol);
            let port = draft.port;
            listeners.0.push(draft);
            port
        };
        if let Some((protocol, port)) = protocol.map(AnyProtocol::transport).zip(port)
            && !taken.insert((protocol, port))
        {
            let message =
                format!("this load balancer has two listeners for {protocol} port {port}");
            table.error(message, "leave one out, or give it another port");
        }
        table.finish();
    }
    listeners
}

/// Port of a listener that names none.
const DEFAULT_PORT: u16 = 80;

/// A listener that forwards packets, or one whose protocol could not be read.
fn listener<'a>(table: &mut Table<'a>, protocol: Option<AnyProtocol>) -> ListenerDraft<'a> {
    let protocol = match protocol {
        Some(protocol) => {
            let place = format!("in {protocol} listener");
            let help = "leave it out: such a listener forwards packets as they are";
            table.meaningless(&application::KEYS, &place, help);
            protocol.forwarded()
        }
        None => {
            table.ignore(&application::KEYS);
            None
        }
    };
    let port = match table.optional("port") {
        Some(port) => port.port(),
        None => Some(DEFAULT_PORT),
    };
    let target_groups = target_groups(table);
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
