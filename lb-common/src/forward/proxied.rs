//! A packet to a listener whose connections end in the agent's proxy: the kernel's own TCP has the
//! rest of it.

use crate::tables::{Endpoint, EndpointKey, OPEN, Tables};
use crate::verdict::{DropReason, Verdict};
use crate::wire::Address;

use super::ip::Ip;
use super::parse::{Packet, Place};
use super::{Frame, Next, Outcome, lookup};

/// Admits the packet, counts it for the listener, and passes it. First fragments too: what is not
/// put together in the end has been admitted all the same.
#[inline(never)]
pub fn handle<I: Ip, F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    place: &Place,
    listener: u32,
    class: u32,
) -> u64 {
    let pass = Next::with(Next::PASS, 0);
    let Some(packet) = place.read::<I, F>(frame) else { return pass };
    let Some(transport) = &packet.transport else { return pass };
    if class != OPEN && !tables.admits(class, packet.source) {
        return Next::with(Next::DROP, DropReason::SecurityGroupDenied as u32);
    }
    tables.count_proxied(listener, packet.length as u64, transport.is_syn() as u32);
    pass
}

/// A fragment of TCP without ports, to an address that the agent added. Only the address says whether
/// it may be for the proxy.
#[inline(always)]
pub fn later_fragment<I: Ip, T: Tables>(tables: &T, packet: &Packet<I>) -> Outcome {
    let ([high, low], [source_high, source_low]) =
        (packet.destination.words(), packet.source.words());
    match fate_of_fragment(tables, high, low, source_high, source_low) {
        PASSES => Ok(Verdict::Pass),
        IS_DENIED => Err(DropReason::SecurityGroupDenied.into()),
        _ => Err(DropReason::Fragmented.into()),
    }
}

const PASSES: u32 = 0;
const IS_DENIED: u32 = 1;
const IS_OF_NOBODY: u32 = 2;

/// A function of its own in the kernel too, with stack of its own.
#[inline(never)]
fn fate_of_fragment<T: Tables>(
    tables: &T,
    high: u64,
    low: u64,
    source_high: u64,
    source_low: u64,
) -> u32 {
    let address = Address::from_words([high, low]);
    let found = lookup(tables, &EndpointKey::of_address(address));
    if !found.has(Endpoint::REASSEMBLED) {
        return IS_OF_NOBODY;
    }
    let source = Address::from_words([source_high, source_low]);
    if found.class == OPEN || tables.admits(found.class, source) { PASSES } else { IS_DENIED }
}
