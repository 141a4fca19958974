//! Connections to targets, counted for the load balancer that opened them.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

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
}

impl CountedStream {
    /// A connection that was just opened.
    pub fn new(stream: TcpStream, load_balancer: Arc<LoadBalancer>, worker: usize) -> Self {
        load_balancer.counters.count(worker, Metric::NewConnections);
        load_balancer.counters.count(worker, Metric::ActiveConnections);
        Self { stream, load_balancer, worker }
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
        Pin::new(&mut self.stream).poll_read(cx, buf)
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
