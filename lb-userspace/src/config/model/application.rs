//! What a configuration says of connections that end in the agent's proxy: listeners of application
//! load balancers, and `tls` listeners of network load balancers.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

use super::WeightedTargetGroup;

/// A listener whose connections end here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyListener {
    /// What its clients speak.
    pub protocol: ProxyProtocol,
    /// The port, 1 to 65535.
    pub port: u16,
    /// For [`ProxyProtocol::Https`] and [`ProxyProtocol::Tls`] only.
    pub tls: Option<ListenerTls>,
    /// What becomes of requests that no rule is about. Of [`ProxyProtocol::Tls`] always
    /// [`Action::Forward`].
    pub default_action: Action,
    /// By priority, which is unique; empty for [`ProxyProtocol::Tls`].
    pub rules: Vec<Rule>,
}

impl ProxyListener {
    /// The groups that it forwards to, each as often as it is named.
    pub fn target_groups(&self) -> impl Iterator<Item = &WeightedTargetGroup> {
        let actions = self.rules.iter().map(|rule| &rule.action);
        std::iter::once(&self.default_action).chain(actions).flat_map(|action| match action {
            Action::Forward(forward) => forward.target_groups.as_slice(),
            Action::Redirect(_) | Action::FixedResponse(_) => &[],
        })
    }
}

/// What the clients of a [`ProxyListener`] speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProxyProtocol {
    /// HTTP/1.1, or HTTP/2 with prior knowledge.
    Http,
    /// HTTP/1.1 or HTTP/2 in TLS.
    Https,
    /// TLS, whose content goes to the targets as it is.
    Tls,
}

impl std::fmt::Display for ProxyProtocol {
    /// As the configuration file writes it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Http => "http",
            Self::Https => "https",
            Self::Tls => "tls",
        })
    }
}

/// What a listener shows of itself in TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerTls {
    /// Certificates with keys, at least one; the first is for clients that name no server, or one
    /// that no certificate is for.
    pub certificates: Vec<CertificateFiles>,
    /// Versions and cipher suites.
    pub policy: TlsPolicy,
    /// Protocols in order of preference; only [`ProxyProtocol::Tls`] can have others than HTTP's.
    pub alpn: Vec<String>,
}

/// Where a certificate is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct CertificateFiles {
    /// PEM: the server's certificate, then those between it and the root.
    pub certificate: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
}

/// A security policy, by AWS's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TlsPolicy {
    /// As the file writes it, such as `ELBSecurityPolicy-TLS13-1-2-2021-06`.
    pub name: &'static str,
    /// Whether TLS 1.2 is spoken.
    pub tls12: bool,
    /// Whether TLS 1.3 is spoken.
    pub tls13: bool,
}

/// A rule of a listener. A request that meets every condition gets its action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// 1 to 50000; the lowest decides first.
    pub priority: u16,
    /// At least one; all must hold.
    pub conditions: Vec<Condition>,
    /// Changes of the request before it is forwarded.
    pub transforms: Transforms,
    /// What becomes of it.
    pub action: Action,
}

/// A condition: one of its values must match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// The host, without regard to case and port.
    HostHeader(Vec<Pattern>),
    /// The path, with regard to case, without the query.
    PathPattern(Vec<Pattern>),
    /// A header field of that name (without regard to case); its value without regard to case.
    HttpHeader {
        /// Name of the field, in lower case.
        name: String,
        /// What its value may be.
        values: Vec<Pattern>,
    },
    /// The method, exactly.
    HttpRequestMethod(Vec<String>),
    /// A parameter of the query, without regard to case.
    QueryString(Vec<QueryPattern>),
    /// The address of the connection's other end.
    SourceIp(Vec<IpNet>),
}

/// What a value is compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pattern {
    /// `*` stands for any characters or none, `?` for exactly one, `\` takes the meaning of either.
    Wildcard(String),
    /// A regular expression, known to compile; it must match somewhere in the value.
    Regex(String),
}

/// A pair of a query string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryPattern {
    /// Wildcard pattern of the name; `None`: any.
    pub key: Option<String>,
    /// Wildcard pattern of the value.
    pub value: String,
}

/// Changes of a request before it is forwarded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transforms {
    /// Of path and query.
    pub url_rewrite: Option<Rewrite>,
    /// Of the host.
    pub host_header_rewrite: Option<Rewrite>,
}

/// A replacement by regular expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewrite {
    /// Known to compile.
    pub regex: String,
    /// With `$1` for what the first parentheses matched.
    pub replace: String,
}

/// What becomes of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// To a target of these groups.
    Forward(Forward),
    /// The client is sent elsewhere.
    Redirect(Redirect),
    /// The answer is this.
    FixedResponse(FixedResponse),
}

/// Where requests are forwarded to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// At least one, names are unique, not every weight is 0.
    pub target_groups: Vec<WeightedTargetGroup>,
    /// How long a client stays with the group that its first request got, 1 s to 7 days; `None`:
    /// each request anew.
    pub stickiness: Option<Duration>,
}

/// A redirection. Each part may have `#{protocol}`, `#{host}`, `#{port}`, `#{path}` (without its
/// first slash) and `#{query}` in it, known to be none but these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    /// `HTTP`, `HTTPS` or `#{protocol}`.
    pub protocol: String,
    /// By default `#{host}`.
    pub host: String,
    /// 1 to 65535, by default `#{port}`.
    pub port: String,
    /// With its first slash, by default `/#{path}`.
    pub path: String,
    /// Without its question mark, by default `#{query}`.
    pub query: String,
    /// 301 or 302.
    pub status: u16,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FixedResponse {
    /// 200 to 299 or 400 to 599.
    pub status: u16,
    /// `Content-Type`.
    pub content_type: String,
    /// At most 1024 bytes.
    pub body: String,
}

