//! The way of one request: decide, choose a target, forward, answer.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::http::uri::{Authority, PathAndQuery, Scheme};
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use tokio::time::{Instant, timeout_at};

use super::body::{Progress, RequestBody, ResponseBody};
use super::connection::Connection;
use super::counters::Metric;
use super::errors::ElbError;
use super::io::InProgress;
use super::table::{Group, Groups, Outstanding, Served, Target};
use super::tunnel::Upgrade;
use super::upstream::{ConnectError, Lease};
use super::worker::Worker;
use crate::config::model::{Action, Forward, HttpVersion};

/// Bytes of a request's URI, and of one header field, at most.
const MAX_LINE: usize = 16 * 1024;

/// Addresses in `X-Forwarded-For`, at most.
const MAX_FORWARDED_FOR: usize = 30;

/// What is known of a request, to be noted when its answer has ended.
#[derive(Debug)]
pub struct Exchange {
    worker: Arc<Worker>,
    served: Arc<Served>,
    began: Instant,
    outstanding: Option<Outstanding>,
    sent_bytes: u64,
    status: u16,
    is_cut: bool,
}

impl Exchange {
    fn begin(connection: &Connection) -> Box<Self> {
        Box::new(Self {
            worker: connection.worker.clone(),
            served: connection.listener.current.load_full(),
            began: Instant::now(),
            outstanding: None,
            sent_bytes: 0,
            status: 0,
            is_cut: false,
        })
    }

    /// So many bytes of the answer's body went on.
    pub fn sent(&mut self, bytes: usize) {
        self.sent_bytes += bytes as u64;
    }

    /// The target did not finish its answer.
    pub fn cut(&mut self) {
        self.is_cut = true;
    }

    fn count(&self, metric: Metric) {
        self.served.load_balancer.counters.count(self.worker.index, metric);
    }

    fn own_answer(&mut self, code: u16) {
        self.status = code;
        count_own(&self.served, &self.worker, code);
    }

    fn target_answered(&mut self, status: StatusCode, time: Duration) {
        self.status = status.as_u16();
        let metric = match self.status {
            200..300 => Metric::Target2xx,
            300..400 => Metric::Target3xx,
            400..500 => Metric::Target4xx,
            500..600 => Metric::Target5xx,
            _ => return,
        };
        let index = self.worker.index;
        let of_target = self.outstanding.as_ref().map(|it| &it.target().counters);
        for counters in of_target.into_iter().chain([&self.served.load_balancer.counters]) {
            counters.count(index, metric);
            counters.response_time(index, time);
        }
    }
}

fn count_own(served: &Served, worker: &Worker, code: u16) {
    let counters = &served.load_balancer.counters;
    let count = |metric| counters.count(worker.index, metric);
    match code {
        300..400 => count(Metric::Elb3xx),
        400..500 => count(Metric::Elb4xx),
        500..600 => count(Metric::Elb5xx),
        _ => {}
    }
    match code {
        500 => count(Metric::Elb500),
        502 => count(Metric::Elb502),
        503 => count(Metric::Elb503),
        504 => count(Metric::Elb504),
        _ => {}
    }
}

/// Notes that a connection ended because what came over it is not HTTP.
pub fn note_unreadable(connection: &Connection, error: &hyper::Error) {
    tracing::debug!(client = %connection.peer, %error, "connection failed");
    if error.is_parse() {
        note_refused(connection, ElbError::BadRequest);
    }
}

/// Notes that a client was told of an error that is of no request in particular.
pub fn note_refused(connection: &Connection, error: ElbError) {
    count_own(&connection.listener.current.load(), &connection.worker, error.code());
}

/// A request that is being answered. A client that goes away leaves it behind unanswered.
struct Unanswered(Option<Box<Exchange>>);

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(exchange) = &mut self.0 {
            exchange.own_answer(ElbError::ClientClosed.code());
        }
    }
}

/// Answers a request.
pub async fn serve(
    connection: Arc<Connection>,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let mut in_progress = InProgress::begin(&connection.activity);
    let is_http1 = request.version() <= Version::HTTP_11;
    let mut unanswered = Unanswered(Some(Exchange::begin(&connection)));
    let answer = match &mut unanswered.0 {
        Some(exchange) => answer(&connection, exchange, request).await,
        None => Err(ElbError::Internal),
    };
    let mut response = answer.unwrap_or_else(|error| {
        if let Some(exchange) = &mut unanswered.0 {
            exchange.own_answer(error.code());
        }
        let mut response = error.response();
        if is_http1 && error.ends_connection() {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    });
    in_progress.answered();
    let Some(exchange) = unanswered.0.take() else { return Ok(response) };
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        if let Some(upgrade) = response.extensions_mut().remove::<Switch>() {
            let mut slot =
                connection.upgrade.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            *slot = upgrade.into_upgrade(exchange);
        }
        return Ok(response);
    }
    Ok(response.map(|body| body.with(exchange, in_progress)))
}

