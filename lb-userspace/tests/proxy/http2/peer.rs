//! A client that sends any bytes and tells every frame that comes back.

use std::fmt;
use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::wire::{self, flag, kind};
use crate::harness::LIMIT;

/// What comes from the other side.
#[derive(Clone, PartialEq, Eq)]
pub enum Event {
    Data {
        stream: u32,
        payload: Vec<u8>,
        ends: bool,
    },
    Headers {
        stream: u32,
        status: Option<u16>,
        ends: bool,
    },
    Reset {
        stream: u32,
        code: u32,
    },
    Settings(Vec<(u16, u32)>),
    SettingsAck,
    Pong([u8; 8]),
    Goaway {
        last: u32,
        code: u32,
    },
    WindowUpdate {
        stream: u32,
    },
    Other {
        kind: u8,
    },
    /// The connection ended, with so many bytes that are no frame.
    Closed(usize),
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = |ends: &bool| if *ends { " and its end" } else { "" };
        match self {
            Self::Data { stream, payload, ends } => {
                write!(f, "{} bytes of stream {stream}{}", payload.len(), end(ends))
            }
            Self::Headers { stream, status, ends } => {
                write!(f, "status {status:?} of stream {stream}{}", end(ends))
            }
            Self::Reset { stream, code } => write!(f, "RST_STREAM {stream} with code {code}"),
            Self::Settings(settings) => write!(f, "SETTINGS {settings:?}"),
            Self::SettingsAck => f.write_str("SETTINGS with ACK"),
            Self::Pong(payload) => write!(f, "PING with ACK {payload:?}"),
            Self::Goaway { last, code } => write!(f, "GOAWAY after {last} with code {code}"),
            Self::WindowUpdate { stream } => write!(f, "WINDOW_UPDATE of stream {stream}"),
            Self::Other { kind } => write!(f, "a frame of type {kind}"),
            Self::Closed(0) => f.write_str("end of the connection"),
            Self::Closed(bytes) => write!(f, "{bytes} other bytes, end of the connection"),
        }
    }
}

