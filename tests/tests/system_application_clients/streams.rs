//! What is a stream of bytes to the load balancer: WebSocket in TLS, and `tls` listeners.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use futures::{SinkExt, StreamExt};
use lb_tests::{
    clients,
    servers::{HttpServer, Server},
    topology::Topology,
};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime,
};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::{accept_hdr_async, client_async, tungstenite};
use tungstenite::{Message, handshake::server};

use crate::{
    authority::Authority,
    observation,
    world::{PORT, World, application, group, listener, sockets, web_servers},
};

/// Where the targets serve streams; their web servers are there for health checks.
const STREAMS: u16 = 9000;

type Servers = (Vec<HttpServer>, Vec<Server>);

/// Does what `f` says as the client, for as long as it takes.
fn as_client<S: Sync, F: Future<Output = ()>>(world: &World<S>, f: impl FnOnce() -> F + Send) {
    world.topology.client.run(|| {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { tokio::time::timeout(clients::TIMEOUT * 20, f()).await.unwrap() });
    });
}

async fn connect(authority: &Authority, address: SocketAddr) -> (SocketAddr, TlsStream<TcpStream>) {
    let stream = TcpStream::connect(address).await.unwrap();
    let client = stream.local_addr().unwrap();
    let name = ServerName::try_from("site.test").unwrap();
    (client, authority.connector().connect(name, stream).await.unwrap())
}

/// Says who came first, then echoes.
#[expect(clippy::result_large_err, reason = "the type of tungstenite's callback")]
async fn chat(stream: TcpStream) {
    let mut client = String::new();
    let look = |request: &server::Request, response| {
        let field = request.headers().get("x-forwarded-for").unwrap();
        client = field.to_str().unwrap().to_owned();
        Ok(response)
    };
    let mut socket = accept_hdr_async(stream, look).await.unwrap();
    socket.send(Message::text(client)).await.unwrap();
    while let Some(Ok(message)) = socket.next().await {
        // The farewell is answered by the library, while it is read for more.
        if !message.is_close() && socket.send(message).await.is_err() {
            break;
        }
    }
}

fn chat_servers(topology: &Topology) -> Servers {
    let start = |(target, address)| Server::connections(target, address, chat).unwrap();
    (web_servers(topology), sockets(topology, STREAMS).into_iter().map(start).collect())
}

#[test]
fn websockets_in_tls() {
    let world = World::start(chat_servers, |authority| {
        let check = format!(", port = {PORT}");
        let group = group("chat", STREAMS, &[0, 1], "protocol = \"http\"", &check);
        let certificate = authority.issue("site.test");
        let listener = format!(
            "[[load_balancer.site.listener]]\nprotocol = \"https\"\ntarget_group = \"chat\"\n\
             certificates = [{certificate}]\n"
        );
        let log = log(authority);
        group
            + &application(&format!("access_logs = {{ path = \"{}\" }}", log.display()), &listener)
    });
    let (authority, addresses) = (&world.authority, world.at(443));
    as_client(&world, || async move {
        for address in addresses {
            let (client, stream) = connect(authority, address).await;
            let (mut socket, answer) = client_async("wss://site.test/chat", stream).await.unwrap();
            assert_eq!(answer.status(), 101);
            let mut next = async || socket.next().await.unwrap().unwrap();
            assert_eq!(next().await, Message::text(client.ip().to_string()));
            for size in [0, 1, 125, 126, 65_536, 1_000_000] {
                let message = Message::binary(vec![size as u8; size]);
                socket.send(message.clone()).await.unwrap();
                assert_eq!(socket.next().await.unwrap().unwrap(), message);
            }
            socket.close(None).await.unwrap();
            while let Some(message) = socket.next().await {
                assert!(message.unwrap().is_close());
            }
        }
    });
    for line in observation::lines(&log(authority), 2) {
        let kind = [("type", "wss"), ("elb_status_code", "101"), ("target_status_code", "101")];
        observation::says(&line, &kind);
        for bytes in ["received_bytes", "sent_bytes"] {
            let bytes: u64 = line[bytes].parse().unwrap();
            assert!((1_065_000..1_080_000).contains(&bytes), "{line:#?}");
        }
    }
}

