//! Connections that become something else.

use std::fs;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use lb_userspace::config::model::LogSink;
use lb_userspace::proxy::routes::TargetState;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{accept_async, client_async};

use crate::harness::{Client, LIMIT, Site, answers, count, origin, read_head, wait_count};

#[tokio::test]
async fn websocket() {
    let target = origin(|stream| async move {
        let mut socket = accept_async(stream).await.unwrap();
        socket.send(Message::text("first")).await.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            if message.is_close() || socket.send(message).await.is_err() {
                break;
            }
        }
    })
    .await;
    let directory = tempfile::TempDir::new().unwrap();
    let log = directory.path().join("access.log");
    let (site, address) = Site::new(&[target]);
    let proxy = site.attributes(|it| it.access_log = Some(LogSink::File(log.clone()))).start();
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut socket, answer) = client_async("ws://site.test/chat", stream).await.unwrap();
    assert_eq!(answer.status(), 101);
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("first"));
    for size in [0, 10, 1_000_000] {
        let message = Message::binary(vec![size as u8; size]);
        socket.send(message.clone()).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), message);
    }
    assert_eq!(count(&proxy, "ActiveConnectionCount"), 2);
    socket.close(None).await.unwrap();
    drop(socket);
    wait_count(&proxy, "ActiveConnectionCount", 0).await;
    let bytes = count(&proxy, "ProcessedBytes");
    proxy.end(Duration::from_secs(5)).await;
    let log = fs::read_to_string(log).unwrap();
    let fields: Vec<_> = log.split(' ').collect();
    assert_eq!((fields[0], fields[8]), ("ws", "101"), "{log}");
    let all = fields[10..12].iter().map(|it| it.parse::<u64>().unwrap());
    assert_eq!(all.clone().sum::<u64>(), bytes, "{log}");
    assert!(all.min() > Some(1_000_000), "{log}");
}

#[tokio::test]
async fn a_silent_tunnel_ends() {
    let target = origin(|mut stream| async move {
        read_head(&mut stream).await;
        let answer = b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nhi";
        stream.write_all(answer).await.unwrap();
        tokio::time::sleep(Duration::from_secs(60)).await;
    })
    .await;
    let (site, address) = Site::new(&[target]);
    let _proxy = site.attributes(|it| it.idle_timeout = Duration::from_millis(300)).start();
    let mut client = Client::connect(address).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n").await;
    let answer = client.head().await;
    assert_eq!(answer.status(), 101);
    assert_eq!(answer.field("upgrade"), Some("x"));
    assert_eq!(client.exactly(2).await, b"hi");
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn an_upgrade_that_nobody_asked_for_is_an_error() {
    let target = answers("HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n");
    let (site, address) = Site::new(&[target.await]);
    let _proxy = site.start();
    assert_eq!(Client::connect(address).await.get("/").await.status(), 502);
}

#[tokio::test]
async fn a_tunnel_ends_with_its_target() {
    let target = origin(|stream| async move {
        let mut socket = accept_async(stream).await.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            if socket.send(message).await.is_err() {
                break;
            }
        }
    })
    .await;
    let (mut site, address) = Site::new(&[target]);
    let proxy = site.start();
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut socket, _) = client_async("ws://site.test/chat", stream).await.unwrap();
    let mut echo = async || {
        socket.send(Message::text("here")).await.ok()?;
        timeout(LIMIT, socket.next()).await.unwrap()?.ok()
    };
    assert_eq!(echo().await, Some(Message::text("here")));
    let targets = &mut site.groups.get_mut("web").unwrap().targets;
    targets[0].state = TargetState::Draining;
    assert_eq!(proxy.apply(site.routes()), []);
    assert_eq!(echo().await, Some(Message::text("here")));
    // The deregistration delay is over.
    site.groups.get_mut("web").unwrap().targets.clear();
    assert_eq!(proxy.apply(site.routes()), []);
    let ends = async { while echo().await.is_some() {} };
    timeout(LIMIT, ends).await.unwrap();
    wait_count(&proxy, "ActiveConnectionCount", 0).await;
}
