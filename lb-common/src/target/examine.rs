//! Which flow a packet belongs to, and whether rules have a say in it at all.

use crate::flow::{FlowKey, TCP, UDP};
use crate::forward::Frame;
use crate::forward::ip::{ANY, MAX_HEADERS, Parsed};
use crate::forward::parse::{Link, Ports, whole};
use crate::verdict::DropReason;
use crate::wire::icmp::Icmp;
use crate::wire::{Address, Be16, Ethernet, Tcp, Udp};

use super::tables::{class_index, mac_key, space};
use super::{Step, Version};

/// Where a packet goes from here: it passes, it dies, or it is judged by its flow; of a message of
/// ICMP more has to be read, see [`examine_icmp`].
#[inline(never)]
pub fn examine<I: Version, F: Frame>(frame: &F, step: &mut Step) -> u32 {
    let action = look_at::<I, F>(whole(frame), step);
    conclude(action, step)
}

/// A message of ICMP at [`Step::l4`]; of an error what it quotes, see [`examine_quote`].
#[inline(never)]
pub fn examine_icmp<I: Version, F: Frame>(frame: &F, step: &mut Step) -> u32 {
    let action = look_at_icmp::<I, F>(whole(frame), step);
    conclude(action, step)
}

/// The packet that an ICMP error at [`Step::l4`] is about.
#[inline(never)]
pub fn examine_quote<I: Version, F: Frame>(frame: &F, step: &mut Step) -> u32 {
    let action = look_at_quote::<I, F>(whole(frame), step);
    conclude(action, step)
}

#[inline(always)]
fn conclude(action: Result<u32, DropReason>, step: &mut Step) -> u32 {
    match action {
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
    let parsed: Parsed<I::Header> =
        I::parse::<ANY, F>(frame, link.l3).ok_or(DropReason::Malformed)?;
    if step.space == space::SOURCE {
        step.space = space::MAC;
        step.via = mac_key(ethernet.source);
    }
    match I::fragment_offset(parsed.fragment) {
        0 => {}
        // It would overwrite the ports and flags that the first fragment was judged by (RFC 1858).
        1 if parsed.protocol == TCP => return Err(DropReason::Malformed),
        // Nothing comes of it without the first fragment, which is judged.
        _ => return Ok(Step::PASS),
    }
    let (source, destination) = I::addresses(&parsed.header);
    if parsed.protocol == I::ICMP {
        step.l4 = parsed.l4 as u16;
        step.hops = I::hops(&parsed.header) as u32;
        set_flow(step, source, destination, NO_PORTS, I::ICMP);
        return Ok(Step::ICMP);
    }
    let ports = ports_at(frame, parsed.l4, parsed.protocol).ok_or(DropReason::Malformed)?;
    if parsed.protocol == UDP && is_dhcp::<I>(ports) {
        return Ok(Step::PASS);
    }
    set_flow(step, source, destination, ports, parsed.protocol);
    step.class_index = class_index(I::IS_V4, parsed.protocol, ports.destination);
    Ok(Step::JUDGE)
}

/// Where a protocol has none.
pub const NO_PORTS: Ports = Ports { source: Be16::from_raw(0), destination: Be16::from_raw(0) };

/// The ports of what has some, zero for other protocols; `None` if the header is cut short: nobody
/// knows what it asks for.
#[inline(always)]
pub fn ports_at<F: Frame>(frame: &F, l4: usize, protocol: u8) -> Option<Ports> {
    match protocol {
        TCP => {
            let tcp: Tcp = frame.read(l4)?;
            Some(Ports { source: tcp.source, destination: tcp.destination })
        }
        UDP => {
            let udp: Udp = frame.read(l4)?;
            Some(Ports { source: udp.source, destination: udp.destination })
        }
        _ => Some(NO_PORTS),
    }
}

#[inline(always)]
fn set_flow(step: &mut Step, source: Address, destination: Address, ports: Ports, protocol: u8) {
    step.flow = FlowKey {
        source,
        destination,
        source_port: ports.source,
        destination_port: ports.destination,
        protocol,
        zero: [0; 3],
    };
}

/// From server to client (RFC 2131 section 4.1, RFC 8415 section 7.2). The request went to a group
/// address, so the answer is of no flow that was seen.
#[inline(always)]
fn is_dhcp<I: Version>(ports: Ports) -> bool {
    let (server, client) = if I::IS_V4 { (67, 68) } else { (547, 546) };
    ports.source.get() == server && ports.destination.get() == client
}

#[inline(always)]
fn look_at_icmp<I: Version, F: Frame>(frame: &F, step: &mut Step) -> Result<u32, DropReason> {
    // The mask changes nothing; it is for the verifier.
    let l4 = (step.l4 & MAX_HEADERS) as usize;
    let icmp: Icmp = frame.read(l4).ok_or(DropReason::Malformed)?;
    if I::is_of_the_segment(icmp.kind, step.hops as u8) {
        return Ok(Step::PASS);
    }
    if I::is_error(icmp.kind) {
        return Ok(Step::QUOTE);
    }
    let number = if icmp.kind == I::ECHO_REPLY { identifier(&icmp) } else { Be16::from_raw(0) };
    step.flow.source_port = number;
    step.flow.destination_port = number;
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
fn look_at_quote<I: Version, F: Frame>(frame: &F, step: &mut Step) -> Result<u32, DropReason> {
    // As above.
    let at = (step.l4 & MAX_HEADERS) as usize + size_of::<Icmp>();
    let quoted: Parsed<I::Header> = I::parse::<ANY, F>(frame, at).ok_or(DropReason::Malformed)?;
    let (source, destination) = I::addresses(&quoted.header);
    let mut sent = NO_PORTS;
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
