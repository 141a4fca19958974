//! Answers that come from the load balancer because a rule says so: redirections and fixed
//! responses.
//!
//! Source: "Redirect actions" and "Fixed-response actions" in AWS's guide to application load
//! balancers. The `Location` always names the port, as AWS's does, and has a question mark only
//! with a query behind it.

use hyper::body::Bytes;
use hyper::header::HeaderValue;
use hyper::http::StatusCode;

use super::host::Host;
use super::rules::CompileError;
use crate::config::model;

/// A compiled [`model::Redirect`].
#[derive(Debug, Clone)]
pub struct Redirect {
    /// 301 or 302.
    pub status: StatusCode,
    protocol: Template,
    host: Template,
    port: Template,
    path: Template,
    query: Template,
}

/// What the keywords of a redirect stand for.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    /// Whether the client came through TLS.
    pub https: bool,
    /// What the client's `Host` names; of a client that sent none, the address it connected to.
    pub host: Host<'a>,
    /// The listener's port.
    pub port: u16,
    /// The path as it came, with its first slash.
    pub path: &'a str,
    /// The query as it came.
    pub query: Option<&'a str>,
}

/// Text with keywords in it.
#[derive(Debug, Clone)]
struct Template(Box<[Part]>);

#[derive(Debug, Clone)]
enum Part {
    Literal(Box<str>),
    Protocol,
    Host,
    Port,
    Path,
    Query,
}

const KEYWORDS: [(&str, Part); 5] = [
    ("#{protocol}", Part::Protocol),
    ("#{host}", Part::Host),
    ("#{port}", Part::Port),
    ("#{path}", Part::Path),
    ("#{query}", Part::Query),
];

impl Redirect {
    /// Compiles a redirection.
    ///
    /// # Errors
    /// If the status is none.
    pub fn compile(redirect: &model::Redirect) -> Result<Self, CompileError> {
        Ok(Self {
            status: status(redirect.status)?,
            protocol: Template::parse(&redirect.protocol),
            host: Template::parse(&redirect.host),
            port: Template::parse(&redirect.port),
            path: Template::parse(&redirect.path),
            query: Template::parse(&redirect.query),
        })
    }

    /// The `Location` for a request, in visible ASCII: other bytes, blanks and quotes are
    /// percent-encoded, whatever the client sent.
    pub fn location(&self, origin: &Origin<'_>) -> HeaderValue {
        let mut location = String::with_capacity(64 + origin.path.len());
        self.protocol.expand(origin, &mut location);
        location.make_ascii_lowercase();
        location.push_str("://");
        self.host.expand(origin, &mut location);
        location.push(':');
        self.port.expand(origin, &mut location);
        let path = location.len();
        self.path.expand(origin, &mut location);
        if !location[path..].starts_with('/') {
            location.insert(path, '/');
        }
        let behind_path = location.len();
        location.push('?');
        self.query.expand(origin, &mut location);
        if location.len() == behind_path + 1 {
            location.truncate(behind_path);
        }
        visible_ascii(&location)
    }
}

impl Template {
    fn parse(text: &str) -> Self {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((at, keyword, part)) = KEYWORDS
            .iter()
            .filter_map(|(keyword, part)| Some((rest.find(keyword)?, keyword, part)))
            .min_by_key(|(at, ..)| *at)
        {
            if at > 0 {
                parts.push(Part::Literal(rest[..at].into()));
            }
            parts.push(part.clone());
            rest = &rest[at + keyword.len()..];
        }
        if !rest.is_empty() {
            parts.push(Part::Literal(rest.into()));
        }
        Self(parts.into())
    }

    fn expand(&self, origin: &Origin<'_>, into: &mut String) {
        for part in &self.0 {
            match part {
                Part::Literal(literal) => into.push_str(literal),
                Part::Protocol => into.push_str(if origin.https { "https" } else { "http" }),
                Part::Host => into.push_str(origin.host.name),
                Part::Port => into.push_str(&origin.port.to_string()),
                Part::Path => into.push_str(origin.path.strip_prefix('/').unwrap_or(origin.path)),
                Part::Query => into.push_str(origin.query.unwrap_or_default()),
            }
        }
    }
}

/// RFC 3986 section 2.1 for what RFC 3986 appendix A lets stand nowhere in a URI and clients read
/// in different ways.
fn visible_ascii(text: &str) -> HeaderValue {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut encoded = Vec::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}' | 0..=b' ' | 0x7f.. => {
                encoded.push(b'%');
                encoded.push(HEX[usize::from(byte >> 4)]);
                encoded.push(HEX[usize::from(byte & 15)]);
            }
            _ => encoded.push(byte),
        }
    }
    // Visible ASCII is what every value may consist of.
    HeaderValue::from_maybe_shared(Bytes::from(encoded))
        .unwrap_or_else(|_| HeaderValue::from_static("/"))
}

/// A compiled [`model::FixedResponse`].
#[derive(Debug, Clone)]
pub struct FixedResponse {
    /// 200 to 299 or 400 to 599.
    pub status: StatusCode,
    /// `Content-Type`; `None`: no such field.
    pub content_type: Option<HeaderValue>,
    /// The body, cheap to clone.
    pub body: Bytes,
}

