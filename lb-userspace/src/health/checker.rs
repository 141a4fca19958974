//! When targets are asked: every target on its own clock, at most one check of it at a time.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::machine::{Machine, Thresholds};
use super::probe::{Probe, Prober};
use super::{CheckKey, CheckSpec, HealthEvent};

#[cfg(test)]
mod tests;

/// Checks in flight at once, of all targets; each holds a socket.
const MAX_IN_FLIGHT: usize = 256;

/// How far first checks that start together are spread: this much for each, until
/// [`MAX_SPREAD`]. So a few targets are known within milliseconds and a thousand make no spike.
const SPREAD_PER_TARGET: Duration = Duration::from_millis(1);
const MAX_SPREAD: Duration = Duration::from_secs(1);

/// Every interval is lengthened or shortened by up to this part of it, so that targets which
/// started together, and agents, drift apart.
const JITTER: f64 = 0.1;

/// Checks targets and reports their health; dropped, it stops all checks.
///
/// Each target has a task of its own. A check that waits for its turn, because many are in
/// flight, waits before its timeout begins.
#[derive(Debug)]
pub struct Checker<P = Prober> {
    shared: Arc<Shared<P>>,
    /// What each target's task does; a task ends when its sender is gone.
    running: BTreeMap<CheckKey, watch::Sender<Order>>,
}

/// What the tasks have in common.
#[derive(Debug)]
struct Shared<P> {
    probe: P,
    in_flight: Semaphore,
    events: mpsc::Sender<HealthEvent>,
}

/// What a task is to do from now on.
#[derive(Debug, Clone)]
struct Order {
    spec: CheckSpec,
    first_check: Instant,
}

impl Checker {
    /// A checker without targets, that sends what it finds to `events`.
    ///
    /// While the channel is full, checks wait and nothing is lost; once its receiver is gone,
    /// all checks end.
    pub fn new(events: mpsc::Sender<HealthEvent>) -> Self {
        Self::with_probe(events, Prober::new())
    }
}

impl<P: Probe> Checker<P> {
    /// A checker that asks in a way of its own.
    pub fn with_probe(events: mpsc::Sender<HealthEvent>, probe: P) -> Self {
        let in_flight = Semaphore::new(MAX_IN_FLIGHT);
        Self { shared: Arc::new(Shared { probe, in_flight, events }), running: BTreeMap::new() }
    }

    /// Checks exactly the `wanted` targets from now on. Must be called within a tokio runtime.
    ///
    /// New targets are asked at once. A target whose check is unchanged goes on undisturbed. One
    /// whose check changed keeps its state and is asked at once in the new way; an outcome of the
    /// old way no longer counts. Events of targets that are not wanted any more may still be in
    /// the channel.
    pub fn reconcile(&mut self, wanted: BTreeMap<CheckKey, CheckSpec>) {
        self.running.retain(|key, _| wanted.contains_key(key));
        let changed: Vec<_> = wanted
            .into_iter()
            .filter(|(key, spec)| {
                self.running.get(key).is_none_or(|order| order.borrow().spec != *spec)
            })
            .collect();
        let spread = u32::try_from(changed.len())
            .map_or(MAX_SPREAD, |count| SPREAD_PER_TARGET.saturating_mul(count).min(MAX_SPREAD));
        let now = Instant::now();
        for (key, spec) in changed {
            let delay = spread.min(spec.check.interval).mul_f64(rand::random_range(0.0..1.0));
            self.order(key, Order { spec, first_check: now + delay });
        }
    }

    fn order(&mut self, key: CheckKey, order: Order) {
        match self.running.entry(key) {
            Entry::Occupied(task) => {
                task.get().send_replace(order);
            }
            Entry::Vacant(vacant) => {
                let key = vacant.key().clone();
                let machine = Machine::new(Thresholds::from(&order.spec.check));
                let (sender, orders) = watch::channel(order);
                tokio::spawn(obey(self.shared.clone(), key, machine, orders));
                vacant.insert(sender);
            }
        }
    }
}

/// The task of one target: does what was ordered last, until nobody can give orders any more.
async fn obey<P: Probe>(
    shared: Arc<Shared<P>>,
    key: CheckKey,
    mut machine: Machine,
    mut orders: watch::Receiver<Order>,
) {
    loop {
        let order = orders.borrow_and_update().clone();
        machine.change(Thresholds::from(&order.spec.check));
        tokio::select! {
            biased;
            changed = orders.changed() => if changed.is_err() { return },
            () = shared.check_forever(&key, &order, &mut machine) => return,
        }
    }
}

impl<P: Probe> Shared<P> {
    /// Checks at every interval, until nobody listens to the events.
    ///
    /// May be dropped at any await: a health that the machine has taken in has been sent.
    async fn check_forever(&self, key: &CheckKey, order: &Order, machine: &mut Machine) {
        let mut start = order.first_check;
        loop {
            sleep_until(start).await;
            let Ok(turn) = self.in_flight.acquire().await else { return };
            start = Instant::now() + jittered(order.spec.check.interval);
            let outcome = self.probe.probe(&order.spec).await;
            drop(turn);
            let Ok(slot) = self.events.reserve().await else { return };
            if let Some(health) = machine.observe(outcome) {
                slot.send(HealthEvent { key: key.clone(), health });
            }
        }
    }
}

fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(rand::random_range(1.0 - JITTER..=1.0 + JITTER))
}
