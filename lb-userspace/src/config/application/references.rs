//! Checks of proxied listeners across sections.

use super::super::forward::GroupDraft;
use super::super::load_balancer;
use super::super::model::{HttpVersion, LoadBalancerType, ProxyProtocol, Stickiness};
use super::super::protocol::AnyProtocol;
use super::super::references::{Groups, refuse_unknown};
use super::super::target_group;
use super::listener::Draft;

/// What a load balancer's proxied listeners name.
pub(in super::super) fn check(load_balancer: &load_balancer::Draft<'_>, groups: &Groups<'_>) {
    for listener in &load_balancer.proxied {
        for draft in &listener.groups {
            match groups.get(draft.name) {
                Some(group) => check_group(listener, draft, group, load_balancer.attributes.http2),
                None => {
                    let known = groups.keys().copied();
                    refuse_unknown(draft.value, draft.name, "target_group", known);
                }
            }
        }
    }
    if let Some(logs) = load_balancer.access_logs
        && load_balancer.kind == Some(LoadBalancerType::Network)
        && load_balancer.proxied.is_empty()
    {
        logs.error(
            "`access_logs` has no meaning without a tls listener",
            "leave it out: packets that are forwarded as they are leave no log",
        );
    }
}

fn check_group(
    listener: &Draft<'_>,
    draft: &GroupDraft<'_>,
    group: &target_group::Draft<'_>,
    http2: bool,
) {
    let Some(protocol) = group.protocol else { return };
    let value = draft.value;
    let is_tls = listener.protocol == ProxyProtocol::Tls;
    let fits = if is_tls {
        matches!(protocol, AnyProtocol::Tcp | AnyProtocol::Tls)
    } else {
        protocol.is_http()
    };
    if !fits {
        let kinds = if is_tls { "tcp or tls" } else { "http or https" };
        let message = format!(
            "{} listener cannot forward to {}, {protocol} target group",
            AnyProtocol::from(listener.protocol),
            value.quote(),
        );
        value.error(message, format!("use a target group of protocol {kinds}"));
    } else if is_tls && group.stickiness == Some(Stickiness::SourceIp) {
        value.error(
            format!("a tls listener cannot forward to {}, which has stickiness", value.quote()),
            "use a target group without `stickiness`",
        );
    } else if !http2 && group.group.proxy.version != HttpVersion::Http1 {
        value.warning(
            format!(
                "every request to {} will be refused: its targets speak HTTP/2, and `enable_http2 \
                 = false` keeps clients from it",
                value.quote()
            ),
            "use a target group of protocol_version = \"http1\", or leave `enable_http2` out",
        );
    }
}

/// What a listener that forwards packets as they are cannot do.
pub(in super::super) fn check_forwarded(draft: &GroupDraft<'_>, group: &target_group::Draft<'_>) {
    if group.proxy_protocol.is_some() {
        draft.value.error(
            format!(
                "packets to {} are forwarded as they are, without PROXY protocol",
                draft.value.quote()
            ),
            "use a target group without `proxy_protocol_v2`: targets see the client's address \
             anyway, unless it has forwarding = \"snat\"",
        );
    }
}
