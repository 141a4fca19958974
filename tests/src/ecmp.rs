//! Two balancers behind one router, which spreads flows over them.
//!
//! ```text
//!   client ── (eth0) router (eth1) ── (eth0) balancer 0 (eth1) ── switch ── target 0  10.0.2.11
//!   10.0.1.10        10.0.1.1  10.0.3.1    10.0.3.2  10.0.2.1       ├────── target 1  10.0.2.12 ...
//!                         (eth2) ── (eth0) balancer 1 (eth1) ───────┤
//!                          10.0.4.1     10.0.4.2  10.0.2.2          │
//!                         (eth3) ───────────────────────────────────┘
//!                          10.0.2.254
//! ```
//!
//! The listener's address is in no network: the router has a host route to it, by a group of
//! nexthops that hashes addresses and ports. Where replies come back through the balancers, targets
//! spread them in the same way, so that a flow's requests and replies meet different balancers half
//! of the time. With direct server return they reply through the router.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::Result;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};

use crate::{
    frames::PacketSocket,
    netns::{Namespace, link},
    programs::{Attached, Floor},
    topology::{
        CLIENTS, Dual, TARGETS, become_host, client_host, default_route, hold_silently, new_router,
        new_switch, plug, target_host,
    },
};

/// How many balancers there are.
pub const BALANCERS: usize = 2;
/// The balancers' interfaces, the router's side first.
pub const INTERFACES: [&str; 2] = ["eth0", "eth1"];

/// The network of the listener's address, which is nobody's.
const LISTENERS: u8 = 5;
/// The numbers of the nexthop groups, IPv4 and IPv6.
const GROUPS: [usize; 2] = [40, 60];

/// Which way the replies of targets go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Replies {
    /// Through either balancer.
    Balancers,
    /// Straight to the router; targets have the listener's address.
    Router,
}

/// The network, up and addressed, but nothing leads to a balancer before [`Ecmp::announce`]. All of
/// it goes when it is dropped.
#[derive(Debug)]
pub struct Ecmp {
    /// Where clients run, at 10.0.1.10.
    pub client: Namespace,
    /// Where the agents run.
    pub balancers: Vec<Namespace>,
    /// Where servers run, in the order of their addresses.
    pub targets: Vec<Namespace>,
    /// The address for listeners.
    pub listener: Dual,
    router: Namespace,
    replies: Replies,
    dead_targets: Vec<u8>,
    switch: Namespace,
    // What only needs to exist.
    _pass: Attached,
}

impl Ecmp {
    /// Builds a network with that many targets, at most 80.
    ///
    /// # Errors
    ///
    /// If a step fails; what was built goes.
    pub fn new(replies: Replies, targets: u8) -> Result<Self> {
        let mut pass = Attached::load(Floor::Pass)?;
        let client = Namespace::new("client")?;
        let router = new_spreading_router()?;
        let switch = new_switch()?;
        link((&client, "eth0"), (&router, "eth0"))?;
        plug(&switch, &router, "eth3")?;
        become_host(&client, "eth0", client_host())?;
        become_host(&router, "eth0", Dual::new(CLIENTS, 1))?;
        become_host(&router, "eth3", Dual::new(TARGETS, 254))?;
        default_route(&client, Dual::new(CLIENTS, 1))?;

        let new_balancer = |index| {
            let balancer = new_router(&format!("balancer{index}"))?;
            let port = router_port(index);
            link((&router, &port), (&balancer, "eth0"))?;
            plug(&switch, &balancer, "eth1")?;
            // Its addresses come back with its links.
            balancer.sysctl("net/ipv6/conf/all/keep_addr_on_down", "1")?;
            become_host(&router, &port, Dual::new(uplink(index), 1))?;
            become_host(&balancer, "eth0", Dual::new(uplink(index), 2))?;
            become_host(&balancer, "eth1", gateway(index))?;
            default_route(&balancer, Dual::new(uplink(index), 1))?;
            pass.attach(&router, &port)?;
            pass.attach(&switch, balancer.role())?;
            Ok(balancer)
        };
        let balancers = (0..BALANCERS).map(new_balancer).collect::<Result<_>>()?;

        let listener = Dual::new(LISTENERS, 100);
        let new_target = |index| {
            let target = Namespace::new(&format!("target{index}"))?;
            spread_by_ports(&target)?;
            plug(&switch, &target, "eth0")?;
            become_host(&target, "eth0", target_host(index))?;
            if replies == Replies::Router {
                hold_silently(&target, listener)?;
                default_route(&target, Dual::new(TARGETS, 254))?;
            }
            Ok(target)
        };
        let targets = (0..targets).map(new_target).collect::<Result<_>>()?;
        Ok(Self {
            client,
            balancers,
            targets,
            listener,
            router,
            replies,
            dead_targets: Vec::new(),
            switch,
            _pass: pass,
        })
    }

