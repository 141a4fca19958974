//! The streams of an HTTP/2 connection: one that stalls ends alone.
//!
//! The HTTP library runs each stream as a task, which it gives to an executor. Ours watches them:
//! dropping a stream's task resets the stream (RST_STREAM), and nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use hyper::rt::Executor;
use tokio::time::{Instant, sleep_until};

use super::table::Listener;

tokio::task_local! {
    static STREAM: Arc<Stream>;
}

/// How far a stream's answer has come.
#[derive(Debug)]
pub struct Stream {
    began: Instant,
    /// Milliseconds since it began when something of the answer last went on.
    last: AtomicU64,
    /// Whether the answer has begun; before, whoever waits for it has a timer of his own.
    is_answered: AtomicBool,
}

impl Stream {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            began: Instant::now(),
            last: AtomicU64::new(0),
            is_answered: AtomicBool::new(false),
        })
    }

    /// The stream whose task this is called in, if it is one's.
    pub fn current() -> Option<Arc<Self>> {
        STREAM.try_with(Arc::clone).ok()
    }

    /// The answer begins.
    pub fn answered(&self) {
        self.progress();
        self.is_answered.store(true, Relaxed);
    }

    /// Something of the answer was taken.
    pub fn progress(&self) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Relaxed);
    }

    /// Resolves when nothing of the answer came or went for so long.
    async fn stalled(&self, idle_timeout: Duration) {
        loop {
            let last = if self.is_answered.load(Relaxed) {
                self.began + Duration::from_millis(self.last.load(Relaxed))
            } else {
                Instant::now()
            };
            let deadline = last + idle_timeout;
            if deadline <= Instant::now() {
                return;
            }
            sleep_until(deadline).await;
        }
    }
}

/// Runs the streams of one connection.
#[derive(Debug, Clone)]
pub struct Streams {
    /// Which says how long a stream may stall.
    pub listener: Arc<Listener>,
}

impl<F> Executor<F> for Streams
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, future: F) {
        let idle_timeout = self.listener.current.load().route.attributes.idle_timeout;
        let stream = Stream::new();
        let watched = stream.clone();
        tokio::spawn(STREAM.scope(stream, async move {
            tokio::select! {
                biased;
                _ = future => {}
                () = watched.stalled(idle_timeout) => {
                    tracing::debug!("a stream of HTTP/2 stalled");
                }
            }
        }));
    }
}
