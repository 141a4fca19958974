//! Security groups that others refer to: whether `sg:NAME` and `security_group` can mean what they
//! say, by how packets reach the targets.

use std::collections::BTreeSet;

use super::model::{Forwarding, Member};
use super::protocol::AnyProtocol;
use super::reader::Value;
use super::references::{Sections, refuse_unknown};
use super::security_group;
use super::target_group;

pub(super) fn check(sections: &Sections<'_>) {
    for group in sections.security_groups.values() {
        for (value, name) in &group.references {
            check_reference(sections, *value, name);
        }
    }
    for (name, target_group) in &sections.target_groups {
        let Some((value, security_group)) = target_group.security_group else { continue };
        match sections.security_groups.get(security_group) {
            Some(carried) => check_target_group(sections, name, target_group, value, carried),
            None => {
                let known = sections.security_groups.keys().copied();
                refuse_unknown(value, security_group, "security_group", known);
            }
        }
    }
}

fn check_reference(sections: &Sections<'_>, value: Value<'_>, name: &str) {
    let Some(group) = sections.security_groups.get(name) else {
        let known = sections.security_groups.keys().copied();
        return refuse_unknown(value, name, "security_group", known);
    };
    if group.group.members.is_empty() {
        value.error(
            format!("{} lets nobody in: [security_group.{name}] has no members", value.quote()),
            format!(
                "add members to [security_group.{name}]: addresses and MAC addresses of the \
                 machines that carry it, such as members = [\"10.0.2.1\", \"02:00:0a:00:02:01\"]"
            ),
        );
    }
}

/// What a load balancer's packets to the targets are known by must be among its group's members.
fn check_target_group(
    sections: &Sections<'_>,
    name: &str,
    target_group: &target_group::Draft<'_>,
    value: Value<'_>,
    carried: &security_group::Draft<'_>,
) {
    let (Some(protocol), Some(forwarding)) = (target_group.protocol, target_group.forwarding)
    else {
        return;
    };
    let in_front = groups_in_front(sections, name);
    let groups = carried
        .references
        .iter()
        .filter(|(_, group)| in_front.as_ref().is_none_or(|groups| groups.contains(group)))
        .filter_map(|(_, group)| Some((*group, sections.security_groups.get(group)?)))
        .filter(|(_, group)| !group.group.members.is_empty());
    let needs = needs(sections, name, protocol, forwarding);
    let pairs = groups.flat_map(|group| needs.iter().map(move |needed| (group, needed)));
    for ((group, draft), needed) in pairs {
        let members = &draft.group.members;
        if members.iter().any(|member| needed.matches(*member)) {
            if !members.iter().any(|member| !matches!(member, Member::Tunnels(_))) {
                warn_of_health_checks(value, group);
            }
            continue;
        }
        // Where no load balancer is named, another of the groups may be the one in front.
        if in_front.is_some() || carried.references.len() == 1 {
            value.error(
                format!(
                    "target group \"{name}\" {}, so packets come {}: \"sg:{group}\" lets none of \
                     them in",
                    needed.mode, needed.how
                ),
                format!("add {} to `members` of [security_group.{group}]", needed.what),
            );
        }
    }
}

/// By which ways packets come, as forwarded ones or in connections of the proxy.
fn needs(
    sections: &Sections<'_>,
    name: &str,
    protocol: AnyProtocol,
    forwarding: Forwarding,
) -> Vec<Needed> {
    let load_balancers = || sections.load_balancers.iter().map(|(_, it)| it);
    let mut forwarded = load_balancers().flat_map(|it| &it.listeners);
    let mut proxied = load_balancers().flat_map(|it| &it.proxied);
    let is_forwarded = forwarded.any(|it| it.target_groups.iter().any(|group| group.name == name));
    let is_proxied = protocol.proxied().is_some()
        || proxied.any(|it| it.groups.iter().any(|group| group.name == name));
    let mut needs = Vec::new();
    if is_forwarded || !is_proxied {
        needs.push(needed(forwarding));
    }
    if is_proxied {
        needs.push(PROXIED);
    }
    needs
}

fn warn_of_health_checks(value: Value<'_>, group: &str) {
    value.warning(
        format!(
            "health checks come from the load balancer's own address, which \"sg:{group}\" does \
             not let in"
        ),
        format!("add the load balancer's address to `members` of [security_group.{group}]"),
    );
}

/// The groups of the load balancers that forward to a target group; `None` if the file has no
/// such load balancer, as on a target.
fn groups_in_front<'a>(
    sections: &'a Sections<'_>,
    target_group: &str,
) -> Option<BTreeSet<&'a str>> {
    let mut load_balancers = sections
        .load_balancers
        .iter()
        .map(|(_, load_balancer)| load_balancer)
        .filter(|load_balancer| load_balancer.groups().any(|group| group.name == target_group))
        .peekable();
    load_balancers.peek()?;
    let groups = load_balancers.flat_map(|each| each.security_groups.iter().flatten());
    Some(groups.map(|(_, name)| *name).collect())
}

/// What a load balancer's packets are known by.
struct Needed {
    mode: &'static str,
    how: &'static str,
    what: &'static str,
}

impl Needed {
    fn matches(&self, member: Member) -> bool {
        match member {
            Member::Mac(_) => self.what == MAC,
            Member::Address(_) => self.what != MAC,
            Member::Tunnels(_) => self.what == TUNNELS,
        }
    }
}

const MAC: &str = "the MAC address that the load balancer sends from";
const ADDRESS: &str = "the addresses that the load balancer sends from";
const TUNNELS: &str = "the networks of its tunnel sources";

/// Of connections that the proxy opens.
const PROXIED: Needed = Needed {
    mode: "is behind the proxy",
    how: "from the load balancer's own address",
    what: ADDRESS,
};

fn needed(forwarding: Forwarding) -> Needed {
    let segment = "with the client's address from the load balancer's MAC address";
    let tunnel = "in tunnels from its tunnel sources";
    match forwarding {
        Forwarding::Nat => Needed { mode: "forwards by nat", how: segment, what: MAC },
        Forwarding::Snat => Needed {
            mode: "forwards by snat",
            how: "from the load balancer's own address or its snat_addresses",
            what: ADDRESS,
        },
        Forwarding::DsrL2 => Needed { mode: "forwards by dsr_l2", how: segment, what: MAC },
        Forwarding::DsrIpip => Needed { mode: "forwards by dsr_ipip", how: tunnel, what: TUNNELS },
        Forwarding::DsrGue => Needed { mode: "forwards by dsr_gue", how: tunnel, what: TUNNELS },
    }
}
