//! Every error that the load balancer answers with by itself, provoked.

use std::time::{Duration, Instant};

use lb_userspace::config::model::HttpVersion;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use crate::harness::{
    Client, HELLO, Site, answers, ask, count, free, origin, read_head, wait_count,
};

const SHORT: Duration = Duration::from_millis(300);

#[tokio::test]
async fn error_400_malformed() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let proxy = site.start();
    for (n, bad) in [
        "GET / HTTP/1.1\r\nHost: a\r\nbad header\r\n\r\n",
        "GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
        "\0\x01\x02\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 2\r\n\r\n",
        "GET / HTTP/7.0\r\nHost: a\r\n\r\n",
    ]
    .into_iter()
    .enumerate()
    {
        let answer = ask(address, bad).await;
        assert_eq!(answer.status(), 400, "{bad:?}");
        assert_eq!(answer.field("connection"), Some("close"), "{bad:?}");
        wait_count(&proxy, "HTTPCode_ELB_4XX_Count", n as u64 + 1).await;
    }
}

#[tokio::test]
async fn error_400_one_field_too_long() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let _proxy = site.start();
    let long = "a".repeat(16 * 1024);
    let request = format!("GET / HTTP/1.1\r\nHost: a\r\nX-Long: {long}\r\n\r\n");
    assert_eq!(ask(address, request).await.status(), 400);
}

#[tokio::test]
async fn error_400_all_fields_too_long() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let _proxy = site.start();
    let long = "a".repeat(10 * 1024);
    let fields: String = (0..8).map(|n| format!("X-{n}: {long}\r\n")).collect();
    let request = format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
    assert_eq!(ask(address, request).await.status(), 400);
}

#[tokio::test]
async fn error_400_body_is_no_chunk() {
    let (site, address) = Site::new(&[reads_all().await]);
    let _proxy = site.start();
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(ask(address, format!("{head}no chunk\r\n")).await.status(), 400);
}

/// A server that reads and never answers.
async fn reads_all() -> std::net::SocketAddr {
    origin(|mut stream| async move {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes).await;
    })
    .await
}

#[tokio::test]
async fn error_405_trace() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let proxy = site.start();
    let answer = ask(address, "TRACE / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(answer.status(), 405);
    assert_eq!(count(&proxy, "HTTPCode_ELB_4XX_Count"), 1);
    assert_eq!(count(&proxy, "RequestCount"), 0);
}

#[tokio::test]
async fn error_408_slow_head() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let proxy = site.attributes(|it| it.idle_timeout = SHORT).start();
    let mut client = Client::connect(address).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n").await;
    // One byte now and then does not help.
    for _ in 0..4 {
        sleep(SHORT / 3).await;
        let _ = client.stream.write_all(b"X").await;
    }
    let answer = client.answer().await;
    assert_eq!(answer.status(), 408);
    assert_eq!(count(&proxy, "HTTPCode_ELB_4XX_Count"), 1);
}

#[tokio::test]
async fn error_408_slow_head_on_a_kept_connection() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let _proxy = site.attributes(|it| it.idle_timeout = SHORT).start();
    let mut client = Client::connect(address).await;
    assert_eq!(client.get("/").await.status(), 200);
    client.send("GET /").await;
    assert_eq!(client.answer().await.status(), 408);
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn a_client_that_says_nothing_is_left() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let _proxy = site.attributes(|it| it.idle_timeout = SHORT).start();
    assert!(Client::connect(address).await.is_closed().await);
}

#[tokio::test]
async fn a_client_without_another_request_is_left() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let _proxy = site.attributes(|it| it.idle_timeout = SHORT).start();
    let mut client = Client::connect(address).await;
    for _ in 0..4 {
        assert_eq!(client.get("/").await.status(), 200);
        sleep(SHORT / 2).await;
    }
    assert!(client.is_closed().await);
}

