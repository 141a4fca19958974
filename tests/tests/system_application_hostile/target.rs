//! A server that does what its path says.
//!
//! | path after `/hostile/` | what happens |
//! |---|---|
//! | `bytes/N` | N bytes of [`pattern`], as fast as they are taken |
//! | `lie/NAME` | the lie of that name in [`LIES`], and then what it says about the connection |
//! | `endless-fields` | a head that never ends, as fast as it is taken |
//! | `endless-continue` | answers of 100, and never a last one |
//! | `silence` | nothing |
//! | `stall` | half of a body, and then nothing |
//! | `take` | the request's body is read; the answer says how many bytes it had, and whether they were [`pattern`] |

use std::{io, ops::Not as _, sync::LazyLock};

use tokio::{
    io::{
        AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _,
        BufReader,
    },
    net::TcpStream,
};

use crate::http::field;

/// Bytes at a time.
const PIECE: usize = 251 * 512;

/// Bytes that repeat after 251, a prime; from `offset` on, at least [`PIECE`] of them.
pub fn pattern(offset: u64) -> &'static [u8] {
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| lb_tests::servers::body(PIECE + 251));
    &BYTES[(offset % 251) as usize..][..PIECE]
}

/// Reads so many bytes; whether they are those of [`pattern`].
pub async fn is_pattern(stream: &mut (impl AsyncRead + Unpin), length: u64) -> io::Result<bool> {
    let (mut at, mut buffer, mut is_same) = (0, vec![0; PIECE], true);
    while at < length {
        let most = usize::try_from(length - at).map_or(PIECE, |left| left.min(PIECE));
        let n = stream.read(&mut buffer[..most]).await?;
        if n == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("after {at} bytes")));
        }
        is_same &= buffer[..n] == pattern(at)[..n];
        at += n as u64;
    }
    Ok(is_same)
}

/// Writes so many bytes of [`pattern`].
pub async fn write_pattern(stream: &mut (impl AsyncWrite + Unpin), length: u64) -> io::Result<()> {
    let mut at = 0;
    while at < length {
        let most = usize::try_from(length - at).map_or(PIECE, |left| left.min(PIECE));
        at += stream.write(&pattern(at)[..most]).await? as u64;
    }
    Ok(())
}

/// What a connection does after an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum After {
    Close,
    Reset,
    Stay,
}

/// What a client should see of a lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Seen {
    /// The load balancer's own answer.
    BadGateway,
    /// An answer that is cut after these bytes of its body.
    Cut(&'static str),
    /// This answer, and nothing of what follows it.
    Whole(&'static str),
}

/// An answer that is none.
pub struct Lie {
    pub name: &'static str,
    bytes: fn() -> String,
    after: After,
    pub seen: Seen,
}

const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
const TEN: &str = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello";

macro_rules! lies {
    ($($name:literal: $bytes:expr, $after:ident => $seen:expr;)*) => {
        /// All of them.
        pub const LIES: &[Lie] = &[$(Lie {
            name: $name, bytes: || $bytes.into(), after: After::$after, seen: $seen,
        },)*];
    };
}

lies! {
    "garbage": "\0\u{1}\u{2} no HTTP at all\r\n\r\n", Stay => Seen::BadGateway;
    "another-protocol": "220 mail.test ESMTP\r\n", Stay => Seen::BadGateway;
    "another-version": "HTTP/9.9 200 OK\r\n\r\n", Stay => Seen::BadGateway;
    "no-status": "HTTP/1.1 OK\r\nContent-Length: 0\r\n\r\n", Stay => Seen::BadGateway;
    "two-lengths": "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        Stay => Seen::BadGateway;
    "negative-length": "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", Stay => Seen::BadGateway;
    "a-large-field": format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(100_000)),
        Stay => Seen::BadGateway;
    "ten-thousand-fields": format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: y\r\n".repeat(10_000)),
        Stay => Seen::BadGateway;
    "nothing": "", Close => Seen::BadGateway;
    "nothing-and-a-reset": "", Reset => Seen::BadGateway;
    "half-a-head": "HTTP/1.1 200 OK\r\nContent-", Close => Seen::BadGateway;
    "an-upgrade-nobody-wanted":
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        Stay => Seen::BadGateway;
    "half-a-body": TEN, Close => Seen::Cut("hello");
    "half-a-body-and-a-reset": TEN, Reset => Seen::Cut("hello");
    "no-last-chunk": CHUNKED, Close => Seen::Cut("hello");
    "half-a-chunk": format!("{CHUNKED}5\r\nhe"), Close => Seen::Cut("hellohe");
    "no-chunk": format!("{CHUNKED}zz\r\nhello\r\n0\r\n\r\n"), Stay => Seen::Cut("hello");
    "a-chunk-that-is-too-long": format!("{CHUNKED}2\r\nhello\r\n0\r\n\r\n"),
        Stay => Seen::Cut("hellohe");
    "a-huge-chunk": format!("{CHUNKED}fffffffffffffffff\r\n"), Stay => Seen::Cut("hello");
    "more-than-an-answer":
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello\
         HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged",
        Stay => Seen::Whole("hello");
    "a-body-where-none-may-be":
        "HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged",
        Stay => Seen::Whole("");
}

/// Serves a connection.
pub async fn serve(stream: TcpStream) {
    let mut stream = BufReader::with_capacity(64 * 1024, stream);
    // Whoever goes away early is what these tests are about.
    while let Ok(true) = serve_one(&mut stream).await {}
}

/// Whether another request may follow.
async fn serve_one(stream: &mut BufReader<TcpStream>) -> io::Result<bool> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await? == 0 {
            return Ok(false);
        }
    }
    let path = head.split(' ').nth(1).unwrap_or_default();
    let what = path.strip_prefix("/hostile/").unwrap_or_default();
    if let Some(length) = what.strip_prefix("bytes/").and_then(|it| it.parse().ok()) {
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
        stream.get_mut().write_all(answer.as_bytes()).await?;
        write_pattern(stream.get_mut(), length).await?;
    } else if let Some(lie) = what.strip_prefix("lie/") {
        let lie = LIES.iter().find(|it| it.name == lie).ok_or(io::ErrorKind::NotFound)?;
        stream.get_mut().write_all((lie.bytes)().as_bytes()).await?;
        if lie.after == After::Reset {
            stream.get_ref().set_zero_linger()?;
        }
        return Ok(lie.after == After::Stay);
    } else if what == "endless-fields" {
        stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\n").await?;
        loop {
            stream.get_mut().write_all(b"X-More: and more\r\n").await?;
        }
    } else if what == "endless-continue" {
        loop {
            stream.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
    } else if what == "silence" || what == "stall" {
        if what == "stall" {
            stream.get_mut().write_all(TEN.as_bytes()).await?;
        }
        // Until the other side gives up.
        while stream.fill_buf().await?.is_empty().not() {
            stream.consume(stream.buffer().len());
        }
        return Ok(false);
    } else if what == "take" {
        let length = field(&head, "content-length").and_then(|it| it.parse().ok()).unwrap_or(0);
        let is_same = is_pattern(stream, length).await?;
        let text = format!("{length} {is_same}");
        say(stream, &text).await?;
    } else {
        say(stream, "hello").await?;
    }
    Ok(true)
}

async fn say(stream: &mut BufReader<TcpStream>, text: &str) -> io::Result<()> {
    let length = text.len();
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{text}");
    stream.get_mut().write_all(answer.as_bytes()).await
}
