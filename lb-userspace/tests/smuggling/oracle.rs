//! A reader of RFC 9112 messages that takes nothing but what is strictly valid, and knows nothing
//! of how the proxy reads them. What it takes, every reader must understand in the same way.

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its first line, without CR LF.
    pub line: String,
    /// Names in lower case.
    pub fields: Vec<(String, Vec<u8>)>,
    pub body: Vec<u8>,
}

/// What bytes begin with.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// A message, of so many bytes.
    Whole(Message, usize),
    /// What may become one.
    Part,
    /// Anything else.
    Invalid(String),
}

/// Where the body of a response ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answers {
    /// There is none, whatever the fields say.
    Head,
    /// As the fields say.
    Other,
}

type Step<T> = Result<T, Stop>;

enum Stop {
    Part,
    Invalid(String),
}

fn invalid<T>(why: impl Into<String>) -> Step<T> {
    Err(Stop::Invalid(why.into()))
}

fn read(message: impl FnOnce() -> Step<(Message, usize)>) -> Read {
    match message() {
        Ok((message, used)) => Read::Whole(message, used),
        Err(Stop::Part) => Read::Part,
        Err(Stop::Invalid(why)) => Read::Invalid(why),
    }
}

impl Message {
    /// The values of a field.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.fields.iter().filter(move |(it, _)| it == name).map(|(_, value)| value.as_slice())
    }

    /// The value of a field that there is at most once.
    pub fn one<'a>(&'a self, name: &'a str) -> Option<&'a [u8]> {
        let mut values = self.all(name);
        values.next().filter(|_| values.next().is_none())
    }

    /// A request's method and target.
    pub fn method_and_target(&self) -> (&str, &str) {
        let mut words = self.line.split(' ');
        (words.next().unwrap_or(""), words.next().unwrap_or(""))
    }

    /// A response's status.
    pub fn status(&self) -> u16 {
        self.line.split(' ').nth(1).and_then(|it| it.parse().ok()).unwrap_or(0)
    }
}

/// Reads a request as a target gets it: without fields that ended at the proxy.
pub fn request(bytes: &[u8]) -> Read {
    read(|| {
        let (line, mut at) = line(bytes)?;
        check_request_line(line)?;
        let fields = fields(bytes, &mut at)?;
        let mut message = message(line, fields);
        check_host(&message)?;
        check_hop_by_hop(&message)?;
        let body = framed(&message)?.unwrap_or(Framing::Length(0));
        message.body = body.read(bytes, &mut at)?;
        Ok((message, at))
    })
}

/// Reads a response as a client gets it.
pub fn response(bytes: &[u8], answers: Answers) -> Read {
    read(|| {
        let (line, mut at) = line(bytes)?;
        check_status_line(line)?;
        let fields = fields(bytes, &mut at)?;
        let mut message = message(line, fields);
        let framing = framed(&message)?;
        let status = message.status();
        if status < 200 || matches!(status, 204) {
            if framing.is_some() {
                return invalid(format!("a length with {status}"));
            }
        } else if status != 304 && answers == Answers::Other {
            // Until the end of the connection: the proxy never needs that.
            let Some(framing) = framing else { return invalid("a body without an end") };
            message.body = framing.read(bytes, &mut at)?;
        }
        Ok((message, at))
    })
}

fn message(line: &[u8], fields: Vec<(String, Vec<u8>)>) -> Message {
    Message { line: String::from_utf8_lossy(line).into_owned(), fields, body: Vec::new() }
}

/// A line without its CR LF, and where the next one begins. Any other CR, LF or NUL is invalid.
fn line(bytes: &[u8]) -> Step<(&[u8], usize)> {
    let Some(at) = bytes.iter().position(|byte| matches!(byte, b'\r' | b'\n' | 0)) else {
        return Err(Stop::Part);
    };
    match &bytes[at..] {
        [b'\r', b'\n', ..] => Ok((&bytes[..at], at + 2)),
        [b'\r'] => Err(Stop::Part),
        _ => invalid("a bare CR, LF or NUL"),
    }
}

