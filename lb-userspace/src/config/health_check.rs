//! `[target_group.NAME.health_check]`: how a target's health is found out.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::model::{GrpcProbe, HealthCheck, HttpProbe, HttpVersion, ProbeKind};
use super::protocol::AnyProtocol;
use super::reader::{Table, Value, Wrong, show_duration};

const DEFAULT_INTERVAL: Duration = Duration::from_secs(10);
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(2);
const INTERVALS: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(300);
const TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(120);
const DEFAULT_HEALTHY_THRESHOLD: u32 = 3;
const DEFAULT_UNHEALTHY_THRESHOLD: u32 = 2;
const THRESHOLDS: RangeInclusive<u32> = 1..=10;

impl Default for HealthCheck {
    fn default() -> Self {
        Self {
            probe: ProbeKind::Http(HttpProbe::default()),
            port: None,
            interval: DEFAULT_INTERVAL,
            timeout: DEFAULT_TIMEOUT,
            healthy_threshold: DEFAULT_HEALTHY_THRESHOLD,
            unhealthy_threshold: DEFAULT_UNHEALTHY_THRESHOLD,
        }
    }
}

impl Default for HttpProbe {
    fn default() -> Self {
        Self { path: "/".to_owned(), matcher: vec![200..=299, 301..=301], http2: false }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tcp,
    Http,
    Https,
}

/// What a group's targets speak.
#[derive(Clone, Copy)]
pub(super) struct Spoken {
    /// `None` where it could not be read.
    pub(super) protocol: Option<AnyProtocol>,
    pub(super) version: HttpVersion,
}

impl Spoken {
    /// What is asked where the file does not say it.
    fn default_kind(self) -> Kind {
        match self.protocol {
            Some(AnyProtocol::Tls) => Kind::Tcp,
            Some(AnyProtocol::Https) => Kind::Https,
            _ => Kind::Http,
        }
    }
}

pub(super) fn read(table: Option<Table<'_>>, spoken: Spoken) -> HealthCheck {
    let Some(mut table) = table else {
        let probe = probe(Some(spoken.default_kind()), spoken, None, None);
        return HealthCheck { probe, ..HealthCheck::default() };
    };
    let probe = read_probe(&mut table, spoken);
    let (interval, timeout) = interval_and_timeout(&mut table);
    let threshold = |value: Option<Value<'_>>| value.and_then(|value| value.integer(THRESHOLDS));
    let health_check = HealthCheck {
        probe,
        port: table.optional("port").and_then(port),
        interval,
        timeout,
        healthy_threshold: threshold(table.optional("healthy_threshold"))
            .unwrap_or(DEFAULT_HEALTHY_THRESHOLD),
        unhealthy_threshold: threshold(table.optional("unhealthy_threshold"))
            .unwrap_or(DEFAULT_UNHEALTHY_THRESHOLD),
    };
    table.finish();
    health_check
}

fn read_probe(table: &mut Table<'_>, spoken: Spoken) -> ProbeKind {
    let kinds = [("tcp", Kind::Tcp), ("http", Kind::Http), ("https", Kind::Https)];
    let value = table.optional("protocol");
    let kind = value.map_or(Some(spoken.default_kind()), |value| value.choice(&kinds, &[]));
    let (path, matcher) = (table.optional("path"), table.optional("matcher"));
    if let (Some(value), Some(Kind::Tcp)) = (value, kind)
        && spoken.protocol.is_some_and(AnyProtocol::is_http)
    {
        let message = "`protocol = \"tcp\"` cannot check an http or https target group";
        value.error(message, "write \"http\" or \"https\", or leave it out");
        return ProbeKind::Tcp;
    }
    probe(kind, spoken, path, matcher)
}

fn probe(
    kind: Option<Kind>,
    spoken: Spoken,
    path: Option<Value<'_>>,
    matcher: Option<Value<'_>>,
) -> ProbeKind {
    if let Some(Kind::Tcp) = kind {
        for value in [path, matcher].into_iter().flatten() {
            value.error(
                format!("`{} = {}` has no meaning in a tcp check", value.key(), value.quote()),
                "leave it out, or write protocol = \"http\" or \"https\"",
            );
        }
        return ProbeKind::Tcp;
    }
    let is_https = kind == Some(Kind::Https);
    if spoken.version == HttpVersion::Grpc {
        return grpc_probe(is_https, path, matcher);
    }
    let default = HttpProbe::default();
    let http = HttpProbe {
        path: path.and_then(parse_path).unwrap_or(default.path),
        matcher: matcher.and_then(parse_matcher).unwrap_or(default.matcher),
        http2: spoken.version == HttpVersion::Http2,
    };
    if is_https { ProbeKind::Https(http) } else { ProbeKind::Http(http) }
}

/// AWS's defaults: a method that no target has, and the status for that (UNIMPLEMENTED).
fn grpc_probe(tls: bool, path: Option<Value<'_>>, matcher: Option<Value<'_>>) -> ProbeKind {
    let help =
        "write gRPC status codes from 0 to 99 in quotes, such as \"0\", \"0-99\" or \"0,12\"";
    let path = path.and_then(parse_path);
    let matcher = matcher.and_then(|value| parse_codes(value, &(0..=99), help));
    ProbeKind::Grpc(GrpcProbe {
        path: path.unwrap_or_else(|| "/AWS.ALB/healthcheck".to_owned()),
        matcher: matcher.unwrap_or_else(|| vec![12..=12]),
        tls,
    })
}

fn interval_and_timeout(table: &mut Table<'_>) -> (Duration, Duration) {
    let timeout_value = table.optional("timeout");
    let interval = read_duration(table.optional("interval"), INTERVALS, DEFAULT_INTERVAL);
    let default = interval.unwrap_or(DEFAULT_INTERVAL).min(DEFAULT_TIMEOUT);
    let timeout = read_duration(timeout_value, TIMEOUTS, default);
    let (Some(interval), Some(timeout)) = (interval, timeout) else {
        return (DEFAULT_INTERVAL, DEFAULT_TIMEOUT);
    };
    if timeout > interval {
        let interval = show_duration(interval);
        let help = format!("write a timeout of at most {interval}");
        // Without a value it would be at most the interval.
        if let Some(value) = timeout_value {
            let message =
                format!("`timeout = {}` is longer than the interval, {interval}", value.quote());
            value.error(message, help);
        }
    }
    (interval, timeout)
}

/// A duration or its default; `None` if what is written is none.
fn read_duration(
    value: Option<Value<'_>>,
    range: RangeInclusive<Duration>,
    default: Duration,
) -> Option<Duration> {
    value.map_or(Some(default), |value| value.duration(range))
}

fn port(value: Value<'_>) -> Option<u16> {
    if !value.is_string() {
        return value.port();
    }
    let help = "write \"traffic-port\" in quotes, or a number from 1 to 65535 without quotes";
    value.parsed(help, |text| match text {
        "traffic-port" => Ok(None),
        _ => Err(Wrong::new(value.refusal(), help)),
    })?
}

fn parse_path(value: Value<'_>) -> Option<String> {
    // What may stand in a request line (RFC 9112, section 3.2.1); a fragment is never sent.
    let help = "write a path that begins with / and has no space, such as \"/health?deep=1\"";
    value.parsed(help, |path| {
        let visible = |b: u8| b.is_ascii_graphic() && b != b'#';
        if path.starts_with('/') && path.len() <= 1024 && path.bytes().all(visible) {
            Ok(path.to_owned())
        } else {
            Err(Wrong::new(value.refusal(), help))
        }
    })
}

fn parse_matcher(value: Value<'_>) -> Option<Vec<RangeInclusive<u16>>> {
    let help = "write status codes from 200 to 599 in quotes, such as \"200\", \"200-299\" or \
                \"200-299,301\"";
    parse_codes(value, &(200..=599), help)
}

fn parse_codes(
    value: Value<'_>,
    known: &RangeInclusive<u16>,
    help: &str,
) -> Option<Vec<RangeInclusive<u16>>> {
    value.parsed(help, |text| {
        let wrong = || Wrong::new(value.refusal(), help);
        let parse = |code: &str| {
            let code = code.trim().parse::<u16>().ok();
            code.filter(|code| known.contains(code)).ok_or_else(wrong)
        };
        text.split(',')
            .map(|range| {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                let codes = parse(first)?..=parse(last)?;
                if codes.is_empty() { Err(wrong()) } else { Ok(codes) }
            })
            .collect()
    })
}
