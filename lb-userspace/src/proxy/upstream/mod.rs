//! Connections to targets: each worker thread has its own, and keeps those that are idle.

mod connect;
mod counted;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response};
use tokio::time::Instant;

pub use connect::{ConnectError, Connector, TargetStream};

use self::counted::Patience;
use super::body::RequestBody;
use super::table::Target;
use crate::config::model::HttpVersion;

/// How long an idle connection is kept.
const KEEP: Duration = Duration::from_secs(60);

/// Requests at a time on one HTTP/2 connection, before another is opened.
const STREAMS: usize = 100;

/// Idle connections to one target, at most, in each thread.
const MAX_IDLE: usize = 1024;

/// The connections of one thread.
#[derive(Debug, Default)]
pub struct Pool {
    idle: Mutex<HashMap<u64, Vec<Idle>>>,
    shared: Mutex<HashMap<u64, Vec<Multiplexed>>>,
}

/// A connection of HTTP/1.1.
#[derive(Debug)]
struct Http1 {
    sender: http1::SendRequest<RequestBody>,
    patience: Arc<Patience>,
}

#[derive(Debug)]
struct Idle {
    connection: Http1,
    since: Instant,
}

#[derive(Debug)]
struct Multiplexed {
    sender: http2::SendRequest<RequestBody>,
    /// One more than there are requests on it.
    users: Arc<()>,
    since: Instant,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panic could leave behind is a map of connections that are all good.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection for one request at a time, or a share of one for many.
#[derive(Debug)]
pub struct Lease {
    pool: Arc<Pool>,
    target: u64,
    sender: Sender,
    /// Whether another request may come over it.
    pub is_kept: bool,
}

#[derive(Debug)]
enum Sender {
    Http1(Http1),
    /// With one of its [`Multiplexed::users`].
    Http2(http2::SendRequest<RequestBody>, Arc<()>),
}

/// A request that was not answered.
#[derive(Debug)]
pub struct SendError {
    /// Why.
    pub error: hyper::Error,
    /// The request, if nothing of it was sent.
    pub unsent: Option<Request<RequestBody>>,
}

impl SendError {
    /// Whether the target says that it did nothing about the request (RFC 9113 section 8.7): its
    /// stream was refused, or is beyond the last one of a GOAWAY.
    pub fn is_unprocessed(&self) -> bool {
        let source = std::error::Error::source(&self.error);
        source.and_then(|it| it.downcast_ref::<h2::Error>()).is_some_and(|it| {
            let is_refused = it.reason() == Some(h2::Reason::REFUSED_STREAM);
            it.is_remote() && (it.is_go_away() || is_refused)
        })
    }
}

impl Lease {
    /// Sends a request; waits for the head of the answer.
    pub async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, SendError> {
        let answer = match &mut self.sender {
            Sender::Http1(connection) => {
                connection.patience.begin();
                let answer = connection.sender.try_send_request(request).await;
                connection.patience.end();
                answer
            }
            Sender::Http2(sender, _) => sender.try_send_request(request).await,
        };
        answer.map_err(|mut error| SendError {
            unsent: error.take_message(),
            error: error.into_error(),
        })
    }

    /// No other request goes over it: it takes none, for now.
    pub fn retire(self) {
        if let Sender::Http2(_, users) = &self.sender
            && let Some(shared) = lock(&self.pool.shared).get_mut(&self.target)
        {
            shared.retain(|it| !Arc::ptr_eq(&it.users, users));
        }
    }

    /// The answer has ended: another request may have it.
    pub fn give_back(self) {
        if let Sender::Http1(connection) = self.sender
            && self.is_kept
            && !connection.sender.is_closed()
        {
            let mut idle = lock(&self.pool.idle);
            let idle = idle.entry(self.target).or_default();
            if idle.len() < MAX_IDLE {
                idle.push(Idle { connection, since: Instant::now() });
            }
        }
    }
}

impl Pool {
    /// A connection that is open already.
    pub fn take(self: &Arc<Self>, target: &Target) -> Option<Lease> {
        let sender = match target.settings.version {
            HttpVersion::Http1 => self.take_idle(target.id)?,
            HttpVersion::Http2 | HttpVersion::Grpc => self.share(target.id)?,
        };
        Some(Lease { pool: self.clone(), target: target.id, sender, is_kept: true })
    }

    /// The one that was used last: the others may become old.
    fn take_idle(&self, target: u64) -> Option<Sender> {
        let mut idle = lock(&self.idle);
        let idle = idle.get_mut(&target)?;
        while let Some(last) = idle.pop() {
            // One that is neither ready nor closed has its answer's last bytes behind it, but its
            // task did not yet run; it is ready in a moment.
            if !last.connection.sender.is_closed() {
                return Some(Sender::Http1(last.connection));
            }
        }
        None
    }

    fn share(&self, target: u64) -> Option<Sender> {
        let mut shared = lock(&self.shared);
        let shared = shared.get_mut(&target)?;
        shared.retain(|it| !it.sender.is_closed());
        let free = shared.iter_mut().find(|it| Arc::strong_count(&it.users) <= STREAMS)?;
        free.since = Instant::now();
        Some(Sender::Http2(free.sender.clone(), free.users.clone()))
    }

    /// A connection that was just opened.
    fn lease_http1(self: &Arc<Self>, target: u64, connection: Http1) -> Lease {
        Lease { pool: self.clone(), target, sender: Sender::Http1(connection), is_kept: true }
    }

    fn lease_http2(
        self: &Arc<Self>,
        target: u64,
        sender: http2::SendRequest<RequestBody>,
    ) -> Lease {
        let users = Arc::new(());
        lock(&self.shared).entry(target).or_default().push(Multiplexed {
            sender: sender.clone(),
            users: users.clone(),
            since: Instant::now(),
        });
        let sender = Sender::Http2(sender, users);
        Lease { pool: self.clone(), target, sender, is_kept: true }
    }

    /// Closes what nobody used for long, and forgets what is closed.
    pub fn sweep(&self, now: Instant) {
        let is_old = |since: Instant| now.saturating_duration_since(since) > KEEP;
        lock(&self.idle).retain(|_, idle| {
            idle.retain(|it| !it.connection.sender.is_closed() && !is_old(it.since));
            !idle.is_empty()
        });
        lock(&self.shared).retain(|_, shared| {
            shared.retain(|it| {
                let is_used = Arc::strong_count(&it.users) > 1;
                !it.sender.is_closed() && (is_used || !is_old(it.since))
            });
            !shared.is_empty()
        });
    }
}
