//! Sockets that listen, and the connections that they accept.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use rustls::ServerConfig;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::connection::{self, Connection};
use super::counters::Metric;
use super::errors::ElbError;
use super::exchange;
use super::table::{Listener, Served};
use super::worker::Worker;
use crate::config::model::ProxyProtocol;

/// Connections that wait to be accepted, at most, for each thread.
const BACKLOG: i32 = 4096;

/// How long a client has to see why it was refused.
pub const FAREWELL: Duration = Duration::from_secs(1);

/// How long, at most, the rest of a request that has been answered is read, and for how long the
/// client may be silent in it: nginx's `lingering_time` and `lingering_timeout`.
pub const LINGERING: Duration = Duration::from_secs(30);
const LINGERING_SILENCE: Duration = Duration::from_secs(5);

/// A pause where the system has no descriptor or memory for another connection.
const EXHAUSTED: Duration = Duration::from_millis(20);

/// Opens a socket at an address that this machine need not have yet.
///
/// # Errors
/// If something else listens there, or the agent may not.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket =
        Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    } else {
        socket.set_freebind_v4(true)?;
    }
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Accepts connections until the listener ends.
pub fn accept(worker: &Arc<Worker>, socket: TcpListener, listener: Arc<Listener>) {
    let socket = match tokio::net::TcpListener::from_std(socket) {
        Ok(socket) => socket,
        Err(error) => {
            tracing::error!(listener = %listener.address, %error, "cannot accept connections");
            return;
        }
    };
    let worker = worker.clone();
    tokio::spawn(async move {
        let closed = listener.closed();
        tokio::pin!(closed);
        loop {
            let accepted = tokio::select! {
                accepted = socket.accept() => accepted,
                () = &mut closed => break,
            };
            match accepted {
                Ok((stream, peer)) => begin(&worker, &listener, stream, peer),
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    if worker.exhausted.is_due() {
                        let listener = listener.address;
                        tracing::warn!(%listener, %error, "no connection accepted");
                    }
                    sleep(EXHAUSTED).await;
                }
            }
        }
        drain(socket, &worker, &listener);
    });
}

/// Serves those that connected before the end.
fn drain(socket: tokio::net::TcpListener, worker: &Arc<Worker>, listener: &Arc<Listener>) {
    let Ok(socket) = socket.into_std() else { return };
    while let Ok((stream, peer)) = socket.accept() {
        if stream.set_nonblocking(true).is_ok()
            && let Ok(stream) = TcpStream::from_std(stream)
        {
            begin(worker, listener, stream, peer);
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

fn begin(worker: &Arc<Worker>, listener: &Arc<Listener>, stream: TcpStream, peer: SocketAddr) {
    let served = listener.current.load_full();
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let Some(place) = Place::take(worker, &served, &stream) else {
        reject(worker, listener, &served, stream, peer);
        return;
    };
    let worker = worker.clone();
    let listener = listener.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = connection::serve(&worker, &listener, served, stream, peer) => {}
            () = listener.expired() => {}
        }
        drop(place);
    });
}

/// Has no place for a client. Some are told so.
fn reject(
    worker: &Arc<Worker>,
    listener: &Arc<Listener>,
    served: &Arc<Served>,
    stream: TcpStream,
    peer: SocketAddr,
) {
    served.load_balancer.counters.count(worker.index, Metric::RejectedConnections);
    if served.route.listener.protocol == ProxyProtocol::Tls
        || !worker.descriptors.has_room_for_target(stream.as_raw_fd())
    {
        return;
    }
    let Ok(permit) = worker.refusals.clone().try_acquire_owned() else { return };
    let connection = Connection::accepted(worker, listener, served, &stream, peer);
    let tls = served.tls.as_ref().map(|it| it.refusing.clone());
    tokio::spawn(async move {
        if let Some(connection) = connection {
            exchange::note_refused(&connection, ElbError::ServiceUnavailable, 0);
        }
        // A client that does not take it in time goes without.
        let _ = timeout(FAREWELL, refuse(stream, tls)).await;
        drop(permit);
    });
}

/// Tells a client that there is no capacity.
async fn refuse(stream: TcpStream, tls: Option<Arc<ServerConfig>>) -> io::Result<()> {
    let answer = ElbError::ServiceUnavailable.bytes();
    match tls {
        None => farewell(stream, &answer).await,
        Some(tls) => farewell(TlsAcceptor::from(tls).accept(stream).await?, &answer).await,
    }
}

/// Writes the last answer of a connection.
///
/// # Errors
/// If the client is gone.
pub async fn farewell<S>(mut stream: S, answer: &[u8]) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(answer).await?;
    stream.shutdown().await?;
    read_to_end(stream).await
}

/// Reads what a client still sends: closing with bytes unread would take away from it what it was
/// told.
///
/// # Errors
/// If the client is gone.
pub async fn read_to_end(mut stream: impl AsyncRead + Unpin) -> io::Result<()> {
    let mut rest = [0; 4096];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

/// Reads what a client still sends of a request that has been answered, until it is silent for
/// [`LINGERING_SILENCE`]: it may look for the answer only when all is sent.
///
/// # Errors
/// If the client is gone, or silent.
pub async fn linger(mut stream: impl AsyncRead + Unpin) -> io::Result<()> {
    let mut rest = vec![0; 16 * 1024];
    while timeout(LINGERING_SILENCE, stream.read(&mut rest)).await?? > 0 {}
    Ok(())
}

/// One of the connections that a load balancer may have at a time, and the process, too.
#[derive(Debug)]
struct Place {
    worker: Arc<Worker>,
    served: Arc<Served>,
}

impl Place {
    fn take(worker: &Arc<Worker>, served: &Arc<Served>, stream: &TcpStream) -> Option<Self> {
        if !worker.descriptors.has_room_for_client(stream.as_raw_fd()) {
            if worker.exhausted.is_due() {
                tracing::warn!("clients are refused: too few descriptors (ulimit -n)");
            }
            return None;
        }
        let load_balancer = &served.load_balancer;
        let before = load_balancer.connections.fetch_add(1, Relaxed);
        if served.route.attributes.max_connections.is_some_and(|most| before >= most) {
            load_balancer.connections.fetch_sub(1, Relaxed);
            return None;
        }
        load_balancer.counters.count(worker.index, Metric::NewConnections);
        load_balancer.counters.count(worker.index, Metric::ActiveConnections);
        worker.connections.send_modify(|connections| *connections += 1);
        Some(Self { worker: worker.clone(), served: served.clone() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let load_balancer = &self.served.load_balancer;
        load_balancer.connections.fetch_sub(1, Relaxed);
        load_balancer.counters.uncount(self.worker.index, Metric::ActiveConnections);
        self.worker.connections.send_modify(|connections| *connections -= 1);
    }
}
