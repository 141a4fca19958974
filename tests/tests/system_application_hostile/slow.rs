//! Clients that take their time.

use std::{
    fs, io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use futures::future::{join_all, join3, join4};
use lb_tests::{site::PATIENCE, wait_until};
use tempfile::TempDir;
use tokio::{io::AsyncWriteExt as _, time::sleep, time::timeout};

use crate::{
    bystander::Bystander,
    http::{Answer, LIMIT, answer, connect, exchange, get, is_closed, post},
    scene::{self, Scene},
};

/// The load balancer's idle timeout; long enough for everyone else on a machine that is busy.
const IDLE: Duration = Duration::from_secs(4);

/// Between two bytes of a client that has time.
const STEP: Duration = Duration::from_millis(400);

/// The preface of HTTP/2 and empty settings (RFC 9113 3.4).
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Sends `first`, then the rest byte by byte, until something is answered. How long that took.
async fn trickle(
    at: SocketAddr,
    first: &[u8],
    rest: impl Iterator<Item = u8>,
) -> io::Result<(Answer, Duration)> {
    let mut connection = connect(at).await?;
    let began = Instant::now();
    connection.get_mut().write_all(first).await?;
    for byte in rest {
        connection.get_mut().write_all(&[byte]).await?;
        if timeout(STEP, connection.get_ref().readable()).await.is_ok() {
            break;
        }
    }
    Ok((timeout(LIMIT, answer(&mut connection)).await??, began.elapsed()))
}

/// So many at once are answered with that, after the idle timeout and not much later.
async fn are_told(
    at: SocketAddr,
    clients: usize,
    status: u16,
    first: &[u8],
    rest: impl Iterator<Item = u8> + Clone,
) {
    let all = join_all((0..clients).map(|_| trickle(at, first, rest.clone()))).await;
    for told in all {
        let (answer, took) = told.unwrap();
        assert_eq!(answer.status, status);
        assert!(took > IDLE.mul_f32(0.9) && took < IDLE + LIMIT, "{took:?}");
    }
}

/// So many at once are left when they say this and nothing more. How long that took.
async fn are_left(at: SocketAddr, clients: usize, first: &[u8]) -> Duration {
    let began = Instant::now();
    let one = async || {
        let mut connection = connect(at).await.unwrap();
        connection.get_mut().write_all(first).await.unwrap();
        assert!(is_closed(&mut connection).await, "after {first:?}");
    };
    join_all((0..clients).map(|_| one())).await;
    began.elapsed()
}

async fn are_left_after_a_request(scene: &Scene, clients: usize) {
    let one = async || {
        let mut connection = connect(scene.http()).await.unwrap();
        assert_eq!(exchange(&mut connection, get("/").as_bytes()).await.unwrap().status, 200);
        let began = Instant::now();
        assert!(is_closed(&mut connection).await);
        assert!(began.elapsed() > IDLE.mul_f32(0.9), "{:?}", began.elapsed());
    };
    join_all((0..clients).map(|_| one())).await;
}

#[test]
fn slow_clients_are_told_and_left() {
    let folder = TempDir::new().unwrap();
    let log = folder.path().join("access.log");
    let seconds = IDLE.as_secs();
    let scene = scene::start(&format!(
        "idle_timeout = \"{seconds}s\"\naccess_logs = {{ path = \"{}\" }}",
        log.display()
    ));
    let bystander = Bystander::start(&scene);
    let (http, https) = (scene.http(), scene.https());
    scene.client(async || {
        let head = get("/").replace("\r\n\r\n", "\r\nX-Slow: ");
        let body = post("/hostile/take", 14);
        let endless = std::iter::repeat(b'a');
        let slow_bodies =
            join_all((0..20).map(|_| trickle(http, body.as_bytes(), endless.clone().take(14))));
        let told = join4(
            are_told(http, 200, 408, head.as_bytes(), endless.clone()),
            are_told(http, 50, 408, &body.as_bytes()[..20], endless.clone().take(0)),
            are_told(http, 50, 408, body.as_bytes(), [b'a'; 7].into_iter().take(1)),
            are_told(http, 20, 408, b"", HTTP2.iter().copied()),
        );
        let left = join3(
            join3(are_left(http, 50, b""), are_left(http, 50, HTTP2), async {
                are_left_after_a_request(&scene, 20).await;
            }),
            // What says nothing, the beginning of a record, and its end after a while.
            join3(
                are_left(https, 20, b""),
                are_left(https, 50, b"\x16\x03\x01\x02\0\x01"),
                async {
                    are_left(https, 1, b"GET / HTTP/1.1\r\n\r\n").await;
                },
            ),
            sleep(Duration::ZERO),
        );
        let (slow_bodies, _, _) = join3(slow_bodies, told, left).await;
        // As long as bytes come in time, a request may take its time.
        for took in slow_bodies {
            let (answer, took) = took.unwrap();
            assert_eq!((answer.status, &*answer.body), (200, &b"14 false"[..]));
            assert!(took > IDLE, "{took:?}");
        }
    });
    bystander.finish();
    let lines = || fs::read_to_string(&log).unwrap().matches(" 408 - ").count();
    wait_until("lines of the access log", PATIENCE, || lines() == 320).unwrap();
    assert_eq!(scene.metric("HTTPCode_ELB_4XX_Count"), 320);
    assert_eq!(scene.metric("ClientTLSNegotiationErrorCount"), 71);
    // All but the connections to targets.
    let open = || scene.metric("ActiveConnectionCount");
    wait_until("the end of connections", PATIENCE, || open() < 100).unwrap();
}

/// A head of HTTP/2 whose stream has this number: GET of a path.
fn http2_get(stream: u32, path: &str) -> Vec<u8> {
    // Indexed fields of RFC 7541's static table: GET, http; then path and authority as literals.
    let mut block = vec![0x82, 0x86, 0x04, u8::try_from(path.len()).unwrap()];
    block.extend(path.bytes());
    block.extend(b"\x01\x09site.test");
    let mut frame = u32::try_from(block.len()).unwrap().to_be_bytes()[1..].to_vec();
    // HEADERS with END_STREAM and END_HEADERS.
    frame.extend([0x01, 0x05]);
    frame.extend(stream.to_be_bytes());
    frame.extend(block);
    frame
}

/// Windows as large as they can be, for a client that then reads nothing.
fn http2_generous() -> Vec<u8> {
    const MOST: u32 = (1 << 31) - 1;
    let mut bytes = HTTP2[..24].to_vec();
    // SETTINGS with SETTINGS_INITIAL_WINDOW_SIZE, and WINDOW_UPDATE of the connection.
    bytes.extend(b"\0\0\x06\x04\0\0\0\0\0\0\x04");
    bytes.extend(MOST.to_be_bytes());
    bytes.extend(b"\0\0\x04\x08\0\0\0\0\0");
    bytes.extend((MOST - 65_535).to_be_bytes());
    bytes
}

/// Neither what they do not read is kept, nor they.
#[test]
fn readers_that_never_read() {
    const READERS: u64 = 200;
    const CONNECTIONS: u64 = 4;
    const STREAMS: u64 = 100;
    let seconds = IDLE.as_secs();
    let scene = scene::start(&format!("idle_timeout = \"{seconds}s\""));
    let bystander = Bystander::start(&scene);
    let path = format!("/hostile/bytes/{}", 64 << 20);
    let memory = || scene.agent.memory().unwrap();
    let open = || scene.metric("ActiveConnectionCount");
    // The most that it had, until they were left; they read nothing until then.
    let most = async |before: u64| {
        let (began, mut most) = (Instant::now(), 0);
        while open() > 100 || began.elapsed() < IDLE / 2 {
            assert!(began.elapsed() < PATIENCE, "{} connections", open());
            most = most.max(memory().saturating_sub(before));
            sleep(Duration::from_millis(100)).await;
        }
        most / 1024
    };
    scene.client(async || {
        let before = memory();
        let mut readers = Vec::new();
        for _ in 0..READERS {
            let mut connection = connect(scene.http()).await.unwrap();
            connection.get_mut().write_all(get(&path).as_bytes()).await.unwrap();
            readers.push(connection);
        }
        let each = most(before).await / READERS;
        println!("{each} KiB for each reader");
        assert!(each < 1536, "{each} KiB");
        let before = memory();
        let mut readers = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut connection = connect(scene.http()).await.unwrap();
            let mut bytes = http2_generous();
            for stream in 0..STREAMS {
                let number = u32::try_from(2 * stream + 1).unwrap();
                bytes.extend(http2_get(number, &path));
            }
            connection.get_mut().write_all(&bytes).await.unwrap();
            readers.push(connection);
        }
        let each = most(before).await / CONNECTIONS / STREAMS;
        println!("{each} KiB for each stream");
        assert!(each < 768, "{each} KiB");
    });
    bystander.finish();
}
