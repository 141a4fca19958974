//! One client's connection, from its first byte to its last.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;

use super::counters::Metric;
use super::errors::ElbError;
use super::exchange;
use super::headers::Told;
use super::io::{Activity, Waiting, Watched};
use super::listener::{FAREWELL, LINGERING, farewell, linger, read_to_end};
use super::request;
use super::streams::Streams;
use super::table::{Listener, Served};
use super::tunnel::{self, Upgrade};
use super::watchdog::{Overdue, Watchdog};
use super::worker::Worker;
use crate::config::model::{Attributes, ProxyProtocol};

/// How long a TLS handshake may take.
pub const HANDSHAKE: Duration = Duration::from_secs(10);

/// Bytes of a request's head, at most.
pub const MAX_HEAD: usize = 64 * 1024;

/// What a client sends first that knows that HTTP/2 is spoken (RFC 9113 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Requests at a time on one HTTP/2 connection, as on AWS.
const STREAMS: u32 = 128;

/// Windows of HTTP/2 towards clients, in bytes: what may wait here for a slow target.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;

/// What the requests of a connection have in common.
#[derive(Debug)]
pub struct Connection {
    /// The thread that serves it.
    pub worker: Arc<Worker>,
    /// Where it came.
    pub listener: Arc<Listener>,
    /// The client.
    pub peer: SocketAddr,
    /// Where the client connected to.
    pub local: SocketAddr,
    /// What targets are told of it.
    pub told: Told,
    /// For connections in TLS.
    pub tls: Option<Tls>,
    /// Random, for access logs.
    pub id: u64,
    /// What happens on it.
    pub activity: Arc<Activity>,
    /// Set by a request after whose answer the connection becomes a tunnel.
    pub upgrade: Mutex<Option<Upgrade>>,
    /// Whether the client may still be sending the request that was answered last.
    pub lingers: AtomicBool,
    /// Whether it is as old as it may become: the next answer is its last.
    pub is_old: AtomicBool,
}

impl Connection {
    /// One that has been accepted; `None` if the client is gone.
    pub fn accepted(
        worker: &Arc<Worker>,
        listener: &Arc<Listener>,
        served: &Served,
        stream: &TcpStream,
        peer: SocketAddr,
    ) -> Option<Self> {
        Some(Self {
            worker: worker.clone(),
            listener: listener.clone(),
            peer,
            local: stream.local_addr().ok()?,
            told: Told::new(peer, served.route.listener.port),
            tls: None,
            id: rand::random(),
            activity: Activity::new(served.load_balancer.clone(), worker.index),
            upgrade: Mutex::new(None),
            lingers: AtomicBool::new(false),
            is_old: AtomicBool::new(false),
        })
    }
}

/// What a client's TLS handshake settled.
#[derive(Debug, Clone)]
pub struct Tls {
    /// Such as `TLSv1.3`.
    pub version: &'static str,
    /// By OpenSSL's name for TLS 1.2, by the standard's for TLS 1.3.
    pub cipher_suite: String,
    /// The name that the client asked for.
    pub server_name: Option<String>,
    /// The protocol that was agreed on.
    pub alpn: Option<String>,
    /// How long the handshake took.
    pub handshake: Duration,
}

/// Serves a connection until it ends.
pub async fn serve(
    worker: &Arc<Worker>,
    listener: &Arc<Listener>,
    served: Arc<Served>,
    stream: TcpStream,
    peer: SocketAddr,
) {
    // The socket inherits it from the one that listens; elsewhere it is harmless.
    let _ = stream.set_nodelay(true);
    let Some(connection) = Connection::accepted(worker, listener, &served, &stream, peer) else {
        return;
    };
    let attributes = served.route.attributes.clone();
    // On the heap is what only some connections need: most are idle most of the time.
    match (&served.tls, served.route.listener.protocol) {
        (None, _) => plain(connection, &attributes, stream).await,
        (Some(tls), ProxyProtocol::Tls) => {
            Box::pin(tunnel::serve(connection, &served, tls.server.clone(), stream)).await;
        }
        (Some(tls), _) => {
            let began = Instant::now();
            let handshake = Box::pin(TlsAcceptor::from(tls.server.clone()).accept(stream));
            let Ok(Ok(stream)) = timeout(HANDSHAKE, handshake).await else {
                served.load_balancer.counters.count(worker.index, Metric::ClientTlsErrors);
                return;
            };
            let tls = Tls::of(stream.get_ref().1, began.elapsed());
            let is_http2 = tls.alpn.as_deref() == Some("h2");
            let connection = Arc::new(Connection { tls: Some(tls), ..connection });
            if is_http2 {
                Box::pin(http2(connection, stream, Bytes::new())).await;
            } else {
                let stream = Watched::new(stream, Bytes::new(), connection.activity.clone());
                http1(connection, stream).await;
            }
        }
    }
}

impl Connection {
    /// What holds for it now.
    fn attributes(&self) -> Arc<Attributes> {
        self.listener.current.load().route.attributes.clone()
    }

