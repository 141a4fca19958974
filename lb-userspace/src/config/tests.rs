//! What is accepted, what is refused, and in which words.

use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

mod refused;
mod refused_application;

const MANUAL: &str = include_str!("../../../docs/configuration.md");

/// Every key that is accepted, with a value that is not its default where there is another.
const COMPLETE: &str = include_str!("tests/complete.toml");
/// The example of the configuration contract, without what is not supported yet.
const CONTRACT: &str = include_str!("tests/contract.toml");

/// Every key of what the proxy serves.
const APPLICATION: &str = include_str!("tests/application.toml");

/// How the warnings of a usable file read.
fn warnings(text: &str) -> String {
    let parsed = parse("lb.toml", text).unwrap();
    parsed.warnings.iter().map(|warning| format!("{warning}\n\n")).collect()
}

fn target_group(keys: &str) -> TargetGroup {
    let text = format!("[target_group.web]\nport = 8080\n{keys}");
    let config = parse("lb.toml", &text).unwrap_or_else(|errors| panic!("{errors}")).config;
    config.target_groups["web"].clone()
}

#[test]
fn an_empty_file_is_the_default() {
    let parsed = parse("lb.toml", "").unwrap();
    assert_eq!(parsed.config, Config::default());
    assert_eq!(parsed.warnings, []);
    insta::assert_debug_snapshot!("defaults", parsed.config);
}

#[test]
fn an_empty_target_group_has_the_defaults() {
    insta::assert_debug_snapshot!("target_group_defaults", target_group(""));
}

#[test]
fn every_key_is_read() {
    let parsed = parse("lb.toml", COMPLETE).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(parsed.warnings, []);
    insta::assert_debug_snapshot!("complete", parsed.config);
}

#[test]
fn every_key_of_the_proxy_is_read() {
    let parsed = parse("lb.toml", APPLICATION).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(parsed.warnings, []);
    insta::assert_debug_snapshot!("application", parsed.config);
}

#[test]
fn the_contract_s_example_is_accepted() {
    let parsed = parse("lb.toml", CONTRACT).unwrap_or_else(|errors| panic!("{errors}"));
    insta::assert_debug_snapshot!("contract", parsed.config);
    insta::assert_snapshot!("contract_warnings", warnings(CONTRACT));
}

/// The manual's blocks of a kind, which is what stands after the opening fence.
fn manual_blocks(kind: &str) -> Vec<&'static str> {
    let blocks = MANUAL.split("\n```").filter_map(|block| block.split_once('\n'));
    blocks.filter(|(info, _)| *info == kind).map(|(_, block)| block).collect()
}

#[test]
fn the_manual_s_examples_are_accepted() {
    let examples = manual_blocks("toml");
    assert!(examples.len() >= 5);
    for example in examples {
        let parsed = parse("lb.toml", example).unwrap_or_else(|errors| panic!("{errors}"));
        assert_eq!(parsed.warnings, [], "{example}");
    }
}

#[test]
fn the_manual_s_errors_are_the_real_ones() {
    let [wrong] = manual_blocks("toml wrong")[..] else { panic!("one wrong example") };
    let [shown] = manual_blocks("text")[..] else { panic!("one text of errors") };
    assert_eq!(parse("lb.toml", wrong).unwrap_err().to_string(), shown);
}

