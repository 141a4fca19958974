//! What every server must take: h2spec's group "generic".

use super::peer::Expect;
use super::suite::{Case, case, send, wait};
use super::wire::{
    GET, HOLD, POST, begin, block, code, continuation, data, dependency, field, flag, goaway,
    headers, huffman, ping, preface, priority, request, reset, setting, settings, string,
    window_update,
};

const PONG: &[u8; 8] = b"anything";

fn answered(id: &'static str, about: &'static str, bytes: Vec<u8>) -> Case {
    case(id, about, [send(bytes)], Expect::Status(1, 200))
}

/// The first field's value of a request that is otherwise `GET`.
fn method(method: &str) -> Vec<(&str, &str)> {
    [(":method", method)].into_iter().chain(GET[1..].iter().copied()).collect()
}

pub fn cases() -> Vec<Case> {
    let pong = Expect::Pong(*PONG);
    let fence = ping(PONG);
    let no_window = send(settings(&[(setting::INITIAL_WINDOW_SIZE, 0)]));
    let mut cases = vec![
        case("generic/1/1", "the preface", [send(preface())], Expect::Preface).raw(),
        case(
            "generic/2/1",
            "PRIORITY of an idle stream",
            [send([priority(1, 0, false, 255), fence.clone()].concat())],
            pong.clone(),
        ),
        case(
            "generic/2/2",
            "WINDOW_UPDATE of a half-closed stream",
            [
                no_window.clone(),
                send(request(1, GET)),
                wait(Expect::Status(1, 200)),
                send(window_update(1, 1)),
            ],
            Expect::Data(1, 1),
        ),
        case(
            "generic/2/3",
            "PRIORITY of a half-closed stream",
            [
                no_window,
                send(request(1, GET)),
                wait(Expect::Status(1, 200)),
                send([priority(1, 0, false, 255), window_update(1, 1)].concat()),
            ],
            Expect::Data(1, 1),
        ),
        case(
            "generic/2/4",
            "RST_STREAM of a half-closed stream",
            [send([request(1, HOLD), reset(1, code::CANCEL), fence.clone()].concat())],
            pong.clone(),
        ),
        case(
            "generic/2/5",
            "PRIORITY of a closed stream",
            [
                send(request(1, GET)),
                wait(Expect::Ended(1)),
                send([priority(1, 0, false, 255), fence.clone()].concat()),
            ],
            pong.clone(),
        ),
        answered("generic/3.1/1", "DATA", [begin(1, POST), data(1, 1, "test")].concat()),
        answered(
            "generic/3.1/2",
            "DATA, twice",
            [begin(1, POST), data(1, 0, "test"), data(1, 1, "test")].concat(),
        ),
        answered(
            "generic/3.1/3",
            "DATA with padding",
            [begin(1, POST), data(1, flag::PADDED | flag::END_STREAM, b"\x06test\0\0\0\0\0\0")]
                .concat(),
        ),
        answered("generic/3.2/1", "HEADERS", request(1, GET)),
        answered(
            "generic/3.2/2",
            "HEADERS with padding",
            headers(1, flag::WHOLE | flag::PADDED, [vec![8], block(GET), vec![0; 8]].concat()),
        ),
        answered(
            "generic/3.2/3",
            "HEADERS with a priority",
            headers(
                1,
                flag::WHOLE | flag::PRIORITY,
                [dependency(0, false, 255), block(GET)].concat(),
            ),
        ),
        answered(
            "generic/3.3/1",
            "PRIORITY, the least",
            [priority(1, 0, false, 0), request(1, GET)].concat(),
        ),
        answered(
            "generic/3.3/2",
            "PRIORITY, the most",
            [priority(1, 0, false, 255), request(1, GET)].concat(),
        ),
        answered(
            "generic/3.3/3",
            "PRIORITY that depends on a stream",
            [priority(3, 1, false, 0), request(1, GET)].concat(),
        ),
        answered(
            "generic/3.3/4",
            "PRIORITY that excludes others",
            [priority(1, 0, true, 0), request(1, GET)].concat(),
        ),
        answered(
            "generic/3.3/5",
            "PRIORITY of a later stream",
            [priority(3, 0, false, 255), request(1, GET)].concat(),
        ),
        case(
            "generic/3.4/1",
            "RST_STREAM",
            [send([begin(1, HOLD), reset(1, code::CANCEL), fence.clone()].concat())],
            pong.clone(),
        ),
        case(
            "generic/3.5/1",
            "SETTINGS",
            [send(settings(&[
                (setting::HEADER_TABLE_SIZE, 4096),
                (setting::ENABLE_PUSH, 1),
                (setting::MAX_CONCURRENT_STREAMS, 100),
                (setting::INITIAL_WINDOW_SIZE, 65_535),
                (setting::MAX_FRAME_SIZE, 16_384),
                (setting::MAX_HEADER_LIST_SIZE, 100),
            ]))],
            Expect::SettingsAck,
        ),
        case("generic/3.7/1", "PING", [send(fence.clone())], pong.clone()),
        case("generic/3.8/1", "GOAWAY", [send(goaway(0, 0))], Expect::Closed),
        case(
            "generic/3.9/1",
            "WINDOW_UPDATE of the connection",
            [send([window_update(0, 1), fence].concat())],
            pong,
        ),
        answered(
            "generic/3.9/2",
            "WINDOW_UPDATE of a stream",
            [request(1, GET), window_update(1, 1)].concat(),
        ),
        answered("generic/3.10/1", "CONTINUATION", split(&[5])),
        answered("generic/3.10/2", "CONTINUATION, twice", split(&[5, 10])),
        answered("generic/4/1", "GET", request(1, GET)),
        answered("generic/4/2", "HEAD", request(1, &method("HEAD"))),
        answered("generic/4/3", "POST", [begin(1, POST), data(1, 1, "test")].concat()),
        answered(
            "generic/4/4",
            "POST with trailers",
            [
                headers(1, flag::END_HEADERS, [block(POST), field("trailer", "x-test")].concat()),
                data(1, 0, "test"),
                headers(1, flag::WHOLE, field("x-test", "ok")),
            ]
            .concat(),
        ),
    ];
    cases.extend(hpack());
    cases
}

