//! The tables' arithmetic, and the state of flows. What becomes of packets is shown by fixtures,
//! in the kernel and here, in lb-tests.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::vec;

use super::model::TargetModel;
use super::tables::*;
use super::*;
use crate::flow::{ICMP, ICMPV6, SECOND, TCP, UDP};
use crate::model::Bytes;
use crate::verdict::DropReason;
use crate::wire::Be16;

#[test]
fn every_service_has_a_place_of_its_own() {
    let mut places = BTreeSet::new();
    for is_v4 in [true, false] {
        for protocol in [TCP, UDP] {
            for port in 0..=u16::MAX {
                assert!(places.insert(class_index(is_v4, protocol, Be16::new(port))));
            }
        }
        let icmp = if is_v4 { ICMP } else { ICMPV6 };
        for protocol in [icmp, 132] {
            let place = class_index(is_v4, protocol, Be16::new(0));
            assert!(places.insert(place));
            assert_eq!(class_index(is_v4, protocol, Be16::new(7)), place, "no ports");
        }
        // The other family's ICMP is a protocol like any other.
        let other = if is_v4 { ICMPV6 } else { ICMP };
        assert_eq!(class_index(is_v4, other, Be16::new(0)), class_index(is_v4, 132, Be16::new(0)));
    }
    assert_eq!(places.len(), CLASSES as usize);
    assert_eq!(places.last(), Some(&(CLASSES - 1)));
}

#[test]
fn mac_addresses_differ_within_their_prefix() {
    let [a, b] = [mac_key([2, 0, 0, 0, 0, 1]), mac_key([2, 0, 0, 0, 0, 2])];
    let differing = u128::from_be_bytes(a.octets()) ^ u128::from_be_bytes(b.octets());
    assert_eq!(differing >> 80, 3);
    assert_eq!(differing << 48, 0);
}

#[test]
fn own_flows_end() {
    let flow = OwnFlow::new(5 * SECOND);
    assert!(flow.is_alive(5 * SECOND + OWN_TCP_IDLE - 1, TCP));
    assert!(!flow.is_alive(5 * SECOND + OWN_TCP_IDLE, TCP));
    assert!(flow.is_alive(5 * SECOND + OWN_IDLE - 1, UDP));
    assert!(!flow.is_alive(5 * SECOND + OWN_IDLE, UDP));
    let closing = OwnFlow { closing: 1, ..flow };
    assert!(closing.is_alive(5 * SECOND + OWN_CLOSING_IDLE - 1, TCP));
    assert!(!closing.is_alive(5 * SECOND + OWN_CLOSING_IDLE, TCP));
}

/// A TCP segment without data between two hosts of a segment.
fn segment(from: (u8, u16), to: (u8, u16), flags: u8) -> Bytes {
    let mut bytes = vec![0; 14 + 20 + 20];
    bytes[12..14].copy_from_slice(&[0x08, 0x00]);
    let ip = &mut bytes[14..];
    ip[0] = 0x45;
    ip[3] = 40;
    (ip[8], ip[9]) = (64, TCP);
    ip[12..16].copy_from_slice(&[10, 0, 0, from.0]);
    ip[16..20].copy_from_slice(&[10, 0, 0, to.0]);
    ip[20..22].copy_from_slice(&from.1.to_be_bytes());
    ip[22..24].copy_from_slice(&to.1.to_be_bytes());
    (ip[32], ip[33]) = (0x50, flags);
    Bytes { bytes, ingress: 1 }
}

const SYN: u8 = 2;
const ACK: u8 = 0x10;
const FIN: u8 = 1;

fn enforcing() -> TargetModel {
    let flags = Settings::RECORDS | Settings::ENFORCES;
    TargetModel { settings: Settings { flags, zero: 0 }, ..TargetModel::default() }
}

#[test]
fn a_connection_lives_as_its_target_keeps_it_alive() {
    let tables = enforcing();
    let (own, peer) = ((1, 50000), (2, 443));
    let comes_in = |flags| admit_target(&mut segment(peer, own, flags), &tables) == Verdict::Pass;
    let goes_out = |flags| record(&segment(own, peer, flags), &tables);
    let at = |seconds: u64| tables.now.set(seconds * SECOND);

    at(10);
    assert!(!comes_in(SYN | ACK), "nobody asked");
    goes_out(ACK);
    assert!(!comes_in(ACK), "amid a connection that somebody else opened");
    goes_out(SYN);
    assert!(comes_in(SYN | ACK));
    at(10 + 400_000);
    assert!(comes_in(ACK), "days later");
    at(10 + 800_000);
    assert!(comes_in(ACK), "what came in counts as well");
    goes_out(FIN | ACK);
    at(10 + 800_200);
    assert!(comes_in(ACK), "half-closed");
    goes_out(ACK);
    at(10 + 800_400);
    assert!(comes_in(ACK), "kept by the target's own acknowledgment");
    at(10 + 800_441);
    assert!(!comes_in(ACK), "over");
    goes_out(SYN);
    assert!(comes_in(SYN | ACK), "the ports again");
    assert_eq!(tables.drops.borrow()[&DropReason::SecurityGroupDenied], 3);
}

#[test]
fn what_rules_let_in_is_not_the_targets_own() {
    let mut tables = enforcing();
    let web = class_index(true, TCP, Be16::new(80));
    tables.classes.insert(web, FIRST_CLASS);
    let friend = Ipv4Addr::new(10, 0, 0, 2).into();
    tables.senders.push((u32::from(FIRST_CLASS) | space::SOURCE, friend, 128));
    let ask = |flags| segment((2, 40000), (1, 80), flags);
    assert_eq!(admit_target(&mut ask(SYN), &tables), Verdict::Pass);
    record(&segment((1, 80), (2, 40000), SYN | ACK), &tables);
    assert!(tables.own_flows.borrow().is_empty());
    // So a narrowed group cuts it off.
    tables.senders.clear();
    assert_eq!(admit_target(&mut ask(ACK), &tables), Verdict::Drop);
}
