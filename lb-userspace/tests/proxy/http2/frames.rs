//! h2spec's group "http2", sections 3.5 to 6.4 and 6.10 of RFC 7540 (of RFC 9113: 3.4 to 6.4 and
//! 6.10): frames, blocks, streams.

use super::peer::Expect::{
    self, Closed, ConnectionError, Ended, Pong, Preface, Status, StreamError,
};
use super::suite::{Case, case, send, wait};
use super::wire::code::{
    CANCEL, COMPRESSION_ERROR, FRAME_SIZE_ERROR, PROTOCOL_ERROR, REFUSED_STREAM, STREAM_CLOSED,
};
use super::wire::{
    Fields, GET, HOLD, MAX_FRAME, POST, begin, block, continuation, data, dependency, field, flag,
    frame, frame_of, headers, kind, ping, preface, priority, request, reset,
};

const PONG: &[u8; 8] = b"anything";

/// One more field, in a block of its own.
const MORE: Fields<'_> = &[("x-test", "ok")];

fn refused(id: &'static str, about: &'static str, bytes: Vec<u8>, codes: &'static [u32]) -> Case {
    case(id, about, [send(bytes)], ConnectionError(codes))
}

/// A stream that its target keeps open, and then that.
fn on_stream(
    id: &'static str,
    about: &'static str,
    bytes: [Vec<u8>; 2],
    codes: &'static [u32],
) -> Case {
    case(id, about, [send(bytes.concat())], StreamError(1, codes))
}

/// After the end of an answer.
fn after_end(id: &'static str, about: &'static str, bytes: Vec<u8>, codes: &'static [u32]) -> Case {
    case(id, about, [send(request(1, GET)), wait(Ended(1)), send(bytes)], ConnectionError(codes))
}

fn ignored(id: &'static str, about: &'static str, bytes: Vec<u8>) -> Case {
    case(id, about, [send(bytes)], Pong(*PONG))
}

pub fn cases() -> Vec<Case> {
    [begins(), formats(), streams(), frames(), continuations()].concat()
}

fn begins() -> Vec<Case> {
    vec![
        case("3.5/1", "the preface", [send(preface())], Preface).raw(),
        case("3.5/2", "no preface", [send("INVALID CONNECTION PREFACE\r\n\r\n")], Closed).raw(),
    ]
}

fn formats() -> Vec<Case> {
    let unknown = frame(kind::UNKNOWN, 0, 0, [0; 8]);
    // The highest bit is reserved.
    let reserved = 0x8000_0000;
    let large = field("x-large", vec![b'x'; MAX_FRAME]);
    vec![
        ignored("4.1/1", "an unknown type", [unknown.clone(), ping(PONG)].concat()),
        ignored("4.1/2", "undefined flags", frame(kind::PING, 0xfe, 0, PONG)),
        ignored("4.1/3", "the reserved bit", frame(kind::PING, 0, reserved, PONG)),
        case(
            "4.2/1",
            "DATA of the largest size",
            [send([begin(1, POST), data(1, flag::END_STREAM, [0; MAX_FRAME])].concat())],
            Status(1, 200),
        ),
        on_stream(
            "4.2/2",
            "DATA beyond the largest size",
            [begin(1, HOLD), data(1, flag::END_STREAM, [0; MAX_FRAME + 1])],
            &[FRAME_SIZE_ERROR],
        ),
        refused(
            "4.2/3",
            "HEADERS beyond the largest size",
            headers(1, flag::WHOLE, [block(GET), large].concat()),
            &[FRAME_SIZE_ERROR],
        ),
        refused(
            "4.3/1",
            "a block that is cut",
            headers(1, flag::WHOLE, [0x40]),
            &[COMPRESSION_ERROR],
        ),
        refused(
            "4.3/2",
            "PRIORITY in a block",
            [
                headers(1, 0, block(GET)),
                priority(1, 0, false, 255),
                continuation(1, flag::END_HEADERS, block(MORE)),
            ]
            .concat(),
            &[PROTOCOL_ERROR],
        ),
        refused(
            "4.3/3",
            "HEADERS of another stream in a block",
            [
                headers(1, 0, block(GET)),
                request(3, GET),
                continuation(1, flag::END_HEADERS, block(MORE)),
            ]
            .concat(),
            &[PROTOCOL_ERROR],
        ),
        ignored("5.5/1", "an extension", [unknown.clone(), ping(PONG)].concat()),
        refused(
            "5.5/2",
            "an extension in a block",
            [headers(1, flag::END_STREAM, block(GET)), unknown].concat(),
            &[PROTOCOL_ERROR],
        ),
    ]
}

