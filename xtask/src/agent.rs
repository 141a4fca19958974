//! Building the agent.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::process::{cargo, run};

/// How it is built.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// In less than half the time. The XDP object inside is always optimised, so packets do not
    /// notice; only the agent itself is slower, which nobody sees in a demo or a test.
    Dev,
    /// As it is to be installed.
    Release,
}

impl Profile {
    /// What cargo calls its folder.
    const fn folder(self) -> &'static str {
        match self {
            Self::Dev => "debug",
            Self::Release => "release",
        }
    }
}

/// Builds lb-userspace and returns where it is.
pub fn build(profile: Profile) -> Result<PathBuf> {
    println!("build: lb-userspace with its eBPF programs ...");
    let begin = Instant::now();
    let mut build = cargo(["build", "--package", "lb-userspace"]);
    if profile == Profile::Release {
        build.arg("--release");
    }
    run(&mut build)?;
    println!("build: done in {:.1} s", begin.elapsed().as_secs_f64());
    Ok(target_dir()?.join(profile.folder()).join("lb-userspace"))
}

/// Cargo's target folder: this program stands in its `debug` or `release`.
pub fn target_dir() -> Result<PathBuf> {
    let this = std::env::current_exe().context("where this program is")?;
    let folder = this.ancestors().nth(2).context("this program is not in a target folder")?;
    Ok(folder.to_owned())
}
