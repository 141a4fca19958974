//! Writing new ends into an error and into the packet that it quotes.

use crate::flow::{TCP, UDP};
use crate::verdict::DropReason;
use crate::wire::checksum::Sum;
use crate::wire::icmp::Icmp;
use crate::wire::ipv4::TtlProtocolChecksum;
use crate::wire::{Address, Be16, Ipv4, Ipv6, Tcp, Udp};

use super::super::emit::udp_checksum;
use super::super::ip::{Ip, MAX_HEADERS, V4, V6};
use super::super::parse::{Packet, Ports, whole, whole_mut};
use super::super::snat::Readdress;
use super::super::{Frame, Step};

/// What the IP versions do differently about packets in ICMP errors.
pub trait Quoting: Readdress {
    /// Writes both addresses of the quoted header, and changes nothing else about it that its sender
    /// would miss. Returns the sum of the error's checksum after that.
    fn readdress_quoted<F: Frame>(
        frame: &mut F,
        at: usize,
        quoted: &Self::Header,
        ends: [Address; 2],
        sum: Sum,
    ) -> Option<Sum>;

    /// Corrects the sum of the error's checksum for another address of the error itself.
    fn replace_outer(sum: Sum, old: Address, new: Address) -> Sum;
}

/// Gives the error the ends that [`Step::quote`] says, and the packet in it the others, whose
/// checksums are updated (RFC 1624): no more of that packet need be there than its ports (RFC 792:
/// eight bytes), and its checksum may be as wrong as it was.
///
/// # Errors
/// [`DropReason::Malformed`] if a header lies about a length.
#[inline(always)]
pub fn both<I: Quoting, F: Frame>(frame: &mut F, step: &Step) -> Result<(), DropReason> {
    if write::<I, F>(frame, step) == 0 { Ok(()) } else { Err(DropReason::Malformed) }
}

/// A function of its own in the kernel too; 0 if all is well.
#[inline(never)]
fn write<I: Quoting, F: Frame>(frame: &mut F, step: &Step) -> u32 {
    if try_write::<I, F>(frame, step).is_some() { 0 } else { 1 }
}

#[inline(always)]
fn try_write<I: Quoting, F: Frame>(frame: &mut F, step: &Step) -> Option<()> {
    let quote = &step.quote;
    let packet: Packet<I> = step.place.read(frame)?;
    let icmp: Icmp = whole(frame).read(packet.l4)?;
    // The masks change nothing; they are for the verifier.
    let l3 = (quote.l3 & MAX_HEADERS as u32) as usize;
    let l4 = (quote.l4 & MAX_HEADERS as u32) as usize;
    let quoted: I::Header = whole(frame).read(l3)?;
    let (source, destination) = I::addresses(&quoted);

    let sum = Sum::of(icmp.checksum);
    let sum = I::readdress_quoted(whole_mut(frame), l3, &quoted, quote.inner, sum)?;
    let difference = I::replace_address(Sum::default(), source, quote.inner[0]);
    let difference = I::replace_address(difference, destination, quote.inner[1]);
    let is_whole = l4 + Tcp::CHECKSUM_AT + size_of::<Be16>() <= packet.l3 + packet.length;
    let at = checksum_at(step.recall.key.protocol, is_whole);
    let sum = write_transport(frame, l4, at, quote.ports, difference, sum)?;

    let [source, destination] = quote.outer;
    let sum = I::replace_outer(sum, packet.source, source);
    let sum = I::replace_outer(sum, packet.destination, destination);
    whole_mut(frame).write(packet.l4 + Icmp::CHECKSUM_AT, sum.checksum())?;
    I::readdress(whole_mut(frame), packet.l3, &packet.header, source, destination).ok()
}

/// Where in the quoted transport header the checksum is; 0 if it is not there.
#[inline(always)]
fn checksum_at(protocol: u8, is_whole: bool) -> usize {
    match protocol {
        UDP => Udp::CHECKSUM_AT,
        TCP if is_whole => Tcp::CHECKSUM_AT,
        _ => 0,
    }
}

/// Writes the quoted ports, and the checksum. `difference` is what the addresses change in that;
/// returns the sum of the error's checksum.
#[inline(always)]
fn write_transport<F: Frame>(
    frame: &mut F,
    l4: usize,
    checksum_at: usize,
    ports: Ports,
    difference: Sum,
    sum: Sum,
) -> Option<Sum> {
    let old: Ports = whole(frame).read(l4)?;
    whole_mut(frame).write(l4, ports)?;
    let replace = |sum: Sum| {
        sum.replace16(old.source, ports.source).replace16(old.destination, ports.destination)
    };
    let sum = replace(sum);
    if checksum_at == 0 {
        return Some(sum);
    }
    let before: Be16 = whole(frame).read(l4 + checksum_at)?;
    let after = replace(Sum::of(before).plus(difference));
    let is_udp = checksum_at == Udp::CHECKSUM_AT;
    let after = if is_udp { udp_checksum(before, after) } else { after.checksum() };
    whole_mut(frame).write(l4 + checksum_at, after)?;
    Some(sum.replace16(before, after))
}

impl Quoting for V4 {
    /// The header's own checksum makes up for the addresses: the error's stays.
    #[inline(always)]
    fn readdress_quoted<F: Frame>(
        frame: &mut F,
        at: usize,
        quoted: &Ipv4,
        [source, destination]: [Address; 2],
        sum: Sum,
    ) -> Option<Sum> {
        let (source, destination) = (source.low32(), destination.low32());
        let checksum = Sum::of(quoted.ttl.checksum)
            .replace32(quoted.source, source)
            .replace32(quoted.destination, destination)
            .checksum();
        frame.write(at + Ipv4::TTL_AT, TtlProtocolChecksum { checksum, ..quoted.ttl })?;
        frame.write(at + Ipv4::SOURCE_AT, [source, destination])?;
        Some(sum)
    }

    #[inline(always)]
    fn replace_outer(sum: Sum, _old: Address, _new: Address) -> Sum {
        sum
    }
}

impl Quoting for V6 {
    #[inline(always)]
    fn readdress_quoted<F: Frame>(
        frame: &mut F,
        at: usize,
        quoted: &Ipv6,
        [source, destination]: [Address; 2],
        sum: Sum,
    ) -> Option<Sum> {
        let (old_source, old_destination) = Self::addresses(quoted);
        frame.write(at + Ipv6::SOURCE_AT, source.quarters())?;
        frame.write(at + Ipv6::DESTINATION_AT, destination.quarters())?;
        Some(sum.replace_address(old_source, source).replace_address(old_destination, destination))
    }

    /// In the pseudo header (RFC 4443 section 2.3).
    #[inline(always)]
    fn replace_outer(sum: Sum, old: Address, new: Address) -> Sum {
        sum.replace_address(old, new)
    }
}
