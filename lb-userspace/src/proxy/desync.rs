//! Desync mitigation: requests that servers may understand in different ways.
//!
//! Source: "Desync mitigation mode" and "Classification reasons" in AWS's guide to application load
//! balancers, and the documentation of AWS's http-desync-guardian, which names the same classes.
//! [`classify`] looks at a request that hyper has read, [`Class::handling`] says what a mode does.
//!
//! # What cannot arise here
//! hyper (with its `httparse`) is stricter than AWS's front end. It answers 400 by itself, in every
//! mode, and closes the connection, to
//!
//! | reason on AWS | what hyper refuses |
//! |---|---|
//! | `BadHeader`, `EmptyHeader` | NUL, CR or other control characters in fields, empty names, a blank before the colon, lines of blanks, folded lines |
//! | `AmbiguousUri`, `BadUri`, `SpaceInUri` | blanks and control characters in the URI |
//! | `BadMethod`, `BadVersion`, `NonCompliantVersion` | methods that are no tokens, versions other than 1.0 and 1.1 |
//! | `BadContentLength`, `MultipleContentLength` | anything but digits; values that differ |
//! | `UndefinedTransferEncodingSemantics`, in part | `Transfer-Encoding` in HTTP/1.0, or without `chunked` at its end |
//!
//! So `monitor` does not forward those, unlike AWS: there is no request that could be forwarded.
//!
//! And hyper takes away, before anybody sees them, a second equal `Content-Length` (RFC 9110
//! section 8.6 allows that) and the `Content-Length` beside a `Transfer-Encoding` (RFC 9112 section
//! 6.3 demands that; it closes the client's connection after the response). What goes to targets
//! has one of the two, written anew. So `DuplicateContentLength` (of HTTP/1.1; it is seen in HTTP/2)
//! and `BothTeClPresent` are harmless but neither noted, nor refused by `strictest`. Nor are lines
//! that end with a bare LF, which AWS's library calls acceptable.
//!
//! `tests/smuggling/` has requests of all kinds, and in `corpus/exceptions.txt` all that differ.

use hyper::Method;
use hyper::header::{self, HeaderMap, HeaderName};

use crate::config::model::DesyncMitigation;

/// How far a request is from the RFC. Ordered, the worst is the greatest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// As the RFC says.
    Compliant,
    /// Not quite, and no danger known.
    Acceptable,
    /// Servers may differ about where it ends.
    Ambiguous,
    /// Malformed, or made to be misunderstood.
    Severe,
}

/// Why, by AWS's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// `Content-Length: 0` with GET or HEAD.
    GetHeadZeroContentLength,
    /// A field's value is not ASCII.
    NonCompliantHeader,
    /// Several equal `Content-Length`.
    DuplicateContentLength,
    /// A name that others may take for `Transfer-Encoding` or `Content-Length`.
    SuspiciousHeader,
    /// `Content-Length` with GET or HEAD.
    UndefinedContentLengthSemantics,
    /// `Transfer-Encoding` with GET or HEAD.
    UndefinedTransferEncodingSemantics,
    /// `Content-Length` is no number.
    BadContentLength,
    /// `Transfer-Encoding` is no list of codings.
    BadTransferEncoding,
    /// Several different `Content-Length`.
    MultipleContentLength,
    /// `chunked` more than once.
    MultipleTransferEncodingChunked,
}

impl Class {
    /// Its name in access logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compliant => "Compliant",
            Self::Acceptable => "Acceptable",
            Self::Ambiguous => "Ambiguous",
            Self::Severe => "Severe",
        }
    }

    /// What becomes of such a request.
    pub fn handling(self, mode: DesyncMitigation) -> Handling {
        match (self, mode) {
            (Self::Compliant, _) | (_, DesyncMitigation::Monitor) => Handling::Forward,
            (Self::Severe, _) | (_, DesyncMitigation::Strictest) => Handling::Refuse,
            (Self::Acceptable, DesyncMitigation::Defensive) => Handling::Forward,
            (Self::Ambiguous, DesyncMitigation::Defensive) => Handling::ForwardAlone,
        }
    }
}

