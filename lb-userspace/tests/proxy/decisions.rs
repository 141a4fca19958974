//! What rules, desync mitigation and the access log do to requests on their way.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use lb_userspace::config::model::{
    Action, Condition, DesyncMitigation, FixedResponse, Forward, LogSink, Pattern, Redirect,
    Rewrite, Rule, Transforms, WeightedTargetGroup,
};

use crate::harness::{Client, HELLO, Site, answers, ask, count, mirror};

fn rule(priority: u16, path: &str, action: Action) -> Rule {
    Rule {
        priority,
        conditions: vec![Condition::PathPattern(vec![Pattern::Wildcard(path.to_owned())])],
        transforms: Transforms::default(),
        action,
    }
}

#[tokio::test]
async fn rules_redirect_and_answer() {
    let (mut site, address) = Site::new(&[answers(HELLO).await]);
    let redirect = Redirect {
        protocol: "#{protocol}".to_owned(),
        host: "#{host}".to_owned(),
        port: "443".to_owned(),
        path: "/new/#{path}".to_owned(),
        query: "#{query}".to_owned(),
        status: 301,
    };
    let fixed = FixedResponse {
        status: 418,
        content_type: "text/plain".to_owned(),
        body: "later".to_owned(),
    };
    let route = site.listeners.get_mut(&address).unwrap();
    let mut listener = (*route.listener).clone();
    listener.rules = vec![
        rule(10, "/old/*", Action::Redirect(redirect)),
        rule(20, "/fixed", Action::FixedResponse(fixed)),
    ];
    route.listener = Arc::new(listener);
    let proxy = site.start();
    let mut client = Client::connect(address).await;
    let answer = client.get("/old/a?b").await;
    assert_eq!(answer.status(), 301);
    assert_eq!(answer.field("location"), Some("http://site.test:443/new/old/a?b"));
    let answer = client.get("/fixed").await;
    assert_eq!((answer.status(), answer.body.as_slice()), (418, b"later".as_slice()));
    assert_eq!(answer.field("content-type"), Some("text/plain"));
    assert_eq!(client.get("/").await.body, b"hello");
    assert_eq!(count(&proxy, "HTTP_Redirect_Count"), 1);
    assert_eq!(count(&proxy, "HTTP_Fixed_Response_Count"), 1);
    assert_eq!(count(&proxy, "RequestCount"), 1);
}

#[tokio::test]
async fn ambiguous_requests_are_alone_or_refused() {
    let ambiguous = "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx";
    for (mode, status, connection) in [
        (DesyncMitigation::Monitor, 200, None),
        (DesyncMitigation::Defensive, 200, Some("close")),
        (DesyncMitigation::Strictest, 400, Some("close")),
    ] {
        let (site, address) = Site::new(&[answers(HELLO).await]);
        let proxy = site.attributes(|it| it.desync_mitigation = mode).start();
        let answer = ask(address, ambiguous).await;
        assert_eq!((answer.status(), answer.field("connection")), (status, connection), "{mode:?}");
        assert_eq!(count(&proxy, "DesyncMitigationMode_NonCompliant_Request_Count"), 1);
    }
}