/// What holds for all listeners of an application load balancer. The defaults are AWS's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// How long a connection in the middle of a request may be silent, 1 to 4000 s.
    pub idle_timeout: Duration,
    /// How long a connection is kept without a request, 60 s to 7 days.
    pub client_keep_alive: Duration,
    /// Connections at a time; `None`: no bound of ours.
    pub max_connections: Option<u32>,
    /// Bytes of a request's body, at most, 1 to 1 TiB; `None`: no bound.
    pub max_request_body_size: Option<u64>,
    /// What becomes of requests that servers may understand in different ways.
    pub desync_mitigation: DesyncMitigation,
    /// Whether header fields with names beyond letters, digits and hyphens are taken out.
    pub drop_invalid_header_fields: bool,
    /// Whether targets see the client's `Host` as it was, with its port.
    pub preserve_host_header: bool,
    /// What becomes of `X-Forwarded-For`.
    pub x_forwarded_for: XForwardedFor,
    /// Whether `X-Forwarded-For` has the client's port, too.
    pub x_forwarded_for_client_port: bool,
    /// Whether targets are told TLS version and cipher suite.
    pub tls_headers: bool,
    /// Whether clients may speak HTTP/2.
    pub http2: bool,
    /// Where each request is noted; `None`: nowhere.
    pub access_log: Option<LogSink>,
}

impl Default for Attributes {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(60),
            client_keep_alive: Duration::from_secs(3600),
            max_connections: None,
            max_request_body_size: None,
            desync_mitigation: DesyncMitigation::Defensive,
            drop_invalid_header_fields: false,
            preserve_host_header: false,
            x_forwarded_for: XForwardedFor::Append,
            x_forwarded_for_client_port: false,
            tls_headers: false,
            http2: true,
            access_log: None,
        }
    }
}

/// AWS's `routing.http.desync_mitigation_mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DesyncMitigation {
    /// Everything that can be forwarded is.
    Monitor,
    /// What is known to be dangerous is refused, ambiguous requests get a connection of their own.
    Defensive,
    /// What the RFC does not allow is refused.
    Strictest,
}

/// AWS's `routing.http.xff_header_processing.mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XForwardedFor {
    /// The client's address goes behind those that are there.
    Append,
    /// As it came.
    Preserve,
    /// Taken out.
    Remove,
}

/// Where a log goes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogSink {
    /// The agent's standard output.
    Stdout,
    /// A file, opened again on SIGUSR1.
    File(PathBuf),
}

/// What the proxy does with a target group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxySettings {
    /// What its targets speak.
    pub protocol: TargetProtocol,
    /// Which HTTP; of no meaning with [`TargetProtocol::Tcp`] and [`TargetProtocol::Tls`].
    pub version: HttpVersion,
    /// How a request gets a target.
    pub algorithm: RequestAlgorithm,
    /// What keeps a client with a target.
    pub stickiness: Option<CookieStickiness>,
    /// Whether connections to targets begin with the client's addresses (PROXY protocol, version 2).
    pub proxy_protocol_v2: bool,
}

impl Default for ProxySettings {
    fn default() -> Self {
        Self {
            protocol: TargetProtocol::Tcp,
            version: HttpVersion::Http1,
            algorithm: RequestAlgorithm::RoundRobin,
            stickiness: None,
            proxy_protocol_v2: false,
        }
    }
}

/// What targets speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TargetProtocol {
    /// Whatever is in the connection: `tcp` and `udp` groups. No group of HTTP's listeners.
    Tcp,
    /// The same in TLS: of `tls` listeners only.
    Tls,
    /// HTTP.
    Http,
    /// HTTP in TLS; as on AWS, the target's certificate is not verified.
    Https,
}

/// Which HTTP targets speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HttpVersion {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// gRPC, in HTTP/2.
    Grpc,
}

/// How a request gets a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestAlgorithm {
    /// In turn, by weight.
    RoundRobin,
    /// The one that has the fewest requests in progress for its weight.
    LeastOutstandingRequests,
    /// At random, by weight.
    WeightedRandom {
        /// Whether targets that fail more than the others get less.
        anomaly_mitigation: bool,
    },
}

/// What keeps a client with a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CookieStickiness {
    /// A cookie of ours, `AWSALB`.
    LbCookie {
        /// 1 s to 7 days.
        duration: Duration,
    },
    /// For as long as the application's own cookie: `AWSALBAPP`.
    AppCookie {
        /// The application's cookie.
        name: String,
        /// 1 s to 7 days.
        duration: Duration,
    },
}

/// The `[dns]` table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dns {
    /// UDP and TCP.
    pub listen: SocketAddr,
    /// What every name ends in, in lower case, without dots at its ends.
    pub zone: String,
}

/// Key of the stickiness cookies; `None`: a random one for this node. Hidden in debug output.
#[derive(Clone, PartialEq, Eq)]
pub struct CookieKey(pub [u8; 32]);

impl std::fmt::Debug for CookieKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CookieKey(..)")
    }
}

/// The zones of a load balancer's addresses, for those that have one.
pub type AddressZones = BTreeMap<std::net::IpAddr, String>;
