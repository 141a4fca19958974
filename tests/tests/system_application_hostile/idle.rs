//! Many connections that do nothing.

use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{io::AsyncWriteExt as _, time::sleep};

use crate::{
    bystander::Bystander,
    http::{Connection, answer, connect, exchange, get, post},
    scene::{self, Scene},
    target::pattern,
};

/// As many descriptors as the system lets this process have.
fn raise_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

async fn open(scene: &Scene, count: usize) -> Vec<Connection> {
    let mut connections = Vec::with_capacity(count);
    for _ in 0..count {
        connections.push(connect(scene.http()).await.unwrap());
    }
    connections
}

/// Memory for each of `count`, in KiB.
fn each(before: u64, after: u64, count: usize) -> u64 {
    after.saturating_sub(before) / 1024 / count as u64
}

#[test]
fn ten_thousand_connections_that_do_nothing() {
    const COUNT: usize = 10_000;
    raise_descriptors();
    let scene = scene::start("");
    let bystander = Bystander::start(&scene);
    let memory = || scene.agent.memory().unwrap();
    scene.client(async || {
        let before = memory();
        let t = Instant::now();
        let mut connections = open(&scene, COUNT).await;
        eprintln!("open {:?}", t.elapsed());
        sleep(Duration::from_secs(1)).await;
        let silent = memory();
        eprintln!("silent {} KiB", each(before, silent, COUNT));
        let t = Instant::now();
        for connection in &mut connections {
            assert_eq!(exchange(connection, get("/").as_bytes()).await.unwrap().status, 200);
        }
        eprintln!("requests {:?}", t.elapsed());
        sleep(Duration::from_secs(4)).await;
        eprintln!("kept {} KiB", each(before, memory(), COUNT));
    });
    eprintln!("{:?}", bystander.finish());
}

#[test]
fn buffers_are_not_kept_for_idle_connections() {
    const COUNT: usize = 200;
    let scene = scene::start("");
    let memory = || scene.agent.memory().unwrap();
    scene.client(async || {
        let before = memory();
        let mut connections = open(&scene, COUNT).await;
        for connection in &mut connections {
            let length = 4_000_000;
            connection.get_mut().write_all(post("/hostile/take", length).as_bytes()).await.unwrap();
            crate::target::write_pattern(connection.get_mut(), length).await.unwrap();
            assert_eq!(answer(connection).await.unwrap().body, b"4000000 true");
        }
        sleep(Duration::from_secs(4)).await;
        eprintln!("after uploads {} KiB", each(before, memory(), COUNT));
    });
    let _ = pattern(0);
}
