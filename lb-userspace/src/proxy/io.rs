//! What a client's connection is read from and written to, with an eye on when that happened.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::connection::MAX_HEAD;
use super::counters::Metric;
use super::errors::ElbError;
use super::streams::Stream;
use super::table::LoadBalancer;

/// Bytes of the HTTP library's own answers, at most.
const LONGEST_REFUSAL: usize = 256;

/// Bytes of a request that are read before there is a buffer.
const FIRST: usize = 1024;

/// What happened on a client's connection. Atomics, because hyper wants to send tasks to other
/// threads; it is one thread that uses it.
#[derive(Debug)]
pub struct Activity {
    epoch: Instant,
    /// Milliseconds since the epoch when a byte last came or went.
    last: AtomicU64,
    /// Milliseconds since the epoch, plus one, when the first byte came after the last answer; 0:
    /// none did.
    head_began: AtomicU64,
    /// Bytes from the client.
    read: AtomicU64,
    /// Bytes to the client.
    written: AtomicU64,
    /// Requests whose answer has not ended.
    requests: AtomicU32,
    /// Of these, those whose answer has not begun.
    awaiting: AtomicU32,
    /// Requests' bodies that have not ended.
    uploads: AtomicU32,
    /// Whether bytes wait here to be written.
    is_unflushed: AtomicBool,
    /// Whose bytes they are, and the thread that counts them.
    load_balancer: Arc<LoadBalancer>,
    worker: usize,
}

/// What a client's connection waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// A request, for so long.
    Request(Duration),
    /// The rest of a request's head, which began so long ago.
    Head(Duration),
    /// An answer of a target.
    Answer,
    /// The rest of an answer or of a request's body; no byte came or went for so long.
    Rest(Duration),
}

