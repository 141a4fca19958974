//! Bodies on their way through: never copied, watched for their end.

use std::error::Error as _;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::Instant;

use super::errors::ElbError;
use super::exchange::Exchange;
use super::io::{Activity, InProgress, Upload};
use super::replay::Reader;
use super::upstream::Lease;

/// Bytes that a stream of HTTP/2 gets at a time: what a frame holds. A client that reads slowly takes
/// them one by one, and is seen to take them.
const PIECE: usize = 16 * 1024;

/// How far a request's body has come.
#[derive(Debug)]
pub struct Progress {
    began: Instant,
    last: AtomicU64,
    malformed: AtomicBool,
    cut: AtomicBool,
    too_large: AtomicBool,
    awaited: AtomicBool,
    bytes: AtomicU64,
}

impl Progress {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            last: AtomicU64::new(0),
            malformed: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            too_large: AtomicBool::new(false),
            awaited: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
        }
    }

    fn note(&self) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Relaxed);
    }

    /// When something of it last came, or it began.
    pub fn last(&self) -> Instant {
        self.began + Duration::from_millis(self.last.load(Relaxed))
    }

    /// Whether the target waits for more of it, which the client does not send.
    pub fn is_awaited(&self) -> bool {
        self.awaited.load(Relaxed)
    }

    /// What is wrong with it, if there is no more of it for that reason.
    pub fn failure(&self) -> Option<ElbError> {
        if self.too_large.load(Relaxed) {
            Some(ElbError::BodyTooLarge)
        } else if self.malformed.load(Relaxed) {
            Some(ElbError::BadRequest)
        } else {
            self.cut.load(Relaxed).then_some(ElbError::ClientClosed)
        }
    }

    fn note_failure(&self, error: &hyper::Error) {
        use std::io::ErrorKind::{InvalidData, InvalidInput};
        let cause = error.source().and_then(|it| it.downcast_ref::<std::io::Error>());
        let is_malformed = cause.is_some_and(|it| matches!(it.kind(), InvalidData | InvalidInput));
        let what = if is_malformed { &self.malformed } else { &self.cut };
        what.store(true, Relaxed);
    }

    /// It is sent again from its beginning.
    pub fn restart(&self) {
        self.bytes.store(0, Relaxed);
    }

    /// Bytes of it so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }
}

/// The body of a request to a target.
#[derive(Debug)]
pub enum RequestBody {
    /// None.
    Empty,
    /// As the client sends it.
    Client {
        /// What the client sends.
        source: Source,
        /// How far it has come.
        progress: Arc<Progress>,
        /// Bytes of it, at most.
        most: u64,
        /// Until it has ended.
        upload: Option<Upload>,
    },
}

/// Where a request's body comes from.
#[derive(Debug)]
pub enum Source {
    /// From the client.
    Client(Incoming),
    /// From the client, and kept so that it can be sent again.
    Kept(Reader),
}

impl Source {
    fn is_end_stream(&self) -> bool {
        match self {
            Self::Client(incoming) => incoming.is_end_stream(),
            Self::Kept(reader) => reader.is_end_stream(),
        }
    }
}

impl RequestBody {
    /// What the client sends over that connection, of at most so many bytes; kept, if it may have to
    /// be sent again.
    pub fn new(
        incoming: Incoming,
        most: Option<u64>,
        is_kept: bool,
        activity: &Arc<Activity>,
    ) -> (Self, Option<Arc<Progress>>) {
        if incoming.is_end_stream() {
            return (Self::Empty, None);
        }
        let progress = Arc::new(Progress::new());
        let most = most.unwrap_or(u64::MAX);
        let upload = Some(Upload::begin(activity));
        let source =
            if is_kept { Source::Kept(Reader::new(incoming)) } else { Source::Client(incoming) };
        (Self::Client { source, progress: progress.clone(), most, upload }, Some(progress))
    }
}

/// Why the rest of a request's body does not come.
#[derive(Debug)]
pub enum RequestBodyError {
    /// The client did not send it.
    Client(hyper::Error),
    /// It is larger than it may be.
    TooLarge,
    /// It is being sent again elsewhere.
    Replaced,
}

impl fmt::Display for RequestBodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(error) => error.fmt(f),
            Self::TooLarge => f.write_str("the body is larger than it may be"),
            Self::Replaced => f.write_str("the body is being sent again elsewhere"),
        }
    }
}

