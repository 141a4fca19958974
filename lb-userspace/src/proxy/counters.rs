//! Counters, named after CloudWatch's.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::Serialize;

/// All counters at one moment. They count from the start of the agent, and never go back, except
/// for the gauges (`ActiveConnectionCount`).
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Counters {
    /// By the load balancer's name.
    pub load_balancers: BTreeMap<Arc<str>, LoadBalancerCounters>,
    /// By the target group's name.
    pub target_groups: BTreeMap<Arc<str>, GroupCounters>,
}

/// What is counted for a load balancer.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
#[allow(non_snake_case, reason = "CloudWatch's names, as they are in JSON")]
pub struct LoadBalancerCounters {
    /// Connections of clients and to targets that are open now.
    pub ActiveConnectionCount: u64,
}

/// What is counted for a target group.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct GroupCounters {
    /// By the target.
    pub targets: BTreeMap<SocketAddr, TargetCounters>,
}

/// What is counted for a target.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct TargetCounters {}
