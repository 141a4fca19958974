//! `cargo xtask test`: every check and test, in one command.

use std::env::consts::ARCH;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::process::{cargo, find, interrupted, is_root, run as run_command};
use crate::{fuzz, setup};

/// Topologies that are up at the same time; more of them only take each other's CPU time.
const NAMESPACE_TEST_THREADS: &str = "4";

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
        ("dependencies", dependencies),
        ("unit tests", unit_tests),
        ("kernel and namespace tests", root_tests),
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
    deny().map(|()| Outcome::Passed)
}

/// Licences, advisories and sources of all dependencies, by deny.toml.
pub fn deny() -> Result<()> {
    ensure!(
        find("cargo-deny").is_some(),
        "cargo-deny is missing: `cargo install cargo-deny --locked` (takes some minutes)"
    );
    run_command(&mut cargo(["deny", "--workspace", "check"]))
}

fn unit_tests() -> Result<Outcome> {
    let packages = ["--package", "lb-common", "--package", "lb-userspace", "--package", "xtask"];
    passed(cargo(["test"].iter().chain(&packages)))
}

/// The tests that load programs into the kernel and make namespaces.
fn root_tests() -> Result<Outcome> {
    // The tests run the agent as a program, which cargo does not build for them.
    run_command(&mut cargo(["build", "--package", "lb-userspace", "--package", "lb-tests"]))?;
    let mut test = cargo(["test", "--package", "lb-tests", "--"]);
    test.args(["--test-threads", NAMESPACE_TEST_THREADS]);
    if !is_root() {
        // Cargo builds as the user, only the tests themselves run as root.
        let arch = ARCH.to_uppercase();
        test.env(format!("CARGO_TARGET_{arch}_UNKNOWN_LINUX_GNU_RUNNER"), "sudo -E");
    }
    passed(test)
}
