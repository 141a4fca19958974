//! One snapshot for each kind of bad configuration: the file, and what is said about it.

use super::super::parse;

/// Appends a target group that listeners can use.
macro_rules! with_web_group {
    ($text:expr) => {
        concat!($text, "\n[target_group.web]\nport = 80\ntargets = [\"10.0.2.11\"]\n")
    };
}

/// A load balancer whose only listener is given.
macro_rules! listener {
    ($keys:expr) => {
        with_web_group!(concat!(
            "[load_balancer.web]\naddresses = [\"192.0.2.1\"]\n[[load_balancer.web.listener]]\n",
            $keys
        ))
    };
}

/// A load balancer with a good listener and the given keys.
macro_rules! load_balancer {
    ($keys:expr) => {
        with_web_group!(concat!(
            "[load_balancer.web]\n",
            $keys,
            "\n[[load_balancer.web.listener]]\nport = 80\ntarget_group = \"web\""
        ))
    };
}

/// A target group with the given keys beside its port.
macro_rules! target_group {
    ($keys:expr) => {
        concat!("[target_group.web]\nport = 80\n", $keys)
    };
}

/// A target group that rewrites both ends, with the given keys.
macro_rules! snat {
    ($keys:expr) => {
        target_group!(concat!("forwarding = \"snat\"\n", $keys))
    };
}

/// A health check with the given keys.
macro_rules! health_check {
    ($keys:expr) => {
        target_group!(concat!("[target_group.web.health_check]\n", $keys))
    };
}

/// A security group with one rule of the given keys.
macro_rules! rule {
    ($keys:expr) => {
        concat!("[security_group.web]\ningress = [{ ", $keys, " }]")
    };
}

/// A security group with the given members.
macro_rules! members {
    ($members:expr) => {
        concat!(rule!("protocol = \"all\", sources = [\"::/0\"]"), "\nmembers = ", $members)
    };
}

/// A target group that lets in a load balancer with the given members.
macro_rules! carried {
    ($forwarding:expr, $members:expr) => {
        concat!(
            "[security_group.lb]\nmembers = [",
            $members,
            "]\ningress = [{ protocol = \"all\", sources = [\"::/0\"] }]\n\
             [security_group.target]\n\
             ingress = [{ protocol = \"tcp\", ports = \"80\", sources = [\"sg:lb\"] }]\n\
             [target_group.web]\nport = 80\nsecurity_group = \"target\"\nforwarding = \"",
            $forwarding,
            "\"\ntargets = [\"10.0.2.11\"]\n"
        )
    };
}

