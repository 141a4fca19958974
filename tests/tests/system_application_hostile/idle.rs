//! Many connections that do nothing.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    process::Command,
    time::Duration,
};

use futures::{StreamExt as _, stream};
use hyper::{Request, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lb_tests::{agent::binary, site::PATIENCE, wait_until};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::pki_types::ServerName;
use tempfile::TempDir;
use tokio::{
    io::{AsyncWriteExt as _, BufReader},
    net::TcpStream,
    time::sleep,
};

use crate::{
    bystander::Bystander,
    http::{Connection, answer, ask, connect, exchange, get, post},
    scene::{self, Scene},
    target::write_pattern,
};

/// After that long the agent has given back what an idle connection does not need.
const QUIET: Duration = Duration::from_secs(5);

/// As many descriptors as the system lets this process have.
fn raise_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

/// So many connections that have said nothing, or had so many requests.
async fn open(scene: &Scene, count: usize, requests: usize) -> Vec<Connection> {
    let one = |_| async {
        let mut connection = connect(scene.http()).await.unwrap();
        for _ in 0..requests {
            let answer = exchange(&mut connection, get("/").as_bytes()).await.unwrap();
            assert_eq!(answer.status, 200);
        }
        connection
    };
    stream::iter(0..count).map(one).buffer_unordered(32).collect().await
}

/// KiB for each of `count`, told and at most `most`.
fn check_each(what: &str, bytes: u64, count: usize, most: u64) {
    let each = bytes / 1024 / count as u64;
    // Measured values are in docs/application.md.
    println!("{what}: {each} KiB each");
    assert!(each <= most, "{what}: {each} KiB each");
}

#[test]
fn ten_thousand_idle_connections() {
    const HALF: usize = 5_000;
    raise_descriptors();
    let scene = scene::start("");
    let bystander = Bystander::start(&scene);
    let memory = || scene.agent.memory().unwrap();
    scene.client(async || {
        let before = memory();
        let _silent = open(&scene, HALF, 0).await;
        sleep(QUIET).await;
        let between = memory();
        check_each("silent", between.saturating_sub(before), HALF, 24);
        let mut kept = open(&scene, HALF, 1).await;
        sleep(QUIET).await;
        check_each("kept", memory().saturating_sub(between), HALF, 32);
        assert!(scene.metric("ActiveConnectionCount") >= 2 * HALF as u64);
        assert_eq!(scene.metric("RejectedConnectionCount"), 0);
        for connection in kept.iter_mut().step_by(100) {
            assert_eq!(exchange(connection, get("/").as_bytes()).await.unwrap().status, 200);
        }
    });
    bystander.finish();
}

#[test]
fn idle_connections_in_tls_and_of_http2() {
    const COUNT: usize = 100;
    let scene = scene::start("");
    let memory = || scene.agent.memory().unwrap();
    scene.client(async || {
        let before = memory();
        let mut in_tls = Vec::new();
        for _ in 0..COUNT {
            let stream = TcpStream::connect(scene.https()).await.unwrap();
            let name = ServerName::try_from(scene.name.clone()).unwrap();
            let stream = scene.authority.connector().connect(name, stream).await.unwrap();
            let mut stream = BufReader::with_capacity(1024, stream);
            stream.write_all(get("/").as_bytes()).await.unwrap();
            assert_eq!(answer(&mut stream).await.unwrap().status, 200);
            in_tls.push(stream);
        }
        sleep(QUIET).await;
        let between = memory();
        check_each("kept in TLS", between.saturating_sub(before), COUNT, 128);
        let mut of_http2 = Vec::new();
        for _ in 0..COUNT {
            let io = TokioIo::new(TcpStream::connect(scene.http()).await.unwrap());
            let (mut sender, connection) =
                http2::handshake::<_, _, String>(TokioExecutor::new(), io).await.unwrap();
            tokio::spawn(connection);
            let request = Request::get("http://site.test/").body(String::new()).unwrap();
            assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
            of_http2.push(sender);
        }
        sleep(QUIET).await;
        check_each("kept of HTTP/2", memory().saturating_sub(between), COUNT, 160);
        for stream in &mut in_tls {
            stream.write_all(get("/").as_bytes()).await.unwrap();
            assert_eq!(answer(stream).await.unwrap().status, 200);
        }
    });
}

/// A large body needs large buffers; after it, nobody does.
#[test]
fn large_buffers_are_not_kept_for_idle_connections() {
    const COUNT: usize = 100;
    const LENGTH: u64 = 2_000_000;
    let scene = scene::start("");
    let memory = || scene.agent.memory().unwrap();
    scene.client(async || {
        let upload = async || {
            let mut connections = open(&scene, COUNT, 0).await;
            for connection in &mut connections {
                let head = post("/hostile/take", LENGTH);
                connection.get_mut().write_all(head.as_bytes()).await.unwrap();
                write_pattern(connection.get_mut(), LENGTH).await.unwrap();
                assert_eq!(answer(connection).await.unwrap().body, b"2000000 true");
            }
            sleep(QUIET).await;
            connections
        };
        // What the allocator got for the first ones is enough for the others.
        let mut all = upload().await;
        let before = memory();
        for _ in 0..2 {
            all.extend(upload().await);
        }
        check_each("after an upload", memory().saturating_sub(before), 2 * COUNT, 100);
    });
}

/// The agent as started by a shell that lets it have so many descriptors.
fn agent_with(descriptors: u32, folder: &TempDir) -> std::path::PathBuf {
    let path = folder.path().join("agent");
    let mut file = fs::File::create(&path).unwrap();
    let agent = binary().unwrap();
    write!(file, "#!/bin/sh\nulimit -n {descriptors}\nexec {} \"$@\"\n", agent.display()).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn the_limit_of_descriptors_is_raised() {
    let folder = TempDir::new().unwrap();
    let path = agent_with(1000, &folder);
    let script = fs::read_to_string(&path).unwrap().replace("ulimit -n", "ulimit -S -n");
    fs::write(&path, script).unwrap();
    let scene = scene::start_program(&path, "");
    let limits = fs::read_to_string(format!("/proc/{}/limits", scene.agent.id())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let values: Vec<_> = line.split_whitespace().skip(3).take(2).collect();
    assert_eq!(values[0], values[1], "{line}");
    assert_ne!(values[0], "1000");
}

#[test]
fn clients_without_a_descriptor_are_refused() {
    const CLIENTS: usize = 500;
    let folder = TempDir::new().unwrap();
    let scene = scene::start_program(&agent_with(512, &folder), "");
    scene.client(async || {
        let mut served = Vec::new();
        let (mut told, mut closed) = (0, 0);
        for _ in 0..CLIENTS {
            let mut connection = connect(scene.http()).await.unwrap();
            match exchange(&mut connection, get("/").as_bytes()).await {
                Ok(answer) if answer.status == 200 => served.push(connection),
                Ok(answer) => {
                    assert_eq!(answer.status, 503);
                    told += 1;
                }
                Err(_) => closed += 1,
            }
        }
        println!("{} served, {told} told, {closed} closed", served.len());
        assert!(served.len() >= 100 && told > 0);
        // The agent has its share: it answers its user, and opens connections to targets.
        assert_eq!(scene.metric("RejectedConnectionCount"), told + closed);
        assert_eq!(scene.metric("HTTPCode_ELB_503_Count"), told);
        assert_eq!(
            scene.agent.log().matches("too few descriptors").count(),
            2.min(1 + told as usize)
        );
        for connection in &mut served {
            assert_eq!(exchange(connection, get("/").as_bytes()).await.unwrap().status, 200);
        }
        drop(served);
        let gone = || scene.metric("ActiveConnectionCount") < 100;
        wait_until("the end of connections", PATIENCE, gone).unwrap();
        assert_eq!(ask(scene.http(), get("/")).await.unwrap().status, 200);
    });
}

/// Descriptors may also run out where the agent does not count: it waits for better times, and does
/// not burn the processor over it.
#[test]
fn a_system_without_descriptors_is_waited_for() {
    let scene = scene::start("");
    let limit = |value: &str| {
        let process = scene.agent.id().to_string();
        let mut command = Command::new("prlimit");
        let status = command.args(["--pid", &process, &format!("--nofile={value}:")]).status();
        assert!(status.unwrap().success());
    };
    scene.client(async || {
        let (_, before) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let mut kept = connect(scene.http()).await.unwrap();
        // As many as there are targets, so that each has a connection.
        for _ in 0..4 {
            assert_eq!(exchange(&mut kept, get("/").as_bytes()).await.unwrap().status, 200);
        }
        limit("10");
        let waiting: Vec<_> = open(&scene, 10, 0).await;
        let busy = scene.agent.processor_time().unwrap();
        sleep(Duration::from_secs(2)).await;
        let took = scene.agent.processor_time().unwrap() - busy;
        assert!(took < Duration::from_millis(500), "{took:?} in 2 s");
        assert_eq!(exchange(&mut kept, get("/").as_bytes()).await.unwrap().status, 200);
        assert!(scene.agent.log().contains("no connection accepted"));
        limit(&before.to_string());
        for mut connection in waiting {
            let answer: io::Result<_> = exchange(&mut connection, get("/").as_bytes()).await;
            assert_eq!(answer.unwrap().status, 200);
        }
    });
}
