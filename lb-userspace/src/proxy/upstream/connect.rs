//! Opens connections to targets.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use nix::errno::Errno;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::super::buffer;
use super::super::counters::Metric;
use super::super::descriptors::{self, Descriptors};
use super::super::table::{LoadBalancer, Target};
use super::super::tls;
use super::counted::{CountedStream, Patience};
use super::{Http1, Lease, Pool};
use crate::config::model::{HttpVersion, TargetProtocol};
use crate::proxy_protocol;

/// How long a connection to a target may take, with its TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of an answer's head, at most.
const MAX_HEAD: usize = 64 * 1024;

/// Window of an HTTP/2 stream, and of a connection, in bytes.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// Why there is no connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectError {
    /// It took too long.
    Timeout,
    /// The target, or the network, refused it.
    Refused,
    /// This process has no descriptor for it.
    NoDescriptors,
}

/// A connection to a target.
#[derive(Debug)]
pub enum TargetStream {
    /// As it is.
    Plain(CountedStream),
    /// In TLS.
    Tls(Box<TlsStream<CountedStream>>),
}

/// Opens connections for one thread.
#[derive(Debug)]
pub struct Connector {
    http1: Arc<ClientConfig>,
    http2: Arc<ClientConfig>,
    any: Arc<ClientConfig>,
    worker: usize,
    descriptors: Descriptors,
    /// How many connections of clients the thread has.
    clients: watch::Receiver<usize>,
}

impl Connector {
    /// For the thread of that number.
    pub fn new(worker: usize, descriptors: Descriptors, clients: watch::Receiver<usize>) -> Self {
        Self {
            http1: tls::towards_targets(&[b"http/1.1"]),
            http2: tls::towards_targets(&[b"h2"]),
            any: tls::towards_targets(&[]),
            worker,
            descriptors,
            clients,
        }
    }

    /// A connection for HTTP, opened for a request of this load balancer.
    pub async fn http(
        &self,
        pool: &Arc<Pool>,
        target: &Arc<Target>,
        load_balancer: &Arc<LoadBalancer>,
    ) -> Result<Lease, ConnectError> {
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let config = match target.settings.version {
            HttpVersion::Http1 => &self.http1,
            HttpVersion::Http2 | HttpVersion::Grpc => &self.http2,
        };
        let buffer = buffer(*self.clients.borrow());
        let opened = async {
            match self.open(target, load_balancer, config, None).await? {
                TargetStream::Plain(stream) => {
                    let patience = stream.patience();
                    handshake(stream, (patience, buffer), pool, target).await
                }
                TargetStream::Tls(stream) => {
                    let patience = stream.get_ref().0.patience();
                    handshake(*stream, (patience, buffer), pool, target).await
                }
            }
        };
        self.within(deadline, target, load_balancer, opened).await
    }

    /// A connection for whatever is in it. `ends`: the client's address and the one it connected
    /// to, for targets that are told.
    pub async fn raw(
        &self,
        target: &Arc<Target>,
        load_balancer: &Arc<LoadBalancer>,
        ends: (SocketAddr, SocketAddr),
    ) -> Result<TargetStream, ConnectError> {
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let ends = target.settings.proxy_protocol_v2.then_some(ends);
        let opened = self.open(target, load_balancer, &self.any, ends);
        self.within(deadline, target, load_balancer, opened).await
    }

    async fn within<T>(
        &self,
        deadline: Instant,
        target: &Target,
        load_balancer: &LoadBalancer,
        opening: impl Future<Output = io::Result<T>>,
    ) -> Result<T, ConnectError> {
        let opened = match timeout_at(deadline, opening).await {
            Ok(Ok(opened)) => return Ok(opened),
            Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => ConnectError::Timeout,
            // No fault of the target.
            Ok(Err(error)) if descriptors::are_exhausted(&error) => {
                return Err(ConnectError::NoDescriptors);
            }
            Ok(Err(error)) => {
                tracing::debug!(target = %target.address, %error, "no connection");
                ConnectError::Refused
            }
            Err(_) => ConnectError::Timeout,
        };
        self.count(target, load_balancer, Metric::TargetConnectionErrors);
        Err(opened)
    }

    fn count(&self, target: &Target, load_balancer: &LoadBalancer, metric: Metric) {
        for counters in [&target.counters, &load_balancer.counters] {
            counters.count(self.worker, metric);
        }
    }

    async fn open(
        &self,
        target: &Target,
        load_balancer: &Arc<LoadBalancer>,
        config: &Arc<ClientConfig>,
        ends: Option<(SocketAddr, SocketAddr)>,
    ) -> io::Result<TargetStream> {
        let stream = TcpStream::connect(target.address).await?;
        if !self.descriptors.has_room_for_target(stream.as_raw_fd()) {
            return Err(Errno::EMFILE.into());
        }
        stream.set_nodelay(true)?;
        let mut stream = CountedStream::new(stream, load_balancer.clone(), self.worker);
        if let Some((client, listener)) = ends {
            stream.write_all(&proxy_protocol::header(client, listener)).await?;
        }
        match target.settings.protocol {
            TargetProtocol::Tcp | TargetProtocol::Http => Ok(TargetStream::Plain(stream)),
            TargetProtocol::Tls | TargetProtocol::Https => {
                let name = ServerName::IpAddress(target.address.ip().into());
                let stream = TlsConnector::from(config.clone())
                    .connect(name, stream)
                    .await
                    .inspect_err(|_| {
                        self.count(target, load_balancer, Metric::TargetTlsErrors);
                    })?;
                Ok(TargetStream::Tls(Box::new(stream)))
            }
        }
    }
}

/// Begins HTTP on a connection. Its bytes are moved by a task that ends with the target.
async fn handshake<S>(
    stream: S,
    (patience, buffer): (Arc<Patience>, usize),
    pool: &Arc<Pool>,
    target: &Arc<Target>,
) -> io::Result<Lease>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let io = TokioIo::new(stream);
    match target.settings.version {
        HttpVersion::Http1 => {
            let (sender, connection) = http1::Builder::new()
                .max_buf_size(buffer)
                .max_header_size(MAX_HEAD)
                .title_case_headers(true)
                .handshake(io)
                .await
                .map_err(io::Error::other)?;
            drive(connection.with_upgrades(), target);
            Ok(pool.lease_http1(target.id, Http1 { sender, patience }))
        }
        HttpVersion::Http2 | HttpVersion::Grpc => {
            let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
                .handshake(io)
                .await
                .map_err(io::Error::other)?;
            drive(connection, target);
            Ok(pool.lease_http2(target.id, sender))
        }
    }
}

fn drive(
    connection: impl Future<Output = hyper::Result<()>> + Send + 'static,
    target: &Arc<Target>,
) {
    let gone = target.gone();
    let address = target.address;
    tokio::spawn(async move {
        tokio::select! {
            ended = connection => if let Err(error) = ended {
                tracing::debug!(target = %address, %error, "connection to a target failed");
            },
            () = gone => {}
        }
    });
}