#[tokio::test]
async fn requests_are_logged() {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("access.log");
    let target = answers(HELLO).await;
    let (site, address) = Site::new(&[target]);
    let site = site.attributes(|it| it.access_log = Some(LogSink::File(path.clone())));
    let proxy = site.start();
    let mut client = Client::connect(address).await;
    let answer = client.get("/a?b").await;
    assert_eq!(answer.status(), 200);
    client.send("TRACE /c HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let own = client.answer().await;
    assert!(own.head.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"));
    let local = client.stream.local_addr().unwrap();
    drop(client);
    proxy.end(Duration::from_secs(5)).await;
    let log = fs::read_to_string(path).unwrap();
    let lines: Vec<_> = log.lines().collect();
    assert_eq!(lines.len(), 2, "{log}");
    let fields: Vec<_> = lines[0].split(' ').collect();
    assert_eq!(fields[0], "http");
    assert_eq!(fields[2..5], ["site", &local.to_string(), &target.to_string()]);
    assert_eq!(fields[8..10], ["200", "200"]);
    let request = "GET /a?b HTTP/1.1\r\nHost: site.test\r\n\r\n";
    assert_eq!(fields[10], request.len().to_string());
    assert_eq!(fields[11], (answer.head.len() + 5).to_string(), "{}", answer.head);
    let request = format!("\"GET http://site.test:{}/a?b HTTP/1.1\"", address.port());
    assert!(lines[0].contains(&request), "{}", lines[0]);
    let sent = own.head.len() + own.body.len();
    let sizes = format!(" - -1 -1 -1 405 - 30 {sent} ");
    assert!(lines[1].contains(&sizes), "{} {sizes}", lines[1]);
}

/// The lines that a site's access log has at the end.
async fn log_of(site: Site, use_it: impl AsyncFnOnce(&lb_userspace::proxy::Proxy)) -> Vec<String> {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("access.log");
    let site = site.attributes(|it| it.access_log = Some(LogSink::File(path.clone())));
    let proxy = site.start();
    use_it(&proxy).await;
    proxy.end(Duration::from_secs(5)).await;
    fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn what_is_no_request_is_logged() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let site = site.attributes(|it| it.idle_timeout = Duration::from_millis(300));
    let mut sent = Vec::new();
    let lines = log_of(site, async |_| {
        // The second request of a connection, so that the first one's head does not count.
        let mut client = Client::connect(address).await;
        assert_eq!(client.get("/").await.status(), 200);
        for rest in ["GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / HTT"] {
            client.send(rest).await;
            let answer = client.answer().await;
            sent.push((answer.status(), rest.len(), answer.head.len() + answer.body.len()));
            client = Client::connect(address).await;
        }
    })
    .await;
    assert_eq!(lines.len(), 3, "{lines:#?}");
    assert_eq!(sent.iter().map(|it| it.0).collect::<Vec<_>>(), [400, 408]);
    for (line, (status, received, sent)) in lines[1..].iter().zip(sent) {
        let port = address.port();
        let expected =
            format!(" - -1 -1 -1 {status} - {received} {sent} \"- http://127.0.0.1:{port}- -\" ");
        assert!(line.contains(&expected), "{line}\n{expected}");
    }
}

#[tokio::test]
async fn a_target_that_does_not_answer_is_in_the_log() {
    let target = crate::harness::free();
    let (site, address) = Site::new(&[target]);
    let lines = log_of(site, async |_| {
        assert_eq!(Client::connect(address).await.get("/").await.status(), 502);
    })
    .await;
    assert!(lines[0].contains(&format!(" {target} -1 -1 -1 502 - ")), "{lines:?}");
    assert!(
        lines[0].contains(&format!(" \"forward\" \"-\" \"-\" \"{target}\" \"-\" ")),
        "{lines:?}"
    );
}

#[tokio::test]
async fn a_group_without_targets_is_in_the_log() {
    let (site, address) = Site::new(&[]);
    let lines = log_of(site, async |_| {
        assert_eq!(Client::connect(address).await.get("/").await.status(), 503);
    })
    .await;
    assert!(lines[0].contains(" - -1 -1 -1 503 - "), "{lines:?}");
    assert!(lines[0].contains(" - - web \"-\" "), "{lines:?}");
}

#[tokio::test]
async fn a_body_that_comes_after_the_answer_is_in_the_log() {
    // It answers before it has read everything.
    let target = crate::harness::origin(|mut stream| async move {
        crate::harness::read_head(&mut stream).await;
        let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, HELLO.as_bytes()).await;
        let mut rest = Vec::new();
        let _ = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut rest).await;
    })
    .await;
    let (site, address) = Site::new(&[target]);
    let head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n";
    let lines = log_of(site, async |_| {
        let mut client = Client::connect(address).await;
        client.send(format!("{head}0123456789")).await;
        assert_eq!(client.answer().await.status(), 200);
    })
    .await;
    assert_eq!(
        lines[0].split(' ').nth(10),
        Some((head.len() + 10).to_string().as_str()),
        "{lines:?}"
    );
}

#[tokio::test]
async fn rewrites_are_what_the_target_sees() {
    let (mut site, address) = Site::new(&[mirror().await]);
    let set = |site: &mut Site, replace: &str| {
        let rewrite = |regex: &str, replace: &str| {
            Some(Rewrite { regex: regex.to_owned(), replace: replace.to_owned() })
        };
        let group = WeightedTargetGroup { name: "web".to_owned(), weight: 1 };
        let forward = Forward { target_groups: vec![group], stickiness: None };
        let mut rule = rule(1, "/api/*", Action::Forward(forward));
        rule.transforms = Transforms {
            url_rewrite: rewrite("^/api/(.*)$", replace),
            host_header_rewrite: rewrite(r"^([a-z]+)\.test.*$", "$1.internal"),
        };
        let route = site.listeners.get_mut(&address).unwrap();
        let mut listener = (*route.listener).clone();
        listener.rules = vec![rule];
        route.listener = Arc::new(listener);
    };
    set(&mut site, "/$1");
    let proxy = site.start();
    let mut client = Client::connect(address).await;
    let seen = async |client: &mut Client, path| {
        let head = String::from_utf8(client.get(path).await.body).unwrap();
        let line = head.lines().next().unwrap().to_owned();
        let host = head.lines().find_map(|line| line.strip_prefix("Host: ")).unwrap().to_owned();
        (line, host)
    };
    let (line, host) = seen(&mut client, "/api/users?page=2").await;
    assert_eq!(line, "GET /users?page=2 HTTP/1.1");
    assert_eq!(host, format!("site.internal:{}", address.port()));
    let (line, host) = seen(&mut client, "/users").await;
    assert_eq!(line, "GET /users HTTP/1.1");
    assert_eq!(host, format!("site.test:{}", address.port()));
    // A reload changes it for the next request of the same connection.
    set(&mut site, "/v2/$1");
    assert_eq!(proxy.apply(site.routes()), []);
    assert_eq!(seen(&mut client, "/api/users?page=2").await.0, "GET /v2/users?page=2 HTTP/1.1");
    // What comes out must be something that can be asked for.
    set(&mut site, "$1");
    assert_eq!(proxy.apply(site.routes()), []);
    assert_eq!(client.get("/api/users").await.status(), 500);
    assert_eq!(count(&proxy, "NewConnectionCount"), 2);
}
