//! What h2spec does not ask and a proxy must know: requests that mean one thing here and another in
//! HTTP/1.1, and clients that cost more than they pay.

use super::peer::Expect::{Goaway, Ignored, Reset, Status, StreamError};
use super::suite::{Case, case, send};
use super::wire::code::{ENHANCE_YOUR_CALM, FLOW_CONTROL_ERROR, PROTOCOL_ERROR, STREAM_CLOSED};
use super::wire::{
    Fields, GET, HOLD, MAX_FRAME, MAX_WINDOW, POST, begin, block, continuation, data, field, flag,
    frame, headers, kind, ping, request, reset, settings, window_update,
};

/// More than a window of a stream towards us and what sockets hold, bytes.
const MUCH: usize = 16 * 1024 * 1024;

fn malformed(id: &'static str, about: &'static str, fields: Vec<u8>) -> Case {
    let frame = headers(1, flag::WHOLE, [block(GET), fields].concat());
    case(id, about, [send(frame)], StreamError(1, &[PROTOCOL_ERROR]))
}

fn status(id: &'static str, about: &'static str, fields: Fields<'_>, status: u16) -> Case {
    case(id, about, [send(request(1, fields))], Status(1, status))
}

/// A request without what is named, and with these.
fn changed<'a>(without: &[&str], with: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let kept = GET.iter().filter(|(name, _)| !without.contains(name));
    // Pseudo-header fields come first.
    let (pseudo, others): (Vec<_>, Vec<_>) =
        kept.copied().chain(with.iter().copied()).partition(|(name, _)| name.starts_with(':'));
    [pseudo, others].concat()
}

pub fn cases() -> Vec<Case> {
    [fields(), hosts(), targets(), bodies(), floods()].concat()
}

/// RFC 9113 sections 8.2.1 and 8.2.2.
fn fields() -> Vec<Case> {
    let trailers = |fields| {
        let frames = [begin(1, POST), data(1, 0, "test"), headers(1, flag::WHOLE, fields)];
        send(frames.concat())
    };
    let error = || StreamError(1, &[PROTOCOL_ERROR]);
    vec![
        malformed("8.2.2/1", "connection", field("connection", "close")),
        malformed("8.2.2/2", "keep-alive", field("keep-alive", "timeout=5")),
        malformed("8.2.2/3", "proxy-connection", field("proxy-connection", "keep-alive")),
        malformed("8.2.2/4", "transfer-encoding", field("transfer-encoding", "chunked")),
        malformed("8.2.2/5", "upgrade", field("upgrade", "h2c")),
        malformed("8.2.2/6", "te of another coding", field("te", "gzip")),
        status("8.2.2/7", "te of trailers", &changed(&[], &[("te", "trailers")]), 200),
        malformed("8.2.1/1", "a blank in a name", field("x test", "ok")),
        malformed("8.2.1/2", "a colon in a name", field("x:test", "ok")),
        malformed("8.2.1/3", "an empty name", field("", "ok")),
        malformed("8.2.1/4", "NUL in a name", field("x\0test", "ok")),
        malformed("8.2.1/5", "beyond ASCII in a name", field("x-\u{e4}", "ok")),
        malformed("8.2.1/6", "a line's end in a name", field("x\r\ntest", "ok")),
        malformed("8.2.1/7", "NUL in a value", field("x-test", "o\0k")),
        malformed("8.2.1/8", "CR in a value", field("x-test", "o\rk")),
        malformed("8.2.1/9", "LF in a value", field("x-test", "o\nk")),
        malformed("8.2.1/10", "a line in a value", field("x-test", "ok\r\nx-other: ok")),
        malformed("8.2.1/11", "a blank before a value", field("x-test", " ok")),
        malformed("8.2.1/12", "a blank after a value", field("x-test", "ok ")),
        case("8.1/1", "trailers in upper case", [trailers(field("X-TEST", "ok"))], error()),
        case("8.1/2", "a method in trailers", [trailers(field(":method", "GET"))], error()),
        case("8.1/3", "a status in trailers", [trailers(field(":status", "200"))], error()),
        case("8.1/4", "connection in trailers", [trailers(field("connection", "close"))], error()),
        case("8.1/5", "trailers", [trailers(field("x-test", "ok"))], Status(1, 200)),
    ]
}

