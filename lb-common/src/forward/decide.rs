//! What becomes of a flow on a slot that is not settled: the state machine, without any table.
//!
//! A packet's flow is remembered or not ([`Known`]); the packet opens a connection, ends one, or
//! neither ([`Kind`]); the slot says what the hash chooses now and chose before. From these alone
//! follow the target and what is remembered next. See the tables in docs/connections.md.

use crate::flow::{Flow, FlowTable, REFRESH, TCP};
use crate::tables::{Slot, SlotState, Target};
use crate::wire::Tcp;

/// What a packet says about its flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A SYN without ACK: a TCP connection begins.
    Opening,
    /// A segment of a TCP connection that began before.
    Amid,
    /// A FIN or RST: a TCP connection ends.
    Ending,
    /// A QUIC client's Initial: a connection begins, or began a moment ago.
    Initial,
    /// Any other datagram: it does not say.
    Datagram,
}

impl Kind {
    /// What stands for TCP's control bits in a QUIC client's Initial packet.
    pub const QUIC_INITIAL: u8 = 1;

    /// Of a packet with these TCP control bits; of a datagram with [`Self::QUIC_INITIAL`] or 0.
    #[inline(always)]
    pub fn of(protocol: u8, flags: u8) -> Self {
        if protocol != TCP {
            if flags & Self::QUIC_INITIAL != 0 { Self::Initial } else { Self::Datagram }
        } else if flags & (Tcp::SYN | Tcp::ACK) == Tcp::SYN {
            Self::Opening
        } else if flags & (Tcp::FIN | Tcp::RST) != 0 {
            Self::Ending
        } else {
            Self::Amid
        }
    }

    /// Whether a flow that is not remembered counts as new, by this packet of it.
    #[inline(always)]
    pub fn may_be_new(self) -> bool {
        !matches!(self, Self::Amid | Self::Ending)
    }
}

/// A flow that is remembered and alive.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// What is remembered of it.
    pub flow: Flow,
    /// In which table.
    pub table: FlowTable,
}

/// What becomes of a remembered flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It goes on, and nothing is written.
    Kept,
    /// It goes on, and its entry is brought up to date where it is.
    Refreshed,
    /// It goes on, and moves to the table of flows that have shown themselves twice.
    Promoted,
    /// Its entry is void, the packet takes the slot's current target.
    Replaced,
    /// Its entry is void, the packet is refused: the target that knows the connection is gone.
    Refused,
}

/// What becomes of a remembered flow whose target has these flags (of [`Target`]).
#[inline(always)]
pub fn fate(known: &Known, target_flags: u8, kind: Kind, now: u64) -> Fate {
    if kind == Kind::Opening {
        // A SYN on a connection that is closing opens a new one (RFC 9293 section 3.6.1), and a
        // new one needs a target that takes new ones.
        let takes = Target::SERVES | Target::IN_RING;
        if known.flow.closing != 0 || target_flags & takes != takes {
            return Fate::Replaced;
        }
    } else if target_flags & Target::SERVES == 0 {
        let is_udp = matches!(kind, Kind::Initial | Kind::Datagram);
        return if is_udp { Fate::Replaced } else { Fate::Refused };
    }
    let closing = closing(&known.flow, kind, now);
    // A flood of SYNs, or one of FINs, must not get further than its like.
    let shows_itself = !matches!(kind, Kind::Opening | Kind::Ending) && closing == 0;
    if known.table != FlowTable::Flows && shows_itself {
        Fate::Promoted
    } else if closing != known.flow.closing || is_stale(&known.flow, now) {
        Fate::Refreshed
    } else {
        Fate::Kept
    }
}

/// [`Flow::closing`] after the packet. A while after a FIN, or a reset that the other end did not
/// accept, any packet says that the flow lives on.
#[inline(always)]
pub fn closing(flow: &Flow, kind: Kind, now: u64) -> u32 {
    if kind == Kind::Ending {
        1
    } else if is_stale(flow, now) {
        0
    } else {
        flow.closing
    }
}

