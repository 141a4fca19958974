//! Building the agent.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::process::{cargo, run};

/// Builds lb-userspace, optimised, and returns where it is.
pub fn build() -> Result<PathBuf> {
    println!("build: lb-userspace with its eBPF programs ...");
    let begin = Instant::now();
    run(&mut cargo(["build", "--release", "--package", "lb-userspace"]))?;
    println!("build: done in {:.1} s", begin.elapsed().as_secs_f64());
    Ok(target_dir()?.join("release/lb-userspace"))
}

/// Cargo's target folder: this program stands in its `debug` or `release`.
pub fn target_dir() -> Result<PathBuf> {
    let this = std::env::current_exe().context("where this program is")?;
    let folder = this.ancestors().nth(2).context("this program is not in a target folder")?;
    Ok(folder.to_owned())
}
