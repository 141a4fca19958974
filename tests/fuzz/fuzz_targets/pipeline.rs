//! Any bytes through the whole pipeline: nothing panics, and what comes out is well-made.
//!
//! The first byte of an input says what the balancer is like, the others are the frame.
#![no_main]

mod balancer;
#[path = "../../src/packets.rs"]
#[expect(dead_code, reason = "only the check of a frame is wanted")]
mod packets;

use etherparse::{LaxSlicedPacket, NetSlice, SlicedPacket, TransportSlice};
use lb_common::{
    forward::forward,
    model::{Bytes, Model},
    tables::Target,
    verdict::{DropReason, Verdict},
};
use libfuzzer_sys::fuzz_target;
use packets::verify_checksums;

use balancer::{Control, GUE_PORT, with_balancer};

fuzz_target!(|input: &[u8]| {
    // The kernel takes no frame shorter than its Ethernet header.
    let Some((control, frame)) = input.split_first().filter(|(_, frame)| frame.len() >= 14) else {
        return;
    };
    let control = Control(*control);
    with_balancer(control, |model| {
        // The second time, flows are remembered.
        for _ in 0..2 {
            check(model, control.ingress(), frame);
        }
    });
});

fn check(model: &Model, ingress: u32, input: &[u8]) {
    let dropped = drops(model);
    let sent = packets(model);
    let in_tunnels = packets_in_tunnels(model);
    let mut frame = Bytes { bytes: input.to_vec(), ingress };
    let verdict = forward(&mut frame, model);
    let output = &frame.bytes;
    let (dropped, sent) = (drops(model) - dropped, packets(model) - sent);
    assert!(!model.drops.borrow().contains_key(&DropReason::TableInconsistent));
    match verdict {
        Verdict::Pass => {
            assert_eq!(output, input);
            assert_eq!((dropped, sent), (0, 0));
        }
        Verdict::Drop => assert_eq!((dropped, sent), (1, 0)),
        Verdict::Transmit if dropped == 1 => {
            assert_eq!(sent, 0);
            check_answer(input, output);
        }
        Verdict::Transmit | Verdict::Redirect(_) => {
            assert_eq!((dropped, sent), (0, 1));
            if packets_in_tunnels(model) > in_tunnels {
                check_tunnelled(input, output);
            } else {
                check_forwarded(input, output);
            }
        }
    }
}

/// A refusal is right in itself, whatever it refuses, and does not end in what is left of that.
fn check_answer(input: &[u8], output: &[u8]) {
    verify_checksums(output).expect("an answer is well-made");
    assert_eq!(output[..6], input[6..12]);
    assert_eq!(output[6..12], input[..6]);
    let packet = SlicedPacket::from_ethernet(output).expect("just parsed");
    let (l2, l3) = (l2_length(output), ip_length(&packet));
    assert_eq!(output.len(), l2 + l3);
    assert_eq!(l2, l2_length(input), "tags are kept");
}

/// What is forwarded is as right as it was before, and as long; only addresses, ports, hop limit
/// and what depends on them differ.
fn check_forwarded(input: &[u8], output: &[u8]) {
    let (before, after) = (l2_length(input), l2_length(output));
    assert!(after <= 18, "one tag or none");
    assert_eq!(input.len() - before, output.len() - after);
    let (Ok(was), Ok(is)) =
        (SlicedPacket::from_ethernet(input), SlicedPacket::from_ethernet(output))
    else {
        return;
    };
    assert_eq!(ip_length(&was), ip_length(&is));
    let has_no_checksum =
        matches!(&was.transport, Some(TransportSlice::Udp(udp)) if udp.checksum() == 0);
    if verify_checksums(input).is_ok() && !has_no_checksum {
        verify_checksums(output).expect("right before, right after");
    }
    if has_no_checksum {
        let still = matches!(&is.transport, Some(TransportSlice::Udp(udp)) if udp.checksum() == 0);
        assert!(still, "no checksum was made up");
    }
    let payload = |packet: &SlicedPacket<'_>| match &packet.transport {
        Some(TransportSlice::Tcp(tcp)) => tcp.payload().to_vec(),
        Some(TransportSlice::Udp(udp)) => udp.payload().to_vec(),
        other => panic!("forwarded without ports: {other:?}"),
    };
    assert_eq!(payload(&was), payload(&is));
}

/// The outer header is right, and behind it the packet is as it was, one hop older.
fn check_tunnelled(input: &[u8], output: &[u8]) {
    let (before, after) = (l2_length(input), l2_length(output));
    assert!(after <= 18, "one tag or none");
    let outer = SlicedPacket::from_ethernet(output).expect("made by us");
    let (overhead, is_in_udp) = match &outer.net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            assert!(header.dont_fragment && header.time_to_live == 64);
            (20, header.protocol.0 == 17)
        }
        Some(NetSlice::Ipv6(ip)) => {
            assert_eq!(ip.header().hop_limit(), 64);
            (40, ip.header().next_header().0 == 17)
        }
        other => panic!("a tunnel without IP: {other:?}"),
    };
    let overhead = if is_in_udp { overhead + 8 } else { overhead };
    if is_in_udp {
        let Some(TransportSlice::Udp(udp)) = &outer.transport else { panic!("no UDP header") };
        assert_eq!((udp.destination_port(), udp.checksum()), (GUE_PORT, 0));
        assert!(udp.source_port() >= 0xc000);
    }
    assert_eq!(output.len() - after - overhead, input.len() - before);
    let (was, is) = (&input[before..], &output[after + overhead..]);
    let claimed = ip_length(&outer) - overhead;
    // What grows older: IPv4's TTL and checksum, IPv6's hop limit.
    let aged = if is[0] >> 4 == 4 { [8, 10, 11].as_slice() } else { &[7] };
    assert_eq!(is[aged[0]], was[aged[0]] - 1);
    for (at, (was, is)) in was.iter().zip(is).enumerate() {
        assert!(was == is || aged.contains(&at), "byte {at}");
    }
    let length = |packet: &[u8]| match packet[0] >> 4 {
        4 => usize::from(u16::from_be_bytes([packet[2], packet[3]])),
        _ => 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]])),
    };
    assert_eq!(claimed, length(is));
}

/// Length of Ethernet header and tags.
fn l2_length(frame: &[u8]) -> usize {
    let packet = LaxSlicedPacket::from_ethernet(frame).expect("an Ethernet header is there");
    14 + 4 * packet.vlan_ids().len().min(2)
}

/// Header and payload as the header says.
fn ip_length(packet: &SlicedPacket<'_>) -> usize {
    match &packet.net {
        Some(NetSlice::Ipv4(ip)) => usize::from(ip.header().total_len()),
        Some(NetSlice::Ipv6(ip)) => 40 + usize::from(ip.header().payload_length()),
        other => panic!("forwarded without IP: {other:?}"),
    }
}

fn drops(model: &Model) -> u64 {
    model.drops.borrow().values().sum()
}

fn packets(model: &Model) -> u64 {
    model.listener_traffic.borrow().values().map(|t| t.packets + t.reply_packets).sum()
}

fn packets_in_tunnels(model: &Model) -> u64 {
    let traffic = model.target_traffic.borrow();
    let is_tunnelled = |n: &u32| model.targets.get(n).is_some_and(Target::is_tunnelled);
    traffic.iter().filter(|(n, _)| is_tunnelled(n)).map(|(_, traffic)| traffic.packets).sum()
}
