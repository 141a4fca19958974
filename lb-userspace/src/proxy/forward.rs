//! The way of a request to its target, and of the answer back.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper::body::{Body, Incoming};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::http::uri::{self, Authority, PathAndQuery, Scheme};
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use tokio::time::{Instant, timeout_at};

use super::body::{Progress, RequestBody, ResponseBody, Source};
use super::connection::Connection;
use super::counters::Metric;
use super::errors::ElbError;
use super::exchange::Exchange;
use super::headers::{self, ClientSide};
use super::io::Upload;
use super::replay::Replay;
use super::table::{Group, Outstanding, Served, Target};
use super::tunnel::Upgrade;
use super::upstream::{ConnectError, Lease};
use super::worker::Worker;
use crate::config::model::HttpVersion;

/// Whether a group of that version can answer the request.
pub fn check_version(request: &Request<Incoming>, version: HttpVersion) -> Result<(), ElbError> {
    let is_http2 = request.version() == Version::HTTP_2;
    let is_grpc = is_grpc(request.headers());
    let fits = match version {
        HttpVersion::Http1 => !(is_http2 && is_grpc),
        HttpVersion::Http2 => is_http2,
        HttpVersion::Grpc => is_http2 && request.method() == Method::POST,
    };
    if fits { Ok(()) } else { Err(ElbError::IncompatibleVersion) }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|it| it.as_bytes().starts_with(b"application/grpc"))
}

/// Header fields that a request gets on its way, at most.
const ADDED_FIELDS: usize = 8;

/// Where a request goes, and as what.
#[derive(Debug)]
pub struct Route<'a> {
    /// What held for its listener when it came.
    pub served: &'a Served,
    /// The group.
    pub group: &'a Group,
    /// The target.
    pub target: Arc<Target>,
    /// The host that the target sees.
    pub host: &'a str,
    /// Path and query that the target sees.
    pub path: PathAndQuery,
}

/// Forwards a request, and waits for the head of the answer.
pub async fn forward(
    connection: &Connection,
    exchange: &mut Exchange,
    route: Route<'_>,
    mut request: Request<Incoming>,
) -> Result<Response<ResponseBody>, ElbError> {
    let worker = &connection.worker;
    exchange.count(Metric::Requests);
    if route.group.settings.version == HttpVersion::Grpc {
        exchange.count(Metric::GrpcRequests);
    }
    route.target.counters.count(worker.index, Metric::Requests);
    exchange.outstanding = Some(Outstanding::begin(route.target.clone()));

    let switches = prepare(&mut request, connection, &route)?;
    if let Some(note) = &mut exchange.note {
        note.trace_id = request.headers().get(headers::TRACE_ID).cloned();
        note.forwarded = Some(Instant::now());
    }
    let (head, incoming) = request.into_parts();
    let is_kept = route.group.settings.version != HttpVersion::Http1;
    let most = route.served.route.attributes.max_request_body_size;
    let (body, progress) = RequestBody::new(incoming, most, is_kept, &connection.activity);
    let request = Request::from_parts(head, body);
    let began = Instant::now();
    let waiting = Waiting { limit: route.served.route.attributes.idle_timeout, progress };
    let sent = send(worker, &route, request, &waiting).await;
    if let Some(note) = &mut exchange.note {
        note.body = waiting.progress;
        note.answered = sent.is_ok().then(Instant::now);
    }
    let is_success = sent.as_ref().is_ok_and(|(answer, _)| !answer.status().is_server_error());
    if !matches!(&sent, Err(error) if error.is_clients_fault()) {
        route.target.load.note(is_success);
    }
    let (response, lease) = sent?;
    exchange.target_answered(response.status(), began.elapsed());
    take_over(response, lease, switches, exchange.is_alone)
}

