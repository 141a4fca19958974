//! The tasks of the project: `cargo xtask setup | build | demo | test | bench | vm | fuzz | deny`.

mod agent;
mod bench;
mod checks;
mod demo;
mod fuzz;
mod process;
mod setup;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Tasks of lb", version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing on this machine: system packages, Rust components, bpf-linker
    Setup,
    /// Build lb-userspace, optimised, with the eBPF programs inside
    Build,
    /// Show the load balancer at work between network namespaces, then take everything down
    Demo {
        /// Which load balancer
        #[arg(value_enum, default_value_t = demo::Which::Network)]
        which: demo::Which,
        /// Run this lb-userspace instead of installing what is missing and building one
        #[arg(long, value_name = "PATH")]
        agent: Option<PathBuf>,
    },
    /// Install what is missing, then run every check and test
    Test,
    /// Measure; `bench packet` is the cost of a packet
    Bench {
        /// What to measure, and its options
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        args: Vec<String>,
    },
    /// Boot other kernels, Debian's, in qemu, and run the data plane's tests there
    Vm {
        /// The first numbers of a version, such as 6.12, or `newest`; all that are supported if none
        #[arg(value_name = "KERNEL")]
        kernels: Vec<String>,
    },
    /// Fuzz the packet pipeline, beginning with the kept corpus
    Fuzz {
        /// How long to look for inputs
        #[arg(long, default_value_t = fuzz::SMOKE_SECONDS)]
        seconds: u64,
    },
    /// Check licences, advisories and sources of all dependencies (needs cargo-deny)
    Deny,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = process::catch_interrupts().and_then(|()| match cli.task {
        Task::Setup => setup::run(),
        Task::Build => build(),
        Task::Demo { which, agent } => demo::run(which, agent),
        Task::Test => checks::run(),
        Task::Bench { args } => setup::run().and_then(|()| bench::run_bench(&args)),
        Task::Vm { kernels } => vm::run(&kernels),
        Task::Fuzz { seconds } => setup::run().and_then(|()| fuzz::run(seconds)),
        Task::Deny => checks::deny(),
    });
    match result {
        _ if process::interrupted() => {
            eprintln!("interrupted");
            ExitCode::from(130)
        }
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    setup::run()?;
    let binary = agent::build(agent::Profile::Release)?;
    println!("build: it is {}", binary.display());
    Ok(())
}
