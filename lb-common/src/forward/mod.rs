//! The way of a packet: parse -> classify -> admit -> select -> rewrite -> emit.
//!
//! Everything here runs in the kernel: a header is copied out at an offset that the verifier can
//! bound, nothing is indexed by packet data, nothing panics, and nothing is written before it is
//! certain that the packet is ours.

mod emit;
mod ip;
mod parse;
mod reject;
mod reply;
mod request;
mod select;

use bytemuck::Pod;

use crate::flow::{ICMP, ICMPV6, TCP, UDP};
use crate::tables::{AdmissionKey, Endpoint, EndpointKey, OPEN, Tables};
use crate::verdict::{DropReason, Verdict};
use crate::wire::icmp::Icmp;
use crate::wire::EtherType;

use ip::{Ip, V4, V6};
use parse::{Link, Packet};

/// The bytes of a packet. Every access checks its bounds.
pub trait Frame {
    /// Copies a header out; `None` beyond the packet's end.
    fn read<H: Pod>(&self, at: usize) -> Option<H>;
    /// Writes a header; `None`, and nothing written, beyond the packet's end.
    fn write<H: Pod>(&mut self, at: usize, header: H) -> Option<()>;
    /// Length, bytes.
    fn len(&self) -> usize;
    /// Whether there is no byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Index of the NIC it came in by.
    fn ingress(&self) -> u32;
    /// Adds bytes of unspecified content at the front (`by` > 0), or takes them away. `None`, and
    /// nothing changed, if there is no room.
    fn grow_front(&mut self, by: i32) -> Option<()>;
    /// Cuts bytes off the end. `None` if there are not as many.
    fn shrink_back(&mut self, by: u32) -> Option<()>;
}

/// What the pipeline says: a verdict, or a packet that dies of a reason yet to be counted.
type Outcome = Result<Verdict, DropReason>;

/// Decides what happens to a packet, rewrites it accordingly, and counts it.
#[inline(always)]
pub fn forward<F: Frame, T: Tables>(frame: &mut F, tables: &T) -> Verdict {
    let Some(link) = Link::parse(frame) else { return Verdict::Pass };
    let outcome = match link.ether_type {
        EtherType::IPV4 => classify::<V4, F, T>(frame, tables, &link),
        EtherType::IPV6 => classify::<V6, F, T>(frame, tables, &link),
        _ => Ok(Verdict::Pass),
    };
    outcome.unwrap_or_else(|reason| {
        tables.count_drop(reason);
        Verdict::Drop
    })
}

/// Whose packet is it? Nothing is written here: what is not ours passes untouched.
#[inline(always)]
fn classify<I: reject::Answer, F: Frame, T: Tables>(frame: &mut F, tables: &T, link: &Link) -> Outcome {
    let Some(packet) = Packet::<I>::parse(frame, link) else { return Ok(Verdict::Pass) };
    if packet.protocol == ICMP || packet.protocol == ICMPV6 {
        return guard(frame, tables, &packet);
    }
    let Some(transport) = &packet.transport else { return without_ports(tables, &packet) };
    let ports = transport.ports;

    let destination = EndpointKey::new(packet.destination, ports.destination, packet.protocol);
    if let Some(endpoint) = lookup(tables, &destination) {
        return match endpoint.kind() {
            Endpoint::LISTENER => request::handle(frame, tables, link, &packet, transport, &endpoint),
            Endpoint::TARGET => reply::note_direct(tables, &packet, transport, &endpoint),
            _ => Ok(Verdict::Pass),
        };
    }
    let source = EndpointKey::new(packet.source, ports.source, packet.protocol);
    if let Some(endpoint) = lookup(tables, &source)
        && endpoint.kind() == Endpoint::TARGET
    {
        return reply::handle(frame, tables, link, &packet, transport, &endpoint);
    }
    if is_owned(tables, &packet) { Err(DropReason::NoListener) } else { Ok(Verdict::Pass) }
}

/// A packet without ports: a later fragment, a truncated header, another protocol.
#[inline(always)]
fn without_ports<I: Ip, T: Tables>(tables: &T, packet: &Packet<I>) -> Outcome {
    let balanced = packet.protocol == TCP || packet.protocol == UDP;
    if balanced && is_owned(tables, packet) {
        let fragment = packet.is_fragment;
        return Err(if fragment { DropReason::Fragmented } else { DropReason::Malformed });
    }
    Ok(Verdict::Pass)
}

/// Whether the agent itself added the destination address to this machine: ports without a
/// listener must not show the machine's own services there.
#[inline(always)]
fn is_owned<I: Ip, T: Tables>(tables: &T, packet: &Packet<I>) -> bool {
    lookup(tables, &EndpointKey::of_address(packet.destination))
        .is_some_and(|endpoint| endpoint.kind() == Endpoint::OWNED)
}

/// Whether the destination is an address of this machine.
#[inline(always)]
fn is_local<T: Tables>(tables: &T, address: crate::wire::Address) -> bool {
    lookup(tables, &EndpointKey::of_address(address))
        .is_some_and(|endpoint| matches!(endpoint.kind(), Endpoint::LOCAL | Endpoint::OWNED))
}

/// Echo requests to an address with security groups need a rule; errors and neighbour discovery
/// always pass.
#[inline(always)]
fn guard<I: Ip, F: Frame, T: Tables>(frame: &F, tables: &T, packet: &Packet<I>) -> Outcome {
    let Some(icmp) = frame.read::<Icmp>(packet.l4) else { return Ok(Verdict::Pass) };
    if packet.is_fragment || icmp.kind != I::ECHO_REQUEST {
        return Ok(Verdict::Pass);
    }
    let key = EndpointKey::new(packet.destination, Default::default(), packet.protocol);
    match lookup(tables, &key) {
        Some(endpoint) if endpoint.kind() == Endpoint::GUARD => {
            admit(tables, packet, &endpoint).map(|()| Verdict::Pass)
        }
        _ => Ok(Verdict::Pass),
    }
}

/// The security groups: a listener without one costs nothing.
#[inline(always)]
fn admit<I: Ip, T: Tables>(
    tables: &T,
    packet: &Packet<I>,
    endpoint: &Endpoint,
) -> Result<(), DropReason> {
    let admitted = endpoint.class == OPEN
        || tables.admits(&AdmissionKey::new(endpoint.class, packet.source));
    if admitted { Ok(()) } else { Err(DropReason::SecurityGroupDenied) }
}

/// Finds an endpoint in its bucket, and beyond it only if the bucket says so.
#[inline(always)]
fn lookup<T: Tables>(tables: &T, key: &EndpointKey) -> Option<Endpoint> {
    let [first, second] = &tables.bucket(key.bucket(tables.keys()))?.endpoints;
    if matches(first, key) {
        return Some(*first);
    }
    if matches(second, key) {
        return Some(*second);
    }
    if first.kind & Endpoint::OVERFLOW != 0 { tables.overflow(key) } else { None }
}

#[inline(always)]
fn matches(endpoint: &Endpoint, key: &EndpointKey) -> bool {
    endpoint.address == key.address
        && endpoint.port == key.port
        && endpoint.protocol == key.protocol
        && endpoint.kind() != 0
}