    /// It ends. Between requests nothing can be on its way that the client must be read for.
    fn ends_between_requests(&self) {
        if matches!(self.activity.waiting(), Waiting::Request(_)) {
            self.lingers.store(false, Relaxed);
        }
    }
}

impl Tls {
    /// Of a handshake that took so long.
    pub fn of(session: &rustls::ServerConnection, handshake: Duration) -> Self {
        let version = match session.protocol_version() {
            Some(rustls::ProtocolVersion::TLSv1_2) => "TLSv1.2",
            _ => "TLSv1.3",
        };
        let suite = session.negotiated_cipher_suite().map(|it| it.suite());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            version,
            cipher_suite: suite.map(cipher_suite_name).unwrap_or_default(),
            server_name: session.server_name().map(str::to_owned),
            alpn: session.alpn_protocol().map(text),
            handshake,
        }
    }
}

/// AWS writes TLS 1.3's suites as the standard does, and TLS 1.2's as OpenSSL does.
fn cipher_suite_name(suite: rustls::CipherSuite) -> String {
    use rustls::CipherSuite as S;
    match suite {
        S::TLS13_AES_128_GCM_SHA256 => "TLS_AES_128_GCM_SHA256".to_owned(),
        S::TLS13_AES_256_GCM_SHA384 => "TLS_AES_256_GCM_SHA384".to_owned(),
        S::TLS13_CHACHA20_POLY1305_SHA256 => "TLS_CHACHA20_POLY1305_SHA256".to_owned(),
        S::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 => "ECDHE-ECDSA-AES128-GCM-SHA256".to_owned(),
        S::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 => "ECDHE-ECDSA-AES256-GCM-SHA384".to_owned(),
        S::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => "ECDHE-RSA-AES128-GCM-SHA256".to_owned(),
        S::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => "ECDHE-RSA-AES256-GCM-SHA384".to_owned(),
        other => format!("{other:?}"),
    }
}

/// HTTP without TLS: which version is seen from the first bytes.
async fn plain(connection: Connection, attributes: &Attributes, mut stream: TcpStream) {
    let first = tokio::select! {
        first = first_bytes(&mut stream, attributes.idle_timeout) => first,
        () = connection.listener.closed() => return,
    };
    let (first, is_http2) = match first {
        First::Version { first, is_http2 } => (first, is_http2),
        First::None => return,
        First::Cut(received) => {
            exchange::note_refused(&connection, ElbError::ClientClosed, received);
            return;
        }
        First::Late(received) => {
            refuse(&connection, stream, ElbError::RequestTimeout, received).await;
            return;
        }
    };
    let connection = Arc::new(connection);
    if is_http2 && attributes.http2 {
        Box::pin(http2(connection, stream, first)).await;
    } else {
        let stream = Watched::new(stream, first, connection.activity.clone());
        http1(connection, stream).await;
    }
}

/// What a client says first, without TLS.
enum First {
    /// Enough to know the version.
    Version { first: Bytes, is_http2: bool },
    /// Nothing.
    None,
    /// So many bytes, and then it closed.
    Cut(usize),
    /// So many bytes, and then no more.
    Late(usize),
}

/// Reads until the version is known. Single bytes do not extend the time for that.
async fn first_bytes(stream: &mut TcpStream, idle_timeout: Duration) -> First {
    let deadline = Instant::now() + idle_timeout;
    // There is no buffer before there is something to put into it.
    if !matches!(timeout_at(deadline, stream.readable()).await, Ok(Ok(()))) {
        return First::None;
    }
    let mut first = BytesMut::with_capacity(8 * 1024);
    loop {
        match timeout_at(deadline, stream.read_buf(&mut first)).await {
            Ok(Ok(1..)) => {}
            _ if first.is_empty() => return First::None,
            Ok(Ok(0) | Err(_)) => return First::Cut(first.len()),
            Err(_) => return First::Late(first.len()),
        }
        let n = first.len().min(PREFACE.len());
        if first[..n] != PREFACE[..n] {
            return First::Version { first: first.freeze(), is_http2: false };
        }
        if n == PREFACE.len() {
            return First::Version { first: first.freeze(), is_http2: true };
        }
    }
}

/// HTTP/1.1. The HTTP library, with its buffers, is there while there is something to do.
async fn http1<S>(connection: Arc<Connection>, mut stream: Watched<S>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    while let Some(quiet) = Box::pin(requests(&connection, stream)).await {
        stream = quiet;
        if !has_more(&connection, &mut stream).await {
            let _ = timeout(FAREWELL, stream.shutdown()).await;
            return;
        }
    }
}

/// Waits for the next request, without buffers. Whether it comes.
async fn has_more<S>(connection: &Connection, stream: &mut Watched<S>) -> bool
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut changes = connection.listener.changes();
    loop {
        let idle_timeout = connection.attributes().idle_timeout;
        let left = idle_timeout.saturating_sub(connection.activity.silent_for());
        tokio::select! {
            biased;
            has_come = stream.next_bytes() => return has_come,
            _ = changes.changed() => if *changes.borrow() { return false },
            () = sleep(left) => return false,
        }
    }
}

