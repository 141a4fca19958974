//! What the load balancer says of its clients: metrics and access logs.

use std::{collections::BTreeMap, fs, path::Path};

use lb_tests::{
    servers::HttpServer,
    site::PATIENCE,
    topology::{Topology, client_host, target_host},
    wait_until,
};
use nix::sys::signal::Signal;

use crate::world::{PORT, World, application, group, web_servers};

/// A listener of each kind of answer.
fn config(certificate: &str, lines: &str) -> String {
    let rule = |priority, path, action: &str| {
        format!(
            "[[load_balancer.site.listener.rule]]\npriority = {priority}\n\
             path_pattern = [\"{path}\"]\n{action}\n"
        )
    };
    let rules = rule(10, "/fixed", "fixed_response = { status = 403, body = \"no\" }")
        + &rule(20, "/old/*", "redirect = { path = \"/new/#{path}\", status = 302 }")
        + &rule(30, "/closed", "target_group = \"closed\"")
        + &rule(40, "/empty", "target_group = \"empty\"")
        + &rule(
            50,
            "/moved/*",
            "target_group = \"web\"\n\
                 url_rewrite = { regex = \"^/moved\", replace = \"\" }",
        );
    let listeners = format!(
        "[[load_balancer.site.listener]]\nprotocol = \"http\"\ntarget_group = \"web\"\n{rules}\
         [[load_balancer.site.listener]]\nprotocol = \"https\"\ntarget_group = \"web\"\n\
         certificates = [{certificate}]\n"
    );
    let http = "protocol = \"http\"";
    // Nobody listens on port 1; health is not asked there.
    group("web", PORT, &[0], http, "")
        + &group("closed", 1, &[1], http, &format!(", port = {PORT}"))
        + &group("empty", PORT, &[], http, "")
        + &application(lines, &listeners)
}

#[test]
fn metrics_have_cloudwatch_s_names_and_count_each_thing_once() {
    let world =
        World::start(web_servers, |authority| config(&authority.issue("*.elb.internal"), ""));
    for server in &world.servers {
        // Its own page says so; the check asks for another one.
        server.set_healthy(false);
    }
    let ask = |times: usize, status: u16, scheme: &str, path: &str| {
        for _ in 0..times {
            let url = format!("{scheme}://{}{path}", world.name);
            let format = ["--output", "/dev/null", "--write-out", "%{http_code}"];
            assert_eq!(world.curl(&[&format[..], &[&url]].concat()), status.to_string());
        }
    };
    ask(5, 200, "http", "/");
    ask(2, 200, "https", "/");
    ask(3, 503, "http", "/health");
    ask(4, 403, "http", "/fixed");
    ask(2, 302, "http", "/old/a");
    ask(3, 502, "http", "/closed");
    ask(2, 503, "http", "/empty");
    let trace = format!("http://{}/", world.name);
    assert!(world.curl(&["--request", "TRACE", &trace]).contains("405"));
    // This certificate is not for that name: curl ends the handshake.
    let refused = ["--resolve", "other.test:443:10.0.1.100", "https://other.test/"];
    let (code, _) = world.try_curl(&[
        "--ciphers",
        "AES128-SHA",
        "--tls-max",
        "1.2",
        refused[0],
        refused[1],
        refused[2],
    ]);
    assert_eq!(code, 35, "no cipher suite in common");

    let expected = BTreeMap::from([
        ("RejectedConnectionCount", 0),
        ("ClientTLSNegotiationErrorCount", 1),
        // Those for which a target was chosen: pages, failures of the target, refused connections.
        ("RequestCount", 13),
        ("GrpcRequestCount", 0),
        ("HTTP_Redirect_Count", 2),
        ("HTTP_Fixed_Response_Count", 4),
        ("HTTPCode_ELB_3XX_Count", 2),
        ("HTTPCode_ELB_4XX_Count", 5),
        ("HTTPCode_ELB_5XX_Count", 5),
        ("HTTPCode_ELB_500_Count", 0),
        ("HTTPCode_ELB_502_Count", 3),
        ("HTTPCode_ELB_503_Count", 2),
        ("HTTPCode_ELB_504_Count", 0),
        ("HTTPCode_Target_2XX_Count", 7),
        ("HTTPCode_Target_3XX_Count", 0),
        ("HTTPCode_Target_4XX_Count", 0),
        ("HTTPCode_Target_5XX_Count", 3),
        ("TargetConnectionErrorCount", 3),
        ("TargetTLSNegotiationErrorCount", 0),
    ]);
    let counted = || -> BTreeMap<&str, u64> {
        expected.keys().map(|&name| (name, world.metric(name))).collect()
    };
    // A client sees its answer before it is counted.
    let _ = wait_until("all of it", PATIENCE, || counted() == expected);
    assert_eq!(counted(), expected);
    // Those of 23 clients, and those to the target, which are kept, in each thread its own.
    let opened = world.metric("NewConnectionCount");
    assert!((24..=33).contains(&opened), "{opened}");
    let kept = || (1..=opened - 23).contains(&world.metric("ActiveConnectionCount"));
    wait_until("the end of the clients' connections", PATIENCE, kept).unwrap();
    let times = world.balancer()["metrics"]["TargetResponseTime"].clone();
    let buckets = times["buckets"].as_array().unwrap();
    assert_eq!(buckets.iter().map(|it| it.as_u64().unwrap()).sum::<u64>(), 10, "{times}");
    // The pages alone are that long.
    assert!(world.metric("ProcessedBytes") > 23 * 50, "{}", world.metric("ProcessedBytes"));

    let targets = world.agent.targets().unwrap();
    let of = |group: &str, name: &str| -> u64 {
        let targets = targets.as_array().unwrap().iter();
        let of_group = targets.filter(|target| target["target_group"] == group);
        of_group.map(|target| target["metrics"][name].as_u64().unwrap_or(0)).sum()
    };
    assert_eq!(of("web", "RequestCount"), 10);
    assert_eq!(of("web", "HTTPCode_Target_2XX_Count"), 7);
    assert_eq!(of("closed", "TargetConnectionErrorCount"), 3);
}

