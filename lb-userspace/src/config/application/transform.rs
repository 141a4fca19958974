//! Changes of a request before it is forwarded.

use regex::Regex;

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
            rewrite(value, "write { regex = \"^/api/(.*)$\", replace = \"/$1\" }")
        }),
        host_header_rewrite: host.and_then(|value| {
            rewrite(
                value,
                "write { regex = \"^(.*)\\\\.example\\\\.com$\", replace = \"$1.internal\" }",
            )
        }),
    };
    (transforms, url.or(host))
}

fn rewrite(value: Value<'_>, help: &str) -> Option<Rewrite> {
    let mut table = value.table(format!("`{}`", value.key()), help)?;
    let expression = table.required("regex", help).and_then(|it| regex(it, help, MAX_CHARACTERS));
    let replace = table.required("replace", help);
    table.finish();
    let expression = expression?;
    let replace = replace.and_then(|value| replacement(value, help, &expression))?;
    Some(Rewrite { regex: expression.to_string(), replace })
}

/// Every `$` with a number names parentheses that are there.
fn replacement(value: Value<'_>, help: &str, expression: &Regex) -> Option<String> {
    value.parsed(help, |text| {
        let right = |c: char| !c.is_control() && !c.is_whitespace();
        if text.len() > MAX_CHARACTERS || !text.chars().all(right) {
            return Err(Wrong::new(value.refusal(), help));
        }
        let groups = expression.captures_len() - 1;
        for part in text.split('$').skip(1) {
            let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
            let number: Option<usize> = digits.parse().ok();
            if number.is_none_or(|number| number > groups) {
                let message = format!(
                    "`replace` has \"${digits}\", but the regular expression has {groups} pairs \
                     of parentheses"
                );
                let help = match groups {
                    0 => "leave it out, or put ( ) around what it stands for".to_owned(),
                    1 => "write $1 for what the parentheses matched".to_owned(),
                    _ => format!("write $1 to ${groups} for what the parentheses matched"),
                };
                return Err(Wrong::new(message, help));
            }
        }
        Ok(text.to_owned())
    })
}
