//! Long transfers: connections that carry known bytes at a limited rate, one way, until they are
//! told to end, so that something can happen to them meanwhile.
//!
//! The client says which way, the server answers with its number. Then one of them sends; the other
//! checks every byte. A download ends when the client has closed its half and the server then
//! closes too; an upload when the server, having seen the end, has told how many bytes it got.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    runtime::{self, Runtime},
    sync::watch,
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{clients, netns::Namespace, servers::body};

/// What a sender sends at once, bytes: a few segments. A multiple of the period of [`body`].
const CHUNK: usize = 251 * 16;
/// Between two chunks: 80 kB/s.
const PAUSE: Duration = Duration::from_millis(50);
/// How long nothing may arrive before a transfer counts as broken. TCP retransmits a few times in
/// it.
const STALL: Duration = Duration::from_secs(8);

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Direction {
    /// To the client.
    Download = b'D',
    /// To the server.
    Upload = b'U',
}

/// What became of a transfer.
#[derive(Debug)]
pub struct Outcome {
    /// The client's address and port.
    pub source: SocketAddr,
    /// The number of the server that took it.
    pub target: u8,
    /// Bytes that arrived and were right.
    pub bytes: u64,
    /// Whether all that was sent arrived, and the end too.
    pub result: Result<()>,
}

/// A client with many transfers at once.
#[derive(Debug)]
pub struct Transfers {
    runtime: Runtime,
    running: watch::Sender<bool>,
    transfers: Vec<Transfer>,
}

#[derive(Debug)]
struct Transfer {
    source: SocketAddr,
    target: u8,
    arrived: Arc<AtomicU64>,
    task: JoinHandle<Result<()>>,
}

impl Transfers {
    /// Without any yet; they will begin in `client`.
    ///
    /// # Errors
    ///
    /// If no thread can be started.
    pub fn new(client: &Namespace) -> Result<Self> {
        // The worker is started here, so it is inside the namespace.
        let build = || runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        Ok(Self {
            runtime: client.run(build)?,
            running: watch::Sender::new(true),
            transfers: Vec::new(),
        })
    }

    /// Begins transfers in this direction from these addresses to `server`.
    ///
    /// # Errors
    ///
    /// If one does not begin.
    pub fn open(
        &mut self,
        direction: Direction,
        sources: impl IntoIterator<Item = SocketAddr>,
        server: impl Fn(SocketAddr) -> SocketAddr,
    ) -> Result<()> {
        let begin = |source| (source, self.runtime.spawn(begin(source, server(source), direction)));
        let opened: Vec<_> = sources.into_iter().map(begin).collect();
        for (source, begun) in opened {
            let (stream, target) = self
                .runtime
                .block_on(begun)?
                .with_context(|| format!("begin {direction:?} from {source}"))?;
            let arrived = Arc::default();
            let task = carry(stream, direction, self.running.subscribe(), Arc::clone(&arrived));
            let task = self.runtime.spawn(task);
            self.transfers.push(Transfer { source, target, arrived, task });
        }
        Ok(())
    }

    /// Ends all transfers in order, and says what became of them.
    pub fn finish(self) -> Vec<Outcome> {
        self.running.send_replace(false);
        let outcome = |Transfer { source, target, arrived, task }| {
            let result = self.runtime.block_on(task).expect("a transfer does not panic");
            Outcome { source, target, bytes: arrived.load(Relaxed), result }
        };
        self.transfers.into_iter().map(outcome).collect()
    }
}

/// The number of the server that takes a connection from `source`, which is reset at once: its port
/// can be used again. Call it inside [`Namespace::run`].
///
/// # Errors
///
/// If nobody takes it.
pub fn probe(source: SocketAddr, server: SocketAddr) -> Result<u8> {
    use std::io::{Read as _, Write as _};
    let mut stream = clients::connect(Some(source), server)?;
    stream.write_all(&[Direction::Download as u8])?;
    let mut number = [0];
    stream.read_exact(&mut number)?;
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    Ok(number[0])
}

async fn begin(
    source: SocketAddr,
    server: SocketAddr,
    direction: Direction,
) -> Result<(TcpStream, u8)> {
    let socket = if source.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(source)?;
    let greeted = async {
        let mut stream = socket.connect(server).await?;
        stream.write_u8(direction as u8).await?;
        let number = stream.read_u8().await?;
        Ok((stream, number))
    };
    timeout(STALL, greeted).await?
}

/// The client's part, after the greeting.
async fn carry(
    mut stream: TcpStream,
    direction: Direction,
    mut running: watch::Receiver<bool>,
    arrived: Arc<AtomicU64>,
) -> Result<()> {
    let (mut reader, mut writer) = stream.split();
    // The sender goes with the runtime at the latest.
    let ended = async { drop(running.wait_for(|running| !running).await) };
    match direction {
        Direction::Download => {
            let received = receive(&mut reader, Some(STALL), &arrived);
            tokio::pin!(received);
            tokio::select! {
                early = &mut received => {
                    early?;
                    bail!("the server ended early");
                }
                () = ended => {}
            }
            writer.shutdown().await.context("end a download")?;
            received.await
        }
        Direction::Upload => {
            let sent = tokio::select! {
                sent = send(&mut writer, ended) => sent.context("upload")?,
                early = reader.read_u64() => bail!("the server ended early: {early:?}"),
            };
            writer.shutdown().await.context("end an upload")?;
            let received = timeout(STALL, reader.read_u64()).await.context("stalled upload")?;
            let received = received.context("what the server got")?;
            arrived.store(received, Relaxed);
            ensure!(received == sent, "{received} of {sent} bytes arrived");
            Ok(())
        }
    }
}

/// The server's part.
pub(crate) async fn serve(stream: &mut TcpStream, number: u8) -> Result<()> {
    let direction = stream.read_u8().await?;
    stream.write_u8(number).await?;
    let (mut reader, mut writer) = stream.split();
    if direction == Direction::Download as u8 {
        let ended = async { drop(reader.read_u8().await) };
        send(&mut writer, ended).await?;
    } else {
        let arrived = AtomicU64::new(0);
        receive(&mut reader, None, &arrived).await?;
        writer.write_u64(arrived.into_inner()).await?;
    }
    Ok(writer.shutdown().await?)
}

/// Sends chunk after chunk until `ended`, and returns how many bytes that were.
async fn send(
    writer: &mut (impl AsyncWrite + Unpin),
    ended: impl Future<Output = ()>,
) -> io::Result<u64> {
    let mut clock = interval(PAUSE);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let chunk = body(CHUNK);
    let mut sent = 0;
    tokio::pin!(ended);
    loop {
        tokio::select! {
            () = &mut ended => return Ok(sent),
            _ = clock.tick() => {}
        }
        timeout(STALL, writer.write_all(&chunk)).await??;
        sent += CHUNK as u64;
    }
}

/// Reads to the end and checks every byte; `arrived` counts them.
async fn receive(
    reader: &mut (impl AsyncRead + Unpin),
    patience: Option<Duration>,
    arrived: &AtomicU64,
) -> Result<()> {
    let expected = body(251 + CHUNK);
    let mut buffer = vec![0; CHUNK];
    let mut position = 0;
    loop {
        let read = reader.read(&mut buffer);
        let length = match patience {
            Some(patience) => timeout(patience, read).await.context("stalled")?,
            None => read.await,
        }?;
        if length == 0 {
            return Ok(());
        }
        let phase = position % 251;
        ensure!(buffer[..length] == expected[phase..phase + length], "byte {position} or later");
        position += length;
        arrived.store(position as u64, Relaxed);
    }
}