fn is_token(text: &[u8]) -> bool {
    let is_tchar = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    !text.is_empty() && text.iter().all(is_tchar)
}

/// Section 3: method SP request-target SP HTTP-version. Bytes beyond ASCII are no part of a target
/// (RFC 3986), but nobody takes them for an end of it.
fn check_request_line(line: &[u8]) -> Step<()> {
    let words: Vec<_> = line.split(|&byte| byte == b' ').collect();
    let [method, target, version] = words[..] else { return invalid("not three words") };
    if !is_token(method) {
        return invalid("the method is no token");
    }
    if version != b"HTTP/1.1" {
        return invalid("the version");
    }
    if target.iter().any(|&byte| byte <= b' ' || byte == 0x7f || byte == b'#') {
        return invalid("the target's characters");
    }
    // Sections 3.2.1 and 3.2.4; the other forms are for proxies that clients know of.
    match target {
        [b'/', ..] => Ok(()),
        b"*" if method == b"OPTIONS" => Ok(()),
        _ => invalid("the target's form"),
    }
}

fn check_status_line(line: &[u8]) -> Step<()> {
    let Some(rest) = line.strip_prefix(b"HTTP/1.1 ").or(line.strip_prefix(b"HTTP/1.0 ")) else {
        return invalid("no status line");
    };
    match rest {
        [b'1'..=b'5', b'0'..=b'9', b'0'..=b'9', b' ', reason @ ..]
            if reason.iter().all(|&byte| is_field_byte(byte)) =>
        {
            Ok(())
        }
        _ => invalid("the status line"),
    }
}

fn is_field_byte(byte: u8) -> bool {
    byte == b'\t' || (byte >= b' ' && byte != 0x7f)
}

/// Section 5, without `obs-fold`.
fn fields(bytes: &[u8], at: &mut usize) -> Step<Vec<(String, Vec<u8>)>> {
    let mut fields = Vec::new();
    loop {
        let (line, next) = line(&bytes[*at..])?;
        *at += next;
        if line.is_empty() {
            return Ok(fields);
        }
        let Some(colon) = line.iter().position(|&byte| byte == b':') else {
            return invalid("a field without a colon");
        };
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        if !is_token(name) || !value.iter().all(|&byte| is_field_byte(byte)) {
            return invalid(format!("the field {:?}", String::from_utf8_lossy(line)));
        }
        let name = String::from_utf8_lossy(name).to_ascii_lowercase();
        fields.push((name, value.trim_ascii().to_vec()));
    }
}

/// Section 3.2: exactly one, of a host and maybe a port.
fn check_host(message: &Message) -> Step<()> {
    let Some(host) = message.one("host") else { return invalid("not exactly one Host") };
    let is_plain = |byte: &u8| byte.is_ascii_graphic() && !b"@/?#\\\"<>^`{|}".contains(byte);
    if host.iter().all(is_plain) { Ok(()) } else { invalid("the Host") }
}

