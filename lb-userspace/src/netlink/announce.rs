//! Announcing an address on a segment, so that nobody goes on sending to where it was before:
//! gratuitous ARP (RFC 5227, section 2.3) and unsolicited neighbour advertisements (RFC 4861,
//! section 7.2.6).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::libc;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike as _, sendto, socket,
};
use tokio::time::sleep;

/// Announcements get lost like any packet, and some switches are slow to open a port.
const REPETITIONS: usize = 3;
const INTERVAL: Duration = Duration::from_secs(1);

const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_ARP: u16 = 0x0806;
const ICMPV6: u8 = 58;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Sends announcements in the network namespace that it was made in.
#[derive(Debug, Clone)]
pub(super) struct Announcer {
    socket: Arc<OwnedFd>,
}

impl Announcer {
    pub(super) fn new() -> io::Result<Self> {
        // Without a protocol the socket sends and receives nothing.
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Self { socket: Arc::new(socket) })
    }

    /// Announces `address`, which `mac` on the interface `ifindex` answers for, a few times.
    pub(super) async fn announce(self, ifindex: u32, mac: [u8; 6], address: IpAddr) {
        let (ethertype, frame) = match address {
            IpAddr::V4(v4) => (ETHERTYPE_ARP, gratuitous_arp(mac, v4)),
            IpAddr::V6(v6) => (ETHERTYPE_IPV6, unsolicited_advertisement(mac, v6)),
        };
        for repetition in 0..REPETITIONS {
            if repetition > 0 {
                sleep(INTERVAL).await;
            }
            if let Err(error) = self.send(ifindex, ethertype, &frame) {
                tracing::debug!(%address, ifindex, %error, "announcing an address failed");
            }
        }
    }

    fn send(&self, ifindex: u32, ethertype: u16, frame: &[u8]) -> io::Result<()> {
        let to = link_address(ifindex, ethertype)?;
        sendto(self.socket.as_raw_fd(), frame, &to, MsgFlags::MSG_DONTWAIT)?;
        Ok(())
    }
}

fn link_address(ifindex: u32, ethertype: u16) -> io::Result<LinkAddr> {
    let raw = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as libc::sa_family_t,
        sll_protocol: ethertype.to_be(),
        sll_ifindex: i32::try_from(ifindex).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: `raw` is a whole `sockaddr_ll` of the family that LinkAddr checks for; it is copied.
    let address = unsafe { LinkAddr::from_raw((&raw const raw).cast(), Some(length)) };
    address.ok_or_else(|| io::Error::other("not a link-layer address"))
}

/// An ARP request for the own address: sender and target are the same.
fn gratuitous_arp(mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet_header([0xff; 6], mac, ETHERTYPE_ARP);
    // Ethernet, IPv4, address lengths 6 and 4, request.
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend([0; 6]);
    frame.extend(address.octets());
    frame
}

/// A neighbour advertisement to all nodes with the override flag.
fn unsolicited_advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    const OVERRIDE: u8 = 0x20;
    const TARGET_LINK_LAYER_ADDRESS: u8 = 2;
    let mut message = vec![136, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend(address.octets());
    message.extend([TARGET_LINK_LAYER_ADDRESS, 1]);
    message.extend(mac);
    let length = message.len() as u8;

    let mut pseudo_header = Vec::from(address.octets());
    pseudo_header.extend(ALL_NODES.octets());
    pseudo_header.extend([0, 0, 0, length, 0, 0, 0, ICMPV6]);
    let checksum = internet_checksum(&[&pseudo_header, &message]);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = ethernet_header([0x33, 0x33, 0, 0, 0, 1], mac, ETHERTYPE_IPV6);
    // Receivers drop advertisements whose hop limit is not 255.
    frame.extend([0x60, 0, 0, 0, 0, length, ICMPV6, 255]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

fn ethernet_header(destination: [u8; 6], source: [u8; 6], ethertype: u16) -> Vec<u8> {
    [&destination[..], &source[..], &ethertype.to_be_bytes()[..]].concat()
}

/// RFC 1071, over parts of even length.
fn internet_checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks_exact(2));
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    #[test]
    fn gratuitous_arp_asks_for_its_own_address() {
        let frame = gratuitous_arp(MAC, Ipv4Addr::new(10, 0, 0, 100));
        assert_eq!(
            frame,
            [
                255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 8, 6, // Ethernet
                0, 1, 8, 0, 6, 4, 0, 1, // request
                2, 0, 0, 0, 0, 1, 10, 0, 0, 100, // sender
                0, 0, 0, 0, 0, 0, 10, 0, 0, 100, // target
            ]
        );
    }

    #[test]
    fn the_advertisement_has_the_override_flag_and_a_right_checksum() {
        let address: Ipv6Addr = "2001:db8::100".parse().unwrap();
        let frame = unsolicited_advertisement(MAC, address);
        assert_eq!(frame.len(), 14 + 40 + 32);
        let (header, message) = frame[14..].split_at(40);
        assert_eq!(header[7], 255, "hop limit");
        assert_eq!(&message[4..8], [0x20, 0, 0, 0]);
        assert_eq!(&message[8..24], address.octets());
        assert_eq!(&message[24..], [2, 1, 2, 0, 0, 0, 0, 1]);
        // The sum over a message with a right checksum is all ones, its complement zero.
        let pseudo_header = [&header[8..40], &[0, 0, 0, 32, 0, 0, 0, 58][..]].concat();
        assert_eq!(internet_checksum(&[&pseudo_header, message]), 0);
        assert_ne!(&message[2..4], [0, 0]);
    }
}
