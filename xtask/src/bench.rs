//! `cargo xtask bench`: hands over to the benchmark of lb-tests.

use anyhow::Result;

use crate::agent::target_dir;
use crate::process::{as_root, cargo, run};

/// Builds the benchmark and runs it, as root because it loads programs into the kernel.
pub fn run_bench(args: &[String]) -> Result<()> {
    run(&mut cargo(["build", "--release", "--package", "lb-tests", "--bin", "bench"]))?;
    let program = target_dir()?.join("release/bench");
    run(as_root(&program.to_string_lossy())?.args(args))
}
