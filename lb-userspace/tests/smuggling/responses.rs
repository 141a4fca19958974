//! Answers of targets that were made to be misunderstood.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use lb_userspace::config::model::DesyncMitigation::Defensive;

use crate::cases::Seen;
use crate::notation::{self, Entry};
use crate::oracle::{Answers, Read, response};
use crate::target::{Script, Target};
use crate::traffic::{Client, Got, by_client, site};

const KEYS: [&str; 6] = ["why", "request", "status", "body", "reused", "closes"];

fn method(entry: &Entry) -> &str {
    entry.one("request").unwrap_or("GET")
}

/// Asks for it, then for a marker, which must get its own answer. What is wrong.
async fn ask(address: SocketAddr, entry: &Entry) -> Result<Client, String> {
    let mut client = Client::connect(address).await;
    let method = method(entry);
    let request = format!("{method} /{} HTTP/1.1\r\nHost: a\r\n\r\n", entry.name);
    client.send(request.as_bytes()).await;
    let status: u16 = entry.one("status").unwrap().parse().unwrap();
    if entry.one("body") == Some("cut") {
        cut(&mut client, status).await?;
        return marker(Client::connect(address).await).await.map(|_| client);
    }
    let answers = if method == "HEAD" { Answers::Head } else { Answers::Other };
    let message = match client.answer(answers).await {
        Got::Answer(message) => message,
        got => return Err(format!("{got:?}")),
    };
    if message.status() != status {
        return Err(format!("status {}, not {status}", message.status()));
    }
    let body = notation::bytes(entry.one("body").unwrap_or(""));
    if status != 502 && message.body != body {
        return Err(format!("the body {:?}", String::from_utf8_lossy(&message.body)));
    }
    marker(client).await
}

/// A whole answer never comes.
async fn cut(client: &mut Client, status: u16) -> Result<(), String> {
    while client.more().await == Some(true) {}
    let unread = client.unread();
    let text = String::from_utf8_lossy(unread).into_owned();
    let is_part = response(unread, Answers::Other) == Read::Part;
    let is_status = text.is_empty() || text.starts_with(&format!("HTTP/1.1 {status} "));
    if is_part && is_status { Ok(()) } else { Err(format!("not cut: {text:?}")) }
}

async fn marker(mut client: Client) -> Result<Client, String> {
    client.send(b"GET /marker HTTP/1.1\r\nHost: a\r\n\r\n").await;
    match client.answer(Answers::Other).await {
        Got::Answer(message) if message.body == b"GET /marker 0" => Ok(client),
        got => Err(format!("marker: {got:?}")),
    }
}

#[tokio::test]
async fn responses() {
    let entries = notation::read("responses.txt", &KEYS);
    let script = |entry: &Entry| {
        let closes = entry.one("closes") == Some("yes");
        (format!("/{}", entry.name), Script { bytes: entry.bytes(), closes })
    };
    let scripts: HashMap<_, _> = entries.iter().map(script).collect();
    let target = Target::start(scripts).await;
    let (proxy, address) = site(&target, Defensive);
    let mut errors = Vec::new();
    let mut clients = HashMap::new();
    for entry in &entries {
        match ask(address, entry).await {
            Ok(client) => {
                clients.insert(client.address, entry);
            }
            Err(why) => errors.push(format!("{}: {why}", entry.name)),
        }
    }
    proxy.end(Duration::from_secs(1)).await;
    // The target closes a connection of its own accord, or nobody gets another answer over it.
    let records = target.records().await;
    for entry in &entries {
        let seen = format!("/{}", entry.name);
        let record = records
            .iter()
            .find(|record| record.requests.iter().any(|it| it.method_and_target().1 == seen));
        let last = record.and_then(|it| it.requests.last()).map(|it| it.method_and_target().1);
        let is_reused = last.is_some_and(|it| it != seen);
        let may_be = entry.one("reused") == Some("yes");
        if is_reused != may_be {
            errors.push(format!("{}: reused: {is_reused}", entry.name));
        }
    }
    let (caused, more) = by_client(records);
    errors.extend(more);
    for (client, entry) in clients {
        let asked = Seen::of(&format!("{} /{}", method(entry), entry.name));
        let seen = caused.get(&client).map(|it| it.seen()).unwrap_or_default();
        if seen.first() != Some(&asked) {
            errors.push(format!("{}: the target saw {seen:?}", entry.name));
        }
    }
    assert!(entries.len() >= 40);
    assert!(errors.is_empty(), "{}", errors.join("\n"));
}