impl Reason {
    /// How bad it is.
    pub fn class(self) -> Class {
        match self {
            Self::GetHeadZeroContentLength | Self::NonCompliantHeader => Class::Acceptable,
            Self::DuplicateContentLength
            | Self::SuspiciousHeader
            | Self::UndefinedContentLengthSemantics
            | Self::UndefinedTransferEncodingSemantics => Class::Ambiguous,
            Self::BadContentLength
            | Self::BadTransferEncoding
            | Self::MultipleContentLength
            | Self::MultipleTransferEncodingChunked => Class::Severe,
        }
    }

    /// Its name in access logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::GetHeadZeroContentLength => "GetHeadZeroContentLength",
            Self::NonCompliantHeader => "NonCompliantHeader",
            Self::DuplicateContentLength => "DuplicateContentLength",
            Self::SuspiciousHeader => "SuspiciousHeader",
            Self::UndefinedContentLengthSemantics => "UndefinedContentLengthSemantics",
            Self::UndefinedTransferEncodingSemantics => "UndefinedTransferEncodingSemantics",
            Self::BadContentLength => "BadContentLength",
            Self::BadTransferEncoding => "BadTransferEncoding",
            Self::MultipleContentLength => "MultipleContentLength",
            Self::MultipleTransferEncodingChunked => "MultipleTransferEncodingChunked",
        }
    }
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handling {
    /// Forwarded as any other.
    Forward,
    /// Forwarded, and neither the client's nor the target's connection is used again.
    ForwardAlone,
    /// Answered with 400, and the client's connection is closed.
    Refuse,
}

/// The worst that a request's head has about it; `None`: it is compliant. The fields are those that
/// came, before anything is taken out.
pub fn classify(method: &Method, headers: &HeaderMap) -> Option<Reason> {
    let reasons = [
        content_length(method, headers),
        transfer_encoding(method, headers),
        headers.keys().any(is_suspicious).then_some(Reason::SuspiciousHeader),
        headers
            .values()
            .any(|value| !value.as_bytes().is_ascii())
            .then_some(Reason::NonCompliantHeader),
    ];
    // Of equals the first: `max_by_key` would take the last.
    reasons.into_iter().flatten().rev().max_by_key(|reason| reason.class())
}

