//! What happens to a packet, and why.

/// What the driver is told to do with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Hand it to the stack, untouched.
    Pass,
    /// Drop it; the reason has been counted.
    Drop,
    /// Send it out of the NIC it came in by.
    Transmit,
    /// Send it out of the NIC with this index.
    Redirect(u32),
}

/// Each way a packet can die here. The number is the index of its counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum DropReason {
    /// No rule of the listener's security groups admits the source.
    SecurityGroupDenied = 0,
    /// The address is the load balancer's, but nothing listens on this port.
    NoListener = 1,
    /// No target is registered for the listener's address family: answered with a TCP reset or an
    /// ICMP port unreachable where the protocol has such an answer.
    NoTarget = 2,
    /// The flow's target no longer serves: a TCP connection is reset.
    TargetDown = 3,
    /// No route, no neighbour, forwarding off, or a NIC that lb is not attached to.
    NextHopUnresolved = 4,
    /// Every target on the flow's stretch of the ring already has a connection of the same client
    /// address and port through another listener; or, with `snat`, no source port is free: answered
    /// with a TCP reset or an ICMP port unreachable.
    PortAllocationError = 5,
    /// A fragment of a balanced packet; fragments are not supported yet.
    Fragmented = 6,
    /// A header lies about a length.
    Malformed = 7,
    /// Time to live or hop limit used up.
    TtlExceeded = 8,
    /// Larger than the way out carries: a sender that forbids fragmentation, be it the client or the
    /// target, is told how large its packets may be.
    TooBig = 9,
    /// A table names an entry that another table does not have; a bug.
    TableInconsistent = 10,
    /// The driver refused to make room for a header or to cut a packet.
    NoHeadroom = 11,
}

impl DropReason {
    /// All of them, in the order of their counters.
    pub const ALL: [Self; 12] = [
        Self::SecurityGroupDenied,
        Self::NoListener,
        Self::NoTarget,
        Self::TargetDown,
        Self::NextHopUnresolved,
        Self::PortAllocationError,
        Self::Fragmented,
        Self::Malformed,
        Self::TtlExceeded,
        Self::TooBig,
        Self::TableInconsistent,
        Self::NoHeadroom,
    ];

    /// The name in `status` and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SecurityGroupDenied => "SecurityGroupDenied",
            Self::NoListener => "NoListener",
            Self::NoTarget => "NoTarget",
            Self::TargetDown => "TargetDown",
            Self::NextHopUnresolved => "NextHopUnresolved",
            Self::PortAllocationError => "PortAllocationError",
            Self::Fragmented => "Fragmented",
            Self::Malformed => "Malformed",
            Self::TtlExceeded => "TtlExceeded",
            Self::TooBig => "TooBig",
            Self::TableInconsistent => "TableInconsistent",
            Self::NoHeadroom => "NoHeadroom",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_in_counter_order() {
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }
}