/// The fields of a line: words, and what stands between quotes.
fn fields(line: &str) -> Vec<String> {
    let mut is_quoted = false;
    let mut fields = vec![String::new()];
    for character in line.chars() {
        match character {
            '"' => is_quoted = !is_quoted,
            ' ' if !is_quoted => fields.push(String::new()),
            other => fields.last_mut().unwrap().push(other),
        }
    }
    fields
}

/// As AWS's documentation lists them ("Access log entries").
const NAMES: [&str; 33] = [
    "type",
    "time",
    "elb",
    "client:port",
    "target:port",
    "request_processing_time",
    "target_processing_time",
    "response_processing_time",
    "elb_status_code",
    "target_status_code",
    "received_bytes",
    "sent_bytes",
    "request",
    "user_agent",
    "ssl_cipher",
    "ssl_protocol",
    "target_group_arn",
    "trace_id",
    "domain_name",
    "chosen_cert_arn",
    "matched_rule_priority",
    "request_creation_time",
    "actions_executed",
    "redirect_url",
    "error_reason",
    "target:port_list",
    "target_status_code_list",
    "classification",
    "classification_reason",
    "conn_trace_id",
    "transformed_host",
    "transformed_uri",
    "request_transform_status",
];

pub type Line = BTreeMap<&'static str, String>;

/// The lines of a log, once there are so many.
pub fn lines(log: &Path, count: usize) -> Vec<Line> {
    let read = || fs::read_to_string(log).unwrap_or_default();
    wait_until("the log", PATIENCE, || read().lines().count() >= count)
        .unwrap_or_else(|error| panic!("{error}: {}", read()));
    let parse = |line: &str| {
        let fields = fields(line);
        assert_eq!(fields.len(), NAMES.len(), "{line}");
        NAMES.into_iter().zip(fields).collect()
    };
    let lines: Vec<Line> = read().lines().map(parse).collect();
    assert_eq!(lines.len(), count, "{lines:#?}");
    lines
}

pub fn says(line: &Line, expected: &[(&str, &str)]) {
    for (name, value) in expected {
        assert_eq!(line[name], *value, "{name}: {line:#?}");
    }
}

fn is_seconds(line: &Line, name: &str) -> bool {
    line[name].parse::<f64>().is_ok_and(|seconds| (0.0..60.0).contains(&seconds))
}

