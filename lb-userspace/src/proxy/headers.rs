//! Header fields between client and target.
//!
//! Sources: RFC 9110 section 7.6.1 for what ends at each hop; "HTTP headers and Application Load
//! Balancers", "Request tracing", "Host header preservation", "Edit attributes" and "Quotas" in
//! AWS's guide to application load balancers for the rest.

use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use data_encoding::HEXLOWER;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};

use super::host::Host;
use crate::config::model::{Attributes, XForwardedFor};

/// The longest request line, bytes.
pub const MAX_REQUEST_LINE: usize = 16 * 1024;
/// The longest header field, bytes.
pub const MAX_FIELD: usize = 16 * 1024;
/// The largest request head, bytes.
pub const MAX_REQUEST_HEAD: usize = 64 * 1024;
/// The largest response head, bytes.
pub const MAX_RESPONSE_HEAD: usize = 32 * 1024;
/// The most addresses in `X-Forwarded-For`; more are answered with 463.
pub const MAX_FORWARDED_FOR: usize = 30;
/// With more bytes of fields, a trace id that came with a request is replaced.
const MAX_TRACED_HEAD: usize = 7 * 1024;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
/// `X-Amzn-Trace-Id`.
pub const TRACE_ID: HeaderName = HeaderName::from_static("x-amzn-trace-id");
const TLS_VERSION: HeaderName = HeaderName::from_static("x-amzn-tls-version");
const TLS_CIPHER_SUITE: HeaderName = HeaderName::from_static("x-amzn-tls-cipher-suite");

/// RFC 9110 section 7.6.1, section 10.1.4 for `TE`, and RFC 7540 section 3.2.1 for what comes with
/// an upgrade to HTTP/2.
static HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("http2-settings"),
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// What `Connection` mostly says, which names no field that could stay.
const PERSISTENCE: [&[u8]; 2] = [b"keep-alive", b"close"];

/// Fields that stay even if `Connection` names them: their loss would change what the message is.
static NEVER_HOP_BY_HOP: [HeaderName; 4] =
    [header::HOST, header::CONTENT_LENGTH, header::COOKIE, header::AUTHORIZATION];

/// What the fields of one hop asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hop {
    /// `Upgrade`, if `Connection` names it, and none of the protocols in it is HTTP.
    pub upgrade: Option<HeaderValue>,
    /// Whether the sender takes trailers (`TE: trailers`), which gRPC must be told.
    pub trailers: bool,
}

/// Takes out what ends at this hop: the fields of RFC 9110 and those that `Connection` names. They
/// say nothing to the next one.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) -> Hop {
    let mut hop = Hop::default();
    // Few messages have more than one of them, and to look at the names is cheaper than to look for
    // each.
    let mut there = 0_u32;
    for name in headers.keys() {
        if let Some(place) = HOP_BY_HOP.iter().position(|it| it == name) {
            there |= 1 << place;
        }
    }
    if there == 0 {
        return hop;
    }
    if list(headers, &header::TE).any(|coding| coding.eq_ignore_ascii_case(b"trailers")) {
        hop.trailers = true;
    }
    let mut named = Vec::new();
    for option in list(headers, &header::CONNECTION) {
        if !PERSISTENCE.iter().any(|it| option.eq_ignore_ascii_case(it))
            && let Ok(name) = HeaderName::from_bytes(option)
        {
            named.push(name);
        }
    }
    // The rules would not see the requests in a tunnel of HTTP, such as one of `h2c`.
    if named.contains(&header::UPGRADE) && !list(headers, &header::UPGRADE).any(is_http) {
        hop.upgrade = headers.get(header::UPGRADE).cloned();
    }
    let those = HOP_BY_HOP.iter().enumerate().filter(|(place, _)| there >> place & 1 == 1);
    let those = those.map(|(_, name)| name);
    for name in named.iter().filter(|name| !NEVER_HOP_BY_HOP.contains(name)).chain(those) {
        headers.remove(name);
    }
    hop
}

