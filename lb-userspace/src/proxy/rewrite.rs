//! Changes of a request by regular expression before it is forwarded.
//!
//! Source: "Transforms for listener rules" in AWS's guide to application load balancers. What the
//! expression matches first is replaced; if it matches nothing, the request stays as it is; if the
//! result is nothing that can be asked for, the request fails (500 on AWS). Rules have been decided
//! before: a rewrite does not change which one applies.
//!
//! In the replacement `$1` to `$99` stand for groups of the expression, `$0` for all that it
//! matched, `${1}` for a group with a digit behind it, and `$$` for a dollar. A group that does
//! not exist or took no part is empty.

use hyper::http::uri::PathAndQuery;
use regex::bytes::{Captures, Regex};

use super::headers::MAX_REQUEST_LINE;
use super::host::Host;
use super::rules::CompileError;
use crate::config::model;
use crate::regular_expression;

/// A compiled [`model::Rewrite`].
#[derive(Debug, Clone)]
pub struct Rewrite {
    regex: Regex,
    replacement: Box<[Part]>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Literal(Box<[u8]>),
    Group(usize),
}

/// The expression matched, and what came out cannot be a request's. The answer is 500.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RewriteFailed;

impl Rewrite {
    /// Compiles a rewrite.
    ///
    /// # Errors
    /// If the expression is none, or too big.
    pub fn compile(rewrite: &model::Rewrite, ignore_case: bool) -> Result<Self, CompileError> {
        let regex = regular_expression::compile(&rewrite.regex, ignore_case)
            .map_err(|error| CompileError::regex(&rewrite.regex, &error))?;
        let replacement = parts(&rewrite.replace, regex.captures_len()).into();
        Ok(Self { regex, replacement })
    }

    /// Path and query after the rewrite; `None`: as they were. Both are one text to the
    /// expression, with the question mark between them.
    ///
    /// # Errors
    /// If the result does not begin with a slash, has bytes that no URI has, or is longer than
    /// AWS lets request lines be.
    pub fn url(&self, path_and_query: &str) -> Result<Option<PathAndQuery>, RewriteFailed> {
        let Some(rewritten) = self.apply(path_and_query, MAX_REQUEST_LINE)? else {
            return Ok(None);
        };
        if !rewritten.starts_with(b"/") || !rewritten.iter().all(u8::is_ascii_graphic) {
            return Err(RewriteFailed);
        }
        PathAndQuery::try_from(rewritten).map(Some).map_err(|_| RewriteFailed)
    }

    /// The host after the rewrite; `None`: as it was. The expression sees the name without its
    /// port, which stays if the result names none.
    ///
    /// # Errors
    /// If the result is no host, or longer than 255 bytes.
    pub fn host(&self, host: &str) -> Result<Option<String>, RewriteFailed> {
        let before = Host::parse(host).ok_or(RewriteFailed)?;
        let Some(rewritten) = self.apply(before.name, 255)? else { return Ok(None) };
        let rewritten = String::from_utf8(rewritten).map_err(|_| RewriteFailed)?;
        let after = Host::parse(&rewritten).filter(|it| !it.name.is_empty());
        match (after.ok_or(RewriteFailed)?, before.port) {
            (Host { name, port: None }, Some(port)) => Ok(Some(format!("{name}:{port}"))),
            _ => Ok(Some(rewritten)),
        }
    }

    fn apply(&self, text: &str, limit: usize) -> Result<Option<Vec<u8>>, RewriteFailed> {
        let Some(captures) = self.regex.captures(text.as_bytes()) else { return Ok(None) };
        let Some(matched) = captures.get(0) else { return Ok(None) };
        let (before, after) =
            (&text.as_bytes()[..matched.start()], &text.as_bytes()[matched.end()..]);
        let mut result = before.to_vec();
        for part in &self.replacement {
            result.extend_from_slice(part.of(&captures));
            // A hundred times the whole path is not to be built first and refused then.
            if result.len() > limit {
                return Err(RewriteFailed);
            }
        }
        result.extend_from_slice(after);
        if result.len() > limit { Err(RewriteFailed) } else { Ok(Some(result)) }
    }
}

impl Part {
    fn of<'a>(&'a self, captures: &'a Captures<'_>) -> &'a [u8] {
        match self {
            Self::Literal(literal) => literal,
            Self::Group(group) => captures.get(*group).map_or(&[], |group| group.as_bytes()),
        }
    }
}

