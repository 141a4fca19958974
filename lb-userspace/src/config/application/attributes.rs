//! What holds for all listeners of a load balancer.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::super::model::{Attributes, DesyncMitigation, LoadBalancerType, LogSink, XForwardedFor};
use super::super::reader::{Table, Value};
use super::tls::absolute_path;

const IDLE_TIMEOUTS: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(4000);
const KEEP_ALIVES: RangeInclusive<Duration> =
    Duration::from_secs(60)..=Duration::from_secs(7 * 24 * 3600);
const MAX_CONNECTIONS: RangeInclusive<u32> = 1..=10_000_000;

const BODY_SIZES: RangeInclusive<u64> = 1..=1 << 40;

/// Those of requests, which a network load balancer does not see.
const REQUEST_KEYS: [&str; 11] = [
    "idle_timeout",
    "client_keep_alive",
    "max_connections",
    "max_request_body_size",
    "desync_mitigation_mode",
    "drop_invalid_header_fields",
    "preserve_host_header",
    "xff_header_processing_mode",
    "enable_xff_client_port",
    "enable_tls_version_and_cipher_suite_headers",
    "enable_http2",
];

/// Also where the file has `access_logs`.
pub(in super::super) fn read<'a>(
    table: &mut Table<'a>,
    kind: Option<LoadBalancerType>,
) -> (Attributes, Option<Value<'a>>) {
    if kind == Some(LoadBalancerType::Network) {
        let help = "leave it out, or write type = \"application\"";
        table.meaningless(&REQUEST_KEYS, "in a network load balancer", help);
    }
    let logs = table.optional("access_logs");
    let access_log = logs.and_then(access_log);
    if kind == Some(LoadBalancerType::Network) {
        return (Attributes { access_log, ..Attributes::default() }, logs);
    }
    let modes = [
        ("monitor", DesyncMitigation::Monitor),
        ("defensive", DesyncMitigation::Defensive),
        ("strictest", DesyncMitigation::Strictest),
    ];
    let xff_modes = [
        ("append", XForwardedFor::Append),
        ("preserve", XForwardedFor::Preserve),
        ("remove", XForwardedFor::Remove),
    ];
    let default = Attributes::default();
    let attributes = Attributes {
        idle_timeout: seconds(table, "idle_timeout", IDLE_TIMEOUTS).unwrap_or(default.idle_timeout),
        client_keep_alive: seconds(table, "client_keep_alive", KEEP_ALIVES)
            .unwrap_or(default.client_keep_alive),
        max_connections: table
            .optional("max_connections")
            .and_then(|value| value.integer(MAX_CONNECTIONS)),
        max_request_body_size: table
            .optional("max_request_body_size")
            .and_then(|value| value.bytes(BODY_SIZES)),
        desync_mitigation: table
            .optional("desync_mitigation_mode")
            .and_then(|value| value.choice(&modes, &[]))
            .unwrap_or(default.desync_mitigation),
        x_forwarded_for: table
            .optional("xff_header_processing_mode")
            .and_then(|value| value.choice(&xff_modes, &[]))
            .unwrap_or(default.x_forwarded_for),
        drop_invalid_header_fields: flag(table, "drop_invalid_header_fields", false),
        preserve_host_header: flag(table, "preserve_host_header", false),
        x_forwarded_for_client_port: flag(table, "enable_xff_client_port", false),
        tls_headers: flag(table, "enable_tls_version_and_cipher_suite_headers", false),
        http2: flag(table, "enable_http2", true),
        access_log,
    };
    (attributes, logs)
}

fn seconds(
    table: &mut Table<'_>,
    key: &'static str,
    range: RangeInclusive<Duration>,
) -> Option<Duration> {
    table.optional(key).and_then(|value| value.whole_seconds(range))
}

fn flag(table: &mut Table<'_>, key: &'static str, default: bool) -> bool {
    table.optional(key).and_then(|value| value.boolean()).unwrap_or(default)
}

fn access_log(value: Value<'_>) -> Option<LogSink> {
    let help = "write access_logs = { path = \"/var/log/lb/site.log\" }, or path = \"stdout\"";
    let mut table = value.table("access_logs", help)?;
    let path = table.required("path", help);
    table.finish();
    let path = path?;
    if path.is("stdout") {
        return Some(LogSink::Stdout);
    }
    let help = "write the absolute path of a file, such as \"/var/log/lb/site.log\", or \"stdout\"";
    let file = absolute_path(path, help)?;
    path.is_log(file.clone());
    Some(LogSink::File(file))
}
