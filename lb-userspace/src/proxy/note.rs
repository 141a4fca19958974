//! What an access log says of a request, gathered on its way.

use std::time::SystemTime;

use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, Version};
use tokio::time::Instant;

use super::access_log::{Entry, RequestLine};
use super::connection::Connection;
use super::desync;
use super::exchange::Exchange;

/// Of one request, where there is a log.
#[derive(Debug)]
pub struct Note {
    created: SystemTime,
    began: Instant,
    method: Method,
    version: Version,
    host: String,
    target: String,
    user_agent: Option<HeaderValue>,
    connection: Connected,
    /// When the request went to the target.
    pub forwarded: Option<Instant>,
    /// When the target's answer began.
    pub answered: Option<Instant>,
    /// Status that the target answered with.
    pub target_status: Option<u16>,
    /// `X-Amzn-Trace-Id`, as the target got it.
    pub trace_id: Option<HeaderValue>,
    /// Of the rule that decided.
    pub rule_priority: Option<u16>,
    /// `forward`, `redirect` or `fixed-response`.
    pub action: Option<&'static str>,
    /// `Location` of a redirection.
    pub redirect_url: Option<HeaderValue>,
    /// What the desync mitigation thinks of it.
    pub classification: Option<desync::Reason>,
    /// Name of the group, and whether it is one of gRPC.
    pub group: Option<(std::sync::Arc<str>, bool)>,
    /// Host and URI that the target saw, where a rule changed them.
    pub transformed: (Option<String>, Option<String>),
    /// Bytes of the request's head.
    received_head: u64,
    /// Bytes of the request's body, as far as they came.
    pub received: u64,
    /// Bytes of the answer's head.
    sent_head: u64,
    /// Whether it became a tunnel.
    pub is_upgraded: bool,
}

#[derive(Debug)]
struct Connected {
    client: std::net::SocketAddr,
    tls: Option<super::connection::Tls>,
    id: u64,
}

impl Note {
    /// Of a request that has come.
    pub fn new(connection: &Connection, request: &Request<Incoming>) -> Box<Self> {
        let uri = request.uri();
        let host = request.headers().get(header::HOST).and_then(|it| it.to_str().ok());
        let host = uri.authority().map(|it| it.as_str()).or(host).unwrap_or_default();
        let name = super::host::Host::parse(host).map_or(host, |it| it.name);
        Box::new(Self {
            created: SystemTime::now(),
            began: Instant::now(),
            method: request.method().clone(),
            version: request.version(),
            host: name.to_owned(),
            target: uri.path_and_query().map(|it| it.as_str().to_owned()).unwrap_or_default(),
            user_agent: request.headers().get(header::USER_AGENT).cloned(),
            connection: Connected {
                client: connection.peer,
                tls: connection.tls.clone(),
                id: connection.id,
            },
            forwarded: None,
            answered: None,
            target_status: None,
            trace_id: None,
            rule_priority: None,
            action: None,
            redirect_url: None,
            classification: None,
            group: None,
            transformed: (None, None),
            received_head: request_line(request) + fields(request.headers()),
            received: 0,
            sent_head: 0,
            is_upgraded: false,
        })
    }

    /// The answer begins.
    pub fn answering<B>(&mut self, response: &Response<B>) {
        let reason = response.status().canonical_reason().unwrap_or_default();
        let line = "HTTP/1.1 200 \r\n".len() + reason.len();
        self.sent_head = line as u64 + fields(response.headers());
    }

    /// A tunnel ended; so many bytes came and went over the client's connection, all of which
    /// count.
    pub fn tunnelled(&mut self, (received, sent): (u64, u64)) {
        (self.received_head, self.received, self.sent_head) = (0, received, sent);
    }

    fn kind(&self) -> &'static str {
        let is_tls = self.connection.tls.is_some();
        let is_grpc = self.group.as_ref().is_some_and(|(_, is_grpc)| *is_grpc);
        match (self.is_upgraded, is_tls) {
            (true, true) => "wss",
            (true, false) => "ws",
            (false, true) if is_grpc => "grpcs",
            _ if self.version == Version::HTTP_2 => "h2",
            (false, true) => "https",
            (false, false) => "http",
        }
    }

    /// The line. `sent`: bytes of the answer's body.
    pub fn line(&self, exchange: &Exchange, status: u16, sent: u64) -> String {
        let ended = Instant::now();
        let route = &exchange.served.route;
        let tls = self.connection.tls.as_ref();
        let (host, uri) = &self.transformed;
        let is_transformed = host.is_some() || uri.is_some();
        Entry {
            kind: self.kind(),
            time: SystemTime::now(),
            load_balancer: &route.load_balancer,
            client: self.connection.client,
            target: exchange.outstanding.as_ref().map(|it| it.target().address),
            request_time: self.forwarded.map(|it| it - self.began),
            target_time: self.answered.zip(self.forwarded).map(|(end, begin)| end - begin),
            response_time: self.answered.map(|it| ended - it),
            status,
            target_status: self.target_status,
            received_bytes: self.received_head + self.received,
            sent_bytes: self.sent_head + sent,
            request: RequestLine {
                method: self.method.as_str(),
                scheme: if tls.is_some() { "https" } else { "http" },
                host: &self.host,
                port: route.listener.port,
                target: &self.target,
                version: match self.version {
                    Version::HTTP_2 => "HTTP/2.0",
                    Version::HTTP_10 => "HTTP/1.0",
                    _ => "HTTP/1.1",
                },
            },
            user_agent: self.user_agent.as_ref().map(HeaderValue::as_bytes),
            tls_cipher: tls.map(|it| it.cipher_suite.as_str()),
            tls_protocol: tls.map(|it| it.version),
            target_group: self.group.as_ref().map(|(name, _)| &**name),
            trace_id: self.trace_id.as_ref().map(HeaderValue::as_bytes),
            domain_name: tls.and_then(|it| it.server_name.as_deref()),
            certificate: None,
            rule_priority: self.rule_priority,
            created: self.created,
            action: self.action,
            redirect_url: self.redirect_url.as_ref().map(HeaderValue::as_bytes),
            error_reason: None,
            classification: self.classification.map(|it| (it.class().name(), it.name())),
            connection: Some(self.connection.id),
            transformed_host: host.as_deref(),
            transformed_uri: uri.as_deref(),
            transform_status: is_transformed.then_some("TransformSuccess"),
        }
        .line()
    }
}

/// Bytes of a request's first line, as HTTP/1.1 has it.
fn request_line(request: &Request<Incoming>) -> u64 {
    let target = request.uri().path_and_query().map_or(1, |it| it.as_str().len());
    (request.method().as_str().len() + target + "  HTTP/1.1\r\n".len()) as u64
}

/// Bytes of fields and of the line that ends them, as HTTP/1.1 has them.
fn fields(fields: &HeaderMap) -> u64 {
    let line = |(name, value): (&header::HeaderName, &HeaderValue)| {
        name.as_str().len() + value.len() + ": \r\n".len()
    };
    (fields.iter().map(line).sum::<usize>() + "\r\n".len()) as u64
}
