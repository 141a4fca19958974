//! `cargo xtask bench`: hands over to the benchmark of lb-tests.

use anyhow::Result;

use crate::agent::target_dir;
use crate::process::{as_root, cargo, root, run};

/// Builds the benchmark and runs it, as root because it loads programs into the kernel.
///
/// Unoptimised: what it measures are eBPF programs, which are always built optimised, and there is
/// one system call for a million packets.
pub fn run_bench(args: &[String]) -> Result<()> {
    run(&mut cargo(["build", "--package", "lb-tests", "--bin", "bench"]))?;
    let program = target_dir()?.join("debug/bench");
    run(as_root(&program.to_string_lossy())?.args(args).current_dir(root()))
}
