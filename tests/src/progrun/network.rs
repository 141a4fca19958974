//! The network that program runs happen in.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use crate::netns::Namespace;

/// A gateway: where packets to its prefix go.
#[derive(Clone, Copy, Debug)]
struct Gateway {
    /// The first 24 bits (IPv4) or 64 bits (IPv6) are the prefix.
    network: IpAddr,
    /// The device that the route names.
    device: u32,
}

/// A network namespace whose routes and neighbours are known without asking the kernel.
///
/// There are four devices, `lb10` to `lb13`, named by their indices. Device `d` is on 10.0.d.0/24
/// and fd00:d::/64 as host 2, its MAC address ends in `d`; host 1 is a gateway, whose MAC address
/// ends in `d`, 1. Behind the gateway are 192.0.d.0/24 and 2001:db8:d::/64.
#[derive(Debug)]
pub struct Network {
    namespace: Namespace,
    gateways: Vec<Gateway>,
}

/// Indices of the devices of a [`Network`].
pub const DEVICES: [u32; 4] = [10, 11, 12, 13];

/// The MAC address of a device.
pub fn device_mac(device: u32) -> [u8; 6] {
    [2, 0, 0, 0, 0, device as u8]
}

/// The MAC address of the gateway on a device's segment.
pub fn gateway_mac(device: u32) -> [u8; 6] {
    [2, 0, 0, 0, device as u8, 1]
}

impl Network {
    /// Makes it.
    ///
    /// # Errors
    ///
    /// As for [`Namespace::new`].
    pub fn new() -> Result<Self> {
        let namespace = Namespace::new("progrun")?;
        namespace.sysctl("net/ipv4/ip_forward", "1")?;
        namespace.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        let mut batch = String::new();
        let mut gateways = Vec::new();
        for d in DEVICES {
            let mac = |[a, b, c, d, e, f]: [u8; 6]| {
                format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
            };
            let (own, gateway) = (mac(device_mac(d)), mac(gateway_mac(d)));
            batch += &format!(
                "link add lb{d} index {d} address {own} type veth peer name peer{d}\n\
                 link set lb{d} up\n\
                 link set peer{d} up\n\
                 addr add 10.0.{d}.2/24 dev lb{d}\n\
                 addr add fd00:{d}::2/64 dev lb{d} nodad\n\
                 neigh add 10.0.{d}.1 lladdr {gateway} nud permanent dev lb{d}\n\
                 neigh add fd00:{d}::1 lladdr {gateway} nud permanent dev lb{d}\n\
                 route add 192.0.{d}.0/24 via 10.0.{d}.1\n\
                 route add 2001:db8:{d}::/64 via fd00:{d}::1\n"
            );
            // iproute2 reads the number as hexadecimal digits in an IPv6 address.
            let hex = u16::from_str_radix(&d.to_string(), 16)?;
            gateways.push(Gateway { network: Ipv4Addr::new(192, 0, d as u8, 0).into(), device: d });
            let network = Ipv6Addr::new(0x2001, 0xdb8, hex, 0, 0, 0, 0, 0);
            gateways.push(Gateway { network: network.into(), device: d });
            gateways.push(Gateway { network: Ipv4Addr::new(10, 0, d as u8, 1).into(), device: d });
            let host = Ipv6Addr::new(0xfd00, hex, 0, 0, 0, 0, 0, 1);
            gateways.push(Gateway { network: host.into(), device: d });
        }
        namespace.ip(&batch)?;
        Ok(Self { namespace, gateways })
    }

    /// Runs `f` inside.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.namespace.run(f)
    }

    /// Adds to it by commands of `ip`, one a line; a [`World`] knows nothing of that.
    ///
    /// # Errors
    ///
    /// With what `ip` said.
    pub fn ip(&self, batch: &str) -> Result<()> {
        self.namespace.ip(batch)
    }

    /// The device by which packets to `address` leave, if the kernel has a way.
    pub(super) fn device_to(&self, address: IpAddr) -> Option<u32> {
        self.gateways.iter().find(|gateway| gateway.leads_to(address)).map(|gateway| gateway.device)
    }
}

impl Gateway {
    fn leads_to(&self, address: IpAddr) -> bool {
        match (self.network, address) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let bits = if network.octets()[3] == 0 { 8 } else { 0 };
                network.to_bits() >> bits == address.to_bits() >> bits
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                let bits = if network.segments()[7] == 0 { 64 } else { 0 };
                network.to_bits() >> bits == address.to_bits() >> bits
            }
            _ => false,
        }
    }
}
