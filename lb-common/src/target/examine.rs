//! Which flow a packet belongs to, and whether rules have a say in it at all.

use crate::flow::{FlowKey, TCP, UDP};
use crate::forward::Frame;
use crate::forward::ip::{ANY, Ip, Parsed};
use crate::forward::parse::{Link, Packet, Ports};
use crate::verdict::DropReason;
use crate::wire::icmp::Icmp;
use crate::wire::{Address, Be16, Ethernet};

use super::tables::{class_index, mac_key, space};
use super::{Step, Version};

/// Where a packet goes from here: it passes, it dies, or it is judged by its flow.
#[inline(never)]
pub fn examine<I: Version, F: Frame>(frame: &F, step: &mut Step) -> u32 {
    match look_at::<I, F>(frame, step) {
        Ok(action) => action,
        Err(reason) => {
            step.argument = reason as u32;
            Step::DROP
        }
    }
}

#[inline(always)]
fn look_at<I: Version, F: Frame>(frame: &F, step: &mut Step) -> Result<u32, DropReason> {
    let ethernet: Ethernet = frame.read(0).ok_or(DropReason::Malformed)?;
    let link = Link::parse(frame).ok_or(DropReason::Malformed)?;
    let packet = Packet::<I>::parse::<ANY, F>(frame, &link).ok_or(DropReason::Malformed)?;
    if step.space == space::SOURCE {
        step.space = space::MAC;
        step.via = mac_key(ethernet.source);
    }
    match I::fragment_offset(packet.fragment) {
        0 => {}
        // It would overwrite the ports and flags that the first fragment was judged by (RFC 1858).
        1 if packet.protocol == TCP => return Err(DropReason::Malformed),
        // Nothing comes of it without the first fragment, which is judged.
        _ => return Ok(Step::PASS),
    }
    if packet.protocol == I::ICMP {
        return look_at_icmp(frame, &packet, step);
    }
    let ports = ports_of(&packet)?;
    if packet.protocol == UDP && is_dhcp::<I>(ports) {
        return Ok(Step::PASS);
    }
    step.flow = packet.flow(ports);
    step.class_index = class_index(I::IS_V4, packet.protocol, ports.destination);
    Ok(Step::JUDGE)
}

/// The ports of what has some, zero for other protocols.
#[inline(always)]
pub fn ports_of<I: Ip>(packet: &Packet<I>) -> Result<Ports, DropReason> {
    match (&packet.transport, packet.protocol) {
        (Some(transport), _) => Ok(transport.ports),
        // Its header is cut short: nobody knows what it asks for.
        (None, TCP | UDP) => Err(DropReason::Malformed),
        (None, _) => Ok(Ports { source: Be16::from_raw(0), destination: Be16::from_raw(0) }),
    }
}

/// From server to client (RFC 2131 section 4.1, RFC 8415 section 7.2). The request went to a group
/// address, so the answer is of no flow that was seen.
#[inline(always)]
fn is_dhcp<I: Version>(ports: Ports) -> bool {
    let (server, client) = if I::IS_V4 { (67, 68) } else { (547, 546) };
    ports.source.get() == server && ports.destination.get() == client
}

#[inline(always)]
fn look_at_icmp<I: Version, F: Frame>(
    frame: &F,
    packet: &Packet<I>,
    step: &mut Step,
) -> Result<u32, DropReason> {
    let icmp: Icmp = frame.read(packet.l4).ok_or(DropReason::Malformed)?;
    if I::is_of_the_segment(icmp.kind, I::hops(&packet.header)) {
        return Ok(Step::PASS);
    }
    if I::is_error(icmp.kind) {
        return look_at_quote::<I, F>(frame, packet.l4 + size_of::<Icmp>(), step);
    }
    let number = if icmp.kind == I::ECHO_REPLY { identifier(&icmp) } else { Be16::from_raw(0) };
    step.flow = packet.flow(Ports { source: number, destination: number });
    step.class_index = class_index(I::IS_V4, I::ICMP, number);
    Ok(Step::JUDGE)
}

/// What tells the echoes of one sender apart: not 0, which stands for other messages.
#[inline(always)]
pub fn identifier(icmp: &Icmp) -> Be16 {
    let identifier = (icmp.rest.get() >> 16) as u16;
    Be16::new(if identifier == 0 { u16::MAX } else { identifier })
}

/// An error is let in where a packet would be that answers the packet it is about.
#[inline(always)]
fn look_at_quote<I: Version, F: Frame>(
    frame: &F,
    at: usize,
    step: &mut Step,
) -> Result<u32, DropReason> {
    let quoted: Parsed<I::Header> = I::parse::<ANY, F>(frame, at).ok_or(DropReason::Malformed)?;
    let (source, destination) = I::addresses(&quoted.header);
    let mut sent = Ports { source: Be16::from_raw(0), destination: Be16::from_raw(0) };
    if I::fragment_offset(quoted.fragment) == 0 {
        match quoted.protocol {
            TCP | UDP => sent = frame.read(quoted.l4).ok_or(DropReason::Malformed)?,
            protocol if protocol == I::ICMP => {
                let icmp: Icmp = frame.read(quoted.l4).ok_or(DropReason::Malformed)?;
                let number = identifier(&icmp);
                sent = Ports { source: number, destination: number };
            }
            _ => {}
        }
    }
    step.flow = answer_to(source, destination, sent, quoted.protocol);
    step.class_index = class_index(I::IS_V4, quoted.protocol, sent.source);
    Ok(Step::JUDGE)
}

/// The flow of the packets that answer those that went this way.
#[inline(always)]
pub fn answer_to(source: Address, destination: Address, sent: Ports, protocol: u8) -> FlowKey {
    FlowKey {
        source: destination,
        destination: source,
        source_port: sent.destination,
        destination_port: sent.source,
        protocol,
        zero: [0; 3],
    }
}
