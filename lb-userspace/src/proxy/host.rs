//! What a request's `Host` (or `:authority`) names.

/// A `Host` taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host<'a> {
    /// Name or address as it came; an IPv6 address in its brackets.
    pub name: &'a str,
    /// The port behind it; `None`: none, or an empty one.
    pub port: Option<u16>,
}

impl<'a> Host<'a> {
    /// Takes apart what RFC 9110 section 7.2 allows: `uri-host [ ":" port ]`, where `uri-host` is a
    /// registered name, an IPv4 address or an IPv6 address in brackets (RFC 3986 section 3.2.2).
    /// `None` if it is anything else, such as one with a user, a path or a blank in it: what other
    /// software would make of those, nobody knows. An empty one is allowed.
    pub fn parse(host: &'a str) -> Option<Self> {
        let (name, port) = split_port(host)?;
        let valid = match name.strip_prefix('[') {
            Some(literal) => literal
                .strip_suffix(']')
                .is_some_and(|literal| literal.parse::<std::net::Ipv6Addr>().is_ok()),
            None => is_registered_name(name.as_bytes()),
        };
        if !valid {
            return None;
        }
        let port = match port {
            "" => None,
            digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(digits.parse().ok()?)
            }
            _ => return None,
        };
        Some(Self { name, port })
    }

    /// Whether both name the same, where no port means that one.
    pub fn is_same(&self, other: &Self, default_port: u16) -> bool {
        let port = |it: &Self| it.port.unwrap_or(default_port);
        self.name.eq_ignore_ascii_case(other.name) && port(self) == port(other)
    }

    /// The name without the dot that ends a fully qualified one.
    pub fn without_root(&self) -> &'a str {
        self.name.strip_suffix('.').unwrap_or(self.name)
    }
}

fn split_port(host: &str) -> Option<(&str, &str)> {
    let behind_brackets = match host.strip_prefix('[') {
        Some(rest) => rest.find(']')? + 2,
        None => 0,
    };
    let tail = host.get(behind_brackets..)?;
    match tail.find(':') {
        Some(colon) => {
            let (name, port) = host.split_at(behind_brackets + colon);
            Some((name, &port[1..]))
        }
        None => Some((host, "")),
    }
}

/// RFC 3986 section 3.2.2, `reg-name`: unreserved, percent-encoded or `sub-delims`.
fn is_registered_name(name: &[u8]) -> bool {
    let mut rest = name;
    while let [byte, tail @ ..] = rest {
        rest = match (byte, tail) {
            (b'%', [high, low, tail @ ..])
                if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
            {
                tail
            }
            (byte, tail) if byte.is_ascii_alphanumeric() => tail,
            (
                b'-' | b'.' | b'_' | b'~' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+'
                | b',' | b';' | b'=',
                tail,
            ) => tail,
            _ => return false,
        };
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(host: &str) -> Option<(&str, Option<u16>)> {
        Host::parse(host).map(|host| (host.name, host.port))
    }

    #[test]
    fn names_and_addresses() {
        assert_eq!(parsed("example.com"), Some(("example.com", None)));
        assert_eq!(parsed("Example.com.:8080"), Some(("Example.com.", Some(8080))));
        assert_eq!(parsed("example.com:"), Some(("example.com", None)));
        assert_eq!(parsed("10.0.0.1:80"), Some(("10.0.0.1", Some(80))));
        assert_eq!(parsed("[2001:db8::1]"), Some(("[2001:db8::1]", None)));
        assert_eq!(parsed("[2001:db8::1]:443"), Some(("[2001:db8::1]", Some(443))));
        assert_eq!(parsed(""), Some(("", None)));
        assert_eq!(parsed("a%41_b"), Some(("a%41_b", None)));
    }

    #[test]
    fn anything_else_is_none() {
        for host in [
            "user@example.com",
            "example.com/path",
            "example.com ",
            "exa mple.com",
            "example.com:80:80",
            "example.com:-1",
            "example.com:+80",
            "example.com:65536",
            "example.com:8a",
            "2001:db8::1",
            "[2001:db8::1",
            "[example.com]",
            "[::1]x",
            "[",
            "[]",
            "a%4",
            "a%zz",
            "a\"b",
            "a\\b",
            "a?b",
            "a#b",
            "exämple.com",
            "a\u{7f}",
        ] {
            assert_eq!(parsed(host), None, "{host}");
        }
    }

    #[test]
    fn the_same_by_another_writing() {
        let is_same =
            |one, other| Host::parse(one).unwrap().is_same(&Host::parse(other).unwrap(), 443);
        assert!(is_same("Example.com", "example.COM:443"));
        assert!(is_same("example.com:", "example.com"));
        assert!(!is_same("example.com", "example.com:80"));
        assert!(!is_same("example.com", "example.com."));
        assert!(!is_same("example.com", ""));
    }

    #[test]
    fn root_is_left_out() {
        let without = |host| Host::parse(host).map(|host| host.without_root());
        assert_eq!(without("example.com."), Some("example.com"));
        assert_eq!(without("example.com"), Some("example.com"));
        assert_eq!(without("."), Some(""));
    }
}
