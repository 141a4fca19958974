//! Connections whose bytes go both ways as they are: upgraded ones, and those of `tls` listeners.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use bytes::Bytes;

use super::access_log::TlsEntry;
use super::connection::{Connection, HANDSHAKE, Tls};
use super::counters::Metric;
use super::exchange::Exchange;
use super::io::{Activity, Watched};
use super::select;
use super::table::{Outstanding, Served};
use super::upstream::TargetStream;
use crate::config::model::Action;

/// Bytes on their way in each direction.
const TUNNEL_BUFFER: usize = 64 * 1024;

/// How long a connection of a `tls` listener may be silent, as on AWS.
const IDLE: Duration = Duration::from_secs(350);

/// A connection that becomes a tunnel after the answer of 101.
#[derive(Debug)]
pub struct Upgrade {
    /// The target's side, once it has switched.
    pub target: OnUpgrade,
    /// What is to be noted at the end.
    pub exchange: Box<Exchange>,
}

impl Upgrade {
    /// Passes bytes until both sides have ended, none has said anything for `idle_timeout`, or the
    /// target is gone.
    pub async fn run<S>(mut self, client: Watched<S>, activity: &Activity)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let idle = self.exchange.served.route.attributes.idle_timeout;
        let Some(gone) = self.exchange.outstanding.as_ref().map(|it| it.target().gone()) else {
            return;
        };
        let passing = async {
            let Ok(target) = self.target.await else { return };
            pass(client, TokioIo::new(target), activity, idle).await;
        };
        tokio::select! {
            () = passing => {}
            () = gone => {}
        }
        self.exchange.tunnelled(activity.bytes());
    }
}

/// Passes bytes both ways.
async fn pass<S, T>(mut client: Watched<S>, mut target: T, activity: &Activity, idle: Duration)
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    let copy =
        copy_bidirectional_with_sizes(&mut client, &mut target, TUNNEL_BUFFER, TUNNEL_BUFFER);
    let silence = async {
        while let left @ 1.. = idle.saturating_sub(activity.silent_for()).as_millis() {
            sleep(Duration::from_millis(u64::try_from(left).unwrap_or(u64::MAX))).await;
        }
    };
    tokio::select! {
        // However it ended, both connections do.
        _ = copy => {}
        () = silence => {}
    }
}

/// What a client said first in TLS.
#[derive(Debug, Default)]
struct Hello {
    server_name: Option<String>,
    protocols: Vec<String>,
}

/// Serves a connection to a `tls` listener, and notes it.
pub async fn serve(
    mut connection: Connection,
    served: &Arc<Served>,
    tls: Arc<ServerConfig>,
    stream: TcpStream,
) {
    let created = SystemTime::now();
    let began = Instant::now();
    let mut hello = Hello::default();
    let alert = match timeout(HANDSHAKE, handshake(tls, stream, &mut hello)).await {
        Ok(Ok(client)) => {
            connection.tls = Some(Tls::of(client.get_ref().1, began.elapsed()));
            forward(&connection, served, client).await;
            None
        }
        failed => {
            let counters = &served.load_balancer.counters;
            counters.count(connection.worker.index, Metric::ClientTlsErrors);
            failed.ok().and_then(Result::err).as_ref().and_then(alert_of)
        }
    };
    let Some(log) = &served.log else { return };
    let tls = connection.tls.as_ref();
    let (received_bytes, sent_bytes) = connection.activity.bytes();
    let version = tls.map(|it| it.version.replace('.', "").to_ascii_lowercase());
    let protocols: Vec<_> = hello.protocols.iter().map(String::as_str).collect();
    let entry = TlsEntry {
        time: SystemTime::now(),
        load_balancer: &served.route.load_balancer,
        listener: &connection.listener.address.to_string(),
        client: connection.peer,
        destination: connection.local,
        connection_time: began.elapsed(),
        handshake_time: tls.map(|it| it.handshake),
        received_bytes,
        sent_bytes,
        alert,
        certificate: None,
        cipher: tls.map(|it| it.cipher_suite.as_str()),
        version: version.as_deref(),
        domain_name: hello.server_name.as_deref(),
        client_protocol: tls.and_then(|it| it.alpn.as_deref()),
        target_protocol: None,
        client_protocols: &protocols,
        created,
    };
    log.write(entry.line());
}

async fn handshake(
    tls: Arc<ServerConfig>,
    stream: TcpStream,
    hello: &mut Hello,
) -> io::Result<TlsStream<TcpStream>> {
    let begun = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
    let said = begun.client_hello();
    hello.server_name = said.server_name().map(str::to_owned);
    let text = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
    hello.protocols = said.alpn().into_iter().flatten().map(text).collect();
    begun.into_stream(tls).await
}

/// The alert with which a client ended its handshake.
fn alert_of(error: &io::Error) -> Option<u8> {
    match error.get_ref()?.downcast_ref()? {
        rustls::Error::AlertReceived(alert) => Some((*alert).into()),
        _ => None,
    }
}

async fn forward(connection: &Connection, served: &Arc<Served>, client: TlsStream<TcpStream>) {
    let worker = &connection.worker;
    served.load_balancer.counters.count(worker.index, Metric::NewTlsFlows);
    let Action::Forward(forward) = &served.route.listener.default_action else { return };
    let chosen = select::in_turn(&worker.groups.load(), served, 0, forward);
    let Some(target) = chosen.and_then(|it| it.target) else { return };
    let outstanding = Outstanding::begin(target);
    let ends = (connection.peer, connection.local);
    let Ok(target) = worker.connector.raw(outstanding.target(), &served.load_balancer, ends).await
    else {
        return;
    };
    outstanding.target().counters.count(worker.index, Metric::NewTlsFlows);
    let activity = &connection.activity;
    let client = Watched::new(client, Bytes::new(), activity.clone());
    let passing = async {
        match target {
            TargetStream::Plain(target) => pass(client, target, activity, IDLE).await,
            TargetStream::Tls(target) => pass(client, *target, activity, IDLE).await,
        }
    };
    tokio::select! {
        () = passing => {}
        () = outstanding.target().gone() => {}
    }
}
