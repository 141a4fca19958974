//! From a destination to the frame that leaves for it: route, device, neighbour.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::IpAddr;

use futures::TryStreamExt as _;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteType, RouteVia,
};
use rtnetlink::Handle;

use super::io_error;
use super::links::mac_address;
use super::network::{Interface, LinkLayer, NextHop, Unresolved};

/// Where the routing tables send a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    Via {
        neighbour: NeighbourKey,
        mtu: Option<u32>,
        /// The address that the machine's own packets have there.
        source: Option<IpAddr>,
    },
    Local,
    None,
}

/// Who is asked for a hardware address, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct NeighbourKey {
    pub ifindex: u32,
    pub address: IpAddr,
}

/// An entry of the kernel's neighbour table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Neighbour {
    pub state: NeighbourState,
    pub mac: Option<[u8; 6]>,
}

impl Neighbour {
    /// The hardware address while the kernel itself would use it (`NUD_VALID`).
    pub(super) fn usable_mac(&self) -> Option<[u8; 6]> {
        match self.state {
            NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
            | NeighbourState::Noarp => self.mac,
            _ => None,
        }
    }
}

/// The kernel's neighbour table, of both address families.
#[derive(Debug, Default)]
pub(super) struct Neighbours(HashMap<NeighbourKey, Neighbour>);

impl Neighbours {
    pub(super) async fn read(handle: &Handle) -> io::Result<Self> {
        let mut messages = handle.neighbours().get().execute().map_err(io_error);
        let mut neighbours = Self::default();
        while let Some(message) = messages.try_next().await? {
            neighbours.note_new(&message);
        }
        Ok(neighbours)
    }

    pub(super) fn get(&self, key: NeighbourKey) -> Option<Neighbour> {
        self.0.get(&key).copied()
    }

    /// Takes over a new or changed entry; returns whether a hardware address became usable,
    /// changed or went, which a mere change of state does not.
    pub(super) fn note_new(&mut self, message: &NeighbourMessage) -> bool {
        let Some(key) = neighbour_key(message) else {
            return false;
        };
        let mac = message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => mac_address(bytes),
            _ => None,
        });
        let neighbour = Neighbour { state: message.header.state, mac };
        let before = self.0.insert(key, neighbour).and_then(|before| before.usable_mac());
        before != neighbour.usable_mac()
    }

    /// Takes over the end of an entry; returns whether a usable hardware address went with it.
    pub(super) fn note_gone(&mut self, message: &NeighbourMessage) -> bool {
        let gone = neighbour_key(message).and_then(|key| self.0.remove(&key));
        gone.is_some_and(|neighbour| neighbour.usable_mac().is_some())
    }
}

/// `None` for bridge entries and for addresses that are proxied, not neighbours'.
fn neighbour_key(message: &NeighbourMessage) -> Option<NeighbourKey> {
    if message.header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    })?;
    Some(NeighbourKey { ifindex: message.header.ifindex, address })
}

/// Has the kernel resolve or verify a neighbour, as `ip neigh ... use` does. Not for permanent
/// entries, which it would turn into ones that expire.
pub(super) async fn poke(handle: &Handle, key: NeighbourKey) -> io::Result<()> {
    handle
        .neighbours()
        .add(key.ifindex, key.address)
        .state(NeighbourState::None)
        .flags(NeighbourFlags::Use)
        .replace()
        .execute()
        .await
        .map_err(io_error)
}

/// Asks the kernel where it would send a packet to `destination`, as `ip route get` does.
pub(super) async fn route_to(handle: &Handle, destination: IpAddr) -> io::Result<Route> {
    let mut request = RouteMessage::default();
    request.header.flags = RouteFlags::LookupTable;
    let (family, length, address) = match destination {
        IpAddr::V4(v4) => (AddressFamily::Inet, 32, RouteAddress::Inet(v4)),
        IpAddr::V6(v6) => (AddressFamily::Inet6, 128, RouteAddress::Inet6(v6)),
    };
    request.header.address_family = family;
    request.header.destination_prefix_length = length;
    request.attributes.push(RouteAttribute::Destination(address));

    let answer = handle.route().get(request).execute().try_next().await;
    match answer {
        Ok(Some(message)) => Ok(parse_route(destination, &message)),
        Ok(None) => Ok(Route::None),
        // Unreachable, prohibit, blackhole and "no such route" are all answered with errors.
        Err(rtnetlink::Error::NetlinkError(_)) => Ok(Route::None),
        Err(other) => Err(io_error(other)),
    }
}

