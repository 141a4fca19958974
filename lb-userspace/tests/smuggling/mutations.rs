//! The corpus, changed at random: whatever comes of it, what the target gets is valid, and what the
//! client was answered for.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::StreamExt;
use lb_userspace::config::model::DesyncMitigation::Monitor;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::cases::{self, Case, Exceptions};
use crate::harness::Site;
use crate::oracle::Answers;
use crate::target::{Target, echo};
use crate::traffic::{Caused, Client, Got, by_client};

const COUNT: u64 = 1500;

/// At a time.
const CLIENTS: usize = 128;

/// What is put in: what means something somewhere in a message.
const PIECES: [&[u8]; 33] = [
    b"\r",
    b"\n",
    b"\r\n",
    b"\r\n\r\n",
    b"\0",
    b" ",
    b"\t",
    b"\x0b",
    b":",
    b",",
    b";",
    b"0",
    b"5",
    b"f",
    b"-",
    b"+",
    b"/",
    b"?",
    b"#",
    b"*",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"0\r\n\r\n",
    b"chunked",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Host: b\r\n",
    b"Connection: close\r\n",
    b"Connection: upgrade\r\nUpgrade: x\r\n",
    b"Expect: 100-continue\r\n",
    b"HTTP/1.0",
    b"GET /g HTTP/1.1\r\nHost: g\r\n\r\n",
];

/// One to three places of a request are changed, or exchanged with another one's.
fn mutate(random: &mut StdRng, raws: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = raws[random.random_range(0..raws.len())].clone();
    for _ in 0..random.random_range(1..=3) {
        let at = random.random_range(0..=bytes.len());
        let to = (at + random.random_range(0..=8)).min(bytes.len());
        match random.random_range(0..6) {
            0 => drop(bytes.drain(at..to)),
            1 => drop(bytes.splice(at..at, PIECES[random.random_range(0..PIECES.len())].to_vec())),
            2 => drop(bytes.splice(at..to, PIECES[random.random_range(0..PIECES.len())].to_vec())),
            3 => drop(bytes.splice(at..at, bytes[at..to].to_vec())),
            4 if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8),
            _ => {
                let other = &raws[random.random_range(0..raws.len())];
                let from = random.random_range(0..=other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
    bytes
}

/// Sends it. All answers, as far as they are whole: status and body.
async fn send(to: SocketAddr, bytes: Vec<u8>) -> (IpAddr, Vec<(u16, String)>) {
    let mut client = Client::connect(to).await;
    client.send(&bytes).await;
    let mut told = Vec::new();
    while let Got::Answer(message) = client.answer(Answers::Other).await {
        told.push((message.status(), String::from_utf8_lossy(&message.body).into_owned()));
    }
    (client.address, told)
}

/// Whether a client was told of what the target saw, in order. Instead of any of it there may be an
/// error (there is little time), and of the last nothing.
fn fit(told: &[(u16, String)], caused: &Caused) -> bool {
    let mut seen = caused.requests.iter().map(echo);
    let of_target = told.iter().filter(|(status, _)| *status == 200);
    of_target.clone().all(|(_, body)| seen.any(|it| it == *body))
        && caused.requests.len() <= told.len() + 1
}

#[tokio::test]
async fn mutations() {
    let cases = cases::all();
    let exceptions = Exceptions::read(&cases);
    // Not of those that are refused already, nor of HEAD, whose answers look like others' beginnings.
    let is_forwarded = |case: &Case| {
        exceptions.expected(case, Monitor).answers.contains(&200)
            && !case.raw.windows(5).any(|it| it == b"HEAD ")
    };
    let raws: Vec<_> =
        cases.iter().filter(|it| is_forwarded(it)).map(|it| it.raw.clone()).collect();
    let target = Target::start(HashMap::new()).await;
    let (site, address) = Site::new(&[target.address]);
    let site = site.attributes(|it| {
        it.desync_mitigation = Monitor;
        // For those that do not end.
        it.idle_timeout = Duration::from_millis(300);
        it.client_keep_alive = Duration::from_millis(50);
    });
    let proxy = site.start();
    let send = |seed| {
        let bytes = mutate(&mut StdRng::seed_from_u64(seed), &raws);
        async move { (seed, send(address, bytes).await) }
    };
    let sent: Vec<_> =
        futures::stream::iter(0..COUNT).map(send).buffer_unordered(CLIENTS).collect().await;
    proxy.end(Duration::from_secs(1)).await;
    let (clients, mut errors) = by_client(target.records().await);
    let mut answered = 0;
    for (seed, (client, told)) in sent {
        let nothing = Caused::default();
        let caused = clients.get(&client).unwrap_or(&nothing);
        answered += told.iter().filter(|(status, _)| *status == 200).count();
        if !fit(&told, caused) {
            errors.push(format!("seed {seed}: {told:?} for {:?}", caused.seen()));
        }
    }
    assert!(answered > 100, "{answered}");
    assert!(errors.is_empty(), "{}", errors.join("\n"));
}
