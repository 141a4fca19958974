//! Clients. Each works in the network of the calling thread: call it inside
//! [`Namespace::run`](crate::netns::Namespace::run).

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use crate::servers::body;

/// How long a client waits for anything.
pub const TIMEOUT: Duration = Duration::from_secs(3);

/// Opens a TCP connection, from `source` if given (port 0: any).
///
/// # Errors
///
/// If it is refused, or not accepted within [`TIMEOUT`].
pub fn connect(source: Option<SocketAddr>, destination: SocketAddr) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(destination), Type::STREAM, None)?;
    if let Some(source) = source {
        socket.set_reuse_address(true)?;
        socket.bind(&source.into()).with_context(|| format!("bind to {source}"))?;
    }
    socket.connect_timeout(&destination.into(), TIMEOUT)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Sends `message` over a connection to an echo server and checks what comes back.
///
/// # Errors
///
/// If the connection fails or the answer differs.
pub fn echo(mut stream: &TcpStream, message: &[u8]) -> Result<()> {
    stream.write_all(message)?;
    let mut answer = vec![0; message.len()];
    stream.read_exact(&mut answer)?;
    ensure!(answer == message, "the echo differs");
    Ok(())
}

/// Sends `length` bytes to an echo server while reading them back, and compares.
///
/// # Errors
///
/// If the connection fails or a byte differs.
pub fn transfer(stream: &TcpStream, length: usize) -> Result<()> {
    let sent = body(length);
    let received = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut stream = stream;
            stream.write_all(&sent)?;
            stream.shutdown(Shutdown::Write)
        });
        let mut received = Vec::with_capacity(length);
        let mut reader = stream;
        reader.read_to_end(&mut received)?;
        sender.join().expect("the sender does not panic")?;
        anyhow::Ok(received)
    })?;
    let differs = sent.iter().zip(&received).position(|(a, b)| a != b);
    ensure!(differs.is_none(), "byte {differs:?} differs");
    ensure!(received.len() == length, "{} of {length} bytes came back", received.len());
    Ok(())
}

/// The answer of a web server.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HttpResponse {
    /// Such as 200.
    pub status: u16,
    /// The body.
    pub body: Vec<u8>,
}

impl HttpResponse {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// GET `path` over a new connection, from `source` if given.
///
/// # Errors
///
/// If the connection fails, the answer is cut short or is not HTTP.
pub fn http_get(
    source: Option<SocketAddr>,
    server: SocketAddr,
    path: &str,
) -> Result<HttpResponse> {
    http(source, server, "GET", path, &[])
}

/// POST `body` to `/` over a new connection.
///
/// # Errors
///
/// As [`http_get`].
pub fn http_post(server: SocketAddr, body: &[u8]) -> Result<HttpResponse> {
    http(None, server, "POST", "/", body)
}

fn http(
    source: Option<SocketAddr>,
    server: SocketAddr,
    method: &str,
    path: &str,
    body: &[u8],
) -> Result<HttpResponse> {
    let mut stream = connect(source, server)?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: {server}\r\nconnection: close\r\n\
         content-length: {length}\r\n\r\n"
    )?;
    stream.write_all(body)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    parse_http(&answer)
        .with_context(|| format!("not an HTTP answer: {:?}", String::from_utf8_lossy(&answer)))
}

fn parse_http(answer: &[u8]) -> Option<HttpResponse> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let mut lines = head.lines();
    let status = lines.next()?.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    let length = lines.find_map(|line| line.strip_prefix("content-length: "))?;
    let body = answer[end + 4..].to_vec();
    (length.parse() == Ok(body.len())).then_some(HttpResponse { status, body })
}

/// Sends a datagram, from `source` if given (port 0: any), and returns the answer to it.
///
/// # Errors
///
/// If it is refused, or nothing comes within `timeout`.
pub fn udp_ping(
    source: Option<SocketAddr>,
    destination: SocketAddr,
    payload: &[u8],
    timeout: Duration,
) -> Result<Vec<u8>> {
    let any: IpAddr = match destination {
        SocketAddr::V4(_) => [0; 4].into(),
        SocketAddr::V6(_) => [0; 16].into(),
    };
    let socket = UdpSocket::bind(source.unwrap_or((any, 0).into()))?;
    socket.set_read_timeout(Some(timeout))?;
    // A connected socket takes answers from `destination` only.
    socket.connect(destination)?;
    socket.send(payload)?;
    let mut answer = vec![0; 64 * 1024];
    let length = socket.recv(&mut answer)?;
    answer.truncate(length);
    Ok(answer)
}

/// Sends an ICMP echo request and waits for its reply.
///
/// # Errors
///
/// If the address is unreachable, or nothing comes within [`TIMEOUT`].
pub fn ping(destination: IpAddr) -> Result<()> {
    const SEQUENCE: u8 = 7;
    let (protocol, request, reply) = match destination {
        IpAddr::V4(_) => (Protocol::ICMPV4, 8, 0),
        IpAddr::V6(_) => (Protocol::ICMPV6, 128, 129),
    };
    let destination = SocketAddr::new(destination, 0);
    let mut socket = Socket::new(Domain::for_address(destination), Type::DGRAM, Some(protocol))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.connect(&destination.into())?;
    // The kernel fills in the checksum and the identifier.
    socket.send(&[request, 0, 0, 0, 0, 0, 0, SEQUENCE])?;
    let mut answer = [0; 64];
    let length = socket.read(&mut answer)?;
    match answer[..length] {
        [kind, 0, _, _, _, _, 0, SEQUENCE, ..] if kind == reply => Ok(()),
        _ => bail!("answer to an ICMP echo request: {:?}", &answer[..length]),
    }
}
