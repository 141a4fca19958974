//! Regular expressions, as the configuration checks them and the proxy asks them.

use regex::bytes::{Regex, RegexBuilder};

/// Bound of a compiled regular expression, bytes: enough for anything a person writes, and too
/// little for `(a{1000}){1000}`.
const SIZE_LIMIT: usize = 1 << 20;

/// Compiles a regular expression: on bytes, without Unicode classes (as AWS), linear in time,
/// bounded in size.
///
/// # Errors
/// If it is none, or too big; the error says where and why.
pub fn compile(pattern: &str, ignore_case: bool) -> Result<Regex, regex::Error> {
    RegexBuilder::new(pattern)
        .case_insensitive(ignore_case)
        .unicode(false)
        .size_limit(SIZE_LIMIT)
        .dfa_size_limit(SIZE_LIMIT)
        .build()
}

#[cfg(test)]
mod tests {
    use super::compile;

    #[test]
    fn they_are_bounded() {
        assert!(compile("(a{1000}){1000}", false).is_err());
        assert!(compile("(a+)+$", false).is_ok_and(|regex| {
            !regex.is_match(&[b"a".repeat(100_000), b"b".to_vec()].concat())
        }));
    }

    #[test]
    fn they_are_of_bytes() {
        assert!(compile(r"\p{Greek}", false).is_err());
        assert!(compile("^/A.$", true).is_ok_and(|regex| regex.is_match(b"/a\xff")));
    }
}
