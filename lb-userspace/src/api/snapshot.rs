//! What the agent says about itself: one consistent picture that every reader reads.
//!
//! Keys and their meanings are a contract with whoever parses `--json`: keys may be added, none
//! may change its meaning. Fixed words (protocols, states, reasons) are strings, so that a reader
//! of another version does not fail on a word that it has not met. Counters are totals since the
//! agent started counting; requests and replies are counted apart.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The picture: everything a reader may ask for, taken at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// What `status` prints.
    pub status: Status,
    /// Names of all target groups, also of those without a target.
    pub target_groups: Vec<String>,
    /// What `targets` prints, in the order of the configuration.
    pub targets: Vec<Target>,
}

/// The agent, its interfaces, its load balancers and what it dropped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The agent itself.
    pub agent: Agent,
    /// NICs that the program is attached to.
    pub interfaces: Vec<Interface>,
    /// Load balancers by name.
    pub load_balancers: Vec<LoadBalancer>,
    /// What this machine is a target of; only in the role `target`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own_target: Option<OwnTarget>,
    /// The tables that remember flows; an agent before 0.2 does not say.
    #[serde(default)]
    pub flow_tables: Vec<FlowTable>,
    /// Dropped packets by reason; a reason that never occurred may be 0 or absent.
    pub drops: BTreeMap<String, u64>,
    /// What an operator should know: sentences, the gravest first.
    pub warnings: Vec<String>,
}

/// The agent's process and its configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    /// Its version, as in Cargo.toml.
    pub version: String,
    /// `balancer` or `target`.
    #[serde(default = "balancer")]
    pub role: String,
    /// Its process.
    pub pid: u32,
    /// When it started, in seconds since 1970-01-01 00:00 UTC.
    pub started: u64,
    /// The configuration file it follows; `None`: it runs without one.
    pub configuration: Option<PathBuf>,
    /// Number of the state that the kernel runs now; every change counts one up.
    pub generation: u64,
    /// Why the latest reload was refused; `None`: what the file says is what runs.
    pub reload_error: Option<String>,
}

/// The role of agents that do not say theirs.
fn balancer() -> String {
    crate::config::Role::Balancer.to_string()
}

/// A machine as a target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnTarget {
    /// Its addresses that are targets.
    pub addresses: Vec<IpAddr>,
    /// The target groups that have them.
    pub target_groups: Vec<String>,
    /// The security groups that it carries; none: everybody is let in.
    pub security_groups: Vec<String>,
    /// Packets that came in tunnels.
    pub unwrapped_packets: u64,
    /// Their bytes without the tunnel header, IP header and payload.
    pub unwrapped_bytes: u64,
}

/// A table that remembers flows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowTable {
    /// `flows`, `half-open` or `once-seen`.
    pub name: String,
    /// Entries that it can hold.
    pub size: u32,
    /// Entries that it holds; those that are over stay until they are swept.
    pub entries: u64,
    /// Entries that had to make room for others.
    pub evictions: u64,
}

/// A NIC that the program is attached to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name, as `ip link` has it.
    pub name: String,
    /// Its index in the kernel.
    pub index: u32,
    /// How the program is attached.
    pub mode: AttachMode,
}

/// How an XDP program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// In the driver (`xdp` in `ip link`).
    Native,
    /// In the network stack (`xdpgeneric` in `ip link`).
    Generic,
}

/// A load balancer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadBalancer {
    /// Its name in the configuration.
    pub name: String,
    /// `network` or `application`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What it is called in the zone of `[dns]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns_name: Option<String>,
    /// What the proxy counted of it, by CloudWatch's names; only if it has listeners of the proxy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<serde_json::Value>,
    /// `internal` or `internet-facing`.
    pub scheme: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its listeners.
    pub listeners: Vec<Listener>,
}

/// A listener; its counters are sums over the load balancer's addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// `tcp`, `udp`, `tls`, `http` or `https`.
    pub protocol: String,
    /// The port that clients connect to.
    pub port: u16,
    /// Name of the target group that it forwards to; of several, the first. Empty where the default
    /// action forwards to none.
    pub target_group: String,
    /// All target groups that it forwards to; without those of rules.
    #[serde(default)]
    pub target_groups: Vec<WeightedTargetGroup>,
    /// What it does where no rule decides: `forward`, `redirect` or `fixed-response`; only listeners of
    /// the proxy have more than one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_action: Option<String>,
    /// How many rules it has beside the default action; only listeners of the proxy have them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules: Option<usize>,
    /// Packets from clients.
    pub packets: u64,
    /// Bytes from clients, IP header and payload.
    pub bytes: u64,
    /// Flows that began.
    pub new_flows: u64,
    /// Packets back to clients; 0 where replies do not pass here.
    pub reply_packets: u64,
    /// Bytes back to clients, IP header and payload.
    pub reply_bytes: u64,
}

