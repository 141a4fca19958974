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
