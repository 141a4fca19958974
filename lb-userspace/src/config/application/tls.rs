//! What a listener shows of itself in TLS: certificates, policy, ALPN.

use std::path::PathBuf;

use super::super::model::{CertificateFiles, ListenerTls, ProxyProtocol, TlsPolicy};
use super::super::reader::{Table, Value, Wrong};

/// AWS's policies of TLS 1.2 and 1.3. Of their cipher suites, those with forward secrecy and
/// authenticated encryption are spoken.
const POLICIES: [TlsPolicy; 10] = [
    policy("ELBSecurityPolicy-TLS13-1-2-2021-06", true, true),
    policy("ELBSecurityPolicy-TLS13-1-3-2021-06", false, true),
    policy("ELBSecurityPolicy-TLS13-1-2-Res-2021-06", true, true),
    policy("ELBSecurityPolicy-TLS13-1-2-Ext1-2021-06", true, true),
    policy("ELBSecurityPolicy-TLS13-1-2-Ext2-2021-06", true, true),
    policy("ELBSecurityPolicy-FS-1-2-Res-2020-10", true, false),
    policy("ELBSecurityPolicy-FS-1-2-Res-2019-08", true, false),
    policy("ELBSecurityPolicy-FS-1-2-2019-08", true, false),
    policy("ELBSecurityPolicy-TLS-1-2-2017-01", true, false),
    policy("ELBSecurityPolicy-TLS-1-2-Ext-2018-06", true, false),
];
const DEFAULT_POLICY: TlsPolicy = POLICIES[0];

/// AWS's policies that clients of TLS 1.0 or 1.1 may use.
const OLD_POLICIES: [&str; 6] = [
    "ELBSecurityPolicy-TLS13-1-1-2021-06",
    "ELBSecurityPolicy-TLS13-1-0-2021-06",
    "ELBSecurityPolicy-FS-1-1-2019-08",
    "ELBSecurityPolicy-FS-2018-06",
    "ELBSecurityPolicy-TLS-1-1-2017-01",
    "ELBSecurityPolicy-2016-08",
];

const fn policy(name: &'static str, tls12: bool, tls13: bool) -> TlsPolicy {
    TlsPolicy { name, tls12, tls13 }
}

/// Keys of TLS have no meaning in a listener of plain HTTP.
pub(super) fn read(
    table: &mut Table<'_>,
    protocol: ProxyProtocol,
    http2: bool,
) -> Option<ListenerTls> {
    if protocol != ProxyProtocol::Tls {
        table.meaningless(
            &["alpn_policy"],
            "but in a tls listener",
            "leave it out; `enable_http2` of the load balancer says whether HTTP/2 is offered",
        );
    }
    if protocol == ProxyProtocol::Http {
        let keys = ["certificates", "ssl_policy"];
        table.meaningless(
            &keys,
            "in an http listener",
            "leave it out, or write protocol = \"https\"",
        );
        return None;
    }
    let help = "add certificates = [{ cert = \"/etc/lb/site.pem\", key = \"/etc/lb/site.key\" }]";
    let certificates = table.required("certificates", help).map(certificates).unwrap_or_default();
    let policy = table.optional("ssl_policy").and_then(policy_of).unwrap_or(DEFAULT_POLICY);
    let alpn: &[&str] = match protocol {
        ProxyProtocol::Tls => table.optional("alpn_policy").and_then(alpn_of).unwrap_or_default(),
        _ if http2 => &["h2", "http/1.1"],
        _ => &["http/1.1"],
    };
    let tls = ListenerTls {
        certificates,
        policy,
        alpn: alpn.iter().map(|&name| name.to_owned()).collect(),
    };
    Some(tls)
}

fn policy_of(value: Value<'_>) -> Option<TlsPolicy> {
    if OLD_POLICIES.iter().any(|old| value.is(old)) {
        let message = format!("{} lets TLS 1.0 or 1.1 in, which is not spoken here", value.quote());
        value.error(
            message,
            format!("write \"{}\", or another of TLS 1.2 and 1.3", DEFAULT_POLICY.name),
        );
        return None;
    }
    value.choice(&POLICIES.map(|policy| (policy.name, policy)), &[])
}

/// AWS's policies: what is offered, in order of preference.
fn alpn_of(value: Value<'_>) -> Option<&'static [&'static str]> {
    let known: [(&str, &'static [&'static str]); 5] = [
        ("None", &[]),
        ("HTTP1Only", &["http/1.1", "http/1.0"]),
        ("HTTP2Only", &["h2"]),
        ("HTTP2Optional", &["http/1.1", "http/1.0", "h2"]),
        ("HTTP2Preferred", &["h2", "http/1.1", "http/1.0"]),
    ];
    value.choice(&known, &[])
}

const HELP: &str = "write [{ cert = \"/etc/lb/site.pem\", key = \"/etc/lb/site.key\" }], files in \
                    PEM; the first is for clients that name no server";

fn certificates(value: Value<'_>) -> Vec<CertificateFiles> {
    let Some(items) = value.items(HELP) else { return Vec::new() };
    if items.is_empty() {
        value.error("`certificates` is [], so no client can connect", HELP);
    }
    let mut certificates: Vec<CertificateFiles> = Vec::new();
    for item in items {
        let Some(files) = certificate(item) else { continue };
        if certificates.contains(&files) {
            item.error("`certificates` has this one twice", "leave one out");
        }
        item.is_certificate(files.clone());
        certificates.push(files);
    }
    certificates
}

fn certificate(value: Value<'_>) -> Option<CertificateFiles> {
    let mut table = value.table("this certificate", HELP)?;
    let certificate = table.required("cert", "add cert = \"/etc/lb/site.pem\"").and_then(path);
    let key = table.required("key", "add key = \"/etc/lb/site.key\"").and_then(path);
    table.finish();
    Some(CertificateFiles { certificate: certificate?, key: key? })
}

fn path(value: Value<'_>) -> Option<PathBuf> {
    absolute_path(value, "write the absolute path of a file in PEM, such as \"/etc/lb/site.pem\"")
}

/// The path of a file that does not depend on where the agent was started.
pub(super) fn absolute_path(value: Value<'_>, help: &str) -> Option<PathBuf> {
    value.parsed(help, |path| {
        if path.starts_with('/') && !path.ends_with('/') && !path.contains('\0') {
            Ok(PathBuf::from(path))
        } else {
            Err(Wrong::new(value.refusal(), help))
        }
    })
}
