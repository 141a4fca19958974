//! How the corpus is written. A file has entries:
//!
//! ```text
//! # A comment.
//! == name-of-the-entry
//! key: value
//! |POST / HTTP/1.1\r\n
//! |Content-Length: 5\r\n\r\n
//! |hello
//! ```
//!
//! Lines that begin with `|` are what is sent, one behind the other, without the ends of the
//! file's own lines. In them, and in the values of keys where that is said:
//!
//! | written | means |
//! |---|---|
//! | `\r` `\n` `\t` `\v` `\f` `\0` `\\` `\xHH` | one byte |
//! | `{chunk TEXT}` | a chunk of that text: its size in hexadecimal, CR LF, the text, CR LF |
//! | `{end}` | the last chunk, without trailers |
//! | `{smuggled}` | a whole request for `/smuggled` |
//! | `{repeat N TEXT}` | the text, so many times |

use std::path::Path;

/// What an attacker would like to be read as a request.
pub const SMUGGLED: &[u8] = b"GET /smuggled HTTP/1.1\r\nHost: smuggled.net\r\n\r\n";

/// An entry of a file.
#[derive(Debug, Clone)]
pub struct Entry {
    pub name: String,
    keys: Vec<(String, String)>,
    /// The lines with `|`, without it.
    pub lines: Vec<String>,
}

impl Entry {
    /// The values of a key.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.keys.iter().filter(move |(it, _)| it == key).map(|(_, value)| value.as_str())
    }

    /// The only value of a key.
    pub fn one<'a>(&'a self, key: &'a str) -> Option<&'a str> {
        let mut values = self.all(key);
        let value = values.next();
        assert!(values.next().is_none(), "{}: {key} twice", self.name);
        value
    }

    /// What is sent.
    pub fn bytes(&self) -> Vec<u8> {
        self.lines.iter().flat_map(|line| bytes(line)).collect()
    }
}

/// The entries of a file of the corpus, which have no other keys than these.
pub fn read(file: &str, keys: &[&str]) -> Vec<Entry> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/smuggling/corpus").join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    let mut entries: Vec<Entry> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let place = || format!("{file}:{}", number + 1);
        if let Some(name) = line.strip_prefix("== ") {
            assert!(entries.iter().all(|it| it.name != name), "{}: {name} again", place());
            entries.push(Entry { name: name.to_owned(), keys: Vec::new(), lines: Vec::new() });
        } else if line.is_empty() || line.starts_with('#') {
        } else {
            let entry = entries.last_mut().unwrap_or_else(|| panic!("{}: no entry", place()));
            if let Some(line) = line.strip_prefix('|') {
                entry.lines.push(line.to_owned());
                continue;
            }
            let (key, value) = line.split_once(':').unwrap_or_else(|| panic!("{}", place()));
            assert!(keys.contains(&key), "{}: unknown key {key}", place());
            entry.keys.push((key.to_owned(), value.trim_ascii().to_owned()));
        }
    }
    entries
}

/// What a text in the notation means.
pub fn bytes(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        rest = match first {
            '\\' => escape(&rest[1..], &mut bytes),
            '{' => {
                let end = rest.find('}').unwrap_or_else(|| panic!("no end: {text}"));
                expand(&rest[1..end], &mut bytes);
                &rest[end + 1..]
            }
            _ => {
                bytes.extend_from_slice(&rest.as_bytes()[..first.len_utf8()]);
                &rest[first.len_utf8()..]
            }
        };
    }
    bytes
}

fn escape<'a>(rest: &'a str, bytes: &mut Vec<u8>) -> &'a str {
    let (byte, length) = match rest.as_bytes() {
        [b'r', ..] => (b'\r', 1),
        [b'n', ..] => (b'\n', 1),
        [b't', ..] => (b'\t', 1),
        [b'v', ..] => (0x0b, 1),
        [b'f', ..] => (0x0c, 1),
        [b'0', ..] => (0, 1),
        [b'\\', ..] => (b'\\', 1),
        [b'x', ..] => (u8::from_str_radix(&rest[1..3], 16).unwrap(), 3),
        _ => panic!("unknown escape: \\{rest}"),
    };
    bytes.push(byte);
    &rest[length..]
}

fn expand(word: &str, to: &mut Vec<u8>) {
    match word.split_once(' ').unwrap_or((word, "")) {
        ("end", "") => to.extend_from_slice(b"0\r\n\r\n"),
        ("smuggled", "") => to.extend_from_slice(SMUGGLED),
        ("chunk", text) => {
            let data = if text == "smuggled" { SMUGGLED.to_vec() } else { bytes(text) };
            to.extend(format!("{:x}\r\n", data.len()).bytes());
            to.extend(data);
            to.extend_from_slice(b"\r\n");
        }
        ("repeat", rest) => {
            let (count, text) = rest.split_once(' ').unwrap();
            to.extend(bytes(text).repeat(count.parse().unwrap()));
        }
        _ => panic!("unknown: {{{word}}}"),
    }
}

#[test]
fn notation() {
    assert_eq!(bytes(r"a\r\n\x00{chunk hello}{end}"), b"a\r\n\x005\r\nhello\r\n0\r\n\r\n");
    assert_eq!(bytes(r"{repeat 3 \t}ü"), "\t\t\tü".as_bytes());
    assert!(bytes("{chunk smuggled}").starts_with(b"2e\r\nGET /smuggled"));
}
