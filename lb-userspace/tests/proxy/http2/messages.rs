//! h2spec's groups "http2", sections 6.5 to 6.9 and 7 to 8.2 of RFC 7540 (of RFC 9113: 6.5 to 6.9
//! and 7 to 8.4), and "hpack": settings, windows, messages, RFC 7541.

use super::peer::Expect::{
    self, Closed, ConnectionError, Data, Goaway, Pong, Reset, SettingsAck, StreamError,
};
use super::suite::{Case, case, send, wait};
use super::wire::code::{COMPRESSION_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, PROTOCOL_ERROR};
use super::wire::setting::{ENABLE_PUSH, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE};
use super::wire::{
    Fields, GET, HOLD, MAX_WINDOW, POST, begin, block, data, field, flag, frame, frame_of, goaway,
    headers, huffman, integer, kind, ping, request, reset, settings, string, window_update,
};

const PONG: &[u8; 8] = b"anything";
/// No code that is defined.
const UNDEFINED: u32 = 0xff;

fn refused(id: &'static str, about: &'static str, bytes: Vec<u8>, codes: &'static [u32]) -> Case {
    case(id, about, [send(bytes)], ConnectionError(codes))
}

fn malformed(id: &'static str, about: &'static str, bytes: Vec<u8>) -> Case {
    case(id, about, [send(bytes)], StreamError(1, &[PROTOCOL_ERROR]))
}

fn set(name: u16, value: u32) -> Vec<u8> {
    settings(&[(name, value)])
}

pub fn cases() -> Vec<Case> {
    [control(), windows(), exchanges(), fields(), hpack()].concat()
}

fn control() -> Vec<Case> {
    let raw = |length, kind, flags, stream, payload: &[u8]| {
        frame_of(length, kind, flags, stream, payload)
    };
    vec![
        refused(
            "6.5/1",
            "SETTINGS with ACK and a payload",
            frame(kind::SETTINGS, flag::ACK, 0, [0]),
            &[FRAME_SIZE_ERROR],
        ),
        refused(
            "6.5/2",
            "SETTINGS of a stream",
            frame(kind::SETTINGS, 0, 1, [0, 3, 0, 0, 0, 100]),
            &[PROTOCOL_ERROR],
        ),
        case(
            "6.5/3",
            "SETTINGS of eight bytes",
            [send(raw(8, kind::SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100, 0, 2]))],
            StreamError(0, &[FRAME_SIZE_ERROR]),
        ),
        refused("6.5.2/1", "ENABLE_PUSH of 2", set(ENABLE_PUSH, 2), &[PROTOCOL_ERROR]),
        refused(
            "6.5.2/2",
            "INITIAL_WINDOW_SIZE beyond the largest",
            set(INITIAL_WINDOW_SIZE, MAX_WINDOW + 1),
            &[FLOW_CONTROL_ERROR],
        ),
        refused(
            "6.5.2/3",
            "MAX_FRAME_SIZE below the smallest",
            set(MAX_FRAME_SIZE, (1 << 14) - 1),
            &[PROTOCOL_ERROR],
        ),
        refused(
            "6.5.2/4",
            "MAX_FRAME_SIZE beyond the largest",
            set(MAX_FRAME_SIZE, 1 << 24),
            &[PROTOCOL_ERROR],
        ),
        case(
            "6.5.2/5",
            "an unknown setting",
            [send([set(0xff, 1), ping(PONG)].concat())],
            Pong(*PONG),
        ),
        case(
            "6.5.3/1",
            "a setting, twice: the last counts",
            [
                send(settings(&[(INITIAL_WINDOW_SIZE, 100), (INITIAL_WINDOW_SIZE, 1)])),
                wait(SettingsAck),
                send(request(1, GET)),
            ],
            Data(1, 1),
        ),
        case("6.5.3/2", "SETTINGS are acknowledged", [send(set(ENABLE_PUSH, 0))], SettingsAck),
        case("6.7/1", "PING is answered", [send(ping(PONG))], Pong(*PONG)),
        case(
            "6.7/2",
            "PING with ACK is not answered",
            [send([frame(kind::PING, flag::ACK, 0, b"no reply"), ping(PONG)].concat())],
            Pong(*PONG),
        ),
        refused("6.7/3", "PING of a stream", frame(kind::PING, 0, 1, PONG), &[PROTOCOL_ERROR]),
        refused("6.7/4", "PING of six bytes", frame(kind::PING, 0, 0, [0; 6]), &[FRAME_SIZE_ERROR]),
        refused(
            "6.8/1",
            "GOAWAY of a stream",
            frame(kind::GOAWAY, 0, 1, [0; 8]),
            &[PROTOCOL_ERROR],
        ),
    ]
}

