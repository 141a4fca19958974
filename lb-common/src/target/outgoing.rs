//! What the target sends: the flows that it opens are remembered, nothing is changed or held back.

use bytemuck::{Pod, Zeroable};

use crate::flow::{FlowKey, REFRESH, TCP, UDP};
use crate::forward::ip::{ANY, Parsed, V4, V6};
use crate::forward::parse::{Link, Ports, whole};
use crate::forward::{Frame, hidden_zeros};
use crate::wire::icmp::Icmp;
use crate::wire::{EtherType, Tcp, Udp};

use super::examine::{NO_PORTS, answer_to, identifier};
use super::tables::{OWN_IDLE, OwnFlow, Settings, TargetTables};
use super::{Version, ether_type};

/// Remembers the flow of an outgoing packet, if the target opens it or has opened it.
#[inline(always)]
pub fn record<F: Frame, T: TargetTables>(frame: &F, tables: &T) {
    if tables.settings().flags & Settings::RECORDS == 0 {
        return;
    }
    let mut sent = Sent::nothing();
    let kind = match ether_type(frame) {
        Some(EtherType::IPV4) => look_at::<V4, F>(frame, &mut sent),
        Some(EtherType::IPV6) => look_at::<V6, F>(frame, &mut sent),
        _ => Sent::NOTHING,
    };
    if kind != Sent::NOTHING {
        note(tables, &sent, kind);
    }
}

/// What a packet says of its flow.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Sent {
    /// Not 0 if it ends the flow.
    closing: u32,
    zero: u32,
    /// The flow of the answers.
    answers: FlowKey,
}

impl Sent {
    /// Of no flow.
    const NOTHING: u32 = 0;
    /// It opens a flow.
    const OPENS: u32 = 1;
    /// It opens a flow unless it answers one.
    const MAY_OPEN: u32 = 2;
    /// It belongs to a flow that was opened before, by whomever.
    const CONTINUES: u32 = 3;

    #[inline(always)]
    fn nothing() -> Self {
        hidden_zeros!()
    }
}

#[inline(never)]
fn look_at<I: Version, F: Frame>(frame: &F, sent: &mut Sent) -> u32 {
    let frame = whole(frame);
    let Some(link) = Link::parse(frame) else { return Sent::NOTHING };
    let parsed: Option<Parsed<I::Header>> = I::parse::<ANY, F>(frame, link.l3);
    let Some(parsed) = parsed else { return Sent::NOTHING };
    if I::fragment_offset(parsed.fragment) != 0 {
        return Sent::NOTHING;
    }
    let (source, destination) = I::addresses(&parsed.header);
    let mut ports = NO_PORTS;
    let mut kind = Sent::MAY_OPEN;
    match parsed.protocol {
        TCP => {
            let Some(tcp) = frame.read::<Tcp>(parsed.l4) else { return Sent::NOTHING };
            ports = Ports { source: tcp.source, destination: tcp.destination };
            sent.closing = (tcp.flags & (Tcp::FIN | Tcp::RST) != 0) as u32;
            let is_syn = tcp.flags & (Tcp::SYN | Tcp::ACK) == Tcp::SYN;
            kind = if is_syn { Sent::OPENS } else { Sent::CONTINUES };
        }
        UDP => {
            let Some(udp) = frame.read::<Udp>(parsed.l4) else { return Sent::NOTHING };
            ports = Ports { source: udp.source, destination: udp.destination };
        }
        protocol if protocol == I::ICMP => {
            let Some(icmp) = frame.read::<Icmp>(parsed.l4) else { return Sent::NOTHING };
            if icmp.kind != I::ECHO_REQUEST {
                return Sent::NOTHING;
            }
            let number = identifier(&icmp);
            ports = Ports { source: number, destination: number };
            kind = Sent::OPENS;
        }
        _ => {}
    }
    sent.answers = answer_to(source, destination, ports, parsed.protocol);
    kind
}

#[inline(never)]
fn note<T: TargetTables>(tables: &T, sent: &Sent, kind: u32) -> u32 {
    let now = tables.now();
    let known = tables.own_flow(&sent.answers);
    let known = known.filter(|flow| flow.is_alive(now, sent.answers.protocol));
    if let Some(mut flow) = known
        && kind != Sent::OPENS
    {
        if sent.closing > flow.closing || now.saturating_sub(flow.last_seen) > REFRESH {
            flow.last_seen = now;
            flow.closing |= sent.closing;
            tables.remember_own(&sent.answers, &flow);
        }
        return kind;
    }
    let opens = match kind {
        Sent::OPENS => true,
        Sent::MAY_OPEN => !answers_a_request(tables, sent, now),
        _ => false,
    };
    if opens {
        tables.remember_own(&sent.answers, &OwnFlow::new(now));
    }
    kind
}

#[inline(always)]
fn answers_a_request<T: TargetTables>(tables: &T, sent: &Sent, now: u64) -> bool {
    let request = tables.admitted(&sent.answers);
    request.is_some_and(|last| now.saturating_sub(last) < OWN_IDLE)
}
