//! A server that does what its path says.
//!
//! | path after `/hostile/` | what happens |
//! |---|---|
//! | `bytes/N` | N bytes of [`pattern`], as fast as they are taken |
//! | `take` | the request's body is read; the answer says how many bytes it had, and whether they were [`pattern`] |

use std::{io, sync::LazyLock};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
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
pub async fn write_pattern(
    stream: &mut (impl tokio::io::AsyncWrite + Unpin),
    length: u64,
) -> io::Result<()> {
    let mut at = 0;
    while at < length {
        let most = usize::try_from(length - at).map_or(PIECE, |left| left.min(PIECE));
        at += stream.write(&pattern(at)[..most]).await? as u64;
    }
    Ok(())
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
