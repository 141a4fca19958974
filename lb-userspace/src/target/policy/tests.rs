use super::*;
use crate::config::parse;
use crate::target::{Step, diff};

const CONFIG: &str = r#"
[security_group.lb]
members = ["10.0.2.1", "02:00:0a:00:02:01", "172.16.0.0/16", "100::/64"]
ingress = [{ protocol = "all", sources = ["0.0.0.0/0"] }]

[security_group.target]
ingress = [
  { protocol = "tcp", ports = "8080", sources = ["sg:lb", "192.0.2.0/24"] },
  { protocol = "tcp", ports = "8000-8100", sources = ["10.0.0.0/8", "fd00::/8"] },
  { protocol = "udp", ports = "0-65535", sources = ["::/0"] },
  { protocol = "icmp", sources = ["10.0.0.0/8"] },
]

[target_group.web]
port = 8080
forwarding = "dsr_ipip"
security_group = "target"
targets = ["10.0.2.11", "10.0.2.12", "fd00:2::11"]

[target_group.dns]
protocol = "udp"
port = 53
forwarding = "dsr_gue"
gue_port = 6081
targets = ["10.0.2.12"]
"#;

fn policy(text: &str, addresses: &[&str], old: &Tables) -> Policy {
    let config = parse("lb.toml", text).unwrap_or_else(|errors| panic!("{errors}")).config;
    compile(&config, &addresses.iter().map(|text| text.parse().unwrap()).collect(), old)
}

/// A class' senders as text: the space's number, the prefix.
fn senders(tables: &Tables, class: u16) -> Vec<String> {
    let text = |sender: &Sender| {
        let bits = sender.bits - if sender.address.is_v4() { MAPPED_BITS } else { 0 };
        format!("{} {:?}/{bits}", sender.space >> 30, sender.address)
    };
    tables.classes[&class].iter().map(text).collect()
}

#[test]
fn a_machine_belongs_to_the_groups_that_have_its_addresses() {
    let of = |addresses: &[&str]| {
        let policy = policy(CONFIG, addresses, &Tables::default());
        (policy.target_groups.join(" "), policy.security_groups.join(" "), policy.warnings.len())
    };
    assert_eq!(of(&["127.0.0.1", "10.0.2.11", "fd00:2::11"]), ("web".into(), "target".into(), 0));
    // One group without a security group beside one with: the operator hears of it.
    assert_eq!(of(&["10.0.2.12"]), ("dns web".into(), "target".into(), 1));
    assert_eq!(of(&["10.0.2.13"]), (String::new(), String::new(), 1));
}

#[test]
fn rules_become_classes_by_port_and_family() {
    let tables = policy(CONFIG, &["10.0.2.11"], &Tables::default()).tables;
    let class = |is_v4, protocol, port| tables.class(is_v4, protocol, port);
    let (wide, narrow) = (class(true, TCP, 8000), class(true, TCP, 8080));
    assert_eq!(senders(&tables, wide), ["0 10.0.0.0/8"]);
    assert_eq!(
        senders(&tables, narrow),
        [
            "0 10.0.0.0/8",
            "0 10.0.2.1/32",
            "0 192.0.2.0/24",
            "1 10.0.2.1/32",
            "1 172.16.0.0/16",
            "2 100::/64",
            "3 200:a00:201::/48",
        ]
    );
    for (port, expected) in
        [(7999, DENIED), (8079, wide), (8081, wide), (8100, wide), (8101, DENIED)]
    {
        assert_eq!(class(true, TCP, port), expected, "{port}");
    }
    assert_eq!(senders(&tables, class(false, TCP, 8000)), ["0 fd00::/8"]);
    // Not the other way round: an address of IPv4 is none of `::/0`.
    assert_eq!((class(false, UDP, 0), class(false, UDP, 65535)), (OPEN, OPEN));
    assert_eq!((class(true, UDP, 0), class(true, UDP, 65535)), (DENIED, DENIED));
    assert_eq!(class(true, ICMP, 0), wide);
    assert_eq!((class(false, ICMPV6, 0), class(true, OTHER, 0)), (DENIED, DENIED));
}

#[test]
fn tunnels_end_where_the_forwarding_says() {
    let ends = |addresses: &[&str]| {
        let tables = policy(CONFIG, addresses, &Tables::default()).tables;
        let ends: Vec<_> =
            tables.tunnel_ends.iter().map(|end| (end.port.get(), end.protocol)).collect();
        (ends, senders(&tables, SENDERS))
    };
    let members = ["1 10.0.2.1/32", "1 172.16.0.0/16", "2 100::/64"].map(String::from).to_vec();
    assert_eq!(ends(&["10.0.2.11"]), (vec![(0, 4), (0, 41)], members.clone()));
    assert_eq!(ends(&["10.0.2.12"]), (vec![(0, 4), (0, 41), (6081, UDP)], members));
    let open = CONFIG.replace("security_group = \"target\"", "");
    let tables = policy(&open, &["10.0.2.11"], &Tables::default()).tables;
    assert_eq!(tables.settings.flags, Settings::UNWRAPS_IPIP);
    assert_eq!(senders(&tables, SENDERS), ["1 172.16.0.0/16", "2 100::/64"]);
}

#[test]
fn a_change_of_one_rule_leaves_other_classes_alone() {
    let before = policy(CONFIG, &["10.0.2.11"], &Tables::default()).tables;
    let after = policy(&CONFIG.replace("192.0.2.0/24", "192.0.3.0/24"), &["10.0.2.11"], &before);
    let after = after.tables;
    assert_eq!(before.class(true, TCP, 8000), after.class(true, TCP, 8000));
    assert_ne!(before.class(true, TCP, 8080), after.class(true, TCP, 8080));
    // Both families' classes of port 8080: all senders anew, one word each, all senders gone.
    let plan = diff(&before, &after);
    let count = |wanted: fn(&Step) -> bool| plan.steps.iter().filter(|step| wanted(step)).count();
    assert_eq!(count(|step| matches!(step, Step::SetPlaces(..))), 1);
    assert_eq!(count(|step| matches!(step, Step::AddSender(..))), 7);
    assert_eq!(count(|step| matches!(step, Step::RemoveSender(..))), 7);
    let again = policy(CONFIG, &["10.0.2.11"], &before).tables;
    assert_eq!(diff(&before, &again).steps, []);
}

#[test]
fn a_group_without_rules_denies_everything() {
    let text = "[security_group.none]\n[target_group.web]\nsecurity_group = \"none\"\n\
                targets = [\"10.0.2.11\"]";
    let tables = policy(text, &["10.0.2.11"], &Tables::default()).tables;
    assert_eq!(tables.settings.flags, Settings::RECORDS | Settings::ENFORCES);
    assert!(tables.places.iter().all(|class| *class == DENIED));
}
