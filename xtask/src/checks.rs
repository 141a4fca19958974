//! `cargo xtask test`: every check and test, in one command.

use std::env::consts::ARCH;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::agent::target_dir;
use crate::process::{cargo, find, interrupted, is_root, run as run_command};
use crate::{fuzz, setup};

/// Tests at the same time: more network topologies only take each other's CPU time.
const TEST_THREADS: &str = "4";

/// How a step ended.
enum Outcome {
    Passed,
    Failed(anyhow::Error),
    Skipped(&'static str),
}

/// A step's name and what it does.
type Step = (&'static str, fn() -> Result<Outcome>);

/// Installs what is missing and runs every step, also after a failed one.
pub fn run() -> Result<()> {
    setup::run()?;
    let steps: [Step; 6] = [
        ("format", || passed(cargo(["fmt", "--all", "--check"]))),
        ("lints", || passed(cargo(["clippy", "--all-targets", "--", "--deny", "warnings"]))),
        ("lints of the eBPF crates", ebpf_lints),
        ("dependencies", dependencies),
        ("tests", tests),
        ("fuzz", || fuzz::run(fuzz::SMOKE_SECONDS).map(|()| Outcome::Passed)),
    ];
    let mut results = Vec::new();
    for (name, work) in steps {
        println!("\n== {name}");
        let begin = Instant::now();
        let outcome = work().unwrap_or_else(Outcome::Failed);
        if let Outcome::Failed(error) = &outcome {
            eprintln!("error: {error:#}");
        }
        results.push((name, outcome, begin.elapsed()));
        ensure!(!interrupted(), "interrupted");
    }
    summary(&results)
}

fn summary(results: &[(&str, Outcome, Duration)]) -> Result<()> {
    println!("\n== summary");
    for (name, outcome, time) in results {
        let text = match outcome {
            Outcome::Passed => "passed".to_owned(),
            Outcome::Failed(error) => format!("FAILED: {error:#}"),
            Outcome::Skipped(why) => format!("skipped: {why}"),
        };
        println!("{name:<28}{:>7.1} s  {text}", time.as_secs_f64());
    }
    let failed = results.iter().filter(|(_, outcome, _)| matches!(outcome, Outcome::Failed(_)));
    match failed.count() {
        0 => Ok(()),
        failed => bail!("{failed} of {} steps failed", results.len()),
    }
}

fn passed(mut command: std::process::Command) -> Result<Outcome> {
    run_command(&mut command).map(|()| Outcome::Passed)
}

/// cargo-deny takes minutes to compile, so it is used where it is, not installed.
fn dependencies() -> Result<Outcome> {
    if find("cargo-deny").is_none() {
        return Ok(Outcome::Skipped("needs `cargo install cargo-deny --locked`"));
    }
    // Advisories come from outside and change without a change here: `cargo xtask deny` asks them.
    passed(cargo(["deny", "--workspace", "check", "bans", "licenses", "sources"]))
}

/// Licences, advisories and sources of all dependencies, by deny.toml.
pub fn deny() -> Result<()> {
    ensure!(
        find("cargo-deny").is_some(),
        "cargo-deny is missing: `cargo install cargo-deny --locked` (takes some minutes)"
    );
    run_command(&mut cargo(["deny", "--workspace", "check"]))
}

/// What aya-build does to build them, but for clippy.
fn ebpf_lints() -> Result<Outcome> {
    let mut clippy = cargo(["clippy", "--release", "--target", "bpfel-unknown-none"]);
    clippy
        .args(["--package", "lb-ebpf", "--package", "lb-tests-ebpf"])
        .args(["-Z", "build-std=core", "--", "--deny", "warnings"])
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", format!("--cfg=bpf_target_arch=\"{ARCH}\""))
        .env("CARGO_BUILD_BUILD_DIR", target_dir()?.join("ebpf"));
    passed(clippy)
}

/// All tests, in one run: split by package they would be built with other features, all over again.
/// Those of lb-tests load programs into the kernel and make namespaces, and run the agent that the
/// same build makes.
fn tests() -> Result<Outcome> {
    let mut test = cargo(["test", "--no-fail-fast", "--", "--test-threads", TEST_THREADS]);
    if !is_root() {
        // Cargo builds as the user, only the tests themselves run as root.
        let arch = ARCH.to_uppercase();
        test.env(format!("CARGO_TARGET_{arch}_UNKNOWN_LINUX_GNU_RUNNER"), "sudo -E");
    }
    passed(test)
}