/// Not every packet writes the time: the entry's cache line would move from CPU to CPU.
#[inline(always)]
fn is_stale(flow: &Flow, now: u64) -> bool {
    now.saturating_sub(flow.last_seen) > REFRESH
}

/// Index of the target of a flow that is not remembered; 0: there is none.
#[inline(always)]
pub fn choice(slot: Slot, kind: Kind) -> u32 {
    let is_older = match slot.state() {
        // Before the change, or it would be remembered.
        SlotState::Learning => !matches!(kind, Kind::Opening | Kind::Initial),
        SlotState::LearningTcp => matches!(kind, Kind::Amid | Kind::Ending),
        SlotState::Settled | SlotState::Pinned => false,
    };
    if is_older && slot.previous() != 0 { slot.previous() } else { slot.current }
}

/// Whether a flow that is not remembered is certain to be new where every flow is tracked: nobody
/// has it yet, so it can go to any target.
#[inline(always)]
pub fn is_new(slot: Slot, kind: Kind) -> bool {
    match kind {
        Kind::Opening | Kind::Initial => true,
        Kind::Datagram => slot.state() != SlotState::Learning,
        Kind::Amid | Kind::Ending => false,
    }
}

/// Where a flow goes that was not remembered until now; `None`: nowhere.
#[inline(always)]
pub fn first_table(slot: Slot, kind: Kind, is_tracked: bool) -> Option<FlowTable> {
    let learns = matches!(slot.state(), SlotState::Learning | SlotState::LearningTcp);
    if !learns && !is_tracked {
        None
    } else if kind == Kind::Opening {
        Some(FlowTable::HalfOpen)
    } else {
        Some(FlowTable::OnceSeen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::SECOND;

    const NOW: u64 = 1000 * SECOND;
    const IN_RING: u8 = Target::SERVES | Target::IN_RING;
    const DRAINING: u8 = Target::SERVES;
    const GONE: u8 = 0;

    fn known(table: FlowTable, closing: u32, ago: u64) -> Known {
        Known { flow: Flow { last_seen: NOW - ago, target: 1, closing }, table }
    }

    #[test]
    fn a_packet_says_what_it_is() {
        assert_eq!(Kind::of(TCP, Tcp::SYN), Kind::Opening);
        assert_eq!(Kind::of(TCP, Tcp::SYN | Tcp::ACK), Kind::Amid);
        assert_eq!(Kind::of(TCP, Tcp::ACK), Kind::Amid);
        assert_eq!(Kind::of(TCP, Tcp::ACK | Tcp::FIN), Kind::Ending);
        assert_eq!(Kind::of(TCP, Tcp::RST), Kind::Ending);
        assert_eq!(Kind::of(crate::flow::UDP, 0), Kind::Datagram);
        assert_eq!(Kind::of(crate::flow::UDP, Kind::QUIC_INITIAL), Kind::Initial);
    }

    #[test]
    fn the_fate_of_a_remembered_flow() {
        use FlowTable::{Flows, HalfOpen, OnceSeen};
        use Kind::{Amid, Datagram, Ending, Initial, Opening};
        let (live, fin) = (known(Flows, 0, 0), known(Flows, 1, 0));
        for (what, known, flags, kind, fate) in [
            ("nothing to write", live, IN_RING, Amid, Fate::Kept),
            ("it drains", live, DRAINING, Amid, Fate::Kept),
            ("a while later", known(Flows, 0, 2 * SECOND), IN_RING, Amid, Fate::Refreshed),
            ("it ends", live, IN_RING, Ending, Fate::Refreshed),
            ("it ends once more", fin, IN_RING, Ending, Fate::Kept),
            ("the last ACK", fin, IN_RING, Amid, Fate::Kept),
            ("it goes on", known(Flows, 1, 2 * SECOND), IN_RING, Amid, Fate::Refreshed),
            ("its target is gone", live, GONE, Amid, Fate::Refused),
            ("and it ends", live, GONE, Ending, Fate::Refused),
            ("UDP does not mind", live, GONE, Datagram, Fate::Replaced),
            ("a SYN again", known(HalfOpen, 0, 0), IN_RING, Opening, Fate::Kept),
            ("a SYN later", known(HalfOpen, 0, 2 * SECOND), IN_RING, Opening, Fate::Refreshed),
            ("a SYN needs the ring", known(HalfOpen, 0, 0), DRAINING, Opening, Fate::Replaced),
            ("of a live flow, too", live, DRAINING, Opening, Fate::Replaced),
            ("the port is used again", fin, IN_RING, Opening, Fate::Replaced),
            ("the handshake ends", known(HalfOpen, 0, 0), IN_RING, Amid, Fate::Promoted),
            ("it is aborted", known(HalfOpen, 0, 0), IN_RING, Ending, Fate::Refreshed),
            ("seen twice", known(OnceSeen, 0, 0), IN_RING, Amid, Fate::Promoted),
            ("UDP, seen twice", known(OnceSeen, 0, 0), IN_RING, Datagram, Fate::Promoted),
            ("QUIC, seen twice", known(OnceSeen, 0, 0), IN_RING, Initial, Fate::Promoted),
            ("QUIC goes on where it began", live, DRAINING, Initial, Fate::Kept),
            ("nor does QUIC", live, GONE, Initial, Fate::Replaced),
            ("FIN, then ACK", known(OnceSeen, 1, 0), IN_RING, Amid, Fate::Kept),
            ("a SYN shows nothing", known(OnceSeen, 0, 0), IN_RING, Opening, Fate::Kept),
        ] {
            assert_eq!(super::fate(&known, flags, kind, NOW), fate, "{what}");
        }
    }

    #[test]
    fn the_choice_for_an_unknown_flow() {
        use Kind::{Amid, Datagram, Ending, Initial, Opening};
        use SlotState::{Learning, LearningTcp, Pinned, Settled};
        let rows = [
            (Settled, [1, 1, 1, 1, 1]),
            (Learning, [1, 2, 2, 2, 1]),
            (LearningTcp, [1, 2, 2, 1, 1]),
            (Pinned, [1, 1, 1, 1, 1]),
        ];
        for (state, expected) in rows {
            let slot = Slot::new(1, 2, state);
            let chosen = [Opening, Amid, Ending, Datagram, Initial].map(|kind| choice(slot, kind));
            assert_eq!(chosen, expected, "{state:?}");
        }
        assert_eq!(choice(Slot::new(1, 0, Learning), Amid), 1, "there was none before");
        assert_eq!(choice(Slot::new(0, 2, Learning), Opening), 0, "there is none now");
    }

    #[test]
    fn who_may_choose_freely() {
        use SlotState::{Learning, LearningTcp, Pinned, Settled};
        for state in [Settled, Learning, LearningTcp, Pinned] {
            let is_free = |kind| is_new(Slot::new(1, 2, state), kind);
            assert!(is_free(Kind::Opening) && is_free(Kind::Initial), "{state:?}");
            assert!(!is_free(Kind::Amid) && !is_free(Kind::Ending), "{state:?}");
            assert_eq!(is_free(Kind::Datagram), state != Learning, "{state:?}");
        }
    }

    #[test]
    fn what_is_remembered_and_where() {
        use FlowTable::{HalfOpen, OnceSeen};
        let table = |state, kind| first_table(Slot::new(1, 2, state), kind, false);
        assert_eq!(table(SlotState::Learning, Kind::Opening), Some(HalfOpen));
        assert_eq!(table(SlotState::LearningTcp, Kind::Amid), Some(OnceSeen));
        assert_eq!(table(SlotState::Learning, Kind::Datagram), Some(OnceSeen));
        assert_eq!(table(SlotState::Learning, Kind::Initial), Some(OnceSeen));
        assert_eq!(table(SlotState::Pinned, Kind::Amid), None);
        assert_eq!(table(SlotState::Settled, Kind::Opening), None);
        let tracked = |kind| first_table(Slot::settled(1), kind, true);
        assert_eq!(tracked(Kind::Opening), Some(HalfOpen));
        assert_eq!(tracked(Kind::Ending), Some(OnceSeen));
    }
}