/// Whatever a section answers to an unknown key, the manual has it.
#[test]
fn the_manual_has_every_key() {
    let every_section = "x = 1\n[agent]\nx = 1\n[security_group.a]\nx = 1\n\
        ingress = [{ x = 1 }]\n[target_group.a]\nx = 1\ntargets = [{ x = 1 }]\n\
        [target_group.a.health_check]\nx = 1\n[load_balancer.a]\nx = 1\nlistener = [{ x = 1 }]\n\
        [dns]\nx = 1\n[target_group.b]\nprotocol = \"http\"\nx = 1\nstickiness = { x = 1 }\n\
        [load_balancer.b]\ntype = \"application\"\naddresses = [{ x = 1 }]\nx = 1\n\
        access_logs = { x = 1 }\n[[load_balancer.b.listener]]\nprotocol = \"https\"\nx = 1\n\
        certificates = [{ x = 1 }]\nredirect = { x = 1 }\nrule = [{ x = 1, \
        http_header = { x = 1 }, query_string = [{ x = 1 }], url_rewrite = { x = 1 }, \
        fixed_response = { x = 1 } }, { forward = [{ x = 1 }] }]";
    let errors = parse("lb.toml", every_section).unwrap_err();
    let unknown: Vec<_> =
        errors.diagnostics().iter().filter(|d| d.message.starts_with("unknown key `x`")).collect();
    assert_eq!(unknown.len(), 24);
    for key in unknown.iter().skip(1).flat_map(|d| d.help.split('`').skip(1).step_by(2)) {
        let documented = MANUAL.contains(&format!("| `{key}` |"))
            || MANUAL.contains(&format!("[target_group.NAME.{key}]"));
        assert!(documented, "{key}");
    }
}

/// What `check` says of an address depends on the machine.
#[test]
fn a_snat_address_that_is_not_the_machine_s_is_warned_of() {
    let text = "[target_group.web]\nforwarding = \"snat\"\nsnat_addresses = [\"203.0.113.9\"]";
    let parsed = parse("lb.toml", text).unwrap();
    assert_eq!(parsed.warnings, []);
    let warnings: Vec<String> = parsed.warnings_here().map(ToString::to_string).collect();
    let [warning] = &warnings[..] else { panic!("{warnings:?}") };
    let expected = "lb.toml:3:19: warning: \"203.0.113.9\" is not an address of this machine";
    assert!(warning.starts_with(expected), "{warning}");
}

#[test]
fn keys_of_features_to_come_are_accepted_at_their_default() {
    let config = parse(
        "lb.toml",
        r#"
        [agent]
        role = "balancer"
        [target_group.web]
        port = 80
        algorithm = "maglev"
        snat_ports = '10000-59999'
        [load_balancer.web]
        type = "network"
        addresses = ["192.0.2.1"]
        [[load_balancer.web.listener]]
        port = 80
        target_group = "web"
        "#,
    );
    config.unwrap_or_else(|errors| panic!("{errors}"));
}

#[test]
fn every_form_of_a_listener_s_groups() {
    let groups = |keys: &str| {
        let text = format!(
            "[target_group.a]\n[target_group.b]\n[load_balancer.web]\n\
             addresses = [\"192.0.2.1\"]\n[[load_balancer.web.listener]]\n{keys}"
        );
        let config = parse("lb.toml", &text).unwrap_or_else(|errors| panic!("{errors}")).config;
        let groups = config.load_balancers["web"].listeners[0].target_groups.clone();
        groups.into_iter().map(|group| (group.name, group.weight)).collect::<Vec<_>>()
    };
    let [a, b] = ["a", "b"].map(ToOwned::to_owned);
    assert_eq!(groups("target_group = \"a\""), [(a.clone(), 1)]);
    assert_eq!(groups("target_groups = [{ name = \"a\" }]"), [(a.clone(), 1)]);
    assert_eq!(
        groups("target_groups = [{ name = \"b\", weight = 999 }, { name = \"a\", weight = 0 }]"),
        [(b, 999), (a, 0)]
    );
}

#[test]
fn slow_start_is_off_or_within_its_bounds() {
    for (written, expected) in [("0s", 0), ("30s", 30), ("15min", 900)] {
        let group = target_group(&format!("slow_start = \"{written}\""));
        assert_eq!(group.slow_start, Duration::from_secs(expected), "{written}");
    }
    assert_eq!(target_group("").slow_start, Duration::ZERO);
}

