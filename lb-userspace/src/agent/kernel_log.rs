//! Messages and reports of the eBPF side, carried to the agent.

use std::net::IpAddr;

use anyhow::Context as _;
use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use lb_common::wire::Address;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tracing::warn;

use crate::dataplane::Dataplane;

/// Passes the program's messages to the log.
///
/// # Errors
/// Memory running out.
pub fn follow_messages(dataplane: &mut Dataplane) -> anyhow::Result<()> {
    let logger = EbpfLogger::init(dataplane.ebpf()).context("read the program's messages")?;
    // SAFETY: the logger owns its descriptor and keeps it open until it is dropped.
    let mut logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE)? };
    tokio::spawn(async move {
        while let Ok(mut guard) = logger.readable_mut().await {
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
        warn!("the program's messages are no longer read");
    });
    Ok(())
}

/// Passes on the addresses whose next hop a packet missed.
///
/// # Errors
/// Memory running out.
pub fn follow_unresolved(
    reports: RingBuf<MapData>,
    events: mpsc::Sender<IpAddr>,
) -> anyhow::Result<()> {
    // SAFETY: the ring buffer owns its descriptor and keeps it open until it is dropped.
    let mut reports = unsafe { AsyncFd::register_with_interest(reports, Interest::READABLE)? };
    tokio::spawn(async move {
        while let Ok(mut guard) = reports.readable_mut().await {
            let reports = guard.get_inner_mut();
            while let Some(report) = reports.next() {
                if let Ok(octets) = <[u8; 16]>::try_from(&report[..]) {
                    // A full channel: the owner knows of plenty, and packets keep reporting.
                    let _ = events.try_send(Address::from(octets).into());
                }
            }
            guard.clear_ready();
        }
        warn!("missing next hops are no longer reported");
    });
    Ok(())
}
