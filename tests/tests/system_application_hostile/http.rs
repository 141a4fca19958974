//! As much of HTTP/1.1 as a client needs that keeps no rules.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    time::timeout,
};

/// No step takes longer, on a machine that is busy with other tests.
pub const LIMIT: Duration = Duration::from_secs(20);

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

/// A connection to the load balancer.
pub type Connection = BufReader<TcpStream>;

/// Opens a connection.
pub async fn connect(at: SocketAddr) -> io::Result<Connection> {
    let stream = timeout(LIMIT, TcpStream::connect(at)).await??;
    stream.set_nodelay(true)?;
    Ok(BufReader::with_capacity(1024, stream))
}

/// The head of a request without a body.
pub fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: site.test\r\n\r\n")
}

/// The head of a request with a body of so many bytes.
pub fn post(path: &str, length: u64) -> String {
    format!("POST {path} HTTP/1.1\r\nHost: site.test\r\nContent-Length: {length}\r\n\r\n")
}

/// Sends bytes and reads one answer.
pub async fn exchange(connection: &mut Connection, request: &[u8]) -> io::Result<Answer> {
    timeout(LIMIT, connection.get_mut().write_all(request)).await??;
    timeout(LIMIT, answer(connection)).await?
}

/// Sends bytes over a new connection and reads one answer.
pub async fn ask(at: SocketAddr, request: impl AsRef<[u8]>) -> io::Result<Answer> {
    exchange(&mut connect(at).await?, request.as_ref()).await
}

/// Reads an answer's status and head.
pub async fn head(stream: &mut (impl AsyncBufRead + Unpin)) -> io::Result<(u16, String)> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await? == 0 {
            let text = format!("closed after {head:?}");
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        }
    }
    let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(format!("not HTTP: {head:?}")))?;
    Ok((status, head))
}

/// A field's value; its name in lower case.
pub fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let lines = head.lines().filter_map(|line| line.split_once(':'));
    lines.filter(|(it, _)| it.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).next()
}

/// Reads an answer with its body. One that is cut short is an error.
pub async fn answer(stream: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Answer> {
    let (status, head) = head(stream).await?;
    let mut body = Vec::new();
    if let Some(length) = field(&head, "content-length") {
        body.resize(length.parse().map_err(io::Error::other)?, 0);
        stream.read_exact(&mut body).await?;
    } else if field(&head, "transfer-encoding") == Some("chunked") {
        loop {
            let mut size = String::new();
            stream.read_line(&mut size).await?;
            let size = usize::from_str_radix(size.trim(), 16)
                .map_err(|_| io::Error::from(io::ErrorKind::UnexpectedEof))?;
            let mut chunk = vec![0; size + 2];
            stream.read_exact(&mut chunk).await?;
            body.extend(&chunk[..size]);
            if size == 0 {
                break;
            }
        }
    }
    Ok(Answer { status, body })
}

/// Whether the other side ends the connection within the limit, whatever it says before.
pub async fn is_closed(connection: &mut Connection) -> bool {
    let rest = async {
        let mut rest = [0; 4096];
        while connection.read(&mut rest).await.is_ok_and(|n| n > 0) {}
    };
    timeout(LIMIT, rest).await.is_ok()
}
