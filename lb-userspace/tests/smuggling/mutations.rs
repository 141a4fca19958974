//! The corpus, changed at random: whatever comes of it, what the target gets is valid, and what the
//! client was answered for.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::StreamExt;
use lb_userspace::config::model::DesyncMitigation::Monitor;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::cases;
use crate::harness::Site;
use crate::oracle::Answers;
use crate::target::{Target, echo};
use crate::traffic::{Client, Got, by_client};

const COUNT: u64 = 3000;

/// At a time.
const CLIENTS: usize = 64;

/// What is put in: what means something somewhere in a message.
const PIECES: [&[u8]; 34] = [
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
    b"HEAD /h HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /g HTTP/1.1\r\nHost: g\r\n\r\n",
];

/// One to four places of a request are changed, or exchanged with another one's.
fn mutate(random: &mut StdRng, raws: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = raws[random.random_range(0..raws.len())].clone();
    for _ in 0..random.random_range(1..=4) {
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

/// Sends it. What a client was told: the bodies of the answers of 200, as far as they are whole.
/// Answers to HEAD cannot be told from others here: behind one, nothing is looked at.
async fn send(to: SocketAddr, bytes: Vec<u8>) -> (IpAddr, Vec<String>) {
    let mut client = Client::connect(to).await;
    client.send(&bytes).await;
    let mut told = Vec::new();
    while let Got::Answer(message) = client.answer(Answers::Other).await {
        if message.status() == 200 {
            told.push(String::from_utf8_lossy(&message.body).into_owned());
        }
    }
    (client.address, told)
}

#[tokio::test]
async fn mutations() {
    let raws: Vec<_> = cases::all().into_iter().map(|case| case.raw).collect();
    let target = Target::start(HashMap::new()).await;
    let (site, address) = Site::new(&[target.address]);
    let site = site.attributes(|it| {
        it.desync_mitigation = Monitor;
        // For those that do not end.
        it.idle_timeout = Duration::from_millis(200);
        it.client_keep_alive = Duration::from_millis(200);
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
        let Some(caused) = clients.get(&client) else {
            if !told.is_empty() {
                errors.push(format!("seed {seed}: answers to nothing: {told:?}"));
            }
            continue;
        };
        let mut seen = caused.requests.iter().map(echo);
        answered += told.len();
        // The last one may have had no answer.
        if !told.iter().all(|it| seen.next().as_ref() == Some(it)) || seen.count() > 1 {
            errors.push(format!("seed {seed}: {told:?} for {:?}", caused.seen()));
        }
    }
    assert!(answered > 500, "{answered}");
    assert!(errors.is_empty(), "{}", errors.join("\n"));
}
