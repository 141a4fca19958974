//! What is said about a target's health, in AWS's words.

use std::fmt;

use serde::{Serialize, Serializer};

/// State of a target, as the network load balancer of AWS names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HealthState {
    /// Its first checks are running; it takes no traffic.
    Initial,
    /// It takes traffic.
    Healthy,
    /// It takes no traffic unless every target of its group is unhealthy.
    Unhealthy,
    /// No listener forwards to its group, so it is not checked.
    Unused,
    /// It was removed and keeps its established flows until the deregistration delay ends.
    Draining,
    /// It became unhealthy and keeps its established flows for now.
    UnhealthyDraining,
}

impl HealthState {
    /// The name in status output and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Initial => "initial",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
            Self::Unused => "unused",
            Self::Draining => "draining",
            Self::UnhealthyDraining => "unhealthy.draining",
        }
    }
}

/// Why a target is in a state other than healthy, as AWS names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// It is being registered; no check has begun.
    RegistrationInProgress,
    /// Its first checks are running.
    InitialHealthChecking,
    /// No answer in time.
    Timeout,
    /// No connection, or no answer that could be understood.
    FailedHealthChecks,
    /// An HTTP status that the matcher does not name.
    ResponseCodeMismatch,
    /// It was removed and drains.
    DeregistrationInProgress,
    /// No listener forwards to its group.
    NotInUse,
}

impl Reason {
    /// The name in status output and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RegistrationInProgress => "Elb.RegistrationInProgress",
            Self::InitialHealthChecking => "Elb.InitialHealthChecking",
            Self::Timeout => "Target.Timeout",
            Self::FailedHealthChecks => "Target.FailedHealthChecks",
            Self::ResponseCodeMismatch => "Target.ResponseCodeMismatch",
            Self::DeregistrationInProgress => "Target.DeregistrationInProgress",
            Self::NotInUse => "Target.NotInUse",
        }
    }
}

impl fmt::Display for HealthState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Serialize for HealthState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// A target's health: the state, and for people and programs why it is not healthy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Health {
    /// The state.
    pub state: HealthState,
    /// Why; `None` if healthy.
    pub reason: Option<Reason>,
    /// What the last failed check saw, in words ("connection refused"), where a check failed.
    pub description: Option<String>,
}

impl Health {
    /// Of a target that no check has concluded about.
    pub fn initial() -> Self {
        Self {
            state: HealthState::Initial,
            reason: Some(Reason::InitialHealthChecking),
            description: None,
        }
    }

    /// Of a target that takes traffic.
    pub fn healthy() -> Self {
        Self { state: HealthState::Healthy, reason: None, description: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_the_names_of_aws() {
        let states = [
            HealthState::Initial,
            HealthState::Healthy,
            HealthState::Unhealthy,
            HealthState::Unused,
            HealthState::Draining,
            HealthState::UnhealthyDraining,
        ];
        assert_eq!(
            serde_json::to_string(&states).unwrap(),
            r#"["initial","healthy","unhealthy","unused","draining","unhealthy.draining"]"#
        );
        assert_eq!(
            serde_json::to_string(&Health::initial()).unwrap(),
            r#"{"state":"initial","reason":"Elb.InitialHealthChecking","description":null}"#
        );
    }
}
