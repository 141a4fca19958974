//! Header fields as targets and clients see them.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use lb_userspace::config::model::{
    Action, Condition, FixedResponse, Pattern, ProxyListener, Rewrite, Rule, Transforms,
};

use crate::forwarding::http2;
use crate::harness::{Site, answers, ask, mirror};

fn change(site: &mut Site, address: SocketAddr, change: impl FnOnce(&mut ProxyListener)) {
    let route = site.listeners.get_mut(&address).unwrap();
    let mut listener = (*route.listener).clone();
    change(&mut listener);
    route.listener = Arc::new(listener);
}

#[tokio::test]
async fn cookies_of_http2_are_one_field() {
    let (mut site, address) = Site::new(&[mirror().await]);
    let name = "cookie".to_owned();
    let values = vec![Pattern::Wildcard("a=1; b=2; x=3".to_owned())];
    let body = "whole".to_owned();
    change(&mut site, address, |listener| {
        listener.rules = vec![Rule {
            priority: 1,
            conditions: vec![Condition::HttpHeader { name, values }],
            transforms: Transforms::default(),
            action: Action::FixedResponse(FixedResponse {
                status: 200,
                content_type: "text/plain".to_owned(),
                body,
            }),
        }];
    });
    let _proxy = site.start();
    let mut client = http2::<Full<Bytes>>(address).await;
    let mut ask = async |last: &str| {
        let request = Request::get("http://site.test/")
            .header("cookie", "a=1")
            .header("cookie", "b=2")
            .header("cookie", last)
            .body(Full::default())
            .unwrap();
        let body = client.send_request(request).await.unwrap().collect().await.unwrap();
        String::from_utf8(body.to_bytes().to_vec()).unwrap()
    };
    let head = ask("c=3").await;
    assert!(head.contains("\r\nCookie: a=1; b=2; c=3\r\n"), "{head}");
    assert_eq!(ask("x=3").await, "whole");
}

#[tokio::test]
async fn names_have_capitals_in_http1() {
    let (site, address) = Site::new(&[mirror().await]);
    let _proxy = site.start();
    let answer = ask(address, "GET / HTTP/1.1\r\nhost: a\r\nx-own: b\r\n\r\n").await;
    let body = String::from_utf8(answer.body).unwrap();
    for name in ["Host", "X-Own", "X-Forwarded-For", "X-Forwarded-Port", "X-Amzn-Trace-Id"] {
        assert!(body.contains(&format!("\r\n{name}: ")), "{name}: {body}");
    }
    let (site, address) =
        Site::new(&[answers("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-own: b\r\n\r\n").await]);
    let _proxy = site.start();
    let head = ask(address, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.head;
    assert!(
        head.contains("\r\nX-Own: b\r\n") && head.contains("\r\nContent-Length: 0\r\n"),
        "{head}"
    );
}

#[tokio::test]
async fn a_host_is_rewritten_without_its_port() {
    for preserve in [false, true] {
        let (mut site, address) = Site::new(&[mirror().await]);
        change(&mut site, address, |listener| {
            let (regex, replace) = ("^(.*)\\.old\\.test$".to_owned(), "$1.new.test".to_owned());
            let host_header_rewrite = Some(Rewrite { regex, replace });
            listener.rules = vec![Rule {
                priority: 1,
                conditions: vec![Condition::PathPattern(vec![Pattern::Wildcard("*".to_owned())])],
                transforms: Transforms { host_header_rewrite, url_rewrite: None },
                action: listener.default_action.clone(),
            }];
        });
        let _proxy = site.attributes(|it| it.preserve_host_header = preserve).start();
        let port = format!(":{}", address.port());
        for (named, seen) in [("", if preserve { "" } else { &port }), (&port, &port)] {
            let request = format!("GET / HTTP/1.1\r\nHost: x.old.test{named}\r\n\r\n");
            let body = String::from_utf8(ask(address, request).await.body).unwrap();
            assert!(body.contains(&format!("\r\nHost: x.new.test{seen}\r\n")), "{body}");
        }
    }
}

#[tokio::test]
async fn no_host_gets_no_port() {
    let (site, address) = Site::new(&[mirror().await]);
    let _proxy = site.start();
    let answer = ask(address, "GET / HTTP/1.1\r\nHost:\r\n\r\n").await;
    let body = String::from_utf8(answer.body).unwrap();
    let line = body.lines().find(|it| it.to_ascii_lowercase().starts_with("host:"));
    assert_eq!(line.map(|it| it[5..].trim()), Some(""), "{body}");
}