/// A target group of a listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightedTargetGroup {
    /// Its name.
    pub name: String,
    /// Its share relative to the listener's other groups.
    pub weight: u16,
}

/// A registered target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Name of its target group.
    pub target_group: String,
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// The zone it stands in.
    pub availability_zone: Option<String>,
    /// Its share relative to the group's other targets.
    pub weight: u16,
    /// AWS's state: `initial`, `healthy`, `unhealthy`, `unused`, `draining`, `unhealthy.draining`.
    pub state: String,
    /// AWS's reason of the state, for instance `Target.Timeout`; `None` when healthy.
    pub reason: Option<String>,
    /// The reason as a sentence.
    pub description: Option<String>,
    /// The way there for humans, or why there is none.
    pub next_hop: String,
    /// Live flows, as of a count at most some ten seconds ago. `None` where that is not known: a
    /// listener of its group does not remember every flow (`flow_tracking`).
    #[serde(default)]
    pub flows: Option<u64>,
    /// What the proxy counted of it, by CloudWatch's names; only if requests are forwarded to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<serde_json::Value>,
    /// Packets to it.
    pub packets: u64,
    /// Bytes to it, IP header and payload.
    pub bytes: u64,
    /// Packets from it to clients; 0 where replies do not pass here.
    pub reply_packets: u64,
    /// Bytes from it to clients, IP header and payload.
    pub reply_bytes: u64,
}

#[cfg(test)]
pub(crate) mod fixture {
    use super::*;