#[test]
fn every_form_of_a_target() {
    let forms = r#"targets = [
        "10.0.2.11", "10.0.2.12:81", "2001:db8::1", "[2001:db8::1]:82",
        { address = "10.0.2.13", port = 83, weight = 0, availability_zone = "b" },
        { address = "2001:db8::2" },
    ]"#;
    let targets = target_group(forms).targets;
    let plain = |address: &str, port| Target {
        address: address.parse::<IpAddr>().unwrap(),
        port,
        weight: 1,
        availability_zone: None,
    };
    let zone = Some("b".to_owned());
    let drained = Target { weight: 0, availability_zone: zone, ..plain("10.0.2.13", 83) };
    assert_eq!(
        targets,
        [
            plain("10.0.2.11", 8080),
            plain("10.0.2.12", 81),
            plain("2001:db8::1", 8080),
            plain("2001:db8::1", 82),
            drained,
            plain("2001:db8::2", 8080),
        ]
    );
}

#[test]
fn every_form_of_a_duration() {
    for (written, expected) in [
        ("0s", Duration::ZERO),
        ("500ms", Duration::from_millis(500)),
        ("90s", Duration::from_secs(90)),
        ("1m 30s", Duration::from_secs(90)),
        ("5min", Duration::from_secs(300)),
        ("1h", Duration::from_secs(3600)),
    ] {
        let group = target_group(&format!("deregistration_delay = \"{written}\""));
        assert_eq!(group.deregistration_delay, expected, "{written}");
    }
}

#[test]
fn the_bounds_of_a_check_s_times() {
    for (interval, timeout) in [("100ms", "100ms"), ("300s", "120s"), ("1s", "1s")] {
        let text = format!(
            "[target_group.web.health_check]\ninterval = \"{interval}\"\ntimeout = \"{timeout}\""
        );
        let check = target_group(&text).health_check;
        assert!(check.timeout <= check.interval);
    }
}

#[test]
fn sources_without_a_length_are_one_address() {
    let text = r#"
        [security_group.web]
        ingress = [{ protocol = "all", sources = ["192.0.2.7", "2001:db8::7", "0.0.0.0/0"] }]
    "#;
    let rule = &parse("lb.toml", text).unwrap().config.security_groups["web"].ingress[0];
    let sources: Vec<String> = rule.sources.iter().map(ToString::to_string).collect();
    assert_eq!(sources, ["192.0.2.7/32", "2001:db8::7/128", "0.0.0.0/0"]);
    assert_eq!(rule.ports, 0..=u16::MAX);
}

#[test]
fn what_looks_wrong_is_a_warning() {
    insta::assert_snapshot!(
        "warnings",
        warnings(
            r#"[security_group.shut]
[target_group.web]
port = 80
targets = ["10.0.2.11"]
[load_balancer.idle]
addresses = ["192.0.2.9"]
[load_balancer.web]
addresses = ["192.0.2.1", "2001:db8::1"]
listener = [
  { port = 80, target_group = "web" },
  { port = 81, target_group = "web" },
]
[target_group.both]
targets = ["10.0.2.21", "2001:db8::21"]
[load_balancer.canary]
addresses = ["192.0.2.2", "2001:db8::2"]
cross_zone = false
listener = [{ target_groups = [{ name = "both", weight = 90 }, { name = "web", weight = 10 }] }]
[target_group.remote]
targets = [{ address = "10.0.2.31", availability_zone = "b" }]
[load_balancer.zonal]
addresses = ["192.0.2.3"]
cross_zone = false
listener = [{ target_group = "remote" }]
[agent]
availability_zone = "a"
"#
        )
    );
}

#[test]
fn what_looks_wrong_about_tunnels_is_a_warning() {
    insta::assert_snapshot!(
        "tunnel_warnings",
        warnings(
            r#"[target_group.web]
port = 8080
forwarding = "dsr_ipip"
gue_port = 6666
targets = ["10.0.2.11"]
[target_group.checked]
port = 8080
forwarding = "dsr_gue"
targets = ["2001:db8::11"]
[target_group.checked.health_check]
port = 8080
[target_group.none]
forwarding = "dsr_ipip"
[load_balancer.web]
addresses = ["192.0.2.1", "2001:db8::1"]
listener = [
  { port = 80, target_group = "web" },
  { port = 81, target_group = "checked" },
  { port = 82, target_group = "none" },
]
"#
        )
    );
}

