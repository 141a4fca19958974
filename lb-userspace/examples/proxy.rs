//! The proxy alone, without XDP and agent, as `cargo xtask bench http` measures it: an http
//! listener, and an https one where there is a certificate, in front of one target.

use std::error::Error;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use lb_userspace::config::model::{
    Action, Attributes, CertificateFiles, Condition, Forward, HttpVersion, ListenerTls, Pattern,
    ProxyListener, ProxyProtocol, ProxySettings, Rule, TargetProtocol, TlsPolicy, Transforms,
    WeightedTargetGroup,
};
use lb_userspace::proxy::Proxy;
use lb_userspace::proxy::routes::{
    FULL_SHARE, GroupRoute, ListenerRoute, Routes, TargetRoute, TargetState,
};

const GRACE: Duration = Duration::from_secs(1);

/// Serves until a signal ends it.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where the http listener is.
    #[arg(long)]
    http: SocketAddr,
    /// Where the https listener is.
    #[arg(long, requires = "cert", requires = "key")]
    https: Option<SocketAddr>,
    /// Certificate of the https listener, PEM.
    #[arg(long)]
    cert: Option<PathBuf>,
    /// Its key, PEM.
    #[arg(long)]
    key: Option<PathBuf>,
    /// Where requests go.
    #[arg(long)]
    target: SocketAddr,
    /// Whether the target speaks HTTP/2.
    #[arg(long)]
    http2: bool,
    /// Rules of each listener before its default action, each with a target group of its own.
    #[arg(long, default_value_t = 0)]
    rules: u16,
    /// Threads.
    #[arg(long, default_value_t = 1)]
    workers: usize,
}

impl Arguments {
    fn routes(&self) -> Routes {
        let plain = self.listener(self.http, None);
        let tls = self.https.zip(self.cert.clone().zip(self.key.clone()));
        let tls = tls.map(|(address, (certificate, key))| {
            self.listener(address, Some(CertificateFiles { certificate, key }))
        });
        let version = if self.http2 { HttpVersion::Http2 } else { HttpVersion::Http1 };
        let target = TargetRoute {
            address: self.target,
            weight: 1,
            share: FULL_SHARE,
            zone: None,
            state: TargetState::InService,
        };
        let settings =
            ProxySettings { protocol: TargetProtocol::Http, version, ..ProxySettings::default() };
        let group = GroupRoute { settings, slow_start: Duration::ZERO, targets: vec![target] };
        Routes {
            listeners: [plain].into_iter().chain(tls).collect(),
            groups: (1..=self.rules)
                .map(|n| (rule_group(n).into(), group.clone()))
                .chain([("target".into(), group.clone())])
                .collect(),
            cookie_key: [0; 32],
        }
    }

    fn listener(
        &self,
        address: SocketAddr,
        certificate: Option<CertificateFiles>,
    ) -> (SocketAddr, ListenerRoute) {
        let rule = |priority| Rule {
            priority,
            conditions: vec![Condition::PathPattern(vec![Pattern::Wildcard(format!(
                "/rule-{priority}/*"
            ))])],
            transforms: Transforms::default(),
            action: forward(rule_group(priority)),
        };
        let listener = ProxyListener {
            protocol: match certificate {
                Some(_) => ProxyProtocol::Https,
                None => ProxyProtocol::Http,
            },
            port: address.port(),
            tls: certificate.map(|certificate| ListenerTls {
                certificates: vec![certificate],
                policy: TlsPolicy {
                    name: "ELBSecurityPolicy-TLS13-1-2-2021-06",
                    tls12: true,
                    tls13: true,
                },
                alpn: Vec::new(),
            }),
            default_action: forward("target".to_owned()),
            rules: (1..=self.rules).map(rule).collect(),
        };
        let route = ListenerRoute {
            load_balancer: "bench".into(),
            listener: Arc::new(listener),
            attributes: Arc::new(Attributes::default()),
            zone: None,
            cross_zone: true,
        };
        (address, route)
    }
}

/// The group that only one rule forwards to.
fn rule_group(n: u16) -> String {
    format!("rule-{n}")
}

fn forward(group: String) -> Action {
    let target_groups = vec![WeightedTargetGroup { name: group, weight: 1 }];
    Action::Forward(Forward { target_groups, stickiness: None })
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let proxy = Proxy::start(arguments.workers)?;
    if let Some(problem) = proxy.apply(arguments.routes()).into_iter().next() {
        return Err(problem.to_string().into());
    }
    println!("ready");
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        ended = tokio::signal::ctrl_c() => ended?,
        _ = terminated.recv() => {}
    }
    proxy.end(GRACE).await;
    Ok(())
}
