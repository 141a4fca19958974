//! A client of HTTP/2 that writes whatever it is told to, in literals without indexing or
//! Huffman's code.

use std::net::{IpAddr, SocketAddr};

use crate::traffic::Client;
use crate::wire::{self, PREFACE, block, data, flag, frame, headers, kind};

/// What a client is told about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    Status(u16),
    /// The stream alone ends, with an error.
    Reset,
    /// The connection ends.
    End,
}

/// A connection, of one request at a time.
pub struct Stream {
    pub address: IpAddr,
    client: Client,
    next: u32,
}

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

type Field = (Vec<u8>, Vec<u8>);

impl Stream {
    pub async fn connect(to: SocketAddr) -> Self {
        let mut client = Client::connect(to).await;
        client.send(&[PREFACE, &frame(kind::SETTINGS, 0, 0, [])].concat()).await;
        Self { address: client.address, client, next: 1 }
    }

    /// Sends a request; waits for the end of its answer. A reset that tells that the rest of the
    /// request is not wanted (RFC 9113 section 8.1) comes behind the answer, and does not count.
    pub async fn ask(
        &mut self,
        fields: &[Field],
        content: Option<&[u8]>,
        trailers: &[Field],
    ) -> Told {
        let stream = self.next;
        self.next += 2;
        let ends = |is_last: bool| if is_last { flag::END_STREAM } else { 0 };
        let flags = flag::END_HEADERS | ends(content.is_none());
        let mut bytes = headers(stream, flags, block(fields));
        if let Some(content) = content {
            bytes.extend(data(stream, ends(trailers.is_empty()), content));
        }
        if !trailers.is_empty() {
            bytes.extend(headers(stream, flag::WHOLE, block(trailers)));
        }
        self.client.send(&bytes).await;
        self.told(stream).await
    }

    async fn told(&mut self, stream: u32) -> Told {
        let mut status = None;
        while let Some(frame) = self.read().await {
            match frame.kind {
                kind::SETTINGS if frame.flags & flag::ACK == 0 => {
                    self.client.send(&wire::settings_ack()).await;
                }
                kind::GOAWAY => return Told::End,
                kind::RST_STREAM if frame.stream == stream => {
                    return status.map_or(Told::Reset, Told::Status);
                }
                kind::HEADERS | kind::DATA if frame.stream == stream => {
                    if frame.kind == kind::HEADERS {
                        status = status.or(Some(wire::status(&frame.payload).unwrap_or(0)));
                    }
                    if let (Some(status), true) = (status, frame.flags & flag::END_STREAM != 0) {
                        return Told::Status(status);
                    }
                }
                _ => {}
            }
        }
        Told::End
    }

    async fn read(&mut self) -> Option<Frame> {
        loop {
            let unread = self.client.unread();
            if let [a, b, c, kind, flags, s0, s1, s2, s3, rest @ ..] = &unread[..] {
                let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
                if rest.len() >= length {
                    let frame = Frame {
                        kind: *kind,
                        flags: *flags,
                        stream: u32::from_be_bytes([*s0, *s1, *s2, *s3]),
                        payload: rest[..length].to_vec(),
                    };
                    unread.drain(..9 + length);
                    return Some(frame);
                }
            }
            if self.client.more().await != Some(true) {
                return None;
            }
        }
    }
}
