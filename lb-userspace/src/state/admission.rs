//! Security groups, compiled: which sources a listener admits. Pure.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use lb_common::wire::Address;

use crate::config::{IngressRule, Member, Protocol, RuleProtocol, SecurityGroup};
use crate::reconcile::Prefix;

/// What is asked to be let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Service {
    /// A port of a transport protocol.
    Port(Protocol, u16),
    /// Echo requests.
    Echo,
}

/// The sources of one address family that any rule of any group admits; `None`: everybody. `all` is
/// where rules find the groups that are their sources.
pub fn admitted(
    groups: &[&SecurityGroup],
    all: &BTreeMap<String, SecurityGroup>,
    service: Service,
    is_v4: bool,
) -> Option<BTreeSet<Prefix>> {
    let prefixes: BTreeSet<Prefix> = groups
        .iter()
        .flat_map(|group| &group.ingress)
        .filter(|rule| match (rule.protocol, service) {
            (RuleProtocol::All, _) | (RuleProtocol::Icmp, Service::Echo) => true,
            (RuleProtocol::Tcp, Service::Port(Protocol::Tcp, port))
            | (RuleProtocol::Udp, Service::Port(Protocol::Udp, port)) => rule.ports.contains(&port),
            _ => false,
        })
        .flat_map(|rule| sources(rule, all))
        .filter(|source| source.addr().is_ipv4() == is_v4)
        .map(|source| prefix(&source))
        .collect();
    let everybody = if is_v4 { MAPPED_BITS } else { 0 };
    if prefixes.iter().any(|prefix| prefix.bits == everybody) { None } else { Some(prefixes) }
}

/// The networks that a rule's packets may come from. Of a group's members these are the addresses;
/// MAC addresses and tunnels are for targets to see.
fn sources<'a>(
    rule: &'a IngressRule,
    all: &'a BTreeMap<String, SecurityGroup>,
) -> impl Iterator<Item = IpNet> {
    let groups = rule.groups.iter().filter_map(|name| all.get(name));
    let members = groups.flat_map(|group| &group.members).filter_map(|member| match member {
        Member::Address(address) => Some(IpNet::from(*address)),
        Member::Mac(_) | Member::Tunnels(_) => None,
    });
    rule.sources.iter().copied().chain(members)
}

/// Bits in front of an IPv4 address in its mapped form.
const MAPPED_BITS: u8 = 96;

fn prefix(source: &IpNet) -> Prefix {
    let before = if source.addr().is_ipv4() { MAPPED_BITS } else { 0 };
    Prefix { address: Address::from(source.network()), bits: before + source.prefix_len() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::IngressRule;

    fn group(rules: &[(RuleProtocol, u16, u16, &str)]) -> SecurityGroup {
        let ingress = rules
            .iter()
            .map(|(protocol, from, to, source)| IngressRule {
                protocol: *protocol,
                ports: *from..=*to,
                sources: vec![source.parse().unwrap()],
                groups: Vec::new(),
            })
            .collect();
        SecurityGroup { ingress, members: Vec::new() }
    }

    fn texts(prefixes: Option<BTreeSet<Prefix>>) -> Vec<String> {
        let text = |prefix: &Prefix| format!("{:?}/{}", prefix.address, prefix.bits);
        prefixes.expect("not open to everybody").iter().map(text).collect()
    }

    #[test]
    fn rules_are_a_union_by_protocol_port_and_family() {
        let one = group(&[
            (RuleProtocol::Tcp, 80, 80, "10.0.0.0/8"),
            (RuleProtocol::Tcp, 8000, 8999, "192.168.0.0/16"),
            (RuleProtocol::Udp, 80, 80, "172.16.0.0/12"),
            (RuleProtocol::Icmp, 0, 65535, "10.9.0.0/16"),
        ]);
        let two = group(&[
            (RuleProtocol::Tcp, 1, 100, "10.1.0.0/16"),
            (RuleProtocol::All, 0, 65535, "fd00::/8"),
        ]);
        let (groups, none) = ([&one, &two], BTreeMap::new());
        let tcp80 = Service::Port(Protocol::Tcp, 80);
        assert_eq!(texts(admitted(&groups, &none, tcp80, true)), ["10.0.0.0/104", "10.1.0.0/112"]);
        assert_eq!(texts(admitted(&groups, &none, tcp80, false)), ["fd00::/8"]);
        let tcp8500 = Service::Port(Protocol::Tcp, 8500);
        assert_eq!(texts(admitted(&groups, &none, tcp8500, true)), ["192.168.0.0/112"]);
        let udp80 = Service::Port(Protocol::Udp, 80);
        assert_eq!(texts(admitted(&groups, &none, udp80, true)), ["172.16.0.0/108"]);
        assert_eq!(texts(admitted(&groups, &none, Service::Echo, true)), ["10.9.0.0/112"]);
    }

    #[test]
    fn everybody_is_everybody_of_that_family() {
        let none = BTreeMap::new();
        let open = group(&[(RuleProtocol::Tcp, 80, 80, "0.0.0.0/0")]);
        let service = Service::Port(Protocol::Tcp, 80);
        assert_eq!(admitted(&[&open], &none, service, true), None);
        assert_eq!(admitted(&[&open], &none, service, false), Some(BTreeSet::new()));
    }

    #[test]
    fn a_group_as_a_source_is_its_addresses() {
        let mut guarded = group(&[(RuleProtocol::Tcp, 80, 80, "10.1.0.0/16")]);
        guarded.ingress[0].groups = vec!["front".into(), "gone".into()];
        let mut front = group(&[]);
        front.members = vec![
            Member::Address("10.0.2.1".parse().unwrap()),
            Member::Address("fd00:2::1".parse().unwrap()),
            Member::Tunnels("172.16.0.0/16".parse().unwrap()),
            Member::Mac([2, 0, 0, 0, 0, 1]),
        ];
        let all = BTreeMap::from([("front".into(), front)]);
        let service = Service::Port(Protocol::Tcp, 80);
        let of = |is_v4| texts(admitted(&[&guarded], &all, service, is_v4));
        assert_eq!(of(true), ["10.0.2.1/128", "10.1.0.0/112"]);
        assert_eq!(of(false), ["fd00:2::1/128"]);
    }
}
