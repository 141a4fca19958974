//! What follows from a configuration for a machine with certain addresses. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use lb_common::flow::{ICMP, ICMPV6, TCP, UDP};
use lb_common::tables::EndpointKey;
use lb_common::target::tables::{
    CLASSES, DENIED, FIRST_CLASS, OPEN, SENDERS, Settings, class_index, mac_key, space,
};
use lb_common::tunnel::Tunnel;
use lb_common::wire::{Address, Be16};

use crate::config::{
    Config, Forwarding, IngressRule, Member, RuleProtocol, SecurityGroup, TargetGroup,
};

use super::plan::{Sender, Tables};

/// Bits in front of an IPv4 address in its mapped form.
const MAPPED_BITS: u8 = 96;

/// What a machine is a target of, and what it has to do for that.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// The target groups that have an address of the machine.
    pub target_groups: Vec<String>,
    /// The security groups that the machine carries.
    pub security_groups: Vec<String>,
    /// The machine's addresses that are targets.
    pub addresses: BTreeSet<IpAddr>,
    /// What the tables should hold.
    pub tables: Tables,
    /// What an operator should know.
    pub warnings: Vec<String>,
}

/// Finds the target groups that have one of the machine's `addresses`, and compiles the union of
/// their security groups. Classes keep the numbers that they have in `old`.
pub fn compile(config: &Config, addresses: &BTreeSet<IpAddr>, old: &Tables) -> Policy {
    let mut policy = Policy::default();
    let mut groups: BTreeMap<&str, &SecurityGroup> = BTreeMap::new();
    let mut open = Vec::new();
    let settings = &mut policy.tables.settings;
    for (name, group) in &config.target_groups {
        let targets = group.targets.iter().map(|target| target.address);
        let own: BTreeSet<IpAddr> = targets.filter(|it| addresses.contains(it)).collect();
        if own.is_empty() {
            continue;
        }
        for end in own.iter().flat_map(|address| tunnel_ends(group, *address)) {
            let flag =
                if end.protocol == UDP { Settings::UNWRAPS_GUE } else { Settings::UNWRAPS_IPIP };
            settings.flags |= flag;
            policy.tables.tunnel_ends.insert(end);
        }
        match &group.security_group {
            Some(carried) => {
                if let Some((carried, group)) = config.security_groups.get_key_value(carried) {
                    groups.insert(carried, group);
                }
            }
            None => open.push(name.clone()),
        }
        policy.target_groups.push(name.clone());
        policy.addresses.extend(own);
    }
    if !groups.is_empty() {
        settings.flags |= Settings::RECORDS | Settings::ENFORCES;
    }
    policy.security_groups = groups.keys().map(|name| (*name).to_owned()).collect();
    warn(&mut policy, &open);
    let rules = Rules { groups: groups.into_values().collect(), config };
    rules.put_classes(&mut policy.tables, old);
    policy
}

fn warn(policy: &mut Policy, open: &[String]) {
    if policy.target_groups.is_empty() {
        policy.warnings.push(
            "no target group has an address of this machine: nothing is unwrapped, everybody is \
             let in"
                .into(),
        );
    } else if !policy.security_groups.is_empty() {
        for name in open {
            policy.warnings.push(format!(
                "target group {name} has no security group: what reaches this machine is decided \
                 by {} alone",
                policy.security_groups.join(", ")
            ));
        }
    }
}

/// Where a target group's tunnels to an address end.
fn tunnel_ends(group: &TargetGroup, address: IpAddr) -> Vec<EndpointKey> {
    let end = |port, protocol| EndpointKey::new(address.into(), Be16::new(port), protocol);
    match group.forwarding {
        Forwarding::DsrIpip => vec![end(0, Tunnel::IPV4), end(0, Tunnel::IPV6)],
        Forwarding::DsrGue => vec![end(group.gue_port, UDP)],
        Forwarding::Nat | Forwarding::Snat | Forwarding::DsrL2 => Vec::new(),
    }
}

/// The rules of all security groups that a machine carries.
struct Rules<'a> {
    groups: Vec<&'a SecurityGroup>,
    config: &'a Config,
}

