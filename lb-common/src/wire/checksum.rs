//! The Internet checksum, computed (RFC 1071) and updated (RFC 1624).
//!
//! A router that rewrites a field must not compute the checksum anew: that would hide corruption
//! that happened before it, and would break a partial checksum, which an endpoint leaves to
//! hardware. It corrects the old one by the difference, RFC 1624 equation 3:
//!
//! ```text
//! HC' = ~(~HC + ~m + m')
//! ```
//!
//! Sums are over words as they lie in memory: the result is right in either byte order
//! (RFC 1071 section 2 B), so nothing is swapped.

use super::{Address, Be16, Be32};

/// A sum of 16-bit words in ones' complement, not yet folded.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum(u64);

impl Sum {
    /// The sum behind a checksum that is to be updated.
    #[inline(always)]
    pub fn of(checksum: Be16) -> Self {
        Self((!checksum.raw()) as u64)
    }

    /// Adds a 16-bit word.
    #[inline(always)]
    pub fn add16(self, word: Be16) -> Self {
        Self(self.0 + word.raw() as u64)
    }

    /// Adds two 16-bit words at once: 2^16 is 1 in ones' complement.
    #[inline(always)]
    pub fn add32(self, words: u32) -> Self {
        Self(self.0 + words as u64)
    }

    /// Replaces a 16-bit word.
    #[inline(always)]
    pub fn replace16(self, old: Be16, new: Be16) -> Self {
        Self(self.0 + (!old.raw()) as u64 + new.raw() as u64)
    }

    /// Replaces two 16-bit words.
    #[inline(always)]
    pub fn replace32(self, old: Be32, new: Be32) -> Self {
        self.add32(!old.raw()).add32(new.raw())
    }

    /// Adds another sum.
    #[inline(always)]
    pub fn plus(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// Takes one from the upper byte of a 16-bit word: a hop from an IPv4 header (RFC 1141).
    #[inline(always)]
    pub fn decrement_upper(self) -> Self {
        // ~m + m' is the same for every m.
        self.add16(Be16::new(!0x0100))
    }

    /// Replaces an address by one of its family.
    #[inline(always)]
    pub fn replace_address(self, old: Address, new: Address) -> Self {
        let ([a, b, c, d], [e, f, g, h]) = (old.quarters(), new.quarters());
        self.add32(!a).add32(!b).add32(!c).add32(!d).add32(e).add32(f).add32(g).add32(h)
    }

    /// The checksum.
    #[inline(always)]
    pub fn checksum(self) -> Be16 {
        // Enough for less than 2^15 pairs of words.
        let sum = (self.0 >> 16) + (self.0 & 0xffff);
        let sum = (sum >> 16) + (sum & 0xffff);
        let sum = (sum >> 16) + (sum & 0xffff);
        Be16::from_raw(!(sum as u16))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The checksum as RFC 1071 section 4.1 computes it.
    fn reference(words: &[u16]) -> u16 {
        let mut sum = words.iter().map(|word| u32::from(*word)).sum::<u32>();
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    fn sum(words: &[u16]) -> Be16 {
        words.iter().fold(Sum::default(), |sum, word| sum.add16(Be16::new(*word))).checksum()
    }

    /// RFC 1624 section 4: the example that equation 2 of RFC 1141 gets wrong.
    #[test]
    fn rfc1624_example() {
        let updated = Sum::of(Be16::new(0xdd2f)).replace16(Be16::new(0x5555), Be16::new(0x3285));
        assert_eq!(updated.checksum().get(), 0x0000);
    }

    proptest! {
        #[test]
        fn sums_like_rfc1071(words in prop::collection::vec(any::<u16>(), 1..64)) {
            prop_assert_eq!(sum(&words).get(), reference(&words));
        }

        #[test]
        fn updating_is_computing_anew(
            mut words in prop::collection::vec(any::<u16>(), 3..40), at in any::<prop::sample::Index>(),
            new in any::<[u16; 2]>(),
        ) {
            let at = at.index(words.len() - 2);
            // A header is never all zero, where ones' complement has two zeroes.
            words.push(0x4500);
            let old = Be32::new((words[at] as u32) << 16 | words[at + 1] as u32);
            let new32 = Be32::new((new[0] as u32) << 16 | new[1] as u32);
            let updated = Sum::of(sum(&words)).replace32(old, new32).checksum();
            words[at..at + 2].copy_from_slice(&new);
            prop_assert_eq!(updated.get(), reference(&words));
        }
    }
}
