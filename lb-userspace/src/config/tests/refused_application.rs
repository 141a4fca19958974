//! One snapshot for each kind of error about what the proxy serves.

use super::refused::assert_refused;
use super::{parse, warnings};
use crate::proxy::rules::Rules;

/// An application load balancer with the given keys, and groups that its listeners can use.
macro_rules! application {
    ($keys:expr, $listener:expr) => {
        concat!(
            "[load_balancer.site]\ntype = \"application\"\naddresses = [\"192.0.2.1\"]\n",
            $keys,
            "\n[[load_balancer.site.listener]]\n",
            $listener,
            "\n[target_group.web]\nprotocol = \"http\"\n[target_group.api]\nprotocol = \"https\"\n"
        )
    };
}

/// An http listener on port 80 with the given keys.
macro_rules! listener {
    ($keys:expr) => {
        application!("", $keys)
    };
}

/// An https listener that forwards, with the given keys.
macro_rules! https {
    ($keys:expr) => {
        application!("", concat!("protocol = \"https\"\ntarget_group = \"web\"\n", $keys))
    };
}

/// A rule with the given keys.
macro_rules! rule {
    ($keys:expr) => {
        application!(
            "",
            concat!("target_group = \"web\"\n[[load_balancer.site.listener.rule]]\n", $keys)
        )
    };
}

/// A rule that forwards, with the given conditions.
macro_rules! condition {
    ($keys:expr) => {
        rule!(concat!("priority = 1\ntarget_group = \"web\"\n", $keys))
    };
}

/// A rule with the given action.
macro_rules! action {
    ($keys:expr) => {
        rule!(concat!("priority = 1\npath_pattern = [\"/a\"]\n", $keys))
    };
}

/// An attribute of an application load balancer.
macro_rules! attribute {
    ($keys:expr) => {
        application!($keys, "target_group = \"web\"")
    };
}

/// A tls listener of a network load balancer, with the given keys.
macro_rules! tls {
    ($keys:expr) => {
        concat!(
            "[load_balancer.relay]\naddresses = [\"192.0.2.1\"]\n\
             [[load_balancer.relay.listener]]\nprotocol = \"tls\"\n\
             certificates = [{ cert = \"/a.pem\", key = \"/a.key\" }]\n",
            $keys
        )
    };
}

/// A target group of http with the given keys.
macro_rules! group {
    ($keys:expr) => {
        concat!("[target_group.web]\nprotocol = \"http\"\n", $keys)
    };
}

