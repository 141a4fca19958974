//! Checks across sections: what no section can know alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use lb_common::tables;

use super::application;
use super::diagnostic::Report;
use super::dns;
use super::forward::GroupDraft;
use super::load_balancer::{self, ListenerDraft};
use super::model::{Forwarding, Stickiness, Target};
use super::protocol::AnyProtocol;
use super::reader::{Value, did_you_mean};
use super::security_group;
use super::security_group_uses;
use super::target_group::{self, UNKNOWN_PORT};

/// Most (address, listener) pairs of a configuration: the data plane's listener table is fixed.
pub const MAX_ENDPOINTS: usize = 4096;
// Index 0 of both tables is never used, and a reload may replace everything at once.
const _: () = assert!(2 * MAX_ENDPOINTS < tables::MAX_LISTENERS as usize);
const _: () = assert!(2 * MAX_TARGETS < tables::MAX_TARGETS as usize);
/// Most targets of a configuration: the data plane's target table is fixed.
pub const MAX_TARGETS: usize = 16_000;
/// Most forward actions: target groups, or weighted lists of them, that listeners forward to.
/// Each is counted once for each address family that a listener needs of it, and apart with
/// `cross_zone = false`: that is a ring.
pub const MAX_FORWARD_ACTIONS: usize = 256;

/// Everything that was read, by name and in the file's order.
pub(super) struct Sections<'a> {
    /// The agent's zone.
    pub(super) availability_zone: Option<String>,
    pub(super) security_groups: BTreeMap<&'a str, security_group::Draft<'a>>,
    pub(super) target_groups: Vec<(&'a str, target_group::Draft<'a>)>,
    pub(super) load_balancers: Vec<(&'a str, load_balancer::Draft<'a>)>,
    pub(super) dns: Option<dns::Draft<'a>>,
}

pub(super) type Groups<'a> = BTreeMap<&'a str, &'a target_group::Draft<'a>>;

pub(super) fn check(report: &Report<'_>, sections: &Sections<'_>) {
    let groups: Groups<'_> =
        sections.target_groups.iter().map(|(name, group)| (*name, group)).collect();
    for (_, load_balancer) in &sections.load_balancers {
        check_security_groups(load_balancer, &sections.security_groups);
        for listener in &load_balancer.listeners {
            check_listener(listener, &groups);
        }
        application::check(load_balancer, &groups);
        warn_of_missing_families(load_balancer, &groups);
        check_zone(load_balancer, &groups, sections.availability_zone.as_deref());
    }
    security_group_uses::check(sections);
    check_addresses(sections);
    check_limits(report, sections);
}

fn check_security_groups(
    load_balancer: &load_balancer::Draft<'_>,
    groups: &BTreeMap<&str, security_group::Draft<'_>>,
) {
    for (value, name) in load_balancer.security_groups.iter().flatten() {
        if !groups.contains_key(name) {
            refuse_unknown(*value, name, "security_group", groups.keys().copied());
        }
    }
}

/// Refuses a reference to a section that is not there.
pub(super) fn refuse_unknown<'a>(
    value: Value<'_>,
    name: &str,
    kind: &str,
    known: impl Iterator<Item = &'a str>,
) {
    let known: Vec<&str> = known.collect();
    let help =
        did_you_mean(name, &known) + &format!("add a section [{kind}.{name}] or use another");
    value.error(format!("there is no {} {}", kind.replace('_', " "), value.quote()), help);
}

