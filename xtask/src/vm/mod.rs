//! `cargo xtask vm`: the data plane on other kernels than this machine's, in qemu.

mod initramfs;
mod kernels;
mod modules;
mod qemu;
mod suites;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::agent::target_dir;
use crate::process::interrupted;
use crate::setup;
use kernels::NEWEST;
use suites::{Plan, Row};

/// The kernels that are run where none is named.
const KERNELS: [&str; 5] = ["5.10", "6.1", "6.12", "6.18", NEWEST];

/// Runs what is to run on every kernel, and prints what became of it.
pub fn run(wanted: &[String]) -> Result<()> {
    setup::run()?;
    setup::machine()?;
    let wanted: Vec<&str> = match wanted {
        [] => KERNELS.to_vec(),
        named => named.iter().map(String::as_str).collect(),
    };
    let cache = target_dir()?.join("vm");
    fs::create_dir_all(&cache)?;
    // First what needs the network, so that it is missed at once.
    let kernels =
        wanted.iter().map(|name| kernels::get(name, &cache)).collect::<Result<Vec<_>>>()?;
    let plan = Plan::build()?;
    let mut rows = Vec::new();
    let mut failures = Vec::new();
    for (name, kernel) in wanted.iter().zip(&kernels) {
        println!("\n== {}", kernel.release);
        let begin = Instant::now();
        match on_kernel(kernel, &cache.join("run"), &plan) {
            Ok(suites) => rows.extend(suites.into_iter().map(|row| (kernel.release.clone(), row))),
            Err(error) => {
                ensure!(!interrupted(), "interrupted");
                eprintln!("error: {error:#}");
                failures.push(format!("{name}: {error:#}"));
            }
        }
        println!("vm: {}: {:.0} s", kernel.release, begin.elapsed().as_secs_f64());
    }
    print(&rows);
    failures.extend(
        rows.iter()
            .filter(|(_, row)| !row.passed())
            .map(|(kernel, row)| format!("{kernel}: {}", row.name)),
    );
    match failures.as_slice() {
        [] => Ok(()),
        failures => bail!("failed: {}", failures.join(", ")),
    }
}

fn on_kernel(kernel: &kernels::Kernel, folder: &Path, plan: &Plan) -> Result<Vec<Row>> {
    let begin = Instant::now();
    let mut boot: Option<Duration> = None;
    let mut results = suites::Results::default();
    let script = plan.script(kernel);
    let status = qemu::run(kernel, folder, &script, &mut |line| {
        boot.get_or_insert_with(|| begin.elapsed());
        if results.take(line) {
            println!("{line}");
        }
    })?;
    let mut rows = vec![Row::boot(boot.unwrap_or_else(|| begin.elapsed()))];
    rows.extend(results.rows(plan, kernel)?);
    let failed = rows.iter().any(|row| !row.passed());
    ensure!(
        failed == (status != 0),
        "the machine's exit status {status} is not what its suites say"
    );
    Ok(rows)
}

fn print(rows: &[(String, Row)]) {
    println!("\n== summary");
    println!("{:<26}{:<20}{:>8}{:>8}{:>9}", "kernel", "suite", "passed", "failed", "seconds");
    for (kernel, row) in rows {
        let (passed, failed) = (row.tests.0, row.tests.1);
        let verdict = if row.passed() { "" } else { "  FAILED" };
        println!(
            "{kernel:<26}{:<20}{passed:>8}{failed:>8}{:>9.0}{verdict}",
            row.name,
            row.time.as_secs_f64()
        );
    }
}
