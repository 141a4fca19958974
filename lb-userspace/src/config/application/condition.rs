//! The conditions of a rule: each key is one, and all must hold.

use super::super::model::{Condition, QueryPattern};
use super::super::reader::{Table, Value, Wrong};
use super::super::security_group::parse_network;
use super::pattern::{all, elements, regexes, text, wildcards};

/// The keys that make a rule one.
pub(super) const KEYS: &str = "`host_header`, `path_pattern`, `http_header`, \
                               `http_request_method`, `query_string` or `source_ip`";

/// What was read, and how many conditions the file has.
pub(super) struct Draft {
    pub(super) conditions: Vec<Condition>,
    pub(super) given: usize,
}

type Read = fn(Value<'_>) -> Option<Condition>;

pub(super) fn read(table: &mut Table<'_>) -> Draft {
    let mut draft = Draft { conditions: Vec::new(), given: 0 };
    let mut add = |given: bool, conditions: Vec<Condition>| {
        draft.given += usize::from(given);
        draft.conditions.extend(conditions);
    };
    let host = either(table, "host_header", "host_header_regex");
    add(host.is_some(), host.and_then(host_header).into_iter().collect());
    let path = either(table, "path_pattern", "path_pattern_regex");
    add(path.is_some(), path.and_then(path_pattern).into_iter().collect());
    let header = table.optional("http_header");
    add(header.is_some(), header.map(http_headers).unwrap_or_default());
    let single: [(&'static str, Read); 3] = [
        ("http_request_method", http_request_method),
        ("query_string", query_string),
        ("source_ip", source_ip),
    ];
    for (key, read) in single {
        let value = table.optional(key);
        add(value.is_some(), value.and_then(read).into_iter().collect());
    }
    draft
}

/// Patterns, or regular expressions.
enum Either<'a> {
    Wildcards(Value<'a>),
    Regexes(Value<'a>),
}

fn either<'a>(
    table: &mut Table<'a>,
    wildcards: &'static str,
    regexes: &'static str,
) -> Option<Either<'a>> {
    match (table.optional(wildcards), table.optional(regexes)) {
        (Some(_), Some(second)) => {
            let message = format!("{} has both `{wildcards}` and `{regexes}`", table.name());
            second.error(message, "leave one of them out: a regular expression can say both");
            Some(Either::Regexes(second))
        }
        (Some(value), None) => Some(Either::Wildcards(value)),
        (None, value) => value.map(Either::Regexes),
    }
}

const REGEX_HELP: &str = "write a list of regular expressions, such as [\"^/v[0-9]+/\"]";

fn host_header(given: Either<'_>) -> Option<Condition> {
    let help = "write a list of hosts without ports, such as [\"www.example.com\", \
                \"*.example.org\"]; * stands for any characters, ? for one";
    let is_host = |host: &str| {
        host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._*?[]:".contains(&b))
            && (host.starts_with('[') || !host.contains(':'))
    };
    let patterns = match given {
        Either::Wildcards(value) => wildcards(value, help, is_host)?,
        Either::Regexes(value) => regexes(
            value,
            "write a list of regular expressions, such as [\"^(www|shop)\\\\.example\\\\.com$\"]",
            true,
        )?,
    };
    Some(Condition::HostHeader(patterns))
}

fn path_pattern(given: Either<'_>) -> Option<Condition> {
    let help = "write a list of paths, such as [\"/api/*\"], without a query; * stands for any \
                characters, ? for one";
    let is_path = |path: &str| {
        path.starts_with(['/', '*', '?']) && path.bytes().all(|b| b.is_ascii_graphic() && b != b'#')
    };
    let patterns = match given {
        Either::Wildcards(value) => wildcards(value, help, is_path)?,
        Either::Regexes(value) => regexes(value, REGEX_HELP, false)?,
    };
    Some(Condition::PathPattern(patterns))
}

const HEADER_HELP: &str = "write { name = \"X-Beta\", values = [\"yes*\"] }, or a list of such \
                           tables, all of which must hold";

fn http_headers(value: Value<'_>) -> Vec<Condition> {
    if value.is_table() {
        return http_header(value).into_iter().collect();
    }
    elements(value, HEADER_HELP).into_iter().filter_map(http_header).collect()
}

fn http_header(value: Value<'_>) -> Option<Condition> {
    let mut table = value.table("this header condition", HEADER_HELP)?;
    let name = table.required("name", "add name = \"X-Beta\", the field's name");
    let name = name.and_then(header_name);
    let given = either(&mut table, "values", "values_regex");
    if given.is_none() {
        let message = format!("{} has no `values`", table.name());
        table.error(message, "add values = [\"yes*\"], or values_regex");
    }
    table.finish();
    let help = "write a list of values, such as [\"*Chrome*\"]; * stands for any characters, ? \
                for one, \\\\* and \\\\? for themselves";
    let is_value = |text: &str| !text.chars().any(char::is_control);
    let values = match given? {
        Either::Wildcards(value) => wildcards(value, help, is_value)?,
        Either::Regexes(value) => regexes(value, REGEX_HELP, true)?,
    };
    Some(Condition::HttpHeader { name: name?, values })
}

/// A token (RFC 9110, section 5.6.2), of at most 40 characters as on AWS.
fn header_name(value: Value<'_>) -> Option<String> {
    const MAX_CHARACTERS: usize = 40;
    let help = "write the name of a header field, at most 40 characters without * and ?, such as \
                \"User-Agent\"";
    value.parsed(help, |name| {
        if name.eq_ignore_ascii_case("host") {
            let message = "`name = \"Host\"` is `host_header`'s";
            return Err(Wrong::new(message, "write host_header = [\"www.example.com\"] instead"));
        }
        let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'+-.^_`|~".contains(&b);
        let length = 1..=MAX_CHARACTERS;
        if length.contains(&name.len()) && name.bytes().all(is_token) {
            Ok(name.to_ascii_lowercase())
        } else {
            Err(Wrong::new(value.refusal(), help))
        }
    })
}

fn http_request_method(value: Value<'_>) -> Option<Condition> {
    let help = "write a list of methods in capital letters, such as [\"GET\", \"HEAD\"]";
    let is_method = |method: &str| {
        method.len() <= 40 && method.bytes().all(|b| b.is_ascii_uppercase() || b"-_".contains(&b))
    };
    let read = |item| text(item, help, is_method);
    all(elements(value, help).into_iter().map(read)).map(Condition::HttpRequestMethod)
}

fn query_string(value: Value<'_>) -> Option<Condition> {
    let help = "write a list such as [{ key = \"version\", value = \"v1*\" }, { value = \
                \"*beta*\" }]";
    let is_value = |text: &str| !text.chars().any(char::is_control);
    let read = |item: Value<'_>| {
        let mut table = item.table("this pair", help)?;
        let key = table.optional("key");
        let value = table.required("value", "add value = \"v1*\", or \"*\" for any");
        table.finish();
        let key = match key {
            Some(key) => Some(text(key, help, is_value)?),
            None => None,
        };
        Some(QueryPattern { key, value: text(value?, help, is_value)? })
    };
    all(elements(value, help).into_iter().map(read)).map(Condition::QueryString)
}

fn source_ip(value: Value<'_>) -> Option<Condition> {
    let help = "write a list of networks or addresses, such as [\"10.0.0.0/8\", \"2001:db8::7\"]";
    let read = |item: Value<'_>| item.parsed(help, |text| parse_network(item, text, help));
    all(elements(value, help).into_iter().map(read)).map(Condition::SourceIp)
}