    /// Leads flows to all balancers, as routing daemons on the router and the targets would do once
    /// they announce the listener's address.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn announce(&self) -> Result<()> {
        let mut batch = String::new();
        for (group, listener) in GROUPS.into_iter().zip(self.listener.both()) {
            batch.extend((0..BALANCERS).map(|index| nexthop(group, index, listener)));
            batch += &format!(
                "nexthop add id {group} group {} type resilient buckets 128\n",
                members(group)
            );
            batch += &format!("route add {listener} nhid {group}\n");
        }
        self.router.ip(&batch)?;
        self.lead_replies(0..BALANCERS)
    }

    /// The machine of a balancer dies: nothing of it answers any more. The router's kernel removes
    /// its nexthops when the link goes; what the targets' routing daemons would notice next is done
    /// here.
    ///
    /// # Errors
    ///
    /// If there is no such balancer.
    pub fn kill_balancer(&self, index: usize) -> Result<()> {
        self.balancers[index].ip("link set eth0 down\nlink set eth1 down")?;
        self.lead_replies((0..BALANCERS).filter(|other| *other != index))
    }

    /// The machine of a dead balancer runs again. Nothing leads to it before
    /// [`Self::announce_again`].
    ///
    /// # Errors
    ///
    /// If there is no such balancer.
    pub fn revive_balancer(&self, index: usize) -> Result<()> {
        let balancer = &self.balancers[index];
        balancer.ip("link set eth0 up\nlink set eth1 up")?;
        default_route(balancer, Dual::new(uplink(index), 1))
    }

    /// Leads flows to a balancer once more, and at once, as routers do that know no buckets: the
    /// group would else leave it those only that nobody uses.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn announce_again(&self, index: usize) -> Result<()> {
        let mut batch = String::new();
        for (group, listener) in GROUPS.into_iter().zip(self.listener.both()) {
            batch += &nexthop(group, index, listener);
            batch += &format!(
                "nexthop replace id {group} group {} type resilient buckets 128 idle_timer 1 \
                 unbalanced_timer 1\n",
                members(group)
            );
        }
        self.router.ip(&batch)?;
        self.lead_replies(0..BALANCERS)
    }

    /// The default routes of targets. Not by nexthop groups: on Linux 6.18 IPv6 sockets go on with
    /// the cached way through a nexthop that left a group, and that discards what they send.
    fn lead_replies(&self, balancers: impl Iterator<Item = usize>) -> Result<()> {
        if self.replies == Replies::Router {
            return Ok(());
        }
        let mut routes = ["0.0.0.0/0", "::/0"].map(|route| format!("route replace {route}"));
        for gateway in balancers.map(gateway) {
            for (route, address) in routes.iter_mut().zip(gateway.both()) {
                *route += &format!(" nexthop via {address}");
            }
        }
        let batch = routes.join("\n");
        let alive = (0..).zip(&self.targets).filter(|(n, _)| !self.dead_targets.contains(n));
        alive.into_iter().try_for_each(|(_, target)| target.ip(&batch))
    }

    /// The machine of a target dies: it neither hears nor says anything any more.
    ///
    /// # Errors
    ///
    /// If there is no such target.
    pub fn kill_target(&mut self, index: u8) -> Result<()> {
        self.dead_targets.push(index);
        self.targets[usize::from(index)].ip("link set eth0 down")
    }

    /// The TCP flows of clients that the router sends to a balancer at least once within `time`.
    ///
    /// # Errors
    ///
    /// If the router's interface cannot be watched.
    pub fn flows_of(&self, balancer: usize, time: Duration) -> Result<BTreeSet<SocketAddr>> {
        let socket = PacketSocket::watch(&self.router, &router_port(balancer))?;
        Ok(self.segments(&socket, time).into_iter().collect())
    }

    /// Listens to what passes a balancer's port of the targets' switch, either way.
    ///
    /// # Errors
    ///
    /// If the port cannot be watched.
    pub fn watch_switch(&self, balancer: usize) -> Result<PacketSocket> {
        PacketSocket::watch(&self.switch, self.balancers[balancer].role())
    }

    /// The sources of the TCP segments to the listener that a socket hears, within
    /// `time`.
    pub fn segments(&self, socket: &PacketSocket, time: Duration) -> Vec<SocketAddr> {
        let end = Instant::now() + time;
        let mut sources = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            // It ends with the error that nothing comes within no time.
            let Ok(frame) = socket.receive(left, |_| true) else { return sources };
            sources.extend(tcp_to(self.listener, &frame));
        }
    }
}

