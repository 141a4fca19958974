//! Lines of access logs.

use std::fmt::{self, Display, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

/// The longest user agent that is noted, bytes.
const LONGEST_AGENT: usize = 8 * 1024;

/// A request to an application load balancer: "Access log entries" in AWS's guide, in AWS's order.
/// What is `None` is noted as `-`, a time as `-1`.
#[derive(Debug, Clone)]
pub struct Entry<'a> {
    /// `http`, `https`, `h2`, `grpcs`, `ws` or `wss`.
    pub kind: &'a str,
    /// When the response began, or of a WebSocket, ended.
    pub time: SystemTime,
    /// Name of the load balancer.
    pub load_balancer: &'a str,
    /// The client.
    pub client: SocketAddr,
    /// The target that got the request.
    pub target: Option<SocketAddr>,
    /// From the request's arrival until it went to the target.
    pub request_time: Option<Duration>,
    /// From then until the target's response began.
    pub target_time: Option<Duration>,
    /// From then until it went to the client.
    pub response_time: Option<Duration>,
    /// Status that the client got.
    pub status: u16,
    /// Status that the target answered with.
    pub target_status: Option<u16>,
    /// Bytes from the client, with the head.
    pub received_bytes: u64,
    /// Bytes to the client, with the head.
    pub sent_bytes: u64,
    /// The request's line.
    pub request: RequestLine<'a>,
    /// `User-Agent`.
    pub user_agent: Option<&'a [u8]>,
    /// Cipher suite, as OpenSSL names it.
    pub tls_cipher: Option<&'a str>,
    /// Version, such as `TLSv1.3`.
    pub tls_protocol: Option<&'a str>,
    /// Name of the target group.
    pub target_group: Option<&'a str>,
    /// `X-Amzn-Trace-Id`, as the target got it.
    pub trace_id: Option<&'a [u8]>,
    /// The server that the client named in TLS.
    pub domain_name: Option<&'a str>,
    /// The certificate's file.
    pub certificate: Option<&'a str>,
    /// Of the rule that decided, 0 for the default action; `None`: none did.
    pub rule_priority: Option<u16>,
    /// When the request arrived.
    pub created: SystemTime,
    /// `forward`, `redirect` or `fixed-response`.
    pub action: Option<&'a str>,
    /// `Location` of a redirection.
    pub redirect_url: Option<&'a [u8]>,
    /// Why a request failed, see "Error reason codes".
    pub error_reason: Option<&'a str>,
    /// What the desync mitigation thinks of it, and why; `None`: it is compliant.
    pub classification: Option<(&'a str, &'a str)>,
    /// Random number of the client's connection.
    pub connection: Option<u64>,
    /// Host after `host_header_rewrite`.
    pub transformed_host: Option<&'a str>,
    /// URI after `url_rewrite`.
    pub transformed_uri: Option<&'a str>,
    /// How the transforms ended, such as `TransformSuccess`; `None`: there were none.
    pub transform_status: Option<&'a str>,
}

/// Line of a request; unreadable ones are noted as `- http://host:port- -`.
#[derive(Debug, Clone, Copy)]
pub struct RequestLine<'a> {
    /// Method; empty if unknown.
    pub method: &'a str,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// `Host` or `:authority` as it came, without the port.
    pub host: &'a str,
    /// The listener's port.
    pub port: u16,
    /// Path and query as they came; empty if unknown.
    pub target: &'a str,
    /// Such as `HTTP/1.1`; empty if unknown.
    pub version: &'a str,
}