const ONE_ERROR: &[(&str, &str)] = &[
    // the agent and names
    ("cookie_key_short", "[agent]\ncookie_key = \"0123\""),
    (
        "cookie_key_digits",
        "[agent]\ncookie_key = \"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdeé\"",
    ),
    ("cookie_key_integer", "[agent]\ncookie_key = 1"),
    ("dns_without_zone", "[dns]\nlisten = \"10.0.0.53:53\""),
    ("dns_without_listen", "[dns]\nzone = \"elb.internal\""),
    ("dns_listen_without_port", "[dns]\nlisten = \"10.0.0.53\"\nzone = \"elb.internal\""),
    ("dns_listen_multicast", "[dns]\nlisten = \"224.0.0.1:53\"\nzone = \"elb.internal\""),
    ("dns_zone_label", "[dns]\nlisten = \"10.0.0.53:53\"\nzone = \"elb..internal\""),
    ("dns_zone_root", "[dns]\nlisten = \"10.0.0.53:53\"\nzone = \".\""),
    ("dns_unknown_key", "[dns]\nlisten = \"10.0.0.53:53\"\nzone = \"elb.internal\"\nttl = 60"),
    (
        "dns_on_a_listener_address",
        concat!(
            "[dns]\nlisten = \"192.0.2.1:53\"\nzone = \"elb.internal\"\n",
            listener!("target_group = \"web\"")
        ),
    ),
    // addresses
    (
        "address_zone_empty",
        "[load_balancer.web]\naddresses = [{ address = \"192.0.2.1\", availability_zone = \"\" }]\n\
         listener = []",
    ),
    ("address_table_without_address", "[load_balancer.web]\naddresses = [{}]\nlistener = []"),
    (
        "address_table_unknown_key",
        "[load_balancer.web]\naddresses = [{ address = \"192.0.2.1\", zone = \"a\" }]\n\
         listener = []",
    ),
    (
        "address_table_twice",
        "[load_balancer.web]\nlistener = []\n\
         addresses = [\"192.0.2.1\", { address = \"192.0.2.1\", availability_zone = \"a\" }]",
    ),
    // attributes
    ("idle_timeout_range", attribute!("idle_timeout = \"4001s\"")),
    ("idle_timeout_fraction", attribute!("idle_timeout = \"1500ms\"")),
    ("client_keep_alive_range", attribute!("client_keep_alive = \"59s\"")),
    ("max_connections_zero", attribute!("max_connections = 0")),
    ("max_request_body_size_zero", attribute!("max_request_body_size = 0")),
    ("max_request_body_size_unit", attribute!("max_request_body_size = \"1M\"")),
    ("max_request_body_size_large", attribute!("max_request_body_size = \"2000GiB\"")),
    ("max_request_body_size_list", attribute!("max_request_body_size = [1]")),
    ("desync_mitigation_mode", attribute!("desync_mitigation_mode = \"strict\"")),
    ("xff_mode", attribute!("xff_header_processing_mode = \"drop\"")),
    ("enable_http2_string", attribute!("enable_http2 = \"yes\"")),
    ("access_logs_string", attribute!("access_logs = \"/var/log/lb.log\"")),
    ("access_logs_relative", attribute!("access_logs = { path = \"lb.log\" }")),
    ("access_logs_without_path", attribute!("access_logs = {}")),
    ("access_logs_directory", attribute!("access_logs = { path = \"/var/log/\" }")),
    ("application_unknown_key", attribute!("idle_timout = \"60s\"")),
    (
        "attribute_of_a_network_load_balancer",
        "[load_balancer.web]\naddresses = [\"192.0.2.1\"]\nidle_timeout = \"60s\"\nlistener = []",
    ),
    (
        "access_logs_without_tls",
        "[load_balancer.web]\naddresses = [\"192.0.2.1\"]\naccess_logs = { path = \"stdout\" }\n\
         listener = [{ target_group = \"web\" }]\n[target_group.web]\ntargets = [\"10.0.2.1\"]",
    ),
    // listeners
    ("application_tcp_listener", listener!("protocol = \"tcp\"\ntarget_group = \"web\"")),
    ("application_listener_protocol", listener!("protocol = \"htpps\"\ntarget_group = \"web\"")),
    (
        "network_http_listener",
        "[load_balancer.web]\naddresses = [\"192.0.2.1\"]\n\
         listener = [{ protocol = \"http\", target_group = \"web\" }]\n\
         [target_group.web]\nprotocol = \"http\"",
    ),
    ("listener_without_action", listener!("port = 80")),
    (
        "listener_two_actions",
        listener!("target_group = \"web\"\nfixed_response = { status = 200 }"),
    ),
    ("listener_group_of_tcp", concat!(listener!("target_group = \"raw\""), "[target_group.raw]")),
    ("application_target_group_unknown", listener!("target_group = \"wbe\"")),
    (
        "rule_target_group_unknown",
        action!("forward = [{ name = \"web\" }, { name = \"ap\", weight = 3 }]"),
    ),
    ("listener_unknown_key", listener!("target_group = \"web\"\nforward = []")),
    (
        "stickiness_of_one_group",
        listener!("target_group = \"web\"\ntarget_group_stickiness = \"1h\""),
    ),
    (
        "target_group_stickiness_range",
        listener!(
            "target_groups = [{ name = \"web\" }, { name = \"api\" }]\ntarget_group_stickiness = \"8days\""
        ),
    ),
    (
        "idle_timeout_of_a_proxied_listener",
        listener!("target_group = \"web\"\ntcp_idle_timeout = \"60s\""),
    ),
    ("certificates_of_http", listener!("target_group = \"web\"\ncertificates = []")),
    ("ssl_policy_of_http", listener!("target_group = \"web\"\nssl_policy = \"x\"")),
    (
        "two_listeners_of_a_port",
        listener!(
            "target_group = \"web\"\n[[load_balancer.site.listener]]\nfixed_response = { status = 200 }"
        ),
    ),
    (
        "tls_and_tcp_on_a_port",
        concat!(
            tls!(
                "target_group = \"raw\"\n[[load_balancer.relay.listener]]\nport = 443\ntarget_group = \"raw\"\n"
            ),
            "[target_group.raw]\nport = 443\ntargets = [\"10.0.2.1\"]"
        ),
    ),
    // TLS
    ("https_without_certificates", https!("")),
    ("https_no_certificates", https!("certificates = []")),
    ("certificate_string", https!("certificates = [\"/etc/lb/site.pem\"]")),
    ("certificate_without_key", https!("certificates = [{ cert = \"/etc/lb/site.pem\" }]")),
    ("certificate_relative", https!("certificates = [{ cert = \"site.pem\", key = \"/a.key\" }]")),
    (
        "certificate_twice",
        https!(
            "certificates = [{ cert = \"/a.pem\", key = \"/a.key\" }, { cert = \"/a.pem\", key = \"/a.key\" }]"
        ),
    ),
    (
        "ssl_policy_unknown",
        https!(
            "certificates = [{ cert = \"/a.pem\", key = \"/a.key\" }]\nssl_policy = \"ELBSecurityPolicy-TLS13-1-2-2021-07\""
        ),
    ),
    (
        "ssl_policy_old",
        https!(
            "certificates = [{ cert = \"/a.pem\", key = \"/a.key\" }]\nssl_policy = \"ELBSecurityPolicy-2016-08\""
        ),
    ),
    (
        "alpn_policy_of_https",
        https!(
            "certificates = [{ cert = \"/a.pem\", key = \"/a.key\" }]\nalpn_policy = \"HTTP2Only\""
        ),
    ),
    (
        "tls_alpn_policy",
        concat!(tls!("alpn_policy = \"h2\"\ntarget_group = \"a\"\n"), "[target_group.a]"),
    ),
    ("tls_redirect", concat!(tls!("target_group = \"a\"\nredirect = {}\n"), "[target_group.a]")),
    ("tls_without_target_group", tls!("")),
    (
        "tls_to_http",
        concat!(tls!("target_group = \"a\"\n"), "[target_group.a]\nprotocol = \"http\""),
    ),
    (
        "tls_to_source_ip_stickiness",
        concat!(
            tls!("target_group = \"a\"\n"),
            "[target_group.a]\nstickiness = { type = \"source_ip\" }"
        ),
    ),
    (
        "proxy_protocol_of_forwarded_packets",
        "[load_balancer.web]\naddresses = [\"192.0.2.1\"]\nlistener = [{ target_group = \"web\" }]\n\
         [target_group.web]\nproxy_protocol_v2 = true\ntargets = [\"10.0.2.1\"]",
    ),
    // rules
    (
        "rule_with_single_brackets",
        listener!("target_group = \"web\"\n[load_balancer.site.listener.rule]\npriority = 1"),
    ),
    ("rule_without_priority", rule!("path_pattern = [\"/a\"]\ntarget_group = \"web\"")),
    (
        "rule_priority_range",
        rule!("priority = 50001\npath_pattern = [\"/a\"]\ntarget_group = \"web\""),
    ),
    (
        "rule_priority_twice",
        condition!(
            "path_pattern = [\"/a\"]\n[[load_balancer.site.listener.rule]]\npriority = 1\npath_pattern = [\"/b\"]\ntarget_group = \"api\""
        ),
    ),
    ("rule_without_condition", condition!("")),
    ("rule_without_action", action!("")),
    (
        "rule_two_actions",
        action!("target_group = \"web\"\nredirect = { path = \"/b\", status = 301 }"),
    ),
    ("rule_unknown_key", condition!("path = [\"/a\"]\npath_pattern = [\"/a\"]")),
    ("rule_forward_weights_0", action!("forward = [{ name = \"web\", weight = 0 }]")),
    (
        "rule_stickiness_of_redirect",
        action!("redirect = { path = \"/b\", status = 301 }\ntarget_group_stickiness = \"1h\""),
    ),
    // conditions
    ("host_header_string", condition!("host_header = \"www.example.com\"")),
    ("host_header_empty", condition!("host_header = []")),
    ("host_header_port", condition!("host_header = [\"www.example.com:443\"]")),
    ("host_header_both", condition!("host_header = [\"a.b\"]\nhost_header_regex = [\"a\"]")),
    (
        "host_header_long",
        condition!(
            "host_header = [\"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"]"
        ),
    ),
    ("regex_wrong", condition!("host_header_regex = [\"(www\"]")),
    ("regex_unicode", condition!("host_header_regex = ['\\p{Greek}']")),
    ("regex_too_big", condition!("path_pattern_regex = [\"(a{1000}){1000}\"]")),
    ("regex_empty", condition!("path_pattern_regex = [\"\"]")),
    ("path_pattern_relative", condition!("path_pattern = [\"api/*\"]")),
    ("path_pattern_fragment", condition!("path_pattern = [\"/a#b\"]")),
    ("http_header_string", condition!("http_header = \"X-Beta\"")),
    ("http_header_host", condition!("http_header = { name = \"Host\", values = [\"a\"] }")),
    ("http_header_name", condition!("http_header = { name = \"X-*\", values = [\"a\"] }")),
    ("http_header_without_values", condition!("http_header = { name = \"X-Beta\" }")),
    ("http_header_without_name", condition!("http_header = { values = [\"a\"] }")),
    ("http_header_control", condition!("http_header = { name = \"X-Beta\", values = [\"a\\n\"] }")),
    ("http_request_method", condition!("http_request_method = [\"get\"]")),
    ("query_string_strings", condition!("query_string = [\"a=b\"]")),
    ("query_string_without_value", condition!("query_string = [{ key = \"a\" }]")),
    ("source_ip_host_bits", condition!("source_ip = [\"10.0.0.1/8\"]")),
    ("source_ip_word", condition!("source_ip = [\"office\"]")),
    // actions
    ("redirect_string", action!("redirect = \"https://www.example.com\"")),
    ("redirect_without_status", action!("redirect = { path = \"/b\" }")),
    ("redirect_status", action!("redirect = { path = \"/b\", status = 307 }")),
    ("redirect_protocol", action!("redirect = { protocol = \"https\", status = 301 }")),
    ("redirect_placeholder", action!("redirect = { path = \"/#{uri}\", status = 301 }")),
    ("redirect_placeholder_open", action!("redirect = { path = \"/#{path\", status = 301 }")),
    ("redirect_path_relative", action!("redirect = { path = \"b\", status = 301 }")),
    ("redirect_path_query", action!("redirect = { path = \"/b?a=1\", status = 301 }")),
    (
        "redirect_query_mark",
        action!("redirect = { path = \"/b\", query = \"?a=1\", status = 301 }"),
    ),
    ("redirect_host", action!("redirect = { host = \"www.example.com/b\", status = 301 }")),
    ("redirect_port", action!("redirect = { port = \"https\", status = 301 }")),
    ("redirect_to_itself", action!("redirect = { protocol = \"HTTP\", port = 80, status = 301 }")),
    ("redirect_to_itself_but_query", action!("redirect = { query = \"a=1\", status = 302 }")),
    ("fixed_response_without_status", action!("fixed_response = { body = \"later\" }")),
    ("fixed_response_status", action!("fixed_response = { status = 301 }")),
    ("fixed_response_status_range", action!("fixed_response = { status = 600 }")),
    (
        "fixed_response_content_type",
        action!("fixed_response = { status = 200, content_type = \"text/xml\" }"),
    ),
    // transforms
    ("rewrite_string", action!("target_group = \"web\"\nurl_rewrite = \"/a\"")),
    ("rewrite_without_replace", action!("target_group = \"web\"\nurl_rewrite = { regex = \"a\" }")),
    (
        "rewrite_regex",
        action!("target_group = \"web\"\nurl_rewrite = { regex = \"[a\", replace = \"b\" }"),
    ),
    (
        "rewrite_group",
        action!("target_group = \"web\"\nurl_rewrite = { regex = \"^/(.*)$\", replace = \"/$2\" }"),
    ),
    (
        "rewrite_no_group",
        action!("target_group = \"web\"\nurl_rewrite = { regex = \"^/a\", replace = \"/$1\" }"),
    ),
    (
        "rewrite_of_redirect",
        action!(
            "redirect = { path = \"/b\", status = 301 }\nurl_rewrite = { regex = \"a\", replace = \"b\" }"
        ),
    ),
    (
        "rewrite_of_listener",
        listener!("target_group = \"web\"\nurl_rewrite = { regex = \"a\", replace = \"b\" }"),
    ),
    // target groups
    ("group_forwarding", group!("forwarding = \"nat\"")),
    ("group_flow_tracking", group!("flow_tracking = \"auto\"")),
    ("group_maglev", group!("algorithm = \"maglev\"")),
    ("group_algorithm", group!("algorithm = \"least_requests\"")),
    (
        "tls_group_algorithm",
        "[target_group.web]\nprotocol = \"tls\"\nalgorithm = \"weighted_random\"",
    ),
    (
        "tls_group_stickiness",
        "[target_group.web]\nprotocol = \"tls\"\nstickiness = { type = \"source_ip\" }",
    ),
    ("anomaly_mitigation_alone", group!("anomaly_mitigation = true")),
    ("anomaly_mitigation_of_tcp", "[target_group.web]\nanomaly_mitigation = false"),
    ("slow_start_of_requests", group!("algorithm = \"weighted_random\"\nslow_start = \"30s\"")),
    ("protocol_version", group!("protocol_version = \"http3\"")),
    ("protocol_version_of_tcp", "[target_group.web]\nprotocol_version = \"http1\""),
    ("proxy_protocol_of_http", group!("proxy_protocol_v2 = true")),
    ("group_stickiness_source_ip", group!("stickiness = { type = \"source_ip\" }")),
    (
        "group_stickiness_duration",
        group!("stickiness = { type = \"lb_cookie\", duration = \"8days\" }"),
    ),
    ("lb_cookie_name", group!("stickiness = { type = \"lb_cookie\", cookie_name = \"S\" }")),
    ("app_cookie_without_name", group!("stickiness = { type = \"app_cookie\" }")),
    ("app_cookie_name", group!("stickiness = { type = \"app_cookie\", cookie_name = \"a b\" }")),
    (
        "app_cookie_reserved",
        group!("stickiness = { type = \"app_cookie\", cookie_name = \"AWSALBAPP\" }"),
    ),
    ("group_tcp_check", group!("[target_group.web.health_check]\nprotocol = \"tcp\"")),
    (
        "grpc_matcher",
        group!("protocol_version = \"grpc\"\n[target_group.web.health_check]\nmatcher = \"200\""),
    ),
    (
        "tcp_group_of_a_tls_listener_without_address",
        concat!(
            "[security_group.lb]\nmembers = [\"02:00:0a:00:02:01\"]\n\
             ingress = [{ protocol = \"all\", sources = [\"::/0\"] }]\n[security_group.target]\n\
             ingress = [{ protocol = \"tcp\", ports = \"80\", sources = [\"sg:lb\"] }]\n\
             [target_group.raw]\nsecurity_group = \"target\"\ntargets = [\"10.0.2.11\"]\n",
            "[load_balancer.relay]\naddresses = [\"192.0.2.1\"]\nsecurity_groups = [\"lb\"]\n\
             [[load_balancer.relay.listener]]\nprotocol = \"tls\"\ntarget_group = \"raw\"\n\
             certificates = [{ cert = \"/a.pem\", key = \"/a.key\" }]"
        ),
    ),
    (
        "proxied_group_without_address",
        concat!(
            "[security_group.lb]\nmembers = [\"02:00:0a:00:02:01\"]\n\
             ingress = [{ protocol = \"all\", sources = [\"::/0\"] }]\n[security_group.target]\n\
             ingress = [{ protocol = \"tcp\", ports = \"80\", sources = [\"sg:lb\"] }]\n",
            group!("security_group = \"target\"\ntargets = [\"10.0.2.11\"]")
        ),
    ),
];

