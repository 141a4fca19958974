//! Answers that the load balancer gives by itself.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use lb_userspace::config::model::{Action, FixedResponse, Redirect};

use crate::forwarding::http2;
use crate::harness::{Client, Site, ask, free};

fn fixed(status: u16) -> Action {
    let (content_type, body) = ("text/plain".to_owned(), "hello".to_owned());
    Action::FixedResponse(FixedResponse { status, content_type, body })
}

fn redirect() -> Action {
    Action::Redirect(Redirect {
        protocol: "https".to_owned(),
        host: "#{host}".to_owned(),
        port: "443".to_owned(),
        path: "/#{path}".to_owned(),
        query: "#{query}".to_owned(),
        status: 301,
    })
}

/// A site with that default action; without one, it forwards.
fn site(targets: &[SocketAddr], action: Option<Action>) -> (Site, SocketAddr) {
    let (mut site, address) = Site::new(targets);
    if let Some(action) = action {
        let route = site.listeners.get_mut(&address).unwrap();
        let mut listener = (*route.listener).clone();
        listener.default_action = action;
        route.listener = Arc::new(listener);
    }
    (site, address)
}

#[tokio::test]
async fn head_has_the_length_and_no_body() {
    for (targets, action, status, length) in [
        (vec![], Some(fixed(200)), 200, Some("5")),
        (vec![], Some(redirect()), 301, None),
        (vec![], None, 503, None),
        (vec![free()], None, 502, None),
    ] {
        let (site, address) = site(&targets, action);
        let _proxy = site.start();
        let mut client = http2::<Full<Bytes>>(address).await;
        for _ in 0..2 {
            let request = Request::head("http://site.test/").body(Full::default()).unwrap();
            let answer = client.send_request(request).await.unwrap();
            assert_eq!(answer.status(), status);
            if let Some(length) = length {
                assert_eq!(answer.headers()["content-length"], length);
            }
            assert!(answer.into_body().collect().await.unwrap().to_bytes().is_empty());
        }
        let mut client = Client::connect(address).await;
        for _ in 0..2 {
            client.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").await;
            let answer = client.head().await;
            assert_eq!(answer.status(), status);
            if let Some(length) = length {
                assert_eq!(answer.field("content-length"), Some(length));
            }
        }
    }
}

#[tokio::test]
async fn statuses_without_content_have_none() {
    for status in [204, 205, 304] {
        let (site, address) = site(&[], Some(fixed(status)));
        let _proxy = site.start();
        let mut client = http2::<Full<Bytes>>(address).await;
        for method in [Method::GET, Method::HEAD] {
            let request = Request::builder().method(method).uri("http://site.test/");
            let answer = client.send_request(request.body(Full::default()).unwrap()).await.unwrap();
            assert_eq!(answer.status(), status);
            assert!(answer.into_body().collect().await.unwrap().to_bytes().is_empty());
        }
        let mut client = Client::connect(address).await;
        for _ in 0..2 {
            let answer = client.get("/").await;
            assert_eq!((answer.status(), answer.body.len()), (status, 0));
        }
    }
}

#[tokio::test]
async fn whoever_still_sends_its_body_sees_the_answer() {
    // More than sockets hold.
    let body = vec![b'a'; 30_000_000];
    for (targets, action, status) in [
        (vec![], Some(fixed(200)), 200),
        (vec![], Some(redirect()), 301),
        (vec![], None, 503),
        (vec![free()], None, 502),
    ] {
        let (site, address) = site(&targets, action);
        let _proxy = site.start();
        let mut client = Client::connect(address).await;
        let length = body.len();
        client
            .send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n"))
            .await;
        client.send(&body).await;
        assert_eq!(client.answer().await.status(), status);
        assert!(client.is_closed().await);
    }
}

#[tokio::test]
async fn error_414_beyond_what_a_head_may_have() {
    let (site, address) = Site::new(&[free()]);
    let _proxy = site.start();
    let path = "a".repeat(100_000);
    let answer = ask(address, format!("GET /{path} HTTP/1.1\r\nHost: a\r\n\r\n")).await;
    assert_eq!(answer.status(), 414);
}
