//! Requests of HTTP/2 that were made to become something else in HTTP/1.

use std::collections::HashMap;
use std::time::Duration;

use lb_userspace::config::model::DesyncMitigation;

use crate::cases::{self, Expected, MODES, Seen};
use crate::frames::{Stream, Told};
use crate::notation::{self, Entry};
use crate::target::Target;
use crate::traffic::{by_client, site};

const KEYS: [&str; 7] = ["why", "class", "sees", "answer", "data", "trailer", "truncated"];

/// A request that each connection ends with, if it can.
fn marker() -> Vec<(Vec<u8>, Vec<u8>)> {
    let fields =
        [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/marker")];
    fields.map(|(name, value)| (name.into(), value.into())).to_vec()
}

/// `name = value`, of which the value may be empty.
fn field(line: &str) -> (Vec<u8>, Vec<u8>) {
    let line = line.strip_suffix(" =").map_or(line.to_owned(), |name| format!("{name} = "));
    let (name, value) = line.split_once(" = ").unwrap_or_else(|| panic!("{line}"));
    (notation::bytes(name), notation::bytes(value))
}

/// What the client is told, and what the target sees.
fn expected(entry: &Entry, mode: DesyncMitigation) -> (Told, Expected) {
    let forwarded = Expected {
        answers: vec![200],
        closes: false,
        alone: false,
        sees: entry.all("sees").map(Seen::of).collect(),
    };
    let mut expected = cases::in_mode(entry.one("class").unwrap_or("Malformed"), mode, forwarded);
    let told = match entry.one("answer") {
        None => Told::Status(expected.answers[0]),
        Some("reset") => Told::Reset,
        Some("end") => Told::End,
        Some(status) => Told::Status(status.parse().unwrap()),
    };
    if entry.one("answer").is_some() {
        expected.sees.clear();
    }
    (told, expected)
}

async fn downgrade(mode: DesyncMitigation) {
    let entries = notation::read("http2.txt", &KEYS);
    let target = Target::start(HashMap::new()).await;
    let (proxy, address) = site(&target, mode);
    let mut errors = Vec::new();
    let mut sent = Vec::new();
    for entry in &entries {
        let (told, mut expected) = expected(entry, mode);
        let fields: Vec<_> = entry.lines.iter().map(|it| field(it)).collect();
        let data: Option<Vec<u8>> = entry.one("data").map(notation::bytes);
        let trailers: Vec<_> = entry.all("trailer").map(field).collect();
        let mut stream = Stream::connect(address).await;
        let got = stream.ask(&fields, data.as_deref(), &trailers).await;
        if got != told {
            errors.push(format!("{}: {told:?} expected, got {got:?}", entry.name));
        }
        if told != Told::End {
            let after = stream.ask(&marker(), None, &[]).await;
            if after != Told::Status(200) {
                errors.push(format!("{}: marker: {after:?}", entry.name));
            }
            expected.sees.push(Seen::of("GET /marker"));
        }
        sent.push((entry, expected, stream.address));
    }
    proxy.end(Duration::from_secs(1)).await;
    let (mut clients, more) = by_client(target.records().await);
    errors.extend(more);
    for (entry, expected, client) in sent {
        let caused = clients.remove(&client).unwrap_or_default();
        let seen = caused.seen();
        if seen != expected.sees {
            errors.push(format!("{}: the target saw {seen:?}", entry.name));
        }
        if caused.has_part && entry.one("truncated") != Some("yes") {
            errors.push(format!("{}: the target got a part of a request", entry.name));
        }
    }
    assert!(entries.len() >= 60 && clients.is_empty());
    assert!(errors.is_empty(), "{mode:?}:\n{}", errors.join("\n"));
}

#[tokio::test]
async fn downgrades() {
    for mode in MODES {
        downgrade(mode).await;
    }
}
