//! The command line: definitions, dispatch, exit codes.

mod check;
mod interfaces;
mod logging;
mod output;
mod status;
mod targets;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{error, fmt};

use clap::builder::{EnumValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};

use crate::agent;
use crate::api::client;
use crate::config::{DEFAULT_API_SOCKET, LoadError, Role, XdpMode};

pub use interfaces::choose_interfaces;

const EXAMPLES: &str = "\
Examples:
  sudo lb-userspace --iface eth0                   run the agent on eth0
  sudo lb-userspace --iface eth0 --config lb.toml  with a configuration file of your own
  lb-userspace check lb.toml                       whether that configuration is right
  sudo lb-userspace status                         what it does right now
  sudo lb-userspace targets web                    the health of target group `web`

The agent follows /etc/lb/lb.toml: it reloads when the file changes and on SIGHUP, and ends cleanly
on SIGTERM and Ctrl-C. Without that file it passes all traffic untouched.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration.";

/// A load balancer in the kernel: network load balancing in XDP with health checks and security
/// groups.
///
/// Without a command it runs the agent: it attaches to the named interfaces, balances what the
/// configuration says and answers the other commands, until it is told to end.
#[derive(Debug, Parser)]
#[command(name = "lb-userspace", version, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    run: RunArgs,

    /// Socket of the agent's API: where the agent listens, where commands look for it
    ///
    /// The agent's default is `api_socket` of the configuration, else /run/lb/lb.sock; the
    /// commands' default is /run/lb/lb.sock.
    #[arg(long, global = true, value_name = "PATH", env = "LB_API_SOCKET", hide_env_values = true)]
    api_socket: Option<PathBuf>,

    #[command(subcommand)]
    command: Option<Command>,
}

/// Options of the agent itself.
#[derive(Debug, Args)]
struct RunArgs {
    /// Interface to attach to; repeat it for several. Wins over `interfaces` of the configuration
    #[arg(short, long = "iface", value_name = "NAME")]
    interfaces: Vec<String>,

    /// Configuration file, instead of /etc/lb/lb.toml
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// How to attach. Wins over `xdp_mode` of the configuration, whose default is auto
    #[arg(long, value_name = "MODE", value_parser = xdp_mode())]
    xdp_mode: Option<XdpMode>,

    /// What this machine is. Wins over `role` of the configuration, whose default is balancer
    #[arg(long, value_name = "ROLE", value_parser = role())]
    role: Option<Role>,

    /// What is logged to stderr: error, warn, info, debug, trace, or `module=level` pairs
    #[arg(
        long,
        value_name = "LEVEL",
        env = "RUST_LOG",
        default_value = "info",
        hide_env_values = true
    )]
    log_level: String,
}

impl RunArgs {
    /// The first option on the command line that only the agent itself takes.
    fn first_given(&self) -> Option<&'static str> {
        [
            ("--iface", !self.interfaces.is_empty()),
            ("--config", self.config.is_some()),
            ("--xdp-mode", self.xdp_mode.is_some()),
            ("--role", self.role.is_some()),
        ]
        .into_iter()
        .find_map(|(name, given)| given.then_some(name))
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RoleArg {
    /// It balances
    Balancer,
    /// It is a target: it unwraps tunnels and enforces its security group
    Target,
}

fn role() -> impl TypedValueParser<Value = Role> {
    EnumValueParser::<RoleArg>::new().map(|role| match role {
        RoleArg::Balancer => Role::Balancer,
        RoleArg::Target => Role::Target,
    })
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum XdpModeArg {
    /// In the driver where it can, else generic with a warning
    Auto,
    /// In the driver or not at all
    Native,
    /// In the network stack: works on every NIC, slowly
    Generic,
}

fn xdp_mode() -> impl TypedValueParser<Value = XdpMode> {
    EnumValueParser::<XdpModeArg>::new().map(|mode| match mode {
        XdpModeArg::Auto => XdpMode::Auto,
        XdpModeArg::Native => XdpMode::Native,
        XdpModeArg::Generic => XdpMode::Generic,
    })
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check a configuration file; needs neither root nor an agent
    ///
    /// Exit code 0 if the file can be used, with warnings on stderr; else 2, with every error: file,
    /// line, column, the value, what would be right.
    #[command(after_help = "\
Example:
  lb-userspace check lb.toml && sudo cp lb.toml /etc/lb/lb.toml")]
    Check {
        /// The file
        file: PathBuf,
    },

    /// Show interfaces, load balancers, counters, drops by reason
    #[command(after_help = "\
Examples:
  sudo lb-userspace status
  sudo lb-userspace status --json | jq .drops")]
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },

    /// Show the targets: health, weight, counters
    #[command(after_help = "\
Examples:
  sudo lb-userspace targets
  sudo lb-userspace targets web
  sudo lb-userspace targets --json | jq '.[] | select(.state != \"healthy\")'")]
    Targets {
        /// Only this target group
        group: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },

    /// Print a completion script for a shell
    #[command(after_help = "\
Example:
  lb-userspace completions bash | sudo tee /etc/bash_completion.d/lb-userspace")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },

    /// Print the manual page
    #[command(after_help = "\
Example:
  lb-userspace man | man -l -")]
    Man,
}

/// What the command line asks of the agent; the configuration decides whatever is `None` or empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentOptions {
    /// NICs to attach to, see [`choose_interfaces`].
    pub interfaces: Vec<String>,
    /// A configuration file named on purpose: it must exist. `None`: the default path, where it
    /// need not.
    pub config: Option<PathBuf>,
    /// What this machine is.
    pub role: Option<Role>,
    /// How the program is attached.
    pub xdp_mode: Option<XdpMode>,
    /// Where the API listens.
    pub api_socket: Option<PathBuf>,
}

