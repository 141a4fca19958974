//! A packet to a listener.

use crate::tables::{Endpoint, NO_RING, Tables, Target};
use crate::verdict::{DropReason, Verdict};

use super::ip::End;
use super::parse::{Link, Packet, Transport};
use super::select::{Selected, select};
use super::reject::Answer;
use super::{Frame, Outcome, admit, emit, reject};

/// Admits the packet, chooses its target and sends it there.
#[inline(always)]
pub fn handle<I: Answer, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    link: &Link,
    packet: &Packet<I>,
    transport: &Transport,
    listener: &Endpoint,
) -> Outcome {
    if transport.is_malformed {
        return Err(DropReason::Malformed);
    }
    admit(tables, packet, listener)?;
    if packet.is_fragment {
        return Err(DropReason::Fragmented);
    }
    if listener.index == NO_RING {
        return reject::answer::<I, F, T>(frame, tables, DropReason::NoTarget);
    }
    let Selected { target, index, is_new } = match select(tables, packet, transport, listener) {
        Ok(selected) => selected,
        Err(reason @ (DropReason::TargetDown | DropReason::PortAllocationError)) => {
            return reject::answer::<I, F, T>(frame, tables, reason);
        }
        Err(reason) => return Err(reason),
    };
    if target.hop.ifindex == 0 {
        tables.report_unresolved(target.address);
        return Err(DropReason::NextHopUnresolved);
    }
    if packet.length > target.hop.mtu as usize {
        return Err(DropReason::TooBig);
    }
    if target.mode == Target::NAT {
        emit::translate::<I, F>(frame, packet, transport, End::Destination, target.address, target.port)?;
    }
    let verdict: Verdict = emit::send(frame, link, &target.hop)?;
    tables.count_request(listener.listener, index, packet.length as u64, is_new);
    Ok(verdict)
}