/// A request whose block is cut there.
fn split(cuts: &[usize]) -> Vec<u8> {
    let block = block(GET);
    let mut frames = headers(1, flag::END_STREAM, &block[..cuts[0]]);
    for (n, &from) in cuts.iter().enumerate() {
        let to = cuts.get(n + 1).copied();
        let flags = if to.is_none() { flag::END_HEADERS } else { 0 };
        frames.extend(continuation(1, flags, &block[from..to.unwrap_or(block.len())]));
    }
    frames
}

/// RFC 7541 section 6. The Huffman codes are those of its appendix C.4.3.
fn hpack() -> Vec<Case> {
    const NAME: &[u8] = b"\x25\xa8\x49\xe9\x5b\xa9\x7d\x7f";
    const VALUE: &[u8] = b"\x25\xa8\x49\xe9\x5b\xb8\xe8\xb4\xbf";
    // `user-agent` is the 58th of the static table: more than four bits hold.
    let with_name = |first: &[u8], value| [first, value].concat();
    let new = |first: u8, name: Vec<u8>, value: Vec<u8>| [vec![first], name, value].concat();
    let plain = || (string("custom-key"), string("custom-value"));
    let coded = || (huffman(NAME), huffman(VALUE));
    let fields: [(&str, &str, Vec<u8>); 13] = [
        ("generic/5/1", "an indexed field", vec![0x80 | 58]),
        ("generic/5/2", "indexing, a known name", with_name(&[0x40 | 58], &string("test"))),
        ("generic/5/3", "indexing, a known name, Huffman", with_name(&[0x40 | 58], &coded().1)),
        ("generic/5/4", "indexing, a new name", new(0x40, plain().0, plain().1)),
        ("generic/5/5", "indexing, a new name, Huffman", new(0x40, coded().0, coded().1)),
        ("generic/5/6", "no indexing, a known name", with_name(&[0x0f, 43], &string("test"))),
        ("generic/5/7", "no indexing, a known name, Huffman", with_name(&[0x0f, 43], &coded().1)),
        ("generic/5/8", "no indexing, a new name", new(0, plain().0, plain().1)),
        ("generic/5/9", "no indexing, a new name, Huffman", new(0, coded().0, coded().1)),
        ("generic/5/10", "never indexed, a known name", with_name(&[0x1f, 43], &string("test"))),
        (
            "generic/5/11",
            "never indexed, a known name, Huffman",
            with_name(&[0x1f, 43], &coded().1),
        ),
        ("generic/5/12", "never indexed, a new name", new(0x10, plain().0, plain().1)),
        ("generic/5/13", "never indexed, a new name, Huffman", new(0x10, coded().0, coded().1)),
    ];
    let mut cases: Vec<_> = fields
        .into_iter()
        .map(|(id, about, it)| {
            answered(id, about, headers(1, flag::WHOLE, [block(GET), it].concat()))
        })
        .collect();
    for (id, about, update) in [
        ("generic/5/14", "a dynamic table of no size", &b"\x20"[..]),
        ("generic/5/15", "two sizes of the dynamic table", b"\x20\x3f\xe1\x1f"),
    ] {
        let block = [update, &block(GET)].concat();
        cases.push(answered(id, about, headers(1, flag::WHOLE, block)));
    }
    cases
}