impl FixedResponse {
    /// Compiles a fixed response.
    ///
    /// # Errors
    /// If the status is none, or the content type cannot stand in a header.
    pub fn compile(response: &model::FixedResponse) -> Result<Self, CompileError> {
        let content_type = match response.content_type.as_str() {
            "" => None,
            value => Some(
                HeaderValue::from_str(value)
                    .map_err(|_| CompileError::Response(value.to_owned()))?,
            ),
        };
        let body = Bytes::copy_from_slice(response.body.as_bytes());
        Ok(Self { status: status(response.status)?, content_type, body })
    }
}

fn status(code: u16) -> Result<StatusCode, CompileError> {
    StatusCode::from_u16(code).map_err(|_| CompileError::Response(code.to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn redirect(protocol: &str, host: &str, port: &str, path: &str, query: &str) -> Redirect {
        Redirect::compile(&model::Redirect {
            protocol: protocol.to_owned(),
            host: host.to_owned(),
            port: port.to_owned(),
            path: path.to_owned(),
            query: query.to_owned(),
            status: 301,
        })
        .unwrap()
    }

    fn origin<'a>(host: &'a str, path: &'a str, query: Option<&'a str>) -> Origin<'a> {
        Origin { https: false, host: Host::parse(host).unwrap(), port: 80, path, query }
    }

    #[test]
    fn documented_examples() {
        let to_https = redirect("HTTPS", "#{host}", "40443", "/#{path}", "#{query}");
        assert_eq!(
            to_https.location(&origin("example.com", "/a/b", Some("c=d&e"))),
            "https://example.com:40443/a/b?c=d&e"
        );
        let new_path = redirect("#{protocol}", "#{host}", "#{port}", "/new/#{path}", "#{query}");
        assert_eq!(
            new_path.location(&origin("example.com:80", "/old", None)),
            "http://example.com:80/new/old"
        );
    }

    #[test]
    fn keywords_work_in_every_part() {
        let all = redirect(
            "HTTP",
            "www.#{host}",
            "8080",
            "/#{host}/#{port}/#{path}",
            "was=#{protocol}://#{host}:#{port}/#{path}&#{query}#{other}",
        );
        assert_eq!(
            all.location(&origin("a.b", "/c", Some("d"))),
            "http://www.a.b:8080/a.b/80/c?was=http://a.b:80/c&d#%7Bother%7D"
        );
    }

    #[test]
    fn ipv6_keeps_its_brackets_and_the_path_its_slash() {
        let to_https = redirect("HTTPS", "#{host}", "443", "#{path}", "");
        assert_eq!(
            to_https.location(&origin("[2001:db8::1]:80", "/", Some("q"))),
            "https://[2001:db8::1]:443/"
        );
    }

    #[test]
    fn the_path_cannot_become_the_host() {
        let to_https = redirect("HTTPS", "#{host}", "443", "/#{path}", "#{query}");
        assert_eq!(
            to_https.location(&origin("good", "//evil.com/..", None)),
            "https://good:443//evil.com/.."
        );
        assert_eq!(
            to_https.location(&origin("good", r"/\evil.com", Some("<\"x\">"))),
            "https://good:443/%5Cevil.com?%3C%22x%22%3E"
        );
    }

    #[test]
    fn fixed_responses() {
        let response = model::FixedResponse {
            status: 503,
            content_type: "text/plain".to_owned(),
            body: "later".to_owned(),
        };
        let compiled = FixedResponse::compile(&response).unwrap();
        assert_eq!(compiled.status, 503);
        assert_eq!(compiled.content_type.unwrap(), "text/plain");
        assert_eq!(compiled.body, "later");
        let bad = model::FixedResponse { content_type: "a\nb".to_owned(), ..response.clone() };
        assert!(FixedResponse::compile(&bad).is_err());
        let bad = model::FixedResponse { status: 99, ..response };
        assert!(FixedResponse::compile(&bad).is_err());
    }

    proptest! {
        #[test]
        fn locations_are_visible_ascii(
            path in any::<String>(),
            query in any::<Option<String>>(),
            template in any::<String>(),
        ) {
            let redirect =
                redirect("#{protocol}", "#{host}", "#{port}", &format!("/#{{path}}{template}"), "#{query}");
            let location = redirect.location(&origin("example.com", &path, query.as_deref()));
            prop_assert!(location.as_bytes().iter().all(u8::is_ascii_graphic));
            prop_assert!(location.as_bytes().starts_with(b"http://example.com:80/"));
            prop_assert!(location.as_bytes().parse_uri());
        }
    }

    trait ParseUri {
        fn parse_uri(&self) -> bool;
    }

    impl ParseUri for [u8] {
        /// By somebody else's parser, which knows no fragments.
        fn parse_uri(&self) -> bool {
            hyper::Uri::try_from(self).is_ok_and(|uri| uri.host() == Some("example.com"))
        }
    }
}
