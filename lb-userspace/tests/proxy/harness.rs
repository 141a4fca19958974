//! Servers, clients and routes.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use lb_userspace::config::model::{
    Action, Attributes, Forward, HttpVersion, ListenerTls, ProxyListener, ProxyProtocol,
    ProxySettings, TargetProtocol, WeightedTargetGroup,
};
use lb_userspace::proxy::Proxy;
use lb_userspace::proxy::routes::{
    FULL_SHARE, GroupRoute, ListenerRoute, Routes, TargetRoute, TargetState,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// No step of a test takes longer.
pub const LIMIT: Duration = Duration::from_secs(20);

/// An address of the loopback device where nothing listens.
pub fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// A server that does `serve` with each connection.
pub async fn origin<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    address
}

/// A server that answers each request with these bytes, on connections that stay.
pub async fn answers(answer: &'static str) -> SocketAddr {
    origin(move |mut stream| async move {
        while read_head(&mut stream).await.is_some() {
            if stream.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    })
    .await
}

/// A server that answers each request with the head that it got.
pub async fn mirror() -> SocketAddr {
    origin(|mut stream| async move {
        while let Some(head) = read_head(&mut stream).await {
            let length = head.len();
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{head}");
            if stream.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    })
    .await
}

/// Bytes until the end of a message's head, with what came after it; `None`: the other side
/// closed.
pub async fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.windows(4).any(|it| it == b"\r\n\r\n") {
        if stream.read_buf(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    Some(String::from_utf8_lossy(&head).into_owned())
}

/// What the proxy serves in a test.
#[derive(Clone)]
pub struct Site {
    pub listeners: BTreeMap<SocketAddr, ListenerRoute>,
    pub groups: BTreeMap<Arc<str>, GroupRoute>,
    pub attributes: Attributes,
}

impl Site {
    /// An http listener that forwards to these targets.
    pub fn new(targets: &[SocketAddr]) -> (Self, SocketAddr) {
        let mut site = Self {
            listeners: BTreeMap::new(),
            groups: BTreeMap::new(),
            attributes: Attributes::default(),
        };
        site.group("web", targets, |_| {});
        let address = site.listener(ProxyProtocol::Http, None);
        (site, address)
    }

    pub fn group(
        &mut self,
        name: &str,
        targets: &[SocketAddr],
        change: impl FnOnce(&mut ProxySettings),
    ) {
        let mut settings =
            ProxySettings { protocol: TargetProtocol::Http, ..ProxySettings::default() };
        change(&mut settings);
        let targets = targets.iter().map(|&address| TargetRoute {
            address,
            weight: 1,
            share: FULL_SHARE,
            zone: None,
            state: TargetState::InService,
        });
        let group = GroupRoute { settings, slow_start: Duration::ZERO, targets: targets.collect() };
        self.groups.insert(name.into(), group);
    }

    /// The targets of "web" speak that.
    pub fn version(mut self, version: HttpVersion) -> Self {
        self.groups.get_mut("web").unwrap().settings.version = version;
        self
    }

    pub fn attributes(mut self, change: impl FnOnce(&mut Attributes)) -> Self {
        change(&mut self.attributes);
        self
    }

    /// Another listener that forwards to "web".
    pub fn listener(&mut self, protocol: ProxyProtocol, tls: Option<ListenerTls>) -> SocketAddr {
        let address = free();
        let group = WeightedTargetGroup { name: "web".to_owned(), weight: 1 };
        let listener = ProxyListener {
            protocol,
            port: address.port(),
            tls,
            default_action: Action::Forward(Forward {
                target_groups: vec![group],
                stickiness: None,
            }),
            rules: Vec::new(),
        };
        let route = ListenerRoute {
            load_balancer: "site".into(),
            listener: Arc::new(listener),
            attributes: Arc::default(),
            zone: None,
            cross_zone: true,
        };
        self.listeners.insert(address, route);
        address
    }

    pub fn routes(&self) -> Routes {
        let mut listeners = self.listeners.clone();
        for listener in listeners.values_mut() {
            listener.attributes = Arc::new(self.attributes.clone());
        }
        Routes { listeners, groups: self.groups.clone(), cookie_key: [0; 32] }
    }

    pub fn start(&self) -> Proxy {
        let proxy = Proxy::start(1).unwrap();
        assert_eq!(proxy.apply(self.routes()), []);
        proxy
    }
}

/// A counter of the load balancer.
pub fn count(proxy: &Proxy, name: &str) -> u64 {
    proxy.counters().load_balancers["site"].counts[name]
}

/// Waits until a counter of the load balancer has a value.
pub async fn wait_count(proxy: &Proxy, name: &str, value: u64) {
    let reached = async {
        while count(proxy, name) != value {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if timeout(LIMIT, reached).await.is_err() {
        panic!("{name} is {}, not {value}", count(proxy, name));
    }
}

/// A client that writes bytes.
pub struct Client {
    pub stream: TcpStream,
    unread: Vec<u8>,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn status(&self) -> u16 {
        self.head.split(' ').nth(1).unwrap().parse().unwrap()
    }

    /// A field's value; its name in lower case.
    pub fn field(&self, name: &str) -> Option<&str> {
        let field = |line: &'_ str| {
            let (it, _) = line.split_once(':')?;
            it.eq_ignore_ascii_case(name).then_some(it.len() + 1)
        };
        self.head.lines().find_map(|line| Some(line[field(line)?..].trim()))
    }
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        Self { stream: TcpStream::connect(address).await.unwrap(), unread: Vec::new() }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
    }

    async fn more(&mut self) -> bool {
        timeout(LIMIT, self.stream.read_buf(&mut self.unread)).await.unwrap().is_ok_and(|n| n > 0)
    }

    /// Whether the proxy ends the connection, without another byte.
    pub async fn is_closed(&mut self) -> bool {
        self.unread.is_empty() && !self.more().await
    }

    async fn until(&mut self, end: &[u8]) -> Vec<u8> {
        loop {
            if let Some(at) = self.unread.windows(end.len()).position(|it| it == end) {
                let rest = self.unread.split_off(at + end.len());
                return std::mem::replace(&mut self.unread, rest);
            }
            assert!(self.more().await, "closed after {:?}", String::from_utf8_lossy(&self.unread));
        }
    }

    pub async fn exactly(&mut self, length: usize) -> Vec<u8> {
        while self.unread.len() < length {
            assert!(self.more().await, "closed after {} of {length} bytes", self.unread.len());
        }
        let rest = self.unread.split_off(length);
        std::mem::replace(&mut self.unread, rest)
    }

    /// An answer's head; no body is read.
    pub async fn head(&mut self) -> Answer {
        let head = String::from_utf8(self.until(b"\r\n\r\n").await).unwrap();
        Answer { head, body: Vec::new() }
    }

    /// An answer with its body.
    pub async fn answer(&mut self) -> Answer {
        let mut answer = self.head().await;
        if let Some(length) = answer.field("content-length") {
            answer.body = self.exactly(length.parse().unwrap()).await;
        } else if answer.field("transfer-encoding") == Some("chunked") {
            loop {
                let size = String::from_utf8(self.until(b"\r\n").await).unwrap();
                let size = usize::from_str_radix(size.trim(), 16).unwrap();
                let chunk = self.exactly(size + 2).await;
                answer.body.extend(&chunk[..size]);
                if size == 0 {
                    break;
                }
            }
        }
        answer
    }

    pub async fn get(&mut self, path: &str) -> Answer {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: site.test\r\n\r\n")).await;
        self.answer().await
    }
}

/// One request, one answer.
pub async fn ask(address: SocketAddr, request: impl AsRef<[u8]>) -> Answer {
    let mut client = Client::connect(address).await;
    client.send(request).await;
    client.answer().await
}

pub const HELLO: &str = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
