//! The picture of the machine's network that the owner of the state gets.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

/// The machine's network at one moment. Two equal pictures are the same to the data plane.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Network {
    /// Every link of the network namespace, by interface index.
    pub interfaces: BTreeMap<u32, Interface>,
    /// Every local address, with where it is; one address may be on several interfaces.
    pub addresses: BTreeMap<IpAddr, BTreeSet<LocalAddress>>,
    /// The wanted destinations: how a frame to each leaves, or why none can.
    pub next_hops: BTreeMap<IpAddr, Result<NextHop, Unresolved>>,
}

impl Network {
    /// The interface of this name, if there is one.
    #[must_use]
    pub fn interface_named(&self, name: &str) -> Option<&Interface> {
        self.interfaces.values().find(|interface| interface.name == name)
    }
}

/// A link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Interface index; never reused for another link while this one lives.
    pub index: u32,
    /// Name, such as `eth0`.
    pub name: String,
    /// What kind of frames it carries.
    pub layer: LinkLayer,
    /// Hardware address; zeros where it has none.
    pub mac: [u8; 6],
    /// Largest packet in bytes, without the Ethernet header.
    pub mtu: u32,
    /// Administratively up and with a carrier.
    pub up: bool,
    /// Set for a VLAN device: what it is a part of.
    pub vlan: Option<Vlan>,
    /// The bridge, bond or other device that it is a port of, by index.
    pub controller: Option<u32>,
    /// Of a VLAN device, `macvlan` or `macvtap`: the device that its frames come and go by, by index.
    pub lower: Option<u32>,
    /// The XDP program on it, if any. Attaching through a BPF link sends no notification, so read
    /// this with [`read_interfaces`](super::read_interfaces) when it has to be of this moment.
    pub xdp: Option<XdpAttachment>,
}

/// What kind of frames a link carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkLayer {
    /// Ethernet: the only one that frames can be forwarded over.
    Ethernet,
    /// The loopback device.
    Loopback,
    /// Anything else, such as a layer 3 tunnel.
    Other,
}

/// What makes a link a VLAN device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vlan {
    /// Interface index of the device that carries the tagged frames.
    pub parent: u32,
    /// VLAN identifier, 1 to 4094.
    pub id: u16,
    /// Tagged as IEEE 802.1ad (service tag), not as 802.1Q.
    pub service_tag: bool,
}

/// An XDP program on a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XdpAttachment {
    /// Where it runs. Of several programs the one that sees a frame first is named.
    pub mode: XdpAttachmentMode,
    /// The kernel's identifier of the program.
    pub program_id: u32,
}

/// Where an XDP program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XdpAttachmentMode {
    /// In the driver (`xdp` in `ip link`).
    Native,
    /// In the network stack (`xdpgeneric`).
    Generic,
    /// On the NIC (`xdpoffload`).
    Offload,
}

/// Where a local address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LocalAddress {
    /// Interface index.
    pub ifindex: u32,
    /// Length of its subnet's prefix in bits: up to 32 for IPv4, 128 for IPv6.
    pub prefix_len: u8,
}

/// How a frame to a destination leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextHop {
    /// Interface index of the device that the frame leaves by: the parent of a VLAN device.
    pub ifindex: u32,
    /// VLAN identifier to tag the frame with.
    pub vlan: Option<u16>,
    /// Hardware address to send from.
    pub source_mac: [u8; 6],
    /// Hardware address of the destination, or of the gateway to it.
    pub destination_mac: [u8; 6],
    /// Largest packet in bytes on this path, as far as this machine knows.
    pub mtu: u16,
    /// The address that this machine's own packets to the destination have.
    pub source: Option<IpAddr>,
}

/// Why a destination has no [`NextHop`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unresolved {
    /// No route leads there (or one that refuses).
    NoRoute,
    /// It is an address of this machine.
    Local,
    /// The route's device is down or has no carrier.
    LinkDown {
        /// Interface index of that device.
        ifindex: u32,
    },
    /// The destination, or the gateway to it, does not answer ARP or neighbour discovery.
    NoNeighbour {
        /// Who does not answer.
        address: IpAddr,
        /// Interface index of the device it was asked for on.
        ifindex: u32,
    },
    /// The route's device carries no Ethernet frames, or ones with a service tag or two tags.
    UnsupportedLink {
        /// Interface index of that device.
        ifindex: u32,
    },
}

impl fmt::Display for Unresolved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRoute => f.write_str("no route"),
            Self::Local => f.write_str("an address of this machine"),
            Self::LinkDown { ifindex } => write!(f, "interface {ifindex} is down"),
            Self::NoNeighbour { address, ifindex } => {
                let protocol = if address.is_ipv4() { "ARP" } else { "neighbour discovery" };
                write!(f, "{address} does not answer {protocol} on interface {ifindex}")
            }
            Self::UnsupportedLink { ifindex } => {
                write!(f, "interface {ifindex} carries no plain or once-tagged Ethernet frames")
            }
        }
    }
}
