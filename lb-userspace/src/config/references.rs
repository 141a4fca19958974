//! Checks across sections: what no section can know alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use lb_common::tables;

use super::diagnostic::Report;
use super::load_balancer::{self, ListenerDraft};
use super::model::{Forwarding, Target};
use super::reader::{Value, did_you_mean};
use super::target_group::{self, UNKNOWN_PORT};

/// Most (address, listener) pairs of a configuration: the data plane's listener table is fixed.
pub const MAX_ENDPOINTS: usize = 4096;
// Index 0 of both tables is never used, and a reload may replace everything at once.
const _: () = assert!(2 * MAX_ENDPOINTS < tables::MAX_LISTENERS as usize);
const _: () = assert!(2 * MAX_TARGETS < tables::MAX_TARGETS as usize);
/// Most targets of a configuration: the data plane's target table is fixed.
pub const MAX_TARGETS: usize = 16_000;
/// Most target groups in use, counted once for each address family that a listener needs of them:
/// each use is a ring.
pub const MAX_TARGET_GROUP_USES: usize = 256;

/// Everything that was read, by name and in the file's order.
pub(super) struct Sections<'a> {
    pub(super) security_groups: BTreeSet<&'a str>,
    pub(super) target_groups: Vec<(&'a str, target_group::Draft<'a>)>,
    pub(super) load_balancers: Vec<(&'a str, load_balancer::Draft<'a>)>,
}

pub(super) fn check(report: &Report<'_>, sections: &Sections<'_>) {
    let groups: BTreeMap<&str, &target_group::Draft<'_>> =
        sections.target_groups.iter().map(|(name, group)| (*name, group)).collect();
    for (_, load_balancer) in &sections.load_balancers {
        check_security_groups(load_balancer, &sections.security_groups);
        for listener in &load_balancer.listeners {
            check_listener(listener, &groups);
        }
        warn_of_missing_families(load_balancer, &groups);
    }
    check_addresses(sections);
    check_limits(report, sections);
}

fn check_security_groups(load_balancer: &load_balancer::Draft<'_>, groups: &BTreeSet<&str>) {
    for (value, name) in load_balancer.security_groups.iter().flatten() {
        if !groups.contains(name) {
            refuse_unknown(*value, name, "security_group", groups.iter().copied());
        }
    }
}

/// Refuses a reference to a section that is not there.
fn refuse_unknown<'a>(
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

fn check_listener(listener: &ListenerDraft<'_>, groups: &BTreeMap<&str, &target_group::Draft<'_>>) {
    let Some((value, name)) = listener.target_group else { return };
    let Some(group) = groups.get(name) else {
        return refuse_unknown(value, name, "target_group", groups.keys().copied());
    };
    if let (Some(ours), Some(theirs)) = (listener.protocol, group.protocol)
        && ours != theirs
    {
        value.error(
            format!(
                "a {ours} listener cannot forward to {}, a {theirs} target group",
                value.quote()
            ),
            "use a target group of the listener's protocol",
        );
    }
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
                 [target_group.{name}.health_check]",
                other.port
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
fn warn_of_missing_families(
    load_balancer: &load_balancer::Draft<'_>,
    groups: &BTreeMap<&str, &target_group::Draft<'_>>,
) {
    let names: BTreeSet<&str> = load_balancer
        .listeners
        .iter()
        .filter_map(|listener| listener.target_group.map(|(_, name)| name))
        .collect();
    for (value, address) in &load_balancer.addresses {
        let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
        for name in &names {
            let Some(group) = groups.get(name) else { continue };
            let targets = &group.group.targets;
            let forwarding = group.group.forwarding;
            if !targets.iter().any(|target| forwarding.can_lead(*address, target.address)) {
                value.warning(
                    format!(
                        "{} has no target: target group \"{name}\" has none with an {family} \
                         address",
                        value.quote()
                    ),
                    format!(
                        "add {family} targets to [target_group.{name}], or clients are turned away"
                    ),
                );
            }
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
        load_balancers().map(|each| each.addresses.len() * each.listeners.len()).sum();
    let targets: usize =
        sections.target_groups.iter().map(|(_, group)| group.group.targets.len()).sum();
    let uses: BTreeSet<(&str, bool)> = load_balancers()
        .flat_map(|each| {
            each.listeners.iter().filter_map(|listener| listener.target_group).flat_map(
                |(_, name)| each.addresses.iter().map(move |(_, ip)| (name, ip.is_ipv4())),
            )
        })
        .collect();
    let limits = [
        (endpoints, MAX_ENDPOINTS, "endpoints (addresses times listeners)"),
        (targets, MAX_TARGETS, "targets"),
        (uses.len(), MAX_TARGET_GROUP_USES, "target groups in use (for each address family)"),
    ];
    for (count, max, what) in limits {
        if count > max {
            let message = format!("the file has {count} {what}, more than one agent can take");
            report.error(0..0, message, format!("use at most {max}, or several agents"));
        }
    }
}
