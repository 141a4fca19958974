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
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::machine::Outcome;
use super::status::Reason;
use super::{CheckSpec, tls};
use crate::config::model::{HttpProbe, ProbeKind};
use crate::proxy_protocol;

mod http2;
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
    /// For HTTP/2.
    tls_h2: Arc<ClientConfig>,
}

impl Prober {
    /// A prober; one serves any number of targets at a time.
    pub fn new() -> Self {
        Self { tls: tls::client_config(&[]), tls_h2: tls::client_config(&[b"h2"]) }
    }

    async fn secure(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        http2: bool,
    ) -> io::Result<TlsStream<TcpStream>> {
        let config = if http2 { &self.tls_h2 } else { &self.tls };
        let name = ServerName::IpAddress(peer.ip().into());
        TlsConnector::from(config.clone()).connect(name, stream).await
    }

    async fn try_probe(&self, spec: &CheckSpec) -> Result<(), Failure> {
        let peer = SocketAddr::new(spec.address, spec.port);
        let limit = spec.check.timeout;
        let deadline = Instant::now() + limit;
        let connect = async {
            let mut stream = TcpStream::connect(peer).await?;
            if spec.proxy_protocol {
                stream.write_all(&proxy_protocol::LOCAL).await?;
            }
            Ok::<_, io::Error>(stream)
        };
        let stream = timeout_at(deadline, connect)
            .await
            .map_err(|_| Failure::timeout("connection", limit))??;

        let late = |_| Failure::timeout("answer", limit);
        let (http, answer) = match &spec.check.probe {
            ProbeKind::Tcp => return Ok(()),
            ProbeKind::Http(http) => {
                (http, timeout_at(deadline, get(stream, peer, http, "http")).await)
            }
            ProbeKind::Https(http) => {
                let get = async {
                    let stream = self.secure(stream, peer, http.http2).await?;
                    get(stream, peer, http, "https").await
                };
                (http, timeout_at(deadline, get).await)
            }
            ProbeKind::Grpc(grpc) => {
                let call = async {
                    if grpc.tls {
                        let stream = self.secure(stream, peer, true).await?;
                        http2::call(stream, peer, &grpc.path, "https").await
                    } else {
                        http2::call(stream, peer, &grpc.path, "http").await
                    }
                };
                let code = timeout_at(deadline, call).await.map_err(late)??;
                return expect_code("gRPC status ", &grpc.matcher, code);
            }
        };
        let answer = answer.map_err(late)??;
        let status = answer.status.as_u16();
        answer.finish(LINGER).await;
        expect_code("", &http.matcher, status)
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
async fn get<S>(
    stream: S,
    peer: SocketAddr,
    http: &HttpProbe,
    scheme: &str,
) -> Result<Answer, Failure>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    if http.http2 {
        return http2::get(stream, peer, &http.path, scheme).await;
    }
    let request = Request::get(Uri::from(path_and_query(&http.path)?))
        .header(header::HOST, peer.to_string())
        .header(header::USER_AGENT, USER_AGENT)
        .header(header::ACCEPT, "*/*")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(Failure::request)?;
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

fn path_and_query(path: &str) -> Result<PathAndQuery, Failure> {
    PathAndQuery::try_from(path)
        .map_err(|error| Failure::check(format!("path {path:?} cannot be requested: {error}")))
}

/// `kind` says what the codes are, where they are not HTTP's.
fn expect_code(kind: &str, matcher: &[RangeInclusive<u16>], code: u16) -> Result<(), Failure> {
    if matcher.iter().any(|codes| codes.contains(&code)) {
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
        description: format!("expected {kind}{}, got {code}", expected.join(",")),
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

    fn request(error: hyper::http::Error) -> Self {
        Self::check(format!("the request cannot be built: {error}"))
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
