//! Asks over HTTP/2, and calls over gRPC.

use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Body, Bytes};
use hyper::client::conn::http2;
use hyper::http::HeaderMap;
use hyper::http::request::Builder;
use hyper::{Request, StatusCode, Uri, Version, header};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;

use super::{Answer, Failure, MAX_BODY, MAX_HEAD, USER_AGENT, path_and_query};

/// A message of no bytes: not compressed, length 0 (gRPC over HTTP/2, "Length-Prefixed-Message").
const EMPTY_MESSAGE: [u8; 5] = [0; 5];
const GRPC_STATUS: &str = "grpc-status";

/// Sends a GET request and waits for the headers of the answer.
pub(super) async fn get<S>(
    stream: S,
    peer: SocketAddr,
    path: &str,
    scheme: &str,
) -> Result<Answer, Failure>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let request = Request::get(uri(peer, path, scheme)?).header(header::ACCEPT, "*/*");
    Ok(send(stream, request, Empty::<Bytes>::new()).await?.0)
}

/// Calls the method `path` with an empty message and waits for its gRPC status code.
pub(super) async fn call<S>(
    stream: S,
    peer: SocketAddr,
    path: &str,
    scheme: &str,
) -> Result<u16, Failure>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let request = Request::post(uri(peer, path, scheme)?)
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers");
    let message = Full::new(Bytes::from_static(&EMPTY_MESSAGE));
    let (answer, head) = send(stream, request, message).await?;
    if answer.status != StatusCode::OK {
        let status = answer.status.as_u16();
        return Err(Failure::check(format!("answer is not gRPC: HTTP status {status}")));
    }
    match grpc_status(&head)? {
        Some(code) => Ok(code), // Without a message: everything is in the first headers.
        None => trailers(answer).await,
    }
}

/// The code behind the messages.
async fn trailers(mut answer: Answer) -> Result<u16, Failure> {
    let mut read = 0;
    while let Some(frame) = answer.body.frame().await {
        let frame = frame?;
        read += frame.data_ref().map_or(0, Bytes::len);
        if read > MAX_BODY {
            return Err(Failure::check(format!("answer is longer than {MAX_BODY} bytes")));
        }
        if let Some(code) = frame.trailers_ref().map(grpc_status).transpose()?.flatten() {
            return Ok(code);
        }
    }
    Err(Failure::check("answer is not gRPC: it has no grpc-status"))
}

fn grpc_status(headers: &HeaderMap) -> Result<Option<u16>, Failure> {
    let Some(value) = headers.get(GRPC_STATUS) else { return Ok(None) };
    let code = value.to_str().ok().and_then(|text| text.parse().ok());
    let wrong = || Failure::check(format!("answer is not gRPC: grpc-status is {value:?}"));
    code.map(Some).ok_or_else(wrong)
}

/// Sends the request and waits for the headers of the answer.
async fn send<S, B>(stream: S, request: Builder, body: B) -> Result<(Answer, HeaderMap), Failure>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    B: Body<Data = Bytes, Error = std::convert::Infallible> + Send + Unpin + 'static,
{
    let request = request
        .version(Version::HTTP_2)
        .header(header::USER_AGENT, USER_AGENT)
        .body(body)
        .map_err(Failure::request)?;
    let (mut sender, connection) = http2::Builder::new(TokioExecutor::new())
        .max_header_list_size(MAX_HEAD as u32)
        .handshake(TokioIo::new(stream))
        .await?;
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let (head, body) = sender.send_request(request).await?.into_parts();
    Ok((Answer { status: head.status, body, connection: driver }, head.headers))
}

