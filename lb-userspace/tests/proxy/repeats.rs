//! Requests that a target of HTTP/2 did nothing about, and says so.

use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use lb_userspace::config::model::HttpVersion;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::forwarding::{echo_http2, http2};
use crate::harness::{Site, count, origin};

/// How a target refuses.
#[derive(Debug, Clone, Copy)]
enum Refusal {
    /// The stream alone.
    Stream,
    /// By its last connection's end.
    Connection,
}

/// `SETTINGS_INITIAL_WINDOW_SIZE` and the connection's window, of a mebibyte and more.
const SETTINGS: &[u8] = b"\0\0\x06\x04\0\0\0\0\0\0\x04\0\x10\0\0\0\0\x04\x08\0\0\0\0\0\0\x10\0\0";

/// Takes requests with all of their bodies, and refuses them.
async fn refuse(mut stream: TcpStream, refusal: Refusal) -> std::io::Result<()> {
    stream.write_all(SETTINGS).await?;
    stream.read_exact(&mut [0; b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len()]).await?;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        stream.read_exact(&mut vec![0; length]).await?;
        let (kind, ends, id) = (head[3], head[4] & 1 != 0, &head[5..]);
        // DATA or HEADERS with END_STREAM.
        if kind <= 1 && ends {
            let frame = match refusal {
                Refusal::Stream => [b"\0\0\x04\x03\0", id, b"\0\0\0\x07"].concat(),
                Refusal::Connection => b"\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec(),
            };
            stream.write_all(&frame).await?;
        }
    }
}

/// A target of which so many connections refuse, before the others send bodies back.
async fn refuses(most: usize, refusal: Refusal) -> (SocketAddr, Arc<AtomicUsize>) {
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    let address = origin(move |stream| {
        let number = counted.fetch_add(1, Relaxed);
        async move {
            if number < most {
                let _ = refuse(stream, refusal).await;
            } else {
                echo_http2(stream).await;
            }
        }
    });
    (address.await, connections)
}

#[tokio::test]
async fn what_was_not_processed_goes_over_another_connection() {
    for refusal in [Refusal::Stream, Refusal::Connection] {
        let (target, connections) = refuses(1, refusal).await;
        let (site, address) = Site::new(&[target]);
        let proxy = site.version(HttpVersion::Http2).start();
        let mut client = http2(address).await;
        for (n, size) in [0, 5, 50_000].into_iter().enumerate() {
            let body = Bytes::from(vec![b'a'; size]);
            let request = Request::post("http://site.test/").body(Full::new(body.clone()));
            let answer = client.send_request(request.unwrap()).await.unwrap();
            assert_eq!(answer.status(), 200, "{refusal:?}");
            assert!(answer.collect().await.unwrap().to_bytes() == body, "{refusal:?}");
            assert_eq!(count(&proxy, "RequestCount"), n as u64 + 1);
        }
        assert_eq!(connections.load(Relaxed), 2, "{refusal:?}");
        assert_eq!(count(&proxy, "HTTPCode_ELB_5XX_Count"), 0);
    }
}

#[tokio::test]
async fn a_body_that_passed_is_whole_the_second_time() {
    for refusal in [Refusal::Stream, Refusal::Connection] {
        for size in [1, 60_000] {
            let (target, connections) = refuses(2, refusal).await;
            let (site, address) = Site::new(&[target]);
            let _proxy = site.version(HttpVersion::Http2).start();
            let mut client = http2(address).await;
            let body: Bytes = (0..size).map(|n: u32| n as u8).collect::<Vec<_>>().into();
            let request = Request::post("http://site.test/").body(Full::new(body.clone()));
            let answer = client.send_request(request.unwrap()).await.unwrap();
            assert!(answer.collect().await.unwrap().to_bytes() == body, "{refusal:?}");
            assert_eq!(connections.load(Relaxed), 3, "{refusal:?}");
        }
    }
}

#[tokio::test]
async fn else_the_client_is_told_that_nothing_was_processed() {
    for (refusing, size) in [(usize::MAX, 5), (1, 300_000)] {
        let (target, _) = refuses(refusing, Refusal::Stream).await;
        let (site, address) = Site::new(&[target]);
        let proxy = site.version(HttpVersion::Http2).start();
        let mut client = http2(address).await;
        let body = Full::new(Bytes::from(vec![b'a'; size]));
        let request = Request::post("http://site.test/").body(body).unwrap();
        let error = client.send_request(request).await.unwrap_err();
        let reason = error.source().unwrap().downcast_ref::<h2::Error>().unwrap().reason();
        assert_eq!(reason, Some(h2::Reason::REFUSED_STREAM));
        assert_eq!(count(&proxy, "HTTPCode_ELB_502_Count"), 1);
    }
}