fn streams() -> Vec<Case> {
    let more = || continuation(1, flag::END_HEADERS, block(MORE));
    let test = || data(1, flag::END_STREAM, "test");
    let cancelled = || [begin(1, HOLD), reset(1, CANCEL)].concat();
    let itself = dependency(1, false, 255);
    // A PING is about no stream.
    let invalid = frame(kind::PING, 0, 3, PONG);
    let too_many: Vec<u8> = (0..=STREAMS).flat_map(|n| request(2 * n + 1, HOLD)).collect();
    let window = super::wire::window_update(1, 100);
    vec![
        refused("5.1/1", "idle: DATA", test(), &[PROTOCOL_ERROR]),
        refused("5.1/2", "idle: RST_STREAM", reset(1, CANCEL), &[PROTOCOL_ERROR]),
        refused("5.1/3", "idle: WINDOW_UPDATE", window, &[PROTOCOL_ERROR]),
        refused(
            "5.1/4",
            "idle: CONTINUATION",
            continuation(1, flag::END_HEADERS, block(GET)),
            &[PROTOCOL_ERROR],
        ),
        on_stream("5.1/5", "half-closed: DATA", [request(1, HOLD), test()], &[STREAM_CLOSED]),
        on_stream(
            "5.1/6",
            "half-closed: HEADERS",
            [request(1, HOLD), request(1, GET)],
            &[STREAM_CLOSED],
        ),
        on_stream(
            "5.1/7",
            "half-closed: CONTINUATION",
            [request(1, HOLD), more()],
            &[STREAM_CLOSED, PROTOCOL_ERROR],
        ),
        on_stream("5.1/8", "reset: DATA", [cancelled(), test()], &[STREAM_CLOSED]),
        on_stream("5.1/9", "reset: HEADERS", [cancelled(), request(1, GET)], &[STREAM_CLOSED]),
        on_stream(
            "5.1/10",
            "reset: CONTINUATION",
            [cancelled(), more()],
            &[STREAM_CLOSED, PROTOCOL_ERROR],
        ),
        after_end("5.1/11", "closed: DATA", test(), &[STREAM_CLOSED]),
        after_end("5.1/12", "closed: HEADERS", request(1, GET), &[STREAM_CLOSED]),
        after_end("5.1/13", "closed: CONTINUATION", more(), &[STREAM_CLOSED, PROTOCOL_ERROR]),
        refused("5.1.1/1", "a stream of even number", request(2, GET), &[PROTOCOL_ERROR]),
        refused(
            "5.1.1/2",
            "a stream of lower number",
            [request(5, HOLD), request(3, GET)].concat(),
            &[PROTOCOL_ERROR],
        ),
        case(
            "5.1.1/3",
            "the same stream again",
            [send([request(5, HOLD), request(5, GET)].concat())],
            StreamError(5, &[STREAM_CLOSED]),
        ),
        case(
            "5.1.2/1",
            "more streams than allowed",
            [send(too_many)],
            StreamError(2 * STREAMS + 1, &[PROTOCOL_ERROR, REFUSED_STREAM]),
        ),
        on_stream(
            "5.3.1/1",
            "HEADERS that depend on themselves",
            [headers(1, flag::WHOLE | flag::PRIORITY, [itself, block(GET)].concat()), Vec::new()],
            &[PROTOCOL_ERROR],
        ),
        on_stream(
            "5.3.1/2",
            "PRIORITY that depends on itself",
            [priority(1, 1, false, 255), Vec::new()],
            &[PROTOCOL_ERROR],
        ),
        case("5.4.1/1", "an error ends the connection", [send(invalid.clone())], Closed),
        case("5.4.1/2", "an error is told", [send(invalid)], Expect::Goaway(PROTOCOL_ERROR)),
    ]
}

/// Requests at a time on one connection, as SETTINGS say.
pub const STREAMS: u32 = 128;

