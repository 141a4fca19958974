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

use crate::config::model::{HealthCheck, Target};

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
}

impl CheckSpec {
    /// The check of `target` in a group that checks its targets by `check`.
    pub fn new(check: &HealthCheck, target: &Target) -> Self {
        Self {
            check: check.clone(),
            address: target.address,
            port: check.port.unwrap_or(target.port),
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
    use crate::config::model::ProbeKind;
    use std::time::Duration;

    #[test]
    fn the_port_asked_is_the_checks_own_or_the_targets() {
        let target = Target {
            address: "192.0.2.1".parse().unwrap(),
            port: 8080,
            weight: 1,
            availability_zone: None,
        };
        let mut check = HealthCheck {
            probe: ProbeKind::Tcp,
            port: None,
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(2),
            healthy_threshold: 3,
            unhealthy_threshold: 2,
        };
        assert_eq!(CheckSpec::new(&check, &target).port, 8080);
        check.port = Some(9000);
        assert_eq!(CheckSpec::new(&check, &target).port, 9000);
    }
}
