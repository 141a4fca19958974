//! What IPv4 and IPv6 do differently. The pipeline is compiled once for each.

use crate::flow::{ICMP, ICMPV6};
use crate::tunnel::Tunnel;
use crate::verdict::DropReason;
use crate::wire::checksum::Sum;
use crate::wire::icmp::Icmp;
use crate::wire::ipv6::{Extension, FragmentHeader};
use crate::wire::{Address, EtherType, Ethernet, Ipv4, Ipv6};

use super::Frame;
use super::parse::whole;

/// An IP version.
pub trait Ip: Sized {
    /// The protocol number of its ICMP.
    const ICMP: u8;
    /// The type of its ICMP's echo request.
    const ECHO_REQUEST: u8;
    /// The type of its echo reply.
    const ECHO_REPLY: u8;
    /// Whether a message of its ICMP reports an error and quotes the packet that it is about.
    fn is_error(kind: u8) -> bool;
    /// The header without options.
    type Header: bytemuck::Pod;

    /// Its EtherType.
    const ETHER_TYPE: EtherType;
    /// Whether it is version 4.
    const IS_V4: bool;
    /// Where in [`Parsed::fragment`] the offset is: 0 in a first fragment.
    const FRAGMENT_OFFSET: u16;

    /// Whether the transport header of an untagged frame is where it mostly is.
    fn is_plain<F: Frame>(frame: &F) -> bool;

    /// Reads the headers at `l3`; `None` for what is no packet of this version, or not of the shape.
    fn parse<const SHAPE: bool, F: Frame>(frame: &F, l3: usize) -> Option<Parsed<Self::Header>>;

    /// Replaces an address and decrements TTL or hop limit, as a router does. `difference` is what
    /// the address changes in a checksum's sum.
    ///
    /// # Errors
    /// [`DropReason::Malformed`] beyond the packet.
    fn rewrite<F: Frame>(
        frame: &mut F,
        l3: usize,
        header: &Self::Header,
        end: End,
        new: Address,
        difference: Sum,
    ) -> Result<(), DropReason>;

    /// Takes a hop off the packet's life, and changes nothing else.
    fn age<F: Frame>(frame: &mut F, l3: usize, header: &Self::Header) -> Option<()>;

    /// The number by which an IP header says that one of this version follows.
    const IN_IP: u8;

    /// Type of service (RFC 2474, RFC 3168) or traffic class.
    fn traffic_class(header: &Self::Header) -> u8;

    /// Whether a router may cut the packet up.
    fn may_be_fragmented(header: &Self::Header) -> bool;

    /// The hops that the packet may still go.
    fn hops(header: &Self::Header) -> u8;

    /// Source and destination.
    fn addresses(header: &Self::Header) -> (Address, Address);

    /// Header and payload as claimed, bytes.
    fn length(header: &Self::Header) -> usize;

    /// Corrects a transport checksum's sum for a changed address.
    fn replace_address(sum: Sum, old: Address, new: Address) -> Sum;
}

/// Shape of a packet: without VLAN tags, IP options or extension headers, so that all offsets are
/// constants.
pub const PLAIN: bool = true;
/// Any shape.
pub const ANY: bool = false;

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
    /// Protocol of what follows all IP headers.
    pub protocol: u8,
    /// Offset of what follows all IP headers.
    pub l4: usize,
    /// Not 0 in a fragment. No boolean: the verifier would follow either of its values to the end.
    pub fragment: u16,
    /// Whether the transport header is in this fragment.
    pub is_first: bool,
}

/// IP version 4.
pub struct V4;

const SOURCE_AFTER_TTL: usize = Ipv4::SOURCE_AT - Ipv4::TTL_AT;
const DESTINATION_AFTER_TTL: usize = Ipv4::DESTINATION_AT - Ipv4::TTL_AT;

impl Ip for V4 {
    const ICMP: u8 = ICMP;
    const ECHO_REQUEST: u8 = Icmp::ECHO_REQUEST;
    const ECHO_REPLY: u8 = Icmp::ECHO_REPLY;
    type Header = Ipv4;

