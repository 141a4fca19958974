//! The agent's log: one line an event, to stderr.

use std::env;
use std::io::{self, IsTerminal as _};

use anyhow::anyhow;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

use super::Usage;

/// Starts the log for the whole process. `filter` is a level or a list of `module=level`; empty
/// means info.
///
/// # Errors
/// [`Usage`] if the filter is not understood; any other if the log runs already.
pub(super) fn init(filter: &str) -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(parse(filter)?)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none())
        // A closed stderr must not end the agent, and the complaint about it would panic.
        .log_internal_errors(false)
        .try_init()
        .map_err(|error| anyhow!("cannot start the log: {error}"))
}

fn parse(filter: &str) -> Result<EnvFilter, Usage> {
    EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).parse(filter).map_err(
        |error| {
            Usage(format!(
                "cannot read the log level `{filter}` ({error}): give error, warn, info, debug, \
                 trace or a list like `info,lb_userspace::health=debug`"
            ))
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_lists_are_understood() {
        assert_eq!(parse("").unwrap().to_string(), "info");
        assert_eq!(parse("debug").unwrap().to_string(), "debug");
        let list = parse("warn,lb_userspace::health=trace").unwrap().to_string();
        assert!(list.contains("lb_userspace::health=trace"), "{list}");
    }

    #[test]
    fn nonsense_is_refused_with_what_would_be_right() {
        let error = parse("lb=loud").unwrap_err().to_string();
        assert!(error.starts_with("cannot read the log level `lb=loud`"), "{error}");
    }
}