/// Serves requests. The stream, if the connection may have more after a while.
async fn requests<S>(connection: &Arc<Connection>, stream: Watched<S>) -> Option<Watched<S>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let for_requests = connection.clone();
    let service = service_fn(move |request| request::serve(for_requests.clone(), request));
    let mut served = http1::Builder::new()
        .max_buf_size(connection.worker.buffer())
        .max_header_size(MAX_HEAD)
        .title_case_headers(true)
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(stream), service);
    let attributes = connection.attributes();
    let mut watchdog = Watchdog::telling_quiet(&connection.activity, &attributes);
    if connection.activity.age() >= attributes.client_keep_alive {
        connection.is_old.store(true, Relaxed);
    }
    let mut changes = connection.listener.changes();
    let mut is_closing = false;
    let ended = loop {
        tokio::select! {
            biased;
            ended = &mut served => break ended,
            _ = changes.changed(), if !is_closing => {
                if *changes.borrow() {
                    is_closing = true;
                    connection.ends_between_requests();
                    Pin::new(&mut served).graceful_shutdown();
                } else {
                    watchdog.follow(&connection.attributes());
                }
            }
            verdict = watchdog.watch() => match verdict {
                Overdue::Old => connection.is_old.store(true, Relaxed),
                Overdue::Quiet if !is_closing => {
                    let parts = served.into_parts();
                    let mut stream = parts.io.into_inner();
                    stream.rest(&parts.read_buf);
                    return Some(stream);
                }
                Overdue::Idle if !is_closing => {
                    is_closing = true;
                    connection.ends_between_requests();
                    Pin::new(&mut served).graceful_shutdown();
                }
                Overdue::Quiet => {}
                Overdue::Idle | Overdue::Silent => return None,
                Overdue::Head => {
                    let stream = served.into_parts().io.into_inner();
                    let received = stream.head_size();
                    refuse(connection, stream, ElbError::RequestTimeout, received).await;
                    return None;
                }
            },
        }
    };
    if let Err(error) = &ended {
        tracing::debug!(client = %connection.peer, %error, "connection failed");
        let stream = served.into_parts().io.into_inner();
        if let Some(error) = stream.refusal() {
            exchange::note_refused(connection, error, stream.head_size());
            let _ = timeout(FAREWELL, read_to_end(stream)).await;
        } else if connection.activity.is_in_head() {
            exchange::note_refused(connection, ElbError::ClientClosed, stream.head_size());
        }
        return None;
    }
    let upgrade = connection.upgrade.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(upgrade) = upgrade {
        let parts = served.into_parts();
        let mut stream = parts.io.into_inner();
        stream.unread(parts.read_buf);
        upgrade.run(stream, &connection.activity).await;
    } else if connection.lingers.load(Relaxed) {
        let stream = served.into_parts().io.into_inner();
        let _ = timeout(LINGERING, linger(stream)).await;
    }
    None
}

async fn http2<S>(connection: Arc<Connection>, stream: S, first: Bytes)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let io = TokioIo::new(Watched::new(stream, first, connection.activity.clone()));
    let for_requests = connection.clone();
    let service = service_fn(move |request| request::serve(for_requests.clone(), request));
    let streams = Streams { listener: connection.listener.clone() };
    let mut served = http2::Builder::new(streams)
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(connection.worker.buffer())
        .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
        .serve_connection(io, service);
    let mut served = Pin::new(&mut served);
    // Streams that stall end by themselves; twice the time is for what that does not help.
    let mut watchdog = Watchdog::new(&connection.activity, &connection.attributes()).patient();
    let mut changes = connection.listener.changes();
    let mut is_closing = false;
    loop {
        tokio::select! {
            biased;
            ended = &mut served => {
                if let Err(error) = ended {
                    tracing::debug!(client = %connection.peer, %error, "HTTP/2 connection failed");
                }
                return;
            }
            _ = changes.changed(), if !is_closing => {
                if *changes.borrow() {
                    is_closing = true;
                    served.as_mut().graceful_shutdown();
                } else {
                    watchdog.follow(&connection.attributes());
                }
            }
            verdict = watchdog.watch() => match verdict {
                // What comes between requests, such as PING, is as nothing.
                Overdue::Idle | Overdue::Head | Overdue::Old if !is_closing => {
                    is_closing = true;
                    served.as_mut().graceful_shutdown();
                    watchdog.rest(FAREWELL);
                }
                Overdue::Old | Overdue::Quiet => {}
                Overdue::Idle | Overdue::Head | Overdue::Silent => return,
            },
        }
    }
}

/// Tells a client why its connection ends.
async fn refuse<S>(connection: &Connection, stream: S, error: ElbError, received: usize)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    exchange::note_refused(connection, error, received);
    let _ = timeout(FAREWELL, farewell(stream, &error.bytes())).await;
}
