//! HTTP/2 on the wire, frame by frame.
//!
//! The first cases are those of h2spec (its version 2.6), a public suite of cases for servers of
//! HTTP/2: sections, numbers and what is expected are its own, frames and code are ours. As there,
//! the end of the connection will do in place of GOAWAY or RST_STREAM.

mod beyond;
mod connections;
mod frames;
mod generic;
mod messages;
mod peer;
mod suite;
mod wire;

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, server};
use hyper_util::rt::TokioIo;
use lb_userspace::config::model::ProxyProtocol;
use tempfile::TempDir;
use tokio::net::TcpStream;

use self::peer::{Expect, Peer};
use self::suite::Exception;
use self::wire::code;
use crate::harness::{Site, origin};
use crate::tls;

/// A server that answers requests with what it saw of them, and those for `/hold` never.
async fn witness() -> SocketAddr {
    let answer = |request: Request<Incoming>| async move {
        if request.uri().path() == "/hold" {
            std::future::pending::<()>().await;
        }
        let (head, body) = request.into_parts();
        let mut seen = format!("{} {}\n", head.method, head.uri);
        for (name, value) in &head.headers {
            seen += &format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes()));
        }
        let Ok(body) = body.collect().await else { return Err("no body") };
        seen += &format!("\n{}", String::from_utf8_lossy(&body.to_bytes()));
        Ok(Response::new(Full::new(Bytes::from(seen))))
    };
    origin(move |stream| async move {
        let http1 = server::conn::http1::Builder::new();
        let _ = http1.serve_connection(TokioIo::new(stream), service_fn(answer)).await;
    })
    .await
}

/// Where h2spec would have another code; it takes the end of the connection for an answer, which
/// comes in the first two.
const EXCEPTIONS: &[Exception] = &[
    Exception {
        ids: &[
            "4.3/1",
            "5.1/12",
            "6.4/3",
            "6.5/1",
            "6.5/3",
            "6.5.2/2",
            "6.7/4",
            "6.9/3",
            "6.9.2/3",
            "hpack/2.3.3/1",
            "hpack/4.2/1",
            "hpack/5.2/1",
            "hpack/5.2/2",
            "hpack/5.2/3",
            "hpack/6.1/1",
            "hpack/6.3/1",
        ],
        comes: Expect::Goaway(code::PROTOCOL_ERROR),
        why: "the connection ends as it must, with the code for everything (RFC 9113 section 7) in \
              place of the one for this",
    },
    Exception {
        ids: &["5.1/5", "5.1/6", "5.1/9", "5.1.1/3", "6.1/2", "6.3/2"],
        comes: Expect::Goaway(code::PROTOCOL_ERROR),
        why: "an error of a stream may be one of the connection (RFC 9113 section 5.4.1)",
    },
    Exception {
        ids: &["5.1/11"],
        comes: Expect::Reset(1, code::STREAM_CLOSED),
        why: "DATA of a stream that is not open is an error of that stream (RFC 9113 section 6.1; \
              RFC 7540 section 5.1 wanted one of the connection)",
    },
];

fn h2spec() -> Vec<suite::Case> {
    [generic::cases(), frames::cases(), messages::cases()].concat()
}

#[tokio::test]
async fn cases_of_h2spec() {
    let (site, address) = Site::new(&[witness().await]);
    let _proxy = site.start();
    let cases = h2spec();
    assert_eq!(cases.len(), 148);
    let connect = async || Peer::over(TcpStream::connect(address).await.unwrap());
    suite::run(cases, EXCEPTIONS, connect).await;
}

/// Malformed requests that are served.
const BEYOND: &[Exception] = &[
    Exception {
        ids: &["8.2.1/11", "8.2.1/12"],
        comes: Expect::Status(1, 200),
        why: "blanks around a value are no part of it, for HTTP/1.1 targets, either (RFC 9110 \
              section 5.5)",
    },
    Exception {
        ids: &["8.1/2", "8.1/3"],
        comes: Expect::Status(1, 200),
        why: "pseudo-header fields in trailers are left out, and no target sees them",
    },
];

#[tokio::test]
async fn cases_of_h2spec_in_tls() {
    let directory = TempDir::new().unwrap();
    let (mut site, _) = Site::new(&[witness().await]);
    let certificate = tls::certificate(directory.path(), "site", &["site.test"]);
    let address = site.listener(ProxyProtocol::Https, Some(tls::listener(vec![certificate])));
    let _proxy = site.start();
    let connect = async || {
        let version = &rustls::version::TLS13;
        let stream = tls::handshake(address, "site.test", &["h2"], &tls::ALL, version).await;
        Peer::over(stream.unwrap())
    };
    suite::run(h2spec(), EXCEPTIONS, connect).await;
}

#[tokio::test]
async fn cases_of_a_proxy() {
    let (site, address) = Site::new(&[witness().await]);
    let _proxy = site.start();
    let connect = async || Peer::over(TcpStream::connect(address).await.unwrap());
    suite::run(beyond::cases(), BEYOND, connect).await;
}
