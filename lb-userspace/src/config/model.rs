//! What a configuration says, after every check: whoever holds a [`Config`] need not check again.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

mod application;

pub use application::*;

/// A whole configuration file. Names are unique by the maps, every reference resolves.
///
/// The default is that of an empty file, and of none at all: nothing is balanced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// The agent itself.
    pub agent: Agent,
    /// Security groups by name.
    pub security_groups: BTreeMap<String, SecurityGroup>,
    /// Target groups by name.
    pub target_groups: BTreeMap<String, TargetGroup>,
    /// Load balancers by name.
    pub load_balancers: BTreeMap<String, LoadBalancer>,
    /// The `[dns]` table; `None`: no names are answered.
    pub dns: Option<Dns>,
}

/// The `[agent]` table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// NICs to attach to; `--iface` wins over it.
    pub interfaces: Vec<String>,
    /// What this machine is; `--role` wins over it.
    pub role: Role,
    /// How the program is attached.
    pub xdp_mode: XdpMode,
    /// The zone this agent stands in; see [`LoadBalancer::cross_zone`].
    pub availability_zone: Option<String>,
    /// Whether the agent adds the listener addresses to the machine.
    pub manage_addresses: bool,
    /// Key of the flow hash; `None`: a random one for this node.
    pub hash_seed: Option<u64>,
    /// Slots of each ring; a prime.
    pub maglev_table_size: u32,
    /// Capacity of the flow table, in entries.
    pub flow_table_size: u32,
    /// Capacity of the table of half-open flows, in entries.
    pub half_open_table_size: u32,
    /// Capacity of the table of flows seen once, in entries.
    pub once_seen_table_size: u32,
    /// Where the API listens.
    pub api_socket: PathBuf,
    /// Sources of tunnels' outer headers; host bits are zero.
    pub tunnel_sources: TunnelSources,
    /// Key of the stickiness cookies; `None`: a random one for this node.
    pub cookie_key: Option<CookieKey>,
}

/// The networks that sources of outer headers are taken from, by the target's family. The last
/// bits are the flow's, so that receivers spread their load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelSources {
    /// Of tunnels to IPv4 addresses, /8 to /32.
    pub v4: Ipv4Net,
    /// Of tunnels to IPv6 addresses, /16 to /96; or an address whose last 32 bits are not all 0.
    pub v6: Ipv6Net,
}

/// What a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// It balances.
    #[default]
    Balancer,
    /// It is a target: it unwraps tunnels and enforces its security group.
    Target,
}

impl fmt::Display for Role {
    /// As the configuration file writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Balancer => "balancer",
            Self::Target => "target",
        })
    }
}

/// How an XDP program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XdpMode {
    /// In the driver, else generic with a warning.
    Auto,
    /// In the driver or not at all.
    Native,
    /// In the network stack (`xdpgeneric`): works on every NIC, slowly.
    Generic,
}

/// A security group: what it lets in. Everything else is denied where it is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecurityGroup {
    /// Rules; their union is allowed.
    pub ingress: Vec<IngressRule>,
    /// What carries the group: what rules mean that have it as a source.
    pub members: Vec<Member>,
}

/// What packets of a security group's machines are known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Member {
    /// An address: that of packets, and of the tunnel headers around packets.
    Address(IpAddr),
    /// A network that sources of tunnel headers are taken from; host bits are zero.
    Tunnels(IpNet),
    /// The MAC address that frames come from.
    Mac([u8; 6]),
}

/// One ingress rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IngressRule {
    /// What it is about.
    pub protocol: RuleProtocol,
    /// Destination ports; all of them for [`RuleProtocol::Icmp`] and [`RuleProtocol::All`].
    pub ports: RangeInclusive<u16>,
    /// Where packets may come from; host bits are zero.
    pub sources: Vec<IpNet>,
    /// Security groups whose members packets may come from, or through (`sg:NAME`).
    pub groups: Vec<String>,
}

/// The protocol of an ingress rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6.
    Icmp,
    /// Every protocol (`all`), every port.
    All,
}

/// A transport protocol that is balanced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    /// As the configuration file writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// How packets reach a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Forwarding {
    /// Rewrite the destination; replies come back through us.
    Nat,
    /// Rewrite both ends: the target sees an address of ours and answers there.
    Snat,
    /// Rewrite the MAC address only; replies go straight to the client.
    DsrL2,
    /// Put one more IP header in front; replies go straight to the client.
    DsrIpip,
    /// Put an IP and a UDP header in front; replies go straight to the client.
    DsrGue,
}

impl Forwarding {
    /// Whether packets are encapsulated, so that target and client may be of different families.
    pub fn is_tunnel(self) -> bool {
        matches!(self, Self::DsrIpip | Self::DsrGue)
    }

    /// Whether a target that packets reached this way until now takes those of the same connection
    /// when they come the other way: it must see the same ends of it.
    pub fn keeps_connections(self, other: Self) -> bool {
        let is_rewritten = |it| matches!(it, Self::Nat | Self::Snat);
        self == other || !(is_rewritten(self) || is_rewritten(other))
    }

    /// Whether a listener address can use a target's.
    pub fn can_lead(self, listener: IpAddr, target: IpAddr) -> bool {
        self.is_tunnel() || listener.is_ipv4() == target.is_ipv4()
    }
}

/// What the flows have in common that go to one target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stickiness {
    /// Nothing but that each stays where it is.
    None,
    /// The client's address.
    SourceIp,
}

/// What the targets of a group with [`Forwarding::Snat`] see as their clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snat {
    /// Addresses, at most 4 of a family. Of a family that has none here: this machine's own towards
    /// the target.
    pub addresses: Vec<IpAddr>,
    /// Ports, from 1024 on.
    pub ports: RangeInclusive<u16>,
}