/// Its authority is the target, as HTTP/1.1's `Host`.
fn uri(peer: SocketAddr, path: &str, scheme: &str) -> Result<Uri, Failure> {
    Uri::builder()
        .scheme(scheme)
        .authority(peer.to_string())
        .path_and_query(path_and_query(path)?)
        .build()
        .map_err(Failure::request)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::time::Duration;

    use http_body_util::{BodyExt as _, Full};
    use hyper::body::{Bytes, Incoming};
    use hyper::http::HeaderMap;
    use hyper::server::conn::http2;
    use hyper::service::service_fn;
    use hyper::{Request, Response};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::net::TcpListener;

    use crate::config::model::{GrpcProbe, HealthCheck, HttpProbe, ProbeKind};
    use crate::health::machine::Outcome;
    use crate::health::probe::{Probe as _, Prober};
    use crate::health::{CheckSpec, Reason};

    /// What the target answers, given the method, the path and the message.
    type Answer = fn(String, Bytes) -> (u16, Option<&'static str>, Option<&'static str>);

    /// The outcome of a check of a target that answers with an HTTP status, and a gRPC status in
    /// the headers or in the trailers.
    async fn check(probe: ProbeKind, answer: Answer) -> Outcome {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let stream = TokioIo::new(listener.accept().await.unwrap().0);
            let service = service_fn(move |request: Request<Incoming>| async move {
                let asked = format!("{} {}", request.method(), request.uri());
                let message = request.into_body().collect().await.unwrap().to_bytes();
                let (status, in_head, in_trailers) = answer(asked, message);
                let trailers = in_trailers.map(|code| {
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", code.parse().unwrap());
                    Ok::<_, Infallible>(trailers)
                });
                let body = Full::new(Bytes::from_static(b"message"));
                let mut response = Response::builder().status(status);
                if let Some(code) = in_head {
                    response = response.header("grpc-status", code);
                }
                let body = body.with_trailers(std::future::ready(trailers));
                Ok::<_, Infallible>(response.body(body).unwrap())
            });
            let server = http2::Builder::new(TokioExecutor::new());
            let _ = server.serve_connection(stream, service).await;
        });
        let patient = Duration::from_secs(10);
        let check = HealthCheck {
            probe,
            interval: patient,
            timeout: patient,
            port: None,
            healthy_threshold: 1,
            unhealthy_threshold: 1,
        };
        let spec =
            CheckSpec { check, address: address.ip(), port: address.port(), proxy_protocol: false };
        Prober::new().probe(&spec).await
    }

    fn grpc() -> ProbeKind {
        let path = "/AWS.ALB/healthcheck".to_owned();
        ProbeKind::Grpc(GrpcProbe { path, matcher: vec![0..=0, 12..=12], tls: false })
    }

    fn failed(reason: Reason, description: &str) -> Outcome {
        Outcome::Fail { reason, description: description.to_owned() }
    }

    #[tokio::test]
    async fn a_call_passes_by_its_status_in_headers_or_trailers() {
        let unimplemented: Answer = |asked, message| {
            let is_right = asked.starts_with("POST http://127.0.0.1:")
                && asked.ends_with("/AWS.ALB/healthcheck")
                && message == [0_u8; 5].as_slice();
            (200, is_right.then_some("12"), None)
        };
        assert_eq!(check(grpc(), unimplemented).await, Outcome::Pass);
        assert_eq!(check(grpc(), |_, _| (200, None, Some("0"))).await, Outcome::Pass);
    }

    #[tokio::test]
    async fn a_call_fails_by_its_status() {
        let outcome = check(grpc(), |_, _| (200, None, Some("14"))).await;
        let description = "expected gRPC status 0,12, got 14";
        assert_eq!(outcome, failed(Reason::ResponseCodeMismatch, description));
    }

    #[tokio::test]
    async fn what_is_not_grpc_fails() {
        for (answer, description) in [
            ((|_, _| (404, None, None)) as Answer, "answer is not gRPC: HTTP status 404"),
            (|_, _| (200, None, None), "answer is not gRPC: it has no grpc-status"),
            (|_, _| (200, Some("ok"), None), "answer is not gRPC: grpc-status is \"ok\""),
        ] {
            let outcome = check(grpc(), answer).await;
            assert_eq!(outcome, failed(Reason::FailedHealthChecks, description));
        }
    }

    #[tokio::test]
    async fn http_2_is_asked_where_it_is_spoken() {
        let http = |matcher| {
            let path = "/ready".to_owned();
            ProbeKind::Http(HttpProbe { path, matcher, http2: true })
        };
        let answer: Answer = |asked, _| {
            let is_right = asked.starts_with("GET http://") && asked.ends_with("/ready");
            (if is_right { 204 } else { 400 }, None, None)
        };
        assert_eq!(check(http(vec![204..=204]), answer).await, Outcome::Pass);
        let outcome = check(http(vec![200..=200]), answer).await;
        assert_eq!(outcome, failed(Reason::ResponseCodeMismatch, "expected 200, got 204"));
    }
}
