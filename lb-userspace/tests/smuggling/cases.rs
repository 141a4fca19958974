//! What is expected of a request of the corpus, by AWS's classes and modes and by RFC 9112, and the
//! exceptions from that.

use std::fmt;

use lb_userspace::config::model::DesyncMitigation::{self, Defensive, Monitor, Strictest};

use crate::notation::{self, Entry};

/// The files with requests of HTTP/1.
const FILES: [&str; 9] = [
    "length.txt",
    "transfer.txt",
    "chunks.txt",
    "lines.txt",
    "targets.txt",
    "hosts.txt",
    "fields.txt",
    "connections.txt",
    "pipelines.txt",
];

const KEYS: [&str; 6] = ["why", "class", "answers", "refused", "sees", "truncated"];

pub const MODES: [DesyncMitigation; 3] = [Monitor, Defensive, Strictest];

/// What a target takes a request for.
#[derive(Clone, PartialEq, Eq)]
pub struct Seen {
    pub method: String,
    pub target: String,
    pub body: Vec<u8>,
}

/// What becomes of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// The statuses that the client sees.
    pub answers: Vec<u16>,
    /// Whether the client's connection ends then.
    pub closes: bool,
    /// Whether the connection to the target is not used again.
    pub alone: bool,
    /// What the target sees.
    pub sees: Vec<Seen>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Compliant,
    Acceptable,
    Ambiguous,
    Severe,
    /// Not among AWS's reasons; RFC 9112 says that it is answered with an error.
    Malformed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Handling {
    Forward,
    Alone,
    Refuse,
}

/// AWS's reasons ("Classification reasons" in its guide, and what http-desync-guardian adds for raw
/// requests), with their classes.
fn class_of(reason: &str) -> Option<Class> {
    Some(match reason {
        "Compliant" => Class::Compliant,
        "GetHeadZeroContentLength"
        | "NonCompliantHeader"
        | "NonCompliantVersion"
        | "SpaceInUri"
        | "NonCrLfLineTermination" => Class::Acceptable,
        "AmbiguousUri"
        | "BothTeClPresent"
        | "DuplicateContentLength"
        | "EmptyHeader"
        | "MissingHeaderColon"
        | "MissingLastEmptyLine"
        | "MissingUri"
        | "MultilineHeader"
        | "SuspiciousHeader"
        | "UndefinedContentLengthSemantics"
        | "UndefinedTransferEncodingSemantics" => Class::Ambiguous,
        "BadContentLength"
        | "BadHeader"
        | "BadMethod"
        | "BadTransferEncoding"
        | "BadUri"
        | "BadVersion"
        | "MultipleContentLength"
        | "MultipleTransferEncodingChunked" => Class::Severe,
        "Malformed" => Class::Malformed,
        _ => return None,
    })
}

/// AWS's "Desync mitigation mode".
fn handling(class: Class, mode: DesyncMitigation) -> Handling {
    match (class, mode) {
        (Class::Malformed, _) => Handling::Refuse,
        (Class::Compliant, _) | (_, Monitor) => Handling::Forward,
        (Class::Severe, _) | (_, Strictest) => Handling::Refuse,
        (Class::Acceptable, Defensive) => Handling::Forward,
        (Class::Ambiguous, Defensive) => Handling::Alone,
    }
}

/// A request of the corpus.
#[derive(Debug, Clone)]
pub struct Case {
    pub name: String,
    pub raw: Vec<u8>,
    class: Class,
    /// The statuses that the client sees where it is forwarded, and whether the connection ends.
    answers: (Vec<u16>, bool),
    refused: u16,
    sees: Vec<Seen>,
    /// Whether the target may see a part of a request whose rest does not come.
    pub truncated: bool,
}

impl Case {
    fn of(entry: &Entry) -> Self {
        let name = entry.name.clone();
        assert!(entry.one("why").is_some(), "{name}: why?");
        let reason = entry.one("class").unwrap_or_else(|| panic!("{name}: which class?"));
        let class = class_of(reason).unwrap_or_else(|| panic!("{name}: {reason}?"));
        let case = Self {
            raw: entry.bytes(),
            class,
            answers: answers(entry.one("answers").unwrap_or("200")),
            refused: entry.one("refused").map_or(400, |it| it.parse().unwrap()),
            sees: entry.all("sees").map(Seen::of).collect(),
            truncated: entry.one("truncated") == Some("yes"),
            name,
        };
        // What is always refused has nothing to say about being forwarded.
        let forwarded = case.answers.0.iter().filter(|&&it| it == 200).count();
        let is_said = case.class < Class::Severe;
        assert!(!is_said || forwarded == case.sees.len(), "{}: answers, sees", case.name);
        case
    }

