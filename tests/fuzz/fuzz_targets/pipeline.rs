//! Any bytes through the whole pipeline: nothing panics, and what comes out is well-made.
//!
//! The first byte of an input says what the balancer is like, the others are the frame.
#![no_main]

mod balancer;
#[path = "../../src/packets.rs"]
#[expect(dead_code, reason = "only the check of a frame is wanted")]
mod packets;

use etherparse::{LaxSlicedPacket, NetSlice, SlicedPacket};
use lb_common::{
    forward::forward,
    model::{Bytes, Model},
    verdict::{DropReason, Verdict},
};
use libfuzzer_sys::fuzz_target;
use packets::verify_checksums;

use balancer::{Control, with_balancer};

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
            check_forwarded(input, output);
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
        matches!(&was.transport, Some(etherparse::TransportSlice::Udp(udp)) if udp.checksum() == 0);
    if verify_checksums(input).is_ok() && !has_no_checksum {
        verify_checksums(output).expect("right before, right after");
    }
    if has_no_checksum {
        let still = matches!(&is.transport, Some(etherparse::TransportSlice::Udp(udp)) if udp.checksum() == 0);
        assert!(still, "no checksum was made up");
    }
    let payload = |packet: &SlicedPacket<'_>| match &packet.transport {
        Some(etherparse::TransportSlice::Tcp(tcp)) => tcp.payload().to_vec(),
        Some(etherparse::TransportSlice::Udp(udp)) => udp.payload().to_vec(),
        other => panic!("forwarded without ports: {other:?}"),
    };
    assert_eq!(payload(&was), payload(&is));
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
