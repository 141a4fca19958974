//! Network namespaces that go when they are dropped, and what runs inside them.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Write as _,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd},
        unix::process::CommandExt as _,
    },
    panic,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::NamedTempFile;

use crate::wait_until;

const DIRECTORY: &str = "/run/netns";

/// A network namespace of our own, visible to `ip netns`; removed on drop with all that is in it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    role: String,
    file: File,
}

impl Namespace {
    /// A new namespace whose name ends in `role` and whose `lo` is up.
    ///
    /// # Errors
    ///
    /// If the caller is not root or `ip` is missing.
    pub fn new(role: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        remove_orphans();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("lbtest-{}-{count}-{role}", std::process::id());
        let status = Command::new("ip").args(["netns", "add", &name]).status()?;
        ensure!(status.success(), "cannot make namespace {name}: {status} (root?)");
        let file = File::open(Path::new(DIRECTORY).join(&name))?;

        let namespace = Self { name, role: role.to_owned(), file };
        for (key, value) in [
            // Whoever asks for an IPv6 address wants to use it at once.
            ("net/ipv6/conf/default/accept_dad", "0"),
            // A router on one segment redirects hosts past itself; replies must not bypass us.
            ("net/ipv4/conf/all/accept_redirects", "0"),
            ("net/ipv4/conf/default/accept_redirects", "0"),
            ("net/ipv6/conf/default/accept_redirects", "0"),
            // Echo sockets for `clients::ping`.
            ("net/ipv4/ping_group_range", "0 0"),
        ] {
            namespace.sysctl(key, value)?;
        }
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// What it was made as, such as "client".
    pub fn role(&self) -> &str {
        &self.role
    }

    /// The name under which `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `f` on a thread inside the namespace and returns what it returns.
    ///
    /// A socket stays in the namespace in which it was made, so it may be taken out. Threads that
    /// `f` starts are inside too.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            enter(self.file.as_fd()).expect("root may enter a namespace that it made");
            f()
        };
        thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|e| panic::resume_unwind(e))
    }

    /// A command whose process enters the namespace before it executes `program`.
    ///
    /// Not `ip netns exec`: that mounts a new /sys, without the bpffs in it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let file = self.file.as_raw_fd();
        let enter = move || {
            // SAFETY: the child has a copy of every descriptor; `spawn` borrows the namespace.
            enter(unsafe { BorrowedFd::borrow_raw(file) }).map_err(Into::into)
        };
        // SAFETY: the closure does one system call and allocates nothing.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Runs `ip` over `batch`, one command a line.
    ///
    /// # Errors
    ///
    /// With what `ip` said about the first command that failed.
    pub fn ip(&self, batch: &str) -> Result<()> {
        let mut child = self
            .command("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("stdin is piped")?.write_all(batch.as_bytes())?;
        let output = child.wait_with_output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ip in {}: {errors}in:\n{batch}", self.name);
        Ok(())
    }

    /// Sets a key below /proc/sys, such as `net/ipv4/ip_forward`.
    ///
    /// # Errors
    ///
    /// If there is no such key or it refuses the value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run(|| fs::write(Path::new("/proc/sys").join(key), value))
            .with_context(|| format!("set {key} to {value} in {}", self.name))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

fn enter(namespace: BorrowedFd<'_>) -> nix::Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWNET)
}

fn remove(name: &str) {
    // On failure there is nothing left to do, and a drop must not panic.
    let _ = Command::new("ip").args(["netns", "del", name]).status();
}

/// Removes what test processes left behind that were killed before they could.
fn remove_orphans() {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let mut parts = name.split('-');
        if parts.next() == Some("lbtest")
            && parts.next().is_some_and(|pid| !Path::new("/proc").join(pid).exists())
        {
            remove(&name);
        }
    }
}

/// Joins two namespaces by a veth pair; each end is a namespace and the name of its interface.
///
/// Both are up. Neither leaves checksums to its hardware: behind XDP nobody would fill them in.
///
/// # Errors
///
/// With what `ip` or `ethtool` said, for example if a name is taken.
pub fn link(a: (&Namespace, &str), b: (&Namespace, &str)) -> Result<()> {
    let ((a_namespace, a_name), (b_namespace, b_name)) = (a, b);
    let peer = &b_namespace.name;
    a_namespace.ip(&format!("link add {a_name} type veth peer name {b_name} netns {peer}"))?;
    for (namespace, name) in [a, b] {
        let output = namespace.command("ethtool").args(["-K", name, "tx", "off"]).output()?;
        ensure!(output.status.success(), "ethtool: {}", String::from_utf8_lossy(&output.stderr));
        namespace.ip(&format!("link set {name} up"))?;
    }
    Ok(())
}

/// A running program, its output in one file; killed on drop.
#[derive(Debug)]
pub struct Process {
    child: Child,
    output: NamedTempFile,
}

impl Process {
    /// Starts `command`, usually one of [`Namespace::command`].
    ///
    /// # Errors
    ///
    /// If there is no such program.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let output = NamedTempFile::new()?;
        let child = command
            .stdin(Stdio::null())
            .stdout(output.as_file().try_clone()?)
            .stderr(output.as_file().try_clone()?)
            .spawn()
            .with_context(|| format!("start {}", command.get_program().display()))?;
        Ok(Self { child, output })
    }

    /// Everything it wrote so far to stdout and stderr.
    pub fn output(&self) -> String {
        let bytes = fs::read(self.output.path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    ///
    /// # Errors
    ///
    /// If the kernel does not say.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Sends a signal.
    ///
    /// # Errors
    ///
    /// If the process has ended and was waited for.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// If it has not ended within `timeout`; then it runs on.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        wait_until("end of process", timeout, || !matches!(self.child.try_wait(), Ok(None)))?;
        Ok(self.child.wait()?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
