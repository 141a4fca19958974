//! Messages and reports of the eBPF side, carried to the agent.

use std::net::IpAddr;

use anyhow::Context as _;
use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use lb_common::verdict::DropReason;
use lb_common::wire::Address;
use log::{Log, Metadata, Record};
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
    let logger = EbpfLogger::init_with_logger(dataplane.ebpf(), Named(log::logger()))
        .context("read the program's messages")?;
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

/// A log in which reasons to drop have their names. The program only says their numbers: text for
/// each would be instructions of its own.
struct Named<L>(L);

impl<L: Log> Log for Named<L> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        match drop_reason(&record.args().to_string()) {
            Some(reason) => {
                let mut named = Record::builder();
                named
                    .metadata(record.metadata().clone())
                    .module_path(record.module_path())
                    .file(record.file())
                    .line(record.line());
                self.0.log(&named.args(format_args!("dropped: {}", reason.name())).build());
            }
            None => self.0.log(record),
        }
    }

    fn flush(&self) {
        self.0.flush();
    }
}

/// The reason in the program's message about a dropped packet.
fn drop_reason(message: &str) -> Option<DropReason> {
    let number: usize = message.strip_prefix("dropped for reason ")?.parse().ok()?;
    DropReason::ALL.get(number).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_named_and_other_messages_left_alone() {
        assert_eq!(drop_reason("dropped for reason 0"), Some(DropReason::SecurityGroupDenied));
        assert_eq!(drop_reason("dropped for reason 4"), Some(DropReason::NextHopUnresolved));
        for other in ["dropped for reason 4096", "dropped for reason", "no next hop for a reply"] {
            assert_eq!(drop_reason(other), None);
        }
    }
}
