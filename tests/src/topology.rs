//! The networks that the system tests run in.
//!
//! ```text
//! OneNic, Dsr
//!   client ── router ── switch ── balancer (eth0)
//!   10.0.1.10   10.0.1.1   │      10.0.2.1
//!               10.0.2.254 ├──── target 0  10.0.2.11
//!                          └──── target 1  10.0.2.12 ...
//!
//! TwoNics
//!   client ──── (eth0) balancer (eth1) ── switch ── target 0  10.0.2.11
//!   10.0.1.10   10.0.1.1       10.0.2.1     └────── target 1  10.0.2.12 ...
//! ```
//!
//! Every host has an IPv6 address of the same digits: 10.0.2.11 is also fd00:2::11. Every machine
//! is a namespace of its own, the switch is one with a bridge in it.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::Result;

use crate::{
    netns::{Namespace, link},
    programs::{Attached, Floor},
};

/// The network of the clients: 10.0.1.0/24 and fd00:1::/64.
pub const CLIENTS: u8 = 1;
/// The network of the targets: 10.0.2.0/24 and fd00:2::/64.
pub const TARGETS: u8 = 2;

/// A host's address in both families.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Dual {
    /// 10.0.NETWORK.HOST
    pub v4: Ipv4Addr,
    /// fd00:NETWORK::HOST, with the decimal digits of HOST
    pub v6: Ipv6Addr,
}

impl Dual {
    /// The addresses of `host` in [`CLIENTS`] or [`TARGETS`].
    pub fn new(network: u8, host: u8) -> Self {
        let digits = u16::from(host / 100) << 8 | u16::from(host / 10 % 10) << 4;
        let digits = digits | u16::from(host % 10);
        Self {
            v4: Ipv4Addr::new(10, 0, network, host),
            v6: Ipv6Addr::new(0xfd00, network.into(), 0, 0, 0, 0, 0, digits),
        }
    }

    /// IPv4, then IPv6: for tests that do the same with each.
    pub fn both(self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// The address of the same family as `other`.
    pub fn like(self, other: IpAddr) -> IpAddr {
        if other.is_ipv4() { self.v4.into() } else { self.v6.into() }
    }

    /// The IPv4 address with a port.
    pub fn v4_port(self, port: u16) -> SocketAddr {
        (self.v4, port).into()
    }

    /// The IPv6 address with a port.
    pub fn v6_port(self, port: u16) -> SocketAddr {
        (self.v6, port).into()
    }

    /// The MAC address that the host's interface has here: 02:00 and the IPv4 address.
    pub fn mac(self) -> [u8; 6] {
        let [a, b, c, d] = self.v4.octets();
        [0x02, 0, a, b, c, d]
    }
}

/// Both addresses as a TOML array's elements: `"10.0.1.100", "fd00:1::100"`.
impl fmt::Display for Dual {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\", \"{}\"", self.v4, self.v6)
    }
}

/// Which network to build; drawings above.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Picture {
    /// The balancer is one host on the targets' segment, and their default gateway.
    OneNic,
    /// The balancer routes between clients and targets.
    TwoNics,
    /// As [`Picture::OneNic`], but the listener's address is on every target's `lo` and targets
    /// reply through the router.
    Dsr,
}

/// A network, up and addressed. All of it goes when it is dropped.
#[derive(Debug)]
pub struct Topology {
    /// Where clients run; 10.0.1.10 is its first address.
    pub client: Namespace,
    /// Where the agent runs.
    pub balancer: Namespace,
    /// Where servers run, in the order of their addresses.
    pub targets: Vec<Namespace>,
    /// The address for listeners. Nobody has it yet, except `lo` of the targets in [`Picture::Dsr`].
    pub listener: Dual,
    /// The balancer's interfaces, clients' side first.
    pub interfaces: &'static [&'static str],
    /// Between clients and the targets' segment, by `eth0` to the clients; not in [`Picture::TwoNics`].
    pub router: Option<Namespace>,
    // Namespaces and programs that only need to exist.
    _switch: Namespace,
    _pass: Attached,
}

