//! Clients that can be told from each other by their addresses, and what each of them caused.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};

use lb_userspace::config::model::DesyncMitigation;
use lb_userspace::proxy::Proxy;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::cases::Seen;
use crate::harness::{LIMIT, Site};
use crate::oracle::{Answers, Message, Read, response};
use crate::target::{Record, Target};

/// A proxy in a mode, in front of a target.
pub fn site(target: &Target, mode: DesyncMitigation) -> (Proxy, SocketAddr) {
    let (site, address) = Site::new(&[target.address]);
    (site.attributes(|it| it.desync_mitigation = mode).start(), address)
}

/// A client with an address of its own.
pub struct Client {
    pub address: IpAddr,
    stream: TcpStream,
    unread: Vec<u8>,
}

/// What a client reads.
#[derive(Debug)]
#[expect(dead_code, reason = "why something is no answer is in what a test says at its end")]
pub enum Got {
    Answer(Message),
    /// The connection ended, with no other byte.
    End,
    /// What is no answer, and why.
    Invalid(String),
    /// Nothing, for too long.
    Nothing,
}

impl Client {
    pub async fn connect(to: SocketAddr) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let address = IpAddr::from(Ipv4Addr::from_bits(0x7f80_0000 + number));
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((address, 0).into()).unwrap();
        let stream = socket.connect(to).await.unwrap();
        Self { address, stream, unread: Vec::new() }
    }

    /// The proxy may have closed already: that is seen when the answer is read.
    pub async fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
    }

    /// The next answer but those that only say to go on.
    pub async fn answer(&mut self, answers: Answers) -> Got {
        loop {
            match response(&self.unread, answers) {
                Read::Whole(message, used) => {
                    self.unread.drain(..used);
                    if message.status() != 100 {
                        return Got::Answer(message);
                    }
                }
                Read::Invalid(why) => return Got::Invalid(format!("{why}: {}", self.text())),
                Read::Part => match self.more().await {
                    Some(true) => {}
                    Some(false) if self.unread.is_empty() => return Got::End,
                    None if self.unread.is_empty() => return Got::Nothing,
                    _ => return Got::Invalid(format!("half an answer: {}", self.text())),
                },
            }
        }
    }

    /// Whether more bytes came before the connection ended; `None`: neither happened.
    pub async fn more(&mut self) -> Option<bool> {
        let read = timeout(LIMIT, self.stream.read_buf(&mut self.unread)).await.ok()?;
        Some(matches!(read, Ok(1..)))
    }

    /// Bytes that came and were not taken.
    pub fn unread(&mut self) -> &mut Vec<u8> {
        &mut self.unread
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.unread).into_owned()
    }
}

/// What the target saw of one client.
#[derive(Debug, Default)]
pub struct Caused {
    pub requests: Vec<Message>,
    /// Whether a part of a request came last.
    pub has_part: bool,
    /// Whether others came later over the same connection.
    pub is_followed: bool,
}

impl Caused {
    /// What was seen.
    pub fn seen(&self) -> Vec<Seen> {
        let seen = |message: &Message| {
            let (method, target) = message.method_and_target();
            let body = message.body.clone();
            Seen { method: method.to_owned(), target: target.to_owned(), body }
        };
        self.requests.iter().map(seen).collect()
    }
}

/// Tells by client what the target got. Bytes that are neither a request nor the beginning of a
/// valid one are errors, and requests that tell of no client.
pub fn by_client(records: Vec<Record>) -> (HashMap<IpAddr, Caused>, Vec<String>) {
    let mut clients: HashMap<IpAddr, Caused> = HashMap::new();
    let mut orders: HashMap<IpAddr, Vec<u64>> = HashMap::new();
    let mut errors = Vec::new();
    for record in records {
        let rest = String::from_utf8_lossy(&record.rest).into_owned();
        if let Some(why) = record.invalid {
            errors.push(format!("the target got what is not valid ({why}): {rest:?}"));
        }
        let part = (!rest.is_empty()).then(|| client_of_part(&rest));
        let count = record.requests.len();
        let requests = record.order.into_iter().zip(record.requests);
        for (n, (order, request)) in requests.enumerate() {
            let Some(client) = request.one("x-forwarded-for").and_then(client) else {
                errors.push(format!("whose request is this? {request:?}"));
                continue;
            };
            let caused = clients.entry(client).or_default();
            // A client's requests may come over several connections.
            let orders = orders.entry(client).or_default();
            let at = orders.partition_point(|&it| it < order);
            orders.insert(at, order);
            caused.requests.insert(at, request);
            caused.is_followed = n + 1 < count || part.is_some();
        }
        match part {
            None => {}
            Some(Some(client)) => clients.entry(client).or_default().has_part = true,
            Some(None) => errors.push(format!("whose part of a request is this? {rest:?}")),
        }
    }
    (clients, errors)
}

/// The last one is who connected.
fn client(forwarded_for: &[u8]) -> Option<IpAddr> {
    String::from_utf8_lossy(forwarded_for).rsplit(", ").next()?.parse().ok()
}

fn client_of_part(part: &str) -> Option<IpAddr> {
    let (_, value) = part.split_once("\r\nX-Forwarded-For: ")?;
    client(value.split("\r\n").next()?.as_bytes())
}