/// Takes a replacement apart. The regex crate's own syntax takes `$1a` for a group of that name.
fn parts(replacement: &str, groups: usize) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut literal = Vec::new();
    let mut rest = replacement;
    while let Some(dollar) = rest.find('$') {
        literal.extend_from_slice(&rest.as_bytes()[..dollar]);
        rest = &rest[dollar + 1..];
        if let Some(behind) = rest.strip_prefix('$') {
            literal.push(b'$');
            rest = behind;
        } else if let Some((group, behind)) = group(rest, groups) {
            if !literal.is_empty() {
                parts.push(Part::Literal(std::mem::take(&mut literal).into()));
            }
            parts.push(Part::Group(group));
            rest = behind;
        } else {
            literal.push(b'$');
        }
    }
    literal.extend_from_slice(rest.as_bytes());
    if !literal.is_empty() {
        parts.push(Part::Literal(literal.into()));
    }
    parts
}

/// The number behind a dollar: two digits if there is such a group, else one.
fn group(text: &str, groups: usize) -> Option<(usize, &str)> {
    if let Some((number, behind)) = text.strip_prefix('{').and_then(|text| text.split_once('}')) {
        let digits = (1..=2).contains(&number.len()) && number.bytes().all(|b| b.is_ascii_digit());
        return digits.then(|| number.parse().ok()).flatten().map(|number| (number, behind));
    }
    let digits = text.bytes().take(2).take_while(u8::is_ascii_digit).count();
    let numbered = |digits: usize| {
        let (number, behind) = text.split_at_checked(digits)?;
        Some((number.parse().ok()?, behind))
    };
    match digits {
        2 => numbered(2).filter(|(group, _)| *group < groups).or_else(|| numbered(1)),
        _ => numbered(digits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewrite(regex: &str, replace: &str) -> Rewrite {
        let rewrite = model::Rewrite { regex: regex.to_owned(), replace: replace.to_owned() };
        Rewrite::compile(&rewrite, true).unwrap()
    }

    fn url(regex: &str, replace: &str, url: &str) -> Result<Option<String>, RewriteFailed> {
        Ok(rewrite(regex, replace).url(url)?.map(|url| url.to_string()))
    }

    fn rewritten(url: &str) -> Result<Option<String>, RewriteFailed> {
        Ok(Some(url.to_owned()))
    }

    #[test]
    fn documented_examples() {
        assert_eq!(
            url("^/dp/([A-Za-z0-9]+)/?$", "/product.php?id=$1", "/dp/B09G3HRMW"),
            rewritten("/product.php?id=B09G3HRMW")
        );
        assert_eq!(
            rewrite("^mywebsite-(.+).com$", "internal.dev.$1.myweb.com")
                .host("mywebsite-example.com"),
            rewritten("internal.dev.example.myweb.com")
        );
        assert_eq!(url(r"^\/api\/(.+)$", "/$1", "/api/v1?a=b"), rewritten("/v1?a=b"));
    }

    #[test]
    fn no_match_leaves_it() {
        assert_eq!(url("^/api/", "/", "/other"), Ok(None));
        assert_eq!(rewrite("^a$", "b").host("c"), Ok(None));
        assert_eq!(rewrite("^a$", "b").host("a:8000"), Ok(Some("b:8000".to_owned())));
        assert_eq!(rewrite("^a$", "b:1").host("a:8000"), Ok(Some("b:1".to_owned())));
        assert_eq!(rewrite("^a:8000$", "b").host("a:8000"), Ok(None));
    }

    #[test]
    fn only_the_first_match_is_replaced() {
        assert_eq!(url("a", "b", "/aaa"), rewritten("/baa"));
    }

    #[test]
    fn groups_with_text_behind_them() {
        assert_eq!(url("^/(a)(b)", "/$1x$2", "/abc"), rewritten("/axbc"));
        assert_eq!(url("^/(a)", "/${1}0", "/a"), rewritten("/a0"));
        assert_eq!(url("^/(a)", "/$10", "/a"), rewritten("/a0"));
        assert_eq!(url("^/(a)", "/$2", "/a"), rewritten("/"));
        assert_eq!(url("^/a", "/$$$", "/a"), rewritten("/$$"));
        assert_eq!(url("^/a", "$0$0", "/a"), rewritten("/a/a"));
        assert_eq!(url("^/a", "/$x", "/a"), rewritten("/$x"));
    }

    #[test]
    fn what_cannot_be_asked_for_fails() {
        assert_eq!(url("^/a", "a", "/a"), Err(RewriteFailed));
        assert_eq!(url("^/a", "/a b", "/a"), Err(RewriteFailed));
        assert_eq!(url("^/a", "/a\r\nX: y", "/a"), Err(RewriteFailed));
        assert_eq!(url("^/a", "/ä", "/a"), Err(RewriteFailed));
        assert_eq!(url("^.*$", "", "/a"), Err(RewriteFailed));
        let long = format!("/{}", "a".repeat(10_000));
        assert_eq!(url("^(.*)$", "$1$1$1$1$1$1$1$1", &long), Err(RewriteFailed));
        for host in ["", "a b", "a/b", "user@a", "a\r\nb", "a:b"] {
            assert_eq!(rewrite("^.*$", host).host("x"), Err(RewriteFailed), "{host}");
        }
    }
}