impl Activity {
    /// Of a connection that begins now.
    pub fn new(load_balancer: Arc<LoadBalancer>, worker: usize) -> Arc<Self> {
        Arc::new(Self {
            epoch: Instant::now(),
            last: AtomicU64::new(0),
            head_began: AtomicU64::new(0),
            read: AtomicU64::new(0),
            written: AtomicU64::new(0),
            requests: AtomicU32::new(0),
            awaiting: AtomicU32::new(0),
            uploads: AtomicU32::new(0),
            is_unflushed: AtomicBool::new(false),
            load_balancer,
            worker,
        })
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether what comes next is the beginning of a request's head.
    fn is_between_requests(&self) -> bool {
        self.is_without_request() && self.head_began.load(Relaxed) == 0
    }

    /// Whether there is no request, and no rest of one that was answered before its end.
    fn is_without_request(&self) -> bool {
        self.requests.load(Relaxed) == 0 && self.uploads.load(Relaxed) == 0
    }

    /// Whether a head has begun and not ended.
    pub fn is_in_head(&self) -> bool {
        self.head_began.load(Relaxed) > 0
    }

    fn note_read(&self, bytes: usize) {
        let now = self.now();
        self.last.store(now, Relaxed);
        self.read.fetch_add(bytes as u64, Relaxed);
        self.count(bytes);
        if self.is_between_requests() {
            self.head_began.store(now + 1, Relaxed);
        }
    }

    fn note_written(&self, bytes: usize) {
        self.last.store(self.now(), Relaxed);
        self.written.fetch_add(bytes as u64, Relaxed);
        self.count(bytes);
    }

    fn count(&self, bytes: usize) {
        self.load_balancer.counters.add(self.worker, Metric::ProcessedBytes, bytes as u64);
    }

    /// Bytes that came, and bytes that went.
    pub fn bytes(&self) -> (u64, u64) {
        (self.read.load(Relaxed), self.written.load(Relaxed))
    }

    /// How long ago the connection began.
    pub fn age(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// How long no byte has come or gone.
    pub fn silent_for(&self) -> Duration {
        Duration::from_millis(self.now().saturating_sub(self.last.load(Relaxed)))
    }

    /// What it waits for, now.
    pub fn waiting(&self) -> Waiting {
        let now = self.now();
        let since = |then: u64| Duration::from_millis(now.saturating_sub(then));
        if self.awaiting.load(Relaxed) > 0 {
            return Waiting::Answer;
        }
        if !self.is_without_request() || self.is_unflushed.load(Relaxed) {
            return Waiting::Rest(since(self.last.load(Relaxed)));
        }
        match self.head_began.load(Relaxed) {
            0 => Waiting::Request(since(self.last.load(Relaxed))),
            began => Waiting::Head(since(began - 1)),
        }
    }
}

/// A request in progress. Where it is dropped, the request has ended.
#[derive(Debug)]
pub struct InProgress {
    activity: Arc<Activity>,
    awaits: bool,
    /// Of HTTP/2.
    stream: Option<Arc<Stream>>,
}

impl InProgress {
    /// A request has come.
    pub fn begin(activity: &Arc<Activity>) -> Self {
        activity.requests.fetch_add(1, Relaxed);
        activity.awaiting.fetch_add(1, Relaxed);
        activity.head_began.store(0, Relaxed);
        Self { activity: activity.clone(), awaits: true, stream: Stream::current() }
    }

    /// Its answer begins.
    pub fn answered(&mut self) {
        if std::mem::take(&mut self.awaits) {
            self.activity.last.store(self.activity.now(), Relaxed);
            self.activity.awaiting.fetch_sub(1, Relaxed);
            if let Some(stream) = &self.stream {
                stream.answered();
            }
        }
    }

    /// Whether others share its connection.
    pub fn is_stream(&self) -> bool {
        self.stream.is_some()
    }

    /// A part of its answer was taken.
    pub fn progress(&self) {
        if let Some(stream) = &self.stream {
            stream.progress();
        }
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        self.answered();
        self.activity.requests.fetch_sub(1, Relaxed);
    }
}

/// A request's body that has not ended.
#[derive(Debug)]
pub struct Upload(Arc<Activity>);

impl Upload {
    /// One begins.
    pub fn begin(activity: &Arc<Activity>) -> Self {
        activity.uploads.fetch_add(1, Relaxed);
        Self(activity.clone())
    }
}

impl Clone for Upload {
    fn clone(&self) -> Self {
        Self::begin(&self.0)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.0.uploads.fetch_sub(1, Relaxed);
    }
}

/// A stream whose activity is noted, and of which some bytes have been read already.
#[derive(Debug)]
pub struct Watched<S> {
    stream: S,
    /// Read before the rest.
    first: Bytes,
    activity: Arc<Activity>,
    /// What has come of a request's head, so that an error in it can be named.
    head: Vec<u8>,
    refusal: Option<Refusal>,
}

/// What a client is told instead of what the HTTP library would say.
#[derive(Debug)]
struct Refusal {
    error: ElbError,
    left: Bytes,
}

impl<S> Watched<S> {
    /// Reads `first`, then from `stream`.
    pub fn new(stream: S, first: Bytes, activity: Arc<Activity>) -> Self {
        if !first.is_empty() {
            activity.note_read(first.len());
        }
        Self { stream, first, activity, head: Vec::new(), refusal: None }
    }

    /// What the client was told, if its request could not be read.
    pub fn refusal(&self) -> Option<ElbError> {
        self.refusal.as_ref().map(|it| it.error)
    }

    /// Bytes of the head that has begun.
    pub fn head_size(&self) -> usize {
        self.head.len()
    }

    fn note_head(&mut self, bytes: &[u8]) {
        if self.activity.requests.load(Relaxed) > 0 {
            self.head.clear();
        } else if self.head.len() < MAX_HEAD {
            self.head.extend_from_slice(bytes);
        }
    }

    /// The HTTP library answers by itself where a head cannot be read. That answer is told from
    /// others by its place, before any request of the head that has begun, and by being whole.
    fn is_refused(&self, bytes: &[u8]) -> bool {
        const STATUS: [&[u8]; 3] = [b"HTTP/1.1 400 ", b"HTTP/1.1 414 ", b"HTTP/1.1 431 "];
        self.refusal.is_none()
            && STATUS.iter().any(|status| bytes.starts_with(status))
            && bytes.ends_with(b"\r\n\r\n")
            && bytes.len() < LONGEST_REFUSAL
            && self.activity.requests.load(Relaxed) == 0
            && self.activity.head_began.load(Relaxed) > 0
    }

    fn refuse(&mut self, bytes: &[u8]) {
        let is_long = bytes.starts_with(b"HTTP/1.1 414 ");
        let error = if is_long { ElbError::UriTooLong } else { ElbError::of_head(&self.head) };
        self.refusal = Some(Refusal { error, left: error.bytes().into() });
    }

    /// Goes on without buffers, after what the HTTP library has read and not used.
    pub fn rest(&mut self, unused: &[u8]) {
        self.head = Vec::new();
        if !unused.is_empty() && self.activity.is_between_requests() {
            self.activity.head_began.store(self.activity.now() + 1, Relaxed);
        }
        // A copy: what it is part of may be large.
        self.unread(Bytes::copy_from_slice(unused));
    }

    /// Reads `bytes` before everything else.
    pub fn unread(&mut self, bytes: Bytes) {
        if self.first.is_empty() {
            self.first = bytes;
        } else if !bytes.is_empty() {
            self.first = [bytes, std::mem::take(&mut self.first)].concat().into();
        }
    }
}

impl<S: AsyncRead + Unpin> Watched<S> {
    /// Waits for bytes, without a buffer that waits for them. Whether some came.
    pub async fn next_bytes(&mut self) -> bool {
        let read = |cx: &mut Context<'_>| {
            if !self.first.is_empty() {
                return Poll::Ready(true);
            }
            let mut bytes = [0; FIRST];
            let mut bytes = ReadBuf::new(&mut bytes);
            let read = ready!(Pin::new(&mut self.stream).poll_read(cx, &mut bytes));
            let bytes = bytes.filled();
            if read.is_err() || bytes.is_empty() {
                return Poll::Ready(false);
            }
            self.activity.note_read(bytes.len());
            self.first = Bytes::copy_from_slice(bytes);
            Poll::Ready(true)
        };
        poll_fn(read).await
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.first.is_empty() {
            let n = self.first.len().min(buf.remaining());
            let first = self.first.split_to(n);
            buf.put_slice(&first);
            self.note_head(&first);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        let read = buf.filled().len() - before;
        if read > 0 {
            if self.activity.is_between_requests() {
                self.head.clear();
            }
            self.activity.note_read(read);
            self.note_head(&buf.filled()[before..]);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> Watched<S> {
    fn poll_refusal(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(refusal) = &mut self.refusal else { return Poll::Ready(Ok(())) };
        while !refusal.left.is_empty() {
            let n = ready!(Pin::new(&mut self.stream).poll_write(cx, &refusal.left))?;
            refusal.left.advance(n);
            self.activity.note_written(n);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.is_refused(bytes) {
            self.refuse(bytes);
        }
        if self.refusal.is_some() {
            ready!(self.poll_refusal(cx))?;
            return Poll::Ready(Ok(bytes.len()));
        }
        self.activity.is_unflushed.store(true, Relaxed);
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        self.activity.note_written(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [bytes] = bytes
            && self.is_refused(bytes)
        {
            self.refuse(bytes);
        }
        if self.refusal.is_some() {
            ready!(self.poll_refusal(cx))?;
            return Poll::Ready(Ok(bytes.iter().map(|it| it.len()).sum()));
        }
        self.activity.is_unflushed.store(true, Relaxed);
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bytes))?;
        self.activity.note_written(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The HTTP library flushes when it has nothing left to write.
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.activity.is_unflushed.store(false, Relaxed);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