fn check_listener(listener: &ListenerDraft<'_>, groups: &Groups<'_>) {
    let mut first: Option<(&GroupDraft<'_>, Stickiness)> = None;
    for draft in &listener.target_groups {
        let Some(group) = groups.get(draft.name) else {
            refuse_unknown(draft.value, draft.name, "target_group", groups.keys().copied());
            continue;
        };
        check_group(listener, draft, group);
        let Some(stickiness) = group.stickiness else { continue };
        match first {
            Some((other, differing)) if differing != stickiness => draft.value.error(
                format!(
                    "{} and {} cannot share a listener: only one of them has stickiness",
                    other.value.quote(),
                    draft.value.quote()
                ),
                "a listener has one way to choose among all its targets: give both groups the \
                 same stickiness",
            ),
            _ => first = first.or(Some((draft, stickiness))),
        }
    }
}

fn check_group(
    listener: &ListenerDraft<'_>,
    draft: &GroupDraft<'_>,
    group: &target_group::Draft<'_>,
) {
    let value = draft.value;
    if let (Some(ours), Some(theirs)) = (listener.protocol.map(AnyProtocol::from), group.protocol)
        && ours != theirs
    {
        value.error(
            format!("{ours} listener cannot forward to {}, {theirs} target group", value.quote()),
            "use a target group of the listener's protocol",
        );
    }
    application::check_forwarded(draft, group);
    let Some((port, other)) = other_port(listener, group) else { return };
    if group.forwarding == Some(Forwarding::DsrL2) {
        let message = format!(
            "{} forwards by dsr_l2, which cannot rewrite port {port} to {} of target {}",
            value.quote(),
            other.port,
            other.address
        );
        let help = format!("give its targets port {port}, or use forwarding = \"nat\"");
        value.error(message, help);
    } else if group.forwarding.is_some_and(Forwarding::is_tunnel) && checks_own_port(group) {
        value.warning(
            format!(
                "packets keep port {port} on their way through the tunnel to {}; port {} of target \
                 {} is for its health checks alone",
                value.quote(),
                other.port,
                other.address
            ),
            format!(
                "give its targets port {port}, or say port = {} in \
                 [target_group.{}.health_check]",
                other.port, draft.name
            ),
        );
    }
}

/// The listener's port, and a target of the group that has another.
fn other_port<'a>(
    listener: &ListenerDraft<'_>,
    group: &'a target_group::Draft<'_>,
) -> Option<(u16, &'a Target)> {
    let port = listener.port?;
    let other = group.group.targets.iter().find(|target| target.port != port)?;
    (other.port != UNKNOWN_PORT).then_some((port, other))
}

/// Whether health checks go to the targets' own ports.
fn checks_own_port(group: &target_group::Draft<'_>) -> bool {
    group.group.health_check.port.is_none()
}

/// But in a tunnel, a packet keeps its family on the way to a target; so an address without targets
/// of its own family answers like one without targets.
fn warn_of_missing_families(load_balancer: &load_balancer::Draft<'_>, groups: &Groups<'_>) {
    for (value, address) in &load_balancer.addresses {
        let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
        let lacks_family = |draft: &&GroupDraft<'_>| {
            groups.get(draft.name).is_some_and(|group| {
                let forwarding = group.group.forwarding;
                let mut targets = group.group.targets.iter();
                !targets.any(|target| forwarding.can_lead(*address, target.address))
            })
        };
        let mut lacking = BTreeMap::new();
        for listener in &load_balancer.listeners {
            let used = || listener.target_groups.iter().filter(|group| group.weight > 0);
            let has_none = used().all(|draft| lacks_family(&draft));
            for draft in used().filter(lacks_family) {
                *lacking.entry(draft.name).or_default() |= has_none;
            }
        }
        for (name, has_none) in lacking {
            let subject = value.quote();
            let (message, effect) = if has_none {
                let message = format!(
                    "{subject} has no target: target group \"{name}\" has none with an {family} \
                     address"
                );
                (message, "clients are turned away")
            } else {
                let message = format!(
                    "target group \"{name}\" has no target with an {family} address for {subject}"
                );
                (message, "the listener's other groups get its share")
            };
            let help = format!("add {family} targets to [target_group.{name}], or {effect}");
            value.warning(message, help);
        }
    }
}