impl Entry<'_> {
    /// The line, with its end.
    pub fn line(&self) -> String {
        let mut line = String::with_capacity(512);
        // Writing to a string does not fail.
        let _ = self.write(&mut line);
        line
    }

    fn write(&self, line: &mut String) -> fmt::Result {
        write!(line, "{} {}", self.kind, timestamp(self.time))?;
        write!(line, " {} {} {}", word(self.load_balancer), self.client, or_dash(self.target))?;
        for time in [self.request_time, self.target_time, self.response_time] {
            match time {
                Some(time) => write!(line, " {:.3}", time.as_secs_f64())?,
                None => line.push_str(" -1"),
            }
        }
        write!(line, " {} {}", self.status, or_dash(self.target_status))?;
        write!(line, " {} {}", self.received_bytes, self.sent_bytes)?;
        write!(line, " \"{}\"", self.request)?;
        let agent = self.user_agent.map(|agent| &agent[..agent.len().min(LONGEST_AGENT)]);
        quoted(line, agent)?;
        write!(line, " {}", or_dash(self.tls_cipher))?;
        write!(line, " {}", or_dash(self.tls_protocol))?;
        write!(line, " {}", or_dash(self.target_group.map(word)))?;
        quoted(line, self.trace_id)?;
        quoted(line, self.domain_name.map(str::as_bytes))?;
        quoted(line, self.certificate.map(str::as_bytes))?;
        write!(line, " {} {}", or_dash(self.rule_priority), timestamp(self.created))?;
        quoted(line, self.action.map(str::as_bytes))?;
        quoted(line, self.redirect_url)?;
        quoted(line, self.error_reason.map(str::as_bytes))?;
        write!(line, " \"{}\" \"{}\"", or_dash(self.target), or_dash(self.target_status))?;
        quoted(line, self.classification.map(|(class, _)| class.as_bytes()))?;
        quoted(line, self.classification.map(|(_, reason)| reason.as_bytes()))?;
        match self.connection {
            Some(connection) => write!(line, " TID_{connection:016x}")?,
            None => line.push_str(" -"),
        }
        quoted(line, self.transformed_host.map(str::as_bytes))?;
        quoted(line, self.transformed_uri.map(str::as_bytes))?;
        quoted(line, self.transform_status.map(str::as_bytes))?;
        line.push('\n');
        Ok(())
    }
}

impl Display for RequestLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { method, scheme, host, port, target, version } = self;
        let known = |text: &str| if text.is_empty() { "-".to_owned() } else { escaped(text) };
        write!(f, "{} {scheme}://{}:{port}", known(method), escaped(host))?;
        write!(f, "{} {}", known(target), known(version))
    }
}

/// A connection to a `tls` listener: "Access log entries" in AWS's guide to network load
/// balancers, in AWS's order. What is `None` is noted as `-`.
#[derive(Debug, Clone)]
pub struct TlsEntry<'a> {
    /// When the connection ended.
    pub time: SystemTime,
    /// Name of the load balancer.
    pub load_balancer: &'a str,
    /// Name of the listener.
    pub listener: &'a str,
    /// The client.
    pub client: SocketAddr,
    /// What it connected to.
    pub destination: SocketAddr,
    /// From the first byte to the last.
    pub connection_time: Duration,
    /// Until TLS was agreed on; `None`: it never was.
    pub handshake_time: Option<Duration>,
    /// Bytes from the client, decrypted.
    pub received_bytes: u64,
    /// Bytes to the client, before encryption.
    pub sent_bytes: u64,
    /// Number of the alert that the client sent.
    pub alert: Option<u8>,
    /// The certificate's file.
    pub certificate: Option<&'a str>,
    /// Cipher suite, as OpenSSL names it.
    pub cipher: Option<&'a str>,
    /// Version, such as `tlsv13`.
    pub version: Option<&'a str>,
    /// The server that the client named.
    pub domain_name: Option<&'a str>,
    /// Protocol that client and load balancer agreed on (ALPN).
    pub client_protocol: Option<&'a str>,
    /// Protocol that target and load balancer agreed on.
    pub target_protocol: Option<&'a str>,
    /// Protocols that the client named, in its order.
    pub client_protocols: &'a [&'a str],
    /// When the connection began.
    pub created: SystemTime,
}

impl TlsEntry<'_> {
    /// The line, with its end.
    pub fn line(&self) -> String {
        let mut line = String::with_capacity(320);
        // Writing to a string does not fail.
        let _ = self.write(&mut line);
        line
    }

    fn write(&self, line: &mut String) -> fmt::Result {
        write!(line, "tls 2.0 {}", seconds(self.time))?;
        write!(line, " {} {}", word(self.load_balancer), word(self.listener))?;
        write!(line, " {} {}", self.client, self.destination)?;
        write!(line, " {}", self.connection_time.as_millis())?;
        write!(line, " {}", or_dash(self.handshake_time.map(|time| time.as_millis())))?;
        write!(line, " {} {}", self.received_bytes, self.sent_bytes)?;
        match self.alert {
            Some(alert) => write!(line, " {alert:02x}")?,
            None => line.push_str(" -"),
        }
        // The serial number was of a certificate type that AWS no longer has.
        write!(line, " {} -", or_dash(self.certificate.map(word)))?;
        // Named groups are no longer noted by AWS either.
        write!(line, " {} {} -", or_dash(self.cipher), or_dash(self.version))?;
        write!(line, " {}", or_dash(self.domain_name.map(word)))?;
        write!(line, " {}", or_dash(self.client_protocol.map(word)))?;
        write!(line, " {} ", or_dash(self.target_protocol.map(word)))?;
        if self.client_protocols.is_empty() {
            line.push('-');
        }
        for (i, protocol) in self.client_protocols.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            write!(line, "{comma}\"{}\"", escaped(protocol))?;
        }
        writeln!(line, " {}", seconds(self.created))
    }
}