/// Leaves one way to tell where a message ends, if there are several (RFC 9112 section 6.3):
/// `Transfer-Encoding` takes `Content-Length` out, and of equal lengths, which are all that the
/// HTTP library lets pass, one stays. Whether there were several. Comes before
/// [`strip_hop_by_hop`].
pub fn unify_length(headers: &mut HeaderMap) -> bool {
    if headers.contains_key(header::TRANSFER_ENCODING) {
        return headers.remove(header::CONTENT_LENGTH).is_some();
    }
    let one = {
        let mut members = list(headers, &header::CONTENT_LENGTH);
        let (first, second) = (members.next(), members.next());
        first.filter(|_| second.is_some()).and_then(|it| HeaderValue::from_bytes(it).ok())
    };
    let Some(one) = one else { return false };
    headers.insert(header::CONTENT_LENGTH, one);
    true
}

/// Makes one of the `Cookie` fields into which a client of HTTP/2 may cut its cookies, so that rules
/// and targets of HTTP/1.1 see what they know (RFC 9113 section 8.2.3).
pub fn join_cookies(headers: &mut HeaderMap) {
    let mut crumbs = headers.get_all(header::COOKIE).iter();
    let (Some(first), Some(second)) = (crumbs.next(), crumbs.next()) else { return };
    let mut joined = first.as_bytes().to_vec();
    for crumb in std::iter::once(second).chain(crumbs) {
        joined.extend_from_slice(b"; ");
        joined.extend_from_slice(crumb.as_bytes());
    }
    if let Ok(joined) = HeaderValue::from_bytes(&joined) {
        headers.insert(header::COOKIE, joined);
    }
}

/// Whether a protocol of `Upgrade` (RFC 9110 section 16.7) is HTTP itself.
fn is_http(protocol: &[u8]) -> bool {
    let name = protocol.split(|&byte| byte == b'/').next().unwrap_or(protocol);
    [&b"http"[..], b"h2c", b"h2"].iter().any(|it| name.eq_ignore_ascii_case(it))
}

/// The members of a list in all lines of a field, RFC 9110 section 5.6.1.
fn list<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    headers
        .get_all(name)
        .iter()
        .flat_map(|line| line.as_bytes().split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|member| !member.is_empty())
}

/// What of a request is too big.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Oversize {
    /// Its line: 414.
    Line,
    /// A field, or all of them: 400.
    Fields,
    /// Addresses in `X-Forwarded-For`: 463.
    ForwardedFor,
}

/// Whether a request is as small as AWS wants it. The target is path and query.
///
/// # Errors
/// What is too big.
pub fn check_size(method: &str, target: &str, headers: &HeaderMap) -> Result<(), Oversize> {
    // Two blanks and the version.
    let line = method.len() + target.len() + " HTTP/1.1 ".len();
    if line > MAX_REQUEST_LINE {
        return Err(Oversize::Line);
    }
    let is_long =
        |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() > MAX_FIELD;
    if line + size(headers) > MAX_REQUEST_HEAD || headers.iter().any(is_long) {
        return Err(Oversize::Fields);
    }
    if list(headers, &X_FORWARDED_FOR).take(MAX_FORWARDED_FOR + 1).count() > MAX_FORWARDED_FOR {
        return Err(Oversize::ForwardedFor);
    }
    Ok(())
}

/// Bytes of all fields as HTTP/1.1 writes them.
pub fn size(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum()
}

/// Takes out fields whose names AWS holds to be invalid: those that do not match `[-A-Za-z0-9]+`.
/// How many it were.
pub fn drop_invalid(headers: &mut HeaderMap) -> usize {
    let valid = |name: &HeaderName| {
        name.as_str().bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    let invalid: Vec<HeaderName> = headers.keys().filter(|name| !valid(name)).cloned().collect();
    for name in &invalid {
        headers.remove(name);
    }
    invalid.len()
}

/// What targets are told of every request of a client's connection, written once.
#[derive(Debug, Clone)]
pub struct Told {
    client: SocketAddr,
    /// `None` for what has no bytes that a field may not have: never.
    address: Option<HeaderValue>,
    port: HeaderValue,
}

impl Told {
    /// Of a client that came to a listener of that port.
    pub fn new(client: SocketAddr, port: u16) -> Self {
        let client = SocketAddr::new(client.ip().to_canonical(), client.port());
        let address = HeaderValue::try_from(client.ip().to_string()).ok();
        Self { client, address, port: HeaderValue::from(port) }
    }
}

/// What is known of a client's connection.
#[derive(Debug, Clone, Copy)]
pub struct ClientSide<'a> {
    /// The client, and the listener's port.
    pub told: &'a Told,
    /// For HTTPS: version and cipher suite as OpenSSL names them, such as `TLSv1.2` and
    /// `ECDHE-RSA-AES128-GCM-SHA256`.
    pub tls: Option<(&'a str, &'a str)>,
}