#[test]
fn access_logs_have_aws_s_fields_and_are_opened_again() {
    let world: World<Vec<HttpServer>> = World::start(
        |topology: &Topology| web_servers(topology),
        |authority| {
            let log = authority.folder().join("site.log");
            let lines = format!("access_logs = {{ path = \"{}\" }}", log.display());
            config(&authority.issue("*.elb.internal"), &lines)
        },
    );
    let log = world.authority.folder().join("site.log");
    let name = &world.name;
    // curl's own measure of what it sent and got, as far as it is HTTP/1.1.
    let format = "%{size_request} %{size_header} %{size_download}";
    let options = ["-4", "--user-agent", "a \"b\"", "--output", "/dev/null", "--write-out", format];
    let curl = |option: &str, url: &str| -> (u64, u64) {
        let sizes = world.curl(&[&options[..], &[option, url]].concat());
        let mut sizes = sizes.split(' ').map(|size| size.parse::<u64>().unwrap());
        let mut next = || sizes.next().unwrap();
        (next(), next() + next())
    };
    let rewritten = curl("--http1.1", &format!("http://{name}/moved/a?b=c"));
    curl("--http2", &format!("https://{name}/"));
    let secure = curl("--http1.1", &format!("https://{name}/"));
    curl("--http1.1", &format!("http://{name}/old/a"));
    curl("--http1.1", &format!("http://{name}/fixed"));
    curl("--http1.1", &format!("http://{name}/empty"));
    let lines_now = lines(&log, 6);
    let client = client_host().v4.to_string();
    let target =
        [target_host(0).v4_port(PORT), target_host(0).v6_port(PORT)].map(|it| it.to_string());
    for line in &lines_now {
        says(line, &[("elb", "site"), ("user_agent", "a \\x22b\\x22"), ("classification", "-")]);
        assert_eq!(line["client:port"].split_once(':').unwrap().0, client);
        assert!(line["conn_trace_id"].starts_with("TID_"), "{line:#?}");
        assert!(line["time"].ends_with('Z') && line["request_creation_time"].ends_with('Z'));
    }
    for line in &lines_now[..3] {
        assert!(target.contains(&line["target:port"]), "{line:#?}");
        assert_eq!(line["target:port"], line["target:port_list"]);
        let common = [("elb_status_code", "200"), ("target_status_code", "200")];
        says(line, &common);
        says(line, &[("target_status_code_list", "200"), ("target_group_arn", "web")]);
        says(
            line,
            &[("actions_executed", "forward"), ("redirect_url", "-"), ("error_reason", "-")],
        );
        assert!(line["trace_id"].starts_with("Root=1-"), "{line:#?}");
        for time in ["request", "target", "response"] {
            assert!(is_seconds(line, &format!("{time}_processing_time")), "{line:#?}");
        }
    }
    for (line, (received, sent)) in [(&lines_now[0], rewritten), (&lines_now[2], secure)] {
        says(line, &[("received_bytes", &received.to_string())]);
        says(line, &[("sent_bytes", &sent.to_string())]);
    }
    let request = format!("GET http://{name}:80/moved/a?b=c HTTP/1.1");
    says(&lines_now[0], &[("type", "http"), ("request", &request), ("ssl_cipher", "-")]);
    says(&lines_now[0], &[("matched_rule_priority", "50"), ("transformed_uri", "/a?b=c")]);
    says(&lines_now[0], &[("request_transform_status", "TransformSuccess")]);
    for (line, kind, version) in [(&lines_now[1], "h2", "2.0"), (&lines_now[2], "https", "1.1")] {
        let request = format!("GET https://{name}:443/ HTTP/{version}");
        says(line, &[("type", kind), ("request", &request), ("domain_name", name)]);
        says(line, &[("matched_rule_priority", "0"), ("ssl_protocol", "TLSv1.3")]);
        assert!(line["ssl_cipher"].starts_with("TLS_"), "{line:#?}");
    }
    let location = format!("http://{name}:80/new/old/a");
    says(&lines_now[3], &[("actions_executed", "redirect"), ("redirect_url", &location)]);
    says(&lines_now[3], &[("elb_status_code", "302"), ("matched_rule_priority", "20")]);
    says(&lines_now[4], &[("actions_executed", "fixed-response"), ("elb_status_code", "403")]);
    says(&lines_now[5], &[("elb_status_code", "503"), ("target_status_code", "-")]);
    for line in &lines_now[3..] {
        says(line, &[("target:port", "-"), ("target_processing_time", "-1")]);
    }

    // As logrotate does it.
    let old = log.with_extension("log.1");
    fs::rename(&log, &old).unwrap();
    world.agent.signal(Signal::SIGUSR1).unwrap();
    wait_until("the new log", PATIENCE, || log.exists()).unwrap();
    curl("--http1.1", &format!("http://{name}/after"));
    let after = lines(&log, 1);
    says(&after[0], &[("request", &format!("GET http://{name}:80/after HTTP/1.1"))]);
    lines(&old, 6);
}