/// Where requests are noted.
fn log(authority: &Authority) -> PathBuf {
    authority.folder().join("site.log")
}

/// Reads a header of the PROXY protocol, version 2: who connected to whom. As its text has it in
/// section 2.2.
async fn read_proxy_header(stream: &mut TcpStream) -> (SocketAddr, SocketAddr) {
    let mut head = [0; 16];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(&head[..13], b"\r\n\r\n\0\r\nQUIT\n\x21", "signature, version and command");
    let mut rest = vec![0; u16::from_be_bytes([head[14], head[15]]).into()];
    stream.read_exact(&mut rest).await.unwrap();
    let width = match head[13] {
        0x11 => 4,
        0x21 => 16,
        other => panic!("neither TCP over IPv4 nor over IPv6: {other:#x}"),
    };
    let ip = |at: usize| -> IpAddr {
        match <[u8; 4]>::try_from(&rest[at..at + width]) {
            Ok(octets) => Ipv4Addr::from(octets).into(),
            Err(_) => Ipv6Addr::from(<[u8; 16]>::try_from(&rest[at..at + width]).unwrap()).into(),
        }
    };
    let port = |at: usize| u16::from_be_bytes([rest[at], rest[at + 1]]);
    let client = SocketAddr::new(ip(0), port(2 * width));
    (client, SocketAddr::new(ip(width), port(2 * width + 2)))
}

/// Says what the PROXY protocol told, then echoes.
async fn tell(mut stream: TcpStream) {
    let (client, listener) = read_proxy_header(&mut stream).await;
    let mut text = [0; 4];
    stream.read_exact(&mut text).await.unwrap();
    let text = format!("{client} to {listener}: {}\n", text.escape_ascii());
    stream.write_all(text.as_bytes()).await.unwrap();
    let (mut from, mut to) = stream.split();
    tokio::io::copy(&mut from, &mut to).await.unwrap();
}

fn tellers(topology: &Topology) -> Servers {
    let start = |(target, address)| Server::connections(target, address, tell).unwrap();
    (web_servers(topology), sockets(topology, STREAMS).into_iter().map(start).collect())
}

#[test]
fn tls_listeners_tell_targets_who_connected() {
    let world = World::start(tellers, |authority| {
        let lines = "protocol = \"tcp\"\nproxy_protocol_v2 = true";
        let check = format!(", protocol = \"tcp\", port = {PORT}");
        let certificate = authority.issue("site.test");
        format!(
            "{}[load_balancer.site]\naddresses = [{}]\n[[load_balancer.site.listener]]\n\
             protocol = \"tls\"\nport = 8883\ntarget_group = \"streams\"\n\
             certificates = [{certificate}]\n",
            group("streams", STREAMS, &[0, 1], lines, &check),
            listener()
        )
    });
    let (authority, addresses) = (&world.authority, world.at(8883));
    as_client(&world, || async move {
        for address in addresses {
            let (client, mut stream) = connect(authority, address).await;
            stream.write_all(b"ping").await.unwrap();
            let expected = format!("{client} to {address}: ping\n");
            let mut told = vec![0; expected.len()];
            stream.read_exact(&mut told).await.unwrap();
            assert_eq!(String::from_utf8(told).unwrap(), expected);
            // The end of what the client sends does not end what it gets.
            let sent = lb_tests::servers::body(1_000_000);
            let (mut from, mut to) = tokio::io::split(stream);
            let sending = async {
                to.write_all(&sent).await.unwrap();
                to.shutdown().await.unwrap();
            };
            let mut echoed = Vec::new();
            let (_, length) = tokio::join!(sending, from.read_to_end(&mut echoed));
            assert!(length.unwrap() == sent.len() && echoed == sent);
        }
    });
    assert_eq!(world.metric("NewFlowCount_TLS"), 2);
}