/// Tells the target about the client: `X-Forwarded-For`, `-Proto` and `-Port`, and TLS version and
/// cipher suite where that is on. Whatever the client says of the latter four is replaced. Comes
/// after [`strip_hop_by_hop`], so that `Connection` cannot take these out.
pub fn add_client(headers: &mut HeaderMap, attributes: &Attributes, side: &ClientSide<'_>) {
    match attributes.x_forwarded_for {
        XForwardedFor::Append => {
            append_forwarded_for(headers, side.told, attributes.x_forwarded_for_client_port);
        }
        XForwardedFor::Preserve => {}
        XForwardedFor::Remove => {
            headers.remove(X_FORWARDED_FOR);
        }
    }
    let protocol = if side.tls.is_some() { "https" } else { "http" };
    headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(protocol));
    headers.insert(X_FORWARDED_PORT, side.told.port.clone());
    if attributes.tls_headers {
        headers.remove(TLS_VERSION);
        headers.remove(TLS_CIPHER_SUITE);
        if let Some((version, suite)) = side.tls {
            insert(headers, TLS_VERSION, version);
            insert(headers, TLS_CIPHER_SUITE, suite);
        }
    }
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// One line of all that there are, with the client at its end.
fn append_forwarded_for(headers: &mut HeaderMap, told: &Told, with_port: bool) {
    if let (Some(address), false) = (&told.address, with_port)
        && !headers.contains_key(&X_FORWARDED_FOR)
    {
        headers.insert(X_FORWARDED_FOR, address.clone());
        return;
    }
    let mut value: Vec<u8> = Vec::with_capacity(64);
    for line in headers.get_all(X_FORWARDED_FOR) {
        let line = line.as_bytes().trim_ascii();
        if !line.is_empty() {
            value.extend_from_slice(line);
            value.extend_from_slice(b", ");
        }
    }
    let client = if with_port { told.client.to_string() } else { told.client.ip().to_string() };
    value.extend_from_slice(client.as_bytes());
    if let Ok(value) = HeaderValue::from_bytes(&value) {
        headers.insert(X_FORWARDED_FOR, value);
    }
}

/// Adds `X-Amzn-Trace-Id`, or our `Self` to one that has a `Root`. `random` is fresh for each
/// request.
pub fn trace(headers: &mut HeaderMap, now: SystemTime, random: [u8; 12]) {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as u32);
    const ROOT: &str = "Root=";
    let mut root = String::with_capacity("Root=1-01234567-0123456789abcdef01234567".len());
    root.push_str(ROOT);
    root.push_str("1-");
    HEXLOWER.encode_append(&seconds.to_be_bytes(), &mut root);
    root.push('-');
    HEXLOWER.encode_append(&random, &mut root);
    let value = match headers.get(&TRACE_ID) {
        Some(old) if size(headers) <= MAX_TRACED_HEAD => with_self(&root[ROOT.len()..], old),
        _ => None,
    };
    let value = value.or_else(|| HeaderValue::try_from(root).ok());
    if let Some(value) = value {
        headers.insert(TRACE_ID, value);
    }
}

/// `None` if the old one has no `Root`, or bytes that none of ours would have.
fn with_self(id: &str, old: &HeaderValue) -> Option<HeaderValue> {
    let fields = old.to_str().ok()?.split(';').map(str::trim).filter(|field| !field.is_empty());
    let is = |field: &&str, name: &str| field.split('=').next() == Some(name);
    if !fields.clone().any(|field| is(&field, "Root")) {
        return None;
    }
    let mut value = format!("Self={id}");
    for field in fields.filter(|field| !is(field, "Self")) {
        value.push(';');
        value.push_str(field);
    }
    HeaderValue::try_from(value).ok()
}

