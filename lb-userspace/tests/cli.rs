//! The built command, as a user without privileges meets it: exit codes, streams, messages.

#![expect(clippy::unwrap_used, reason = "the lint exempts test functions, not their helpers")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use lb_userspace::api::server::{ApiRequest, Server};
use lb_userspace::api::snapshot::{Snapshot, Status};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

/// The command with an environment of its own.
fn lb(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lb-userspace"));
    command.args(arguments).env_remove("LB_API_SOCKET").env_remove("RUST_LOG");
    command
}

fn run(arguments: &[&str]) -> Output {
    lb(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// An API as the agent serves it, with a picture of two targets.
struct Api {
    directory: TempDir,
    _runtime: Runtime,
}

impl Api {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let runtime = Runtime::new().unwrap();
        let server = runtime.block_on(Server::bind(&directory.path().join("lb.sock"))).unwrap();
        let (sender, mut requests) = mpsc::channel(1);
        runtime.spawn(server.serve(sender));
        runtime.spawn(async move {
            while let Some(ApiRequest::Snapshot(reply)) = requests.recv().await {
                let _ = reply.send(snapshot());
            }
        });
        Self { directory, _runtime: runtime }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("lb.sock")
    }
}

fn snapshot() -> Snapshot {
    let status = json!({
        "agent": {
            "version": "0.1.0", "pid": 1, "started": 0,
            "configuration": null, "generation": 1, "reload_error": null,
        },
        "interfaces": [{ "name": "eth0", "index": 2, "mode": "native" }],
        "load_balancers": [],
        "drops": { "NoListener": 3 },
        "warnings": [],
    });
    let target = |group: &str, port: u16| {
        serde_json::from_value(json!({
            "target_group": group, "address": "10.0.2.11", "port": port,
            "availability_zone": null, "weight": 1, "state": "healthy", "reason": null,
            "description": null, "next_hop": "", "packets": 0, "bytes": 0,
            "reply_packets": 0, "reply_bytes": 0,
        }))
        .unwrap()
    };
    Snapshot {
        status: serde_json::from_value::<Status>(status).unwrap(),
        target_groups: vec!["dns".into(), "web".into()],
        targets: vec![target("dns", 53), target("web", 80)],
    }
}

#[test]
fn help_and_version_go_to_stdout() {
    for arguments in [&["--help"][..], &["-h"], &["--version"], &["status", "--help"]] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(stdout(&output).contains("lb-userspace"), "{arguments:?}");
        assert_eq!(stderr(&output), "", "{arguments:?}");
    }
}

#[test]
fn bad_usage_is_told_on_stderr_with_exit_code_2() {
    for (arguments, text) in [
        (&["--ifaec", "eth0"][..], "--iface"),
        (&["stauts"], "status"),
        (&["--xdp-mode", "fast"], "native"),
        (&["--iface", "eth0", "status"], "--iface is for the agent itself"),
        (&["--iface", "eth0", "--role", "router"], "balancer, target"),
        (&["--iface", "eth0", "--log-level", "lb=loud"], "cannot read the log level `lb=loud`"),
        (&["--iface", "eth0", "--pin", "/sys/fs/bpf/lb"], "--pin"),
        (&["check"], "<FILE>"),
        (&["completions", "tcsh"], "bash"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr(&output).contains(text), "{arguments:?}: {}", stderr(&output));
        assert_eq!(stdout(&output), "", "{arguments:?}");
    }
}

/// Runs `check` on a file `lb.toml` of that content.
fn check(content: &str) -> Output {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("lb.toml"), content).unwrap();
    lb(&["check", "lb.toml"]).current_dir(directory.path()).output().unwrap()
}

#[test]
fn check_warns_of_a_log_without_a_directory() {
    let output = check(
        "[load_balancer.site]\ntype = \"application\"\naddresses = [\"192.0.2.1\"]\n\
         access_logs = { path = \"/nowhere/at/all/site.log\" }\n\
         listener = [{ protocol = \"http\", port = 80, fixed_response = { status = 200 } }]\n",
    );
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{told}");
    assert!(told.contains("lb.toml:4:24"), "{told}");
    assert!(told.contains("the directory /nowhere/at/all of this log is not there"), "{told}");
}

