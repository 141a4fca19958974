//! Patterns with `*` and `?`, and regular expressions.

use regex::bytes::Regex;

use super::super::model::Pattern;
use super::super::reader::{Value, Wrong};
use crate::regular_expression;

/// AWS's, of every value of a condition.
pub(super) const MAX_CHARACTERS: usize = 128;

/// The elements of a list that must have some.
pub(super) fn elements<'a>(value: Value<'a>, help: &str) -> Vec<Value<'a>> {
    let Some(items) = value.items(help) else { return Vec::new() };
    if items.is_empty() {
        let message = format!("`{}` is [], which no request meets", value.key());
        value.error(message, help);
    }
    items
}

/// A list of patterns; `None` where one could not be read.
pub(super) fn wildcards(
    value: Value<'_>,
    help: &str,
    is_right: fn(&str) -> bool,
) -> Option<Vec<Pattern>> {
    let read = |item| Some(Pattern::Wildcard(text(item, help, is_right)?));
    all(elements(value, help).into_iter().map(read))
}

/// A list of regular expressions; `None` where one could not be read.
pub(super) fn regexes(value: Value<'_>, help: &str, ignore_case: bool) -> Option<Vec<Pattern>> {
    let read = |item| {
        let regex = regex(item, help, MAX_CHARACTERS, ignore_case)?;
        Some(Pattern::Regex(regex.as_str().to_owned()))
    };
    all(elements(value, help).into_iter().map(read))
}

/// Every element, though all are looked at before the first bad one makes the list worthless.
pub(super) fn all<T>(read: impl Iterator<Item = Option<T>>) -> Option<Vec<T>> {
    let read: Vec<Option<T>> = read.collect();
    if read.is_empty() { None } else { read.into_iter().collect() }
}

/// A text that is neither empty nor too long.
pub(super) fn text(value: Value<'_>, help: &str, is_right: fn(&str) -> bool) -> Option<String> {
    value.parsed(help, |text| {
        let length = text.chars().count();
        if length > MAX_CHARACTERS {
            return Err(too_long(value, length, MAX_CHARACTERS));
        }
        if text.is_empty() || !is_right(text) {
            return Err(Wrong::new(value.refusal(), help));
        }
        Ok(text.to_owned())
    })
}

/// A regular expression that the proxy can compile.
pub(super) fn regex(value: Value<'_>, help: &str, most: usize, ignore_case: bool) -> Option<Regex> {
    value.parsed(help, |text| {
        let length = text.chars().count();
        if length > most {
            return Err(too_long(value, length, most));
        }
        if text.is_empty() {
            return Err(Wrong::new(value.refusal(), help));
        }
        regular_expression::compile(text, ignore_case).map_err(|error| {
            // The last line says why, the others show where.
            let shown = error.to_string();
            let reason = shown.lines().last().unwrap_or_default();
            let reason = reason.strip_prefix("error: ").unwrap_or(reason);
            let message = format!("{} is no regular expression: {reason}", value.quote());
            Wrong::new(message, "https://docs.rs/regex/#syntax has the rules")
        })
    })
}

fn too_long(value: Value<'_>, length: usize, most: usize) -> Wrong {
    let message = format!("{} has {length} characters, {most} is the most", value.quote());
    Wrong::new(message, "write a shorter one")
}
