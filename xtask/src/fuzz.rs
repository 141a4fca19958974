//! `cargo xtask fuzz`: coverage-guided fuzzing with libFuzzer on the pinned stable compiler.
//!
//! cargo-fuzz wants a nightly one, for sanitizers that code without `unsafe` does not need. The
//! coverage instrumentation itself is an LLVM pass that stable rustc takes by name.

use std::env::consts::ARCH;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::agent::target_dir;
use crate::process::{cargo, command, root, run as run_command};

/// How long the test command fuzzes, all targets together.
pub const SMOKE_SECONDS: u64 = 20;

/// The fuzz targets: the balancer's pipeline and the target's. Their kept inputs are in
/// `tests/corpus/` under the same names.
const TARGETS: [&str; 2] = ["pipeline", "target"];

/// What `cargo fuzz` passes too. Debug assertions stay on: an overflow is a finding.
const COVERAGE: &str = "--cfg fuzzing -Cdebug-assertions -Ccodegen-units=1 \
    -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// Fuzzes for some seconds, every target in turn.
pub fn run(seconds: u64) -> Result<()> {
    let triple = format!("{ARCH}-unknown-linux-gnu");
    let folder = target_dir()?.join("fuzz");
    // With --target the flags do not reach build scripts and proc macros.
    run_command(
        cargo(["build", "--release", "--manifest-path", "tests/fuzz/Cargo.toml"])
            .args(["--bins", "--target", &triple, "--target-dir"])
            .arg(&folder)
            .env("RUSTFLAGS", COVERAGE),
    )?;
    let programs = folder.join(triple).join("release");
    let seconds = seconds.div_ceil(TARGETS.len() as u64);
    TARGETS.into_iter().try_for_each(|target| fuzz(&folder, &programs, target, seconds))
}

/// Begins with the kept corpus. A failing input is an error and is kept beside what else was found,
/// below the target folder.
fn fuzz(folder: &Path, programs: &Path, target: &str, seconds: u64) -> Result<()> {
    let found = folder.join("corpus").join(target);
    let findings = folder.join("artifacts").join(target);
    for new in [&found, &findings] {
        fs::create_dir_all(new).with_context(|| format!("create {}", new.display()))?;
    }
    // The first folder takes new inputs, the second is only read.
    run_command(
        command(&programs.join(target).to_string_lossy())
            .arg(format!("-max_total_time={seconds}"))
            .args(["-max_len=2048", "-print_final_stats=1", "-verbosity=1"])
            .arg(format!("-artifact_prefix={}/", findings.display()))
            .arg(&found)
            .arg(root().join("tests/corpus").join(target)),
    )
    .with_context(|| format!("the failing input is in {}", findings.display()))
}