#[test]
fn each_error_of_the_proxy_is_reported_once() {
    for (name, text) in ONE_ERROR {
        assert_refused(name, text, 1);
    }
}

/// A file that `check` takes never fails in the proxy.
#[test]
fn a_regular_expression_that_is_accepted_compiles() {
    let expressions = [
        "^/v[0-9]+/",
        "\\p{Greek}",
        "(?u)\\p{Greek}",
        "[é]",
        "é",
        "(?u:[é])",
        "\\xff",
        "(?-u)\\xff",
        "(a{1000}){1000}",
        "a{5000}",
        "(?i)a{5000}",
        "[ak]{9000}",
        "(?u:[ak]{3000})",
        "\\b",
        "(",
        "(?x) a # comment",
    ];
    let places: [fn(&str) -> String; 5] = [
        |it| format!("host_header_regex = ['{it}']"),
        |it| format!("path_pattern_regex = ['{it}']"),
        |it| format!("http_header = {{ name = \"a\", values_regex = ['{it}'] }}"),
        |it| format!("path_pattern = [\"/\"]\nurl_rewrite = {{ regex = '{it}', replace = \"/\" }}"),
        |it| {
            format!(
                "path_pattern = [\"/\"]\nhost_header_rewrite = {{ regex = '{it}', replace = \"a\" }}"
            )
        },
    ];
    let mut accepted = 0;
    for (place, expression) in places.iter().flat_map(|place| expressions.map(|it| (place, it))) {
        let keys = place(expression);
        let Ok(parsed) = parse("lb.toml", &condition!("KEYS").replace("KEYS", &keys)) else {
            continue;
        };
        accepted += 1;
        for listener in &parsed.config.load_balancers["site"].proxied {
            if let Err(error) = Rules::compile(listener) {
                panic!("{keys}: {error}");
            }
        }
    }
    assert!(accepted >= 5 * 4, "{accepted}");
}