/// Makes the request one of ours: version, URI, and the fields that are of one connection only or
/// tell about the client. Whether it asks for an upgrade.
fn prepare(
    request: &mut Request<Incoming>,
    connection: &Connection,
    route: &Route<'_>,
) -> Result<bool, ElbError> {
    let attributes = &route.served.route.attributes;
    let version = route.group.settings.version;
    let is_http1 = request.version() <= Version::HTTP_11;
    request.extensions_mut().clear();
    let fields = request.headers_mut();
    if attributes.drop_invalid_header_fields && headers::drop_invalid(fields) > 0 {
        let counters = &route.served.load_balancer.counters;
        counters.count(connection.worker.index, Metric::DroppedInvalidHeaders);
    }
    if !is_http1 {
        // Of HTTP/1 the HTTP library lets one pass.
        headers::unify_length(fields);
    }
    let hop = headers::strip_hop_by_hop(fields);
    // At once, rather than step by step with each that is added.
    fields.reserve(ADDED_FIELDS);
    // Whoever waits for it has been told by us to go on.
    fields.remove(header::EXPECT);
    let tls = connection.tls.as_ref().map(|it| (it.version, it.cipher_suite.as_str()));
    let side = ClientSide { told: &connection.told, tls };
    headers::add_client(fields, attributes, &side);
    headers::trace(fields, SystemTime::now(), rand::random());
    let upgrade = hop.upgrade.filter(|_| is_http1 && version == HttpVersion::Http1);
    let switches = upgrade.is_some();
    if let Some(upgrade) = upgrade {
        fields.insert(header::UPGRADE, upgrade);
        fields.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    if hop.trailers && version != HttpVersion::Http1 {
        fields.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if version == HttpVersion::Http1 {
        // Else the HTTP library leaves out bodies of GET and HEAD whose length it does not know.
        let fields = request.headers();
        if !request.body().is_end_stream() && !fields.contains_key(header::CONTENT_LENGTH) {
            let chunked = HeaderValue::from_static("chunked");
            request.headers_mut().insert(header::TRANSFER_ENCODING, chunked);
        }
        *request.version_mut() = Version::HTTP_11;
        let host = HeaderValue::try_from(route.host).map_err(|_| ElbError::BadRequest)?;
        request.headers_mut().insert(header::HOST, host);
        *request.uri_mut() = Uri::from(route.path.clone());
    } else {
        *request.version_mut() = Version::HTTP_2;
        request.headers_mut().remove(header::HOST);
        let mut parts = uri::Parts::default();
        parts.scheme = Some(if tls.is_some() { Scheme::HTTPS } else { Scheme::HTTP });
        parts.authority = Some(Authority::try_from(route.host).map_err(|_| ElbError::BadRequest)?);
        parts.path_and_query = Some(route.path.clone());
        *request.uri_mut() = Uri::from_parts(parts).map_err(|_| ElbError::BadRequest)?;
    }
    Ok(switches)
}

/// What a request waits for.
struct Waiting {
    limit: Duration,
    progress: Option<Arc<Progress>>,
}

/// How often a request is sent again that targets did nothing about.
const MOST_REFUSALS: usize = 3;

/// Gets a connection and an answer's head. A request that another connection took down with it
/// goes over a new one, if it may be repeated.
async fn send(
    worker: &Arc<Worker>,
    route: &Route<'_>,
    mut request: Request<RequestBody>,
    waiting: &Waiting,
) -> Result<(Response<Incoming>, Lease), ElbError> {
    let mut refusals = 0;
    loop {
        let (mut lease, is_new) = match worker.pool.take(&route.target) {
            Some(lease) => (lease, false),
            // Boxed, because it is large and rare, and requests are moved about.
            None => (Box::pin(open(worker, route)).await?, true),
        };
        let repeat = Repeat::of(&request, is_new);
        let error = match waiting.answer(lease.send(request)).await? {
            Ok(response) => {
                repeat.iter().for_each(Repeat::forget);
                return Ok((response, lease));
            }
            Err(error) => error,
        };
        let again = if error.is_unprocessed() {
            lease.retire();
            refusals += 1;
            let repeat = repeat.filter(|_| refusals <= MOST_REFUSALS);
            Some(repeat.and_then(Repeat::again).ok_or(ElbError::Unprocessed)?)
        } else if is_new {
            None
        } else {
            let repeat = repeat.filter(|it| it.is_repeatable);
            error.unsent.or_else(|| repeat?.again())
        };
        request = again.ok_or_else(|| waiting.failure(&error.error))?;
    }
}

async fn open(worker: &Arc<Worker>, route: &Route<'_>) -> Result<Lease, ElbError> {
    let opened = worker.connector.http(&worker.pool, &route.target, &route.served.load_balancer);
    opened.await.map_err(|error| match error {
        ConnectError::Timeout => ElbError::GatewayTimeout,
        ConnectError::NoDescriptors => ElbError::ServiceUnavailable,
        ConnectError::Refused => ElbError::BadGateway,
    })
}

/// A request once more.
struct Repeat {
    head: Request<()>,
    body: Option<(Replay, Arc<Progress>, u64, Option<Upload>)>,
    /// Whether it may be done twice (RFC 9110 section 9.2.2), so that it does not matter what became
    /// of the first.
    is_repeatable: bool,
}

impl Repeat {
    /// `None`, if it cannot be needed. Over HTTP/1.1 nobody says that he did nothing about it.
    fn of(request: &Request<RequestBody>, is_new: bool) -> Option<Self> {
        let is_http2 = request.version() == Version::HTTP_2;
        let body = match request.body() {
            RequestBody::Empty => None,
            RequestBody::Client { source: Source::Kept(reader), progress, most, upload } => {
                Some((reader.replay(), progress.clone(), *most, upload.clone()))
            }
            RequestBody::Client { .. } => return None,
        };
        let is_repeatable = body.is_none()
            && request.method().is_idempotent()
            && !request.headers().contains_key(header::UPGRADE);
        if !is_http2 && (is_new || !is_repeatable) {
            return None;
        }
        let mut head = Request::new(());
        *head.method_mut() = request.method().clone();
        *head.uri_mut() = request.uri().clone();
        *head.version_mut() = request.version();
        *head.headers_mut() = request.headers().clone();
        Some(Self { head, body, is_repeatable })
    }

    /// `None`, if too much of its body is gone.
    fn again(self) -> Option<Request<RequestBody>> {
        let body = match self.body {
            None => RequestBody::Empty,
            Some((replay, progress, most, upload)) => {
                let source = Source::Kept(replay.reader()?);
                progress.restart();
                RequestBody::Client { source, progress, most, upload }
            }
        };
        Some(self.head.map(|()| body))
    }

    fn forget(&self) {
        if let Some((replay, ..)) = &self.body {
            replay.forget();
        }
    }
}

impl Waiting {
    /// Waits for an answer: for as long as the body comes, and then some.
    async fn answer<T>(&self, answer: impl Future<Output = T>) -> Result<T, ElbError> {
        tokio::pin!(answer);
        let mut deadline = Instant::now() + self.limit;
        loop {
            if let Ok(answer) = timeout_at(deadline, &mut answer).await {
                return Ok(answer);
            }
            let Some(progress) = &self.progress else { return Err(ElbError::GatewayTimeout) };
            let next = progress.last() + self.limit;
            if next > deadline {
                deadline = next;
            } else if progress.is_awaited() {
                return Err(ElbError::RequestTimeout);
            } else {
                return Err(ElbError::GatewayTimeout);
            }
        }
    }

    fn failure(&self, error: &hyper::Error) -> ElbError {
        tracing::debug!(%error, "no answer");
        let failure = self.progress.as_ref().and_then(|it| it.failure());
        failure.unwrap_or(ElbError::BadGateway)
    }
}

/// Makes the answer one of ours.
fn take_over(
    mut response: Response<Incoming>,
    lease: Lease,
    switches: bool,
    is_alone: bool,
) -> Result<Response<ResponseBody>, ElbError> {
    let switch = if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        None
    } else if switches {
        Some(Switch(hyper::upgrade::on(&mut response)))
    } else {
        return Err(ElbError::BadGateway);
    };
    let (mut head, incoming) = response.into_parts();
    // Who says two lengths may mean another one than was read.
    let is_alone = headers::unify_length(&mut head.headers) || is_alone;
    let hop = headers::strip_hop_by_hop(&mut head.headers);
    head.version = Version::HTTP_11;
    let Some(switch) = switch else {
        return Ok(Response::from_parts(head, ResponseBody::target(incoming, lease, is_alone)));
    };
    if let Some(upgrade) = hop.upgrade {
        head.headers.insert(header::UPGRADE, upgrade);
    }
    head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    head.extensions.insert(switch);
    Ok(Response::from_parts(head, ResponseBody::full("")))
}

/// The target's side of an upgrade. `Clone` for the extensions only.
#[derive(Debug, Clone)]
pub struct Switch(OnUpgrade);

impl Switch {
    /// With what is to be noted of it.
    pub fn into_upgrade(self, mut exchange: Box<Exchange>) -> Upgrade {
        if let Some(note) = &mut exchange.note {
            note.is_upgraded = true;
        }
        Upgrade { target: self.0, exchange }
    }
}
