//! `cargo xtask bench`: hands over to the benchmark of lb-tests.

use anyhow::Result;

use crate::agent::target_dir;
use crate::process::{as_root, cargo, root, run};

/// Builds the benchmark and runs it, as root because it loads programs into the kernel.
///
/// Unoptimised: what it measures is always built optimised: eBPF programs, with one system call for a
/// million packets, or other processes.
pub fn run_bench(args: &[String]) -> Result<()> {
    if args.first().is_some_and(|kind| kind == "http") {
        let agent = ["--package", "lb-userspace", "--bin", "lb-userspace", "--example", "proxy"];
        run(cargo(["build", "--release"]).args(agent))?;
    }
    run(&mut cargo(["build", "--package", "lb-tests", "--bin", "bench"]))?;
    let program = target_dir()?.join("debug/bench");
    run(as_root(&program.to_string_lossy())?.args(args).current_dir(root()))
}