fn timestamp(time: SystemTime) -> impl Display {
    humantime::format_rfc3339_micros(time)
}

/// AWS has no fraction and no zone here; it is UTC.
fn seconds(time: SystemTime) -> String {
    let mut text = humantime::format_rfc3339_seconds(time).to_string();
    text.truncate("2018-12-20T02:59:40".len());
    text
}

/// `-` for what there is not.
fn or_dash<T: Display>(value: Option<T>) -> impl Display {
    struct OrDash<T>(Option<T>);
    impl<T: Display> Display for OrDash<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match &self.0 {
                Some(value) => value.fmt(f),
                None => f.write_str("-"),
            }
        }
    }
    OrDash(value)
}

/// A field without quotes has no blanks.
fn word(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { escaped(text).replace(' ', "\\x20") }
}

fn quoted(line: &mut String, value: Option<&[u8]>) -> fmt::Result {
    line.push_str(" \"");
    match value {
        Some(value) if !value.is_empty() => escape(line, value)?,
        _ => line.push('-'),
    }
    line.push('"');
    Ok(())
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    // Writing to a string does not fail.
    let _ = escape(&mut escaped, text.as_bytes());
    escaped
}

/// Quotes, backslashes and whatever is not visible become `\x22`, so that no client can end a
/// field or a line, or speak to a terminal.
fn escape(line: &mut String, value: &[u8]) -> fmt::Result {
    for byte in value {
        match byte {
            b'"' | b'\\' | 0..=0x1f | 0x7f.. => write!(line, "\\x{byte:02x}")?,
            byte => line.push(char::from(*byte)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(time: &str) -> SystemTime {
        humantime::parse_rfc3339(time).unwrap()
    }

    fn entry() -> Entry<'static> {
        Entry {
            kind: "http",
            time: at("2018-07-02T22:23:00.186641Z"),
            load_balancer: "app/my-loadbalancer/50dc6c495c0c9188",
            client: "192.168.131.39:2817".parse().unwrap(),
            target: Some("10.0.0.1:80".parse().unwrap()),
            request_time: Some(Duration::from_micros(400)),
            target_time: Some(Duration::from_millis(1)),
            response_time: Some(Duration::ZERO),
            status: 200,
            target_status: Some(200),
            received_bytes: 34,
            sent_bytes: 366,
            request: RequestLine {
                method: "GET",
                scheme: "http",
                host: "www.example.com",
                port: 80,
                target: "/",
                version: "HTTP/1.1",
            },
            user_agent: Some(b"curl/7.46.0"),
            tls_cipher: None,
            tls_protocol: None,
            target_group: Some(
                "arn:aws:elasticloadbalancing:us-east-2:123456789012:targetgroup/my-targets/73e2d6bc24d8a067",
            ),
            trace_id: Some(b"Root=1-58337262-36d228ad5d99923122bbe354"),
            domain_name: None,
            certificate: None,
            rule_priority: Some(0),
            created: at("2018-07-02T22:22:48.364000Z"),
            action: Some("forward"),
            redirect_url: None,
            error_reason: None,
            classification: None,
            connection: Some(0x1234_abcd_5678_ef90),
            transformed_host: None,
            transformed_uri: None,
            transform_status: None,
        }
    }

    #[test]
    fn the_documented_example() {
        assert_eq!(
            entry().line(),
            "http 2018-07-02T22:23:00.186641Z app/my-loadbalancer/50dc6c495c0c9188 \
             192.168.131.39:2817 10.0.0.1:80 0.000 0.001 0.000 200 200 34 366 \
             \"GET http://www.example.com:80/ HTTP/1.1\" \"curl/7.46.0\" - - \
             arn:aws:elasticloadbalancing:us-east-2:123456789012:targetgroup/my-targets/73e2d6bc24d8a067 \
             \"Root=1-58337262-36d228ad5d99923122bbe354\" \"-\" \"-\" \
             0 2018-07-02T22:22:48.364000Z \"forward\" \"-\" \"-\" \"10.0.0.1:80\" \"200\" \"-\" \"-\" \
             TID_1234abcd5678ef90 \"-\" \"-\" \"-\"\n"
        );
    }

    #[test]
    fn what_never_reached_a_target() {
        let line = Entry {
            target: None,
            request_time: None,
            target_time: None,
            response_time: None,
            status: 400,
            target_status: None,
            request: RequestLine { method: "", target: "", version: "", ..entry().request },
            rule_priority: None,
            action: None,
            classification: Some(("Severe", "BadHeader")),
            ..entry()
        }
        .line();
        assert!(
            line.contains(" - -1 -1 -1 400 - 34 366 \"- http://www.example.com:80- -\" "),
            "{line}"
        );
        assert!(line.contains(" - 2018-07-02T22:22:48.364000Z \"-\" \"-\" \"-\" \"-\" \"-\" \"Severe\" \"BadHeader\" "), "{line}");
    }

    #[test]
    fn the_documented_tls_example() {
        let line = TlsEntry {
            time: at("2018-12-20T02:59:40Z"),
            load_balancer: "net/my-network-loadbalancer/c6e77e28c25b2234",
            listener: "g3d4b5e8bb8464cd",
            client: "72.21.218.154:51341".parse().unwrap(),
            destination: "172.100.100.185:443".parse().unwrap(),
            connection_time: Duration::from_millis(5),
            handshake_time: Some(Duration::from_millis(2)),
            received_bytes: 98,
            sent_bytes: 246,
            alert: None,
            certificate: Some("arn:aws:acm:us-east-2:671290407336:certificate/2a108f19"),
            cipher: Some("ECDHE-RSA-AES128-SHA"),
            version: Some("tlsv12"),
            domain_name: Some("my-network-loadbalancer.elb.us-east-2.amazonaws.com"),
            client_protocol: Some("h2"),
            target_protocol: Some("h2"),
            client_protocols: &["h2", "http/1.1"],
            created: at("2020-04-01T08:51:20Z"),
        };
        assert_eq!(
            line.line(),
            "tls 2.0 2018-12-20T02:59:40 net/my-network-loadbalancer/c6e77e28c25b2234 \
             g3d4b5e8bb8464cd 72.21.218.154:51341 172.100.100.185:443 5 2 98 246 - \
             arn:aws:acm:us-east-2:671290407336:certificate/2a108f19 - ECDHE-RSA-AES128-SHA \
             tlsv12 - my-network-loadbalancer.elb.us-east-2.amazonaws.com h2 h2 \
             \"h2\",\"http/1.1\" 2020-04-01T08:51:20\n"
        );
        let failed =
            TlsEntry { handshake_time: None, alert: Some(42), client_protocols: &[], ..line };
        assert!(failed.line().contains(" 5 - 98 246 2a "), "{}", failed.line());
    }

    proptest! {
        /// As `cut` by blanks outside of quotes would find them.
        #[test]
        fn clients_cannot_add_fields_or_lines(
            agent in any::<Vec<u8>>(),
            host in any::<String>(),
            target in any::<String>(),
        ) {
            let mut entry = entry();
            entry.user_agent = Some(&agent);
            entry.redirect_url = Some(&agent);
            entry.domain_name = Some(&host);
            entry.request.host = &host;
            entry.request.target = &target;
            let line = entry.line();
            let (content, end) = line.split_at(line.len() - 1);
            prop_assert_eq!(end, "\n");
            prop_assert!(content.bytes().all(|byte| (b' '..0x7f).contains(&byte)));
            let outside_quotes = content.split('"').step_by(2);
            let blanks: usize = outside_quotes.map(|part| part.matches(' ').count()).sum();
            prop_assert_eq!(blanks, 32);
        }
    }

    #[test]
    fn user_agents_end_somewhere() {
        let agent = vec![b'a'; 20_000];
        let line = Entry { user_agent: Some(&agent), ..entry() }.line();
        assert_eq!(line.matches('a').count() - entry().line().matches('a').count(), 8192);
    }
}