/// Files with exactly one error.
const ONE_ERROR: &[(&str, &str)] = &[
    ("toml_missing_value", "[agent]\ninterfaces ="),
    ("toml_unclosed_string", "[agent]\navailability_zone = \"a\n"),
    ("toml_duplicate_key", "[agent]\nxdp_mode = \"auto\"\nxdp_mode = \"native\""),
    ("toml_duplicate_section", "[target_group.web]\nport = 80\n[target_group.web]"),
    ("toml_bare_word", "[agent]\nxdp_mode = native"),
    ("unknown_section", "[target_groups.web]\nport = 80"),
    ("unknown_key_near", "[agent]\ninterface = [\"eth0\"]"),
    ("unknown_key_far", "[agent]\ncolour = \"red\""),
    ("unknown_key_of_rule", rule!("protocol = \"icmp\", sources = [\"::/0\"], cidr = \"::/0\"")),
    ("unknown_key_of_target", target_group!("targets = [{ address = \"10.0.2.1\", wieght = 2 }]")),
    ("unknown_key_of_health_check", health_check!("intervall = \"5s\"")),
    ("unknown_key_of_listener", listener!("prot = 80\nport = 80\ntarget_group = \"web\"")),
    ("section_without_name", "[target_group]\nport = 80"),
    ("section_name", "[target_group.\"web servers\"]\nport = 80"),
    ("section_is_no_table", "agent = \"eth0\""),
    ("column_counts_characters", "[agent]\navailability_zone = \"é\" # ü\n\"ключ\" = 1"),
    (
        "column_after_wide_characters",
        "agent = { availability_zone = \"世界é\", xdp_mode = \"off\" }",
    ),
    ("crlf", "[agent]\r\nxdp_mode = \"fast\"\r\nrole = \"balancer\"\r\n"),
    ("byte_order_mark", "\u{feff}[agent]\nxdp_mode = \"fast\""),
    ("control_characters", "[agent]\n\"\\u001b[31mred\" = 1"),
    ("value_over_lines", target_group!("targets = [\"\"\"10.0.2.1\n10.0.2.2\"\"\"]")),
    // agent
    ("interfaces_no_list", "[agent]\ninterfaces = \"eth0\""),
    ("interfaces_no_name", "[agent]\ninterfaces = [\"a-name-too-long-for-linux\"]"),
    ("interfaces_twice", "[agent]\ninterfaces = [\"eth0\", \"eth0\"]"),
    ("interfaces_integer", "[agent]\ninterfaces = [0]"),
    ("role_unknown", "[agent]\nrole = \"balancr\""),
    ("xdp_mode", "[agent]\nxdp_mode = \"skb\""),
    ("availability_zone_empty", "[agent]\navailability_zone = \"\""),
    ("manage_addresses_string", "[agent]\nmanage_addresses = \"yes\""),
    ("hash_seed_integer", "[agent]\nhash_seed = 0x5eed"),
    ("hash_seed_digits", "[agent]\nhash_seed = \"0x5eedseed\""),
    ("hash_seed_too_long", "[agent]\nhash_seed = \"0x5eed5eed5eed5eed5\""),
    ("maglev_table_size_not_prime", "[agent]\nmaglev_table_size = 16384"),
    ("maglev_table_size_range", "[agent]\nmaglev_table_size = 65537"),
    ("flow_table_size_range", "[agent]\nflow_table_size = 1000"),
    ("flow_table_size_negative", "[agent]\nflow_table_size = -1"),
    ("flow_table_size_huge", "[agent]\nflow_table_size = 99999999999999999999"),
    ("flow_table_size_float", "[agent]\nflow_table_size = 1e6"),
    ("half_open_table_size_range", "[agent]\nhalf_open_table_size = 1000"),
    ("once_seen_table_size_range", "[agent]\nonce_seen_table_size = 16777217"),
    ("api_socket_relative", "[agent]\napi_socket = \"lb.sock\""),
    ("tunnel_sources_string", "[agent]\ntunnel_sources = \"172.16.0.0/16\""),
    ("tunnel_sources_word", "[agent]\ntunnel_sources = [\"random\"]"),
    ("tunnel_sources_twice", "[agent]\ntunnel_sources = [\n\"100::/64\",\n\"fd00::/16\"]"),
    ("tunnel_sources_length", "[agent]\ntunnel_sources = [\"10.0.0.0/7\"]"),
    ("tunnel_sources_length_v6", "[agent]\ntunnel_sources = [\"2001:db8::1:0/112\"]"),
    ("tunnel_sources_zeroes", "[agent]\ntunnel_sources = [\"2001:db8::\"]"),
    ("tunnel_sources_host_bits", "[agent]\ntunnel_sources = [\"172.16.0.1/16\"]"),
    ("tunnel_sources_mapped", "[agent]\ntunnel_sources = [\"::ffff:172.16.0.0/112\"]"),
    ("tunnel_sources_loopback", "[agent]\ntunnel_sources = [\"127.0.0.0/8\"]"),
    ("metrics_listen", "[agent]\nmetrics_listen = \"127.0.0.1:9901\""),
    // security groups
    ("ingress_no_list", "[security_group.web]\ningress = { protocol = \"all\" }"),
    ("ingress_no_rule", "[security_group.web]\ningress = [\"tcp\"]"),
    ("members_no_list", members!("\"10.0.2.1\"")),
    ("member_name", members!("[\"lb1.example.com\"]")),
    ("member_short_mac", members!("[\"02:00:0a:00:02\"]")),
    ("member_group_mac", members!("[\"01:00:5e:00:00:01\"]")),
    ("member_loopback", members!("[\"127.0.0.1\"]")),
    ("member_host_bits", members!("[\"172.16.0.1/16\"]")),
    ("member_everybody", members!("[\"::/0\"]")),
    ("member_twice", members!("[\"10.0.2.1\", \"10.0.2.1/32\"]")),
    ("rule_without_protocol", rule!("ports = \"80\", sources = [\"::/0\"]")),
    ("rule_protocol", rule!("protocol = \"tpc\", ports = \"80\", sources = [\"::/0\"]")),
    ("rule_without_ports", rule!("protocol = \"tcp\", sources = [\"::/0\"]")),
    ("rule_ports_of_icmp", rule!("protocol = \"icmp\", ports = \"8\", sources = [\"::/0\"]")),
    ("rule_ports_integer", rule!("protocol = \"tcp\", ports = 80, sources = [\"::/0\"]")),
    ("rule_ports_reversed", rule!("protocol = \"tcp\", ports = \"90-80\", sources = [\"::/0\"]")),
    ("rule_ports_range", rule!("protocol = \"udp\", ports = \"80-70000\", sources = [\"::/0\"]")),
    ("rule_without_sources", rule!("protocol = \"all\"")),
    ("rule_sources_empty", rule!("protocol = \"all\", sources = []")),
    ("rule_sources_string", rule!("protocol = \"all\", sources = \"0.0.0.0/0\"")),
    ("source_host_bits", rule!("protocol = \"all\", sources = [\"10.1.2.3/8\"]")),
    ("source_host_bits_v6", rule!("protocol = \"all\", sources = [\"2001:db8::1/32\"]")),
    ("source_length", rule!("protocol = \"all\", sources = [\"10.0.0.0/33\"]")),
    ("source_word", rule!("protocol = \"all\", sources = [\"any\"]")),
    ("source_mapped", rule!("protocol = \"all\", sources = [\"::ffff:10.0.0.0/104\"]")),
    ("source_security_group_unknown", rule!("protocol = \"all\", sources = [\"sg:web-lb\"]")),
    (
        "source_security_group_without_members",
        concat!(
            rule!("protocol = \"all\", sources = [\"sg:web-lb\"]"),
            "\n[security_group.web-lb]\ningress = [{ protocol = \"all\", sources = [\"::/0\"] }]"
        ),
    ),
    // target groups
    ("target_group_port_zero", "[target_group.web]\nport = 0"),
    ("target_group_port_range", "[target_group.web]\nport = 70000"),
    ("target_group_port_string", "[target_group.web]\nport = \"80\""),
    ("target_group_protocol_later", target_group!("protocol = \"tcp_udp\"")),
    ("target_group_protocol", target_group!("protocol = \"sctp\"")),
    ("forwarding", target_group!("forwarding = \"dsr-l2\"")),
    ("algorithm_of_requests", target_group!("algorithm = \"round_robin\"")),
    (
        "algorithm_sticky",
        target_group!("algorithm = \"least_connections\"\nstickiness = { type = \"source_ip\" }"),
    ),
    ("algorithm", target_group!("algorithm = \"random\"")),
    ("deregistration_delay_integer", target_group!("deregistration_delay = 300")),
    ("deregistration_delay_unit", target_group!("deregistration_delay = \"300\"")),
    ("deregistration_delay_range", target_group!("deregistration_delay = \"2h\"")),
    ("termination_integer", target_group!("unhealthy_connection_termination = 1")),
    ("stickiness_no_table", target_group!("stickiness = \"source_ip\"")),
    ("stickiness_without_type", target_group!("stickiness = {}")),
    ("stickiness_type", target_group!("stickiness = { type = \"source-ip\" }")),
    ("stickiness_cookie", target_group!("stickiness = { type = \"lb_cookie\" }")),
    (
        "stickiness_duration",
        target_group!("stickiness = { type = \"source_ip\", duration = \"1h\" }"),
    ),
    ("stickiness_unknown_key", target_group!("stickiness = { type = \"source_ip\", ttl = 1 }")),
    ("slow_start_integer", target_group!("slow_start = 30")),
    ("slow_start_too_short", target_group!("slow_start = \"29s\"")),
    ("slow_start_too_long", target_group!("slow_start = \"901s\"")),
    ("flow_tracking", target_group!("flow_tracking = \"never\"")),
    ("target_group_security_group_unknown", target_group!("security_group = \"web-target\"")),
    ("target_group_security_group_list", target_group!("security_group = [\"web-target\"]")),
    ("nat_without_mac", carried!("nat", "\"10.0.2.1\", \"172.16.0.0/16\"")),
    ("snat_without_address", carried!("snat", "\"02:00:0a:00:02:01\"")),
    ("dsr_l2_without_mac", carried!("dsr_l2", "\"10.0.2.1\"")),
    ("dsr_ipip_without_tunnels", carried!("dsr_ipip", "\"02:00:0a:00:02:01\"")),
    (
        "nat_without_mac_behind_a_load_balancer",
        concat!(
            carried!("nat", "\"10.0.2.1\""),
            "[load_balancer.web]\naddresses = [\"192.0.2.1\"]\nsecurity_groups = [\"lb\"]\n\
             listener = [{ port = 80, target_group = \"web\" }]"
        ),
    ),
    ("snat_addresses", target_group!("snat_addresses = [\"10.0.0.7\"]")),
    ("gue_port_range", target_group!("forwarding = \"dsr_gue\"\ngue_port = 0")),
    ("gue_port_string", target_group!("forwarding = \"dsr_gue\"\ngue_port = \"6080\"")),
    ("snat_ports", target_group!("snat_ports = \"20000-30000\"")),
    ("snat_addresses_none", snat!("snat_addresses = []")),
    ("snat_addresses_no_list", snat!("snat_addresses = \"10.0.0.7\"")),
    ("snat_addresses_name", snat!("snat_addresses = [\"balancer\"]")),
    ("snat_addresses_twice", snat!("snat_addresses = [\"10.0.0.7\",\n  \"10.0.0.7\"]")),
    (
        "snat_addresses_many",
        snat!(
            "snat_addresses = [\"10.0.0.1\", \"10.0.0.2\", \"10.0.0.3\", \"10.0.0.4\", \"10.0.0.5\"]"
        ),
    ),
    (
        "snat_address_of_target",
        snat!("targets = [\"10.0.2.11\"]\nsnat_addresses = [\"10.0.2.11\"]"),
    ),
    (
        "snat_address_of_listener",
        snat!(
            "snat_addresses = [\"192.0.2.1\"]\n[load_balancer.web]\naddresses = [\"192.0.2.1\"]\n\
             [[load_balancer.web.listener]]\nport = 10080\ntarget_group = \"web\"\n\
             [target_group.other]"
        ),
    ),
    ("snat_ports_integer", snat!("snat_ports = 20000")),
    ("snat_ports_low", snat!("snat_ports = \"80-20000\"")),
    ("snat_ports_order", snat!("snat_ports = \"30000-20000\"")),
    ("targets_no_list", target_group!("targets = \"10.0.2.11\"")),
    ("target_name", target_group!("targets = [\"web1.example.com\"]")),
    ("target_port_range", target_group!("targets = [\"10.0.2.11:70000\"]")),
    ("target_port_zero", target_group!("targets = [\"10.0.2.11:0\"]")),
    ("target_v6_without_brackets", target_group!("targets = [\"2001:db8::1:8080:x\"]")),
    ("target_scope", target_group!("targets = [\"[2001:db8::1%2]:80\"]")),
    ("target_loopback", target_group!("targets = [\"127.0.0.1:80\"]")),
    ("target_mapped", target_group!("targets = [\"::ffff:10.0.2.11\"]")),
    ("target_integer", target_group!("targets = [8080]")),
    ("target_twice", target_group!("targets = [\"10.0.2.11\",\n  \"10.0.2.11:80\"]")),
    ("target_without_address", target_group!("targets = [{ port = 80 }]")),
    ("target_weight", target_group!("targets = [{ address = \"10.0.2.11\", weight = 1000 }]")),
    ("target_address_with_port", target_group!("targets = [{ address = \"10.0.2.11:80\" }]")),
    // health checks
    ("health_check_no_table", target_group!("health_check = \"tcp\"")),
    ("health_check_protocol", health_check!("protocol = \"grpc\"")),
    ("health_check_path_of_tcp", health_check!("protocol = \"tcp\"\npath = \"/health\"")),
    ("health_check_matcher_of_tcp", health_check!("protocol = \"tcp\"\nmatcher = \"200\"")),
    ("health_check_path", health_check!("protocol = \"http\"\npath = \"health\"")),
    ("health_check_path_space", health_check!("protocol = \"http\"\npath = \"/a b\"")),
    ("health_check_port", health_check!("port = \"8080\"")),
    ("health_check_port_range", health_check!("port = 0")),
    ("health_check_interval_range", health_check!("interval = \"10ms\"\ntimeout = \"100ms\"")),
    ("health_check_interval_integer", health_check!("interval = 10")),
    ("health_check_timeout", health_check!("interval = \"5s\"\ntimeout = \"6s\"")),
    ("health_check_threshold", health_check!("healthy_threshold = 11")),
    ("health_check_threshold_zero", health_check!("unhealthy_threshold = 0")),
    ("health_check_matcher", health_check!("protocol = \"http\"\nmatcher = \"2xx\"")),
    ("health_check_matcher_range", health_check!("protocol = \"http\"\nmatcher = \"200-700\"")),
    ("health_check_matcher_reversed", health_check!("protocol = \"https\"\nmatcher = \"299-200\"")),
    // load balancers
    (
        "application_without_http_group",
        load_balancer!("type = \"application\"\naddresses = [\"192.0.2.1\"]"),
    ),
    ("load_balancer_type", load_balancer!("type = \"gateway\"\naddresses = [\"192.0.2.1\"]")),
    ("load_balancer_scheme", load_balancer!("scheme = \"public\"\naddresses = [\"192.0.2.1\"]")),
    ("cross_zone_string", load_balancer!("addresses = [\"192.0.2.1\"]\ncross_zone = \"no\"")),
    ("cross_zone_without_zone", load_balancer!("addresses = [\"192.0.2.1\"]\ncross_zone = false")),
    ("addresses_missing", load_balancer!("")),
    ("addresses_empty", load_balancer!("addresses = []")),
    ("addresses_twice", load_balancer!("addresses = [\"192.0.2.1\", \"192.0.2.1\"]")),
    (
        "addresses_of_two_load_balancers",
        load_balancer!(
            "addresses = [\"192.0.2.1\"]\n[load_balancer.api]\naddresses = [\"192.0.2.1\"]"
        ),
    ),
    ("address_name", load_balancer!("addresses = [\"www.example.com\"]")),
    ("address_network", load_balancer!("addresses = [\"192.0.2.1/32\"]")),
    ("address_unspecified", load_balancer!("addresses = [\"0.0.0.0\"]")),
    ("address_multicast", load_balancer!("addresses = [\"ff02::1\"]")),
    ("address_broadcast", load_balancer!("addresses = [\"255.255.255.255\"]")),
    ("address_loopback", load_balancer!("addresses = [\"::1\"]")),
    ("address_mapped", load_balancer!("addresses = [\"::ffff:192.0.2.1\"]")),
    ("address_link_local", load_balancer!("addresses = [\"fe80::1\"]")),
    ("security_groups_empty", load_balancer!("addresses = [\"192.0.2.1\"]\nsecurity_groups = []")),
    (
        "security_groups_unknown",
        load_balancer!("addresses = [\"192.0.2.1\"]\nsecurity_groups = [\"web\"]"),
    ),
    (
        "security_groups_twice",
        load_balancer!(
            "addresses = [\"192.0.2.1\"]\nsecurity_groups = [\"a\", \"a\"]\n[security_group.a]"
        ),
    ),
    ("target_is_listener_address", load_balancer!("addresses = [\"10.0.2.11\", \"192.0.2.1\"]")),
    // listeners
    (
        "listener_with_single_brackets",
        "[load_balancer.web]\naddresses = [\"192.0.2.1\"]\n[load_balancer.web.listener]\nport = 80",
    ),
    (
        "listener_protocol_later",
        listener!("protocol = \"tcp_udp\"\nport = 80\ntarget_group = \"web\""),
    ),
    ("listener_protocol", listener!("protocol = \"TCP\"\nport = 80\ntarget_group = \"web\"")),
    (
        "listener_protocol_differs",
        listener!("protocol = \"udp\"\nport = 80\ntarget_group = \"web\""),
    ),
    (
        "listener_idle_timeout_range",
        listener!("target_group = \"web\"\ntcp_idle_timeout = \"59s\""),
    ),
    (
        "listener_idle_timeout_fraction",
        listener!("target_group = \"web\"\ntcp_idle_timeout = \"60500ms\""),
    ),
    (
        "listener_idle_timeout_protocol",
        listener!("target_group = \"web\"\nudp_idle_timeout = \"60s\""),
    ),
    ("listener_port_range", listener!("port = 65536\ntarget_group = \"web\"")),
    ("listener_without_target_group", listener!("port = 80")),
    ("listener_target_group_unknown", listener!("port = 80\ntarget_group = \"wbe\"")),
    ("listener_target_group_list", listener!("port = 80\ntarget_group = [\"web\"]")),
    (
        "listener_target_groups_unknown",
        listener!("port = 80\ntarget_groups = [{ name = \"web\", weight = 90 }, { name = \"b\" }]"),
    ),
    (
        "listener_target_groups_twice",
        listener!("target_groups = [{ name = \"web\", weight = 90 }, { name = \"web\" }]"),
    ),
    (
        "listener_target_groups_without_name",
        listener!("target_groups = [{ name = \"web\" }, { weight = 10 }]"),
    ),
    ("listener_target_groups_strings", listener!("target_groups = [\"web\"]")),
    (
        "listener_target_groups_differ_in_stickiness",
        listener!(
            "target_groups = [{ name = \"web\" }, { name = \"sticky\" }]\n\
             [target_group.sticky]\nstickiness = { type = \"source_ip\" }"
        ),
    ),
    (
        "listener_target_groups_differ_in_protocol",
        listener!(
            "target_groups = [{ name = \"web\" }, { name = \"dns\" }]\n\
             [target_group.dns]\nprotocol = \"udp\""
        ),
    ),
    (
        "listener_target_groups_dsr_l2_port",
        listener!(
            "target_groups = [{ name = \"web\" }, { name = \"direct\" }]\n\
             [target_group.direct]\nport = 8080\nforwarding = \"dsr_l2\"\n\
             targets = [\"10.0.2.21\"]"
        ),
    ),
    ("listener_no_target_groups", listener!("port = 80\ntarget_groups = []")),
    (
        "listener_both_target_groups",
        listener!("port = 80\ntarget_group = \"web\"\ntarget_groups = [{ name = \"web\" }]"),
    ),
    (
        "listener_target_groups_weight",
        listener!("port = 80\ntarget_groups = [{ name = \"web\", weight = 1000 }]"),
    ),
    (
        "listener_target_groups_weights_0",
        listener!("port = 80\ntarget_groups = [{ name = \"web\", weight = 0 }]"),
    ),
    ("listener_certificates", listener!("port = 80\ntarget_group = \"web\"\ncertificates = []")),
    (
        "listener_twice",
        listener!(
            "port = 80\ntarget_group = \"web\"\n[[load_balancer.web.listener]]\nport = 80\n\
             target_group = \"web\""
        ),
    ),
    (
        "dsr_l2_port",
        "[target_group.web]\nport = 8080\nforwarding = \"dsr_l2\"\ntargets = [\"10.0.2.11\"]\n\
         [load_balancer.web]\naddresses = [\"192.0.2.1\"]\n[[load_balancer.web.listener]]\n\
         port = 80\ntarget_group = \"web\"",
    ),
];

pub(super) fn assert_refused(name: &str, text: &str, error_count: usize) {
    let errors = parse("lb.toml", text).expect_err(name);
    assert_eq!(errors.diagnostics().len(), error_count, "{name}:\n{errors}");
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../snapshots/refused");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.set_description(text);
    settings.bind(|| insta::assert_snapshot!(name, errors));
}

#[test]
fn each_error_is_reported_once() {
    for (name, text) in ONE_ERROR {
        assert_refused(name, text, 1);
    }
}

#[test]
fn every_error_is_reported_at_once() {
    let text = r#"[agent]
xdp_mode = "fast"
hash_sed = "0x1"

[security_group.web]
ingress = [{ protocol = "tcp", ports = "80", sources = ["10.0.0.1/8", "sg:x", "oops"] }]

[target_group.web]
protocol = "tcp_udp"
targets = ["10.0.2.11:0", "::1", { weight = 1000 }]

[load_balancer.web]
addresses = ["0.0.0.0"]
[[load_balancer.web.listener]]
port = 80
target_group = "wbe"
"#;
    assert_refused("all_at_once", text, 12);
}
