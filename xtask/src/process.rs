//! Running other programs: where they are, as whom, and what happens on Ctrl-C.

use std::env;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From here on Ctrl-C, SIGTERM and SIGHUP end the task in order: the terminal ends the program
/// that runs in the foreground, and this process cleans up and exits.
pub fn catch_interrupts() -> Result<()> {
    ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed))
        .context("install the handler of Ctrl-C")
}

/// Whether the task was asked to end.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Sleeps; an error if the task was asked to end.
pub fn pause(duration: Duration) -> Result<()> {
    thread::sleep(duration);
    ensure!(!interrupted(), "interrupted");
    Ok(())
}

/// Asks `ready` every 50 ms until it has an answer; an error after `limit`, naming `what`.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ready()? {
            return Ok(answer);
        }
        ensure!(begin.elapsed() < limit, "{what}: not within {} s", limit.as_secs());
        pause(Duration::from_millis(50))?;
    }
}

/// Where a program is. The sbin folders count too: an ordinary user's PATH on Debian lacks them.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// A command of the program `name`, wherever it is.
pub fn command(name: &str) -> Command {
    Command::new(find(name).unwrap_or_else(|| PathBuf::from(name)))
}

/// Cargo, as the user's PATH has it.
///
/// `cargo xtask` runs under cargo, whose variables about the package `xtask` are no business of
/// the inner one.
pub fn cargo(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut cargo = command("cargo");
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_")) {
            cargo.env_remove(name);
        }
    }
    cargo.env_remove("CARGO_MANIFEST_DIR").env_remove("CARGO_MANIFEST_PATH");
    cargo.current_dir(root()).args(args);
    cargo
}

/// Whether this process is root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A command that runs as root: through sudo if this process is not root.
pub fn as_root(name: &str) -> Result<Command> {
    if is_root() {
        return Ok(command(name));
    }
    ensure!(find("sudo").is_some(), "{name} needs root: run this as root, or install sudo");
    let mut sudo = command("sudo");
    sudo.arg(find(name).unwrap_or_else(|| PathBuf::from(name)));
    Ok(sudo)
}

/// The root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// Runs a command whose output the user sees; an error if it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("run {}", show(command)))?;
    check(command, status, "")
}

/// Runs a command and returns what it wrote to stdout; an error with its stderr if it fails.
pub fn capture(command: &mut Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("run {}", show(command)))?;
    check(command, output.status, &String::from_utf8_lossy(&output.stderr))?;
    String::from_utf8(output.stdout).with_context(|| format!("output of {}", show(command)))
}

fn check(command: &Command, status: ExitStatus, stderr: &str) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    ensure!(!interrupted(), "interrupted");
    let mut text = format!("{} failed ({status})", show(command));
    if !stderr.trim().is_empty() {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {}", stderr.trim());
    }
    bail!(text)
}

/// A command as one would type it.
pub fn show(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let words: Vec<_> = std::iter::once(name)
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    words.join(" ")
}
