//! What an access log says of a request, gathered on its way.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use hyper::body::{Body, Incoming};
use hyper::ext::ReasonPhrase;
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio::time::Instant;

use super::access_log::{Entry, RequestLine};
use super::body::{Progress, ResponseBody};
use super::connection::Connection;
use super::desync;
use super::errors::ElbError;
use super::exchange::Exchange;
use super::headers;
use super::table::Served;

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
    pub group: Option<(Arc<str>, bool)>,
    /// Host and URI that the target saw, where a rule changed them.
    pub transformed: (Option<String>, Option<String>),
    /// How far the request's body has come, if it has one.
    pub body: Option<Arc<Progress>>,
    /// Of a tunnel, all bytes that the client sent.
    pub tunnelled: Option<u64>,
    /// Bytes of the request's head.
    head: u64,
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
            body: None,
            tunnelled: None,
            head: request_head_size(request),
            is_upgraded: false,
        })
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

    /// The line.
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
            // As on AWS, no time is known of what no target answered.
            request_time: self.answered.and(self.forwarded).map(|it| it - self.began),
            target_time: self.answered.zip(self.forwarded).map(|(end, begin)| end - begin),
            response_time: self.answered.map(|it| ended - it),
            status,
            target_status: self.target_status,
            received_bytes: self
                .tunnelled
                .unwrap_or_else(|| self.head + self.body.as_ref().map_or(0, |body| body.bytes())),
            sent_bytes: sent,
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
            // AWS has reasons for authentication, Lambda functions and its firewall only.
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

/// The line of what could not be read as a request.
pub fn refused(connection: &Connection, served: &Served, error: ElbError, received: u64) -> String {
    let now = SystemTime::now();
    let tls = connection.tls.as_ref();
    let host = match connection.local.ip() {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    Entry {
        kind: if tls.is_some() { "https" } else { "http" },
        time: now,
        load_balancer: &served.route.load_balancer,
        client: connection.peer,
        target: None,
        request_time: None,
        target_time: None,
        response_time: None,
        status: error.code(),
        target_status: None,
        received_bytes: received,
        sent_bytes: error.bytes().len() as u64,
        request: RequestLine {
            method: "",
            scheme: if tls.is_some() { "https" } else { "http" },
            host: &host,
            port: served.route.listener.port,
            target: "",
            version: "",
        },
        user_agent: None,
        tls_cipher: tls.map(|it| it.cipher_suite.as_str()),
        tls_protocol: tls.map(|it| it.version),
        target_group: None,
        trace_id: None,
        domain_name: tls.and_then(|it| it.server_name.as_deref()),
        certificate: None,
        rule_priority: None,
        created: now,
        action: None,
        redirect_url: None,
        error_reason: None,
        classification: None,
        connection: Some(connection.id),
        transformed_host: None,
        transformed_uri: None,
        transform_status: None,
    }
    .line()
}

/// Bytes of a request's head as HTTP/1.1 writes it; of HTTP/2, before its compression.
fn request_head_size(request: &Request<Incoming>) -> u64 {
    let target = request.uri().to_string().len();
    let line = request.method().as_str().len() + target + "  HTTP/1.1\r\n".len();
    (line + headers::size(request.headers()) + "\r\n".len()) as u64
}

/// Bytes of an answer's head as HTTP/1.1 writes it, with what the HTTP library adds; of HTTP/2,
/// before its compression.
pub fn response_head_size(response: &Response<ResponseBody>) -> u64 {
    let status = response.status();
    let reason = match response.extensions().get::<ReasonPhrase>() {
        Some(reason) => reason.as_bytes().len(),
        None => status.canonical_reason().unwrap_or("<none>").len(),
    };
    let fields = response.headers();
    let mut added = 0;
    if !fields.contains_key(header::DATE) {
        added += "date: Tue, 15 Nov 1994 08:12:31 GMT\r\n".len();
    }
    let has_no_body = status.is_informational()
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if !has_no_body
        && !fields.contains_key(header::CONTENT_LENGTH)
        && !fields.contains_key(header::TRANSFER_ENCODING)
    {
        added += match response.body().size_hint().exact() {
            Some(length) => format!("content-length: {length}\r\n").len(),
            None => "transfer-encoding: chunked\r\n".len(),
        };
    }
    let line = "HTTP/1.1 200 \r\n".len() + reason;
    (line + headers::size(fields) + added + "\r\n".len()) as u64
}
