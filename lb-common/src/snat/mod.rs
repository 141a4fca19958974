//! Source address translation: what is kept of a flow whose both ends are rewritten.
//!
//! A flow has two entries, each found by one lookup: by the packets of its client ([`SnatFlow`]),
//! and by those of its target ([`SnatReturn`]). While the first one lives, so does the second, which
//! holds the port: whatever makes the second one shorter-lived is written to both.

mod pool;

use bytemuck::{Pod, Zeroable};

use crate::flow::{CLOSING_IDLE, FlowKey, REFRESH, SECOND, TCP};
use crate::wire::{Address, Be16, Tcp};

#[cfg(any(test, feature = "std"))]
pub use pool::HostAtomics;
pub use pool::{Atomics, NO_PORT, PortPool};

/// Source addresses of one target at most.
pub const MAX_SNAT_ADDRESSES: u32 = 4;
/// A UDP flow of which the client sent one datagram only is forgotten after this time, nanoseconds:
/// most of those are a question and its answer, and a flood of them must not hold the ports for
/// the whole idle timeout. (Linux's `nf_conntrack_udp_timeout` has the same 30 s.)
pub const UDP_ONCE_SEEN_IDLE: u64 = 30 * SECOND;
/// A port is given back this long after its flow timed out, nanoseconds: packets that were under
/// way through the program when it did are through by then.
pub const RELEASE_AFTER: u64 = 2 * SECOND;

/// An address that packets to a target may come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct SnatSource {
    /// The address.
    pub address: Address,
    /// Number of the pool of its ports towards the target.
    pub pool: u32,
    /// First port to be used; host byte order.
    pub first: u16,
    /// Last port to be used; host byte order.
    pub last: u16,
    /// Zero.
    pub zero: u64,
}

/// When a flow's last packet came, and how far the flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct Stamp(u64);

impl Stamp {
    /// The client has sent one packet, or SYNs only.
    pub const OPENING: u64 = 0;
    /// The client has sent more.
    pub const ESTABLISHED: u64 = 1;
    /// A FIN or RST was seen, from either end.
    pub const CLOSING: u64 = 2;
    const STATES: u64 = 3;

    /// A packet at this time, in monotonic nanoseconds, of a flow in this state.
    #[inline(always)]
    pub const fn new(now: u64, state: u64) -> Self {
        Self(now & !Self::STATES | state)
    }

    /// When the last packet came, within [`REFRESH`]; monotonic nanoseconds, in steps of 4.
    #[inline(always)]
    pub const fn time(self) -> u64 {
        self.0 & !Self::STATES
    }

    /// One of the states.
    #[inline(always)]
    pub const fn state(self) -> u64 {
        self.0 & Self::STATES
    }

    /// Whether the flow is still alive: an entry past its idle timeout (seconds) is no entry. A flow
    /// that is opening, as one that is closing, has a short one.
    #[inline(always)]
    pub const fn is_alive(self, now: u64, protocol: u8, idle: u16) -> bool {
        let limit = if self.state() == Self::ESTABLISHED {
            // The last packet may have come later than is written.
            idle as u64 * SECOND + REFRESH
        } else if protocol == TCP || self.state() == Self::CLOSING {
            CLOSING_IDLE
        } else {
            UDP_ONCE_SEEN_IDLE
        };
        now.saturating_sub(self.time()) < limit
    }

    /// Whether nothing will be done any more with what is remembered of the flow: it timed out a while
    /// ago.
    pub fn is_over(self, now: u64, protocol: u8, idle: u16) -> bool {
        let earlier = now.saturating_sub(RELEASE_AFTER);
        self.time() < earlier && !self.is_alive(earlier, protocol, idle)
    }

    /// Whether it is time to write the time down again.
    #[inline(always)]
    pub const fn is_stale(self, now: u64) -> bool {
        now.saturating_sub(self.time()) > REFRESH
    }

    /// The state after a packet of the client with these TCP control bits (0 for UDP).
    #[inline(always)]
    pub const fn after_request(self, flags: u8, now: u64) -> u64 {
        if flags & Tcp::SYN != 0 && self.state() == Self::OPENING {
            return Self::OPENING;
        }
        self.after_end(flags, now, Self::ESTABLISHED)
    }

    /// The state after a packet of the target. It does not establish a flow: an answer comes to a
    /// forged packet too.
    #[inline(always)]
    pub const fn after_reply(self, flags: u8, now: u64) -> u64 {
        let lives_on =
            if self.state() == Self::OPENING { Self::OPENING } else { Self::ESTABLISHED };
        self.after_end(flags, now, lives_on)
    }

    /// Data a while after a FIN, or after a reset that the other end did not accept: the flow lives
    /// on.
    #[inline(always)]
    const fn after_end(self, flags: u8, now: u64, lives_on: u64) -> u64 {
        let ends = flags & (Tcp::FIN | Tcp::RST) != 0;
        if ends || (self.state() == Self::CLOSING && !self.is_stale(now)) {
            Self::CLOSING
        } else {
            lives_on
        }
    }
}

/// What is remembered of a flow for its client's packets; found by their addresses and ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct SnatFlow {
    /// Its last packet.
    pub stamp: Stamp,
    /// The address that the target sees.
    pub address: Address,
    /// Index of the target.
    pub target: u32,
    /// The port that the target sees.
    pub port: Be16,
    /// What its listener's idle timeout was when it began, seconds.
    pub idle: u16,
}