/// A mistake of the caller, told with its remedy: exit code 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl error::Error for Usage {}

/// The whole program: reads the command line, does what it says, reports how it went.
pub fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The findings in a file name themselves: `FILE:LINE:COLUMN: error: ...`.
            let prefix = if error.is::<LoadError>() { "" } else { "error: " };
            output::complain(&format!("{prefix}{error:#}\n"));
            exit_code(&error)
        }
    }
}

fn exit_code(error: &anyhow::Error) -> ExitCode {
    let callers = error.is::<Usage>() || error.is::<LoadError>();
    if callers { ExitCode::from(2) } else { ExitCode::FAILURE }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let socket = cli.api_socket.as_deref().unwrap_or(Path::new(DEFAULT_API_SOCKET));
    let Some(command) = cli.command else { return run_agent(cli.run, cli.api_socket) };
    if let Some(option) = cli.run.first_given() {
        let text = format!("{option} is for the agent itself; it does not go with a command");
        Cli::command().error(ErrorKind::ArgumentConflict, text).exit();
    }
    match command {
        Command::Check { file } => check::run(&file),
        Command::Status { json } => {
            let status = ask(client::status(socket))?;
            output::print(&if json { output::json(&status)? } else { status::render_now(&status) })
        }
        Command::Targets { group, json } => {
            let targets = ask(client::targets(socket, group.as_deref()))?;
            output::print(&if json {
                output::json(&targets)?
            } else {
                targets::render(&targets, output::Style::detect())
            })
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            let mut command = Cli::command();
            let name = command.get_name().to_owned();
            clap_complete::generate(shell, &mut command, name, &mut script);
            output::print_bytes(&script)
        }
        Command::Man => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut page)?;
            output::print_bytes(&page)
        }
    }
}

fn run_agent(args: RunArgs, api_socket: Option<PathBuf>) -> anyhow::Result<()> {
    logging::init(&args.log_level)?;
    agent::run(AgentOptions {
        interfaces: args.interfaces,
        config: args.config,
        role: args.role,
        xdp_mode: args.xdp_mode,
        api_socket,
    })
}

/// Runs one question to the agent to its end.
fn ask<T>(question: impl Future<Output = Result<T, client::ClientError>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(question)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_of_the_agent() {
        let cli = parse("lb-userspace --iface eth0 --iface eth1 --config a.toml --xdp-mode native")
            .unwrap();
        assert_eq!(cli.run.interfaces, ["eth0", "eth1"]);
        assert_eq!(cli.run.config, Some("a.toml".into()));
        assert_eq!(cli.run.xdp_mode, Some(XdpMode::Native));
        assert!(cli.command.is_none());
    }

    #[test]
    fn the_socket_is_taken_on_either_side_of_the_command() {
        for line in ["lb-userspace --api-socket /a status", "lb-userspace status --api-socket /a"] {
            assert_eq!(parse(line).unwrap().api_socket, Some("/a".into()), "{line}");
        }
    }

    #[test]
    fn agent_options_before_a_command_are_noticed() {
        for (line, option) in [
            ("lb-userspace --iface eth0 status", "--iface"),
            ("lb-userspace --config a status", "--config"),
            ("lb-userspace --xdp-mode auto status", "--xdp-mode"),
            ("lb-userspace --role balancer status", "--role"),
        ] {
            assert_eq!(parse(line).unwrap().run.first_given(), Some(option), "{line}");
        }
        assert_eq!(parse("lb-userspace status").unwrap().run.first_given(), None);
    }

    #[test]
    fn help_is_complete() {
        insta::assert_snapshot!(Cli::command().term_width(100).render_long_help());
    }
}