/// RFC 9113 section 8.3.1: `:authority` and `Host`.
fn hosts() -> Vec<Case> {
    const AUTHORITY: &str = ":authority";
    let host = |id, about, fields: Fields<'_>, code| {
        status(id, about, &changed(&[AUTHORITY], fields), code)
    };
    vec![
        host("8.3.1/1", "another host", &[(AUTHORITY, "site.test"), ("host", "other.test")], 400),
        host("8.3.1/2", "another port", &[(AUTHORITY, "site.test"), ("host", "site.test:81")], 400),
        host("8.3.1/3", "the same host", &[(AUTHORITY, "site.test"), ("host", "SITE.test")], 200),
        host("8.3.1/4", "host alone", &[("host", "site.test")], 200),
        host("8.3.1/5", "no host", &[], 400),
        host("8.3.1/6", "two hosts", &[("host", "site.test"), ("host", "other.test")], 400),
        host("8.3.1/7", "an empty host beside", &[(AUTHORITY, "site.test"), ("host", "")], 400),
        host("8.3.1/8", "a user in the authority", &[(AUTHORITY, "user@site.test")], 400),
        case(
            "8.3.1/9",
            "two authorities",
            [send(request(1, &changed(&[], &[(AUTHORITY, "other.test")])))],
            StreamError(1, &[PROTOCOL_ERROR]),
        ),
        case(
            "8.3.1/10",
            "a path in the authority",
            [send(request(1, &changed(&[AUTHORITY], &[(AUTHORITY, "site.test/path")])))],
            StreamError(1, &[PROTOCOL_ERROR]),
        ),
    ]
}

/// RFC 9113 sections 8.3.1 and 8.5: methods and paths.
fn targets() -> Vec<Case> {
    let path = |path| changed(&[":path"], &[(":path", path)]);
    let method = |method| changed(&[":method"], &[(":method", method)]);
    let refused = |id, about, fields: Fields<'_>| {
        case(id, about, [send(request(1, fields))], StreamError(1, &[PROTOCOL_ERROR]))
    };
    let connect = [(":method", "CONNECT"), (":authority", "site.test:443")];
    vec![
        refused("8.3.1/20", "a blank in the path", &path("/a b")),
        refused("8.3.1/21", "a line in the path", &path("/a HTTP/1.1\r\nx: y")),
        refused("8.3.1/22", "a path without its slash", &path("path")),
        refused("8.3.1/23", "a whole URI as path", &path("http://other.test/path")),
        status("8.3.1/24", "an asterisk for GET", &path("*"), 400),
        status(
            "8.3.1/25",
            "no path, and host",
            &changed(&[":path", ":authority"], &[("host", "a")]),
            400,
        ),
        refused("8.3.1/26", "a method that is none", &method("GE T")),
        refused("8.3.1/27", "a line in the method", &method("GET / HTTP/1.1\r\nx: y")),
        refused(
            "8.3.1/28",
            "a scheme that is none",
            &changed(&[":scheme"], &[(":scheme", "ht tp")]),
        ),
        status("8.5/1", "CONNECT", &connect, 405),
        refused("8.5/2", "CONNECT with a path", &[&connect[..], &[(":path", "/")]].concat()),
        refused(
            "8.5/3",
            "CONNECT for a protocol",
            &changed(&[":method"], &[(":method", "CONNECT"), (":protocol", "websocket")]),
        ),
        status("8.5/4", "TRACE", &method("TRACE"), 405),
    ]
}

/// RFC 9113 section 8.1.1: lengths. And windows.
fn bodies() -> Vec<Case> {
    let with = |lengths: Fields<'_>| [block(POST), block(lengths)].concat();
    let error = || StreamError(1, &[PROTOCOL_ERROR]);
    let ends = |id, about, lengths: Fields<'_>| {
        case(id, about, [send(headers(1, flag::WHOLE, with(lengths)))], error())
    };
    let body = |id, about, length, ends: Vec<u8>| {
        let head = headers(1, flag::END_HEADERS, with(&[("content-length", length)]));
        case(id, about, [send([head, ends].concat())], error())
    };
    let test = || data(1, flag::END_STREAM, "test");
    let frames = |n: usize| data(1, 0, vec![0; MAX_FRAME]).repeat(n);
    vec![
        ends("8.1.1/1", "content-length without a body", &[("content-length", "4")]),
        body("8.1.1/2", "content-length beyond the body", "5", test()),
        body(
            "8.1.1/3",
            "content-length beyond the body before trailers",
            "5",
            [data(1, 0, "test"), headers(1, flag::WHOLE, field("x-test", "ok"))].concat(),
        ),
        body("8.1.1/4", "content-length with a sign", "+4", test()),
        body("8.1.1/5", "content-length of two members", "4, 4", test()),
        ends(
            "8.1.1/6",
            "two content-lengths that differ",
            &[("content-length", "0"), ("content-length", "4")],
        ),
        case(
            "6.9.1/10",
            "DATA beyond the stream's window",
            [send([begin(1, HOLD), frames(MUCH / MAX_FRAME)].concat())],
            StreamError(1, &[FLOW_CONTROL_ERROR]),
        ),
    ]
}

