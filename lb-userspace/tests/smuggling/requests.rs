//! The corpus of HTTP/1 requests, in every mode.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lb_userspace::config::model::DesyncMitigation;

use crate::cases::{self, Case, Exceptions, Expected, MODES, Seen};
use crate::oracle::Answers;
use crate::target::Target;
use crate::traffic::{Caused, Client, Got, by_client, site};

const MARKER: &[u8] = b"GET /marker HTTP/1.1\r\nHost: site.test\r\n\r\n";

/// Sends a request; then a marker over the same connection, if that stays. What is wrong with the
/// answers, and who it was.
async fn send(address: SocketAddr, raw: &[u8], expected: &Expected) -> (IpAddr, Vec<String>) {
    let mut client = Client::connect(address).await;
    client.send(raw).await;
    let mut wrong = Vec::new();
    let mut sees = expected.sees.iter();
    for &status in &expected.answers {
        let seen = if status == 200 { sees.next() } else { None };
        let is_head = seen.map_or(raw.starts_with(b"HEAD "), |it| it.method == "HEAD");
        if let Err(why) = answer(&mut client, status, seen, is_head).await {
            wrong.push(why);
            return (client.address, wrong);
        }
    }
    if !expected.closes {
        client.send(MARKER).await;
        let seen = Seen::of("GET /marker");
        if let Err(why) = answer(&mut client, 200, Some(&seen), false).await {
            wrong.push(format!("marker: {why}"));
        }
    } else {
        match client.answer(Answers::Other).await {
            Got::End => {}
            got => wrong.push(format!("no end, but {got:?}")),
        }
    }
    (client.address, wrong)
}

/// An answer of that status, of the target to what it should see.
async fn answer(
    client: &mut Client,
    status: u16,
    seen: Option<&Seen>,
    is_head: bool,
) -> Result<(), String> {
    let answers = if is_head { Answers::Head } else { Answers::Other };
    let message = match client.answer(answers).await {
        Got::Answer(message) => message,
        got => return Err(format!("{status} expected, got {got:?}")),
    };
    let body = String::from_utf8_lossy(&message.body).into_owned();
    if message.status() != status {
        return Err(format!("{status} expected, got {}", message.status()));
    }
    match seen {
        Some(seen) if !is_head => {
            let echo = format!("{} {} {}", seen.method, seen.target, seen.body.len());
            if body == echo { Ok(()) } else { Err(format!("{echo:?} expected, got {body:?}")) }
        }
        _ => Ok(()),
    }
}

/// What is wrong about what the target saw of a case.
fn judge(case: &Case, expected: &Expected, caused: &Caused) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut sees = expected.sees.clone();
    if !expected.closes {
        sees.push(Seen::of("GET /marker"));
    }
    if caused.seen() != sees {
        wrong.push(format!("the target saw {:?}", caused.seen()));
    }
    if caused.has_part && !case.truncated {
        wrong.push("the target got a part of a request".to_owned());
    }
    if expected.alone && caused.is_followed {
        wrong.push("the connection to the target was used again".to_owned());
    }
    wrong
}

async fn corpus(mode: DesyncMitigation) {
    let cases = cases::all();
    let exceptions = Exceptions::read(&cases);
    let target = Target::start(HashMap::new()).await;
    let (proxy, address) = site(&target, mode);
    let other = Expected {
        answers: vec![200],
        closes: false,
        alone: false,
        sees: vec![Seen::of("GET /other")],
    };
    let mut sent = Vec::new();
    for case in &cases {
        let expected = exceptions.expected(case, mode);
        let (client, mut wrong) = send(address, &case.raw, &expected).await;
        // Somebody else, who must not get what was left behind.
        let request = b"GET /other HTTP/1.1\r\nHost: site.test\r\n\r\n";
        let (_, others) = send(address, request, &other).await;
        wrong.extend(others.iter().map(|why| format!("somebody else: {why}")));
        sent.push((case, expected, client, wrong));
    }
    proxy.end(Duration::from_secs(1)).await;
    let (mut clients, mut errors) = by_client(target.records().await);
    for (case, expected, client, mut wrong) in sent {
        let caused = clients.remove(&client).unwrap_or_default();
        wrong.extend(judge(case, &expected, &caused));
        errors.extend(wrong.iter().map(|why| format!("{}: {why}", case.name)));
    }
    // Each of the others had its request and its marker.
    let others =
        clients.values().all(|it| it.seen() == [Seen::of("GET /other"), Seen::of("GET /marker")]);
    assert!(errors.is_empty(), "{mode:?}:\n{}", errors.join("\n"));
    assert!(others && clients.len() == cases.len(), "{mode:?}: {clients:?}");
}

#[test]
fn the_corpus_is_large() {
    let cases = cases::all();
    assert!(cases.len() >= 300, "{}", cases.len());
    // Each exception changes what is expected, or this fails.
    let exceptions = Exceptions::read(&cases);
    for mode in MODES {
        for case in &cases {
            exceptions.expected(case, mode);
        }
    }
}

#[test]
fn exceptions_are_in_the_documentation() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/application.md");
    let page = std::fs::read_to_string(page).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let rows: Vec<_> = rows.collect();
    for name in Exceptions::read(&cases::all()).names() {
        assert!(rows.contains(&name), "{name}");
    }
}

#[tokio::test]
async fn corpus_in_monitor() {
    corpus(DesyncMitigation::Monitor).await;
}

#[tokio::test]
async fn corpus_in_defensive() {
    corpus(DesyncMitigation::Defensive).await;
}

#[tokio::test]
async fn corpus_in_strictest() {
    corpus(DesyncMitigation::Strictest).await;
}
