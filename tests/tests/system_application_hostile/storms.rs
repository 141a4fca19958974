//! Clients that leave in the middle of things, and a configuration that never rests.

use std::{fs, time::Duration};

use futures::future::join_all;
use lb_tests::{site::PATIENCE, wait_until};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{sleep, timeout},
};

use crate::{
    bystander::Bystander,
    http::{LIMIT, connect, get, head, post},
    scene,
};

#[test]
fn clients_that_leave_leave_nothing_behind() {
    const EACH: usize = 60;
    let folder = TempDir::new().unwrap();
    let log = folder.path().join("access.log");
    let scene = scene::start(&format!("access_logs = {{ path = \"{}\" }}", log.display()));
    let bystander = Bystander::start(&scene);
    let at = scene.http();
    let download = get(&format!("/hostile/bytes/{}", 64 << 20));
    let upload = post("/hostile/take", 1 << 20);
    scene.client(async || {
        let leave = async |request: &[u8], by_reset: bool, after: usize| {
            let mut connection = connect(at).await.unwrap();
            connection.get_mut().write_all(request).await.unwrap();
            if after > 0 {
                assert_eq!(head(&mut connection).await.unwrap().0, 200);
                connection.read_exact(&mut vec![0; after]).await.unwrap();
            } else {
                sleep(Duration::from_millis(100)).await;
            }
            if by_reset {
                connection.get_ref().set_zero_linger().unwrap();
            }
        };
        for by_reset in [false, true] {
            for (request, after) in [
                (b"".as_slice(), 0),
                (b"GET / HTTP/1.1\r\nHo", 0),
                (get("/hostile/silence").as_bytes(), 0),
                (upload.as_bytes(), 0),
                (download.as_bytes(), 100_000),
            ] {
                join_all((0..EACH).map(|_| leave(request, by_reset, after))).await;
            }
        }
        // The end of what a client says is taken for its leaving, as a closed socket looks the same.
        let mut half = connect(at).await.unwrap();
        half.get_mut().write_all(get("/hostile/silence").as_bytes()).await.unwrap();
        half.get_mut().shutdown().await.unwrap();
        assert_eq!(timeout(LIMIT, half.read(&mut [0])).await.unwrap().unwrap_or(0), 0);
    });
    bystander.finish();
    let open = || scene.metric("ActiveConnectionCount");
    wait_until("the end of connections", PATIENCE, || open() < 20).unwrap();
    // Heads that were cut, requests without an answer and uploads, by both ways to leave.
    let expected = 2 * 3 * EACH + 1;
    let lines = || fs::read_to_string(&log).unwrap().matches(" 460 - ").count();
    wait_until("lines of the access log", PATIENCE, || lines() == expected)
        .unwrap_or_else(|error| panic!("{error}: {} of {expected}", lines()));
    assert_eq!(scene.metric("HTTPCode_ELB_4XX_Count"), expected as u64);
    assert!(scene.agent.descriptors().unwrap() < 200);
}

#[test]
fn no_request_fails_while_everything_changes() {
    let scene = scene::start("");
    let bystanders: Vec<_> = (0..3).map(|_| Bystander::start(&scene)).collect();
    let secure = Bystander::start_secure(&scene);
    for round in 0..20 {
        // Another certificate, other rules, and target 1 comes and goes.
        let config =
            scene::config(&scene.authority, &format!("idle_timeout = \"{}s\"", 60 + round));
        let rules: String = (0..round)
            .map(|n| {
                format!(
                    "[[load_balancer.site.listener.rule]]\npriority = {}\n\
                     path_pattern = [\"/{n}/*\"]\nfixed_response = {{ status = 404 }}\n",
                    n + 10
                )
            })
            .collect();
        let config = if round % 2 == 0 { scene::without_target_1(&config) } else { config };
        scene.reload(&(config + &rules));
    }
    for bystander in bystanders {
        assert!(bystander.finish().requests > 20);
    }
    assert!(secure.finish().requests > 20);
}
