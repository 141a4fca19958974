//! A running `lb-userspace`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    netns::{Namespace, Process},
    wait_until,
};

/// How long the agent may take to start or to end.
const PATIENCE: Duration = Duration::from_secs(40);

/// The built agent: LB_BIN, or what cargo put beside the running test.
///
/// # Errors
///
/// If it is not there.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("LB_BIN") {
        return Ok(path.into());
    }
    // target/debug/deps/test-0123456789abcdef
    let test = env::current_exe()?;
    let profile = test.ancestors().nth(2).context("the test runs in target/PROFILE/deps")?;
    let binary = profile.join("lb-userspace");
    ensure!(binary.exists(), "no {}: run `cargo build -p lb-userspace`", binary.display());
    Ok(binary)
}

/// The directory of an agent: its configuration file and its socket. It outlives an agent that was
/// killed, for the next one to recover from.
#[derive(Clone, Debug)]
pub struct Home(Arc<TempDir>);

impl Home {
    /// A new directory with that configuration.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn new(config: &str) -> Result<Self> {
        let home = Self(Arc::new(TempDir::new()?));
        fs::write(home.config(), config)?;
        Ok(home)
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.0.path().join("lb.toml")
    }

    /// The API socket.
    pub fn socket(&self) -> PathBuf {
        self.0.path().join("lb.sock")
    }
}

/// A running agent; ended on drop.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    home: Home,
}

impl Agent {
    /// Starts the agent in `namespace` on `interfaces` and waits until it is ready.
    ///
    /// # Errors
    ///
    /// If it ends or is not ready in time; with all that it wrote.
    pub fn start(namespace: &Namespace, interfaces: &[&str], config: &str) -> Result<Self> {
        Self::start_in(Home::new(config)?, namespace, interfaces, &[])
    }

    /// As [`Agent::start`], in a directory of choice and with more arguments, such as `--pin DIR`.
    ///
    /// # Errors
    ///
    /// As [`Agent::start`].
    pub fn start_in(
        home: Home,
        namespace: &Namespace,
        interfaces: &[&str],
        arguments: &[&str],
    ) -> Result<Self> {
        Self::start_program(&binary()?, home, namespace, interfaces, arguments)
    }

    /// As [`Agent::start_in`], of another program than [`binary`].
    ///
    /// # Errors
    ///
    /// As [`Agent::start`].
    pub fn start_program(
        program: &Path,
        home: Home,
        namespace: &Namespace,
        interfaces: &[&str],
        arguments: &[&str],
    ) -> Result<Self> {
        let mut command = namespace.command(program);
        command
            .arg("--config")
            .arg(home.config())
            .arg("--api-socket")
            .arg(home.socket())
            .args(interfaces.iter().flat_map(|interface| ["--iface", interface]))
            .args(arguments)
            .env("RUST_LOG", "info,lb_userspace=debug,lb_ebpf=debug");
        let mut agent = Self { process: Process::spawn(&mut command)?, home };
        agent.wait_for(is_ready, "ready").context("start the agent")?;
        Ok(agent)
    }

    /// Everything it wrote so far.
    pub fn log(&self) -> String {
        self.process.output()
    }

    /// Waits until `text` stands in the log.
    ///
    /// # Errors
    ///
    /// If it ends before, or the text does not come in time; with the whole log.
    pub fn wait_for_log(&mut self, text: &str) -> Result<()> {
        self.wait_for(|log| log.contains(text), text)
    }

    fn wait_for(&mut self, is_there: impl Fn(&str) -> bool, what: &str) -> Result<()> {
        let ended_or_there = wait_until(what, PATIENCE, || {
            // Asked first: what it wrote before its end counts.
            let running = self.process.is_running().unwrap_or(false);
            is_there(&self.process.output()) || !running
        });
        let log = self.log();
        ended_or_there.with_context(|| format!("log:\n{log}"))?;
        ensure!(is_there(&log), "the agent ended without saying {what:?}; log:\n{log}");
        Ok(())
    }

