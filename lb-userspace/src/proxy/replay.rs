//! Request bodies that are kept while they pass, as far as they are small: a target of HTTP/2 may
//! say that it did nothing about a request (RFC 9113 section 8.7), which then goes elsewhere from
//! its beginning.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};

use super::body::RequestBodyError;

/// Bytes of a body that are kept, at most. A larger one cannot be sent again once it has passed so
/// far.
const MOST: usize = 64 * 1024;

#[derive(Debug)]
struct Kept {
    incoming: Incoming,
    frames: Vec<Bytes>,
    bytes: usize,
    /// Whether all that has been read of it is in `frames`.
    is_whole: bool,
    /// Who reads it: those of before may not any more.
    reader: u32,
}

impl Kept {
    fn forget(&mut self) {
        self.is_whole = false;
        self.frames = Vec::new();
    }

    fn keep(&mut self, frame: &Frame<Bytes>) {
        match frame.data_ref() {
            Some(data) if self.is_whole && self.bytes + data.len() <= MOST => {
                self.bytes += data.len();
                self.frames.push(data.clone());
            }
            _ => self.forget(),
        }
    }
}

/// Reads a body.
#[derive(Debug)]
pub struct Reader {
    kept: Arc<Mutex<Kept>>,
    number: u32,
    /// The next of those that are kept; counts the others, too.
    next: usize,
}

/// Reads a body again.
#[derive(Debug)]
pub struct Replay(Arc<Mutex<Kept>>);

fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reader {
    /// The first of what a client sends.
    pub fn new(incoming: Incoming) -> Self {
        let kept = Kept { incoming, frames: Vec::new(), bytes: 0, is_whole: true, reader: 0 };
        Self { kept: Arc::new(Mutex::new(kept)), number: 0, next: 0 }
    }

    /// What can read it again.
    pub fn replay(&self) -> Replay {
        Replay(self.kept.clone())
    }

    /// The next frame.
    pub fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        let mut kept = lock(&self.kept);
        if kept.reader != self.number {
            return Poll::Ready(Some(Err(RequestBodyError::Replaced)));
        }
        if let Some(frame) = kept.frames.get(self.next) {
            self.next += 1;
            return Poll::Ready(Some(Ok(Frame::data(frame.clone()))));
        }
        let frame = ready!(Pin::new(&mut kept.incoming).poll_frame(cx));
        self.next += 1;
        if let Some(Ok(frame)) = &frame {
            kept.keep(frame);
        }
        Poll::Ready(frame.map(|frame| frame.map_err(RequestBodyError::Client)))
    }

    /// Whether it has ended.
    pub fn is_end_stream(&self) -> bool {
        let kept = lock(&self.kept);
        self.next >= kept.frames.len() && kept.incoming.is_end_stream()
    }

    /// What is left of it.
    pub fn size_hint(&self) -> SizeHint {
        let kept = lock(&self.kept);
        let again: u64 = kept.frames.iter().skip(self.next).map(|it| it.len() as u64).sum();
        let mut hint = kept.incoming.size_hint();
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper.saturating_add(again));
        }
        hint.set_lower(hint.lower().saturating_add(again));
        hint
    }
}

impl Replay {
    /// Reads it from its beginning, if all of that is still there. Nobody else reads it any more.
    pub fn reader(&self) -> Option<Reader> {
        let mut kept = lock(&self.0);
        if !kept.is_whole {
            return None;
        }
        kept.reader += 1;
        Some(Reader { kept: self.0.clone(), number: kept.reader, next: 0 })
    }

    /// It is not needed again.
    pub fn forget(&self) {
        lock(&self.0).forget();
    }
}
