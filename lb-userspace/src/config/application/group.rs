//! What the proxy does with a target group.

use std::time::Duration;

use super::super::model::{
    Algorithm, CookieStickiness, HttpVersion, ProxySettings, RequestAlgorithm,
};
use super::super::protocol::AnyProtocol;
use super::super::reader::{Table, Value, Wrong, enumerate};
use super::action::STICKY_FOR;

/// Keys of groups whose packets are forwarded as they are.
pub(in super::super) const FORWARDED_KEYS: [&str; 6] = [
    "forwarding",
    "snat_addresses",
    "snat_ports",
    "gue_port",
    "flow_tracking",
    "unhealthy_connection_termination",
];
/// AWS's default of stickiness.lb_cookie.duration_seconds.
const DEFAULT_DURATION: Duration = Duration::from_secs(24 * 3600);

/// What was read, with where the file has what other checks are about.
pub(in super::super) struct Draft<'a> {
    pub(in super::super) settings: ProxySettings,
    pub(in super::super) proxy_protocol: Option<Value<'a>>,
}

/// `stickiness` is the value of that key in a group of HTTP.
pub(in super::super) fn read<'a>(
    table: &mut Table<'a>,
    protocol: Option<AnyProtocol>,
    algorithm: RequestAlgorithm,
    stickiness: Option<Value<'a>>,
) -> Draft<'a> {
    let is = |wanted: fn(AnyProtocol) -> bool| protocol.is_none_or(wanted);
    if !is(AnyProtocol::is_http) {
        let help = "leave it out: it is for target groups of http and https";
        table.meaningless(&["protocol_version"], "in this target group", help);
    }
    if !is(|it| matches!(it, AnyProtocol::Tcp | AnyProtocol::Tls)) {
        let help = "leave it out: it is for the tcp and tls target groups of tls listeners";
        table.meaningless(&["proxy_protocol_v2"], "in this target group", help);
    }
    let versions =
        [("http1", HttpVersion::Http1), ("http2", HttpVersion::Http2), ("grpc", HttpVersion::Grpc)];
    let version = table.optional("protocol_version").and_then(|it| it.choice(&versions, &[]));
    let proxy_protocol = table.optional("proxy_protocol_v2");
    let proxy_protocol_v2 = proxy_protocol.and_then(|it| it.boolean()).unwrap_or_default();
    let settings = ProxySettings {
        protocol: protocol.unwrap_or(AnyProtocol::Tcp).to_targets(),
        version: version.unwrap_or(HttpVersion::Http1),
        algorithm,
        stickiness: stickiness.and_then(cookie_stickiness),
        proxy_protocol_v2,
    };
    Draft { settings, proxy_protocol: proxy_protocol.filter(|_| proxy_protocol_v2) }
}

