//! `redirect = { ... }`: the client is sent elsewhere.

use super::super::model::{ProxyProtocol, Redirect};
use super::super::reader::{Table, Value, Wrong};
use super::action::Place;

const HELP: &str = "write redirect = { protocol = \"HTTPS\", port = \"443\", status = 301 }, with \
                    any of protocol, host, port, path and query";
const PLACEHOLDERS: [&str; 5] = ["protocol", "host", "port", "path", "query"];
/// AWS's, of host, path and query.
const MAX_CHARACTERS: usize = 128;

pub(super) fn read(value: Value<'_>, place: Place) -> Option<Redirect> {
    let mut table = value.table("this redirect", HELP)?;
    let protocol_value = table.optional("protocol");
    let protocols = ["HTTP", "HTTPS", "#{protocol}"].map(|name| (name, name));
    let protocol = match protocol_value {
        Some(value) => value.choice(&protocols, &[]),
        None => Some("#{protocol}"),
    };
    let host = part(&mut table, "host", "#{host}", is_host, "a host such as \"www.example.com\"");
    let port = match table.optional("port") {
        Some(value) => port(value),
        None => Some("#{port}".to_owned()),
    };
    let path = part(
        &mut table,
        "path",
        "/#{path}",
        is_path,
        "a path that begins with /, such as \"/new/#{path}\"",
    );
    let query = part(
        &mut table,
        "query",
        "#{query}",
        is_query,
        "a query without its ?, such as \"from=old&#{query}\"",
    );
    let status = table.required("status", "add status = 301 (moved permanently) or 302 (found)");
    let status = status.and_then(|value| {
        let status = value.integer(0..=999)?;
        if !matches!(status, 301 | 302) {
            value.refuse("write 301 (moved permanently) or 302 (found)");
        }
        u16::try_from(status).ok()
    });
    table.finish();
    let redirect = Redirect {
        protocol: protocol?.to_owned(),
        host: host?,
        port: port?,
        path: path?,
        query: query?,
        status: status?,
    };
    check_target(value, protocol_value, &redirect, place);
    Some(redirect)
}

fn part(
    table: &mut Table<'_>,
    key: &'static str,
    default: &str,
    is_right: fn(&str) -> bool,
    form: &str,
) -> Option<String> {
    let Some(value) = table.optional(key) else { return Some(default.to_owned()) };
    let help = format!("write {form}, at most {MAX_CHARACTERS} characters");
    value.parsed(&help, |text| {
        let literal = without_placeholders(value, text)?;
        let visible = literal.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
        if visible && text.len() <= MAX_CHARACTERS && is_right(text) {
            Ok(text.to_owned())
        } else {
            Err(Wrong::new(value.refusal(), &help))
        }
    })
}

fn is_host(host: &str) -> bool {
    !host.is_empty() && !host.contains(['/', '?', '@', '\\'])
}

fn is_path(path: &str) -> bool {
    path.starts_with('/') && !path.contains('?')
}

fn is_query(query: &str) -> bool {
    !query.starts_with('?')
}

/// The text without `#{...}`, each of which must be known.
fn without_placeholders(value: Value<'_>, text: &str) -> Result<String, Wrong> {
    let mut parts = text.split("#{");
    let mut literal = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let known = part.split_once('}').filter(|(name, _)| PLACEHOLDERS.contains(name));
        let Some((_, rest)) = known else {
            let name = part.split('}').next().unwrap_or_default();
            let message = format!("`{}` has \"#{{{name}\", which stands for nothing", value.key());
            let names = PLACEHOLDERS.map(|name| format!("#{{{name}}}")).join(", ");
            return Err(Wrong::new(message, format!("write one of {names}")));
        };
        literal.push_str(rest);
    }
    Ok(literal)
}

/// A number, with or without quotes, or `#{port}`.
fn port(value: Value<'_>) -> Option<String> {
    if !value.is_string() {
        return value.port().map(|port| port.to_string());
    }
    let help = "write a port from 1 to 65535, or \"#{port}\"";
    value.parsed(help, |text| match text.parse::<u16>() {
        _ if text == "#{port}" => Ok(text.to_owned()),
        Ok(port) if port > 0 => Ok(port.to_string()),
        _ => Err(Wrong::new(value.refusal(), help)),
    })
}

/// A redirect to where the request came from is refused, as on AWS.
fn check_target(value: Value<'_>, protocol: Option<Value<'_>>, redirect: &Redirect, place: Place) {
    let ours = if place.protocol == ProxyProtocol::Https { "HTTPS" } else { "HTTP" };
    let same_protocol = redirect.protocol == "#{protocol}" || redirect.protocol == ours;
    let same_port = redirect.port == "#{port}"
        || place.port.is_some_and(|port| redirect.port == port.to_string());
    let same_host = redirect.host == "#{host}";
    if same_host && same_port && same_protocol && redirect.path == "/#{path}" {
        value.error(
            "this redirect leads to where the request came from, again and again",
            "change at least one of protocol, host, port and path, such as { protocol = \
             \"HTTPS\", port = \"443\", status = 301 }",
        );
    } else if let Some(protocol) = protocol
        && same_host
        && same_port
        && !same_protocol
        && let Some(port) = place.port
    {
        let other = if redirect.protocol == "HTTPS" { 443 } else { 80 };
        protocol.warning(
            format!(
                "clients will speak {} to port {port}, where this listener does not",
                redirect.protocol
            ),
            format!("add port = \"{other}\", or the port of the other listener"),
        );
    }
}
