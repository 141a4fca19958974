//! Kinds of network devices that not every kernel has.

use std::{
    env,
    io::{self, Write as _},
};

use anyhow::{Result, bail};

use crate::netns::Namespace;

/// Set where every device must be there, as it is on the kernels that `cargo xtask vm` boots: then
/// a test may not be skipped.
const ALL_DEVICES: &str = "LB_ALL_DEVICES";

/// Whether commands of `ip`, one a line, work on this kernel. If not, `test` is skipped, and says
/// so past the test runner, which shows nothing of a test that passes.
///
/// # Errors
///
/// If they do not, where `LB_ALL_DEVICES` says that they must.
pub fn has_devices(test: &str, batch: &str) -> Result<bool> {
    let Err(error) = Namespace::new("devices")?.ip(batch) else { return Ok(true) };
    let error = format!("{error:#}");
    let reason = error.lines().next().unwrap_or_default();
    if env::var_os(ALL_DEVICES).is_some() {
        bail!("{ALL_DEVICES} is set, but this kernel refuses: {error}");
    }
    // Nobody may be there to read it.
    let _ = writeln!(io::stderr(), "SKIPPED {test}: this kernel lacks a device: {reason}");
    Ok(false)
}