/// The `Host` that a target sees, "Host header preservation". Without it, the port is that of the
/// listener, and none for 80 and 443 (except where the client named another one to a listener on
/// another port). `host` is of `Host` or, if there is one, of the request's own URI.
pub fn host_for_target(host: &Host<'_>, listener_port: u16) -> String {
    let name = host.name;
    match listener_port {
        // A port alone is no host.
        _ if name.is_empty() => String::new(),
        80 | 443 => name.to_owned(),
        port => [name, ":", &host.port.unwrap_or(port).to_string()].concat(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn map(fields: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn fields_of_one_hop_end_here() {
        let mut headers = map(&[
            ("connection", "Keep-Alive, X-Secret"),
            ("connection", "upgrade"),
            ("upgrade", "websocket"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("te", "gzip, Trailers"),
            ("trailer", "x"),
            ("transfer-encoding", "chunked"),
            ("x-secret", "1"),
            ("accept", "*/*"),
        ]);
        let hop = strip_hop_by_hop(&mut headers);
        assert_eq!(names(&headers), ["accept"]);
        assert_eq!(hop.upgrade.unwrap(), "websocket");
        assert!(hop.trailers);
        assert_eq!(strip_hop_by_hop(&mut headers), Hop::default());
    }

    #[test]
    fn an_upgrade_that_connection_does_not_name_is_none() {
        let mut headers = map(&[("upgrade", "h2c")]);
        assert_eq!(strip_hop_by_hop(&mut headers).upgrade, None);
        assert!(headers.is_empty());
    }

    #[test]
    fn one_length_stays() {
        let unified = |fields: &[(&'static str, &str)]| {
            let mut headers = map(fields);
            let several = unify_length(&mut headers);
            let lengths = headers.get_all(header::CONTENT_LENGTH).iter();
            (several, lengths.map(|it| it.to_str().unwrap().to_owned()).collect::<Vec<_>>())
        };
        let one = vec!["5".to_owned()];
        assert_eq!(unified(&[("x", "y")]), (false, Vec::new()));
        assert_eq!(unified(&[("content-length", "5")]), (false, one.clone()));
        assert_eq!(unified(&[("content-length", "5 , 5")]), (true, one.clone()));
        let twice = [("content-length", "5"), ("content-length", "5")];
        assert_eq!(unified(&twice), (true, one));
        let both = [("content-length", "5"), ("transfer-encoding", "x")];
        assert_eq!(unified(&both), (true, Vec::new()));
        assert_eq!(unified(&[("transfer-encoding", "x")]), (false, Vec::new()));
    }

    #[test]
    fn an_upgrade_to_http_is_none() {
        for protocol in ["h2c", "websocket, H2C", "HTTP/2.0", "http/1.1, x"] {
            let mut headers = map(&[
                ("connection", "upgrade"),
                ("upgrade", protocol),
                ("http2-settings", "AAMAAABk"),
            ]);
            assert_eq!(strip_hop_by_hop(&mut headers).upgrade, None, "{protocol}");
            assert!(headers.is_empty(), "{protocol}");
        }
        let mut headers = map(&[("connection", "upgrade"), ("upgrade", "x"), ("upgrade", "h2c")]);
        assert_eq!(strip_hop_by_hop(&mut headers).upgrade, None);
    }

    #[test]
    fn connection_cannot_take_out_what_makes_the_message() {
        let mut headers = map(&[
            ("connection", "host, content-length, cookie, authorization, x y, close"),
            ("host", "a"),
            ("content-length", "3"),
            ("cookie", "a=b"),
            ("authorization", "Basic x"),
        ]);
        strip_hop_by_hop(&mut headers);
        assert_eq!(names(&headers), ["authorization", "content-length", "cookie", "host"]);
    }

    fn attributes(mode: XForwardedFor, port: bool) -> Attributes {
        Attributes {
            x_forwarded_for: mode,
            x_forwarded_for_client_port: port,
            ..Attributes::default()
        }
    }

    fn forwarded_for(before: &[&str], mode: XForwardedFor, port: bool, client: &str) -> String {
        let mut headers = HeaderMap::new();
        for line in before {
            headers.append(X_FORWARDED_FOR, HeaderValue::from_str(line).unwrap());
        }
        let told = Told::new(client.parse().unwrap(), 80);
        let side = ClientSide { told: &told, tls: None };
        add_client(&mut headers, &attributes(mode, port), &side);
        let lines: Vec<_> = headers
            .get_all(X_FORWARDED_FOR)
            .iter()
            .map(|line| String::from_utf8_lossy(line.as_bytes()).into_owned())
            .collect();
        lines.join(" | ")
    }

    #[test]
    fn documented_forwarded_for() {
        use XForwardedFor::{Append, Preserve, Remove};
        let v4 = "203.0.113.7:8080";
        let v6 = "[2001:db8::21f:5bff:febf:ce22]:8080";
        assert_eq!(forwarded_for(&[], Append, false, v4), "203.0.113.7");
        assert_eq!(forwarded_for(&[], Append, true, v4), "203.0.113.7:8080");
        assert_eq!(forwarded_for(&[], Append, false, v6), "2001:db8::21f:5bff:febf:ce22");
        assert_eq!(forwarded_for(&[], Append, true, v6), v6);
        assert_eq!(forwarded_for(&["127.0.0.1"], Append, false, v4), "127.0.0.1, 203.0.113.7");
        assert_eq!(
            forwarded_for(&["127.0.0.1", "", "ü"], Append, false, v4),
            "127.0.0.1, ü, 203.0.113.7"
        );
        assert_eq!(forwarded_for(&["127.0.0.1", "x"], Preserve, true, v4), "127.0.0.1 | x");
        assert_eq!(forwarded_for(&[], Preserve, false, v4), "");
        assert_eq!(forwarded_for(&["127.0.0.1", "x"], Remove, false, v4), "");
        assert_eq!(forwarded_for(&[], Append, false, "[::ffff:192.0.2.1]:1"), "192.0.2.1");
    }

    #[test]
    fn protocol_port_and_tls_are_ours() {
        let mut headers = map(&[
            ("x-forwarded-proto", "ftp"),
            ("x-forwarded-port", "1"),
            ("x-forwarded-port", "2"),
            ("x-amzn-tls-version", "forged"),
        ]);
        let mut attributes = attributes(XForwardedFor::Append, false);
        let told = Told::new("192.0.2.1:1".parse().unwrap(), 8443);
        let plain = ClientSide { told: &told, tls: None };
        add_client(&mut headers, &attributes, &plain);
        assert_eq!(headers[X_FORWARDED_PROTO], "http");
        assert_eq!(headers.get_all(X_FORWARDED_PORT).iter().collect::<Vec<_>>(), ["8443"]);
        assert_eq!(headers[TLS_VERSION], "forged");

        attributes.tls_headers = true;
        add_client(&mut headers, &attributes, &plain);
        assert!(!headers.contains_key(TLS_VERSION));
        let tls = Some(("TLSv1.2", "ECDHE-RSA-AES128-GCM-SHA256"));
        add_client(&mut headers, &attributes, &ClientSide { tls, ..plain });
        assert_eq!(headers[X_FORWARDED_PROTO], "https");
        assert_eq!(headers[TLS_VERSION], "TLSv1.2");
        assert_eq!(headers[TLS_CIPHER_SUITE], "ECDHE-RSA-AES128-GCM-SHA256");
    }

    fn traced(before: Option<&str>) -> String {
        let mut headers = HeaderMap::new();
        if let Some(before) = before {
            headers.insert(TRACE_ID, HeaderValue::from_bytes(before.as_bytes()).unwrap());
        }
        let now = UNIX_EPOCH + Duration::from_secs(0x6789_1234);
        trace(&mut headers, now, [0x12, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 1, 2, 3, 4, 5]);
        headers[TRACE_ID].to_str().unwrap().to_owned()
    }

    #[test]
    fn documented_trace_ids() {
        let ours = "1-67891234-12456789abcdef0102030405";
        let root = "Root=1-67891233-abcdef012345678912345678";
        assert_eq!(traced(None), format!("Root={ours}"));
        assert_eq!(traced(Some(root)), format!("Self={ours};{root}"));
        assert_eq!(
            traced(Some(&format!("{root};CalledFrom=app"))),
            format!("Self={ours};{root};CalledFrom=app")
        );
        assert_eq!(
            traced(Some(&format!("Self=1-2-3; {root};Rooted=x"))),
            format!("Self={ours};{root};Rooted=x")
        );
        assert_eq!(traced(Some("CalledFrom=app")), format!("Root={ours}"));
        assert_eq!(traced(Some("Root=\u{e4}")), format!("Root={ours}"));
        let long = format!("{root};x={}", "y".repeat(8000));
        assert_eq!(traced(Some(&long)), format!("Root={ours}"));
    }

    #[test]
    fn documented_hosts() {
        let host = |host, port| host_for_target(&Host::parse(host).unwrap(), port);
        assert_eq!(host("example.com", 80), "example.com");
        assert_eq!(host("example.com:80", 80), "example.com");
        assert_eq!(host("example.com", 8080), "example.com:8080");
        assert_eq!(host("example.com:8080", 8080), "example.com:8080");
        assert_eq!(host("[2001:db8::1]:443", 443), "[2001:db8::1]");
        assert_eq!(host("[2001:db8::1]", 8443), "[2001:db8::1]:8443");
        assert_eq!(host("", 8000), "");
    }

    #[test]
    fn sizes() {
        let target = |bytes: usize| format!("/{}", "a".repeat(bytes - 1));
        let none = HeaderMap::new();
        assert_eq!(check_size("GET", &target(16 * 1024 - 13), &none), Ok(()));
        assert_eq!(check_size("GET", &target(16 * 1024 - 12), &none), Err(Oversize::Line));
        let field = |bytes: usize| "v".repeat(bytes);
        assert_eq!(check_size("GET", "/", &map(&[("a", &field(16 * 1024 - 1))])), Ok(()));
        let one = map(&[("a", &field(16 * 1024))]);
        assert_eq!(check_size("GET", "/", &one), Err(Oversize::Fields));
        let value = field(16 * 1000);
        let many =
            map(&[("a", &value), ("b", &value), ("c", &value), ("d", &value), ("e", &value)]);
        assert_eq!(check_size("GET", "/", &many), Err(Oversize::Fields));
        let addresses = |count| map(&[("x-forwarded-for", &["::1"].repeat(count).join(","))]);
        assert_eq!(check_size("GET", "/", &addresses(30)), Ok(()));
        assert_eq!(check_size("GET", "/", &addresses(31)), Err(Oversize::ForwardedFor));
    }

    #[test]
    fn invalid_names() {
        let mut headers = map(&[("x_under", "1"), ("x_under", "2"), ("x-ok", "1"), ("a.b", "")]);
        assert_eq!(drop_invalid(&mut headers), 2);
        assert_eq!(names(&headers), ["x-ok"]);
        assert_eq!(drop_invalid(&mut headers), 0);
    }

    proptest! {
        #[test]
        fn stripping_twice_is_stripping_once(
            connection in prop::collection::vec("[ ,a-cA-C-]{0,8}", 0..3),
            fields in prop::collection::vec(prop::sample::select(vec!["a", "b", "c", "te", "host", "upgrade"]), 0..6),
        ) {
            let mut headers = HeaderMap::new();
            for line in &connection {
                headers.append("connection", HeaderValue::from_str(line).unwrap());
            }
            for field in fields {
                headers.append(field, HeaderValue::from_static("x"));
            }
            let had_host = headers.contains_key("host");
            strip_hop_by_hop(&mut headers);
            let once = headers.clone();
            strip_hop_by_hop(&mut headers);
            prop_assert_eq!(&headers, &once);
            prop_assert_eq!(headers.contains_key("host"), had_host);
            for name in &HOP_BY_HOP {
                prop_assert!(!headers.contains_key(name));
            }
        }
    }
}