impl std::error::Error for RequestBodyError {}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = RequestBodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        let Self::Client { source, progress, most, upload } = self.get_mut() else {
            return Poll::Ready(None);
        };
        let frame = match source {
            Source::Client(incoming) => Pin::new(incoming)
                .poll_frame(cx)
                .map(|it| it.map(|it| it.map_err(RequestBodyError::Client))),
            Source::Kept(reader) => reader.poll_frame(cx),
        };
        progress.awaited.store(frame.is_pending(), Relaxed);
        let frame = ready!(frame);
        progress.note();
        if frame.is_none() || source.is_end_stream() {
            *upload = None;
        }
        match &frame {
            None => {}
            Some(Ok(frame)) => {
                let bytes = frame.data_ref().map_or(0, Bytes::len);
                let before = progress.bytes.fetch_add(bytes as u64, Relaxed);
                if before + bytes as u64 > *most {
                    progress.too_large.store(true, Relaxed);
                    return Poll::Ready(Some(Err(RequestBodyError::TooLarge)));
                }
            }
            Some(Err(RequestBodyError::Client(error))) => progress.note_failure(error),
            Some(Err(_)) => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Client { source, .. } => source.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Client { source: Source::Client(incoming), .. } => incoming.size_hint(),
            Self::Client { source: Source::Kept(reader), .. } => reader.size_hint(),
        }
    }
}

/// The body of an answer to a client.
#[derive(Debug)]
pub struct ResponseBody {
    content: Content,
    /// What is known of the request, until the answer has ended.
    exchange: Option<Box<Exchange>>,
    in_progress: Option<InProgress>,
}

#[derive(Debug)]
enum Content {
    /// Ours.
    Own(Bytes),
    /// A target's, with the connection that it comes over.
    Target {
        incoming: Incoming,
        lease: Option<Lease>,
        /// What came and was not taken yet.
        rest: Bytes,
    },
}

impl ResponseBody {
    /// Of our own.
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        Self { content: Content::Own(bytes.into()), exchange: None, in_progress: None }
    }

    /// As a target sends it. The connection is free again when it has ended, unless it `is_alone`.
    pub fn target(incoming: Incoming, mut lease: Lease, is_alone: bool) -> Self {
        lease.is_kept &= !is_alone;
        let mut lease = Some(lease);
        if incoming.is_end_stream()
            && let Some(lease) = lease.take()
        {
            lease.give_back();
        }
        let content = Content::Target { incoming, lease, rest: Bytes::new() };
        Self { content, exchange: None, in_progress: None }
    }

    /// Takes out what is ours, where there may be none. How long it was.
    pub fn take_own(&mut self) -> usize {
        match &mut self.content {
            Content::Own(bytes) => std::mem::take(bytes).len(),
            Content::Target { .. } => 0,
        }
    }

    /// With what is to be noted when it has ended.
    pub fn with(mut self, exchange: Box<Exchange>, in_progress: InProgress) -> Self {
        self.exchange = Some(exchange);
        self.in_progress = Some(in_progress);
        self
    }
}

impl Content {
    fn end(&mut self) {
        if let Self::Target { lease, .. } = self
            && let Some(lease) = lease.take()
        {
            lease.give_back();
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        let frame = match &mut this.content {
            Content::Own(bytes) if bytes.is_empty() => None,
            Content::Own(bytes) => Some(Ok(Frame::data(std::mem::take(bytes)))),
            Content::Target { rest, .. } if !rest.is_empty() => Some(Ok(piece(rest))),
            Content::Target { incoming, rest, .. } => {
                let frame = ready!(Pin::new(&mut *incoming).poll_frame(cx));
                let is_end = frame.is_none() || incoming.is_end_stream();
                let is_stream = this.in_progress.as_ref().is_some_and(InProgress::is_stream);
                let frame = match frame {
                    Some(Ok(frame)) if is_stream => Some(Ok(match frame.into_data() {
                        Ok(data) => {
                            *rest = data;
                            piece(rest)
                        }
                        Err(frame) => frame,
                    })),
                    frame => frame,
                };
                if is_end {
                    this.content.end();
                }
                frame
            }
        };
        if let (Some(exchange), Some(Ok(frame))) = (&mut this.exchange, &frame) {
            exchange.sent(frame.data_ref().map_or(0, Bytes::len));
        }
        if let Some(in_progress) = &this.in_progress {
            in_progress.progress();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Own(bytes) => bytes.is_empty(),
            Content::Target { incoming, rest, .. } => rest.is_empty() && incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Own(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::Target { incoming, rest, .. } => {
                let mut hint = incoming.size_hint();
                let waiting = rest.len() as u64;
                if let Some(upper) = hint.upper() {
                    hint.set_upper(upper.saturating_add(waiting));
                }
                hint.set_lower(hint.lower().saturating_add(waiting));
                hint
            }
        }
    }
}

/// The next piece of what waits.
fn piece(rest: &mut Bytes) -> Frame<Bytes> {
    Frame::data(rest.split_to(rest.len().min(PIECE)))
}
