//! Changes of a request before it is forwarded.

use regex::bytes::Regex;

use super::super::model::{Rewrite, Transforms};
use super::super::reader::{Table, Value, Wrong};
use super::pattern::regex;

/// AWS's.
const MAX_CHARACTERS: usize = 1024;

/// The transforms, and where the file has the first.
pub(super) fn read<'a>(table: &mut Table<'a>) -> (Transforms, Option<Value<'a>>) {
    let url = table.optional("url_rewrite");
    let host = table.optional("host_header_rewrite");
    let transforms = Transforms {
        url_rewrite: url.and_then(|value| {
            rewrite(value, "write { regex = \"^/api/(.*)$\", replace = \"/$1\" }", false)
        }),
        host_header_rewrite: host.and_then(|value| {
            rewrite(
                value,
                "write { regex = \"^(.*)\\\\.example\\\\.com$\", replace = \"$1.internal\" }",
                true,
            )
        }),
    };
    (transforms, url.or(host))
}

fn rewrite(value: Value<'_>, help: &str, ignore_case: bool) -> Option<Rewrite> {
    let mut table = value.table(format!("`{}`", value.key()), help)?;
    let expression =
        table.required("regex", help).and_then(|it| regex(it, help, MAX_CHARACTERS, ignore_case));
    let replace = table.required("replace", help);
    table.finish();
    let expression = expression?;
    let replace = replace.and_then(|value| replacement(value, help, &expression))?;
    Some(Rewrite { regex: expression.as_str().to_owned(), replace })
}

/// Every `$1` or `${1}` names parentheses that are there; `$$` is a dollar.
fn replacement(value: Value<'_>, help: &str, expression: &Regex) -> Option<String> {
    value.parsed(help, |text| {
        let right = |c: char| !c.is_control() && !c.is_whitespace();
        if text.len() > MAX_CHARACTERS || !text.chars().all(right) {
            return Err(Wrong::new(value.refusal(), help));
        }
        let groups = expression.captures_len() - 1;
        let unknown = references(text).find(|number| *number > groups);
        let Some(number) = unknown else { return Ok(text.to_owned()) };
        let message = format!(
            "`replace` has ${number}, but the regular expression has {groups} pair(s) of \
             parentheses"
        );
        let help = match groups {
            0 => "leave it out, or put ( ) around what it stands for".to_owned(),
            1 => "write $1 for what the parentheses matched".to_owned(),
            _ => format!("write $1 to ${groups} for what the parentheses matched"),
        };
        Err(Wrong::new(message, help))
    })
}

/// The least numbers that `$` and `${ }` can stand for: with one pair of parentheses `$10` is `$1`
/// and a 0.
fn references(text: &str) -> impl Iterator<Item = usize> {
    let without_dollars = text.replace("$$", "");
    let parts: Vec<String> = without_dollars.split('$').skip(1).map(ToOwned::to_owned).collect();
    parts.into_iter().filter_map(|part| match part.strip_prefix('{') {
        Some(braced) => braced.split_once('}')?.0.parse().ok(),
        None => part.get(..1)?.parse().ok(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_replacement_refers_to() {
        let found = |text| references(text).collect::<Vec<_>>();
        assert_eq!(found("/$1/$2x$10"), [1, 2, 1]);
        assert_eq!(found("${1}0${12}"), [1, 12]);
        assert!(found("$$1 $x ${y} $").is_empty());
        assert_eq!(found("$$$3é"), [3]);
    }
}
