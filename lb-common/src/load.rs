//! How many connections a target has: what `least_connections` chooses by.

use bytemuck::{Pod, Zeroable};

/// What a target is due among those of its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Share {
    /// Its weight, relative to those of the group; at most [`Self::MAX_WEIGHT`].
    pub weight: u32,
    /// Number of the group, which targets are compared within; 0: the hash alone chooses.
    pub group: u32,
}

impl Share {
    /// The largest weight: times a number of connections it fits in 64 bits.
    pub const MAX_WEIGHT: u32 = u32::MAX;
}

/// A target's connections, and its share.
///
/// Two sides write it, so each has words of its own: the kernel adds what it sees beginning and
/// ending, the agent looks now and then how many there are, and puts right what the kernel cannot
/// see (connections that fell silent, entries that were evicted).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Load {
    /// Connections that began less those that ended; wraps. The kernel's word.
    pub balance: u64,
    /// What is to be added for the number of live ones; wraps. The agent's word.
    pub correction: u64,
    /// The agent's word too.
    pub share: Share,
}

impl Load {
    /// Live connections.
    #[inline(always)]
    pub fn connections(&self) -> u32 {
        let sum = self.balance.wrapping_add(self.correction);
        // Below zero until the agent has counted what was there before.
        let is_negative = sum >> 63 != 0;
        if is_negative {
            0
        } else if sum > u32::MAX as u64 {
            u32::MAX
        } else {
            sum as u32
        }
    }

    /// Whether it has fewer connections relative to its weight than another of its group.
    #[inline(always)]
    pub fn is_less_than(&self, other: &Self) -> bool {
        let (ours, theirs) = (self.connections() as u64, other.connections() as u64);
        ours * (other.share.weight as u64) < theirs * (self.share.weight as u64)
    }
}

const _: () = assert!(size_of::<Load>() == 24);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn load(connections: u32, weight: u32) -> Load {
        // Split between the two words as it comes.
        let balance = u64::from(connections).wrapping_sub(1000);
        Load { balance, correction: 1000, share: Share { weight, group: 1 } }
    }

    proptest! {
        #[test]
        fn both_words_make_the_number(live: u32, seen: u64) {
            let load = Load {
                balance: seen,
                correction: u64::from(live).wrapping_sub(seen),
                ..Load::default()
            };
            prop_assert_eq!(load.connections(), live);
        }

        #[test]
        fn the_comparison_is_of_quotients(a: u32, v in 1..=u32::MAX, b: u32, w in 1..=u32::MAX) {
            // Exact: the quotients as fractions of 128 bits.
            let expected = u128::from(a) * u128::from(w) < u128::from(b) * u128::from(v);
            prop_assert_eq!(load(a, v).is_less_than(&load(b, w)), expected);
        }
    }

    #[test]
    fn fewer_relative_to_the_weight() {
        assert!(load(0, 1).is_less_than(&load(1, 1)));
        assert!(load(29, 10).is_less_than(&load(3, 1)));
        assert!(!load(30, 10).is_less_than(&load(3, 1)), "equal: the first choice stays");
        assert!(!load(0, 1).is_less_than(&load(0, 999)));
        let below_zero = Load { balance: 0_u64.wrapping_sub(5), ..load(0, 1) };
        assert_eq!(Load { correction: 0, ..below_zero }.connections(), 0);
    }
}
