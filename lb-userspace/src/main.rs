//! `lb-userspace`: the agent and its commands.

use std::process::ExitCode;

fn main() -> ExitCode {
    lb_userspace::cli::main()
}
