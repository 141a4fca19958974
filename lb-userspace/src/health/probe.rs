//! Asks one target once.

use std::error::Error as _;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use humantime::format_duration;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::http::uri::PathAndQuery;
use hyper::{Request, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;

use super::machine::Outcome;
use super::status::Reason;
use super::{CheckSpec, tls};
use crate::config::model::{HttpProbe, ProbeKind};

#[cfg(test)]
mod tests;

/// How checks call themselves in the logs of targets.
const USER_AGENT: &str = concat!("lb-health-check/", env!("CARGO_PKG_VERSION"));

/// Bytes of status line and headers that an answer may have.
const MAX_HEAD: usize = 32 * 1024;

/// Once the status is known, how much of the body is read, and how long, so that the target can
/// finish its answer and close; otherwise its log fills with broken pipes.
const MAX_BODY: usize = 64 * 1024;
const LINGER: Duration = Duration::from_millis(500);

/// Something that asks a target; the checker's tests have one that answers from a script.
pub trait Probe: Send + Sync + 'static {
    /// Asks once, as `spec` says.
    fn probe(&self, spec: &CheckSpec) -> impl Future<Output = Outcome> + Send;
}

/// Asks over the network, from whatever local address the route gives.
#[derive(Debug)]
pub struct Prober {
    tls: Arc<ClientConfig>,
}

impl Prober {
    /// A prober; one serves any number of targets at a time.
    pub fn new() -> Self {
        Self { tls: tls::client_config() }
    }

    async fn try_probe(&self, spec: &CheckSpec) -> Result<(), Failure> {
        let peer = SocketAddr::new(spec.address, spec.port);
        let limit = spec.check.timeout;
        let deadline = Instant::now() + limit;
        let stream = timeout_at(deadline, TcpStream::connect(peer))
            .await
            .map_err(|_| Failure::timeout("connection", limit))??;

        let (http, answer) = match &spec.check.probe {
            ProbeKind::Tcp => return Ok(()),
            ProbeKind::Http(http) => {
                let get = get(stream, peer, http);
                (http, timeout_at(deadline, get).await)
            }
            ProbeKind::Https(http) => {
                let get = async {
                    let name = ServerName::IpAddress(peer.ip().into());
                    let tls = TlsConnector::from(self.tls.clone());
                    get(tls.connect(name, stream).await?, peer, http).await
                };
                (http, timeout_at(deadline, get).await)
            }
        };
        let answer = answer.map_err(|_| Failure::timeout("answer", limit))??;
        let status = answer.status;
        answer.finish(LINGER).await;
        expect_status(&http.matcher, status)
    }
}

impl Default for Prober {
    fn default() -> Self {
        Self::new()
    }
}

impl Probe for Prober {
    async fn probe(&self, spec: &CheckSpec) -> Outcome {
        match self.try_probe(spec).await {
            Ok(()) => Outcome::Pass,
            Err(Failure { reason, description }) => Outcome::Fail { reason, description },
        }
    }
}

/// An answer of which the headers have come.
struct Answer {
    status: StatusCode,
    body: Incoming,
    /// The task that moves the bytes; it ends with the set.
    connection: JoinSet<hyper::Result<()>>,
}

impl Answer {
    /// Lets the target finish, for so long; what happens here says nothing about its health.
    async fn finish(mut self, limit: Duration) {
        let farewell = async {
            let mut read = 0;
            while read <= MAX_BODY
                && let Some(Ok(frame)) = self.body.frame().await
            {
                read += frame.data_ref().map_or(0, Bytes::len);
            }
            drop(self.body);
            self.connection.join_next().await;
        };
        // Too slow a farewell is cut short; that is all the time it gets.
        let _ = timeout(limit, farewell).await;
    }
}

/// Sends the request and waits for the headers of the answer. Redirects are answers like others.
async fn get<S>(stream: S, peer: SocketAddr, http: &HttpProbe) -> Result<Answer, Failure>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let request = request(peer, &http.path)?;
    let (mut sender, connection) = http1::Builder::new()
        .max_header_size(MAX_HEAD)
        .max_buf_size(MAX_HEAD)
        .handshake(TokioIo::new(stream))
        .await?;
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let (head, body) = sender.send_request(request).await?.into_parts();
    Ok(Answer { status: head.status, body, connection: driver })
}

fn request(peer: SocketAddr, path: &str) -> Result<Request<Empty<Bytes>>, Failure> {
    let path = PathAndQuery::try_from(path)
        .map_err(|error| Failure::check(format!("path {path:?} cannot be requested: {error}")))?;
    Request::get(Uri::from(path))
        .header(header::HOST, peer.to_string())
        .header(header::USER_AGENT, USER_AGENT)
        .header(header::ACCEPT, "*/*")
        .header(header::CONNECTION, "close")
        .body(Empty::new())
        .map_err(|error| Failure::check(format!("the request cannot be built: {error}")))
}

fn expect_status(matcher: &[RangeInclusive<u16>], status: StatusCode) -> Result<(), Failure> {
    if matcher.iter().any(|codes| codes.contains(&status.as_u16())) {
        return Ok(());
    }
    let expected: Vec<_> = matcher
        .iter()
        .map(|codes| match (codes.start(), codes.end()) {
            (first, last) if first == last => first.to_string(),
            (first, last) => format!("{first}-{last}"),
        })
        .collect();
    Err(Failure {
        reason: Reason::ResponseCodeMismatch,
        description: format!("expected {}, got {}", expected.join(","), status.as_u16()),
    })
}

/// A check that failed.
struct Failure {
    reason: Reason,
    description: String,
}

impl Failure {
    fn check(description: impl Into<String>) -> Self {
        Self { reason: Reason::FailedHealthChecks, description: description.into() }
    }

    fn timeout(missing: &str, limit: Duration) -> Self {
        Self {
            reason: Reason::Timeout,
            description: format!("no {missing} within {}", format_duration(limit)),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            return Self::check(format!("TLS: {tls}"));
        }
        let description = match error.kind() {
            // The kernel's own patience ended before ours.
            io::ErrorKind::TimedOut => {
                let description = "connection timed out".to_owned();
                return Self { reason: Reason::Timeout, description };
            }
            io::ErrorKind::ConnectionRefused => "connection refused",
            io::ErrorKind::ConnectionReset => "connection reset",
            io::ErrorKind::HostUnreachable => "host unreachable",
            io::ErrorKind::NetworkUnreachable => "network unreachable",
            io::ErrorKind::UnexpectedEof => "connection closed before an answer",
            _ => return Self::check(error.to_string()),
        };
        Self::check(description)
    }
}

impl From<hyper::Error> for Failure {
    fn from(error: hyper::Error) -> Self {
        if error.is_parse_too_large() {
            return Self::check("answer has too many or too long headers");
        }
        if error.is_parse() {
            return Self::check(format!("answer is not HTTP: {error}"));
        }
        if error.is_incomplete_message() {
            return Self::check("connection closed before an answer");
        }
        match error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
            Some(source) => match source.kind() {
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                    Self::check("connection reset")
                }
                _ => Self::check(source.to_string()),
            },
            None => Self::check(error.to_string()),
        }
    }
}
