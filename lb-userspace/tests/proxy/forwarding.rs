//! Requests and answers on their way through.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::HeaderMap;
use hyper::service::service_fn;
use hyper::{Request, Response, Version, client, server};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lb_userspace::config::model::HttpVersion;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::harness::{Client, HELLO, Site, answers, ask, count, origin, read_head, wait_count};

#[tokio::test]
async fn keep_alive_both_ways() {
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    let target = origin(move |mut stream| {
        counted.fetch_add(1, Relaxed);
        async move {
            while read_head(&mut stream).await.is_some() {
                stream.write_all(HELLO.as_bytes()).await.unwrap();
            }
        }
    })
    .await;
    let (site, address) = Site::new(&[target]);
    let proxy = site.start();
    let mut client = Client::connect(address).await;
    for _ in 0..10 {
        let answer = client.get("/").await;
        assert_eq!((answer.status(), answer.body.as_slice()), (200, b"hello".as_slice()));
    }
    assert_eq!(connections.load(Relaxed), 1);
    assert_eq!(count(&proxy, "RequestCount"), 10);
    assert_eq!(count(&proxy, "HTTPCode_Target_2XX_Count"), 10);
    // One of the client, one to the target.
    assert_eq!(count(&proxy, "NewConnectionCount"), 2);
    assert_eq!(count(&proxy, "ActiveConnectionCount"), 2);
    drop(client);
    wait_count(&proxy, "ActiveConnectionCount", 1).await;
    let counters = proxy.counters();
    let target = &counters.target_groups["web"].targets[&target];
    assert_eq!(target.counts["RequestCount"], 10);
    assert_eq!(target.target_response_time.buckets.iter().sum::<u64>(), 10);
}

#[tokio::test]
async fn bytes_are_counted_while_they_pass() {
    let target = origin(|mut stream| async move {
        read_head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nfirst").await;
        std::future::pending::<()>().await;
    })
    .await;
    let (site, address) = Site::new(&[target]);
    let proxy = site.start();
    let mut client = Client::connect(address).await;
    let request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    client.send(request).await;
    let head = client.head().await.head;
    let chunk = client.exactly("5\r\nfirst\r\n".len()).await;
    let bytes = request.len() + head.len() + chunk.len();
    wait_count(&proxy, "ProcessedBytes", bytes as u64).await;
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let (site, address) = Site::new(&[echo(false).await]);
    let _proxy = site.start();
    let mut client = Client::connect(address).await;
    let requests: String =
        (0..5).map(|n| format!("GET /{n} HTTP/1.1\r\nHost: a\r\n\r\n")).collect();
    client.send(requests).await;
    for n in 0..5 {
        assert_eq!(client.answer().await.field("path"), Some(format!("/{n}").as_str()));
    }
}

#[tokio::test]
async fn large_bodies_both_ways() {
    let (site, address) = Site::new(&[echo(false).await]);
    let _proxy = site.start();
    let body: Vec<u8> = (0..1_000_000_u32).map(|n| n.wrapping_mul(2_654_435_761) as u8).collect();
    let mut client = Client::connect(address).await;
    client
        .send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len()))
        .await;
    client.send(&body).await;
    let answer = client.answer().await;
    assert_eq!(answer.status(), 200);
    assert!(answer.body == body);
}

#[tokio::test]
async fn chunked_bodies_both_ways() {
    let (site, address) = Site::new(&[echo(false).await]);
    let _proxy = site.start();
    let mut client = Client::connect(address).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    for chunk in ["5\r\nhello\r\n", "1\r\n \r\n", "5\r\nworld\r\n0\r\n\r\n"] {
        client.send(chunk).await;
    }
    let answer = client.answer().await;
    assert_eq!(answer.field("transfer-encoding"), Some("chunked"));
    assert_eq!(answer.body, b"hello world");
}