/// How a flow or a request gets a target, whichever the group's protocol has.
pub(in super::super) fn algorithm<'a>(
    table: &mut Table<'a>,
    protocol: Option<AnyProtocol>,
) -> (Option<(Value<'a>, Algorithm)>, RequestAlgorithm) {
    let default = RequestAlgorithm::RoundRobin;
    if !protocol.is_none_or(AnyProtocol::is_http) {
        let help = "leave it out: it is for the weighted_random of http and https target groups";
        table.meaningless(&["anomaly_mitigation"], "in this target group", help);
    }
    let value = table.optional("algorithm");
    let anomaly = table.optional("anomaly_mitigation");
    let mitigates = anomaly.and_then(|value| value.boolean()).unwrap_or_default();
    let flows = [("maglev", Algorithm::Maglev), ("least_connections", Algorithm::LeastConnections)];
    let requests = [
        ("round_robin", default),
        ("least_outstanding_requests", RequestAlgorithm::LeastOutstandingRequests),
        ("weighted_random", RequestAlgorithm::WeightedRandom { anomaly_mitigation: mitigates }),
    ];
    let mut chosen = (None, default);
    if let (Some(value), Some(protocol)) = (value, protocol) {
        match protocol {
            AnyProtocol::Tcp | AnyProtocol::Udp => {
                let names = requests.map(|(name, _)| name);
                chosen.0 = one_of(value, protocol, &flows, &names).map(|it| (value, it));
            }
            AnyProtocol::Http | AnyProtocol::Https => {
                let names = flows.map(|(name, _)| name);
                chosen.1 = one_of(value, protocol, &requests, &names).unwrap_or(default);
            }
            AnyProtocol::Tls => {
                let [round_robin, others @ ..] = requests;
                let names = flows.map(|(name, _)| name);
                let names = names.into_iter().chain(others.map(|(name, _)| name));
                let names: Vec<_> = names.collect();
                chosen.1 = one_of(value, protocol, &[round_robin], &names).unwrap_or(default);
            }
        }
    }
    let is_random = matches!(chosen.1, RequestAlgorithm::WeightedRandom { .. });
    if let Some(anomaly) = anomaly.filter(|_| mitigates && !is_random && protocol.is_some()) {
        anomaly.error(
            "`anomaly_mitigation` has no meaning without algorithm = \"weighted_random\"",
            "leave it out, or use that algorithm",
        );
    }
    chosen
}

/// One of `known`; `others` are for other protocols.
fn one_of<T: Copy>(
    value: Value<'_>,
    protocol: AnyProtocol,
    known: &[(&str, T)],
    others: &[&str],
) -> Option<T> {
    if others.iter().any(|name| value.is(name)) {
        let names: Vec<String> = known.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        let message =
            format!("`algorithm = {}` has no meaning in {protocol} target group", value.quote());
        value.error(message, format!("write {}, or leave it out", enumerate(&names, "or")));
        return None;
    }
    value.choice(known, &[])
}

const STICKINESS_HELP: &str = "write { type = \"lb_cookie\", duration = \"1d\" } or { type = \
                               \"app_cookie\", cookie_name = \"SESSION\" }, or leave the key out";

#[derive(Clone, Copy)]
enum Cookie {
    Ours,
    Application,
}

fn cookie_stickiness(value: Value<'_>) -> Option<CookieStickiness> {
    let mut table = value.table("stickiness", STICKINESS_HELP)?;
    let kind = table.required("type", STICKINESS_HELP).and_then(cookie);
    let duration = match table.optional("duration") {
        Some(value) => value.whole_seconds(STICKY_FOR),
        None => Some(DEFAULT_DURATION),
    };
    let read = match kind {
        Some(Cookie::Ours) => {
            let help = "leave it out: the cookie is AWSALB";
            table.meaningless(&["cookie_name"], "with type lb_cookie", help);
            duration.map(|duration| CookieStickiness::LbCookie { duration })
        }
        Some(Cookie::Application) => {
            let help = "add cookie_name = \"SESSION\", the application's cookie";
            let name = table.required("cookie_name", help).and_then(cookie_name);
            name.zip(duration)
                .map(|(name, duration)| CookieStickiness::AppCookie { name, duration })
        }
        None => {
            table.optional("cookie_name");
            None
        }
    };
    table.finish();
    read
}

fn cookie(value: Value<'_>) -> Option<Cookie> {
    if value.is("source_ip") {
        let message = "`type = \"source_ip\"` has no meaning in a target group of http or https";
        value.error(message, STICKINESS_HELP);
        return None;
    }
    value.choice(&[("lb_cookie", Cookie::Ours), ("app_cookie", Cookie::Application)], &[])
}

/// A token (RFC 6265, section 4.1.1) that is none of our own cookies.
fn cookie_name(value: Value<'_>) -> Option<String> {
    let help = "write the name of the application's cookie, such as \"SESSION\"";
    value.parsed(help, |name| {
        if name.to_ascii_uppercase().starts_with("AWSALB") {
            let message = format!(
                "`cookie_name` cannot be {}: AWSALB... is the load balancer's own",
                value.quote()
            );
            return Err(Wrong::new(message, help));
        }
        let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        if !name.is_empty() && name.len() <= 256 && name.bytes().all(is_token) {
            Ok(name.to_owned())
        } else {
            Err(Wrong::new(value.refusal(), help))
        }
    })
}
