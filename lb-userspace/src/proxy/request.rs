//! What becomes of a request: the rules decide, a target or the load balancer answers.

use std::borrow::Cow;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};

use hyper::body::{Body, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::http::uri::{Authority, PathAndQuery};
use hyper::{Method, Request, Response, StatusCode, Version};

use super::body::ResponseBody;
use super::connection::Connection;
use super::counters::Metric;
use super::desync::{self, Handling};
use super::errors::{ElbError, SERVER_NAME};
use super::exchange::{Exchange, Unanswered};
use super::forward::{self, Route, Switch};
use super::headers::{self, Oversize};
use super::host::Host;
use super::io::InProgress;
use super::redirect::{FixedResponse, Origin, Redirect};
use super::rewrite::RewriteFailed;
use super::rules::{Action, Decision, RequestView};
use super::select::{self, Keep};
use crate::config::model::{Attributes, HttpVersion};

/// Answers a request.
///
/// # Errors
/// Of HTTP/2: the stream is reset, if that says more than an answer could.
pub async fn serve(
    connection: Arc<Connection>,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, h2::Error> {
    let mut in_progress = InProgress::begin(&connection.activity);
    let is_http1 = request.version() <= Version::HTTP_11;
    let is_head = request.method() == Method::HEAD;
    if is_http1 {
        connection.lingers.store(!request.body().is_end_stream(), Relaxed);
    }
    let mut unanswered = Unanswered(Some(Exchange::begin(&connection, &request)));
    let answer = match &mut unanswered.0 {
        Some(exchange) => answer(&connection, exchange, request).await,
        None => Err(ElbError::Internal),
    };
    if matches!(answer, Err(ElbError::Unprocessed)) && !is_http1 {
        if let Some(mut exchange) = unanswered.0.take() {
            exchange.own_answer(ElbError::Unprocessed.code());
        }
        return Err(h2::Reason::REFUSED_STREAM.into());
    }
    let mut response = answer.unwrap_or_else(|error| {
        if let Some(exchange) = &mut unanswered.0 {
            exchange.own_answer(error.code());
        }
        let mut response = error.response();
        if is_http1 && error.ends_connection() {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            connection.lingers.store(true, Relaxed);
        }
        response
    });
    without_content(&mut response, is_head);
    in_progress.answered();
    let Some(mut exchange) = unanswered.0.take() else { return Ok(response) };
    if exchange.is_alone && is_http1 {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    exchange.answers(&response);
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        if let Some(upgrade) = response.extensions_mut().remove::<Switch>() {
            let mut slot = connection.upgrade.lock().unwrap_or_else(PoisonError::into_inner);
            *slot = Some(upgrade.into_upgrade(exchange));
        }
        return Ok(response);
    }
    Ok(response.map(|body| body.with(exchange, in_progress)))
}

/// Takes the content out of an answer of our own that has none (RFC 9110 sections 6.4.1, 9.3.2 and
/// 15.3.6): of HTTP/2 the library would send it.
fn without_content(response: &mut Response<ResponseBody>, is_head: bool) {
    let status = response.status();
    let has_none = status.is_informational()
        || matches!(
            status,
            StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT | StatusCode::NOT_MODIFIED
        );
    if has_none {
        response.body_mut().take_own();
    } else if is_head {
        let length = response.body_mut().take_own();
        if length > 0 {
            response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        }
    }
}

async fn answer(
    connection: &Connection,
    exchange: &mut Exchange,
    mut request: Request<Incoming>,
) -> Result<Response<ResponseBody>, ElbError> {
    let served = exchange.served.clone();
    if request.version() == Version::HTTP_2 {
        headers::join_cookies(request.headers_mut());
    }
    check(&request, &served.route.attributes)?;
    check_desync(exchange, &request)?;
    let host = host(&request, connection)?;
    let parsed = Host::parse(&host).ok_or(ElbError::BadRequest)?;
    let view = RequestView {
        method: request.method(),
        host: parsed,
        path: request.uri().path(),
        query: request.uri().query(),
        headers: request.headers(),
        source: connection.peer.ip(),
    };
    let decision = served.rules.decide(&view);
    if let Some(note) = &mut exchange.note {
        note.rule_priority = Some(decision.priority);
        note.action = Some(match decision.action {
            Action::Forward(_) => "forward",
            Action::Redirect(_) => "redirect",
            Action::FixedResponse(_) => "fixed-response",
        });
    }
    match &decision.action {
        Action::Redirect(redirect) => {
            let origin = Origin {
                https: connection.tls.is_some(),
                host: parsed,
                port: served.route.listener.port,
                path: view.path,
                query: view.query,
            };
            exchange.count(Metric::Redirects);
            exchange.own_answer(redirect.status.as_u16());
            let response = redirection(redirect, &origin);
            if let Some(note) = &mut exchange.note {
                note.redirect_url = response.headers().get(header::LOCATION).cloned();
            }
            Ok(response)
        }
        Action::FixedResponse(fixed) => {
            exchange.count(Metric::FixedResponses);
            exchange.own_answer(fixed.status.as_u16());
            Ok(fixed_response(fixed))
        }
        Action::Forward(forward) => {
            let fields = request.headers();
            let chosen = select::choose(connection, &served, decision, forward, fields)?;
            let group = &*chosen.group;
            if let Some(note) = &mut exchange.note {
                let is_grpc = group.settings.version == HttpVersion::Grpc;
                note.group = Some((group.name.clone(), is_grpc));
            }
            forward::check_version(&request, group.settings.version)?;
            let target = chosen.target.ok_or(ElbError::ServiceUnavailable)?;
            let address = target.address;
            let keep = Keep::new(connection, forward, group, fields);
            let host = host_for_target(&host, &parsed, decision, exchange)?;
            let path = path_for_target(&request, decision)?;
            if let Some(note) = &mut exchange.note {
                let has_host = decision.host_header_rewrite.is_some();
                let has_path = decision.url_rewrite.is_some();
                note.transformed =
                    (has_host.then(|| host.clone()), has_path.then(|| path.to_string()));
            }
            let route = Route { served: &served, group, target, host: &host, path };
            let mut response = forward::forward(connection, exchange, route, request).await?;
            if let Some(keep) = keep {
                keep.put(&served, forward, group, address, response.headers_mut());
            }
            Ok(response)
        }
    }
}

/// What no rule decides about.
fn check(request: &Request<Incoming>, attributes: &Attributes) -> Result<(), ElbError> {
    if matches!(*request.method(), Method::TRACE | Method::CONNECT) {
        return Err(ElbError::MethodNotAllowed);
    }
    if !has_target_form(request) {
        return Err(ElbError::BadRequest);
    }
    let target = request.uri().path_and_query().map_or("", PathAndQuery::as_str);
    headers::check_size(request.method().as_str(), target, request.headers()).map_err(
        |oversize| match oversize {
            Oversize::Line => ElbError::UriTooLong,
            Oversize::Fields => ElbError::BadRequest,
            Oversize::ForwardedFor => ElbError::TooManyForwardedAddresses,
        },
    )?;
    // Twice `chunked` is for the desync mitigation.
    let is_chunked = |it: &HeaderValue| {
        let mut codings = it.as_bytes().split(|&byte| byte == b',').map(<[u8]>::trim_ascii);
        codings.all(|it| it.eq_ignore_ascii_case(b"chunked"))
    };
    if !request.headers().get_all(header::TRANSFER_ENCODING).iter().all(is_chunked) {
        return Err(ElbError::NotImplemented);
    }
    let is_larger = |most| request.body().size_hint().lower() > most;
    if attributes.max_request_body_size.is_some_and(is_larger) {
        return Err(ElbError::BodyTooLarge);
    }
    Ok(())
}

/// Whether the target has a form of RFC 9112 section 3.2 or RFC 9113 section 8.3.1: the asterisk is
/// for OPTIONS, and a host alone for CONNECT. The HTTP library takes any word for a host, which then
/// would be the one that the rules see.
fn has_target_form<T>(request: &Request<T>) -> bool {
    let uri = request.uri();
    let path = uri.path_and_query().map_or("", PathAndQuery::as_str);
    match uri.scheme() {
        _ if path == "*" => request.method() == Method::OPTIONS,
        _ if path.starts_with('/') => true,
        // `http://host?query`
        Some(_) => request.version() <= Version::HTTP_11,
        None => false,
    }
}

/// What servers may understand in different ways.
fn check_desync(exchange: &mut Exchange, request: &Request<Incoming>) -> Result<(), ElbError> {
    let Some(reason) = desync::classify(request.method(), request.headers()) else {
        return Ok(());
    };
    exchange.count(Metric::DesyncNonCompliant);
    if let Some(note) = &mut exchange.note {
        note.classification = Some(reason);
    }
    match reason.class().handling(exchange.served.route.attributes.desync_mitigation) {
        Handling::Forward => {}
        Handling::ForwardAlone => exchange.is_alone = true,
        Handling::Refuse => return Err(ElbError::BadRequest),
    }
    Ok(())
}

/// The host that a request names: in its URI, else in its `Host`, of which it may have one. A
/// request of HTTP/1.0 may name none. RFC 9112 section 3.2 wants a valid `Host` beside the URI's,
/// RFC 9113 section 8.3.1 the same one or none.
fn host<'a>(
    request: &'a Request<Incoming>,
    connection: &Connection,
) -> Result<Cow<'a, str>, ElbError> {
    let version = request.version();
    let mut fields = request.headers().get_all(header::HOST).iter();
    let (first, second) = (fields.next(), fields.next());
    if second.is_some() {
        return Err(ElbError::BadRequest);
    }
    let field = match first {
        Some(host) => Some(host.to_str().map_err(|_| ElbError::BadRequest)?),
        None => None,
    };
    let authority = request.uri().authority().map(Authority::as_str);
    let default_port = if connection.tls.is_some() { 443 } else { 80 };
    match (authority, field) {
        (Some(_), None) if version == Version::HTTP_11 => Err(ElbError::BadRequest),
        (Some(authority), Some(field)) if !fit(authority, field, version, default_port) => {
            Err(ElbError::BadRequest)
        }
        (Some(host), _) | (None, Some(host)) => Ok(host.into()),
        (None, None) if version < Version::HTTP_11 => Ok(connection.local.to_string().into()),
        (None, None) => Err(ElbError::BadRequest),
    }
}

