//! Frames of HTTP/2 (RFC 9113) and representations of HPACK (RFC 7541), byte by byte: what no
//! library would write must be written, too.

/// Types of frames, RFC 9113 section 6.
pub mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PUSH_PROMISE: u8 = 5;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
    /// One that nothing defines.
    pub const UNKNOWN: u8 = 0xfa;
}

/// Flags of frames, RFC 9113 section 6.
pub mod flag {
    pub const ACK: u8 = 0x1;
    pub const END_STREAM: u8 = 0x1;
    pub const END_HEADERS: u8 = 0x4;
    pub const PADDED: u8 = 0x8;
    pub const PRIORITY: u8 = 0x20;
    /// Of a HEADERS frame that is the whole of a request.
    pub const WHOLE: u8 = END_STREAM | END_HEADERS;
}

/// Settings, RFC 9113 section 6.5.2.
pub mod setting {
    pub const HEADER_TABLE_SIZE: u16 = 1;
    pub const ENABLE_PUSH: u16 = 2;
    pub const MAX_CONCURRENT_STREAMS: u16 = 3;
    pub const INITIAL_WINDOW_SIZE: u16 = 4;
    pub const MAX_FRAME_SIZE: u16 = 5;
    pub const MAX_HEADER_LIST_SIZE: u16 = 6;
}

/// Error codes, RFC 9113 section 7.
pub mod code {
    pub const NO_ERROR: u32 = 0;
    pub const PROTOCOL_ERROR: u32 = 1;
    pub const FLOW_CONTROL_ERROR: u32 = 3;
    pub const STREAM_CLOSED: u32 = 5;
    pub const FRAME_SIZE_ERROR: u32 = 6;
    pub const REFUSED_STREAM: u32 = 7;
    pub const CANCEL: u32 = 8;
    pub const COMPRESSION_ERROR: u32 = 9;
    pub const ENHANCE_YOUR_CALM: u32 = 11;
}

/// What a client sends first, RFC 9113 section 3.4.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// What a client sends first, with settings that change nothing.
pub fn preface() -> Vec<u8> {
    [PREFACE, &settings(&[(setting::INITIAL_WINDOW_SIZE, 65_535)])].concat()
}

/// The largest payload of a frame where no setting says otherwise.
pub const MAX_FRAME: usize = 16_384;
/// The largest window.
pub const MAX_WINDOW: u32 = 0x7fff_ffff;

/// Header fields of a request.
pub type Fields<'a> = &'a [(&'a str, &'a str)];

pub const GET: Fields<'static> =
    &[(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "site.test")];
pub const POST: Fields<'static> =
    &[(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "site.test")];
/// A request that its target keeps waiting.
pub const HOLD: Fields<'static> =
    &[(":method", "POST"), (":scheme", "http"), (":path", "/hold"), (":authority", "site.test")];

/// A frame whose header tells its payload's length.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: impl AsRef<[u8]>) -> Vec<u8> {
    frame_of(payload.as_ref().len(), kind, flags, stream, payload)
}

/// A frame whose header tells any length.
pub fn frame_of(
    length: usize,
    kind: u8,
    flags: u8,
    stream: u32,
    payload: impl AsRef<[u8]>,
) -> Vec<u8> {
    let mut frame = u32::try_from(length).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload.as_ref());
    frame
}

pub fn data(stream: u32, flags: u8, payload: impl AsRef<[u8]>) -> Vec<u8> {
    frame(kind::DATA, flags, stream, payload)
}

pub fn headers(stream: u32, flags: u8, block: impl AsRef<[u8]>) -> Vec<u8> {
    frame(kind::HEADERS, flags, stream, block)
}

/// A whole request without a body.
pub fn request(stream: u32, fields: Fields<'_>) -> Vec<u8> {
    headers(stream, flag::WHOLE, block(fields))
}

/// A request whose body is to come.
pub fn begin(stream: u32, fields: Fields<'_>) -> Vec<u8> {
    headers(stream, flag::END_HEADERS, block(fields))
}

pub fn continuation(stream: u32, flags: u8, block: impl AsRef<[u8]>) -> Vec<u8> {
    frame(kind::CONTINUATION, flags, stream, block)
}

/// What a HEADERS frame with the PRIORITY flag, or a PRIORITY frame, says. The weight is one less
/// than what it means.
pub fn dependency(on: u32, is_exclusive: bool, weight: u8) -> Vec<u8> {
    let on = on | u32::from(is_exclusive) << 31;
    [on.to_be_bytes().as_slice(), &[weight]].concat()
}

pub fn priority(stream: u32, on: u32, is_exclusive: bool, weight: u8) -> Vec<u8> {
    frame(kind::PRIORITY, 0, stream, dependency(on, is_exclusive, weight))
}

pub fn reset(stream: u32, code: u32) -> Vec<u8> {
    frame(kind::RST_STREAM, 0, stream, code.to_be_bytes())
}

pub fn settings(settings: &[(u16, u32)]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (name, value) in settings {
        payload.extend(name.to_be_bytes());
        payload.extend(value.to_be_bytes());
    }
    frame(kind::SETTINGS, 0, 0, payload)
}

