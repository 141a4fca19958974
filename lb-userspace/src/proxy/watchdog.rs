//! Sees when a client takes too long.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

use super::io::{Activity, Waiting};
use crate::config::model::Attributes;

/// How long a connection without a request keeps its buffers.
const QUIET: Duration = Duration::from_secs(3);

/// What takes too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overdue {
    /// The next request; the connection may still have one.
    Quiet,
    /// The next request; the connection ends.
    Idle,
    /// The rest of a request's head.
    Head,
    /// The rest of an answer, or of a request's body.
    Silent,
    /// The connection is as old as it may become. Said once.
    Old,
}

/// One timer for a connection, moved when it fires and not with every byte.
#[derive(Debug)]
pub struct Watchdog {
    activity: Arc<Activity>,
    idle_timeout: Duration,
    /// An answer may stall for so many times `idle_timeout`.
    patience: u32,
    /// Whether a quiet connection is told from one that is over.
    tells_quiet: bool,
    /// When it is old.
    keep_alive: Option<Duration>,
    timer: Pin<Box<Sleep>>,
}

impl Watchdog {
    /// For connections that cannot be quiet.
    pub fn new(activity: &Arc<Activity>, attributes: &Attributes) -> Self {
        let mut this = Self {
            activity: activity.clone(),
            idle_timeout: attributes.idle_timeout,
            patience: 1,
            tells_quiet: false,
            keep_alive: Some(attributes.client_keep_alive),
            timer: Box::pin(sleep(Duration::ZERO)),
        };
        this.rest(this.step());
        this
    }

    /// For connections that can do without their buffers.
    pub fn telling_quiet(activity: &Arc<Activity>, attributes: &Attributes) -> Self {
        let mut this = Self { tells_quiet: true, ..Self::new(activity, attributes) };
        this.rest(this.step());
        this
    }

    /// The same, where an answer may stall for twice as long.
    pub fn patient(mut self) -> Self {
        self.patience = 2;
        self
    }

    /// Goes by other attributes from now on.
    pub fn follow(&mut self, attributes: &Attributes) {
        let keep_alive = self.keep_alive.map(|_| attributes.client_keep_alive);
        if (attributes.idle_timeout, keep_alive) != (self.idle_timeout, self.keep_alive) {
            (self.idle_timeout, self.keep_alive) = (attributes.idle_timeout, keep_alive);
            self.rest(Duration::ZERO);
        }
    }

    /// Between two looks, at most: a head can begin right after one.
    fn step(&self) -> Duration {
        if self.tells_quiet { self.idle_timeout.min(QUIET) } else { self.idle_timeout }
    }

    /// Says nothing for so long.
    pub fn rest(&mut self, time: Duration) {
        self.timer.as_mut().reset(Instant::now() + time);
    }

    /// Resolves when something takes too long.
    pub async fn watch(&mut self) -> Overdue {
        loop {
            self.timer.as_mut().await;
            if self.keep_alive.is_some_and(|most| self.activity.age() >= most) {
                self.keep_alive = None;
                return Overdue::Old;
            }
            let (overdue, since, limit) = match self.activity.waiting() {
                Waiting::Request(since) if self.tells_quiet && since < self.idle_timeout => {
                    (Overdue::Quiet, since, QUIET)
                }
                Waiting::Request(since) => (Overdue::Idle, since, self.idle_timeout),
                Waiting::Head(since) => (Overdue::Head, since, self.idle_timeout),
                Waiting::Rest(since) => {
                    (Overdue::Silent, since, self.idle_timeout.saturating_mul(self.patience))
                }
                // Whoever waits for the answer has a timer of his own.
                Waiting::Answer => (Overdue::Silent, Duration::ZERO, self.idle_timeout),
            };
            let left = limit.saturating_sub(since).min(self.step());
            self.rest(left.max(Duration::from_millis(1)));
            if since >= limit {
                return overdue;
            }
        }
    }
}
