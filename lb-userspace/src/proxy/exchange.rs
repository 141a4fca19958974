//! What is noted of a request.

use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};

use super::body::ResponseBody;
use super::connection::Connection;
use super::counters::Metric;
use super::errors::ElbError;
use super::note::{self, Note};
use super::table::{Outstanding, Served};
use super::worker::Worker;

/// What is known of a request, to be noted when its answer has ended.
#[derive(Debug)]
pub struct Exchange {
    /// The thread that serves it.
    pub worker: Arc<Worker>,
    /// What held for its listener when it came.
    pub served: Arc<Served>,
    /// Where it went.
    pub outstanding: Option<Outstanding>,
    /// For the access log, if there is one.
    pub note: Option<Box<Note>>,
    /// Whether no other request may come over its connections.
    pub is_alone: bool,
    sent_bytes: u64,
    status: u16,
}

impl Exchange {
    /// One begins.
    pub fn begin(connection: &Connection, request: &Request<Incoming>) -> Box<Self> {
        let served = connection.listener.current.load_full();
        Box::new(Self {
            worker: connection.worker.clone(),
            note: served.log.is_some().then(|| Note::new(connection, request)),
            is_alone: false,
            served,
            outstanding: None,
            sent_bytes: 0,
            status: 0,
        })
    }

    /// So many bytes of the answer's body went on.
    pub fn sent(&mut self, bytes: usize) {
        self.sent_bytes += bytes as u64;
    }

    /// The answer begins with this head.
    pub fn answers(&mut self, response: &Response<ResponseBody>) {
        if self.note.is_some() {
            self.sent_bytes += note::response_head_size(response);
        }
    }

    /// All that came and went over a connection that became a tunnel.
    pub fn tunnelled(&mut self, (received, sent): (u64, u64)) {
        if let Some(note) = &mut self.note {
            note.tunnelled = Some(received);
            self.sent_bytes = sent;
        }
    }

    /// Counts for the load balancer.
    pub fn count(&self, metric: Metric) {
        self.served.load_balancer.counters.count(self.worker.index, metric);
    }

    /// The load balancer answers by itself.
    pub fn own_answer(&mut self, code: u16) {
        self.status = code;
        count_own(&self.served, &self.worker, code);
    }

    /// The target answered, so long after it had the request.
    pub fn target_answered(&mut self, status: StatusCode, time: Duration) {
        self.status = status.as_u16();
        if let Some(note) = &mut self.note {
            note.target_status = Some(self.status);
        }
        let metric = match self.status {
            200..300 => Metric::Target2xx,
            300..400 => Metric::Target3xx,
            400..500 => Metric::Target4xx,
            500..600 => Metric::Target5xx,
            _ => return,
        };
        let index = self.worker.index;
        let of_target = self.outstanding.as_ref().map(|it| &it.target().counters);
        for counters in of_target.into_iter().chain([&self.served.load_balancer.counters]) {
            counters.count(index, metric);
            counters.response_time(index, time);
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let (Some(log), Some(note)) = (&self.served.log, &self.note) {
            log.write(note.line(self, self.status, self.sent_bytes));
        }
    }
}

fn count_own(served: &Served, worker: &Worker, code: u16) {
    let counters = &served.load_balancer.counters;
    let count = |metric| counters.count(worker.index, metric);
    match code {
        300..400 => count(Metric::Elb3xx),
        400..500 => count(Metric::Elb4xx),
        500..600 => count(Metric::Elb5xx),
        _ => {}
    }
    match code {
        500 => count(Metric::Elb500),
        502 => count(Metric::Elb502),
        503 => count(Metric::Elb503),
        504 => count(Metric::Elb504),
        _ => {}
    }
}

/// Notes that a client was told of an error before there was a request; so many bytes of one had
/// come.
pub fn note_refused(connection: &Connection, error: ElbError, received: usize) {
    let served = connection.listener.current.load();
    count_own(&served, &connection.worker, error.code());
    if let Some(log) = &served.log {
        log.write(note::refused(connection, &served, error, received as u64));
    }
}

/// A request that is being answered. A client that goes away leaves it behind unanswered.
#[derive(Debug)]
pub struct Unanswered(pub Option<Box<Exchange>>);

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(exchange) = &mut self.0 {
            exchange.own_answer(ElbError::ClientClosed.code());
        }
    }
}