#[test]
fn a_fixed_response_has_a_limit() {
    let text = |length: usize| {
        let action =
            format!("fixed_response = {{ status = 200, body = \"{}\" }}", "é".repeat(length));
        application!("", "BODY").replace("BODY", &action)
    };
    assert_eq!(warnings(&text(512)), "");
    assert_refused("fixed_response_body", &text(513), 1);
}

#[test]
fn what_looks_wrong_about_the_proxy_is_a_warning() {
    let rules: String = (1..=101)
        .map(|n| {
            format!(
                "[[load_balancer.site.listener.rule]]\npriority = {n}\npath_pattern = [\"/{n}\"]\n\
                 target_group = \"web\"\n"
            )
        })
        .collect();
    let listener = "redirect = { protocol = \"HTTPS\", status = 301 }\n\
                    [[load_balancer.site.listener]]\nport = 81\ntarget_group = \"rpc\"\n";
    let text = application!("enable_http2 = false", "LISTENER").replace("LISTENER", listener);
    let text = format!(
        "{text}[target_group.rpc]\nprotocol = \"http\"\nprotocol_version = \"grpc\"\n\
         [[load_balancer.site.listener]]\nport = 82\ntarget_group = \"web\"\n{rules}"
    );
    insta::assert_snapshot!("application_warnings", warnings(&text));
}

/// None of what only others can do is refused by accident.
#[test]
fn what_is_right_is_not_refused() {
    for text in [
        tls!(
            "target_groups = [{ name = \"a\" }]\n[target_group.a]\nproxy_protocol_v2 = true\n[target_group.a.health_check]\nprotocol = \"tcp\""
        ),
        listener!("redirect = { host = \"www.#{host}\", status = 301 }"),
        listener!("redirect = { port = \"8080\", status = 302 }"),
        listener!(
            "target_groups = [{ name = \"web\", weight = 999 }, { name = \"api\", weight = 0 }]"
        ),
        condition!("host_header = [\"localhost\", \"[2001:db8::1]\"]"),
        condition!("path_pattern = ['*.php', '?', '/a b'] # x")
            .replace("'/a b'", "'/100%'")
            .as_str(),
        group!("algorithm = \"weighted_random\"\nanomaly_mitigation = false\nslow_start = \"0s\""),
        "[dns]\nlisten = \"[::]:5353\"\nzone = \"lan\"",
    ] {
        assert_eq!(warnings(text), "", "{text}");
    }
}
