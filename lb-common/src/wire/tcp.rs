//! TCP (RFC 9293).

use bytemuck::{Pod, Zeroable};

use super::{Be16, Be32};

/// The TCP header without options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Tcp {
    /// Source port.
    pub source: Be16,
    /// Destination port.
    pub destination: Be16,
    /// Sequence number.
    pub sequence: Be32,
    /// Acknowledgment number.
    pub acknowledgment: Be32,
    /// Header length in words of 4 bytes, in the upper 4 bits.
    pub data_offset: u8,
    /// Control bits.
    pub flags: u8,
    /// Window.
    pub window: Be16,
    /// Checksum over pseudo header, header and data.
    pub checksum: Be16,
    /// Urgent pointer.
    pub urgent: Be16,
}

impl Tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronize sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// Acknowledgment field is significant.
    pub const ACK: u8 = 0x10;

    /// Offset of [`Self::checksum`], bytes.
    pub const CHECKSUM_AT: usize = 16;

    /// Header length in bytes, 0 to 60, as the packet claims.
    #[inline(always)]
    pub fn header_length(&self) -> usize {
        ((self.data_offset >> 4) as usize) << 2
    }
}