    /// What AWS and the RFC say.
    pub fn expected(&self, mode: DesyncMitigation) -> Expected {
        self.handled(handling(self.class, mode))
    }

    fn handled(&self, handling: Handling) -> Expected {
        let (answers, closes) = self.answers.clone();
        let forwarded = Expected { answers, closes, alone: false, sees: self.sees.clone() };
        handled(handling, forwarded, self.refused)
    }
}

fn handled(handling: Handling, mut forwarded: Expected, refused: u16) -> Expected {
    match handling {
        Handling::Forward => forwarded,
        Handling::Alone => {
            forwarded.answers.truncate(1);
            forwarded.sees.truncate(1);
            Expected { closes: true, alone: true, ..forwarded }
        }
        Handling::Refuse => {
            Expected { answers: vec![refused], closes: true, alone: false, sees: Vec::new() }
        }
    }
}

/// What becomes of a request, for one of AWS's reasons, if this becomes of it where it is forwarded.
pub fn in_mode(reason: &str, mode: DesyncMitigation, forwarded: Expected) -> Expected {
    let class = class_of(reason).unwrap_or_else(|| panic!("{reason}?"));
    handled(handling(class, mode), forwarded, 400)
}

/// Statuses, and `close`.
fn answers(text: &str) -> (Vec<u16>, bool) {
    let words = text.split(' ');
    let statuses = words.clone().filter(|it| *it != "close").map(|it| it.parse().unwrap());
    (statuses.collect(), words.clone().any(|it| it == "close"))
}

impl Seen {
    /// `METHOD TARGET BODY`, target and body in the notation.
    pub fn of(text: &str) -> Self {
        let mut words = text.splitn(3, ' ');
        let mut word = || words.next().unwrap_or("");
        let method = word().to_owned();
        let target = String::from_utf8(notation::bytes(word())).unwrap();
        Self { method, target, body: notation::bytes(word()) }
    }
}

impl fmt::Debug for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let body = String::from_utf8_lossy(&self.body);
        write!(f, "{} {} {body:?}", self.method, self.target)
    }
}

/// All requests of the corpus.
pub fn all() -> Vec<Case> {
    FILES.iter().flat_map(|file| notation::read(file, &KEYS)).map(|it| Case::of(&it)).collect()
}

/// What differs from AWS and the RFC, and why. `exceptions.txt` has the reasons.
pub struct Exceptions(Vec<Entry>);

impl Exceptions {
    /// Reads them, for these cases.
    pub fn read(cases: &[Case]) -> Self {
        let entries = notation::read("exceptions.txt", &["why", "modes", "becomes", "cases"]);
        for entry in &entries {
            assert!(entry.one("why").is_some(), "{}: why?", entry.name);
            for name in entry.all("cases").flat_map(|it| it.split(' ')) {
                assert!(cases.iter().any(|it| it.name == name), "{}: {name}?", entry.name);
            }
        }
        Self(entries)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|entry| entry.name.as_str())
    }

    /// What is expected of a case with its exception, if it has one. An exception that changes
    /// nothing is an error: it has to go.
    pub fn expected(&self, case: &Case, mode: DesyncMitigation) -> Expected {
        let expected = case.expected(mode);
        let mode = format!("{mode:?}").to_lowercase();
        let mut named = self.0.iter().filter(|entry| {
            let has = |key, name: &str| entry.all(key).any(|it| it.split(' ').any(|it| it == name));
            has("cases", &case.name) && has("modes", &mode)
        });
        let Some(entry) = named.next() else { return expected };
        assert!(named.next().is_none(), "{}: two exceptions in {mode}", case.name);
        let excepted = match entry.one("becomes").unwrap() {
            "forwarded" => case.handled(Handling::Forward),
            "refused" => case.handled(Handling::Refuse),
            other => panic!("{}: {other}?", entry.name),
        };
        assert_ne!(excepted, expected, "{}: no exception in {mode}", case.name);
        excepted
    }
}
