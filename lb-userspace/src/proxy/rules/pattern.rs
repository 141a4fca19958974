//! What values are compared with, other than regular expressions: wildcard patterns.
//!
//! Wildcards are those of "Condition types for listener rules" in AWS's guide to application load
//! balancers: `*` is any bytes or none, `?` exactly one. A backslash before `*`, `?` or another
//! backslash takes its meaning ("`QueryStringKeyValuePair`" in the API reference); before anything
//! else it is itself. The whole value must match. Values are compared as they came, so a `?` is
//! one byte of a percent-encoded path.
//!
//! A comparison takes time linear in the value for patterns without `?` between two `*`, else at
//! most value times pattern, and both are bounded (16 KiB and what the configuration says).

use memchr::memmem;

/// A compiled wildcard pattern.
#[derive(Debug, Clone)]
pub struct Wildcard(Shape);

/// The common shapes are told apart because comparing them costs a few nanoseconds.
#[derive(Debug, Clone)]
enum Shape {
    /// No `*`, no `?`.
    Exact(Box<[u8]>),
    /// `abc*`.
    Prefix(Box<[u8]>),
    /// `*abc`.
    Suffix(Box<[u8]>),
    /// The rest.
    General(Box<General>),
}

/// `first * middle * middle * last`; one piece alone has no star around it.
#[derive(Debug, Clone)]
struct General {
    first: Piece,
    middle: Box<[Piece]>,
    /// `None`: there is no star, the first piece is everything.
    last: Option<Piece>,
}

/// Bytes between two stars.
#[derive(Debug, Clone)]
enum Piece {
    Literal(Box<memmem::Finder<'static>>),
    /// `None` is a `?`.
    WithAny(Box<[Option<u8>]>),
}

impl Wildcard {
    /// Compiles a pattern. With `lower_case` it becomes one for values in lower case.
    pub fn new(pattern: &str, lower_case: bool) -> Self {
        let mut pieces = split_at_stars(pattern, lower_case);
        let any = |piece: &[Option<u8>]| piece.iter().any(Option::is_none);
        let shape = match pieces.as_slice() {
            [only] if !any(only) => Shape::Exact(literal(only)),
            [prefix, last] if last.is_empty() && !any(prefix) => Shape::Prefix(literal(prefix)),
            [first, suffix] if first.is_empty() && !any(suffix) => Shape::Suffix(literal(suffix)),
            _ => {
                let last = (pieces.len() > 1).then(|| pieces.pop()).flatten();
                let mut pieces = pieces.into_iter().map(Piece::new);
                Shape::General(Box::new(General {
                    first: pieces.next().unwrap_or_else(|| Piece::new(Vec::new())),
                    middle: pieces.collect(),
                    last: last.map(Piece::new),
                }))
            }
        };
        Self(shape)
    }

    /// Whether the whole value matches.
    pub fn matches(&self, value: &[u8]) -> bool {
        match &self.0 {
            Shape::Exact(exact) => **exact == *value,
            Shape::Prefix(prefix) => value.starts_with(prefix),
            Shape::Suffix(suffix) => value.ends_with(suffix),
            Shape::General(general) => general.matches(value),
        }
    }

    /// What the value must be, if it can be one thing only.
    pub fn exact(&self) -> Option<&[u8]> {
        match &self.0 {
            Shape::Exact(exact) => Some(exact),
            _ => None,
        }
    }

    /// What every matching value begins with.
    pub fn literal_prefix(&self) -> &[u8] {
        match &self.0 {
            Shape::Exact(bytes) | Shape::Prefix(bytes) => bytes,
            Shape::Suffix(_) => &[],
            Shape::General(general) => match &general.first {
                Piece::Literal(finder) => finder.needle(),
                Piece::WithAny(_) => &[],
            },
        }
    }

    /// What every matching value ends with.
    pub fn literal_suffix(&self) -> &[u8] {
        match &self.0 {
            Shape::Exact(bytes) | Shape::Suffix(bytes) => bytes,
            Shape::Prefix(_) => &[],
            Shape::General(general) => match general.last.as_ref().unwrap_or(&general.first) {
                Piece::Literal(finder) => finder.needle(),
                Piece::WithAny(_) => &[],
            },
        }
    }
}

/// The pattern's bytes between its stars; a `?` is `None`.
fn split_at_stars(pattern: &str, lower_case: bool) -> Vec<Vec<Option<u8>>> {
    let mut pieces = vec![Vec::new()];
    let mut bytes = pattern.bytes().peekable();
    while let Some(byte) = bytes.next() {
        let (byte, escaped) = match (byte, bytes.peek()) {
            (b'\\', Some(&next @ (b'*' | b'?' | b'\\'))) => {
                bytes.next();
                (next, true)
            }
            _ => (byte, false),
        };
        let folded = if lower_case { byte.to_ascii_lowercase() } else { byte };
        match byte {
            b'*' if !escaped => pieces.push(Vec::new()),
            b'?' if !escaped => push(&mut pieces, None),
            _ => push(&mut pieces, Some(folded)),
        }
    }
    pieces
}

fn push(pieces: &mut [Vec<Option<u8>>], byte: Option<u8>) {
    if let Some(last) = pieces.last_mut() {
        last.push(byte);
    }
}

fn literal(piece: &[Option<u8>]) -> Box<[u8]> {
    piece.iter().flatten().copied().collect()
}

impl General {
    /// Each piece where it is found first: what one takes too early, no other needs.
    fn matches(&self, value: &[u8]) -> bool {
        let Some(mut rest) = self.first.strip_from_front(value) else { return false };
        let Some(last) = &self.last else { return rest.is_empty() };
        for piece in &self.middle {
            match piece.find(rest) {
                Some(end) => rest = &rest[end..],
                None => return false,
            }
        }
        rest.len().checked_sub(last.len()).is_some_and(|at| last.is(&rest[at..]))
    }
}

impl Piece {
    fn new(bytes: Vec<Option<u8>>) -> Self {
        if bytes.iter().all(Option::is_some) {
            Self::Literal(Box::new(memmem::Finder::new(&literal(&bytes)).into_owned()))
        } else {
            Self::WithAny(bytes.into())
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Literal(finder) => finder.needle().len(),
            Self::WithAny(bytes) => bytes.len(),
        }
    }