/// A target group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetGroup {
    /// What its targets speak.
    pub protocol: Protocol,
    /// Port of targets that name none, 1 to 65535.
    pub port: u16,
    /// How packets reach its targets.
    pub forwarding: Forwarding,
    /// Only for [`Forwarding::Snat`].
    pub snat: Snat,
    /// UDP port that [`Forwarding::DsrGue`] sends to, 1 to 65535.
    pub gue_port: u16,
    /// How long a removed target keeps its established flows, 0 to 3600 s.
    pub deregistration_delay: Duration,
    /// Whether an unhealthy target loses its established flows at once.
    pub unhealthy_connection_termination: bool,
    /// How a new flow gets one of its targets.
    pub algorithm: Algorithm,
    /// Whether every flow is remembered, not only those that a change could break.
    pub track_every_flow: bool,
    /// Name of the security group that its targets carry; `None`: they let everybody in.
    pub security_group: Option<String>,
    /// What the flows have in common that go to one target.
    pub stickiness: Stickiness,
    /// How long the share of a target grows that joins others, 30 to 900 s; zero: it is full at
    /// once.
    pub slow_start: Duration,
    /// Its targets, in the file's order; (address, port) is unique.
    pub targets: Vec<Target>,
    /// How their health is found out.
    pub health_check: HealthCheck,
    /// For connections that the proxy opens to its targets.
    pub proxy: ProxySettings,
}

impl TargetGroup {
    /// Whether its listeners remember every flow, for whatever reason of its own.
    pub fn tracks_every_flow(&self) -> bool {
        self.track_every_flow
            || self.algorithm == Algorithm::LeastConnections
            || self.forwarding == Forwarding::Snat
    }
}

/// How a new flow gets a target of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// The flow's hash alone decides.
    Maglev,
    /// Of two targets that the hash names, the one with fewer connections for its weight.
    LeastConnections,
}

/// A registered target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its address; never an IPv4-mapped one.
    pub address: IpAddr,
    /// Its port, 1 to 65535.
    pub port: u16,
    /// Its share relative to the group's other targets, 0 to 999; 0 takes no new flows. 1 by default.
    pub weight: u16,
    /// The zone it stands in; `None`: in every one.
    pub availability_zone: Option<String>,
}

/// How a target group checks its targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// What is asked.
    pub probe: ProbeKind,
    /// Port asked; `None` is the target's own (`traffic-port`).
    pub port: Option<u16>,
    /// From one check's start to the next one's, 100 ms to 300 s.
    pub interval: Duration,
    /// How long an answer may take, 100 ms to 120 s and at most the interval.
    pub timeout: Duration,
    /// Passes in a row until an unhealthy target is healthy, 1 to 10.
    pub healthy_threshold: u32,
    /// Failures in a row until a healthy target is unhealthy, 1 to 10.
    pub unhealthy_threshold: u32,
}

/// What a health check asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeKind {
    /// A TCP connection.
    Tcp,
    /// A GET request over HTTP.
    Http(HttpProbe),
    /// A GET request over HTTPS; the certificate is not verified, as on AWS.
    Https(HttpProbe),
    /// A unary gRPC call with an empty message.
    Grpc(GrpcProbe),
}

/// The request of an HTTP or HTTPS health check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpProbe {
    /// Path and query, begins with `/`.
    pub path: String,
    /// Status codes that pass, 200 to 599.
    pub matcher: Vec<RangeInclusive<u16>>,
    /// Whether HTTP/2 is spoken, in plain text with prior knowledge.
    pub http2: bool,
}

/// The call of a gRPC health check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrpcProbe {
    /// `/PACKAGE.SERVICE/METHOD`.
    pub path: String,
    /// gRPC status codes that pass, 0 to 99.
    pub matcher: Vec<RangeInclusive<u16>>,
    /// Whether the call goes through TLS; the certificate is not verified, as on AWS.
    pub tls: bool,
}

/// What a load balancer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadBalancerType {
    /// It forwards packets; its `tls` listeners are the proxy's.
    Network,
    /// It forwards requests: every listener is the proxy's.
    Application,
}

/// A load balancer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadBalancer {
    /// What it is.
    pub kind: LoadBalancerType,
    /// Internal or internet-facing, for information.
    pub scheme: Scheme,
    /// Its addresses, at least one, unique in the configuration; never IPv4-mapped.
    pub addresses: Vec<IpAddr>,
    /// The zones of those that have one.
    pub zones: AddressZones,
    /// Names of the attached security groups; `None`: open to all.
    pub security_groups: Option<Vec<String>>,
    /// Whether targets of other zones than the agent's take new flows while one in its zone could.
    pub cross_zone: bool,
    /// Its listeners whose packets are forwarded in the kernel; (protocol, port) is unique.
    pub listeners: Vec<Listener>,
    /// Its listeners whose connections end in the proxy; no port is another TCP listener's.
    pub proxied: Vec<ProxyListener>,
    /// For [`Self::proxied`].
    pub attributes: Attributes,
}

/// Where a load balancer's clients are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// Inside.
    Internal,
    /// On the internet.
    InternetFacing,
}

/// A listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// What it accepts; equal to its target groups'.
    pub protocol: Protocol,
    /// The port, 1 to 65535.
    pub port: u16,
    /// Where it forwards to: at least one, names are unique, not every weight is 0.
    pub target_groups: Vec<WeightedTargetGroup>,
    /// How long a silent flow is remembered: whole seconds, 60 to 6000 for TCP, 10 to 6000 for UDP.
    pub idle_timeout: Duration,
}

/// A target group of a listener.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct WeightedTargetGroup {
    /// Its name.
    pub name: String,
    /// Its share relative to the listener's other groups, 0 to 999; 0 takes no new flows.
    pub weight: u16,
}