impl Rules<'_> {
    fn put_classes(&self, tables: &mut Tables, old: &Tables) {
        let mut classes = Classes { old: &old.classes, new: &mut tables.classes };
        let mut places = vec![DENIED; CLASSES as usize];
        for is_v4 in [true, false] {
            for protocol in [TCP, UDP] {
                for first in self.first_ports(protocol) {
                    let class = classes.number(self.senders(is_v4, protocol, first));
                    let index = class_index(is_v4, protocol, Be16::new(first)) as usize;
                    // Up to the protocol's last port; later intervals write over it.
                    places[index..index + usize::from(u16::MAX - first) + 1].fill(class);
                }
            }
            let icmp = if is_v4 { ICMP } else { ICMPV6 };
            for protocol in [icmp, OTHER] {
                let index = class_index(is_v4, protocol, Be16::new(0)) as usize;
                places[index] = classes.number(self.senders(is_v4, protocol, 0));
            }
        }
        tables.places = if *places == *old.places { old.places.clone() } else { places.into() };
        if tables.settings.flags & Settings::UNWRAPS != 0 {
            let senders = share(self.tunnel_senders(), old.classes.get(&SENDERS));
            tables.classes.insert(SENDERS, senders);
        }
    }

    fn rules(&self) -> impl Iterator<Item = &IngressRule> {
        self.groups.iter().flat_map(|group| &group.ingress)
    }

    /// The ports at which the set of rules changes, ascending.
    fn first_ports(&self, protocol: u8) -> BTreeSet<u16> {
        let rules = self.rules().filter(|rule| concerns(rule, protocol));
        let ports = rules.flat_map(|rule| {
            [Some(*rule.ports.start()), rule.ports.end().checked_add(1)].into_iter().flatten()
        });
        ports.chain([0]).collect()
    }

    /// Whom the rules let in to a port.
    fn senders(&self, is_v4: bool, protocol: u8, port: u16) -> BTreeSet<Sender> {
        self.rules()
            .filter(|rule| concerns(rule, protocol) && rule.ports.contains(&port))
            .flat_map(|rule| {
                let networks = rule.sources.iter().map(|network| (space::SOURCE, *network));
                let members = rule.groups.iter().flat_map(|name| self.members(name));
                networks
                    .filter(move |(_, network)| network.addr().is_ipv4() == is_v4)
                    .map(|(space, network)| sender(space, network))
                    .chain(members.flat_map(move |member| known_by(*member, is_v4)))
            })
            .collect()
    }

    fn members(&self, group: &str) -> impl Iterator<Item = &Member> {
        self.config.security_groups.get(group).into_iter().flat_map(|group| &group.members)
    }

    /// Whose tunnels are unwrapped: those of the groups that rules name. Where no rule names any,
    /// the usual tunnel sources are taken for the load balancer's.
    fn tunnel_senders(&self) -> BTreeSet<Sender> {
        let named = self.rules().flat_map(|rule| &rule.groups).flat_map(|name| self.members(name));
        let senders: BTreeSet<Sender> =
            named.filter_map(|member| member.tunnel_sources()).map(tunnel_sender).collect();
        if self.rules().any(|rule| !rule.groups.is_empty()) {
            return senders;
        }
        let usual = &self.config.agent.tunnel_sources;
        [IpNet::V4(usual.v4), IpNet::V6(usual.v6)].map(tunnel_sender).into()
    }
}

/// A protocol that is neither TCP, UDP nor ICMP.
const OTHER: u8 = u8::MAX;

fn concerns(rule: &IngressRule, protocol: u8) -> bool {
    match rule.protocol {
        RuleProtocol::All => true,
        RuleProtocol::Tcp => protocol == TCP,
        RuleProtocol::Udp => protocol == UDP,
        RuleProtocol::Icmp => protocol == ICMP || protocol == ICMPV6,
    }
}

/// All that a member's packets of a family are known by.
fn known_by(member: Member, is_v4: bool) -> Vec<Sender> {
    let mut senders: Vec<Sender> = member.tunnel_sources().map(tunnel_sender).into_iter().collect();
    match member {
        Member::Address(address) if address.is_ipv4() == is_v4 => {
            senders.push(sender(space::SOURCE, address.into()));
        }
        Member::Mac(mac) => {
            senders.push(Sender { space: space::MAC, address: mac_key(mac), bits: 48 });
        }
        Member::Address(_) | Member::Tunnels(_) => {}
    }
    senders
}

fn tunnel_sender(network: IpNet) -> Sender {
    sender(if network.addr().is_ipv4() { space::TUNNEL_V4 } else { space::TUNNEL_V6 }, network)
}

fn sender(space: u32, network: IpNet) -> Sender {
    let before = if network.addr().is_ipv4() { MAPPED_BITS } else { 0 };
    Sender { space, address: Address::from(network.network()), bits: before + network.prefix_len() }
}

/// Classes while they are given out: equal contents get equal numbers, and keep them.
struct Classes<'a> {
    old: &'a BTreeMap<u16, Arc<BTreeSet<Sender>>>,
    new: &'a mut BTreeMap<u16, Arc<BTreeSet<Sender>>>,
}

impl Classes<'_> {
    fn number(&mut self, senders: BTreeSet<Sender>) -> u16 {
        let everybody = |sender: &Sender| {
            let is_v4 = sender.address.is_v4();
            sender.space == space::SOURCE && sender.bits == if is_v4 { MAPPED_BITS } else { 0 }
        };
        if senders.is_empty() {
            return DENIED;
        } else if senders.iter().any(everybody) {
            return OPEN;
        }
        let is_same = |(_, known): &(&u16, &Arc<BTreeSet<Sender>>)| ***known == senders;
        if let Some((number, _)) = self.new.iter().find(is_same) {
            return *number;
        }
        let old = self.old.iter().filter(|(number, _)| **number >= FIRST_CLASS).find(is_same);
        let (number, senders) = match old {
            Some((number, senders)) => (*number, senders.clone()),
            None => (self.free(), Arc::new(senders)),
        };
        self.new.insert(number, senders);
        number
    }

    /// A number that no port leads to, before or after. Two classes for each port of each protocol
    /// are more than there are numbers; a file with that many rules is refused by its size long
    /// before.
    fn free(&self) -> u16 {
        let is_free =
            |number: &u16| !self.old.contains_key(number) && !self.new.contains_key(number);
        (FIRST_CLASS..=u16::MAX).find(is_free).unwrap_or(DENIED)
    }
}

/// The old memory if the content is the same, so that comparing is quick.
fn share(senders: BTreeSet<Sender>, old: Option<&Arc<BTreeSet<Sender>>>) -> Arc<BTreeSet<Sender>> {
    old.filter(|old| ***old == senders).cloned().unwrap_or_else(|| Arc::new(senders))
}

#[cfg(test)]
mod tests;