fn parse_route(destination: IpAddr, message: &RouteMessage) -> Route {
    match message.header.kind {
        RouteType::Unicast => {}
        RouteType::Local | RouteType::Anycast => return Route::Local,
        _ => return Route::None,
    }
    let mut output = None;
    let mut gateway = None;
    let mut mtu = None;
    let mut source = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(ifindex) => output = Some(*ifindex),
            RouteAttribute::Gateway(RouteAddress::Inet(v4))
            | RouteAttribute::Via(RouteVia::Inet(v4)) => gateway = Some(IpAddr::V4(*v4)),
            RouteAttribute::Gateway(RouteAddress::Inet6(v6))
            | RouteAttribute::Via(RouteVia::Inet6(v6)) => gateway = Some(IpAddr::V6(*v6)),
            RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => source = Some(IpAddr::V4(*v4)),
            RouteAttribute::PrefSource(RouteAddress::Inet6(v6)) => source = Some(IpAddr::V6(*v6)),
            RouteAttribute::Metrics(metrics) => mtu = metrics.iter().find_map(mtu_of),
            _ => {}
        }
    }
    output.map_or(Route::None, |ifindex| Route::Via {
        neighbour: NeighbourKey { ifindex, address: gateway.unwrap_or(destination) },
        mtu,
        source,
    })
}

fn mtu_of(metric: &RouteMetric) -> Option<u32> {
    match metric {
        RouteMetric::Mtu(mtu) if *mtu > 0 => Some(*mtu),
        _ => None,
    }
}

/// Puts route, links and neighbour together.
pub(super) fn resolve(
    route: Route,
    interfaces: &BTreeMap<u32, Interface>,
    neighbours: &Neighbours,
) -> Result<NextHop, Unresolved> {
    let (key, route_mtu, source) = match route {
        Route::Via { neighbour, mtu, source } => (neighbour, mtu, source),
        Route::Local => return Err(Unresolved::Local),
        Route::None => return Err(Unresolved::NoRoute),
    };
    let ifindex = key.ifindex;
    let interface = interfaces.get(&ifindex).ok_or(Unresolved::LinkDown { ifindex })?;
    let (port, vlan) = port_of(interface, interfaces)?;
    if !interface.up || !port.up {
        return Err(Unresolved::LinkDown { ifindex });
    }
    let destination_mac = neighbours
        .get(key)
        .and_then(|neighbour| neighbour.usable_mac())
        .ok_or(Unresolved::NoNeighbour { address: key.address, ifindex })?;
    let mtu = route_mtu.map_or(interface.mtu, |mtu| mtu.min(interface.mtu));
    Ok(NextHop {
        ifindex: port.index,
        vlan,
        source_mac: interface.mac,
        destination_mac,
        mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        source,
    })
}

/// The device that frames of `interface` leave by, and their tag.
fn port_of<'a>(
    interface: &'a Interface,
    interfaces: &'a BTreeMap<u32, Interface>,
) -> Result<(&'a Interface, Option<u16>), Unresolved> {
    let unsupported = Unresolved::UnsupportedLink { ifindex: interface.index };
    if interface.layer != LinkLayer::Ethernet {
        return Err(unsupported);
    }
    let Some(vlan) = interface.vlan else {
        return Ok((interface, None));
    };
    // The parent can be in another namespace, out of reach.
    let parent = interfaces.get(&vlan.parent).ok_or(unsupported)?;
    if vlan.service_tag || parent.vlan.is_some() {
        return Err(unsupported);
    }
    Ok((parent, Some(vlan.id)))
}

#[cfg(test)]
mod tests {
    use super::super::network::Vlan;
    use super::*;

    const GATEWAY: [u8; 4] = [10, 0, 0, 254];
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

    fn interface(index: u32, vlan: Option<Vlan>) -> Interface {
        Interface {
            index,
            name: format!("eth{index}"),
            layer: LinkLayer::Ethernet,
            mac: [2, 0, 0, 0, 0, index as u8],
            mtu: 1500,
            up: true,
            vlan,
            controller: None,
            lower: None,
            xdp: None,
        }
    }

    fn interfaces(list: impl IntoIterator<Item = Interface>) -> BTreeMap<u32, Interface> {
        list.into_iter().map(|interface| (interface.index, interface)).collect()
    }

    fn key(ifindex: u32) -> NeighbourKey {
        NeighbourKey { ifindex, address: GATEWAY.into() }
    }

    fn via(ifindex: u32) -> Route {
        Route::Via { neighbour: key(ifindex), mtu: None, source: None }
    }

