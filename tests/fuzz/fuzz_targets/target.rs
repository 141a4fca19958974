//! Any bytes into and out of a target: nothing panics, only tunnel headers are taken off, and what
//! dies is counted.
//!
//! The first byte of an input says what the target does and whether it sends the frame or gets it;
//! the others are the frame.
#![no_main]

use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use lb_common::{
    flow::{ICMP, ICMPV6, TCP, UDP},
    model::Bytes,
    tables::EndpointKey,
    target::{
        admit_target,
        model::TargetModel,
        record,
        tables::{FIRST_CLASS, OPEN, SENDERS, class_index, mac_key, space},
    },
    verdict::Verdict,
    wire::{Address, Be16},
};
use libfuzzer_sys::fuzz_target;

/// The target's own addresses; those of the fixtures, whose frames are the first inputs.
const ADDRESSES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 0, 2, 11)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 0x11)),
];
/// The load balancer's tunnels come from here.
const TUNNEL_SOURCES: [(IpAddr, u32); 2] = [
    (IpAddr::V4(Ipv4Addr::new(172, 16, 0, 0)), 96 + 16),
    (IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0)), 64),
];
const BALANCER: [u8; 6] = [2, 0, 0x0a, 0, 2, 1];
const GUE_PORT: u16 = 6080;
/// IPv4 in IP and IPv6 in IP.
const IN_IP: [u8; 2] = [4, 41];
/// Lets in what the load balancer sends.
const BALANCED: u16 = FIRST_CLASS;
/// Lets in a network.
const FRIENDS: u16 = FIRST_CLASS + 1;

thread_local! {
    static MODEL: RefCell<TargetModel> = RefCell::new(target());
}

fuzz_target!(|input: &[u8]| {
    // The kernel takes no frame shorter than its Ethernet header.
    let Some((control, frame)) = input.split_first().filter(|(_, frame)| frame.len() >= 14) else {
        return;
    };
    MODEL.with_borrow_mut(|model| {
        model.settings.flags = u32::from(control >> 1) & 0xf;
        model.own_flows.take();
        model.admitted_flows.take();
        // The second time, flows are remembered, of packets sent too.
        for _ in 0..2 {
            if control & 1 == 0 {
                comes_in(model, frame);
            }
            record(&Bytes { bytes: frame.to_vec(), ingress: 0 }, model);
        }
    });
});

fn comes_in(model: &TargetModel, input: &[u8]) {
    let drops = |model: &TargetModel| model.drops.borrow().values().sum::<u64>();
    let unwrapped = |model: &TargetModel| model.unwrapped.borrow().packets;
    let (dropped, had_unwrapped) = (drops(model), unwrapped(model));
    let mut frame = Bytes { bytes: input.to_vec(), ingress: 1 };
    let verdict = admit_target(&mut frame, model);
    let dropped = drops(model) - dropped;
    match verdict {
        Verdict::Drop => assert_eq!(dropped, 1),
        Verdict::Pass => {
            assert_eq!(dropped, 0);
            if unwrapped(model) == had_unwrapped {
                assert_eq!(frame.bytes, input);
            } else {
                check_unwrapped(input, &frame.bytes);
            }
        }
        other => panic!("a target says {other:?}"),
    }
}

/// Only what stands between link header and inner packet is gone.
fn check_unwrapped(input: &[u8], output: &[u8]) {
    let gone = input.len() - output.len();
    assert!(gone >= 20, "less than an IP header: {gone} bytes");
    let l3 = 14 + 4 * usize::from(is_tag(output, 12)) * (1 + usize::from(is_tag(output, 16)));
    assert_eq!(output[..l3 - 2], input[..l3 - 2], "MAC addresses and tags");
    assert_eq!(output[l3..], input[l3 + gone..], "the inner packet");
    let ether_type: &[u8] = if output[l3] >> 4 == 6 { &[0x86, 0xdd] } else { &[0x08, 0x00] };
    assert_eq!(&output[l3 - 2..l3], ether_type);
}

fn is_tag(frame: &[u8], at: usize) -> bool {
    matches!(frame.get(at..at + 2), Some([0x81, 0x00] | [0x88, 0xa8]))
}

fn target() -> TargetModel {
    let mut model = TargetModel::default();
    model.now.set(1_000_000_000_000_000);
    for address in ADDRESSES.map(Address::from) {
        for protocol in IN_IP {
            model.tunnel_ends.insert(EndpointKey::new(address, Be16::new(0), protocol));
        }
        model.tunnel_ends.insert(EndpointKey::new(address, Be16::new(GUE_PORT), UDP));
    }
    for is_v4 in [true, false] {
        let icmp = if is_v4 { ICMP } else { ICMPV6 };
        for (protocol, port, class) in [
            (TCP, 80, BALANCED),
            (UDP, 53, BALANCED),
            (TCP, 22, FRIENDS),
            (UDP, 5353, FRIENDS),
            (icmp, 0, FRIENDS),
            (TCP, 443, OPEN),
        ] {
            model.classes.insert(class_index(is_v4, protocol, Be16::new(port)), class);
        }
    }
    let by_tunnel = |(source, bits): (IpAddr, u32)| {
        let space = if source.is_ipv4() { space::TUNNEL_V4 } else { space::TUNNEL_V6 };
        [BALANCED, SENDERS].map(|class| (u32::from(class) | space, source.into(), bits))
    };
    model.senders = TUNNEL_SOURCES.into_iter().flat_map(by_tunnel).collect();
    model.senders.push((u32::from(BALANCED) | space::MAC, mac_key(BALANCER), 48));
    for (network, bits) in [("192.0.2.0", 96 + 24), ("2001:db8:2::", 48)] {
        let network = network.parse::<IpAddr>().expect("an address").into();
        model.senders.push((u32::from(FRIENDS) | space::SOURCE, network, bits));
    }
    model
}