fn has_no_body(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

fn content_length(method: &Method, headers: &HeaderMap) -> Option<Reason> {
    let values = headers.get_all(header::CONTENT_LENGTH).iter();
    let mut lengths = Vec::new();
    for member in values.flat_map(|value| value.as_bytes().split(|byte| *byte == b',')) {
        match number(member.trim_ascii()) {
            Some(length) => lengths.push(length),
            None => return Some(Reason::BadContentLength),
        }
    }
    let (first, others) = lengths.split_first()?;
    if others.iter().any(|other| other != first) {
        Some(Reason::MultipleContentLength)
    } else if !others.is_empty() {
        Some(Reason::DuplicateContentLength)
    } else if !has_no_body(method) {
        None
    } else if *first == 0 {
        Some(Reason::GetHeadZeroContentLength)
    } else {
        Some(Reason::UndefinedContentLengthSemantics)
    }
}

/// Digits only: what Rust parses may have a sign.
fn number(text: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(text).ok()?;
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

fn transfer_encoding(method: &Method, headers: &HeaderMap) -> Option<Reason> {
    const CODINGS: [&[u8]; 6] =
        [b"compress", b"deflate", b"gzip", b"identity", b"x-compress", b"x-gzip"];
    let mut chunked = 0;
    let mut is_there = false;
    for line in headers.get_all(header::TRANSFER_ENCODING) {
        is_there = true;
        for coding in line.as_bytes().split(|byte| *byte == b',') {
            let coding = trim_blanks(coding);
            if coding.eq_ignore_ascii_case(b"chunked") {
                chunked += 1;
            } else if !CODINGS.iter().any(|known| coding.eq_ignore_ascii_case(known)) {
                return Some(Reason::BadTransferEncoding);
            }
        }
    }
    if chunked > 1 {
        Some(Reason::MultipleTransferEncodingChunked)
    } else if is_there && has_no_body(method) {
        Some(Reason::UndefinedTransferEncodingSemantics)
    } else {
        None
    }
}

/// Only what RFC 9110 section 5.6.3 calls blanks, so that a form feed is none.
fn trim_blanks(mut text: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = text {
        text = rest;
    }
    text
}

/// Whether somebody who drops or replaces characters would read one of the two names.
fn is_suspicious(name: &HeaderName) -> bool {
    if *name == header::TRANSFER_ENCODING || *name == header::CONTENT_LENGTH {
        return false;
    }
    let letters = || name.as_str().bytes().filter(u8::is_ascii_alphabetic);
    letters().eq(*b"transferencoding") || letters().eq(*b"contentlength")
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    fn reason(method: Method, fields: &[(&str, &str)]) -> Option<&'static str> {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            headers.append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        classify(&method, &headers).map(Reason::name)
    }

    #[test]
    fn compliant() {
        assert_eq!(reason(Method::GET, &[("host", "a"), ("x-empty", "")]), None);
        assert_eq!(reason(Method::POST, &[("content-length", "0")]), None);
        assert_eq!(reason(Method::POST, &[("content-length", "18446744073709551615")]), None);
        assert_eq!(reason(Method::POST, &[("transfer-encoding", " Chunked\t")]), None);
        assert_eq!(reason(Method::POST, &[("transfer-encoding", "gzip, chunked")]), None);
        assert_eq!(
            reason(Method::POST, &[("content-lengths", "1"), ("x-content-length", "1")]),
            None
        );
    }

    #[test]
    fn documented_reasons() {
        fn get(fields: &[(&str, &str)]) -> Option<&'static str> {
            reason(Method::GET, fields)
        }
        fn post(fields: &[(&str, &str)]) -> Option<&'static str> {
            reason(Method::POST, fields)
        }
        assert_eq!(get(&[("content-length", "0")]), Some("GetHeadZeroContentLength"));
        assert_eq!(get(&[("content-length", "1")]), Some("UndefinedContentLengthSemantics"));
        assert_eq!(
            reason(Method::HEAD, &[("transfer-encoding", "chunked")]),
            Some("UndefinedTransferEncodingSemantics")
        );
        assert_eq!(get(&[("x", "\u{fc}")]), Some("NonCompliantHeader"));
        let twice = |one, other| post(&[("content-length", one), ("content-length", other)]);
        assert_eq!(twice("5", "5"), Some("DuplicateContentLength"));
        assert_eq!(twice("5", "6"), Some("MultipleContentLength"));
        assert_eq!(post(&[("content-length", "5, 5")]), Some("DuplicateContentLength"));
        assert_eq!(post(&[("content-length", "5,6")]), Some("MultipleContentLength"));
        for bad in ["", "+5", "-1", "0x5", "5 5", "5,", "18446744073709551616", "5\u{a0}"] {
            assert_eq!(post(&[("content-length", bad)]), Some("BadContentLength"), "{bad}");
        }
        for bad in
            ["", "xchunked", "chunked;a", "chun ked", "\"chunked\"", "chunked,", "chunk\u{e4}d"]
        {
            assert_eq!(post(&[("transfer-encoding", bad)]), Some("BadTransferEncoding"), "{bad}");
        }
        assert_eq!(
            post(&[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")]),
            Some("MultipleTransferEncodingChunked")
        );
        assert_eq!(
            post(&[("transfer-encoding", "chunked, chunked")]),
            Some("MultipleTransferEncodingChunked")
        );
        for name in [
            "transfer_encoding",
            "Content_Length",
            "content.length",
            "contentlength",
            "-content-length",
            "transfer-encoding1",
        ] {
            assert_eq!(get(&[(name, "chunked")]), Some("SuspiciousHeader"), "{name}");
        }
    }

    #[test]
    fn the_worst_counts() {
        let fields = [("x", "\u{fc}"), ("content-length", "5"), ("transfer_encoding", "chunked")];
        assert_eq!(reason(Method::POST, &fields), Some("SuspiciousHeader"));
        assert_eq!(reason(Method::GET, &fields), Some("UndefinedContentLengthSemantics"));
        assert_eq!(
            reason(Method::GET, &[("x", "\u{fc}"), ("content-length", "x")]),
            Some("BadContentLength")
        );
    }

    #[test]
    fn documented_handling() {
        use DesyncMitigation::{Defensive, Monitor, Strictest};
        use Handling::{Forward, ForwardAlone, Refuse};
        let table = [
            (Class::Compliant, [Forward, Forward, Forward]),
            (Class::Acceptable, [Forward, Forward, Refuse]),
            (Class::Ambiguous, [Forward, ForwardAlone, Refuse]),
            (Class::Severe, [Forward, Refuse, Refuse]),
        ];
        for (class, handling) in table {
            assert_eq!([Monitor, Defensive, Strictest].map(|mode| class.handling(mode)), handling);
        }
    }
}