fn windows() -> Vec<Case> {
    let twice =
        |stream| [window_update(stream, MAX_WINDOW), window_update(stream, MAX_WINDOW)].concat();
    vec![
        refused("6.9/1", "WINDOW_UPDATE of 0", window_update(0, 0), &[PROTOCOL_ERROR]),
        malformed(
            "6.9/2",
            "WINDOW_UPDATE of 0 of a stream",
            [begin(1, HOLD), window_update(1, 0)].concat(),
        ),
        refused(
            "6.9/3",
            "WINDOW_UPDATE of three bytes",
            frame(kind::WINDOW_UPDATE, 0, 0, [0, 0, 1]),
            &[FRAME_SIZE_ERROR],
        ),
        case(
            "6.9.1/1",
            "a window of 1",
            [send(set(INITIAL_WINDOW_SIZE, 1)), wait(SettingsAck), send(request(1, GET))],
            Data(1, 1),
        ),
        case(
            "6.9.1/2",
            "a connection's window beyond the largest",
            [send(twice(0))],
            Goaway(FLOW_CONTROL_ERROR),
        ),
        case(
            "6.9.1/3",
            "a stream's window beyond the largest",
            [send([begin(1, HOLD), twice(1)].concat())],
            Reset(1, FLOW_CONTROL_ERROR),
        ),
        case(
            "6.9.2/1",
            "INITIAL_WINDOW_SIZE changes the windows of open streams",
            [
                send(set(INITIAL_WINDOW_SIZE, 0)),
                wait(SettingsAck),
                send(request(1, GET)),
                wait(Expect::Status(1, 200)),
                send(set(INITIAL_WINDOW_SIZE, 1)),
                wait(SettingsAck),
            ],
            Data(1, 1),
        ),
        case(
            "6.9.2/2",
            "a window below zero",
            [
                send(set(INITIAL_WINDOW_SIZE, 3)),
                wait(SettingsAck),
                send(request(1, GET)),
                wait(Data(1, 3)),
                send(set(INITIAL_WINDOW_SIZE, 2)),
                wait(SettingsAck),
                send(window_update(1, 2)),
            ],
            Data(1, 1),
        ),
        refused(
            "6.9.2/3",
            "INITIAL_WINDOW_SIZE beyond the largest",
            frame(kind::SETTINGS, 0, 0, [0, 4, 0x80, 0, 0, 0]),
            &[FLOW_CONTROL_ERROR],
        ),
    ]
}

fn exchanges() -> Vec<Case> {
    let with_length =
        || headers(1, flag::END_HEADERS, [block(POST), field("content-length", "1")].concat());
    let promise = [3_u32.to_be_bytes().to_vec(), block(GET)].concat();
    vec![
        case("7/1", "GOAWAY with an unknown code", [send(goaway(0, UNDEFINED))], Closed),
        case(
            "7/2",
            "RST_STREAM with an unknown code",
            [send([begin(1, HOLD), reset(1, UNDEFINED), ping(PONG)].concat())],
            Pong(*PONG),
        ),
        malformed(
            "8.1/1",
            "trailers that end nothing",
            [
                begin(1, POST),
                data(1, 0, "test"),
                headers(1, flag::END_HEADERS, field("x-test", "ok")),
            ]
            .concat(),
        ),
        malformed(
            "8.1.2.6/1",
            "DATA of another length than content-length",
            [with_length(), data(1, flag::END_STREAM, "test")].concat(),
        ),
        malformed(
            "8.1.2.6/2",
            "DATA of another length than content-length, in two frames",
            [with_length(), data(1, 0, "test"), data(1, flag::END_STREAM, "test")].concat(),
        ),
        refused(
            "8.2/1",
            "PUSH_PROMISE",
            frame(kind::PUSH_PROMISE, flag::END_HEADERS, 1, promise),
            &[PROTOCOL_ERROR],
        ),
    ]
}

