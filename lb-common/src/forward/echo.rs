//! Pings of an address that the agent added, answered here: a flood of them costs the kernel nothing.

use crate::wire::checksum::Sum;
use crate::wire::eth::Macs;
use crate::wire::icmp::Icmp;
use crate::wire::{Be16, Ethernet, Ipv4, Ipv6};

use super::ip::{Ip, V4, V6};
use super::parse::{Packet, whole, whole_mut};
use super::reject::HOPS;
use super::{Frame, Next, Step};

/// Turns an echo request into its reply, back to where it came from. One that the kernel's own rules are
/// better for passes: with options or extension headers, to a group's MAC address, cut short.
#[inline(always)]
pub fn answer<I: Echo, F: Frame>(frame: &mut F, step: &Step) -> u64 {
    let is_answered = try_answer::<I, F>(frame, step).is_some();
    Next::with(if is_answered { Next::TRANSMIT } else { Next::PASS }, 0)
}

#[inline(always)]
fn try_answer<I: Echo, F: Frame>(frame: &mut F, step: &Step) -> Option<()> {
    let ethernet: Ethernet = whole(frame).read(0)?;
    let packet: Packet<I> = step.place.read(frame)?;
    let request: Icmp = whole(frame).read(packet.l4)?;
    let is_plain = packet.l4 == packet.l3 + size_of::<I::Header>();
    let is_there = packet.length >= size_of::<I::Header>() + size_of::<Icmp>()
        && packet.l3 + packet.length <= frame.len();
    let [first, ..] = ethernet.destination;
    if !is_plain || !is_there || first & 1 != 0 {
        return None;
    }
    // Updated and not made: what was corrupted on the way stays so (RFC 1624).
    let kinds = |kind: u8| Be16::new((kind as u16) << 8 | request.code as u16);
    let checksum =
        Sum::of(request.checksum).replace16(kinds(request.kind), kinds(I::ECHO_REPLY)).checksum();
    // The one zero that is no checksum of nothing but zeros (RFC 1624 section 3).
    let checksum = if checksum.raw() == 0 { Be16::from_raw(0xffff) } else { checksum };
    let reply = Icmp { kind: I::ECHO_REPLY, checksum, ..request };
    I::turn_back(whole_mut(frame), packet.l3, &packet.header)?;
    whole_mut(frame).write(packet.l4, reply)?;
    whole_mut(frame).write(0, Macs::new(ethernet.source, ethernet.destination))
}

/// What an IP version adds to answer pings.
pub trait Echo: Ip {
    /// Sends a packet back: from its destination to its source, with all its hops before it.
    fn turn_back<F: Frame>(frame: &mut F, at: usize, header: &Self::Header) -> Option<()>;
}

impl Echo for V4 {
    #[inline(always)]
    fn turn_back<F: Frame>(frame: &mut F, at: usize, header: &Ipv4) -> Option<()> {
        let words = |hops: u8| Be16::new((hops as u16) << 8 | header.ttl.protocol as u16);
        let mut ttl = header.ttl;
        ttl.checksum = Sum::of(ttl.checksum).replace16(words(ttl.ttl), words(HOPS)).checksum();
        ttl.ttl = HOPS;
        frame.write(at + Ipv4::TTL_AT, ttl)?;
        frame.write(at + Ipv4::SOURCE_AT, [header.destination, header.source])
    }
}

impl Echo for V6 {
    #[inline(always)]
    fn turn_back<F: Frame>(frame: &mut F, at: usize, header: &Ipv6) -> Option<()> {
        frame.write(at + Ipv6::HOP_LIMIT_AT, HOPS)?;
        frame.write(at + Ipv6::SOURCE_AT, header.destination)?;
        frame.write(at + Ipv6::DESTINATION_AT, header.source)
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::vec::Vec;

    use etherparse::{IcmpEchoHeader, Icmpv4Type, Icmpv6Type, PacketBuilder};
    use proptest::prelude::*;

    use crate::forward::forward;
    use crate::model::{Bytes, Model};
    use crate::tables::Endpoint;
    use crate::verdict::Verdict;

    const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];

    fn echo(is_reply: bool, (id, seq): (u16, u16), is_v4: bool, hops: u8, data: &[u8]) -> Vec<u8> {
        let echo = IcmpEchoHeader { id, seq };
        let (from, to) = if is_reply { (1, 0) } else { (0, 1) };
        let ethernet = PacketBuilder::ethernet2(MACS[from], MACS[to]);
        let mut frame = Vec::new();
        if is_v4 {
            let hosts = [[192, 0, 2, 7], [10, 0, 1, 100]];
            let kind =
                if is_reply { Icmpv4Type::EchoReply(echo) } else { Icmpv4Type::EchoRequest(echo) };
            let ip = ethernet.ipv4(hosts[from], hosts[to], hops);
            ip.icmpv4(kind).write(&mut frame, data).unwrap();
        } else {
            let hosts = ["2001:db8::7", "fd00:1::100"]
                .map(|text| text.parse::<std::net::Ipv6Addr>().unwrap().octets());
            let kind =
                if is_reply { Icmpv6Type::EchoReply(echo) } else { Icmpv6Type::EchoRequest(echo) };
            let ip = ethernet.ipv6(hosts[from], hosts[to], hops);
            ip.icmpv6(kind).write(&mut frame, data).unwrap();
        }
        frame
    }

    /// Zero and its complement are one checksum, unless all else is zero.
    fn normalised(mut frame: Vec<u8>, is_v4: bool) -> Vec<u8> {
        let at = if is_v4 { 14 + 20 } else { 14 + 40 } + 2;
        if frame[at..at + 2] == [0, 0] {
            frame[at..at + 2].fill(0xff);
        }
        frame
    }

    proptest! {
        #[test]
        fn what_comes_back_is_the_reply(
            is_v4: bool, numbers: (u16, u16), hops in 1_u8.., data in prop::collection::vec(any::<u8>(), 0..99),
        ) {
            let mut model = Model::new(1, 1);
            for address in [IpAddr::from([10, 0, 1, 100]), "fd00:1::100".parse().unwrap()] {
                let kind = Endpoint::OWNED;
                let address = address.into();
                model.endpoints.insert(Endpoint { address, kind, ..Endpoint::default() });
            }
            let bytes = echo(false, numbers, is_v4, hops, &data);
            let mut frame = Bytes { bytes, ingress: 3 };
            prop_assert_eq!(forward(&mut frame, &model), Verdict::Transmit);
            let reply = echo(true, numbers, is_v4, 64, &data);
            prop_assert_eq!(frame.bytes, normalised(reply, is_v4));
        }
    }
}
