//! A client of HTTP/2 that writes whatever it is told to: RFC 9113 and, of RFC 7541, literals
//! without indexing or Huffman's code.

use std::net::{IpAddr, SocketAddr};

use crate::traffic::Client;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

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
        client.send(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await;
        Self { address: client.address, client, next: 1 }
    }

    /// Sends a request; waits for the end of its answer. A reset that tells that the rest of the
    /// request is not wanted (RFC 9113 section 8.1) comes behind the answer, and does not count.
    pub async fn ask(&mut self, fields: &[Field], data: Option<&[u8]>, trailers: &[Field]) -> Told {
        let stream = self.next;
        self.next += 2;
        let ends = |is_last: bool| if is_last { END_STREAM } else { 0 };
        let flags = END_HEADERS | ends(data.is_none());
        let mut bytes = frame(HEADERS, flags, stream, &block(fields));
        if let Some(data) = data {
            bytes.extend(frame(DATA, ends(trailers.is_empty()), stream, data));
        }
        if !trailers.is_empty() {
            bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, stream, &block(trailers)));
        }
        self.client.send(&bytes).await;
        self.told(stream).await
    }

    async fn told(&mut self, stream: u32) -> Told {
        let mut status = None;
        while let Some(frame) = self.read().await {
            match frame.kind {
                SETTINGS if frame.flags & ACK == 0 => {
                    self.client.send(&self::frame(SETTINGS, ACK, 0, &[])).await;
                }
                GOAWAY => return Told::End,
                RST_STREAM if frame.stream == stream => {
                    return status.map_or(Told::Reset, Told::Status);
                }
                HEADERS | DATA if frame.stream == stream => {
                    if frame.kind == HEADERS {
                        status = status.or(Some(status_of(&frame.payload)));
                    }
                    if let (Some(status), true) = (status, frame.flags & END_STREAM != 0) {
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

/// RFC 9113 section 4.1.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// RFC 7541 section 6.2.2.
fn block(fields: &[Field]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            string_length(text.len(), &mut block);
            block.extend(text);
        }
    }
    block
}

/// RFC 7541 section 5.1, with a prefix of seven bits.
fn string_length(length: usize, block: &mut Vec<u8>) {
    let Some(mut rest) = length.checked_sub(127) else {
        return block.push(u8::try_from(length).unwrap());
    };
    block.push(127);
    while rest >= 128 {
        block.push(128 | (rest % 128) as u8);
        rest /= 128;
    }
    block.push(rest as u8);
}

/// The status that a block of fields begins with, in the first answers of a connection: RFC 7541
/// appendix A, or a literal, which is three digits or as many codes of appendix B.
fn status_of(block: &[u8]) -> u16 {
    const STATIC: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
    match block {
        [index @ 0x88..=0x8e, ..] => STATIC[usize::from(index - 0x88)],
        [0x08 | 0x18 | 0x48, 3, digits @ ..] => {
            String::from_utf8_lossy(&digits[..3]).parse().unwrap_or(0)
        }
        [0x08 | 0x18 | 0x48, length @ 0x80..=0xff, code @ ..] => {
            digits(&code[..usize::from(length - 0x80)])
        }
        _ => 0,
    }
}

/// Three digits in Huffman's code: 0 to 2 have five bits, from 00000 on, 3 to 9 six, from 011001 on.
fn digits(code: &[u8]) -> u16 {
    let bits = code.iter().flat_map(|byte| (0..8).rev().map(move |bit| u16::from(byte >> bit & 1)));
    let bits: Vec<u16> = bits.collect();
    let mut at = 0;
    let mut take = |count: usize| {
        let taken = bits[at..].iter().take(count).fold(0, |value, bit| value << 1 | bit);
        at += count;
        taken
    };
    (0..3).fold(0, |number, _| {
        let five = take(5);
        number * 10 + if five <= 2 { five } else { (five << 1 | take(1)) - 0b01_1001 + 3 }
    })
}

#[test]
fn statuses() {
    assert_eq!(status_of(&[0x8c, 1, 2]), 400);
    assert_eq!(status_of(b"\x48\x03405"), 405);
    // 405 and 464 in Huffman's code: 011010 00000 011011, and 011010 011100 011010.
    assert_eq!(status_of(&[0x48, 0x83, 0b0110_1000, 0b0000_1101, 0b1111_1111]), 405);
    assert_eq!(status_of(&[0x48, 0x83, 0b0110_1001, 0b1100_0110, 0b1011_1111]), 464);
}