    fn neighbour(ifindex: u32, state: NeighbourState, mac: Option<[u8; 6]>) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = ifindex;
        message.header.state = state;
        let address = NeighbourAddress::Inet(GATEWAY.into());
        message.attributes.push(NeighbourAttribute::Destination(address));
        message.attributes.extend(mac.map(|m| NeighbourAttribute::LinkLayerAddress(m.to_vec())));
        message
    }

    fn reachable(ifindex: u32) -> Neighbours {
        let mut neighbours = Neighbours::default();
        neighbours.note_new(&neighbour(ifindex, NeighbourState::Reachable, Some(MAC)));
        neighbours
    }

    #[test]
    fn a_plain_next_hop() {
        let next_hop = resolve(via(2), &interfaces([interface(2, None)]), &reachable(2));
        let expected = NextHop {
            ifindex: 2,
            vlan: None,
            source_mac: [2, 0, 0, 0, 0, 2],
            destination_mac: MAC,
            mtu: 1500,
            source: None,
        };
        assert_eq!(next_hop, Ok(expected));
    }

    #[test]
    fn frames_of_a_vlan_device_leave_tagged_by_its_parent() {
        let vlan = Vlan { parent: 2, id: 10, service_tag: false };
        let links = interfaces([interface(2, None), interface(5, Some(vlan))]);
        let next_hop = resolve(via(5), &links, &reachable(5)).unwrap();
        assert_eq!((next_hop.ifindex, next_hop.vlan), (2, Some(10)));
        assert_eq!(next_hop.source_mac, [2, 0, 0, 0, 0, 5]);
    }

    #[test]
    fn two_tags_and_service_tags_are_unsupported() {
        let tag = |parent, service_tag| Some(Vlan { parent, id: 10, service_tag });
        let links = interfaces([
            interface(2, None),
            interface(5, tag(2, false)),
            interface(6, tag(5, false)),
            interface(7, tag(2, true)),
        ]);
        for ifindex in [6, 7] {
            let resolved = resolve(via(ifindex), &links, &reachable(ifindex));
            assert_eq!(resolved, Err(Unresolved::UnsupportedLink { ifindex }));
        }
    }

    #[test]
    fn a_parent_that_is_down_takes_its_vlan_devices_along() {
        let vlan = Vlan { parent: 2, id: 10, service_tag: false };
        let down = Interface { up: false, ..interface(2, None) };
        let links = interfaces([down, interface(5, Some(vlan))]);
        let resolved = resolve(via(5), &links, &reachable(5));
        assert_eq!(resolved, Err(Unresolved::LinkDown { ifindex: 5 }));
    }

    #[test]
    fn only_valid_states_are_usable() {
        let links = interfaces([interface(2, None)]);
        let unresolved =
            Err(Unresolved::NoNeighbour { address: IpAddr::from(GATEWAY), ifindex: 2 });
        assert_eq!(resolve(via(2), &links, &Neighbours::default()), unresolved);
        for (state, usable) in [
            (NeighbourState::Incomplete, false),
            (NeighbourState::Failed, false),
            (NeighbourState::None, false),
            (NeighbourState::Stale, true),
            (NeighbourState::Delay, true),
            (NeighbourState::Probe, true),
            (NeighbourState::Permanent, true),
            (NeighbourState::Noarp, true),
        ] {
            let mut neighbours = Neighbours::default();
            neighbours.note_new(&neighbour(2, state, Some(MAC)));
            assert_eq!(resolve(via(2), &links, &neighbours).is_ok(), usable, "{state}");
        }
    }

    #[test]
    fn only_changes_of_a_usable_address_matter() {
        let mut table = Neighbours::default();
        assert!(!table.note_new(&neighbour(2, NeighbourState::Incomplete, None)));
        assert!(table.note_new(&neighbour(2, NeighbourState::Reachable, Some(MAC))));
        assert!(!table.note_new(&neighbour(2, NeighbourState::Stale, Some(MAC))));
        assert!(table.note_new(&neighbour(2, NeighbourState::Stale, Some([2; 6]))));
        assert!(table.note_new(&neighbour(2, NeighbourState::Failed, None)));
        assert!(!table.note_gone(&neighbour(2, NeighbourState::Failed, None)));
        assert_eq!(table.get(key(2)), None);
    }

    #[test]
    fn the_smaller_mtu_of_route_and_link_counts() {
        let links = interfaces([Interface { mtu: 100_000, ..interface(2, None) }]);
        let mtu = |mtu| {
            let route = Route::Via { neighbour: key(2), mtu, source: None };
            resolve(route, &links, &reachable(2)).unwrap().mtu
        };
        assert_eq!(mtu(Some(1400)), 1400);
        assert_eq!(mtu(None), u16::MAX);
    }

    #[test]
    fn a_gateway_of_the_other_family_is_the_neighbour() {
        let gateway: std::net::Ipv6Addr = "fe80::1".parse().unwrap();
        let mut message = RouteMessage::default();
        message.header.kind = RouteType::Unicast;
        message.attributes =
            vec![RouteAttribute::Oif(2), RouteAttribute::Via(RouteVia::Inet6(gateway))];
        let neighbour = NeighbourKey { ifindex: 2, address: gateway.into() };
        let route = parse_route([192, 0, 2, 1].into(), &message);
        assert_eq!(route, Route::Via { neighbour, mtu: None, source: None });
    }

    #[test]
    fn routes_that_lead_nowhere() {
        let mut message = RouteMessage::default();
        message.attributes = vec![RouteAttribute::Oif(1)];
        for (kind, expected) in [
            (RouteType::Local, Route::Local),
            (RouteType::Unreachable, Route::None),
            (RouteType::BlackHole, Route::None),
            (RouteType::Multicast, Route::None),
        ] {
            message.header.kind = kind;
            assert_eq!(parse_route([192, 0, 2, 1].into(), &message), expected);
        }
    }
}