/// Whether a URI's host and a `Host` may come together.
fn fit(authority: &str, field: &str, version: Version, default_port: u16) -> bool {
    let Some(field) = Host::parse(field) else { return false };
    version <= Version::HTTP_11
        || Host::parse(authority).is_some_and(|it| it.is_same(&field, default_port))
}

fn host_for_target(
    host: &str,
    parsed: &Host<'_>,
    decision: &Decision,
    exchange: &Exchange,
) -> Result<String, ElbError> {
    let route = &exchange.served.route;
    let host = if route.attributes.preserve_host_header {
        host.to_owned()
    } else {
        headers::host_for_target(parsed, route.listener.port)
    };
    let rewritten = match &decision.host_header_rewrite {
        Some(rewrite) => rewrite.host(&host).map_err(|RewriteFailed| ElbError::Internal)?,
        None => None,
    };
    Ok(rewritten.unwrap_or(host))
}

fn path_for_target(
    request: &Request<Incoming>,
    decision: &Decision,
) -> Result<PathAndQuery, ElbError> {
    // That of `http://host#fragment` says that it is `/` and would be written as nothing.
    let path = request.uri().path_and_query().filter(|it| it.as_str() != "/").cloned();
    let path = path.unwrap_or_else(|| PathAndQuery::from_static("/"));
    let rewritten = match &decision.url_rewrite {
        Some(rewrite) => rewrite.url(path.as_str()).map_err(|RewriteFailed| ElbError::Internal)?,
        None => None,
    };
    Ok(rewritten.unwrap_or(path))
}

fn redirection(redirect: &Redirect, origin: &Origin<'_>) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::full(""));
    *response.status_mut() = redirect.status;
    let fields = response.headers_mut();
    fields.insert(header::SERVER, HeaderValue::from_static(SERVER_NAME));
    fields.insert(header::LOCATION, redirect.location(origin));
    response
}

fn fixed_response(fixed: &FixedResponse) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::full(fixed.body.clone()));
    *response.status_mut() = fixed.status;
    let fields = response.headers_mut();
    fields.insert(header::SERVER, HeaderValue::from_static(SERVER_NAME));
    if let Some(content_type) = &fixed.content_type {
        fields.insert(header::CONTENT_TYPE, content_type.clone());
    }
    response
}
