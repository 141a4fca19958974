//! The agent itself.

use crate::cli::AgentOptions;

/// Runs the agent until it is told to end.
pub fn run(_options: AgentOptions) -> anyhow::Result<()> {
    anyhow::bail!("this build has no agent")
}