/// The target's side of an upgrade. `Clone` for the extensions only.
#[derive(Debug, Clone)]
struct Switch(hyper::upgrade::OnUpgrade);

impl Switch {
    fn into_upgrade(self, mut exchange: Box<Exchange>) -> Option<Upgrade> {
        let outstanding = exchange.outstanding.take()?;
        Some(Upgrade { target: self.0, exchange, outstanding })
    }
}

async fn answer(
    connection: &Arc<Connection>,
    exchange: &mut Exchange,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, ElbError> {
    check(&request)?;
    let served = exchange.served.clone();
    match &served.route.listener.default_action {
        Action::Forward(forward) => {
            let groups = connection.worker.groups.load();
            let group = pick_group(&groups, forward).ok_or(ElbError::ServiceUnavailable)?.clone();
            drop(groups);
            forward_to(connection, exchange, &group, request).await
        }
        Action::Redirect(_) | Action::FixedResponse(_) => Err(ElbError::NotImplemented),
    }
}

/// What no rule decides about.
fn check(request: &Request<Incoming>) -> Result<(), ElbError> {
    if matches!(*request.method(), Method::TRACE | Method::CONNECT) {
        return Err(ElbError::MethodNotAllowed);
    }
    if request.uri().path_and_query().is_some_and(|it| it.as_str().len() > MAX_LINE) {
        return Err(ElbError::UriTooLong);
    }
    let mut forwarded_for = 0;
    for (name, value) in request.headers() {
        if name.as_str().len() + value.len() > MAX_LINE {
            return Err(ElbError::BadRequest);
        }
        if name == "x-forwarded-for" {
            forwarded_for += value.as_bytes().split(|&byte| byte == b',').count();
        } else if name == header::TRANSFER_ENCODING
            && !value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked")
        {
            return Err(ElbError::NotImplemented);
        }
    }
    if forwarded_for > MAX_FORWARDED_FOR {
        return Err(ElbError::TooManyForwardedAddresses);
    }
    Ok(())
}

/// One of the groups, at random by weight.
fn pick_group<'a>(groups: &'a Groups, forward: &Forward) -> Option<&'a Arc<Group>> {
    let all = &forward.target_groups;
    let total: u32 = all.iter().map(|it| u32::from(it.weight)).sum();
    let mut left = if all.len() > 1 && total > 0 { rand::random_range(0..total) } else { 0 };
    let chosen = all.iter().find(|it| {
        let is_here = left < u32::from(it.weight);
        left = left.saturating_sub(u32::from(it.weight));
        is_here
    });
    groups.get(&chosen.or(all.first())?.name)
}

/// A target for a connection of a `tls` listener.
pub fn pick(groups: &Groups, forward: &Forward, zone: Option<&str>) -> Option<Arc<Target>> {
    pick_target(pick_group(groups, forward)?, zone)
}

fn pick_target(group: &Group, zone: Option<&str>) -> Option<Arc<Target>> {
    let targets = group.in_service(zone);
    let turn = group.turn.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let n = usize::try_from(turn).unwrap_or(0).checked_rem(targets.len())?;
    Some(targets[n].target.clone())
}

