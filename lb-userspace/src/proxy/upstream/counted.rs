//! Connections to targets, counted for the load balancer that opened them.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::super::counters::Metric;
use super::super::table::LoadBalancer;

/// A connection that is among the active ones until it is dropped, whoever holds it then: a pool,
/// a request, a tunnel.
#[derive(Debug)]
pub struct CountedStream {
    stream: TcpStream,
    load_balancer: Arc<LoadBalancer>,
    worker: usize,
    patience: Arc<Patience>,
}

/// How much a target may still say before its answer begins. It may say 1xx as often as it likes:
/// one that does so for ever would keep its thread busy with nothing.
#[derive(Debug)]
pub struct Patience(AtomicU64);

impl Patience {
    /// Bytes: far more than the largest head, as the library reads on into the body.
    const BYTES: u64 = 1024 * 1024;

    /// A request is sent.
    pub fn begin(&self) {
        self.0.store(Self::BYTES, Relaxed);
    }

    /// The answer has begun; what follows comes as fast as it is taken.
    pub fn end(&self) {
        self.0.store(u64::MAX, Relaxed);
    }

    fn has_ended(&self) -> bool {
        self.0.load(Relaxed) == 0
    }

    fn spend(&self, bytes: usize) {
        let left = self.0.load(Relaxed);
        if left < u64::MAX {
            self.0.store(left.saturating_sub(bytes as u64), Relaxed);
        }
    }
}

impl CountedStream {
    /// A connection that was just opened.
    pub fn new(stream: TcpStream, load_balancer: Arc<LoadBalancer>, worker: usize) -> Self {
        load_balancer.counters.count(worker, Metric::NewConnections);
        load_balancer.counters.count(worker, Metric::ActiveConnections);
        let patience = Arc::new(Patience(AtomicU64::new(u64::MAX)));
        Self { stream, load_balancer, worker, patience }
    }

    /// How much the target may still say.
    pub fn patience(&self) -> Arc<Patience> {
        self.patience.clone()
    }
}

impl Drop for CountedStream {
    fn drop(&mut self) {
        self.load_balancer.counters.uncount(self.worker, Metric::ActiveConnections);
    }
}

impl AsyncRead for CountedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.patience.has_ended() {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the target says too much before its answer",
            )));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.patience.spend(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for CountedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