    /// A picture with something in every corner.
    pub(crate) fn snapshot() -> Snapshot {
        Snapshot {
            status: Status {
                agent: Agent {
                    version: "0.1.0".into(),
                    role: "balancer".into(),
                    pid: 4242,
                    started: 1_700_000_000,
                    configuration: Some("/etc/lb/lb.toml".into()),
                    generation: 7,
                    reload_error: None,
                },
                interfaces: vec![
                    Interface { name: "eth0".into(), index: 2, mode: AttachMode::Native },
                    Interface { name: "eth1".into(), index: 11, mode: AttachMode::Generic },
                ],
                load_balancers: vec![
                    LoadBalancer {
                        name: "dns".into(),
                        kind: "network".into(),
                        dns_name: None,
                        metrics: None,
                        scheme: "internal".into(),
                        addresses: vec!["10.0.0.53".parse().unwrap()],
                        listeners: vec![Listener {
                            protocol: "udp".into(),
                            port: 53,
                            target_group: "resolvers".into(),
                            target_groups: vec![weighted("resolvers", 1)],
                            default_action: None,
                            rules: None,
                            packets: 0,
                            bytes: 0,
                            new_flows: 0,
                            reply_packets: 0,
                            reply_bytes: 0,
                        }],
                    },
                    LoadBalancer {
                        name: "web".into(),
                        kind: "network".into(),
                        dns_name: None,
                        metrics: None,
                        scheme: "internet-facing".into(),
                        addresses: vec![
                            "10.0.0.100".parse().unwrap(),
                            "2001:db8::100".parse().unwrap(),
                        ],
                        listeners: vec![
                            Listener {
                                protocol: "tcp".into(),
                                port: 80,
                                target_group: "web".into(),
                                target_groups: vec![weighted("web", 90), weighted("canary", 10)],
                                default_action: None,
                                rules: None,
                                packets: 12_345_678,
                                bytes: 1_234_567_890,
                                new_flows: 45_678,
                                reply_packets: 23_456_789,
                                reply_bytes: 34_567_890_123,
                            },
                            Listener {
                                protocol: "tcp".into(),
                                port: 8443,
                                target_group: "web".into(),
                                target_groups: vec![weighted("web", 1)],
                                default_action: None,
                                rules: None,
                                packets: 10,
                                bytes: 740,
                                new_flows: 2,
                                reply_packets: 8,
                                reply_bytes: 1023,
                            },
                        ],
                    },
                    LoadBalancer {
                        name: "site".into(),
                        kind: "application".into(),
                        dns_name: Some("internal-site-0123456789.elb.internal".into()),
                        metrics: Some(serde_json::json!({
                            "HTTP_Redirect_Count": 3,
                            "RequestCount": 1200,
                            "TargetResponseTime": { "buckets": [] },
                            "RejectedConnectionCount": 0,
                        })),
                        scheme: "internal".into(),
                        addresses: vec!["10.0.0.101".parse().unwrap()],
                        listeners: vec![
                            Listener {
                                protocol: "http".into(),
                                port: 80,
                                target_group: String::new(),
                                target_groups: Vec::new(),
                                default_action: Some("redirect".into()),
                                rules: Some(0),
                                packets: 18,
                                bytes: 1200,
                                new_flows: 3,
                                reply_packets: 0,
                                reply_bytes: 0,
                            },
                            Listener {
                                protocol: "https".into(),
                                port: 443,
                                target_group: "pages".into(),
                                target_groups: vec![weighted("pages", 1)],
                                default_action: Some("forward".into()),
                                rules: Some(2),
                                packets: 6000,
                                bytes: 500_000,
                                new_flows: 100,
                                reply_packets: 0,
                                reply_bytes: 0,
                            },
                        ],
                    },
                ],
                own_target: None,
                flow_tables: [("flows", 1_048_576, 4711, 0), ("half-open", 262_144, 262_144, 33)]
                    .map(|(name, size, entries, evictions)| FlowTable {
                        name: name.into(),
                        size,
                        entries,
                        evictions,
                    })
                    .into(),
                drops: BTreeMap::from([
                    ("NoListener".into(), 3),
                    ("SecurityGroupDenied".into(), 1500),
                    ("TtlExceeded".into(), 0),
                    ("Malformed".into(), 3),
                ]),
                warnings: vec![
                    "eth1 has no native XDP: the program runs in generic mode, which is slow"
                        .into(),
                ],
            },
            target_groups: vec!["empty".into(), "resolvers".into(), "web".into()],
            targets: vec![
                target("resolvers", "2001:db8::53", 53),
                Target {
                    availability_zone: Some("a".into()),
                    weight: 50,
                    flows: Some(1234),
                    packets: 12_345_000,
                    bytes: 1_234_567_000,
                    reply_packets: 23_456_000,
                    reply_bytes: 34_567_890_000,
                    ..target("web", "10.0.2.11", 8080)
                },
                Target {
                    state: "unhealthy".into(),
                    reason: Some("Target.Timeout".into()),
                    description: Some("Request timed out".into()),
                    next_hop: "unresolved: 10.0.2.12 does not answer ARP on eth1".into(),
                    ..target("web", "10.0.2.12", 8080)
                },
                Target {
                    state: "initial".into(),
                    reason: Some("Elb.InitialHealthChecking".into()),
                    description: None,
                    ..target("web", "10.0.2.13", 8081)
                },
            ],
        }
    }

    fn weighted(name: &str, weight: u16) -> WeightedTargetGroup {
        WeightedTargetGroup { name: name.into(), weight }
    }

    fn target(group: &str, address: &str, port: u16) -> Target {
        Target {
            target_group: group.into(),
            address: address.parse().unwrap(),
            port,
            availability_zone: None,
            weight: 1,
            state: "healthy".into(),
            reason: None,
            description: None,
            next_hop: "02:00:0a:00:02:0b on eth1".into(),
            flows: None,
            metrics: None,
            packets: 0,
            bytes: 0,
            reply_packets: 0,
            reply_bytes: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_keeps_its_json_shape() {
        insta::assert_snapshot!(serde_json::to_string_pretty(&fixture::snapshot().status).unwrap());
    }

    #[test]
    fn targets_keep_their_json_shape() {
        let targets = &fixture::snapshot().targets[..3];
        insta::assert_snapshot!(serde_json::to_string_pretty(targets).unwrap());
    }

    #[test]
    fn a_reader_survives_keys_of_a_newer_agent() {
        let mut json = serde_json::to_value(fixture::snapshot().status).unwrap();
        json["load_balancers"][0]["tls_handshakes"] = 1.into();
        json["peers"] = serde_json::json!([]);
        let status: Status = serde_json::from_value(json).unwrap();
        assert_eq!(status, fixture::snapshot().status);
    }
}