    /// Replaces the configuration file by renaming, as an editor does. The agent notices by itself;
    /// use [`wait_until`] to see the effect.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn reload(&self, config: &str) -> Result<()> {
        let path = self.home.config();
        let new = path.with_extension("new");
        fs::write(&new, config)?;
        Ok(fs::rename(new, path)?)
    }

    /// Its directory.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// What `lb-userspace status --json` prints.
    ///
    /// # Errors
    ///
    /// If the command fails or prints no JSON.
    pub fn status(&self) -> Result<Value> {
        self.json("status")
    }

    /// What `lb-userspace targets --json` prints.
    ///
    /// # Errors
    ///
    /// If the command fails or prints no JSON.
    pub fn targets(&self) -> Result<Value> {
        self.json("targets")
    }

    /// Waits until the agent reports that state, such as "healthy", for the target at `address`.
    ///
    /// # Errors
    ///
    /// If that takes too long; with what it reports instead.
    pub fn wait_for_target(&self, address: &str, state: &str) -> Result<()> {
        let is = |target: &Value| target["address"] == address && target["state"] == state;
        let reported = || self.targets().ok()?.as_array()?.iter().any(is).then_some(());
        wait_until(&format!("{address} {state}"), PATIENCE, || reported().is_some())
            .with_context(|| format!("targets: {:?}\nlog:\n{}", self.targets(), self.log()))
    }

    /// A client command of this agent: `lb-userspace ARGUMENTS`.
    ///
    /// # Errors
    ///
    /// If there is no binary.
    pub fn client(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(binary()?);
        command.args(arguments).env("LB_API_SOCKET", self.home.socket());
        Ok(command)
    }

    /// Sends a signal, such as SIGHUP or SIGKILL.
    ///
    /// # Errors
    ///
    /// If it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Memory that it holds (VmRSS of proc_pid_status(5)), in bytes.
    ///
    /// # Errors
    ///
    /// If it has ended.
    pub fn memory(&self) -> Result<u64> {
        let status = fs::read_to_string(self.proc("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kibibytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
        Ok(kibibytes.context("VmRSS")?.parse::<u64>()? * 1024)
    }

    /// How many descriptors it has open.
    ///
    /// # Errors
    ///
    /// If it has ended.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(fs::read_dir(self.proc("fd"))?.count())
    }

    /// The processor's time that it took so far, all threads together (utime and stime of
    /// proc_pid_stat(5)).
    ///
    /// # Errors
    ///
    /// If it has ended.
    pub fn processor_time(&self) -> Result<Duration> {
        // The kernel counts in hundredths of a second for programs, whatever its own clock.
        const TICK: Duration = Duration::from_millis(10);
        let stat = fs::read_to_string(self.proc("stat"))?;
        let (_, after_name) = stat.rsplit_once(')').context("a name")?;
        let ticks = |field: usize| -> Result<u32> {
            Ok(after_name.split_whitespace().nth(field).context("a field")?.parse()?)
        };
        Ok(TICK * (ticks(11)? + ticks(12)?))
    }

    fn proc(&self, file: &str) -> PathBuf {
        Path::new("/proc").join(self.process.id().to_string()).join(file)
    }

    /// Ends the agent with SIGTERM and returns its log.
    ///
    /// # Errors
    ///
    /// If it does not end in time, or not with exit code 0; with its log.
    pub fn stop(mut self) -> Result<String> {
        self.signal(Signal::SIGTERM)?;
        let status = self.process.wait(PATIENCE).with_context(|| self.log())?;
        ensure!(status.success(), "the agent ended with {status}; log:\n{}", self.log());
        Ok(self.log())
    }

    /// Ends the agent with SIGKILL, so that it can clean up nothing.
    ///
    /// # Errors
    ///
    /// If it had ended before.
    pub fn kill(mut self) -> Result<Home> {
        self.signal(Signal::SIGKILL)?;
        self.process.wait(PATIENCE)?;
        Ok(self.home.clone())
    }

    fn json(&self, command: &str) -> Result<Value> {
        let output = self.client(&[command, "--json"])?.output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{command}: {}: {errors}", output.status);
        serde_json::from_slice(&output.stdout).with_context(|| format!("JSON of {command}"))
    }
}

/// Says what a failed test needs to be understood, and lets the agent clean up after itself.
impl Drop for Agent {
    fn drop(&mut self) {
        if thread::panicking() {
            let drops = self.status().map(|status| status["drops"].clone());
            eprintln!("== drops: {drops:?}\n== the agent's log:\n{}", self.log());
        }
        if self.process.is_running().unwrap_or(false) {
            // If it does not end, the process is killed next.
            let _ = self.process.signal(Signal::SIGTERM);
            let _ = self.process.wait(Duration::from_secs(5));
        }
    }
}

/// Whether a line has the word "ready", and not just "already".
fn is_ready(log: &str) -> bool {
    log.split(|c: char| !c.is_alphanumeric()).any(|word| word == "ready")
}