    /// Destination unreachable, time exceeded, parameter problem (RFC 792).
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        matches!(kind, 3 | 11 | 12)
    }

    const ETHER_TYPE: EtherType = EtherType::IPV4;
    const IS_V4: bool = true;
    const FRAGMENT_OFFSET: u16 = Ipv4::FRAGMENT_OFFSET;

    #[inline(always)]
    fn is_plain<F: Frame>(frame: &F) -> bool {
        frame.read::<u8>(size_of::<Ethernet>()) == Some(PLAIN_VERSION_IHL)
    }

    #[inline(always)]
    fn parse<const SHAPE: bool, F: Frame>(frame: &F, l3: usize) -> Option<Parsed<Ipv4>> {
        let header: Ipv4 = frame.read(l3)?;
        // Known already. So that the compiler knows the length too.
        if SHAPE == PLAIN && header.version_ihl != PLAIN_VERSION_IHL {
            return None;
        }
        let header_length = header.header_length();
        if header.version_ihl >> 4 != 4 || header_length < size_of::<Ipv4>() {
            return None;
        }
        let fragment = header.fragment.get();
        Some(Parsed {
            protocol: header.ttl.protocol,
            l4: l3 + header_length,
            fragment: fragment & (Ipv4::MORE_FRAGMENTS | Ipv4::FRAGMENT_OFFSET),
            is_first: fragment & Ipv4::FRAGMENT_OFFSET == 0,
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
        difference: Sum,
    ) -> Result<(), DropReason> {
        let mut ttl = header.ttl;
        ttl.ttl = ttl.ttl.wrapping_sub(1);
        ttl.checksum = Sum::of(ttl.checksum).decrement_upper().plus(difference).checksum();
        let at = l3 + Ipv4::TTL_AT;
        let new = new.low32();
        let written = match end {
            End::Source => frame.write_pair::<SOURCE_AFTER_TTL, _, _>(at, ttl, new),
            End::Destination => frame.write_pair::<DESTINATION_AFTER_TTL, _, _>(at, ttl, new),
        };
        written.ok_or(DropReason::Malformed)
    }

    #[inline(always)]
    fn age<F: Frame>(frame: &mut F, l3: usize, header: &Ipv4) -> Option<()> {
        let mut ttl = header.ttl;
        ttl.ttl = ttl.ttl.wrapping_sub(1);
        ttl.checksum = Sum::of(ttl.checksum).decrement_upper().checksum();
        frame.write(l3 + Ipv4::TTL_AT, ttl)
    }

    const IN_IP: u8 = Tunnel::IPV4;

    #[inline(always)]
    fn traffic_class(header: &Ipv4) -> u8 {
        header.tos
    }

    #[inline(always)]
    fn may_be_fragmented(header: &Ipv4) -> bool {
        header.fragment.get() & Ipv4::DONT_FRAGMENT == 0
    }

    #[inline(always)]
    fn hops(header: &Ipv4) -> u8 {
        header.ttl.ttl
    }

    #[inline(always)]
    fn addresses(header: &Ipv4) -> (Address, Address) {
        (Address::v4(header.source), Address::v4(header.destination))
    }

    #[inline(always)]
    fn length(header: &Ipv4) -> usize {
        header.total_length.get() as usize
    }

    #[inline(always)]
    fn replace_address(sum: Sum, old: Address, new: Address) -> Sum {
        sum.replace32(old.low32(), new.low32())
    }
}

/// First byte of a header without options.
const PLAIN_VERSION_IHL: u8 = 0x45;

/// IP version 6.
pub struct V6;

const SOURCE_AFTER_HOPS: usize = Ipv6::SOURCE_AT - Ipv6::HOP_LIMIT_AT;
const DESTINATION_AFTER_HOPS: usize = Ipv6::DESTINATION_AT - Ipv6::HOP_LIMIT_AT;

/// What follows IPv6's extension headers. In half words, which the verifier does not track in
/// memory: so it looks at what comes after the extension headers once, not once for every way
/// through them.
#[derive(Clone, Copy)]
struct Upper {
    l4: u16,
    fragment: u16,
    protocol: u8,
    is_first: u8,
}

/// Extension headers that are followed; a packet with more passes untouched.
const EXTENSIONS: usize = 4;
/// Where the transport header may begin at most, as a mask.
pub const MAX_HEADERS: u16 = 0xfff;

/// A function of its own in the kernel too. Without a protocol: nothing that we know of.
#[inline(never)]
fn skip_extensions<F: Frame>(frame: &F, l3: usize, upper: &mut Upper) {
    if let Some(found) = walk_extensions(whole(frame), l3) {
        *upper = found;
    }
}

#[inline(always)]
fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        Ipv6::HOP_BY_HOP | Ipv6::ROUTING | Ipv6::DESTINATION_OPTIONS | Ipv6::FRAGMENT
    )
}

