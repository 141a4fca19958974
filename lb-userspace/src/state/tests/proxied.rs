//! Target groups of listeners that the proxy serves.

use std::time::Instant;

use lb_common::tables::Endpoint;

use super::super::State;
use crate::config;
use crate::health::HealthState;

const PROXIED: &str = r#"
[load_balancer.site]
type = "application"
addresses = ["192.0.2.1"]
[[load_balancer.site.listener]]
target_group = "web"
[[load_balancer.site.listener.rule]]
priority = 1
path_pattern = ["/api/*"]
target_group = "api"
[target_group.web]
protocol = "http"
targets = ["10.0.2.1:80"]
[target_group.api]
protocol = "http"
targets = ["10.0.2.2:80"]
[target_group.unused]
protocol = "http"
targets = ["10.0.2.3:80"]
"#;

#[test]
fn groups_of_the_proxy_are_checked_and_none_of_the_data_plane_s() {
    let now = Instant::now();
    let mut state = State::new(251);
    let parsed = config::parse("lb.toml", PROXIED).unwrap_or_else(|errors| panic!("{errors}"));
    state.set_config(parsed.config, now);
    let checked: Vec<_> = state.checks().into_keys().map(|key| key.target_group).collect();
    assert_eq!(checked.iter().map(|name| &**name).collect::<Vec<_>>(), ["api", "web"]);
    let states = state.known.iter().map(|key| state.health_of(key).state).collect::<Vec<_>>();
    assert_eq!(states, [HealthState::Initial, HealthState::Unused, HealthState::Initial]);
    let desired = state.desired(now);
    let balanced = |endpoint: &Endpoint| endpoint.kind() == Endpoint::LISTENER;
    assert!(!desired.endpoints.values().any(balanced) && desired.rings.is_empty());
    assert!(!state.counts_flows());
}