pub fn settings_ack() -> Vec<u8> {
    frame(kind::SETTINGS, flag::ACK, 0, [])
}

pub fn ping(payload: &[u8; 8]) -> Vec<u8> {
    frame(kind::PING, 0, 0, payload)
}

pub fn goaway(last: u32, code: u32) -> Vec<u8> {
    frame(kind::GOAWAY, 0, 0, [last.to_be_bytes(), code.to_be_bytes()].concat())
}

pub fn window_update(stream: u32, increment: u32) -> Vec<u8> {
    frame(kind::WINDOW_UPDATE, 0, stream, increment.to_be_bytes())
}

/// An integer behind the bits of its first byte that say what it is, RFC 7541 section 5.1.
pub fn integer(first: u8, prefix: u32, value: usize) -> Vec<u8> {
    let most = (1 << prefix) - 1;
    if value < most {
        return vec![first | value as u8];
    }
    let mut bytes = vec![first | most as u8];
    let mut rest = value - most;
    while rest >= 0x80 {
        bytes.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    bytes.push(rest as u8);
    bytes
}

/// A string as it is, RFC 7541 section 5.2.
pub fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [integer(0, 7, text.len()), text.to_vec()].concat()
}

/// A string of Huffman codes.
pub fn huffman(codes: &[u8]) -> Vec<u8> {
    [integer(0x80, 7, codes.len()), codes.to_vec()].concat()
}

/// A field that leaves the dynamic table alone, RFC 7541 section 6.2.2.
pub fn field(name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Vec<u8> {
    [vec![0], string(name), string(value)].concat()
}

/// Fields that leave the dynamic table alone.
pub fn block<N: AsRef<[u8]>, V: AsRef<[u8]>>(fields: &[(N, V)]) -> Vec<u8> {
    fields.iter().flat_map(|(name, value)| field(name, value)).collect()
}

/// The status at the beginning of an answer's block; `None` where that refers to the dynamic table.
pub fn status(mut block: &[u8]) -> Option<u16> {
    // What changes the dynamic table's size comes first.
    while let [first, rest @ ..] = block
        && first & 0xe0 == 0x20
    {
        block = rest;
        if first & 0x1f == 0x1f {
            let last = block.iter().position(|byte| byte & 0x80 == 0)?;
            block = &block[last + 1..];
        }
    }
    let (&first, rest) = block.split_first()?;
    // RFC 7541 appendix A.
    const STATIC: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
    if first & 0x80 != 0 {
        return STATIC.get(usize::from(first & 0x7f).checked_sub(8)?).copied();
    }
    let index = if first & 0x40 != 0 { first & 0x3f } else { first & 0x0f };
    if !(8..=14).contains(&index) {
        return None;
    }
    let (&length, rest) = rest.split_first()?;
    let value = rest.get(..usize::from(length & 0x7f))?;
    if length & 0x80 == 0 { std::str::from_utf8(value).ok()?.parse().ok() } else { digits(value) }
}

/// A number of Huffman codes, RFC 7541 appendix B: 0, 1 and 2 have five bits and are 0, 1 and 2, the
/// others have six and begin at 25.
fn digits(codes: &[u8]) -> Option<u16> {
    let bits: Vec<u8> =
        codes.iter().flat_map(|byte| (0..8).rev().map(move |n| byte >> n & 1)).collect();
    let code = |bits: &[u8]| bits.iter().fold(0_u16, |code, bit| code << 1 | u16::from(*bit));
    let mut rest = bits.as_slice();
    let mut number = 0;
    while rest.len() >= 5 {
        let (digit, length) = match code(&rest[..5]) {
            short @ 0..=2 => (short, 5),
            _ => match code(rest.get(..6)?) {
                long @ 25..=31 => (long - 22, 6),
                _ => break,
            },
        };
        number = number * 10 + digit;
        rest = &rest[length..];
    }
    Some(number)
}

#[test]
fn statuses_of_the_specification() {
    // RFC 7541 appendices C.5.1, C.6.1 and C.6.2, and one after a change of the table's size.
    assert_eq!(status(b"\x48\x03302"), Some(302));
    assert_eq!(status(b"\x48\x82\x64\x02"), Some(302));
    assert_eq!(status(b"\x48\x83\x64\x0e\xff"), Some(307));
    assert_eq!(status(b"\x3f\xe1\x1f\x88"), Some(200));
    assert_eq!(status(b"\x20\x8e"), Some(500));
    assert_eq!(status(b"\xbe"), None);
    assert_eq!(status(&[0x8c, 1, 2]), Some(400));
    assert_eq!(status(b"\x48\x03405"), Some(405));
    // 405 and 464 in Huffman's code: 011010 00000 011011, and 011010 011100 011010.
    assert_eq!(status(&[0x48, 0x83, 0b0110_1000, 0b0000_1101, 0b1111_1111]), Some(405));
    assert_eq!(status(&[0x48, 0x83, 0b0110_1001, 0b1100_0110, 0b1011_1111]), Some(464));
}
