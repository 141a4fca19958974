//! What a load balancer is called.

use crate::config::Scheme;

/// Longest part of a name that is the load balancer's own: AWS's limit. A label has 63 bytes at
/// most, of which `internal-` and the number take 20.
const MAX_NAME: usize = 32;

/// The first label of a load balancer's name: `NAME-NUMBER`, or `internal-NAME-NUMBER`, in lower case.
/// Of the load balancer's name only letters, digits and hyphens are left; the number tells names
/// apart that come to the same.
pub fn label(name: &str, scheme: Scheme) -> String {
    let is_plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let plain: String = name.chars().map(is_plain).take(MAX_NAME).collect();
    let prefix = match scheme {
        Scheme::Internal => "internal-",
        Scheme::InternetFacing => "",
    };
    let plain = plain.trim_matches('-');
    format!("{prefix}{plain}-{:010}", number(name)).trim_start_matches('-').to_owned()
}

/// A number that depends on the load balancer's name only, on every node and in every version: FNV-1a
/// of 32 bits (draft-eastlake-fnv).
pub fn number(name: &str) -> u32 {
    const OFFSET_BASIS: u32 = 0x811c_9dc5;
    const PRIME: u32 = 0x0100_0193;
    name.bytes().fold(OFFSET_BASIS, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Test vectors of the draft, appendix C.
    #[test]
    fn the_number_is_fnv_1a() {
        assert_eq!(number(""), 0x811c_9dc5);
        assert_eq!(number("a"), 0xe40c_292c);
        assert_eq!(number("foobar"), 0xbf9c_f968);
    }

    #[test]
    fn names_are_labels() {
        assert_eq!(label("foobar", Scheme::InternetFacing), "foobar-3214735720");
        assert_eq!(label("foobar", Scheme::Internal), "internal-foobar-3214735720");
        assert_eq!(label("Foo_Bar.x", Scheme::InternetFacing)[..10], *"foo-bar-x-");
        assert_eq!(label("☃", Scheme::InternetFacing).len(), 10);
        let long = label(&"a".repeat(100), Scheme::Internal);
        assert!(long.len() <= 63, "{long}");
        assert_ne!(long, label(&"a".repeat(99), Scheme::Internal));
    }
}