#[inline(always)]
fn walk_extensions<F: Frame>(frame: &F, l3: usize) -> Option<Upper> {
    let header: Ipv6 = frame.read(l3)?;
    let mut protocol = header.next_header;
    let mut l4 = l3 + Ipv6::LENGTH;
    let mut fragment = 0;
    for _ in 0..EXTENSIONS {
        match protocol {
            Ipv6::HOP_BY_HOP | Ipv6::ROUTING | Ipv6::DESTINATION_OPTIONS => {
                let extension: Extension = frame.read(l4)?;
                protocol = extension.next_header;
                l4 += (extension.length as usize + 1) << 3;
            }
            Ipv6::FRAGMENT => {
                let header: FragmentHeader = frame.read(l4)?;
                // An "atomic" fragment is whole (RFC 6946).
                fragment |= header.offset_more.get() & !0x6;
                protocol = header.next_header;
                l4 += size_of::<FragmentHeader>();
                if fragment >> 3 != 0 {
                    break;
                }
            }
            _ => break,
        }
    }
    let is_first = (fragment >> 3 == 0) as u8;
    (l4 <= MAX_HEADERS as usize).then_some(Upper { l4: l4 as u16, fragment, protocol, is_first })
}

impl Ip for V6 {
    const ICMP: u8 = ICMPV6;
    const ECHO_REQUEST: u8 = Icmp::V6_ECHO_REQUEST;
    const ECHO_REPLY: u8 = Icmp::V6_ECHO_REPLY;
    type Header = Ipv6;

    /// Destination unreachable, packet too big, time exceeded, parameter problem (RFC 4443).
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        matches!(kind, 1..=4)
    }

    const ETHER_TYPE: EtherType = EtherType::IPV6;
    const IS_V4: bool = false;
    const FRAGMENT_OFFSET: u16 = FragmentHeader::OFFSET;

    #[inline(always)]
    fn is_plain<F: Frame>(frame: &F) -> bool {
        let next_header = frame.read::<u8>(size_of::<Ethernet>() + Ipv6::NEXT_HEADER_AT);
        next_header.is_some_and(|protocol| !is_extension(protocol))
    }

    #[inline(always)]
    fn parse<const SHAPE: bool, F: Frame>(frame: &F, l3: usize) -> Option<Parsed<Ipv6>> {
        let header: Ipv6 = frame.read(l3)?;
        let (source, destination) = Self::addresses(&header);
        // IPv4 addresses in an IPv6 header are not for the wire (RFC 4942 section 2.2): here they
        // would be admitted by the rules of the other family, or find its listeners.
        if header.version() != 6 || source.is_v4() || destination.is_v4() {
            return None;
        }
        let l4 = (l3 + Ipv6::LENGTH) as u16;
        let mut upper = Upper { l4, fragment: 0, protocol: header.next_header, is_first: 1 };
        if SHAPE == ANY && is_extension(header.next_header) {
            skip_extensions(frame, l3, &mut upper);
        }
        Some(Parsed {
            protocol: upper.protocol,
            l4: (upper.l4 & MAX_HEADERS) as usize,
            fragment: upper.fragment,
            is_first: upper.is_first != 0,
            header,
        })
    }

    #[inline(always)]
    fn rewrite<F: Frame>(
        frame: &mut F,
        l3: usize,
        header: &Ipv6,
        end: End,
        new: Address,
        _difference: Sum,
    ) -> Result<(), DropReason> {
        let hop_limit = header.hop_limit.wrapping_sub(1);
        let at = l3 + Ipv6::HOP_LIMIT_AT;
        let new = new.quarters();
        let written = match end {
            End::Source => frame.write_pair::<SOURCE_AFTER_HOPS, _, _>(at, hop_limit, new),
            End::Destination => {
                frame.write_pair::<DESTINATION_AFTER_HOPS, _, _>(at, hop_limit, new)
            }
        };
        written.ok_or(DropReason::Malformed)
    }

    #[inline(always)]
    fn age<F: Frame>(frame: &mut F, l3: usize, header: &Ipv6) -> Option<()> {
        frame.write(l3 + Ipv6::HOP_LIMIT_AT, header.hop_limit.wrapping_sub(1))
    }

    const IN_IP: u8 = Tunnel::IPV6;

    #[inline(always)]
    fn traffic_class(header: &Ipv6) -> u8 {
        (header.version_class_label.get() >> 20) as u8
    }

    #[inline(always)]
    fn may_be_fragmented(_header: &Ipv6) -> bool {
        false
    }

    #[inline(always)]
    fn hops(header: &Ipv6) -> u8 {
        header.hop_limit
    }

    #[inline(always)]
    fn addresses(header: &Ipv6) -> (Address, Address) {
        (Ipv6::address(header.source), Ipv6::address(header.destination))
    }

    #[inline(always)]
    fn length(header: &Ipv6) -> usize {
        Ipv6::LENGTH + header.payload_length.get() as usize
    }

    #[inline(always)]
    fn replace_address(sum: Sum, old: Address, new: Address) -> Sum {
        sum.replace_address(old, new)
    }
}
