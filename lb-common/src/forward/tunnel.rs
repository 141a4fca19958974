//! A packet to a target at the end of a tunnel: one more IP header in front, and maybe UDP.

use crate::flow::UDP;
use crate::tables::{Tables, Target};
use crate::tunnel::Tunnel;
use crate::verdict::DropReason;
use crate::wire::checksum::Sum;
use crate::wire::ipv4::TtlProtocolChecksum;
use crate::wire::{Be16, Be32, Ethernet, Ipv4, Ipv6, Udp, VlanTag};

use super::ip::{Ip, PLAIN, V4, V6};
use super::stage::conclude;
use super::{Frame, Outcome, Selected, Step, emit};

/// Bits of IPv6's flow label (RFC 8200 section 3).
const FLOW_LABEL: u32 = 0xf_ffff;

/// Encapsulates the packet and sends it to its target. A function of its own in the kernel too:
/// who needs no tunnel pays nothing for it.
#[inline(never)]
pub fn encapsulate<const SHAPE: bool, I: Ip, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &mut Step,
) -> u64 {
    let outcome = enter::<SHAPE, I, F, T>(frame, tables, step);
    let place = step.place;
    conclude(step, outcome, place)
}

#[inline(always)]
fn enter<const SHAPE: bool, I: Ip, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    step: &Step,
) -> Outcome {
    let Selected { index, is_new, hash } = step.selected;
    let target = tables.target(index).ok_or(DropReason::TableInconsistent)?;
    // The mask changes nothing; it is for the verifier.
    let l3 = if SHAPE == PLAIN { UNTAGGED } else { (step.place.l3 & 0x1f) as usize };
    let priority = if SHAPE == PLAIN { 0 } else { priority(frame, l3) };
    let header: I::Header = frame.read(l3).ok_or(DropReason::Malformed)?;
    if I::hops(&header) <= 1 {
        return Err(DropReason::TtlExceeded.into());
    }
    // Hidden, or the compiler would leave out the check of bounds: the verifier does not see that
    // the one before implies it.
    let again = if SHAPE == PLAIN { l3 } else { core::hint::black_box(l3) & 0x1f };
    I::age(frame, again, &header).ok_or(DropReason::Malformed)?;

    let inner = Inner {
        protocol: I::IN_IP,
        traffic_class: I::traffic_class(&header),
        length: I::length(&header),
        hash,
        priority,
        l3,
    };
    // Each in code of its own, where lengths and offsets are constants.
    match (target.address.is_v4(), target.mode == Target::DSR_GUE) {
        (true, false) => wrap::<V4, IPIP, F>(frame, target, &inner),
        (true, true) => wrap::<V4, GUE, F>(frame, target, &inner),
        (false, false) => wrap::<V6, IPIP, F>(frame, target, &inner),
        (false, true) => wrap::<V6, GUE, F>(frame, target, &inner),
    }?;
    tables.count_request(step.recall.listener, index, inner.length as u64, is_new);
    Ok(emit::leave(frame, &target.hop))
}

const UNTAGGED: usize = size_of::<Ethernet>();
const TAGGED: usize = UNTAGGED + size_of::<VlanTag>();
/// IP in IP.
const IPIP: bool = false;
/// IP in UDP.
const GUE: bool = true;

/// Puts the outer headers in front.
#[inline(always)]
fn wrap<O: Outer, const HAS_UDP: bool, F: Frame>(
    frame: &mut F,
    target: &Target,
    inner: &Inner,
) -> Result<(), DropReason> {
    let udp = if HAS_UDP { size_of::<Udp>() } else { 0 };
    let added = (size_of::<O::Header>() + udp) as i32;
    let ether_type = O::ETHER_TYPE;
    let written = if target.hop.vlan == 0 {
        let moved = UNTAGGED as i32 - inner.l3 as i32;
        frame.grow_front(added + moved).ok_or(DropReason::NoHeadroom)?;
        emit::write_untagged(frame, &target.hop, ether_type)
            .and_then(|()| write_outer::<O, HAS_UDP, F>(frame, UNTAGGED, target, inner))
    } else {
        let moved = TAGGED as i32 - inner.l3 as i32;
        frame.grow_front(added + moved).ok_or(DropReason::NoHeadroom)?;
        emit::write_tagged(frame, &target.hop, inner.priority, ether_type)
            .and_then(|()| write_outer::<O, HAS_UDP, F>(frame, TAGGED, target, inner))
    };
    written.ok_or(DropReason::Malformed)
}

