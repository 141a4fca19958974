//! What listeners and target groups speak.

use std::fmt;

use super::model::{LoadBalancerType, Protocol, ProxyProtocol, TargetProtocol};
use super::reader::{Table, Value, enumerate};

/// Any of them, as the configuration file writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AnyProtocol {
    Tcp,
    Udp,
    Tls,
    Http,
    Https,
}

use AnyProtocol::{Http, Https, Tcp, Tls, Udp};

const NETWORK: [(&str, AnyProtocol); 3] = [("tcp", Tcp), ("udp", Udp), ("tls", Tls)];
const APPLICATION: [(&str, AnyProtocol); 2] = [("http", Http), ("https", Https)];
const LATER: [&str; 1] = ["tcp_udp"];

impl AnyProtocol {
    /// Of listeners and groups whose packets are forwarded as they are.
    pub(super) fn forwarded(self) -> Option<Protocol> {
        match self {
            Tcp => Some(Protocol::Tcp),
            Udp => Some(Protocol::Udp),
            Tls | Http | Https => None,
        }
    }

    /// What carries it.
    pub(super) fn transport(self) -> Protocol {
        self.forwarded().unwrap_or(Protocol::Tcp)
    }

    /// Of listeners whose connections end in the proxy.
    pub(super) fn proxied(self) -> Option<ProxyProtocol> {
        match self {
            Tcp | Udp => None,
            Tls => Some(ProxyProtocol::Tls),
            Http => Some(ProxyProtocol::Http),
            Https => Some(ProxyProtocol::Https),
        }
    }

    /// What the proxy speaks to such a group's targets.
    pub(super) fn to_targets(self) -> TargetProtocol {
        match self {
            Tcp | Udp => TargetProtocol::Tcp,
            Tls => TargetProtocol::Tls,
            Http => TargetProtocol::Http,
            Https => TargetProtocol::Https,
        }
    }

    pub(super) fn is_http(self) -> bool {
        matches!(self, Http | Https)
    }

    fn name(self) -> &'static str {
        match self {
            Tcp => "tcp",
            Udp => "udp",
            Tls => "tls",
            Http => "http",
            Https => "https",
        }
    }
}

impl From<Protocol> for AnyProtocol {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Tcp,
            Protocol::Udp => Udp,
        }
    }
}

impl From<ProxyProtocol> for AnyProtocol {
    fn from(protocol: ProxyProtocol) -> Self {
        match protocol {
            ProxyProtocol::Http => Http,
            ProxyProtocol::Https => Https,
            ProxyProtocol::Tls => Tls,
        }
    }
}

impl fmt::Display for AnyProtocol {
    /// With its article, as messages have it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let article = if self.is_http() { "an" } else { "a" };
        write!(f, "{article} {}", self.name())
    }
}

/// What a target group's targets speak.
pub(super) fn of_target_group(table: &mut Table<'_>) -> Option<AnyProtocol> {
    let known: Vec<_> = NETWORK.into_iter().chain(APPLICATION).collect();
    let value = table.optional("protocol");
    value.map_or(Some(Tcp), |value| value.choice(&known, &LATER))
}

/// What a listener's clients speak; `kind` is its load balancer's, where it could be read.
pub(super) fn of_listener(
    table: &mut Table<'_>,
    kind: Option<LoadBalancerType>,
) -> Option<AnyProtocol> {
    let value = table.optional("protocol");
    match kind {
        Some(LoadBalancerType::Network) => value.map_or(Some(Tcp), |value| {
            let other = "only application load balancers have such listeners";
            within(value, &NETWORK, &APPLICATION, other, "type = \"application\"")
        }),
        Some(LoadBalancerType::Application) => value.map_or(Some(Http), |value| {
            let other = "only network load balancers have such listeners";
            within(value, &APPLICATION, &NETWORK, other, "type = \"network\"")
        }),
        None => {
            let known: Vec<_> = NETWORK.into_iter().chain(APPLICATION).collect();
            value?.choice(&known, &LATER)
        }
    }
}

/// One of `known`; those of `others` are the other type's.
fn within(
    value: Value<'_>,
    known: &[(&str, AnyProtocol)],
    others: &[(&str, AnyProtocol)],
    reason: &str,
    other_type: &str,
) -> Option<AnyProtocol> {
    if others.iter().any(|(name, _)| value.is(name)) {
        let names: Vec<String> = known.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        let message = format!("`protocol` cannot be {} here: {reason}", value.quote());
        let help =
            format!("write {}, or {other_type} for the load balancer", enumerate(&names, "or"));
        value.error(message, help);
        return None;
    }
    value.choice(known, &LATER)
}