/// RFC 9110 section 7.6.1, and what the proxy answers itself (`Expect`).
fn check_hop_by_hop(message: &Message) -> Step<()> {
    for name in ["keep-alive", "proxy-connection", "te", "trailer", "expect", "http2-settings"] {
        if message.all(name).next().is_some() {
            return invalid(format!("{name} passed"));
        }
    }
    let connection: Vec<_> = message.all("connection").collect();
    let is_upgrade = message.all("upgrade").count() == 1;
    match connection[..] {
        [] if message.all("upgrade").next().is_none() => Ok(()),
        [b"upgrade"] if is_upgrade => Ok(()),
        _ => invalid("Connection and Upgrade"),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Length(usize),
    Chunked,
}

/// Section 6.3: one way to tell the length, said once.
fn framed(message: &Message) -> Step<Option<Framing>> {
    let lengths: Vec<_> = message.all("content-length").collect();
    let codings: Vec<_> = message.all("transfer-encoding").collect();
    match (&lengths[..], &codings[..]) {
        ([], []) => Ok(None),
        ([], [b"chunked"]) => Ok(Some(Framing::Chunked)),
        ([length], []) if !length.is_empty() && length.iter().all(u8::is_ascii_digit) => {
            match String::from_utf8_lossy(length).parse() {
                Ok(length) => Ok(Some(Framing::Length(length))),
                Err(_) => invalid("a length that is too large"),
            }
        }
        _ => invalid(format!("lengths {lengths:?} with codings {codings:?}")),
    }
}

impl Framing {
    fn read(self, bytes: &[u8], at: &mut usize) -> Step<Vec<u8>> {
        match self {
            Self::Length(length) => {
                let body = bytes[*at..].get(..length).ok_or(Stop::Part)?;
                *at += length;
                Ok(body.to_vec())
            }
            Self::Chunked => chunks(bytes, at),
        }
    }
}

/// Section 7.1, without extensions and trailers: both ended at the proxy.
fn chunks(bytes: &[u8], at: &mut usize) -> Step<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let (size, next) = line(&bytes[*at..])?;
        *at += next;
        let digits = std::str::from_utf8(size).unwrap_or("");
        if digits.is_empty() || !digits.bytes().all(|it| it.is_ascii_hexdigit()) {
            return invalid(format!("the size of a chunk: {size:?}"));
        }
        let Ok(size) = usize::from_str_radix(digits, 16) else { return invalid("a huge chunk") };
        let data = bytes[*at..].get(..size).ok_or(Stop::Part)?;
        body.extend_from_slice(data);
        *at += size;
        match &bytes[*at..] {
            [b'\r', b'\n', ..] => *at += 2,
            [] | [b'\r'] => return Err(Stop::Part),
            _ => return invalid("no CR LF behind a chunk"),
        }
        if size == 0 {
            return Ok(body);
        }
    }
}

#[test]
fn strictness() {
    let head = "Host: a\r\n";
    let whole = |text: &str| match request(text.as_bytes()) {
        Read::Whole(message, used) => Some((message.body, used == text.len())),
        Read::Part => panic!("part: {text:?}"),
        Read::Invalid(_) => None,
    };
    let fields = |fields: &str| whole(&format!("POST / HTTP/1.1\r\n{head}{fields}\r\nhello"));
    assert_eq!(fields(""), Some((b"".to_vec(), false)));
    assert_eq!(fields("Content-Length: 5\r\n"), Some((b"hello".to_vec(), true)));
    let chunked = "Transfer-Encoding: chunked\r\n";
    let chunks = |body: &str| whole(&format!("POST / HTTP/1.1\r\n{head}{chunked}\r\n{body}"));
    assert_eq!(chunks("5\r\nhello\r\n0\r\n\r\n"), Some((b"hello".to_vec(), true)));
    for bad in ["5;x\r\nhello\r\n0\r\n\r\n", "0\r\nx: y\r\n\r\n", " 0\r\n\r\n", "1\r\nhello\r\n"] {
        assert_eq!(chunks(bad), None, "{bad:?}");
    }
    for bad in [
        "Content-Length: 5\r\nContent-Length: 5\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: Chunked, chunked\r\n",
        "Host: b\r\n",
        "X : y\r\n",
        "X: y\r\n z\r\n",
        "X: y\nZ: z\r\n",
        "X: \0\r\n",
        "Connection: close\r\n",
        "Keep-Alive: 5\r\n",
        "Upgrade: h2c\r\n",
        "Expect: 100-continue\r\n",
    ] {
        assert_eq!(fields(bad), None, "{bad:?}");
    }
    for bad in [
        "GET /a b HTTP/1.1",
        "GET / HTTP/1.0",
        "GET a HTTP/1.1",
        "GET * HTTP/1.1",
        "GET /#a HTTP/1.1",
        "G\tT / HTTP/1.1",
        "GET  HTTP/1.1",
        "GET http://a/ HTTP/1.1",
    ] {
        assert_eq!(whole(&format!("{bad}\r\n{head}\r\n")), None, "{bad:?}");
    }
}