#[test]
fn a_right_configuration_is_summed_up() {
    let output = check("[target_group.web]\nprotocol = \"tcp\"\nport = 80\n");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(
        stdout(&output),
        "lb.toml: ok: 0 load balancers, 0 listeners, 1 target group, 0 targets\n"
    );
}

/// The files that it names are looked at, too.
#[test]
fn a_certificate_that_is_not_there_is_told_with_exit_code_2() {
    let output = check(
        "[load_balancer.site]\ntype = \"application\"\naddresses = [\"192.0.2.1\"]\n\
         [[load_balancer.site.listener]]\nprotocol = \"https\"\n\
         fixed_response = { status = 200 }\n\
         certificates = [{ cert = \"/nonexistent/site.pem\", key = \"/nonexistent/site.key\" }]\n",
    );
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(stdout(&output), "");
    let told = stderr(&output);
    let expected = "lb.toml:7:17: error: /nonexistent/site.pem is not there\n";
    assert!(told.starts_with(expected), "{told}");
}

#[test]
fn every_mistake_of_a_configuration_is_told_with_exit_code_2() {
    let output = check("[agent]\nxdp_mode = \"fast\"\n\n[agnet]\n");
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(stdout(&output), "");
    let told = stderr(&output);
    assert!(told.starts_with("lb.toml:2:12: error: "), "{told}");
    assert!(told.contains("\nlb.toml:4:2: error: "), "{told}");
}

#[test]
fn a_configuration_that_is_not_there_is_told_with_exit_code_2() {
    let output = run(&["check", "/nowhere/lb.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).starts_with("/nowhere/lb.toml: "), "{}", stderr(&output));
}

#[test]
fn without_an_agent_commands_fail_with_exit_code_1() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("lb.sock");
    for command in ["status", "targets"] {
        let output = run(&[command, "--json", "--api-socket", socket.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{command}");
        let expected = format!("error: no agent is running (no socket at {})", socket.display());
        assert!(stderr(&output).starts_with(&expected), "{}", stderr(&output));
        assert_eq!(stdout(&output), "");
    }
}

fn asked(socket: &Path, arguments: &[&str]) -> Output {
    lb(arguments).env("LB_API_SOCKET", socket).output().unwrap()
}

#[test]
fn json_is_what_the_agent_says() {
    let api = Api::start();
    let output = asked(&api.socket(), &["status", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let status: Status = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status, snapshot().status);

    let output = asked(&api.socket(), &["targets", "--json"]);
    let targets: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(targets, serde_json::to_value(snapshot().targets).unwrap());
}

#[test]
fn tables_have_no_colours_when_piped() {
    let api = Api::start();
    let output = asked(&api.socket(), &["targets", "web"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(text.contains("10.0.2.11:80 ") && !text.contains("10.0.2.11:53"), "{text}");
    let text = text + &stdout(&asked(&api.socket(), &["status"]));
    assert!(!text.contains('\x1b'), "{text:?}");
    assert!(text.contains("NoListener"), "{text}");
}

#[test]
fn an_unknown_group_fails() {
    let api = Api::start();
    let output = asked(&api.socket(), &["targets", "wbe"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stderr(&output), "error: there is no target group `wbe`; there are: dns, web\n");
    assert_eq!(stdout(&output), "");
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output =
        lb(&["completions", "bash"]).stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(stderr(&output), "");
}

#[test]
fn completions_and_manual_page() {
    for shell in ["bash", "zsh", "fish"] {
        let script = stdout(&run(&["completions", shell]));
        assert!(script.contains("targets") && script.contains("xdp-mode"), "{shell}: {script}");
    }
    let page = stdout(&run(&["man"]));
    assert!(page.contains(".TH lb-userspace 1"), "{page}");
    assert!(page.contains("/etc/lb/lb.toml"), "{page}");
}
