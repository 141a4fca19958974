//! A listener whose connections end in the proxy.

use super::super::forward::GroupDraft;
use super::super::model::{ProxyListener, ProxyProtocol};
use super::super::reader::Table;
use super::action::{self, Place};
use super::{rule, tls};

/// The keys that only such listeners have.
pub(in super::super) const KEYS: [&str; 7] = [
    "certificates",
    "ssl_policy",
    "alpn_policy",
    "rule",
    "redirect",
    "fixed_response",
    "target_group_stickiness",
];

/// A listener as far as it could be read, with where the file has what checks across sections are
/// about.
pub(in super::super) struct Draft<'a> {
    pub(in super::super) protocol: ProxyProtocol,
    pub(in super::super) port: Option<u16>,
    /// Those of its own action and of all rules.
    pub(in super::super) groups: Vec<GroupDraft<'a>>,
    /// `None` where an error was found.
    pub(in super::super) listener: Option<ProxyListener>,
}

/// `http2`: whether clients may speak it.
pub(in super::super) fn read<'a>(
    table: &mut Table<'a>,
    protocol: ProxyProtocol,
    http2: bool,
) -> Draft<'a> {
    let default_port = if protocol == ProxyProtocol::Http { 80 } else { 443 };
    let port = table.optional("port").map_or(Some(default_port), |port| port.port());
    let help = "leave it out: the proxy's timeouts are others";
    table.meaningless(&["tcp_idle_timeout", "udp_idle_timeout"], "but for forwarded packets", help);
    let tls = tls::read(table, protocol, http2);
    if protocol == ProxyProtocol::Tls {
        let keys = ["rule", "redirect", "fixed_response", "target_group_stickiness"];
        let help = "leave it out: the listener does not look at what is in the connection";
        table.meaningless(&keys, "in a tls listener", help);
    }
    let place = Place { protocol, port, groups_key: "target_groups" };
    let action = action::read(table, place);
    let rules = table.optional("rule");
    let place = Place { groups_key: "forward", ..place };
    let rules = rules.map(|value| rule::read(value, place)).unwrap_or_default();
    let complete = |port, default_action| ProxyListener {
        protocol,
        port,
        tls,
        default_action,
        rules: rules.rules,
    };
    Draft {
        protocol,
        port,
        groups: action.groups.into_iter().chain(rules.groups).collect(),
        listener: port.zip(action.action).map(|(port, action)| complete(port, action)),
    }
}