/// Whether a group of that version can answer the request.
fn check_version(request: &Request<Incoming>, version: HttpVersion) -> Result<(), ElbError> {
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

async fn forward_to(
    connection: &Arc<Connection>,
    exchange: &mut Exchange,
    group: &Group,
    mut request: Request<Incoming>,
) -> Result<Response<ResponseBody>, ElbError> {
    check_version(&request, group.settings.version)?;
    let served = exchange.served.clone();
    let zone = served.route.preferred_zone();
    let target = pick_target(group, zone).ok_or(ElbError::ServiceUnavailable)?;
    let worker = &connection.worker;
    exchange.count(Metric::Requests);
    if group.settings.version == HttpVersion::Grpc {
        exchange.count(Metric::GrpcRequests);
    }
    target.counters.count(worker.index, Metric::Requests);
    exchange.outstanding = Some(Outstanding::begin(target.clone()));

    let switches = prepare(&mut request, connection, group.settings.version)?;
    let (head, incoming) = request.into_parts();
    let (body, progress) = RequestBody::new(incoming);
    let request = Request::from_parts(head, body);
    let began = Instant::now();
    let waiting = Waiting { limit: served.route.attributes.idle_timeout, progress };
    let (response, lease) = send(worker, &target, request, &waiting).await?;
    exchange.target_answered(response.status(), began.elapsed());
    Ok(take_over(response, lease, switches))
}

/// Makes the request one of ours: version, URI and the fields that are of one connection only.
/// Whether it asks for an upgrade.
fn prepare(
    request: &mut Request<Incoming>,
    connection: &Connection,
    version: HttpVersion,
) -> Result<bool, ElbError> {
    let is_http1 = request.version() <= Version::HTTP_11;
    let upgrade = if is_http1 && version == HttpVersion::Http1 {
        request.headers().get(header::UPGRADE).cloned()
    } else {
        None
    };
    let authority = request
        .uri()
        .authority()
        .map(|it| it.as_str().to_owned())
        .or_else(|| Some(request.headers().get(header::HOST)?.to_str().ok()?.to_owned()));
    request.extensions_mut().clear();
    let headers = request.headers_mut();
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    headers.remove(header::EXPECT);
    if let Some(upgrade) = &upgrade {
        headers.insert(header::UPGRADE, upgrade.clone());
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    let path = request.uri().path_and_query().cloned();
    let path = path.unwrap_or_else(|| PathAndQuery::from_static("/"));
    if version == HttpVersion::Http1 {
        *request.version_mut() = Version::HTTP_11;
        if !request.headers().contains_key(header::HOST)
            && let Some(value) = authority.and_then(|it| HeaderValue::try_from(it).ok())
        {
            request.headers_mut().insert(header::HOST, value);
        }
        *request.uri_mut() = Uri::from(path);
    } else {
        *request.version_mut() = Version::HTTP_2;
        request.headers_mut().remove(header::HOST);
        let authority = authority.unwrap_or_else(|| connection.local.to_string());
        let mut parts = hyper::http::uri::Parts::default();
        parts.scheme = Some(if connection.tls.is_some() { Scheme::HTTPS } else { Scheme::HTTP });
        parts.authority = Some(Authority::try_from(authority).map_err(|_| ElbError::BadRequest)?);
        parts.path_and_query = Some(path);
        *request.uri_mut() = Uri::from_parts(parts).map_err(|_| ElbError::BadRequest)?;
    }
    Ok(upgrade.is_some())
}

const HOP_BY_HOP: [header::HeaderName; 6] = [
    header::CONNECTION,
    header::UPGRADE,
    header::TRANSFER_ENCODING,
    header::PROXY_AUTHENTICATE,
    header::TRAILER,
    header::HeaderName::from_static("keep-alive"),
];

/// What a request waits for.
struct Waiting {
    limit: Duration,
    progress: Option<Arc<Progress>>,
}

/// Gets a connection and an answer's head. A request that another connection took down with it
/// goes over a new one, if it may be repeated.
async fn send(
    worker: &Arc<Worker>,
    target: &Arc<Target>,
    mut request: Request<RequestBody>,
    waiting: &Waiting,
) -> Result<(Response<Incoming>, Lease), ElbError> {
    while let Some(mut lease) = worker.pool.take(target) {
        let copy = repeatable(&request);
        match waiting.answer(lease.send(request)).await? {
            Ok(response) => return Ok((response, lease)),
            Err(error) => match error.unsent.or(copy) {
                Some(again) => request = again,
                None => return Err(waiting.failure(&error.error)),
            },
        }
    }
    let mut lease =
        worker.connector.http(&worker.pool, target).await.map_err(|error| match error {
            ConnectError::Timeout => ElbError::GatewayTimeout,
            ConnectError::Refused => ElbError::BadGateway,
        })?;
    match waiting.answer(lease.send(request)).await? {
        Ok(response) => Ok((response, lease)),
        Err(error) => Err(waiting.failure(&error.error)),
    }
}

/// The same once more, if it has no body and may be done twice (RFC 9110 9.2.2).
fn repeatable(request: &Request<RequestBody>) -> Option<Request<RequestBody>> {
    let is_repeatable = matches!(request.body(), RequestBody::Empty)
        && request.method().is_idempotent()
        && !request.headers().contains_key(header::UPGRADE);
    is_repeatable.then(|| {
        let mut copy = Request::new(RequestBody::Empty);
        *copy.method_mut() = request.method().clone();
        *copy.uri_mut() = request.uri().clone();
        *copy.version_mut() = request.version();
        *copy.headers_mut() = request.headers().clone();
        copy
    })
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
        let is_clients = self.progress.as_ref().is_some_and(|it| it.has_failed());
        if is_clients { ElbError::BadRequest } else { ElbError::BadGateway }
    }
}

/// Makes the answer one of ours.
fn take_over(
    mut response: Response<Incoming>,
    lease: Lease,
    switches: bool,
) -> Response<ResponseBody> {
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        if !switches {
            return ElbError::BadGateway.response();
        }
        let switch = Switch(hyper::upgrade::on(&mut response));
        let (mut head, _) = response.into_parts();
        head.extensions.insert(switch);
        return Response::from_parts(head, ResponseBody::full(""));
    }
    let (mut head, incoming) = response.into_parts();
    for name in HOP_BY_HOP {
        head.headers.remove(name);
    }
    head.version = Version::HTTP_11;
    Response::from_parts(head, ResponseBody::target(incoming, lease))
}