/// As on AWS: an old connection has one more answer, which is its last.
#[tokio::test]
async fn an_old_connection_ends_with_an_answer() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let attributes = |it: &mut lb_userspace::config::model::Attributes| {
        (it.idle_timeout, it.client_keep_alive) = (SHORT * 2, SHORT * 3);
    };
    let _proxy = site.attributes(attributes).start();
    let mut client = Client::connect(address).await;
    let began = Instant::now();
    while client.get("/").await.field("connection") != Some("close") {
        sleep(SHORT / 3).await;
    }
    let age = began.elapsed();
    assert!(age >= SHORT * 3 && age < SHORT * 30, "{age:?}");
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn error_408_slow_body() {
    let (site, address) = Site::new(&[reads_all().await]);
    let _proxy = site.attributes(|it| it.idle_timeout = SHORT).start();
    let answer =
        ask(address, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n12345").await;
    assert_eq!(answer.status(), 408);
    assert_eq!(answer.field("connection"), Some("close"));
}

#[tokio::test]
async fn error_413_by_its_length() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let proxy = site.attributes(|it| it.max_request_body_size = Some(1000)).start();
    let head =
        |length: usize| format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n");
    // Nothing of the body has been sent when the answer comes.
    let answer = ask(address, head(1001)).await;
    assert_eq!((answer.status(), answer.field("connection")), (413, Some("close")));
    assert_eq!(count(&proxy, "RequestCount"), 0);
    assert_eq!(count(&proxy, "HTTPCode_ELB_4XX_Count"), 1);
    let fits = format!("{}{}", head(1000), "a".repeat(1000));
    assert_eq!(ask(address, fits).await.status(), 200);
}

#[tokio::test]
async fn error_413_is_seen_by_a_client_that_goes_on_sending() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let _proxy = site.attributes(|it| it.max_request_body_size = Some(1000)).start();
    let length = 1_000_000;
    let mut request =
        format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n").into_bytes();
    request.resize(request.len() + length, b'a');
    let mut client = Client::connect(address).await;
    client.send(&request).await;
    sleep(SHORT).await;
    assert_eq!(client.answer().await.status(), 413);
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn error_413_in_chunks() {
    let (site, address) = Site::new(&[reads_all().await]);
    let proxy = site.attributes(|it| it.max_request_body_size = Some(10)).start();
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let mut client = Client::connect(address).await;
    client.send(head).await;
    client.send("a\r\n0123456789\r\n").await;
    wait_count(&proxy, "RequestCount", 1).await;
    sleep(SHORT).await;
    assert_eq!(count(&proxy, "HTTPCode_ELB_4XX_Count"), 0);
    client.send("1\r\n0\r\n").await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.field("connection")), (413, Some("close")));
}

#[tokio::test]
async fn error_414() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let _proxy = site.start();
    let path = "a".repeat(16 * 1024);
    let answer = ask(address, format!("GET /{path} HTTP/1.1\r\nHost: a\r\n\r\n")).await;
    assert_eq!(answer.status(), 414);
}

#[tokio::test]
async fn error_460_is_counted() {
    let (site, address) = Site::new(&[reads_all().await]);
    let proxy = site.start();
    let mut client = Client::connect(address).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    wait_count(&proxy, "RequestCount", 1).await;
    drop(client);
    wait_count(&proxy, "HTTPCode_ELB_4XX_Count", 1).await;
    wait_count(&proxy, "ActiveConnectionCount", 0).await;
}

#[tokio::test]
async fn error_463() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let _proxy = site.start();
    let request = |n: usize| {
        let addresses = vec!["10.0.0.1"; n].join(", ");
        format!("GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {addresses}\r\n\r\n")
    };
    assert_eq!(ask(address, request(30)).await.status(), 200);
    assert_eq!(ask(address, request(31)).await.status(), 463);
}

#[tokio::test]
async fn error_464() {
    for version in [HttpVersion::Http2, HttpVersion::Grpc] {
        let (site, address) = Site::new(&[free()]);
        let _proxy = site.version(version).start();
        assert_eq!(ask(address, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.status(), 464);
    }
}

#[tokio::test]
async fn error_501() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let _proxy = site.start();
    for coding in ["gzip, chunked", "gzip"] {
        let request =
            format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: {coding}\r\n\r\n0\r\n\r\n");
        assert_eq!(ask(address, request).await.status(), 501, "{coding}");
    }
}

