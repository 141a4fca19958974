//! Every probe here asks a real server on the loopback.

use std::convert::Infallible;
use std::net::IpAddr;

use http_body_util::Full;
use hyper::Response;
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::sleep;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::config::model::HealthCheck;

/// Long enough for a loaded machine; only tests that wait for it use a shorter one.
const PATIENT: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(300);

fn http(matcher: &[RangeInclusive<u16>]) -> HttpProbe {
    HttpProbe { path: "/health?deep=1".to_owned(), matcher: matcher.to_vec(), http2: false }
}

async fn probe(kind: ProbeKind, address: SocketAddr, timeout: Duration) -> Outcome {
    Prober::new().probe(&spec(kind, address, timeout)).await
}

fn spec(kind: ProbeKind, address: SocketAddr, timeout: Duration) -> CheckSpec {
    CheckSpec {
        check: HealthCheck {
            probe: kind,
            port: None,
            interval: PATIENT,
            timeout,
            healthy_threshold: 3,
            unhealthy_threshold: 2,
        },
        address: address.ip(),
        port: address.port(),
        proxy_protocol: false,
    }
}

async fn get_200(address: SocketAddr) -> Outcome {
    probe(ProbeKind::Http(http(&[200..=299])), address, PATIENT).await
}

fn failed(description: &str) -> Outcome {
    let description = description.to_owned();
    Outcome::Fail { reason: Reason::FailedHealthChecks, description }
}

fn late(description: &str) -> Outcome {
    Outcome::Fail { reason: Reason::Timeout, description: description.to_owned() }
}

