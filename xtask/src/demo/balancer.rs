//! The agent in the balancer's namespace, and what its commands answer.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::daemon::Daemon;
use super::namespace::{BALANCER, Network, TARGETS};
use super::server::PORT;
use crate::process::{capture, wait_for};

/// The load balancer's addresses: on the clients' segment, where the agent announces them.
pub const ADDRESSES: [&str; 2] = ["10.0.1.100", "2001:db8:1::100"];

/// The running agent; dropping it ends it.
pub struct Balancer {
    daemon: Daemon,
    binary: PathBuf,
    socket: PathBuf,
    /// The configuration file it runs with.
    pub configuration: PathBuf,
}

impl Balancer {
    /// Writes the configuration into `folder` and starts the agent with it.
    pub fn start(
        network: &Network,
        binary: &Path,
        folder: &Path,
        interfaces: &[&str],
        text: &str,
    ) -> Result<Self> {
        let configuration = folder.join("lb.toml");
        let socket = folder.join("lb.sock");
        fs::write(&configuration, text)?;
        let mut command = network.command(BALANCER, binary);
        command.args(interfaces.iter().flat_map(|interface| ["--iface", interface]));
        command.arg("--api-socket").arg(&socket).arg("--config").arg(&configuration);
        let daemon = Daemon::start(command, &folder.join("lb-userspace.log"))?;
        Ok(Self { daemon, binary: binary.to_owned(), socket, configuration })
    }

    /// Waits until so many targets are in this state.
    pub fn wait_until_all(&mut self, count: usize, state: &str) -> Result<()> {
        wait_for(&format!("{count} targets {state}"), Duration::from_secs(20), || {
            self.daemon.still_runs().context("lb-userspace")?;
            // It does not answer before it listens; if it never does, the limit says so.
            let states = self.states().unwrap_or_default();
            let those = states.values().filter(|it| *it == state).count();
            Ok((those == count).then_some(()))
        })
    }

    /// Waits until the target with this address is in this state.
    pub fn wait_for_state(&mut self, address: &str, wanted: &str) -> Result<()> {
        wait_for(&format!("{address} {wanted}"), Duration::from_secs(20), || {
            self.daemon.still_runs().context("lb-userspace")?;
            Ok(self.states()?.get(address).is_some_and(|state| state == wanted).then_some(()))
        })
    }

    /// The state of each target by its address.
    pub fn states(&self) -> Result<BTreeMap<String, String>> {
        let targets = self.json(&["targets", "--json"])?;
        let text = |target: &Value, key: &str| -> Result<String> {
            let value = target[key].as_str();
            Ok(value.with_context(|| format!("no {key} in {target}"))?.to_owned())
        };
        let list = targets.as_array().context("`targets --json` is not a list")?;
        list.iter().map(|target| Ok((text(target, "address")?, text(target, "state")?))).collect()
    }

    /// How many packets were dropped for a reason.
    pub fn drops(&self, reason: &str) -> Result<u64> {
        let status = self.status()?;
        ensure!(status["drops"].is_object(), "`status --json` has no drops");
        // A reason that never occurred may be left out.
        Ok(status["drops"][reason].as_u64().unwrap_or(0))
    }

    /// What `status --json` says.
    pub fn status(&self) -> Result<Value> {
        self.json(&["status", "--json"])
    }

    /// A command of the agent's, as a user would run it.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.env("LB_API_SOCKET", &self.socket).args(arguments);
        command
    }

    /// Ends it; an error if it does not say it ended well.
    pub fn stop(&mut self) -> Result<()> {
        let status = self.daemon.terminate().context("lb-userspace")?;
        ensure!(status.success(), "lb-userspace ended with {status}");
        Ok(())
    }

    /// What it has said so far.
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = capture(&mut self.command(arguments))?;
        serde_json::from_str(&text).with_context(|| format!("lb-userspace {}", arguments.join(" ")))
    }
}

/// The configuration of the network load balancer's demo.
pub fn text() -> String {
    let [ipv4, ipv6] = ADDRESSES;
    let addresses = TARGETS.iter().flat_map(|target| [target.ipv4(), target.ipv6()]);
    let targets: Vec<_> = addresses.map(|address| format!("  \"{address}\",\n")).collect();
    format!(
        r#"[security_group.customers]            # 10.0.1.66 is not among them
ingress = [
  {{ protocol = "tcp", ports = "80", sources = ["10.0.1.0/26", "2001:db8:1::/64"] }},
  {{ protocol = "icmp", sources = ["0.0.0.0/0", "::/0"] }},
]

[target_group.hello]
protocol = "tcp"
port = {PORT}
targets = [
{}]

[target_group.hello.health_check]
protocol = "http"
interval = "1s"
timeout = "500ms"
healthy_threshold = 2
unhealthy_threshold = 2

[load_balancer.hello]
addresses = ["{ipv4}", "{ipv6}"]
security_groups = ["customers"]

[[load_balancer.hello.listener]]
protocol = "tcp"
port = 80
target_group = "hello"
"#,
        targets.concat(),
    )
}
