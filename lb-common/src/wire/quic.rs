//! QUIC's long header: as much of it as says that a connection begins (RFC 8999, RFC 9000).

use bytemuck::{Pod, Zeroable};

use super::Be16;

/// The beginning of a long header, which is the same in all versions (RFC 8999 section 5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct LongHeader {
    /// Header form, fixed bit and packet type.
    pub first: u8,
    /// The version.
    pub version: [u8; 4],
    /// Length of the destination connection id that follows, bytes.
    pub id_length: u8,
}

impl LongHeader {
    /// A client's first datagrams carry at least so many bytes (RFC 9000 section 14.1).
    pub const LEAST_DATAGRAM: u16 = 1200;
    /// Header form and fixed bit, and the two bits of the packet type.
    const KIND: u8 = 0xf0;
    /// Version 1 (RFC 9000 section 17.2.2), and its Initial packet.
    const V1: ([u8; 4], u8) = ([0, 0, 0, 1], 0xc0);
    /// Version 2 (RFC 9369 section 3.2), and its Initial packet.
    const V2: ([u8; 4], u8) = ([0x6b, 0x33, 0x43, 0xcf], 0xd0);
    /// Lengths of a connection id that a client may choose (RFC 9000 section 7.2).
    const ID_LENGTHS: [u8; 2] = [8, 20];

    /// Whether a datagram (UDP's length, header included) that begins with this is a client's
    /// Initial packet, with which a connection begins.
    #[inline(always)]
    pub fn is_initial(&self, length: Be16) -> bool {
        let kind = (self.version, self.first & Self::KIND);
        let [least, most] = Self::ID_LENGTHS;
        (kind == Self::V1 || kind == Self::V2)
            && self.id_length >= least
            && self.id_length <= most
            && length.get() >= Self::LEAST_DATAGRAM + size_of::<super::Udp>() as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The client's Initial of RFC 9001 appendix A.2, protected: its first bytes, and its length.
    #[test]
    fn the_example_of_rfc_9001() {
        let header = LongHeader { first: 0xc0, version: [0, 0, 0, 1], id_length: 8 };
        assert!(header.is_initial(Be16::new(8 + 1200)));
        assert!(!header.is_initial(Be16::new(8 + 1199)), "a server does not accept it");
    }

    /// The client's Initial of RFC 9369 appendix A.2.
    #[test]
    fn version_2_has_other_numbers() {
        let version = [0x6b, 0x33, 0x43, 0xcf];
        let header = |first| LongHeader { first, version, id_length: 8 };
        let length = Be16::new(8 + 1200);
        assert!(header(0xd7).is_initial(length));
        assert!(!header(0xc7).is_initial(length), "Retry, in version 2");
    }

    #[test]
    fn what_is_no_initial() {
        let initial = LongHeader { first: 0xc3, version: [0, 0, 0, 1], id_length: 8 };
        for (what, header) in [
            ("a short header", LongHeader { first: 0x43, ..initial }),
            ("no fixed bit", LongHeader { first: 0x83, ..initial }),
            ("0-RTT", LongHeader { first: 0xd3, ..initial }),
            ("Handshake", LongHeader { first: 0xe3, ..initial }),
            ("version negotiation", LongHeader { version: [0; 4], ..initial }),
            ("a version that nobody knows", LongHeader { version: [0, 0, 0, 9], ..initial }),
            ("a server's, to a client without an id", LongHeader { id_length: 0, ..initial }),
            ("longer than an id can be", LongHeader { id_length: 21, ..initial }),
        ] {
            assert!(!header.is_initial(Be16::new(1300)), "{what}");
        }
    }
}
