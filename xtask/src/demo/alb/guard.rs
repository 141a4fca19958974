//! The agent on a target, which enforces the target's security group.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::demo::daemon::Daemon;
use crate::demo::namespace::{Host, Network};
use crate::process::{capture, wait_for};

/// It runs; dropping it ends it.
pub struct Guard {
    daemon: Daemon,
    binary: PathBuf,
    socket: PathBuf,
}

impl Guard {
    /// Starts it and waits until it answers.
    pub fn start(
        network: &Network,
        host: &Host,
        binary: &Path,
        folder: &Path,
        configuration: &Path,
    ) -> Result<Self> {
        let socket = folder.join(format!("{}.sock", host.name));
        let mut command = network.command(host.name, binary);
        command.args(["--role", "target", "--iface", "eth0", "--api-socket"]).arg(&socket);
        command.arg("--config").arg(configuration);
        let daemon = Daemon::start(command, &folder.join(format!("{}.log", host.name)))?;
        let mut guard = Self { daemon, binary: binary.to_owned(), socket };
        wait_for("an answer", Duration::from_secs(20), || {
            guard.daemon.still_runs().with_context(|| guard.daemon.log())?;
            Ok(guard.denied().ok())
        })?;
        Ok(guard)
    }

    /// How many packets its security group refused.
    pub fn denied(&self) -> Result<u64> {
        let mut command = Command::new(&self.binary);
        command.env("LB_API_SOCKET", &self.socket).args(["status", "--json"]);
        let status: Value = serde_json::from_str(&capture(&mut command)?)?;
        ensure!(status["drops"].is_object(), "`status --json` has no drops");
        Ok(status["drops"]["SecurityGroupDenied"].as_u64().unwrap_or(0))
    }

    /// Ends it.
    pub fn stop(mut self) -> Result<()> {
        let status = self.daemon.terminate()?;
        ensure!(status.success(), "it ended with {status}");
        Ok(())
    }
}