async fn listen(ip: &str) -> (TcpListener, SocketAddr) {
    let ip: IpAddr = ip.parse().unwrap();
    let listener = TcpListener::bind((ip, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A server that runs `serve` on the first connection. Gone with the test's runtime.
async fn serve<F>(serve: impl FnOnce(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send,
{
    let (listener, address) = listen("127.0.0.1").await;
    tokio::spawn(async move { serve(listener.accept().await.unwrap().0).await });
    address
}

/// A server that reads a request and answers these bytes.
async fn answer(bytes: impl Into<Vec<u8>>) -> SocketAddr {
    let bytes = bytes.into();
    serve(async move |mut stream| {
        read_request(&mut stream).await;
        // The client may have seen enough before the end.
        let _ = stream.write_all(&bytes).await;
    })
    .await
}

async fn read_request(stream: &mut TcpStream) -> String {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        request.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(request).unwrap()
}

/// Keeps a server's end of a connection open.
async fn hold(mut stream: TcpStream) {
    let _ = stream.read_to_end(&mut Vec::new()).await;
}

#[tokio::test]
async fn tcp_passes_on_a_connection_of_either_family() {
    for ip in ["127.0.0.1", "::1"] {
        let (_listener, address) = listen(ip).await;
        assert_eq!(probe(ProbeKind::Tcp, address, PATIENT).await, Outcome::Pass);
    }
}

/// The bytes are those of the PROXY protocol's text, sections 2.2.
#[tokio::test]
async fn a_connection_of_its_own_is_told_by_the_proxy_protocol() {
    const HEADER: [u8; 16] = *b"\x0D\x0A\x0D\x0A\x00\x0D\x0A\x51\x55\x49\x54\x0A\x20\0\0\0";
    for kind in [ProbeKind::Http(http(&[200..=200])), ProbeKind::Tcp] {
        let (sender, told) = oneshot::channel();
        let is_http = kind != ProbeKind::Tcp;
        let address = serve(async move |mut stream| {
            let mut header = [0; 16];
            stream.read_exact(&mut header).await.unwrap();
            let _ = sender.send(header);
            if is_http {
                read_request(&mut stream).await;
                let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
                stream.write_all(answer).await.unwrap();
            }
        })
        .await;
        let spec = CheckSpec { proxy_protocol: true, ..spec(kind, address, PATIENT) };
        assert_eq!(Prober::new().probe(&spec).await, Outcome::Pass);
        assert_eq!(told.await.unwrap(), HEADER);
    }
}

#[tokio::test]
async fn tcp_closes_without_a_reset() {
    let (sender, closed) = oneshot::channel();
    let address = serve(async move |mut stream| {
        let _ = sender.send(stream.read(&mut [0]).await);
    })
    .await;
    assert_eq!(probe(ProbeKind::Tcp, address, PATIENT).await, Outcome::Pass);
    assert_eq!(closed.await.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn a_closed_port_refuses() {
    let (listener, address) = listen("127.0.0.1").await;
    drop(listener);
    let refused = failed("connection refused");
    assert_eq!(probe(ProbeKind::Tcp, address, PATIENT).await, refused);
    assert_eq!(get_200(address).await, refused);
}

#[tokio::test]
async fn a_connection_that_never_comes_about_times_out() {
    // A full accept queue: the kernel drops further SYNs.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let _first = TcpStream::connect(address).await.unwrap();
    assert_eq!(probe(ProbeKind::Tcp, address, SHORT).await, late("no connection within 300ms"));
}

#[tokio::test]
async fn the_request_says_who_asks_for_what() {
    let (sender, request) = oneshot::channel();
    let address = serve(async move |mut stream| {
        let _ = sender.send(read_request(&mut stream).await);
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        hold(stream).await;
    })
    .await;
    assert_eq!(get_200(address).await, Outcome::Pass);
    let request = request.await.unwrap().to_ascii_lowercase();
    let mut lines: Vec<_> = request.trim_end().split("\r\n").collect();
    assert_eq!(lines.remove(0), "get /health?deep=1 http/1.1");
    lines.sort_unstable();
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        lines,
        [
            "accept: */*",
            "connection: close",
            &format!("host: {address}"),
            &format!("user-agent: lb-health-check/{version}"),
        ]
    );
}

#[tokio::test]
async fn the_matcher_decides() {
    let moved = "HTTP/1.1 301 Moved Permanently\r\nlocation: http://192.0.2.1/\r\n\r\n";
    let matched = http(&[200..=299, 301..=301]);
    let outcome = probe(ProbeKind::Http(matched), answer(moved).await, PATIENT).await;
    assert_eq!(outcome, Outcome::Pass);

    let broken = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";
    let matched = http(&[200..=299, 301..=301]);
    let outcome = probe(ProbeKind::Http(matched), answer(broken).await, PATIENT).await;
    let description = "expected 200-299,301, got 503".to_owned();
    assert_eq!(outcome, Outcome::Fail { reason: Reason::ResponseCodeMismatch, description });
}

#[tokio::test]
async fn a_server_that_never_answers_times_out() {
    let address = serve(hold).await;
    let outcome = probe(ProbeKind::Http(http(&[200..=200])), address, SHORT).await;
    assert_eq!(outcome, late("no answer within 300ms"));
    let address = serve(hold).await;
    let outcome = probe(ProbeKind::Https(http(&[200..=200])), address, SHORT).await;
    assert_eq!(outcome, late("no answer within 300ms"));
}

#[tokio::test]
async fn a_trickle_of_headers_times_out() {
    let address = serve(async |mut stream| {
        for byte in b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n" {
            if stream.write_u8(*byte).await.is_err() {
                return;
            }
            sleep(SHORT / 10).await;
        }
    })
    .await;
    let outcome = probe(ProbeKind::Http(http(&[200..=200])), address, SHORT).await;
    assert_eq!(outcome, late("no answer within 300ms"));
}

#[tokio::test]
async fn garbage_is_no_answer() {
    let Outcome::Fail { reason, description } = get_200(answer("SSH-2.0-x\r\n\r\n").await).await
    else {
        panic!("garbage passed");
    };
    assert_eq!(reason, Reason::FailedHealthChecks);
    assert!(description.starts_with("answer is not HTTP: "), "{description}");
}

#[tokio::test]
async fn endless_headers_are_cut_off() {
    let too_large = failed("answer has too many or too long headers");
    let long = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "x".repeat(MAX_HEAD));
    assert_eq!(get_200(answer(long).await).await, too_large);

    let address = serve(async |mut stream| {
        read_request(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n").await;
        while stream.write_all(b"x-filler: and so on\r\n").await.is_ok() {}
    })
    .await;
    assert_eq!(get_200(address).await, too_large);
}

#[tokio::test]
async fn a_close_or_a_reset_before_the_answer_fails() {
    let address = serve(async |mut stream| {
        read_request(&mut stream).await;
    })
    .await;
    assert_eq!(get_200(address).await, failed("connection closed before an answer"));

    let address = serve(async |mut stream| {
        // Closed with bytes unread: the kernel resets.
        let _ = stream.read_u8().await;
    })
    .await;
    assert_eq!(get_200(address).await, failed("connection reset"));
}

#[tokio::test]
async fn the_body_has_no_say() {
    // Announced, but never sent.
    let address = serve(async |mut stream| {
        read_request(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n").await.unwrap();
        hold(stream).await;
    })
    .await;
    assert_eq!(get_200(address).await, Outcome::Pass);

    let address = serve(async |mut stream| {
        read_request(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
    })
    .await;
    assert_eq!(get_200(address).await, Outcome::Pass);
}

#[tokio::test]
async fn a_target_may_finish_its_answer() {
    let (sender, ending) = oneshot::channel();
    let address = serve(async move |mut stream| {
        read_request(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 20000\r\n\r\n").await.unwrap();
        // Later than the client needs to see the status.
        for half in [[b'x'; 10_000]; 2] {
            sleep(Duration::from_millis(5)).await;
            stream.write_all(&half).await.unwrap();
        }
        // A reset would be an error here.
        let _ = sender.send(stream.read(&mut [0]).await);
    })
    .await;
    let stream = TcpStream::connect(address).await.unwrap();
    let answer =
        get(stream, address, &http(&[]), "http").await.unwrap_or_else(|_| panic!("no answer"));
    answer.finish(PATIENT).await;
    assert_eq!(ending.await.unwrap().unwrap(), 0);
}

/// A self-signed certificate of another name, years out of date.
fn tls_server(versions: &[&'static rustls::SupportedProtocolVersion]) -> TlsAcceptor {
    let mut params = rcgen::CertificateParams::new(["elsewhere.invalid".to_owned()]).unwrap();
    params.not_after = rcgen::date_time_ymd(2001, 1, 1);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    Arc::new(config).into()
}

#[tokio::test]
async fn https_passes_whatever_the_certificate() {
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let acceptor = tls_server(&[version]);
        let (sender, ending) = oneshot::channel();
        let address = serve(async move |stream| {
            let stream = acceptor.accept(stream).await.unwrap();
            let hello = async |_| {
                let body = Full::new(Bytes::from_static(b"hello"));
                Ok::<_, Infallible>(Response::builder().status(204).body(body).unwrap())
            };
            let served = server::Builder::new()
                .serve_connection(TokioIo::new(stream), service_fn(hello))
                .await;
            let _ = sender.send(served);
        })
        .await;
        let outcome = probe(ProbeKind::Https(http(&[204..=204])), address, PATIENT).await;
        assert_eq!(outcome, Outcome::Pass);
        ending.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn https_fails_where_plain_http_is_spoken() {
    let address = serve(async |mut stream| {
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        hold(stream).await;
    })
    .await;
    let outcome = probe(ProbeKind::Https(http(&[200..=200])), address, PATIENT).await;
    let Outcome::Fail { reason, description } = outcome else { panic!("plain HTTP passed") };
    assert_eq!(reason, Reason::FailedHealthChecks);
    assert!(description.starts_with("TLS: "), "{description}");
}

#[tokio::test]
async fn a_path_that_is_no_path_fails_without_a_panic() {
    let address = serve(hold).await;
    let probe_kind = HttpProbe { path: "/a b".to_owned(), matcher: vec![200..=200], http2: false };
    let outcome = probe(ProbeKind::Http(probe_kind), address, PATIENT).await;
    let Outcome::Fail { description, .. } = outcome else { panic!("passed") };
    assert!(description.contains("\"/a b\" cannot be requested"), "{description}");
}

#[test]
fn errors_of_the_network_have_names() {
    let failure = |kind| {
        let Failure { reason, description } = Failure::from(io::Error::from(kind));
        (reason, description)
    };
    use io::ErrorKind::{ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut};
    let failed = Reason::FailedHealthChecks;
    assert_eq!(failure(HostUnreachable), (failed, "host unreachable".to_owned()));
    assert_eq!(failure(NetworkUnreachable), (failed, "network unreachable".to_owned()));
    assert_eq!(failure(ConnectionReset), (failed, "connection reset".to_owned()));
    assert_eq!(failure(TimedOut), (Reason::Timeout, "connection timed out".to_owned()));
}