/// The source of a TCP segment to an address.
fn tcp_to(destination: Dual, frame: &[u8]) -> Option<SocketAddr> {
    let SlicedPacket { net, transport, .. } = SlicedPacket::from_ethernet(frame).ok()?;
    let (source, to): (IpAddr, IpAddr) = match net? {
        NetSlice::Ipv4(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into())
        }
        NetSlice::Ipv6(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into())
        }
        NetSlice::Arp(_) => return None,
    };
    match transport? {
        TransportSlice::Tcp(tcp) if destination.both().contains(&to) => {
            Some((source, tcp.source_port()).into())
        }
        _ => None,
    }
}

/// The network between the router and a balancer.
fn uplink(balancer: usize) -> u8 {
    [3, 4][balancer]
}

/// The command that adds the nexthop to a balancer.
fn nexthop(group: usize, balancer: usize, listener: IpAddr) -> String {
    let (via, port) = (Dual::new(uplink(balancer), 2).like(listener), router_port(balancer));
    format!("nexthop add id {} via {via} dev {port}\n", group + 1 + balancer)
}

/// The nexthops of a group.
fn members(group: usize) -> String {
    let numbers = (0..BALANCERS).map(|balancer| (group + 1 + balancer).to_string());
    numbers.collect::<Vec<_>>().join("/")
}

/// A balancer's address among the targets.
fn gateway(balancer: usize) -> Dual {
    Dual::new(TARGETS, [1, 2][balancer])
}

/// The router's interface to a balancer.
fn router_port(balancer: usize) -> String {
    format!("eth{}", 1 + balancer)
}

fn new_spreading_router() -> Result<Namespace> {
    let router = new_router("router")?;
    spread_by_ports(&router)?;
    Ok(router)
}

/// Several ways to one destination: chosen by addresses, protocol and ports.
///
/// Not by policy 1, which is meant for the same: it takes the hash that the sending socket left in
/// the packet's metadata if there is one, and here the metadata crosses a veth. That hash is random
/// and changes with every retransmission timeout, so a flow would move each time.
fn spread_by_ports(machine: &Namespace) -> Result<()> {
    // Source and destination address, protocol, source and destination port.
    const FIELDS: &str = "55";
    for family in ["ipv4", "ipv6"] {
        machine.sysctl(&format!("net/{family}/fib_multipath_hash_policy"), "3")?;
        machine.sysctl(&format!("net/{family}/fib_multipath_hash_fields"), FIELDS)?;
    }
    Ok(())
}
