//! The harness of lb's system tests and benchmarks.
//!
//! Layer 3 of the tests is a network of namespaces ([`topology`], built from [`netns`]) in which
//! real [`servers`] and [`clients`] talk through a running [`agent`]; [`site`] is all of it. Everything is torn down when
//! its value is dropped, on panic too. [`packets`] builds frames byte by byte, [`programs`] holds
//! the helper programs in the kernel and runs packets through the one under test.
//!
//! All of it needs root.

pub mod agent;
pub mod clients;
pub mod devices;
pub mod ecmp;
pub mod frames;
pub mod generate;
pub mod history;
pub mod icmp;
pub mod netns;
pub mod packets;
pub mod programs;
pub mod progrun;
pub mod scene;
pub mod servers;
pub mod site;
pub mod target_world;
pub mod topology;
pub mod transfers;
pub mod tunnels;

use std::{
    env, thread,
    time::{Duration, Instant},
};

/// Asks `condition` every 10 ms until it holds.
///
/// # Errors
///
/// If it does not hold within `timeout`, times `LB_SLOWNESS`; `what` says what was waited for.
pub fn wait_until(
    what: &str,
    timeout: Duration,
    mut condition: impl FnMut() -> bool,
) -> anyhow::Result<()> {
    let timeout = timeout * slowness();
    let deadline = Instant::now() + timeout;
    while !condition() {
        anyhow::ensure!(Instant::now() < deadline, "{what}: not within {timeout:?}");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// How many times slower than a real machine this one is: `cargo xtask vm` sets `LB_SLOWNESS` where
/// the processor is emulated.
fn slowness() -> u32 {
    let given = env::var("LB_SLOWNESS").ok().and_then(|text| text.parse().ok());
    given.unwrap_or(1)
}