fn frames() -> Vec<Case> {
    let more = || continuation(1, flag::END_HEADERS, block(MORE));
    let padded = |length: usize| flag::PADDED | if length == 0 { 0 } else { flag::END_STREAM };
    let whole = block(GET);
    vec![
        refused("6.1/1", "DATA of stream 0", data(0, flag::END_STREAM, "test"), &[PROTOCOL_ERROR]),
        on_stream(
            "6.1/2",
            "DATA of a stream that is not open",
            [request(1, HOLD), data(1, flag::END_STREAM, "test")],
            &[STREAM_CLOSED],
        ),
        refused(
            "6.1/3",
            "DATA with more padding than payload",
            [
                headers(1, flag::END_HEADERS, [block(HOLD), field("content-length", "4")].concat()),
                data(1, padded(4), b"\x06Test"),
            ]
            .concat(),
            &[PROTOCOL_ERROR],
        ),
        refused(
            "6.2/1",
            "PRIORITY after HEADERS that are not whole",
            [headers(1, 0, block(GET)), priority(1, 0, false, 255), more()].concat(),
            &[PROTOCOL_ERROR],
        ),
        refused(
            "6.2/2",
            "HEADERS of another stream after HEADERS that are not whole",
            [headers(1, 0, block(GET)), request(3, GET), more()].concat(),
            &[PROTOCOL_ERROR],
        ),
        refused("6.2/3", "HEADERS of stream 0", request(0, GET), &[PROTOCOL_ERROR]),
        on_stream(
            "6.2/4",
            "HEADERS with more padding than payload",
            [
                headers(
                    1,
                    flag::WHOLE | flag::PADDED,
                    [vec![whole.len() as u8 + 2], whole].concat(),
                ),
                Vec::new(),
            ],
            &[PROTOCOL_ERROR],
        ),
        refused("6.3/1", "PRIORITY of stream 0", priority(0, 0, false, 255), &[PROTOCOL_ERROR]),
        on_stream(
            "6.3/2",
            "PRIORITY of four bytes",
            [request(1, HOLD), frame(kind::PRIORITY, 0, 1, [0x80, 0, 0, 1])],
            &[FRAME_SIZE_ERROR],
        ),
        case(
            "6.3/3",
            "PRIORITY of a later stream",
            [send([priority(3, 0, false, 255), request(1, GET)].concat())],
            Status(1, 200),
        ),
        refused("6.4/1", "RST_STREAM of stream 0", reset(0, CANCEL), &[PROTOCOL_ERROR]),
        refused("6.4/2", "RST_STREAM of an idle stream", reset(1, CANCEL), &[PROTOCOL_ERROR]),
        on_stream(
            "6.4/3",
            "RST_STREAM of three bytes",
            [request(1, HOLD), frame_of(3, kind::RST_STREAM, 0, 1, [0; 3])],
            &[FRAME_SIZE_ERROR],
        ),
    ]
}

fn continuations() -> Vec<Case> {
    let open = || headers(1, flag::END_STREAM, block(GET));
    let more = |stream, flags| continuation(stream, flags, block(MORE));
    let refused =
        |id, about, bytes: &[Vec<u8>]| refused(id, about, bytes.concat(), &[PROTOCOL_ERROR]);
    vec![
        case(
            "6.10/1",
            "CONTINUATION, twice",
            [send([open(), more(1, 0), more(1, flag::END_HEADERS)].concat())],
            Status(1, 200),
        ),
        refused(
            "6.10/2",
            "DATA after CONTINUATION that is not the last",
            &[headers(1, 0, block(POST)), more(1, 0), data(1, flag::END_STREAM, "test")],
        ),
        refused("6.10/3", "CONTINUATION of stream 0", &[open(), more(0, flag::END_HEADERS)]),
        refused(
            "6.10/4",
            "CONTINUATION of HEADERS that are whole",
            &[request(1, HOLD), more(1, flag::END_HEADERS)],
        ),
        refused(
            "6.10/5",
            "CONTINUATION after the last",
            &[open(), more(1, flag::END_HEADERS), more(1, flag::END_HEADERS)],
        ),
        refused(
            "6.10/6",
            "CONTINUATION after DATA",
            &[headers(1, 0, block(POST)), data(1, flag::END_STREAM, "test"), more(1, 0)],
        ),
    ]
}
