//! The tables of flows: walks over them, and an eye on whether they are large enough.

use std::time::{Duration, Instant};

use lb_common::flow::FlowTable;
use tracing::warn;

use crate::api::snapshot;
use crate::dataplane::{FlowTableUsage, FlowTables};
use crate::state::{Findings, Walk};

/// Time between two warnings about the same table.
const QUIET: Duration = Duration::from_secs(60);

/// Walks over the flows as they are now.
pub fn walk(walk: Walk, mut tables: FlowTables) -> Findings {
    walk.run(&mut tables, monotonic_nanoseconds())
}

/// The clock that the kernel's side stamps flows with (`bpf_ktime_get_ns`).
pub(super) fn monotonic_nanoseconds() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(|time| Duration::from(time).as_nanos() as u64)
        .unwrap_or(0)
}

/// Warns of entries that had to make room.
#[derive(Debug, Default)]
pub struct Watchman {
    /// What was said last, and when, by table.
    said: [Option<(u64, Instant)>; FlowTable::ALL.len()],
}

impl Watchman {
    /// Looks at how full the tables are.
    pub fn look(&mut self, usage: &[FlowTableUsage; FlowTable::ALL.len()], now: Instant) {
        for ((table, usage), said) in FlowTable::ALL.into_iter().zip(usage).zip(&mut self.said) {
            let (count, is_quiet) = match *said {
                Some((count, when)) => (count, now.duration_since(when) < QUIET),
                None => (0, false),
            };
            if usage.evictions > count && !is_quiet {
                *said = Some((usage.evictions, now));
                let evictions = usage.evictions - count;
                warn!(evictions, size = usage.size, "{}", sentence(table));
            }
        }
    }
}

/// What `status` says about the tables.
pub fn in_status(usage: &[FlowTableUsage; FlowTable::ALL.len()]) -> Vec<snapshot::FlowTable> {
    let table = |(table, usage): (_, &FlowTableUsage)| {
        let FlowTableUsage { size, entries, evictions } = *usage;
        snapshot::FlowTable { name: name(table).into(), size, entries, evictions }
    };
    FlowTable::ALL.into_iter().zip(usage).map(table).collect()
}

fn name(table: FlowTable) -> &'static str {
    match table {
        FlowTable::Flows => "flows",
        FlowTable::HalfOpen => "half-open",
        FlowTable::OnceSeen => "once-seen",
    }
}

fn sentence(table: FlowTable) -> &'static str {
    match table {
        FlowTable::Flows => {
            "the table of flows is full: the least recently used are forgotten, and may go to the \
             wrong target; raise flow_table_size"
        }
        FlowTable::HalfOpen => {
            "the table of half-open flows is full, by a flood of SYNs or many new connections: the \
             oldest are forgotten, and may go to the wrong target; raise half_open_table_size"
        }
        FlowTable::OnceSeen => {
            "the table of flows seen once is full, by a flood or many flows at once: the oldest \
             are forgotten, and may go to the wrong target; raise once_seen_table_size"
        }
    }
}