#[tokio::test]
async fn error_502_connection_refused() {
    let target = free();
    let (site, address) = Site::new(&[target]);
    let proxy = site.start();
    assert_eq!(ask(address, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.status(), 502);
    assert_eq!(count(&proxy, "HTTPCode_ELB_502_Count"), 1);
    let counters = proxy.counters();
    let target = &counters.target_groups["web"].targets[&target];
    assert_eq!(target.counts["TargetConnectionErrorCount"], 1);
}

#[tokio::test]
async fn error_502_closed_before_an_answer() {
    let target = origin(|mut stream| async move {
        read_head(&mut stream).await;
    })
    .await;
    let (site, address) = Site::new(&[target]);
    let _proxy = site.start();
    assert_eq!(ask(address, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.status(), 502);
}

#[tokio::test]
async fn error_502_garbage() {
    let (site, address) = Site::new(&[answers("this is not HTTP\r\n\r\n").await]);
    let _proxy = site.start();
    assert_eq!(ask(address, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.status(), 502);
}

#[tokio::test]
async fn error_502_half_a_head() {
    let target = origin(|mut stream| async move {
        read_head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-").await;
    })
    .await;
    let (site, address) = Site::new(&[target]);
    let _proxy = site.start();
    assert_eq!(ask(address, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.status(), 502);
}

/// A server whose system takes no further connection: its queue is full, and it drops SYNs.
async fn swallows() -> (socket2::Socket, Vec<tokio::net::TcpStream>) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let mut queued = Vec::new();
    while let Ok(connected) =
        timeout(Duration::from_millis(500), tokio::net::TcpStream::connect(address)).await
    {
        queued.push(connected.unwrap());
    }
    (socket, queued)
}

#[tokio::test]
async fn error_504_no_connection_within_10_seconds() {
    let (target, _queued) = swallows().await;
    let target = target.local_addr().unwrap().as_socket().unwrap();
    let (site, address) = Site::new(&[target]);
    let proxy = site.start();
    let began = Instant::now();
    assert_eq!(ask(address, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.status(), 504);
    let took = began.elapsed().as_secs_f32();
    assert!((9.9..12.0).contains(&took), "{took}");
    assert_eq!(count(&proxy, "HTTPCode_ELB_504_Count"), 1);
    let counters = proxy.counters();
    assert_eq!(
        counters.target_groups["web"].targets[&target].counts["TargetConnectionErrorCount"],
        1
    );
}

#[tokio::test]
async fn a_body_that_is_cut_is_cut_for_the_client() {
    let target = origin(|mut stream| async move {
        read_head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345").await;
    })
    .await;
    let (site, address) = Site::new(&[target]);
    let _proxy = site.start();
    let mut client = Client::connect(address).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.head().await.status(), 200);
    assert_eq!(client.exactly(5).await, b"12345");
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn error_503_no_target() {
    let (site, address) = Site::new(&[]);
    let proxy = site.start();
    assert_eq!(ask(address, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.status(), 503);
    assert_eq!(count(&proxy, "HTTPCode_ELB_503_Count"), 1);
    assert_eq!(count(&proxy, "HTTPCode_ELB_5XX_Count"), 1);
}

#[tokio::test]
async fn error_503_no_capacity() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let proxy = site.attributes(|it| it.max_connections = Some(1)).start();
    let mut first = Client::connect(address).await;
    assert_eq!(first.get("/").await.status(), 200);
    assert_eq!(ask(address, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.status(), 503);
    assert_eq!(count(&proxy, "RejectedConnectionCount"), 1);
    assert_eq!(first.get("/").await.status(), 200);
    drop(first);
    // The one to the target is kept.
    wait_count(&proxy, "ActiveConnectionCount", 1).await;
    assert_eq!(ask(address, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.status(), 200);
}

#[tokio::test]
async fn error_504_silent_target() {
    let (site, address) = Site::new(&[reads_all().await]);
    let proxy = site.attributes(|it| it.idle_timeout = SHORT).start();
    assert_eq!(ask(address, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.status(), 504);
    assert_eq!(count(&proxy, "HTTPCode_ELB_504_Count"), 1);
}

#[tokio::test]
async fn a_target_that_stops_in_the_middle_of_a_body_is_left() {
    let target = origin(|mut stream| async move {
        read_head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345").await;
        sleep(Duration::from_secs(60)).await;
    })
    .await;
    let (site, address) = Site::new(&[target]);
    let _proxy = site.attributes(|it| it.idle_timeout = SHORT).start();
    let mut client = Client::connect(address).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.head().await.status(), 200);
    assert_eq!(client.exactly(5).await, b"12345");
    assert!(client.is_closed().await);
}
