//! Source ports: kept from the kernel's own choice, and given back after their flows.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use lb_common::flow::FlowKey;
use lb_common::snat::{SnatFlow, SnatReturn};
use tokio::task::JoinHandle;
use tracing::{error, warn};

use crate::dataplane::SnatTables;

use super::Agent;
use super::flows::monotonic_nanoseconds;

/// Time between two walks at least. A port is free this long after its flow timed out at most, while
/// walks are short.
const WALK: Duration = Duration::from_secs(2);
/// Part of the time that walks may take: one in so many.
const SHARE: u32 = 20;

/// Numbers of the pools that live flows have ports of, and how long the walk took.
type Walked = (BTreeSet<u32>, Duration);

/// Walks, one after the other.
#[derive(Debug, Default)]
pub(super) struct Walks {
    under_way: Option<JoinHandle<Walked>>,
    next: Option<Instant>,
}

impl Agent {
    /// Keeps the ports of flows from connections of this machine's own: a reply to those would be
    /// taken for one of a flow.
    pub(super) fn reserve_ports(&mut self) {
        self.port_problem =
            self.reserved_ports.reserve(&self.state.snat_ports()).err().map(|error| {
                format!(
                    "snat_ports are not reserved: connections of this machine may meet flows of \
                 clients there; add them to net.ipv4.ip_local_reserved_ports ({error})"
                )
            });
        if let Some(problem) = &self.port_problem {
            warn!("{problem}");
        }
    }

    /// Begins or ends a walk over the flows whose both ends are rewritten.
    pub(super) async fn walk_snat(&mut self, now: Instant) {
        if self.snat_walks.under_way.as_ref().is_some_and(JoinHandle::is_finished)
            && let Some(walk) = self.snat_walks.under_way.take()
        {
            match walk.await {
                Ok((in_use, took)) => {
                    self.snat_walks.next = Some(now + WALK.max(took * SHARE));
                    if self.state.release_pools(&in_use) {
                        self.reserve_ports();
                        self.reconcile();
                    }
                }
                Err(error) => error!("the walk over flows with source ports ended early: {error}"),
            }
        }
        let is_due = self.snat_walks.next.is_none_or(|next| next <= now);
        if self.snat_walks.under_way.is_some() || !is_due || !self.state.has_pools() {
            return;
        }
        match self.dataplane.snat_tables() {
            Ok(tables) => {
                let walk = tokio::task::spawn_blocking(move || walk(tables));
                self.snat_walks.under_way = Some(walk);
            }
            Err(error) => error!("no walk over flows with source ports: {error:#}"),
        }
    }
}

/// Removes every flow that is over, and gives its port back.
fn walk(mut tables: SnatTables) -> Walked {
    let began = Instant::now();
    let now = monotonic_nanoseconds();
    let is_over = |key: &FlowKey, flow: &SnatFlow| flow.stamp.is_over(now, key.protocol, flow.idle);
    let over: Vec<FlowKey> =
        tables.flows().filter(|(key, flow)| is_over(key, flow)).map(|(key, _)| key).collect();
    for key in over {
        tables.remove_flow(&key, |flow| is_over(&key, flow));
    }
    let mut in_use = BTreeSet::new();
    let mut over: Vec<(FlowKey, SnatReturn)> = Vec::new();
    for (key, flow) in tables.returns() {
        if flow.stamp.is_over(now, key.protocol, flow.idle) {
            over.push((key, flow));
        } else {
            in_use.insert(flow.pool);
        }
    }
    for (key, flow) in over {
        if let Err(error) = tables.remove_return(&key, &flow) {
            in_use.insert(flow.pool);
            warn!("a source port stays taken until the next walk: {error:#}");
        }
    }
    (in_use, began.elapsed())
}
