//! What IPv4 and IPv6 do differently. The pipeline is compiled once for each.

use crate::flow::{ICMP, ICMPV6};
use crate::verdict::DropReason;
use crate::wire::checksum::Sum;
use crate::wire::icmp::Icmp;
use crate::wire::ipv6::{Extension, FragmentHeader};
use crate::wire::{Address, Ipv4, Ipv6};

use super::Frame;

/// An IP version.
pub trait Ip: Sized {
    /// The protocol number of its ICMP.
    const ICMP: u8;
    /// The type of its ICMP's echo request.
    const ECHO_REQUEST: u8;
    /// The header without options.
    type Header: bytemuck::Pod;

    /// Reads the headers at `l3`; `None` for what is no packet of this version.
    fn parse<F: Frame>(frame: &F, l3: usize) -> Option<Parsed<Self::Header>>;

    /// Decrements TTL or hop limit, as a router does.
    ///
    /// # Errors
    /// [`DropReason::TtlExceeded`] if it is used up; [`DropReason::Malformed`] beyond the packet.
    fn rewrite<F: Frame>(
        frame: &mut F,
        l3: usize,
        header: &Self::Header,
        end: End,
        new: Address,
    ) -> Result<(), DropReason>;

    /// The hops that the packet may still go.
    fn hops(header: &Self::Header) -> u8;

    /// Corrects a transport checksum's sum for a changed address.
    fn replace_address(sum: Sum, old: Address, new: Address) -> Sum;
}

/// Which address of a packet is rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The source, of a reply.
    Source,
    /// The destination, of a request.
    Destination,
}

/// What is common to both versions' headers.
pub struct Parsed<H> {
    /// The header without options.
    pub header: H,
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Protocol of what follows all IP headers.
    pub protocol: u8,
    /// Offset of what follows all IP headers.
    pub l4: usize,
    /// Whether this is a fragment.
    pub is_fragment: bool,
    /// Whether the transport header is in this fragment.
    pub is_first: bool,
    /// Header and payload as claimed, bytes.
    pub length: usize,
}

/// IP version 4.
pub struct V4;

impl Ip for V4 {
    const ICMP: u8 = ICMP;
    const ECHO_REQUEST: u8 = Icmp::ECHO_REQUEST;
    type Header = Ipv4;

    #[inline(always)]
    fn parse<F: Frame>(frame: &F, l3: usize) -> Option<Parsed<Ipv4>> {
        let header: Ipv4 = frame.read(l3)?;
        let header_length = header.header_length();
        if header.version_ihl >> 4 != 4 || header_length < size_of::<Ipv4>() {
            return None;
        }
        let fragment = header.fragment.get();
        Some(Parsed {
            source: Address::v4(header.source),
            destination: Address::v4(header.destination),
            protocol: header.ttl.protocol,
            l4: l3 + header_length,
            is_fragment: fragment & (Ipv4::MORE_FRAGMENTS | Ipv4::FRAGMENT_OFFSET) != 0,
            is_first: fragment & Ipv4::FRAGMENT_OFFSET == 0,
            length: header.total_length.get() as usize,
            header,
        })
    }

    #[inline(always)]
    fn rewrite<F: Frame>(
        frame: &mut F,
        l3: usize,
        header: &Ipv4,
        end: End,
        new: Address,
    ) -> Result<(), DropReason> {
        let (at, old) = match end {
            End::Source => (Ipv4::SOURCE_AT, header.source),
            End::Destination => (Ipv4::DESTINATION_AT, header.destination),
        };
        let new = new.low32();
        let mut words = header.ttl;
        words.ttl = words.ttl.wrapping_sub(1);
        // The TTL shares its 16-bit word with the protocol.
        let (before, after) = (first_word(&header.ttl), first_word(&words));
        words.checksum =
            Sum::of(words.checksum).replace16(before, after).replace32(old, new).checksum();
        frame.write(l3 + Ipv4::TTL_AT, words).ok_or(DropReason::Malformed)?;
        frame.write(l3 + at, new).ok_or(DropReason::Malformed)
    }

    #[inline(always)]
    fn hops(header: &Ipv4) -> u8 {
        header.ttl.ttl
    }

    #[inline(always)]
    fn replace_address(sum: Sum, old: Address, new: Address) -> Sum {
        sum.replace32(old.low32(), new.low32())
    }
}

#[inline(always)]
fn first_word(words: &crate::wire::ipv4::TtlProtocolChecksum) -> crate::wire::Be16 {
    crate::wire::Be16::new((words.ttl as u16) << 8 | words.protocol as u16)
}

/// IP version 6.
pub struct V6;

impl V6 {
    /// Extension headers that are followed; a packet with more passes untouched.
    const EXTENSIONS: usize = 4;
}

impl Ip for V6 {
    const ICMP: u8 = ICMPV6;
    const ECHO_REQUEST: u8 = Icmp::V6_ECHO_REQUEST;
    type Header = Ipv6;

    #[inline(always)]
    fn parse<F: Frame>(frame: &F, l3: usize) -> Option<Parsed<Ipv6>> {
        let header: Ipv6 = frame.read(l3)?;
        if header.version() != 6 {
            return None;
        }
        let mut parsed = Parsed {
            source: Ipv6::address(header.source),
            destination: Ipv6::address(header.destination),
            protocol: header.next_header,
            l4: l3 + Ipv6::LENGTH,
            is_fragment: false,
            is_first: true,
            length: Ipv6::LENGTH + header.payload_length.get() as usize,
            header,
        };
        for _ in 0..Self::EXTENSIONS {
            match parsed.protocol {
                Ipv6::HOP_BY_HOP | Ipv6::ROUTING | Ipv6::DESTINATION_OPTIONS => {
                    let extension: Extension = frame.read(parsed.l4)?;
                    parsed.protocol = extension.next_header;
                    parsed.l4 += (extension.length as usize + 1) << 3;
                }
                Ipv6::FRAGMENT => {
                    let fragment: FragmentHeader = frame.read(parsed.l4)?;
                    let offset_more = fragment.offset_more.get();
                    // An "atomic" fragment is whole (RFC 6946).
                    parsed.is_fragment |= offset_more & !0x6 != 0;
                    parsed.is_first = offset_more >> 3 == 0;
                    parsed.protocol = fragment.next_header;
                    parsed.l4 += size_of::<FragmentHeader>();
                    if !parsed.is_first {
                        return Some(parsed);
                    }
                }
                _ => return Some(parsed),
            }
        }
        Some(parsed)
    }

    #[inline(always)]
    fn rewrite<F: Frame>(
        frame: &mut F,
        l3: usize,
        header: &Ipv6,
        end: End,
        new: Address,
    ) -> Result<(), DropReason> {
        let at = match end {
            End::Source => Ipv6::SOURCE_AT,
            End::Destination => Ipv6::DESTINATION_AT,
        };
        let hop_limit = header.hop_limit.wrapping_sub(1);
        frame.write(l3 + Ipv6::HOP_LIMIT_AT, hop_limit).ok_or(DropReason::Malformed)?;
        frame.write(l3 + at, new.quarters()).ok_or(DropReason::Malformed)
    }

    #[inline(always)]
    fn hops(header: &Ipv6) -> u8 {
        header.hop_limit
    }

    #[inline(always)]
    fn replace_address(sum: Sum, old: Address, new: Address) -> Sum {
        sum.replace_address(old, new)
    }
}
