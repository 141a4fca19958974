//! The sockets that names are asked for at.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::sockets::Datagrams;
use super::zone::{Transport, Zone};

/// How long a TCP connection is kept without a query (RFC 7766 section 6.2.3).
const IDLE: Duration = Duration::from_secs(10);
/// TCP connections at a time; more wait.
const MAX_CONNECTIONS: usize = 256;
/// Connections that wait to be accepted.
const BACKLOG: u32 = 128;
/// After an error that may last.
const PAUSE: Duration = Duration::from_millis(50);
/// Longer queries are none: a name has 255 bytes.
const MAX_QUERY: usize = 4096;

/// Answers queries by UDP and TCP until it is dropped.
#[derive(Debug)]
pub struct Responder {
    zone: watch::Sender<Arc<Zone>>,
    _tasks: JoinSet<()>,
}

impl Responder {
    /// Answers from now on. To be called within a runtime.
    ///
    /// # Errors
    /// If the address is another's, or none of this machine.
    pub fn start(listen: SocketAddr, zone: Zone) -> io::Result<Self> {
        let datagrams = Datagrams::bind(listen)?;
        let listener = listen_tcp(listen)?;
        let zone = watch::Sender::new(Arc::new(zone));
        let mut tasks = JoinSet::new();
        tasks.spawn(answer_datagrams(datagrams, zone.subscribe()));
        tasks.spawn(accept(listener, zone.subscribe()));
        Ok(Self { zone, _tasks: tasks })
    }

    /// What is answered from now on.
    pub fn tell(&self, zone: Zone) {
        self.zone.send_if_modified(|known| {
            let is_new = **known != zone;
            if is_new {
                *known = Arc::new(zone);
            }
            is_new
        });
    }
}

fn listen_tcp(listen: SocketAddr) -> io::Result<TcpListener> {
    let socket = if listen.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Connections of a former run that are not quite over do no harm.
    socket.set_reuseaddr(true)?;
    socket.bind(listen)?;
    socket.listen(BACKLOG)
}

async fn answer_datagrams(datagrams: Datagrams, zone: watch::Receiver<Arc<Zone>>) {
    let mut buffer = vec![0; MAX_QUERY];
    loop {
        match datagrams.receive(&mut buffer).await {
            Ok((length, client)) => {
                let zone = zone.borrow().clone();
                let answer =
                    zone.answer(&buffer[..length], Transport::Udp, rand::random::<u32>() as usize);
                if let Some(answer) = answer {
                    datagrams.send(&answer, &client);
                }
            }
            Err(error) => {
                debug!(%error, "no DNS query");
                sleep(PAUSE).await;
            }
        }
    }
}

async fn accept(listener: TcpListener, zone: watch::Receiver<Arc<Zone>>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        // It is never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let zone = zone.clone();
                connections.spawn(async move {
                    if let Err(error) = converse(stream, &zone).await {
                        debug!(%error, "a DNS connection ended");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                debug!(%error, "no DNS connection");
                sleep(PAUSE).await;
            }
        }
    }
}

/// Answers one query after the other (RFC 7766), each with its length before it.
async fn converse(mut stream: TcpStream, zone: &watch::Receiver<Arc<Zone>>) -> io::Result<()> {
    let mut buffer = vec![0; MAX_QUERY];
    loop {
        let query = async {
            let length = usize::from(stream.read_u16().await?);
            let Some(query) = buffer.get_mut(..length) else {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            };
            stream.read_exact(query).await?;
            Ok(length)
        };
        let length = timeout(IDLE, query).await.map_err(io::Error::from)??;
        let answer = {
            let zone = zone.borrow().clone();
            zone.answer(&buffer[..length], Transport::Tcp, rand::random::<u32>() as usize)
        };
        let Some(answer) = answer else { return Ok(()) };
        let mut framed = u16::try_from(answer.len()).unwrap_or(u16::MAX).to_be_bytes().to_vec();
        framed.extend(answer);
        timeout(IDLE, stream.write_all(&framed)).await.map_err(io::Error::from)??;
    }
}

#[cfg(test)]
mod tests;