#[test]
fn tunnel_sources_that_are_not_given_keep_their_default() {
    let sources = |keys: &str| {
        let text = format!("[agent]\ntunnel_sources = {keys}");
        let parsed = parse("lb.toml", &text).unwrap_or_else(|errors| panic!("{errors}"));
        let TunnelSources { v4, v6 } = parsed.config.agent.tunnel_sources;
        [v4.to_string(), v6.to_string()]
    };
    assert_eq!(sources("[]"), ["172.16.0.0/16", "100::/64"]);
    assert_eq!(sources("[\"192.0.2.7\"]"), ["192.0.2.7/32", "100::/64"]);
    assert_eq!(sources("[\"fd00::/16\"]"), ["172.16.0.0/16", "fd00::/16"]);
}

#[test]
fn the_limits() {
    let listeners = |count: usize| -> String {
        (1..=count).map(|port| format!("{{ port = {port}, target_group = \"web\" }},")).collect()
    };
    let text = |targets: usize, listener_count: usize| {
        let targets: String =
            (0..targets).map(|n| format!("\"10.1.{}.{}\",", n / 250, n % 250 + 1)).collect();
        format!(
            "[target_group.web]\nport = 80\ntargets = [{targets}]\n[load_balancer.web]\n\
             addresses = [\"192.0.2.1\"]\nlistener = [{}]\n",
            listeners(listener_count)
        )
    };
    assert!(parse("lb.toml", &text(MAX_TARGETS, MAX_ENDPOINTS)).is_ok());
    let errors = parse("lb.toml", &text(MAX_TARGETS + 1, MAX_ENDPOINTS + 1)).unwrap_err();
    insta::assert_snapshot!("limits", errors);

    let groups = |count: usize| -> String {
        (1..=count)
            .map(|n| {
                format!(
                    "[target_group.g{n}]\nport = 80\ntargets = [\"10.0.2.1\"]\n\
                     [[load_balancer.web.listener]]\nport = {n}\ntarget_group = \"g{n}\"\n"
                )
            })
            .collect()
    };
    let head = "[load_balancer.web]\naddresses = [\"192.0.2.1\"]\n";
    assert!(parse("lb.toml", &(head.to_owned() + &groups(MAX_FORWARD_ACTIONS))).is_ok());
    let errors =
        parse("lb.toml", &(head.to_owned() + &groups(MAX_FORWARD_ACTIONS + 1))).unwrap_err();
    insta::assert_snapshot!("limit_of_forward_actions", errors);
}

#[test]
fn files_that_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let shown = |name: &str| {
        let error = load(&dir.path().join(name)).unwrap_err();
        error.to_string().replace(&dir.path().display().to_string(), "DIR")
    };
    insta::assert_snapshot!(shown("none.toml"), @"DIR/none.toml: there is no such file; create it, or give the path of another");
    fs::create_dir(dir.path().join("dir")).unwrap();
    insta::assert_snapshot!(shown("dir"), @"DIR/dir: is not a regular file; name the configuration file itself, such as /etc/lb/lb.toml");
    fs::File::create(dir.path().join("large.toml")).unwrap().set_len((64 << 20) + 1).unwrap();
    insta::assert_snapshot!(shown("large.toml"), @"DIR/large.toml: is larger than 64 MiB, which no configuration is; name the configuration file itself, such as /etc/lb/lb.toml");
    mkfifo(&dir.path().join("fifo"), Mode::S_IRWXU).unwrap();
    assert!(shown("fifo").starts_with("DIR/fifo: is not a regular file"));
    fs::write(dir.path().join("latin1.toml"), b"[agent]\navailability_zone = \"\xe9\"\n").unwrap();
    insta::assert_snapshot!(shown("latin1.toml"), @"DIR/latin1.toml:2: is not UTF-8 text, as TOML must be; save it as UTF-8");
    fs::write(dir.path().join("bad.toml"), "x = 1").unwrap();
    assert!(shown("bad.toml").starts_with("DIR/bad.toml:1:1: error: unknown key `x`"));
    let denied =
        LoadError::Unreadable("lb.toml".into(), std::io::ErrorKind::PermissionDenied.into());
    insta::assert_snapshot!(denied, @"lb.toml: permission denied; run as root (sudo), or let this user read it");
}

