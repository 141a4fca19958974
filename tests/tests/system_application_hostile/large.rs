//! Large bodies and large heads.

use std::time::Duration;

use futures::future::join;
use tokio::{io::AsyncWriteExt as _, time::sleep};

use crate::{
    bystander::Bystander,
    http::{answer, ask, connect, get, head, post},
    scene,
    target::{is_pattern, write_pattern},
};

const TWO_GIGABYTES: u64 = 2_000_000_000;

/// Of the agent's memory, in MiB, at most, for a body of any size.
const MOST: u64 = 24;

#[test]
fn two_gigabytes_down_and_up() {
    let scene = scene::start("");
    let bystander = Bystander::start(&scene);
    let before = scene.agent.memory().unwrap();
    let grown = || scene.agent.memory().unwrap().saturating_sub(before) >> 20;
    scene.client(async || {
        let down = async {
            let mut connection = connect(scene.http()).await.unwrap();
            let path = format!("/hostile/bytes/{TWO_GIGABYTES}");
            connection.get_mut().write_all(get(&path).as_bytes()).await.unwrap();
            assert_eq!(head(&mut connection).await.unwrap().0, 200);
            assert!(is_pattern(&mut connection, TWO_GIGABYTES).await.unwrap());
        };
        let up = async {
            let mut connection = connect(scene.http()).await.unwrap();
            let request = post("/hostile/take", TWO_GIGABYTES);
            connection.get_mut().write_all(request.as_bytes()).await.unwrap();
            write_pattern(connection.get_mut(), TWO_GIGABYTES).await.unwrap();
            let answer = answer(&mut connection).await.unwrap();
            assert_eq!(answer.body, format!("{TWO_GIGABYTES} true").as_bytes());
        };
        let watch = async {
            loop {
                sleep(Duration::from_millis(200)).await;
                assert!(grown() < MOST, "{} MiB", grown());
            }
        };
        tokio::select! {
            _ = join(down, up) => {}
            () = watch => {}
        }
    });
    assert!(grown() < MOST, "{} MiB", grown());
    bystander.finish();
}

#[test]
fn large_heads_are_refused() {
    let scene = scene::start("");
    let bystander = Bystander::start(&scene);
    let before = scene.agent.memory().unwrap();
    let lines = |count: usize, line: &str| {
        get("/").replace("\r\n\r\n", &format!("\r\n{}\r\n", line.repeat(count)))
    };
    let line = |length: usize| get(&format!("/{}", "a".repeat(length)));
    scene.client(async || {
        for (what, request, status) in [
            ("ten thousand lines", lines(10_000, "X-Line: value\r\n"), 400),
            ("ten thousand short lines", lines(10_000, "a:\r\n"), 400),
            ("a field of 20 KiB", lines(1, &format!("X: {}\r\n", "x".repeat(20 << 10))), 400),
            ("a field of 100 KiB", lines(1, &format!("X: {}\r\n", "x".repeat(100 << 10))), 400),
            ("a field of 1 MiB", lines(1, &format!("X: {}\r\n", "x".repeat(1 << 20))), 400),
            ("a line of 17 KiB", line(17 << 10), 414),
            ("a line of 70 KiB", line(70 << 10), 414),
            ("a line of 1 MiB", line(1 << 20), 414),
        ] {
            for _ in 0..20 {
                let mut connection = connect(scene.http()).await.unwrap();
                // The answer may come before the end of the request.
                let _ = connection.get_mut().write_all(request.as_bytes()).await;
                let answer = answer(&mut connection).await;
                let answer = answer.unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(answer.status, status, "{what}");
            }
        }
        // At the bounds.
        let fits = lines(1, &format!("X: {}\r\n", "x".repeat(15 << 10)));
        assert_eq!(ask(scene.http(), fits).await.unwrap().status, 200);
        assert_eq!(ask(scene.http(), line(15 << 10)).await.unwrap().status, 200);
    });
    assert_eq!(scene.metric("HTTPCode_ELB_4XX_Count"), 160);
    let grown = scene.agent.memory().unwrap().saturating_sub(before) >> 20;
    assert!(grown < 24, "{grown} MiB");
    bystander.finish();
}