    /// Whether this is what the piece stands for; of the piece's length.
    fn is(&self, value: &[u8]) -> bool {
        match self {
            Self::Literal(finder) => finder.needle() == value,
            Self::WithAny(bytes) => {
                bytes.iter().zip(value).all(|(byte, have)| byte.is_none_or(|byte| byte == *have))
            }
        }
    }

    fn strip_from_front<'a>(&self, value: &'a [u8]) -> Option<&'a [u8]> {
        let (front, rest) = value.split_at_checked(self.len())?;
        self.is(front).then_some(rest)
    }

    /// Where its first occurrence ends.
    fn find(&self, value: &[u8]) -> Option<usize> {
        match self {
            Self::Literal(finder) => finder.find(value).map(|at| at + self.len()),
            Self::WithAny(bytes) => value
                .windows(bytes.len())
                .position(|window| self.is(window))
                .map(|at| at + bytes.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, value: &str) -> bool {
        Wildcard::new(pattern, false).matches(value.as_bytes())
    }

    /// The definition, read aloud; exponential.
    fn oracle(pattern: &[u8], value: &[u8]) -> bool {
        match (pattern, value) {
            ([], value) => value.is_empty(),
            ([b'\\', special @ (b'*' | b'?' | b'\\'), rest @ ..], [have, value @ ..]) => {
                special == have && oracle(rest, value)
            }
            ([b'\\', b'*' | b'?' | b'\\', ..], []) => false,
            ([b'*', rest @ ..], value) => {
                (0..=value.len()).any(|skipped| oracle(rest, &value[skipped..]))
            }
            ([b'?', rest @ ..], [_, value @ ..]) => oracle(rest, value),
            ([byte, rest @ ..], [have, value @ ..]) => byte == have && oracle(rest, value),
            (_, []) => false,
        }
    }

    #[test]
    fn documented_examples() {
        assert!(matches("*.example.com", "test.example.com"));
        assert!(!matches("*.example.com", "example.com"));
        assert!(matches("/img/*", "/img/picture.jpg"));
        assert!(matches("/img/*/pics", "/img/a/b/pics"));
        assert!(!matches("/img/*/pics", "/img/pics"));
        assert!(matches("*Chrome*", "Mozilla/5.0 Chrome/99"));
        assert!(matches("v?", "v1"));
        assert!(!matches("v?", "v"));
        assert!(!matches("v?", "v10"));
    }

    #[test]
    fn backslash_takes_the_meaning() {
        assert!(matches(r"a\*b", "a*b"));
        assert!(!matches(r"a\*b", "axb"));
        assert!(matches(r"a\?", "a?"));
        assert!(!matches(r"a\?", "ab"));
        assert!(matches(r"\\*", r"\anything"));
        assert!(matches(r"a\b", r"a\b"));
        assert!(matches(r"a\", r"a\"));
    }

    #[test]
    fn first_and_last_piece_do_not_share_bytes() {
        assert!(!matches("ab*ba", "aba"));
        assert!(matches("ab*ba", "abba"));
        assert!(!matches("a?*?b", "aab"));
        assert!(matches("a?*?b", "aaab"));
        assert!(matches("**", ""));
        assert!(!matches("?*", ""));
    }

    #[test]
    fn lower_case_is_of_the_pattern() {
        let pattern = Wildcard::new("*.Example.COM", true);
        assert!(pattern.matches(b"www.example.com"));
        assert!(!pattern.matches(b"www.Example.com"));
    }

    #[test]
    fn long_values_take_no_time() {
        // Quadratic or worse, this would run for minutes.
        let value = b"a".repeat(1 << 20);
        assert!(!matches("*aaaaaaaaaaaaaaaab*aaaaaaac*", std::str::from_utf8(&value).unwrap()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn as_the_oracle(pattern in r"[ab*?\\]{0,10}", value in r"[ab*?\\]{0,12}") {
            prop_assert_eq!(
                matches(&pattern, &value),
                oracle(pattern.as_bytes(), value.as_bytes()),
                "{} on {}", pattern, value
            );
        }

        #[test]
        fn literal_ends_are_some(pattern in r"[ab*?\\]{0,6}", value in r"[ab*?\\]{0,8}") {
            let wildcard = Wildcard::new(&pattern, false);
            if wildcard.matches(value.as_bytes()) {
                prop_assert!(value.as_bytes().starts_with(wildcard.literal_prefix()));
                prop_assert!(value.as_bytes().ends_with(wildcard.literal_suffix()));
            }
            if let Some(exact) = wildcard.exact() {
                prop_assert_eq!(wildcard.matches(value.as_bytes()), exact == value.as_bytes());
            }
        }
    }
}