#[test]
fn a_good_file_is_loaded() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), COMPLETE).unwrap();
    let parsed = load(file.path()).unwrap();
    assert_eq!(parsed.config, parse("lb.toml", COMPLETE).unwrap().config);
    assert_eq!(parsed.warnings, []);
}

#[test]
fn thousands_of_errors_in_one_line() {
    const COUNT: usize = 5_000;
    let text = format!("[target_group.web]\nport = 80\ntargets = [{}]", "\"é\", ".repeat(COUNT));
    let errors = parse("lb.toml", &text).unwrap_err();
    assert_eq!(errors.diagnostics().len(), COUNT);
    let last = &errors.diagnostics()[COUNT - 1];
    assert_eq!((last.line, last.column), (3, 12 + 5 * (COUNT - 1)));
    assert!(errors.to_string().len() < COUNT * 1000);
}

#[test]
fn deep_nesting_is_refused_not_followed() {
    let deep = format!("x = {}", "[".repeat(100_000));
    assert!(parse("lb.toml", &deep).is_err());
}

/// One edit of a text, at places relative to its length.
#[derive(Debug, Clone)]
enum Edit {
    Delete(Index, Index),
    Copy(Index, Index, Index),
    Insert(Index, String),
}

fn edit() -> impl Strategy<Value = Edit> {
    let at = any::<Index>;
    let token = prop_oneof![
        "[\"'\\[\\]{}=.,#\n\r\t\u{feff}é:/0-9-]{1,3}",
        "\\PC{0,4}",
        any::<char>().prop_map(String::from),
        any::<i64>().prop_map(|n| n.to_string()),
    ];
    prop_oneof![
        (at(), at()).prop_map(|(a, b)| Edit::Delete(a, b)),
        (at(), at(), at()).prop_map(|(a, b, c)| Edit::Copy(a, b, c)),
        (at(), token).prop_map(|(a, token)| Edit::Insert(a, token)),
    ]
}

fn apply(text: &mut Vec<char>, edit: &Edit) {
    const MAX_LENGTH: usize = 30;
    let range = |a: &Index, b: &Index| {
        let start = a.index(text.len() + 1);
        start..(start + b.index(MAX_LENGTH)).min(text.len())
    };
    match edit {
        Edit::Delete(a, b) => {
            let range = range(a, b);
            text.drain(range);
        }
        Edit::Copy(a, b, to) => {
            let copy = text[range(a, b)].to_vec();
            let to = to.index(text.len() + 1);
            text.splice(to..to, copy);
        }
        Edit::Insert(at, token) => {
            let at = at.index(text.len() + 1);
            text.splice(at..at, token.chars());
        }
    }
}

/// Whatever the text: a configuration, or errors that can be shown and point into it.
fn check_total(text: &str) {
    let found = match parse("lb.toml", text) {
        Ok(parsed) => parsed.warnings,
        Err(errors) => {
            assert!(!errors.diagnostics().is_empty());
            errors.diagnostics().to_vec()
        }
    };
    for diagnostic in found {
        assert!((1..=text.split('\n').count()).contains(&diagnostic.line));
        assert!(!diagnostic.to_string().contains(|c: char| c.is_control() && c != '\n'));
    }
}

proptest! {
    #[test]
    fn mutated_files_never_panic(
        edits in prop::collection::vec(edit(), 1..6),
        file in prop::sample::select(vec![COMPLETE, CONTRACT, APPLICATION]),
    ) {
        let mut text: Vec<char> = file.chars().collect();
        for edit in &edits {
            apply(&mut text, edit);
        }
        check_total(&String::from_iter(text));
    }

    #[test]
    fn arbitrary_text_never_panics(text in any::<String>()) {
        check_total(&text);
    }
}