#[tokio::test]
async fn the_client_is_told_to_continue() {
    let (site, address) = Site::new(&[echo(false).await]);
    let _proxy = site.start();
    let mut client = Client::connect(address).await;
    let head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n";
    client.send(head).await;
    assert_eq!(client.head().await.status(), 100);
    client.send("hello").await;
    assert_eq!(client.answer().await.body, b"hello");
}

#[tokio::test]
async fn answers_to_head_have_a_length_and_no_body() {
    let target = answers("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n").await;
    let (site, address) = Site::new(&[target]);
    let _proxy = site.start();
    let mut client = Client::connect(address).await;
    for _ in 0..2 {
        client.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert_eq!(client.head().await.field("content-length"), Some("1000"));
    }
}

#[tokio::test]
async fn what_a_target_says_before_its_answer_is_no_answer() {
    let target = answers(
        "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    )
    .await;
    let (site, address) = Site::new(&[target]);
    let _proxy = site.start();
    assert_eq!(Client::connect(address).await.get("/").await.status(), 200);
}

#[tokio::test]
async fn a_body_can_end_with_the_targets_connection() {
    let target = origin(|mut stream| async move {
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nuntil the end").await.unwrap();
    })
    .await;
    let (site, address) = Site::new(&[target]);
    let _proxy = site.start();
    assert_eq!(Client::connect(address).await.get("/").await.body, b"until the end");
}

#[tokio::test]
async fn a_kept_connection_that_died_is_replaced() {
    // Each connection is good for one request, and ends without a word when the next one comes.
    let target = origin(|mut stream| async move {
        read_head(&mut stream).await;
        stream.write_all(HELLO.as_bytes()).await.unwrap();
        read_head(&mut stream).await;
    })
    .await;
    let (site, address) = Site::new(&[target]);
    let _proxy = site.start();
    let mut client = Client::connect(address).await;
    for _ in 0..5 {
        assert_eq!(client.get("/").await.status(), 200);
    }
    // What may not be repeated is not.
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(client.answer().await.status(), 502);
}

#[tokio::test]
async fn fields_of_one_connection_stay_there() {
    let (site, address) = Site::new(&[echo(false).await]);
    let _proxy = site.start();
    let answer = ask(
        address,
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nKeep-Alive: 5\r\nX-Kept: yes\r\n\r\n",
    )
    .await;
    let fields = answer.field("fields").unwrap();
    assert!(fields.contains("x-kept"), "{fields}");
    assert!(!fields.contains("keep-alive") && !fields.contains("connection"), "{fields}");
}

/// Sends bodies back, with trailers if there are any, and says what it saw.
async fn echo_request(request: Request<Incoming>) -> Result<Response<Incoming>, Infallible> {
    let fields: Vec<_> = request.headers().keys().map(|it| it.as_str()).collect();
    let response = Response::builder()
        .header("path", request.uri().path())
        .header("host-seen", host(&request))
        .header("fields", fields.join(","));
    Ok(response.body(request.into_body()).unwrap())
}

/// Serves a connection with that.
pub async fn echo_http2(stream: TcpStream) {
    let http2 = server::conn::http2::Builder::new(TokioExecutor::new());
    let _ = http2.serve_connection(TokioIo::new(stream), service_fn(echo_request)).await;
}

/// A server that does that.
async fn echo(is_http2: bool) -> SocketAddr {
    origin(move |stream| async move {
        if is_http2 {
            echo_http2(stream).await;
        } else {
            let io = TokioIo::new(stream);
            let http1 = server::conn::http1::Builder::new();
            let _ = http1.serve_connection(io, service_fn(echo_request)).await;
        }
    })
    .await
}

fn host(request: &Request<Incoming>) -> String {
    let authority = request.uri().authority().map(|it| it.to_string());
    authority
        .or_else(|| Some(request.headers().get("host")?.to_str().ok()?.to_owned()))
        .unwrap_or_default()
}

/// A client of HTTP/2 with prior knowledge.
pub async fn http2<B>(address: SocketAddr) -> client::conn::http2::SendRequest<B>
where
    B: Body<Data = Bytes, Error = Infallible> + Send + Unpin + 'static,
{
    let stream = TcpStream::connect(address).await.unwrap();
    let (sender, connection) =
        client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

#[tokio::test]
async fn http2_to_http1() {
    let (site, address) = Site::new(&[echo(false).await]);
    let _proxy = site.start();
    let mut client = http2(address).await;
    let requests = (0..20).map(|n| {
        let uri = format!("http://site.test/{n}");
        client.send_request(Request::post(uri).body(Full::new(Bytes::from("hello"))).unwrap())
    });
    for (n, answer) in futures::future::join_all(requests).await.into_iter().enumerate() {
        let answer = answer.unwrap();
        assert_eq!(answer.version(), Version::HTTP_2);
        assert_eq!(answer.headers()["path"], format!("/{n}"));
        assert_eq!(answer.headers()["host-seen"], format!("site.test:{}", address.port()));
        assert_eq!(answer.collect().await.unwrap().to_bytes(), "hello");
    }
}

#[tokio::test]
async fn http2_to_http2() {
    let (site, address) = Site::new(&[echo(true).await]);
    let proxy = site.version(HttpVersion::Http2).start();
    let mut client = http2(address).await;
    let body = Bytes::from(vec![7; 1_000_000]);
    for _ in 0..2 {
        let request = Request::post("http://site.test/a?b=c").body(Full::new(body.clone()));
        let answer = client.send_request(request.unwrap()).await.unwrap();
        assert_eq!(answer.headers()["host-seen"], format!("site.test:{}", address.port()));
        assert!(answer.collect().await.unwrap().to_bytes() == body);
    }
    assert_eq!(count(&proxy, "RequestCount"), 2);
}

const IDLE: Duration = Duration::from_millis(400);

/// A target that begins an answer to `/stalls` and goes no further, answers `/large` with more than
/// any window holds, and everything else at once. It tells when a connection's client left.
async fn stalling() -> (SocketAddr, Arc<Semaphore>) {
    let left = Arc::new(Semaphore::new(0));
    let told = left.clone();
    let address = origin(move |mut stream| {
        let told = told.clone();
        async move {
            while let Some(head) = read_head(&mut stream).await {
                if head.starts_with("GET /stalls ") {
                    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345";
                    stream.write_all(answer).await.unwrap();
                    let _ = read_head(&mut stream).await;
                    told.add_permits(1);
                } else if head.starts_with("GET /large ") {
                    let head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n";
                    stream.write_all(head).await.unwrap();
                    while stream.write_all(&[0; 100_000]).await.is_ok() {}
                    told.add_permits(1);
                } else {
                    stream.write_all(HELLO.as_bytes()).await.unwrap();
                }
            }
        }
    });
    (address.await, left)
}

#[tokio::test]
async fn a_stalled_stream_times_out_alone() {
    for path in ["stalls", "large"] {
        let (target, left) = stalling().await;
        let (site, address) = Site::new(&[target]);
        let proxy = site.attributes(|it| it.idle_timeout = IDLE).start();
        let mut client = http2::<Full<Bytes>>(address).await;
        let mut get = async |path: &str| {
            let uri = format!("http://site.test/{path}");
            client.send_request(Request::get(uri).body(Full::default()).unwrap()).await.unwrap()
        };
        let stalled = get(path).await;
        assert_eq!(stalled.status(), 200);
        let began = Instant::now();
        // The others go on for all that time, on the same connection.
        while left.available_permits() == 0 {
            assert_eq!(get("").await.into_body().collect().await.unwrap().to_bytes(), "hello");
            assert!(began.elapsed() < crate::harness::LIMIT, "{path}");
            sleep(IDLE / 8).await;
        }
        assert!(began.elapsed() >= IDLE, "{path}: {:?}", began.elapsed());
        assert!(stalled.into_body().collect().await.is_err());
        assert_eq!(get("").await.into_body().collect().await.unwrap().to_bytes(), "hello");
        let metrics = proxy.counters();
        assert!(metrics.load_balancers["site"].counts["RequestCount"] > 5);
    }
}

#[tokio::test]
async fn a_stalled_stream_leaves_a_silent_connection_open() {
    let (target, left) = stalling().await;
    let (site, address) = Site::new(&[target]);
    let _proxy = site.attributes(|it| it.idle_timeout = IDLE).start();
    let mut client = http2::<Full<Bytes>>(address).await;
    let mut get = async |path: &str| {
        let uri = format!("http://site.test/{path}");
        client.send_request(Request::get(uri).body(Full::default()).unwrap()).await.unwrap()
    };
    assert!(get("stalls").await.into_body().collect().await.is_err());
    timeout(crate::harness::LIMIT, left.acquire()).await.unwrap().unwrap().forget();
    assert_eq!(get("").await.into_body().collect().await.unwrap().to_bytes(), "hello");
}

#[tokio::test]
async fn trailers_of_grpc_are_kept() {
    let (site, address) = Site::new(&[echo(true).await]);
    let proxy = site.version(HttpVersion::Grpc).start();
    let mut client = http2(address).await;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    let frames = [Frame::data(Bytes::from("message")), Frame::trailers(trailers.clone())];
    let body = StreamBody::new(futures::stream::iter(frames.map(Ok)));
    let request = Request::post("http://site.test/package.Service/Method")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .unwrap();
    let answer = client.send_request(request).await.unwrap();
    assert!(answer.headers()["fields"].to_str().unwrap().contains("te"));
    let body = answer.collect().await.unwrap();
    assert_eq!(body.trailers(), Some(&trailers));
    assert_eq!(body.to_bytes(), "message");
    assert_eq!(count(&proxy, "GrpcRequestCount"), 1);
}

#[tokio::test]
async fn a_client_that_reads_slowly_gets_everything() {
    let (site, address) = Site::new(&[echo(false).await]);
    let _proxy = site.attributes(|it| it.idle_timeout = Duration::from_millis(500)).start();
    let mut client = Client::connect(address).await;
    let body = vec![5; 4_000_000];
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4000000\r\n\r\n").await;
    let (mut reader, mut writer) = client.stream.into_split();
    let sending = tokio::spawn(async move { writer.write_all(&body).await.map(|()| writer) });
    let mut read = 0;
    let mut buffer = vec![0; 400_000];
    while read < 4_000_000 {
        sleep(Duration::from_millis(50)).await;
        let n = tokio::io::AsyncReadExt::read(&mut reader, &mut buffer).await.unwrap();
        assert!(n > 0, "closed after {read} bytes");
        read += n;
    }
    sending.await.unwrap().unwrap();
}

/// Longer than a connection without a request keeps its buffers.
const QUIET: Duration = Duration::from_secs(4);

#[tokio::test]
async fn quiet_connections_go_on() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let _proxy = site.start();
    let mut client = Client::connect(address).await;
    assert_eq!(client.get("/").await.body, b"hello");
    sleep(QUIET).await;
    assert_eq!(client.get("/").await.body, b"hello");
    // Half of a head that came together with a request waits for its rest.
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HT").await;
    assert_eq!(client.answer().await.body, b"hello");
    sleep(QUIET).await;
    client.send("TP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.answer().await.body, b"hello");
}

/// A body whose request has been answered is none the less a body, however long it takes.
#[tokio::test]
async fn what_is_left_of_a_body_is_never_a_request() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let proxy = site.start();
    let mut client = Client::connect(address).await;
    let rest = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    let length = 10 + rest.len();
    client
        .send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n0123456789"))
        .await;
    assert_eq!(client.answer().await.body, b"hello");
    sleep(QUIET).await;
    let _ = client.stream.write_all(rest.as_bytes()).await;
    // Silence, or the end of the connection, but no answer.
    assert!(timeout(QUIET, client.is_closed()).await.unwrap_or(true));
    assert_eq!(count(&proxy, "RequestCount"), 1);
}
