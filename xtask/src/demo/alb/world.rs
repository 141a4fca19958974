//! The network of the application load balancer's demo, and its configuration.

use std::path::Path;

use crate::demo::namespace::{Host, Segment};
use crate::demo::server::PORT;

/// What is built.
pub const PICTURE: &str = "\
client     10.0.1.10 ─┐                           eth1 ─ zone-a ─┬─ 10.0.2.11  web-a
                      ├─ clients ─ eth0  balancer                └─ 10.0.2.12  api-a
forbidden  10.0.1.66 ─┘                           eth2 ─ zone-b ─┬─ 10.0.3.11  web-b
                                                                 └─ 10.0.3.12  api-b
Each name is a network namespace, each line a veth pair, each zone a bridge of its own.";

/// The servers: two groups, one server of each in each zone.
pub const TARGETS: [Host; 4] = [
    Host { name: "web-a", segment: Segment::ZoneA, number: "11" },
    Host { name: "api-a", segment: Segment::ZoneA, number: "12" },
    Host { name: "web-b", segment: Segment::ZoneB, number: "11" },
    Host { name: "api-b", segment: Segment::ZoneB, number: "12" },
];
/// The balancer's interfaces.
pub const SEGMENTS: [(Segment, &str); 3] =
    [(Segment::Clients, "eth0"), (Segment::ZoneA, "eth1"), (Segment::ZoneB, "eth2")];
/// The load balancer's address in each zone.
pub const ADDRESSES: [&str; 2] = ["10.0.2.100", "10.0.3.100"];
/// Where names are answered.
pub const NAME_SERVER: &str = "10.0.1.1";

/// The configuration, of the balancer and of the targets.
pub fn text(folder: &Path) -> String {
    let [zone_a, zone_b] = ADDRESSES;
    let folder = folder.display();
    format!(
        r#"[dns]
listen = "{NAME_SERVER}:53"
zone = "elb.internal"

[security_group.site-lb]              # 10.0.1.66 is not among its clients
members = ["10.0.2.1", "10.0.3.1"]
ingress = [{{ protocol = "tcp", ports = "80-443", sources = ["10.0.1.0/26", "10.0.2.0/23"] }}]
[security_group.site-target]          # the load balancer's members and nobody else
ingress = [{{ protocol = "tcp", ports = "{PORT}", sources = ["sg:site-lb"] }}]

[target_group.web]
protocol = "http"
port = {PORT}
security_group = "site-target"
stickiness = {{ type = "lb_cookie", duration = "1h" }}
targets = [
  {{ address = "10.0.2.11", availability_zone = "a" }},
  {{ address = "10.0.3.11", availability_zone = "b" }},
]
health_check = {{ path = "/", interval = "2s", timeout = "2s", healthy_threshold = 2 }}
[target_group.api]
protocol = "http"
port = {PORT}
security_group = "site-target"
targets = [
  {{ address = "10.0.2.12", availability_zone = "a" }},
  {{ address = "10.0.3.12", availability_zone = "b" }},
]
health_check = {{ path = "/", interval = "2s", timeout = "2s", healthy_threshold = 2 }}

[load_balancer.site]
type = "application"
scheme = "internal"
addresses = [
  {{ address = "{zone_a}", availability_zone = "a" }},
  {{ address = "{zone_b}", availability_zone = "b" }},
]
security_groups = ["site-lb"]

[[load_balancer.site.listener]]
protocol = "http"
port = 80
target_group = "web"
[[load_balancer.site.listener.rule]]
priority = 10
path_pattern = ["/api/*"]
target_group = "api"
[[load_balancer.site.listener.rule]]
priority = 20
host_header = ["api.example.com"]
target_group = "api"
[[load_balancer.site.listener.rule]]
priority = 30
path_pattern = ["/old/*"]
redirect = {{ path = "/new/#{{path}}", status = 301 }}
[[load_balancer.site.listener.rule]]
priority = 40
path_pattern = ["/teapot"]
fixed_response = {{ status = 418, content_type = "text/plain", body = "short and stout" }}

[[load_balancer.site.listener]]
protocol = "https"
port = 443
certificates = [{{ cert = "{folder}/site.pem", key = "{folder}/site.key" }}]
target_group = "web"
"#
    )
}