impl Topology {
    /// Builds a network with that many targets, at most 80.
    ///
    /// # Errors
    ///
    /// If a step fails; what was built goes.
    pub fn new(picture: Picture, targets: u8) -> Result<Self> {
        let mut pass = Attached::load(Floor::Pass)?;
        let client = Namespace::new("client")?;
        let switch = new_switch()?;
        let balancer = new_router("balancer")?;
        let balancer_host = Dual::new(TARGETS, 1);

        let (router, listener, gateway, interfaces): (_, _, _, &[_]) = match picture {
            Picture::TwoNics => {
                link((&client, "eth0"), (&balancer, "eth0"))?;
                pass.attach(&client, "eth0")?;
                plug(&switch, &balancer, "eth1")?;
                become_host(&balancer, "eth0", Dual::new(CLIENTS, 1))?;
                become_host(&balancer, "eth1", balancer_host)?;
                (None, Dual::new(CLIENTS, 100), balancer_host, &["eth0", "eth1"])
            }
            Picture::OneNic | Picture::Dsr => {
                let router = new_router("router")?;
                let router_host = Dual::new(TARGETS, 254);
                link((&client, "eth0"), (&router, "eth0"))?;
                plug(&switch, &router, "eth1")?;
                plug(&switch, &balancer, "eth0")?;
                become_host(&router, "eth0", Dual::new(CLIENTS, 1))?;
                become_host(&router, "eth1", router_host)?;
                become_host(&balancer, "eth0", balancer_host)?;
                default_route(&balancer, router_host)?;
                let gateway = if picture == Picture::Dsr { router_host } else { balancer_host };
                (Some(router), Dual::new(TARGETS, 100), gateway, &["eth0"])
            }
        };
        pass.attach(&switch, balancer.role())?;

        become_host(&client, "eth0", client_host())?;
        default_route(&client, Dual::new(CLIENTS, 1))?;
        let targets = (0..targets)
            .map(|index| {
                let target = Namespace::new(&format!("target{index}"))?;
                if picture == Picture::Dsr {
                    hold_silently(&target, listener)?;
                }
                plug(&switch, &target, "eth0")?;
                become_host(&target, "eth0", target_host(index))?;
                default_route(&target, gateway)?;
                Ok(target)
            })
            .collect::<Result<_>>()?;

        Ok(Self {
            client,
            balancer,
            targets,
            listener,
            interfaces,
            router,
            _switch: switch,
            _pass: pass,
        })
    }

    /// Gives the client one more host number of its network, for example one that is forbidden.
    ///
    /// # Errors
    ///
    /// If it has that address.
    pub fn add_client(&self, host: u8) -> Result<Dual> {
        let host = Dual::new(CLIENTS, host);
        add_address(&self.client, "eth0", host)?;
        Ok(host)
    }
}

/// The first address of the client.
pub fn client_host() -> Dual {
    Dual::new(CLIENTS, 10)
}

/// The address of a target, counted from 0.
pub fn target_host(index: u8) -> Dual {
    Dual::new(TARGETS, 11 + index)
}

/// A bridge that forwards from its first packet.
pub(crate) fn new_switch() -> Result<Namespace> {
    let switch = Namespace::new("switch")?;
    // Snooping would hold multicast back, and so neighbour discovery, until it knows who listens.
    switch
        .ip("link add bridge type bridge forward_delay 0 mcast_snooping 0\nlink set bridge up")?;
    Ok(switch)
}

/// Links a machine's interface to a port of the switch that has the machine's name.
pub(crate) fn plug(switch: &Namespace, machine: &Namespace, interface: &str) -> Result<()> {
    let port = machine.role();
    link((machine, interface), (switch, port))?;
    switch.ip(&format!("link set {port} master bridge"))
}

pub(crate) fn new_router(role: &str) -> Result<Namespace> {
    let router = Namespace::new(role)?;
    for (key, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/conf/default/rp_filter", "0"),
    ] {
        router.sysctl(key, value)?;
    }
    Ok(router)
}

/// Gives an interface the MAC address of `host` and its addresses.
pub(crate) fn become_host(machine: &Namespace, interface: &str, host: Dual) -> Result<()> {
    let mac = host.mac().map(|byte| format!("{byte:02x}")).join(":");
    machine.ip(&format!("link set {interface} address {mac}"))?;
    add_address(machine, interface, host)
}

fn add_address(machine: &Namespace, interface: &str, Dual { v4, v6 }: Dual) -> Result<()> {
    machine.ip(&format!(
        "address add {v4}/24 dev {interface}\naddress add {v6}/64 dev {interface} nodad"
    ))
}

pub(crate) fn default_route(machine: &Namespace, Dual { v4, v6 }: Dual) -> Result<()> {
    machine.ip(&format!("route add default via {v4}\nroute add default via {v6}"))
}

/// Lets a target of direct server return accept packets to the listener's address without saying
/// so on the segment. IPv6 never answers for an address of another interface.
pub(crate) fn hold_silently(target: &Namespace, Dual { v4, v6 }: Dual) -> Result<()> {
    target.sysctl("net/ipv4/conf/all/arp_ignore", "1")?;
    target.sysctl("net/ipv4/conf/all/arp_announce", "2")?;
    target.ip(&format!("address add {v4}/32 dev lo\naddress add {v6}/128 dev lo nodad"))
}
