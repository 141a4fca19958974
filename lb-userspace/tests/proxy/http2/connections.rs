//! Connections of HTTP/2 from their beginning to their end, and what targets see of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::peer::{Event, Expect, Peer};
use super::wire::{
    self, GET, MAX_WINDOW, POST, begin, block, code, data, flag, goaway, headers, ping, request,
    setting,
};
use super::witness;
use crate::forwarding::http2;
use crate::harness::{Client, HELLO, LIMIT, Site, answers, mirror, origin, read_head};

/// Long enough for what must happen within it on a busy machine.
const IDLE: Duration = Duration::from_millis(800);

#[tokio::test]
async fn settings_are_what_cases_rely_on() {
    let (site, address) = Site::new(&[witness().await]);
    let _proxy = site.start();
    let mut peer = Peer::over(TcpStream::connect(address).await.unwrap());
    let mut settings = peer.handshake(&[]).await.unwrap();
    settings.sort_unstable();
    let expected = [
        (setting::MAX_CONCURRENT_STREAMS, super::frames::STREAMS),
        (setting::INITIAL_WINDOW_SIZE, 256 * 1024),
        (setting::MAX_FRAME_SIZE, 16 * 1024),
        (setting::MAX_HEADER_LIST_SIZE, 64 * 1024),
    ];
    assert_eq!(settings, expected);
}

/// What the target saw of a request, line by line.
async fn seen(fields: &[(&str, &str)]) -> Vec<String> {
    let (site, address) = Site::new(&[mirror().await]);
    let _proxy = site.start();
    let mut peer = Peer::connect(address, &[]).await;
    peer.send(headers(1, flag::WHOLE, [block(GET), block(fields)].concat())).await;
    peer.expect(&Expect::Status(1, 200)).await.unwrap();
    let body = peer.body(1).await;
    body.lines().map(|line| line.trim_end().to_ascii_lowercase()).collect()
}

#[tokio::test]
async fn cookies_become_one_line() {
    let lines = seen(&[("cookie", "a=1"), ("cookie", "b=2; c=3"), ("cookie", "d=4")]).await;
    let cookies: Vec<_> = lines.iter().filter(|line| line.starts_with("cookie:")).collect();
    assert_eq!(cookies, ["cookie: a=1; b=2; c=3; d=4"]);
}

#[tokio::test]
async fn the_same_host_twice_is_one() {
    let lines = seen(&[("host", "SITE.test"), ("te", "trailers")]).await;
    assert_eq!(lines[0], "get / http/1.1");
    assert_eq!(lines.iter().filter(|line| line.starts_with("host:")).count(), 1, "{lines:?}");
    assert!(!lines.iter().any(|line| line.starts_with("te:")), "{lines:?}");
}

#[tokio::test]
async fn answers_have_no_field_of_the_targets_connection() {
    let target = answers(
        "HTTP/1.1 200 OK\r\nConnection: keep-alive, x-hop\r\nKeep-Alive: timeout=5\r\nX-Hop: 1\r\n\
         Proxy-Connection: close\r\nUpgrade: h2c\r\nX-Kept: 1\r\nTransfer-Encoding: chunked\r\n\r\n\
         0\r\n\r\n",
    )
    .await;
    let (site, address) = Site::new(&[target]);
    let _proxy = site.start();
    let mut client = http2::<Full<Bytes>>(address).await;
    let request = Request::get("http://site.test/").body(Full::default()).unwrap();
    let answer = client.send_request(request).await.unwrap();
    let mut names: Vec<_> = answer.headers().keys().map(|it| it.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["date", "x-kept"]);
}

/// Asks and asks until the connection ends.
async fn ping_until_closed(peer: &mut Peer) {
    peer.send(ping(b"too busy")).await;
    while !matches!(peer.next().await, Event::Closed(_)) {
        peer.send(ping(b"too busy")).await;
    }
}

#[tokio::test]
async fn a_connection_ends_whatever_comes_between_requests() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let _proxy = site.attributes(|it| it.idle_timeout = IDLE).start();
    let mut peer = Peer::connect(address, &[]).await;
    peer.send(request(1, GET)).await;
    peer.expect(&Expect::Ended(1)).await.unwrap();
    timeout(LIMIT, ping_until_closed(&mut peer)).await.unwrap();
}

#[tokio::test]
async fn a_connection_without_a_request_ends_whatever_comes_on_it() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let _proxy = site.attributes(|it| it.idle_timeout = IDLE).start();
    let mut peer = Peer::connect(address, &[]).await;
    timeout(LIMIT, ping_until_closed(&mut peer)).await.unwrap();
    let mut peer = Peer::connect(address, &[]).await;
    peer.send(headers(1, flag::END_STREAM, block(GET))).await;
    peer.expect(&Expect::Closed).await.unwrap();
}

