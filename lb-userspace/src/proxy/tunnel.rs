//! Connections whose bytes go both ways as they are: upgraded ones, and those of `tls` listeners.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};
use tokio_rustls::server::TlsStream;

use bytes::Bytes;

use super::access_log::TlsEntry;
use super::connection::Connection;
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
    /// Passes bytes until both sides have ended, or none has said anything for so long.
    pub async fn run<S>(mut self, client: Watched<S>, activity: &Activity, idle: Duration)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Ok(target) = self.target.await else { return };
        pass(client, TokioIo::new(target), activity, idle).await;
        if let Some(note) = &mut self.exchange.note {
            note.tunnelled(activity.bytes());
        }
        drop(self.exchange);
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

/// Serves a connection to a `tls` listener, and notes it.
pub async fn serve(connection: Connection, served: &Arc<Served>, client: TlsStream<TcpStream>) {
    let created = SystemTime::now();
    let began = Instant::now();
    forward(&connection, served, client).await;
    let (Some(log), Some(tls)) = (&served.log, &connection.tls) else { return };
    let (received_bytes, sent_bytes) = connection.activity.bytes();
    let version = tls.version.replace('.', "").to_ascii_lowercase();
    let entry = TlsEntry {
        time: SystemTime::now(),
        load_balancer: &served.route.load_balancer,
        listener: &connection.listener.address.to_string(),
        client: connection.peer,
        destination: connection.local,
        connection_time: tls.handshake + began.elapsed(),
        handshake_time: Some(tls.handshake),
        received_bytes,
        sent_bytes,
        alert: None,
        certificate: None,
        cipher: Some(&tls.cipher_suite),
        version: Some(&version),
        domain_name: tls.server_name.as_deref(),
        client_protocol: tls.alpn.as_deref(),
        target_protocol: None,
        client_protocols: &[],
        created: created.checked_sub(tls.handshake).unwrap_or(created),
    };
    log.write(entry.line());
}

async fn forward(connection: &Connection, served: &Arc<Served>, client: TlsStream<TcpStream>) {
    let worker = &connection.worker;
    let balancer = &served.load_balancer.counters;
    balancer.count(worker.index, Metric::NewTlsFlows);
    let Action::Forward(forward) = &served.route.listener.default_action else { return };
    let chosen = select::in_turn(&worker.groups.load(), served, 0, forward);
    let Some(target) = chosen.and_then(|it| it.target) else { return };
    let outstanding = Outstanding::begin(target);
    let ends = (connection.peer, connection.local);
    let Ok(target) = worker.connector.raw(outstanding.target(), balancer, ends).await else {
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