fn fields() -> Vec<Case> {
    let with = |fields: Fields<'_>| headers(1, flag::WHOLE, [block(GET), block(fields)].concat());
    let without = |name: &str| {
        let fields: Vec<_> = GET.iter().copied().filter(|(it, _)| *it != name).collect();
        request(1, &fields)
    };
    let path = |path| [&GET[..2], &[(":path", path)], &GET[3..]].concat();
    vec![
        malformed("8.1.2/1", "a name in upper case", with(&[("X-TEST", "ok")])),
        malformed("8.1.2.1/1", "an unknown pseudo-header field", with(&[(":test", "ok")])),
        malformed("8.1.2.1/2", "a pseudo-header field of answers", with(&[(":status", "200")])),
        malformed(
            "8.1.2.1/3",
            "a pseudo-header field in trailers",
            [
                begin(1, POST),
                data(1, 0, "test"),
                headers(1, flag::END_HEADERS, block(&[(":method", "POST")])),
            ]
            .concat(),
        ),
        malformed(
            "8.1.2.1/4",
            "a pseudo-header field after another field",
            headers(1, flag::WHOLE, [field("x-test", "ok"), block(GET)].concat()),
        ),
        malformed("8.1.2.2/1", "connection", with(&[("connection", "keep-alive")])),
        malformed("8.1.2.2/2", "te other than trailers", with(&[("te", "trailers, deflate")])),
        malformed("8.1.2.3/1", "an empty path", request(1, &path(""))),
        malformed("8.1.2.3/2", "no method", without(":method")),
        malformed("8.1.2.3/3", "no scheme", without(":scheme")),
        malformed("8.1.2.3/4", "no path", without(":path")),
        malformed("8.1.2.3/5", "two methods", request(1, &[&GET[..1], GET].concat())),
        malformed("8.1.2.3/6", "two schemes", request(1, &[&GET[1..2], GET].concat())),
        malformed("8.1.2.3/7", "two paths", request(1, &[&GET[2..3], GET].concat())),
    ]
}

/// RFC 7541. The Huffman codes are those of "private" in its appendix C.6.1,
/// spoilt: the last of their bits is padding.
fn hpack() -> Vec<Case> {
    let undecodable = |id, about, block: Vec<u8>| {
        refused(id, about, headers(1, flag::WHOLE, block), &[COMPRESSION_ERROR])
    };
    let value = |codes: &[u8]| [block(GET), vec![0], string("x-test"), huffman(codes)].concat();
    vec![
        undecodable(
            "hpack/2.3.3/1",
            "an index beyond the tables",
            [block(GET), vec![0xfe]].concat(),
        ),
        undecodable(
            "hpack/4.2/1",
            "a size of the dynamic table at the end",
            [block(GET), vec![0x21]].concat(),
        ),
        undecodable(
            "hpack/5.2/1",
            "padding of more than seven bits",
            value(b"\xae\xc3\x77\x1a\x4b\xff"),
        ),
        undecodable("hpack/5.2/2", "padding of zeros", value(b"\xae\xc3\x77\x1a\x4a")),
        undecodable(
            "hpack/5.2/3",
            "the end of strings in a string",
            value(b"\xff\xff\xff\xfc\x1f"),
        ),
        undecodable("hpack/6.1/1", "index 0", [block(GET), vec![0x80]].concat()),
        undecodable(
            "hpack/6.3/1",
            "a dynamic table beyond what is allowed",
            [integer(0x20, 5, 4097), block(GET)].concat(),
        ),
    ]
}
