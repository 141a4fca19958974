//! Health checks: which targets may take traffic, found out by asking them.
//!
//! [`machine`] decides and knows neither clock nor socket; [`probe`] asks one target once;
//! [`Checker`] gives every target its own clock and reports what changed as [`HealthEvent`]s.
//! Nothing here touches the data plane: the owner of the state does, on these events.

mod checker;
pub mod machine;
pub mod probe;
mod status;
mod tls;

use std::net::IpAddr;
use std::sync::Arc;

pub use checker::Checker;
pub use status::{Health, HealthState, Reason};

use crate::config::model::{HealthCheck, Target, TargetGroup};

/// Names one target of one group: a target in two groups is checked for each.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckKey {
    /// Name of the target group.
    pub target_group: Arc<str>,
    /// Address of the target.
    pub address: IpAddr,
    /// Port of the target that takes traffic, which need not be the port that is asked.
    pub port: u16,
}

/// All that a check of one target depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckSpec {
    /// What is asked, how often, and how many answers decide.
    pub check: HealthCheck,
    /// Address asked.
    pub address: IpAddr,
    /// Port asked, 1 to 65535.
    pub port: u16,
    /// Whether connections begin with the PROXY protocol's header.
    pub proxy_protocol: bool,
}

impl CheckSpec {
    /// The check of `target` in `group`.
    pub fn new(group: &TargetGroup, target: &Target) -> Self {
        let check = &group.health_check;
        Self {
            check: check.clone(),
            address: target.address,
            port: check.port.unwrap_or(target.port),
            proxy_protocol: group.proxy.proxy_protocol_v2,
        }
    }
}

/// The health of a target is known now, or known to be another than before.
///
/// The first check of a target is always reported, whatever came out of it; so a target of which
/// no event came has no concluded check yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthEvent {
    /// The target.
    pub key: CheckKey,
    /// Its health from now on.
    pub health: Health,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    #[test]
    fn the_port_asked_is_the_checks_own_or_the_targets() {
        let spec = |check: &str| {
            let text = format!(
                "[target_group.a]\nprotocol = \"tls\"\nproxy_protocol_v2 = true\n\
                 targets = [\"192.0.2.1:8080\"]\n{check}"
            );
            let config = config::parse("lb.toml", &text).unwrap().config;
            let group = &config.target_groups["a"];
            CheckSpec::new(group, &group.targets[0])
        };
        assert_eq!(spec("").port, 8080);
        let spec = spec("[target_group.a.health_check]\nport = 9000\n");
        assert_eq!(spec.port, 9000);
        assert!(spec.proxy_protocol);
    }
}