/// What is remembered of a flow for its target's packets; found by their addresses and ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct SnatReturn {
    /// Its last packet.
    pub stamp: Stamp,
    /// The client's address.
    pub client: Address,
    /// The client's port.
    pub client_port: Be16,
    /// As in [`SnatFlow`].
    pub idle: u16,
    /// Index of the listener.
    pub listener: u32,
    /// Index of the target.
    pub target: u32,
    /// Number of the pool that the port is from.
    pub pool: u32,
}

/// What became of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Entered {
    /// It is in the table.
    New = 0,
    /// Another one is there.
    Taken = 1,
    /// There is no room.
    Full = 2,
}

/// The lookups of source address translation.
pub trait SnatTables {
    /// How words of a pool are changed.
    type Atomics: Atomics;

    /// A source by `target * MAX_SNAT_ADDRESSES + number`.
    fn source(&self, index: u32) -> Option<&SnatSource>;
    /// Ports by number.
    fn pool(&self, number: u32) -> Option<&PortPool>;
    /// A flow by its client's packets; the time of its last packet is not checked.
    fn snat_flow(&self, key: &FlowKey) -> Option<SnatFlow>;
    /// A flow by its target's packets; the time of its last packet is not checked.
    fn snat_return(&self, key: &FlowKey) -> Option<SnatReturn>;
    /// Remembers a flow by its client's packets, in the place of an older one; `false` if there is
    /// no room.
    fn remember_snat(&self, key: &FlowKey, flow: &SnatFlow) -> bool;
    /// Remembers a flow by its target's packets, unless there is one already. This is what gives a
    /// port to one flow alone.
    fn enter_snat_return(&self, key: &FlowKey, flow: &SnatReturn) -> Entered;
    /// Forgets a flow by its target's packets.
    fn forget_snat_return(&self, key: &FlowKey);
    /// Renews a flow's stamp; `false` if there is no such flow.
    fn stamp_snat(&self, key: &FlowKey, stamp: Stamp) -> bool;
    /// The same by its target's packets.
    fn stamp_snat_return(&self, key: &FlowKey, stamp: Stamp) -> bool;
}

const _: () = {
    assert!(size_of::<SnatSource>() == 32);
    assert!(size_of::<SnatFlow>() == 32);
    assert!(size_of::<SnatReturn>() == 40);
};

#[cfg(any(test, feature = "std"))]
mod model;
#[cfg(any(test, feature = "std"))]
pub use model::SnatModel;

#[cfg(test)]
mod tests {
    use crate::flow::{TCP_IDLE, UDP, UDP_IDLE};

    use super::*;

    const NOW: u64 = 1000 * SECOND;
    const LATER: u64 = NOW + 2 * SECOND;

    #[test]
    fn what_lives_for_how_long() {
        for (state, protocol, idle, limit) in [
            (Stamp::OPENING, TCP, TCP_IDLE, 10 * SECOND),
            (Stamp::ESTABLISHED, TCP, TCP_IDLE, 351 * SECOND),
            (Stamp::ESTABLISHED, TCP, 6000, 6001 * SECOND),
            (Stamp::CLOSING, TCP, TCP_IDLE, 10 * SECOND),
            (Stamp::OPENING, UDP, UDP_IDLE, 30 * SECOND),
            (Stamp::ESTABLISHED, UDP, UDP_IDLE, 121 * SECOND),
        ] {
            let idle = idle as u16;
            let stamp = Stamp::new(NOW, state);
            assert!(stamp.is_alive(NOW + limit - 1, protocol, idle), "{state} {protocol} {idle}");
            assert!(!stamp.is_alive(NOW + limit, protocol, idle), "{state} {protocol} {idle}");
            assert!(!stamp.is_over(NOW, protocol, idle), "{state} {protocol} {idle}");
            assert!(
                !stamp.is_over(NOW + limit + RELEASE_AFTER - 1, protocol, idle),
                "{state} {protocol} {idle}"
            );
            assert!(
                stamp.is_over(NOW + limit + RELEASE_AFTER, protocol, idle),
                "{state} {protocol} {idle}"
            );
        }
    }

    #[test]
    fn the_life_of_a_flow() {
        use Stamp as S;
        let (syn, ack, fin, rst) = (Tcp::SYN, Tcp::ACK, Tcp::FIN | Tcp::ACK, Tcp::RST);
        for (before, flags, at, by_request, by_reply) in [
            (S::OPENING, syn, NOW, S::OPENING, S::OPENING),
            (S::OPENING, syn | ack, NOW, S::OPENING, S::OPENING),
            (S::OPENING, ack, NOW, S::ESTABLISHED, S::OPENING),
            (S::OPENING, rst, NOW, S::CLOSING, S::CLOSING),
            (S::ESTABLISHED, ack, LATER, S::ESTABLISHED, S::ESTABLISHED),
            (S::ESTABLISHED, fin, NOW, S::CLOSING, S::CLOSING),
            (S::CLOSING, ack, NOW, S::CLOSING, S::CLOSING),
            (S::CLOSING, ack, LATER, S::ESTABLISHED, S::ESTABLISHED),
            (S::CLOSING, fin, LATER, S::CLOSING, S::CLOSING),
        ] {
            let stamp = Stamp::new(NOW, before);
            assert_eq!(stamp.after_request(flags, at), by_request, "{before} {flags:#x} request");
            assert_eq!(stamp.after_reply(flags, at), by_reply, "{before} {flags:#x} reply");
        }
    }
}