/// What must come. Codes are those of which any will do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// SETTINGS, before all else.
    Preface,
    /// GOAWAY with one of these codes, or the end of the connection.
    ConnectionError(&'static [u32]),
    /// RST_STREAM with one of these codes, or as for an error of the connection.
    StreamError(u32, &'static [u32]),
    /// The end of the connection.
    Closed,
    /// GOAWAY with this code.
    Goaway(u32),
    /// RST_STREAM with this code.
    Reset(u32, u32),
    /// An answer with this status.
    Status(u32, u16),
    /// The end of an answer.
    Ended(u32),
    /// So many bytes, in the next DATA frame of the stream.
    Data(u32, usize),
    SettingsAck,
    Pong([u8; 8]),
    /// The same, others first.
    LastPong([u8; 8]),
    /// No error: the connection goes on.
    Ignored,
}

enum Verdict {
    Met,
    Failed,
    Open,
}

impl Expect {
    fn judge(&self, event: &Event) -> Verdict {
        use Verdict::{Failed, Met, Open};
        let is = |met: bool| if met { Met } else { Failed };
        match (self, event) {
            (Self::Preface, event) => is(matches!(event, Event::Settings(_))),
            (Self::ConnectionError(codes), Event::Goaway { code, .. }) => is(codes.contains(code)),
            (Self::ConnectionError(_) | Self::StreamError(..) | Self::Closed, Event::Closed(_)) => {
                Met
            }
            (Self::ConnectionError(_), Event::Reset { .. }) => Failed,
            (Self::StreamError(_, codes), Event::Goaway { code, .. }) => is(codes.contains(code)),
            (Self::StreamError(expected, codes), Event::Reset { stream, code }) => {
                is(stream == expected && codes.contains(code))
            }
            (Self::Closed, _) => Open,
            (Self::Goaway(expected), Event::Goaway { code, .. }) => is(code == expected),
            (Self::Goaway(_), Event::Closed(_)) => Failed,
            (Self::Goaway(_), _) => Open,
            (Self::Reset(expected, code), Event::Reset { stream, code: it }) => {
                is(stream == expected && it == code)
            }
            (Self::Status(expected, code), Event::Headers { stream, status, .. })
                if stream == expected =>
            {
                is(*status == Some(*code))
            }
            (Self::Ended(expected), Event::Reset { stream, .. }) if stream == expected => Met,
            (
                Self::Ended(expected),
                Event::Data { stream, ends: true, .. } | Event::Headers { stream, ends: true, .. },
            ) if stream == expected => Met,
            (Self::Data(expected, length), Event::Data { stream, payload, .. })
                if stream == expected =>
            {
                is(payload.len() == *length)
            }
            (Self::SettingsAck, Event::SettingsAck) => Met,
            (Self::Pong(expected), Event::Pong(payload)) => is(payload == expected),
            (Self::LastPong(expected), Event::Pong(payload)) if payload == expected => Met,
            (_, Event::Closed(_)) => Failed,
            (Self::ConnectionError(_) | Self::StreamError(..), _) => Open,
            (_, Event::Reset { .. } | Event::Goaway { .. }) => Failed,
            _ => Open,
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

pub struct Peer {
    stream: Box<dyn Stream>,
    unread: Vec<u8>,
    log: Vec<Event>,
    pings: u64,
}

impl Peer {
    /// Over a connection on which nothing was sent.
    pub fn over(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        Self { stream: Box::new(stream), unread: Vec::new(), log: Vec::new(), pings: 0 }
    }

    /// A connection that both sides have begun, without TLS.
    pub async fn connect(address: SocketAddr, settings: &[(u16, u32)]) -> Self {
        let mut peer = Self::over(TcpStream::connect(address).await.unwrap());
        peer.handshake(settings).await.unwrap();
        peer
    }

    /// Begins, and waits until the other side knows our settings. Tells its own.
    ///
    /// # Errors
    /// If something else comes.
    pub async fn handshake(&mut self, settings: &[(u16, u32)]) -> Result<Vec<(u16, u32)>, String> {
        self.send([wire::PREFACE, &wire::settings(settings)].concat()).await;
        self.expect(&Expect::Preface).await?;
        let Some(Event::Settings(theirs)) = self.log.first().cloned() else {
            return Err(format!("no settings: {:?}", self.log));
        };
        self.send(wire::settings_ack()).await;
        self.expect(&Expect::SettingsAck).await?;
        self.log.clear();
        Ok(theirs)
    }

    /// Writes, unless the other side has closed: then that is what comes back.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = timeout(LIMIT, self.stream.write_all(bytes.as_ref())).await.expect("blocked");
        let _ = self.stream.flush().await;
    }

    /// The next frame, or the end.
    pub async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.take_frame() {
                self.log.push(event.clone());
                return event;
            }
            let read = self.stream.read_buf(&mut self.unread).await;
            if read.map_or(true, |read| read == 0) {
                let event = Event::Closed(self.unread.len());
                self.log.push(event.clone());
                return event;
            }
        }
    }

    fn take_frame(&mut self) -> Option<Event> {
        let header = self.unread.get(..9)?;
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
        let (kind, flags) = (header[3], header[4]);
        let stream = word(&header[5..]) & wire::MAX_WINDOW;
        let payload = self.unread.get(9..9 + length)?.to_vec();
        self.unread.drain(..9 + length);
        let is_ack = flags & flag::ACK != 0;
        let ends = flags & flag::END_STREAM != 0;
        Some(match kind {
            kind::DATA => Event::Data { stream, payload, ends },
            kind::HEADERS => Event::Headers { stream, status: wire::status(&payload), ends },
            kind::RST_STREAM => Event::Reset { stream, code: word(&payload) },
            kind::SETTINGS if is_ack => Event::SettingsAck,
            kind::SETTINGS => {
                let setting = |it: &[u8]| (u16::from_be_bytes([it[0], it[1]]), word(&it[2..]));
                Event::Settings(payload.chunks_exact(6).map(setting).collect())
            }
            kind::PING if is_ack => Event::Pong(payload.try_into().unwrap()),
            kind::GOAWAY => Event::Goaway { last: word(&payload), code: word(&payload[4..]) },
            kind::WINDOW_UPDATE => Event::WindowUpdate { stream },
            kind => Event::Other { kind },
        })
    }

    /// Reads until that has come.
    ///
    /// # Errors
    /// What came instead.
    pub async fn expect(&mut self, expect: &Expect) -> Result<(), String> {
        if *expect == Expect::Ignored {
            // Frames are taken in turn, and what the first PING found to be sent has been sent when
            // the second is answered.
            for _ in 0..2 {
                self.pings += 1;
                let payload = self.pings.to_be_bytes();
                self.send(wire::ping(&payload)).await;
                Box::pin(self.expect(&Expect::LastPong(payload))).await?;
            }
            return Ok(());
        }
        let met = timeout(LIMIT, async {
            loop {
                match expect.judge(&self.next().await) {
                    Verdict::Met => return true,
                    Verdict::Failed => return false,
                    Verdict::Open => {}
                }
            }
        });
        match met.await {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!("{:?} came, not {expect:?}", self.log)),
            Err(_) => Err(format!("{:?} came, and nothing else, not {expect:?}", self.log)),
        }
    }

    /// The body of a stream's answer, to its end.
    pub async fn body(&mut self, of: u32) -> String {
        let mut body = Vec::new();
        loop {
            match timeout(LIMIT, self.next()).await.unwrap() {
                Event::Data { stream, payload, ends } if stream == of => {
                    body.extend(payload);
                    if ends {
                        return String::from_utf8(body).unwrap();
                    }
                }
                Event::Reset { .. } | Event::Goaway { .. } | Event::Closed(_) => {
                    panic!("no body: {:?}", self.log)
                }
                _ => {}
            }
        }
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}