#[tokio::test]
async fn answers_that_have_begun_end_after_a_goaway() {
    let (site, address) = Site::new(&[witness().await]);
    let _proxy = site.start();
    let mut peer = Peer::connect(address, &[]).await;
    peer.send(begin(1, POST)).await;
    peer.send(goaway(0, code::NO_ERROR)).await;
    peer.send(data(1, flag::END_STREAM, "test")).await;
    peer.expect(&Expect::Status(1, 200)).await.unwrap();
    assert!(peer.body(1).await.ends_with("\n\ntest"));
    peer.expect(&Expect::Closed).await.unwrap();
}

#[tokio::test]
async fn a_listener_that_ends_says_so() {
    let (site, address) = Site::new(&[witness().await]);
    let mut site = site.attributes(|it| it.idle_timeout = IDLE * 4);
    let proxy = site.start();
    let mut peer = Peer::connect(address, &[]).await;
    peer.send(begin(1, POST)).await;
    peer.expect(&Expect::Ignored).await.unwrap();
    site.listeners.clear();
    proxy.apply(site.routes());
    peer.expect(&Expect::Goaway(code::NO_ERROR)).await.unwrap();
    peer.send(data(1, flag::END_STREAM, "test")).await;
    assert!(peer.body(1).await.ends_with("\n\ntest"));
    // The PING that was to tell whether another request is on its way is not answered.
    peer.expect(&Expect::Closed).await.unwrap();
}

#[tokio::test]
async fn http2_that_is_off_ends_the_connection() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let _proxy = site.attributes(|it| it.http2 = false).start();
    let mut client = Client::connect(address).await;
    client.send(wire::preface()).await;
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn windows_that_stay_shut_cost_little_and_end() {
    const BODY: usize = 100_000_000;
    const PIECE: usize = 10_000;
    let written = Arc::new(AtomicUsize::new(0));
    let count = written.clone();
    let target = origin(move |mut stream| {
        let count = count.clone();
        async move {
            SockRef::from(&stream).set_send_buffer_size(PIECE).unwrap();
            while read_head(&mut stream).await.is_some() {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {BODY}\r\n\r\n");
                stream.write_all(head.as_bytes()).await.unwrap();
                for _ in 0..BODY / PIECE {
                    if stream.write_all(&[0; PIECE]).await.is_err() {
                        return;
                    }
                    count.fetch_add(PIECE, Relaxed);
                }
            }
        }
    })
    .await;
    let (site, address) = Site::new(&[target]);
    let _proxy = site.attributes(|it| it.idle_timeout = IDLE * 4).start();
    let mut peer = Peer::connect(address, &[(setting::INITIAL_WINDOW_SIZE, 0)]).await;
    let streams = super::frames::STREAMS;
    for n in 0..streams {
        peer.send(request(2 * n + 1, GET)).await;
    }
    let (mut answered, mut ended) = (0, 0);
    while ended < streams {
        match timeout(LIMIT, peer.next()).await.unwrap() {
            Event::Headers { status: Some(200), ends: false, .. } => answered += 1,
            Event::Reset { .. } => ended += 1,
            Event::WindowUpdate { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(answered, streams);
    // What the proxy holds, and its sockets.
    let each = written.load(Relaxed) / streams as usize;
    assert!(each < 1_000_000, "{each} bytes of each answer were taken");
    peer.expect(&Expect::Ignored).await.unwrap();
}

#[tokio::test]
async fn who_reads_nothing_is_not_read_for_ever() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let _proxy = site.attributes(|it| it.idle_timeout = IDLE * 4).start();
    let mut stream = TcpStream::connect(address).await.unwrap();
    SockRef::from(&stream).set_recv_buffer_size(4096).unwrap();
    stream.write_all(&wire::preface()).await.unwrap();
    let flood = ping(b"flooding").repeat(1_000);
    let sent = Arc::new(AtomicUsize::new(0));
    let count = sent.clone();
    let flooding = async {
        while stream.write_all(&flood).await.is_ok() {
            count.fetch_add(flood.len(), Relaxed);
        }
    };
    let ended = timeout(LIMIT, flooding).await;
    let sent = sent.load(Relaxed);
    assert!(ended.is_ok(), "still open after {sent} bytes");
    // What sockets hold.
    assert!(sent < 100_000_000, "{sent} bytes");
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
}

#[tokio::test]
async fn a_stream_s_window_may_be_as_large_as_any() {
    let (site, address) = Site::new(&[witness().await]);
    let _proxy = site.start();
    let mut peer = Peer::connect(address, &[(setting::INITIAL_WINDOW_SIZE, MAX_WINDOW)]).await;
    peer.send(request(1, GET)).await;
    peer.expect(&Expect::Ended(1)).await.unwrap();
}