/// What the outer header takes from the packet.
struct Inner {
    protocol: u8,
    traffic_class: u8,
    length: usize,
    hash: u32,
    /// Of its VLAN tag, see [`priority`].
    priority: u16,
    /// Offset of its IP header.
    l3: usize,
}

/// The outer VLAN tag's priority and drop-eligible bits, 0 without a tag.
#[inline(always)]
fn priority<F: Frame>(frame: &F, l3: usize) -> u16 {
    if l3 == size_of::<Ethernet>() {
        return 0;
    }
    let tag: Option<VlanTag> = frame.read(size_of::<Ethernet>());
    tag.map_or(0, |tag| tag.control.get() & VlanTag::PRIORITY_MASK)
}

#[inline(always)]
fn write_outer<O: Outer, const HAS_UDP: bool, F: Frame>(
    frame: &mut F,
    at: usize,
    target: &Target,
    inner: &Inner,
) -> Option<()> {
    if !HAS_UDP {
        let header = O::header(target, inner, inner.protocol, inner.length);
        return frame.write(at, header);
    }
    let length = inner.length + size_of::<Udp>();
    frame.write(at, O::header(target, inner, UDP, length))?;
    frame.write(at + size_of::<O::Header>(), outer_udp(target, inner))
}

/// The outer header's IP version.
trait Outer: Ip {
    /// The outer header; `length` is of what follows it, bytes.
    fn header(target: &Target, inner: &Inner, protocol: u8, length: usize) -> Self::Header;
}

impl Outer for V4 {
    #[inline(always)]
    fn header(target: &Target, inner: &Inner, protocol: u8, length: usize) -> Ipv4 {
        outer_v4(target, inner, protocol, (size_of::<Ipv4>() + length) as u16)
    }
}

impl Outer for V6 {
    #[inline(always)]
    fn header(target: &Target, inner: &Inner, protocol: u8, length: usize) -> Ipv6 {
        outer_v6(target, inner, protocol, length as u16)
    }
}

/// Never to be fragmented, so without an identification (RFC 6864 section 4.1). ECN is copied as
/// it is, as all of the type of service: RFC 6040's normal mode.
#[inline(always)]
fn outer_v4(target: &Target, inner: &Inner, protocol: u8, length: u16) -> Ipv4 {
    let (fixed, varying, sum) = target.tunnel.v4();
    let flow_bits = inner.hash & varying;
    let total_length = Be16::new(length);
    let checksum = Sum::default()
        .add32(sum)
        .add16(Be16::new(inner.traffic_class as u16))
        .add16(total_length)
        .add16(Be16::new(protocol as u16))
        .add32(flow_bits)
        .checksum();
    Ipv4 {
        version_ihl: 0x45,
        tos: inner.traffic_class,
        total_length,
        id: Be16::new(0),
        fragment: Be16::new(Ipv4::DONT_FRAGMENT),
        ttl: TtlProtocolChecksum { ttl: Tunnel::HOPS, protocol, checksum },
        source: Be32::from_raw(fixed | flow_bits),
        destination: target.address.low32(),
    }
}

/// The flow label is the flow's, as routers and receivers expect of a tunnel (RFC 6438).
#[inline(always)]
fn outer_v6(target: &Target, inner: &Inner, protocol: u8, length: u16) -> Ipv6 {
    let [a, b, c, d] = target.tunnel.v6();
    let class = (inner.traffic_class as u32) << 20;
    Ipv6 {
        version_class_label: Be32::new(6 << 28 | class | (inner.hash & FLOW_LABEL)),
        payload_length: Be16::new(length),
        next_header: protocol,
        hop_limit: Tunnel::HOPS,
        source: [a, b, c, if d == 0 { inner.hash } else { d }],
        destination: target.address.quarters(),
    }
}

/// Without a checksum, which would have to be summed over all of the packet: the inner packet has
/// its own (RFC 6935 for IPv6; RFC 768 for IPv4).
#[inline(always)]
fn outer_udp(target: &Target, inner: &Inner) -> Udp {
    let source = Tunnel::FIRST_PORT | (inner.hash >> 18) as u16;
    Udp {
        source: Be16::new(source),
        destination: target.port,
        length: Be16::new((size_of::<Udp>() + inner.length) as u16),
        checksum: Be16::new(0),
    }
}

#[cfg(test)]
mod tests;
