//! A target that does not keep to HTTP.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use crate::{
    bystander::Bystander,
    http::{LIMIT, ask, connect, field, get, head, is_closed},
    scene,
    target::{LIES, Seen},
};

/// What a client gets: the status, the body as far as it came, and whether it came to its end.
async fn see(at: std::net::SocketAddr, path: &str) -> io::Result<(u16, String, bool)> {
    let mut connection = connect(at).await?;
    let request = get(path).replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n");
    connection.get_mut().write_all(request.as_bytes()).await?;
    let (status, head) = timeout(LIMIT, head(&mut connection)).await??;
    let mut rest = Vec::new();
    // A reset would be as good an end as any for a body that is cut.
    let _ = timeout(LIMIT, connection.read_to_end(&mut rest)).await?;
    let mut rest = String::from_utf8(rest).map_err(io::Error::other)?;
    let is_whole = if field(&head, "transfer-encoding").is_some() {
        let is_whole = rest.ends_with("0\r\n\r\n");
        let mut text = String::new();
        while let Some((size, after)) = rest.split_once("\r\n") {
            let size = usize::from_str_radix(size, 16).map_err(io::Error::other)?;
            text += &after[..size.min(after.len())];
            rest = after.get(size + 2..).unwrap_or_default().to_owned();
        }
        rest = text;
        is_whole
    } else {
        let length = field(&head, "content-length").map_or(0, |it| it.parse().unwrap());
        rest.len() == length
    };
    Ok((status, rest, is_whole))
}

#[test]
fn lies_are_told_as_what_they_are() {
    let scene = scene::start("idle_timeout = \"10s\"");
    let bystander = Bystander::start(&scene);
    let before = scene.agent.memory().unwrap();
    scene.client(async || {
        for lie in LIES {
            // Each of the agent's threads has connections of its own.
            for _ in 0..4 {
                let path = format!("/hostile/lie/{}", lie.name);
                let (status, body, is_whole) = see(scene.http(), &path).await.unwrap();
                match lie.seen {
                    Seen::BadGateway => assert_eq!((status, is_whole), (502, true), "{path}"),
                    Seen::Cut(part) => {
                        assert_eq!((status, is_whole), (200, false), "{path}: {body}");
                        assert!(part.starts_with(&body), "{path}: {body}");
                    }
                    Seen::Whole(text) => {
                        assert!(matches!(status, 200 | 204), "{path}: {status}");
                        assert_eq!((&*body, is_whole), (text, true), "{path}");
                    }
                }
                // What comes after it is never for someone else.
                let answer = ask(scene.http(), get("/hostile/hello")).await.unwrap();
                assert_eq!((answer.status, &*answer.body), (200, &b"hello"[..]), "after {path}");
            }
        }
        let refused = LIES.iter().filter(|lie| lie.seen == Seen::BadGateway).count() as u64 * 4;
        assert_eq!(scene.metric("HTTPCode_ELB_502_Count"), refused);
        assert_eq!(scene.metric("HTTPCode_ELB_5XX_Count"), refused);
    });
    let grown = scene.agent.memory().unwrap().saturating_sub(before) >> 20;
    assert!(grown < 32, "{grown} MiB");
    bystander.finish();
}

/// curl's word for a body that is cut, in both versions of HTTP.
#[test]
fn curl_sees_that_a_body_is_cut() {
    let scene = scene::start("");
    for (lie, version) in [
        ("half-a-body", "--http1.1"),
        ("no-last-chunk", "--http1.1"),
        ("no-chunk", "--http1.1"),
        ("half-a-body", "--http2"),
        ("no-last-chunk", "--http2"),
        ("half-a-body-and-a-reset", "--http2"),
    ] {
        let url = format!("https://{}/hostile/lie/{lie}", scene.name);
        let (code, text) = scene.try_curl(&[version, &url]);
        // Partial file; a stream of HTTP/2 that was reset; a receive failure.
        let expected: &[i32] = if version == "--http2" { &[92] } else { &[18, 56] };
        assert!(expected.contains(&code), "{lie} {version}: {code} {text}");
        assert!("hello".starts_with(&text), "{lie} {version}: {text}");
    }
}

#[test]
fn answers_without_end_end() {
    let scene = scene::start("idle_timeout = \"4s\"");
    let bystander = Bystander::start(&scene);
    let before = scene.agent.memory().unwrap();
    scene.client(async || {
        for path in ["/hostile/endless-fields", "/hostile/endless-continue"] {
            assert_eq!(ask(scene.http(), get(path)).await.unwrap().status, 502, "{path}");
        }
        let mut stalled = connect(scene.http()).await.unwrap();
        stalled.get_mut().write_all(get("/hostile/stall").as_bytes()).await.unwrap();
        assert_eq!(head(&mut stalled).await.unwrap().0, 200);
        assert!(is_closed(&mut stalled).await);
    });
    let grown = scene.agent.memory().unwrap().saturating_sub(before) >> 20;
    assert!(grown < 32, "{grown} MiB");
    let served = bystander.finish();
    assert!(served.slowest < Duration::from_secs(10), "{served:?}");
}