/// Keeping to one's zone takes a zone, and targets in it.
fn check_zone(
    load_balancer: &load_balancer::Draft<'_>,
    groups: &Groups<'_>,
    availability_zone: Option<&str>,
) {
    let Some((value, false)) = load_balancer.cross_zone else { return };
    let Some(zone) = availability_zone else {
        let message = "`cross_zone = false` keeps to the agent's zone, which is not known";
        value.error(message, "add availability_zone = \"NAME\" to [agent], or leave the key out");
        return;
    };
    let names: BTreeSet<&str> = load_balancer.groups().map(|draft| draft.name).collect();
    for name in names {
        let Some(group) = groups.get(name) else { continue };
        let in_zone =
            |target: &Target| target.availability_zone.as_deref().is_none_or(|other| other == zone);
        if !group.group.targets.is_empty() && !group.group.targets.iter().any(in_zone) {
            value.warning(
                format!("target group \"{name}\" has no target in the agent's zone, \"{zone}\""),
                "add one, or its targets in all other zones get the packets",
            );
        }
    }
}

/// A listener address belongs to one load balancer and to no target.
fn check_addresses(sections: &Sections<'_>) {
    let mut owners: HashMap<IpAddr, Value<'_>> = HashMap::new();
    for (_, load_balancer) in &sections.load_balancers {
        for (value, address) in &load_balancer.addresses {
            if let Some(first) = owners.get(address) {
                value.error(
                    format!("{} is a listener address twice", value.quote()),
                    format!("leave one out; the first is in line {}", first.line()),
                );
            } else {
                owners.insert(*address, *value);
            }
        }
    }
    if let Some((value, socket)) = sections.dns.as_ref().map(|dns| dns.listen)
        && let Some(owner) = owners.get(&socket.ip())
    {
        value.error(
            format!("{} is a listener address", value.quote()),
            format!(
                "listen on another address of this machine; that one is in line {}",
                owner.line()
            ),
        );
    }
    for (_, group) in &sections.target_groups {
        for (value, target) in group.target_values.iter().zip(&group.group.targets) {
            if let Some(owner) = owners.get(&target.address) {
                value.error(
                    format!("target {} is a listener address", target.address),
                    format!(
                        "packets would come back to the load balancer; use the target's own \
                         address, or change line {}",
                        owner.line()
                    ),
                );
            }
        }
    }
}

fn check_limits(report: &Report<'_>, sections: &Sections<'_>) {
    let load_balancers = || sections.load_balancers.iter().map(|(_, load_balancer)| load_balancer);
    let endpoints: usize =
        load_balancers().map(|each| each.addresses.len() * each.listener_count()).sum();
    let targets: usize =
        sections.target_groups.iter().map(|(_, group)| group.group.targets.len()).sum();
    let actions: BTreeSet<_> = load_balancers()
        .flat_map(|each| {
            let crosses = each.cross_zone.is_none_or(|(_, crosses)| crosses);
            each.listeners.iter().filter(|listener| !listener.target_groups.is_empty()).flat_map(
                move |listener| {
                    let groups = listener.target_groups.iter();
                    let action: BTreeSet<_> = match listener.target_groups.as_slice() {
                        [only] => [(only.name, 1)].into(),
                        _ => groups.map(|group| (group.name, group.weight)).collect(),
                    };
                    let families = each.addresses.iter().map(|(_, ip)| ip.is_ipv4());
                    families.map(move |is_v4| (action.clone(), crosses, is_v4))
                },
            )
        })
        .collect();
    let limits = [
        (endpoints, MAX_ENDPOINTS, "endpoints (addresses times listeners)"),
        (targets, MAX_TARGETS, "targets"),
        (actions.len(), MAX_FORWARD_ACTIONS, "forward actions (for each address family)"),
    ];
    for (count, max, what) in limits {
        if count > max {
            let message = format!("the file has {count} {what}, more than one agent can take");
            report.error(0..0, message, format!("use at most {max}, or several agents"));
        }
    }
}
