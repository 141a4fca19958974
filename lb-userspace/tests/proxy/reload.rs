//! Changes in the middle of what goes on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lb_userspace::config::model::ProxyProtocol;
use lb_userspace::proxy::routes::TargetState;
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;

use crate::harness::{
    Client, HELLO, LIMIT, Site, answers, ask, count, origin, read_head, wait_count,
};

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";

/// A server that answers when it is told to.
async fn held() -> (SocketAddr, Arc<Semaphore>) {
    let go = Arc::new(Semaphore::new(0));
    let told = go.clone();
    let address = origin(move |mut stream| {
        let told = told.clone();
        async move {
            while read_head(&mut stream).await.is_some() {
                told.acquire().await.unwrap().forget();
                if stream.write_all(HELLO.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    });
    (address.await, go)
}

#[tokio::test]
async fn a_listener_that_ends_lets_requests_end_and_leaves_others_alone() {
    let (target, go) = held().await;
    let (mut site, removed) = Site::new(&[target]);
    let stays = site.listener(ProxyProtocol::Http, None);
    let proxy = site.start();
    let mut in_progress = Client::connect(removed).await;
    in_progress.send(GET).await;
    let mut idle = Client::connect(removed).await;
    idle.send(GET).await;
    wait_count(&proxy, "RequestCount", 2).await;
    go.add_permits(2);
    assert_eq!(idle.answer().await.status(), 200);
    assert_eq!(in_progress.answer().await.status(), 200);
    let mut other = Client::connect(stays).await;
    other.send(GET).await;
    in_progress.send(GET).await;
    wait_count(&proxy, "RequestCount", 4).await;

    site.listeners.remove(&removed);
    assert_eq!(proxy.apply(site.routes()), []);
    assert!(idle.is_closed().await);
    go.add_permits(2);
    let answer = in_progress.answer().await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.field("connection"), Some("close"));
    assert!(in_progress.is_closed().await);
    let answer = other.answer().await;
    assert_eq!((answer.status(), answer.field("connection")), (200, None));
    assert!(tokio::net::TcpStream::connect(removed).await.is_err());
    other.send(GET).await;
    wait_count(&proxy, "RequestCount", 5).await;
    go.add_permits(1);
    assert_eq!(other.answer().await.status(), 200);
}

#[tokio::test]
async fn a_target_that_is_removed_drains_and_then_ends() {
    let (target, go) = held().await;
    let (mut site, address) = Site::new(&[target, answers(HELLO).await]);
    site.groups.get_mut("web").unwrap().targets[1].state = TargetState::OutOfService;
    let proxy = site.start();
    let mut first = Client::connect(address).await;
    first.send(GET).await;
    wait_count(&proxy, "RequestCount", 1).await;
    let mut second = Client::connect(address).await;
    second.send(GET).await;
    wait_count(&proxy, "RequestCount", 2).await;

    // The deregistration delay begins: new requests go elsewhere, those in progress end.
    let targets = &mut site.groups.get_mut("web").unwrap().targets;
    targets[0].state = TargetState::Draining;
    targets[1].state = TargetState::InService;
    assert_eq!(proxy.apply(site.routes()), []);
    for _ in 0..4 {
        assert_eq!(ask(address, GET).await.status(), 200);
    }
    go.add_permits(1);
    assert_eq!(first.answer().await.status(), 200);

    // It is over.
    site.groups.get_mut("web").unwrap().targets.remove(0);
    assert_eq!(proxy.apply(site.routes()), []);
    assert_eq!(second.answer().await.status(), 502);
    assert_eq!(count(&proxy, "RequestCount"), 6);
}

#[tokio::test]
async fn what_changes_about_a_listener_holds_for_the_next_request() {
    let (mut site, address) = Site::new(&[answers(HELLO).await]);
    let other = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother";
    site.group("web", &[answers(HELLO).await], |_| {});
    let proxy = site.start();
    let mut client = Client::connect(address).await;
    assert_eq!(client.get("/").await.body, b"hello");
    site.group("web", &[answers(other).await], |_| {});
    assert_eq!(proxy.apply(site.routes()), []);
    assert_eq!(client.get("/").await.body, b"other");
    let site = site.attributes(|it| it.max_connections = Some(5));
    assert_eq!(proxy.apply(site.routes()), []);
    assert_eq!(client.get("/").await.body, b"other");
    // One of the client, two to targets.
    assert_eq!(count(&proxy, "NewConnectionCount"), 3);
}

#[tokio::test]
async fn the_end_waits_for_requests() {
    let (target, go) = held().await;
    let (site, address) = Site::new(&[target]);
    let proxy = site.start();
    let mut client = Client::connect(address).await;
    client.send(GET).await;
    wait_count(&proxy, "RequestCount", 1).await;
    let end = tokio::spawn(proxy.end(LIMIT));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!end.is_finished());
    go.add_permits(1);
    assert_eq!(client.answer().await.status(), 200);
    tokio::time::timeout(LIMIT / 2, end).await.unwrap().unwrap();
}

#[tokio::test]
async fn the_end_does_not_wait_for_ever() {
    let (target, _go) = held().await;
    let (site, address) = Site::new(&[target]);
    let proxy = site.start();
    let mut client = Client::connect(address).await;
    client.send(GET).await;
    wait_count(&proxy, "RequestCount", 1).await;
    proxy.end(Duration::from_millis(100)).await;
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn attributes_hold_on_open_connections() {
    const LONG: Duration = Duration::from_secs(600);
    const SHORT: Duration = Duration::from_secs(1);
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let site = site.attributes(|it| {
        it.idle_timeout = LONG;
        it.client_keep_alive = LONG;
    });
    let proxy = site.start();
    let mut begun = Client::connect(address).await;
    assert_eq!(begun.get("/").await.status(), 200);
    let mut later = Client::connect(address).await;
    assert_eq!(later.get("/").await.status(), 200);
    begun.send("GET / HT").await;
    let site = site.attributes(|it| it.idle_timeout = SHORT);
    assert_eq!(proxy.apply(site.routes()), []);
    // At once: a connection between requests ends by then, too.
    later.send("GET / HT").await;
    assert_eq!(begun.answer().await.status(), 408);
    assert_eq!(later.answer().await.status(), 408);

    let mut idle = Client::connect(address).await;
    assert_eq!(idle.get("/").await.status(), 200);
    let site = site.attributes(|it| it.client_keep_alive = SHORT);
    assert_eq!(proxy.apply(site.routes()), []);
    assert!(idle.is_closed().await);
}