/// RFC 9113 section 10.5: what a client can do cheaply and often.
fn floods() -> Vec<Case> {
    let calm =
        |id, about, bytes: Vec<u8>| case(id, about, [send(bytes)], Goaway(ENHANCE_YOUR_CALM));
    let harmless = |id, about, bytes: Vec<u8>| case(id, about, [send(bytes)], Ignored);
    let streams = || (0..2_000).map(|n| 2 * n + 1);
    let open = || headers(1, 0, block(GET));
    let large = |n: usize| field("x-large", vec![b'x'; 8_000]).repeat(n);
    let list = |bytes: &[u8]| {
        let mut frames: Vec<_> = bytes.chunks(MAX_FRAME).collect();
        let last = frames.pop().unwrap();
        let frames = frames.iter().flat_map(|it| continuation(1, 0, it));
        let first = headers(1, flag::END_STREAM, block(GET));
        [first, frames.collect(), continuation(1, flag::END_HEADERS, last)].concat()
    };
    vec![
        calm(
            "10.5/1",
            "requests that are reset at once (CVE-2023-44487)",
            streams().flat_map(|n| [request(n, GET), reset(n, 8)].concat()).collect(),
        ),
        calm(
            "10.5/2",
            "requests that we must reset (CVE-2025-8671)",
            streams()
                .flat_map(|n| [begin(n, HOLD), window_update(n, MAX_WINDOW)].concat())
                .collect(),
        ),
        calm(
            "10.5/3",
            "requests that are malformed",
            streams().flat_map(|n| request(n, &GET[1..])).collect(),
        ),
        calm(
            "10.5/4",
            "CONTINUATION without an end (CVE-2024-27316)",
            [open(), continuation(1, 0, field("x", "y")).repeat(20_000)].concat(),
        ),
        calm(
            "10.5/5",
            "CONTINUATION of nothing",
            [open(), continuation(1, 0, []).repeat(20_000)].concat(),
        ),
        calm(
            "10.5/6",
            "DATA of single bytes that nobody takes",
            [begin(1, HOLD), data(1, 0, "x").repeat(200_000)].concat(),
        ),
        calm(
            "10.5/7",
            "DATA of nothing (CVE-2019-9518)",
            [begin(1, HOLD), data(1, 0, []).repeat(20_000)].concat(),
        ),
        harmless("10.5/8", "SETTINGS (CVE-2019-9515)", settings(&[(2, 0)]).repeat(20_000)),
        harmless("10.5/9", "PING (CVE-2019-9512)", ping(b"flooding").repeat(20_000)),
        harmless("10.5/10", "PRIORITY", frame(kind::PRIORITY, 0, 1, [0; 5]).repeat(20_000)),
        case("10.5/11", "fields of 56,000 bytes", [send(list(&large(7)))], Status(1, 200)),
        case("10.5/12", "fields of 72,000 bytes", [send(list(&large(9)))], Status(1, 431)),
        calm("10.5/13", "fields of 1,600,000 bytes", list(&large(200))),
        calm(
            "10.5/14",
            "the same field from the table, again and again (CVE-2025-53020)",
            headers(
                1,
                flag::WHOLE,
                [
                    block(GET),
                    [&[0x40][..], &field("x", vec![b'x'; 4_000])[1..]].concat(),
                    vec![0x80 | 62; 10_000],
                ]
                .concat(),
            ),
        ),
        case(
            "10.5/15",
            "a closed stream's frames",
            [send([request(1, HOLD), reset(1, 8), data(1, 0, "test").repeat(100)].concat())],
            Reset(1, STREAM_CLOSED),
        ),
    ]
}
