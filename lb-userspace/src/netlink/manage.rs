//! Listener addresses on the machine: added where their subnet is, announced, and removed again,
//! but only those that were not there before.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, CacheInfo,
};
use nix::libc;
use rtnetlink::Handle;
use serde::{Deserialize, Serialize};
use tokio::task::{AbortHandle, JoinSet};

use super::addresses::{self, Addresses};
use super::announce::Announcer;
use super::network::{Interface, LinkLayer, LocalAddress};
use super::note::Note;
use super::{io_error, links};

/// An address that could not be added or removed.
#[derive(Debug)]
pub struct AddressError {
    /// The address.
    pub address: IpAddr,
    /// What was tried, such as "adding it to eth0".
    pub action: String,
    /// The kernel's answer.
    pub source: io::Error,
}

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "address {}: {} failed: {}", self.address, self.action, self.source)
    }
}

impl std::error::Error for AddressError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// Where an address of ours is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    ifindex: u32,
    /// Tells the interface apart from a later one with the same index.
    interface: String,
}

type Owned = BTreeMap<IpAddr, Place>;

/// Keeps the listener addresses on the machine.
///
/// An address is ours if this manager, or a predecessor that noted it in the same state directory,
/// added it. One that was there already is used as it is and never removed.
#[derive(Debug)]
pub struct AddressManager {
    handle: Handle,
    announcer: Announcer,
    note: Note<Owned>,
    /// What the note says.
    noted: Owned,
    owned: Owned,
    announcing: BTreeMap<IpAddr, AbortHandle>,
    /// The MAC address that each address was last announced with, or found with.
    announced: BTreeMap<IpAddr, [u8; 6]>,
    /// The netlink connection and the announcements under way; ended with the manager.
    tasks: JoinSet<()>,
}

impl AddressManager {
    /// A manager for the network namespace of the calling thread, which takes over what the notes
    /// in `state_directory` name. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the kernel gives no netlink or packet socket (that takes root, or `CAP_NET_ADMIN` and
    /// `CAP_NET_RAW`), or the notes cannot be read.
    pub fn new(state_directory: &Path) -> io::Result<Self> {
        let (note, noted) = Note::<Owned>::open(state_directory, "addresses")?;
        let owned = noted.clone();
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let announcer = Announcer::new()?;
        let mut tasks = JoinSet::new();
        tasks.spawn(connection);
        let (announcing, announced) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { handle, announcer, note, noted, owned, announcing, announced, tasks })
    }

    /// The addresses that are on the machine because of us.
    #[must_use]
    pub fn owned(&self) -> BTreeSet<IpAddr> {
        self.owned.keys().copied().collect()
    }

    /// Adds the wanted addresses that the machine lacks and removes those of ours that are not
    /// wanted any more. An address goes to that one of the `attached` interfaces (interface
    /// indices), or of their VLAN devices, whose subnet holds it, and is announced there; else to
    /// the loopback device. Call it again when the [`Network`](super::Network) changed: what somebody
    /// removed is added anew.
    ///
    /// Returns the addresses that failed; the others are as wanted.
    ///
    /// # Errors
    /// When links and addresses cannot be read or the notes cannot be written; nothing was added
    /// then.
    pub async fn reconcile(
        &mut self,
        wanted: &BTreeSet<IpAddr>,
        attached: &[u32],
    ) -> io::Result<Vec<AddressError>> {
        // Of this moment, not of the last snapshot: an interface missing from an old picture would
        // cost us the ownership of what is on it.
        let interfaces = links::read(&self.handle).await?;
        let present = addresses::read(&self.handle).await?;
        let mut errors = Vec::new();

        let mut plan = plan(&self.owned, wanted, attached, &present, &interfaces);
        self.owned.retain(|address, _| !plan.forget.contains(address));
        for address in &plan.remove {
            self.remove(*address, &mut errors).await;
        }
        // One that could not be removed where it was does not move.
        plan.add.retain(|(address, _)| !self.owned.contains_key(address));
        for (address, interface) in &plan.add {
            let place = Place { ifindex: interface.index, interface: interface.name.clone() };
            self.owned.insert(*address, place);
        }
        // Noted before it is done: an address noted but absent is harmless, one added but not
        // noted would stay for ever.
        self.save()?;
        for (address, interface) in plan.add {
            self.add(address, interface, &mut errors).await;
        }
        self.announce_new_macs(&interfaces);
        self.save()?;
        Ok(errors)
    }

    /// Removes every address that is ours.
    ///
    /// # Errors
    /// When the notes cannot be written; the addresses are removed all the same.
    pub async fn release(&mut self) -> io::Result<Vec<AddressError>> {
        let mut errors = Vec::new();
        for address in self.owned() {
            self.remove(address, &mut errors).await;
        }
        self.save()?;
        Ok(errors)
    }

    async fn add(
        &mut self,
        address: IpAddr,
        interface: &Interface,
        errors: &mut Vec<AddressError>,
    ) {
        let mut request = self.handle.address().add(interface.index, address, host_length(address));
        if address.is_ipv6() {
            not_for_own_connections(request.message_mut());
        }
        if let Err(error) = request.execute().await {
            self.owned.remove(&address);
            let source = io_error(error);
            // Somebody else was faster: theirs.
            if source.raw_os_error() != Some(libc::EEXIST) {
                let action = format!("adding it to {}", interface.name);
                errors.push(AddressError { address, action, source });
            }
            return;
        }
        tracing::info!(%address, interface = %interface.name, "added an address");
        if interface.layer == LinkLayer::Ethernet {
            self.announce(address, interface);
        }
    }

    /// Announces what is on an interface whose MAC address has changed: neighbours would send to the
    /// old one until they notice.
    fn announce_new_macs(&mut self, interfaces: &BTreeMap<u32, Interface>) {
        self.announced.retain(|address, _| self.owned.contains_key(address));
        let places: Vec<_> =
            self.owned.iter().map(|(address, place)| (*address, place.ifindex)).collect();
        for (address, ifindex) in places {
            let Some(interface) = interfaces.get(&ifindex) else { continue };
            let before = self.announced.insert(address, interface.mac);
            let is_changed = before.is_some_and(|before| before != interface.mac);
            if is_changed && interface.layer == LinkLayer::Ethernet {
                self.announce(address, interface);
            }
        }
    }

    fn announce(&mut self, address: IpAddr, interface: &Interface) {
        let announcement = self.announcer.clone().announce(interface.index, interface.mac, address);
        let task = self.tasks.spawn(announcement);
        if let Some(earlier) = self.announcing.insert(address, task) {
            earlier.abort();
        }
        self.announcing.retain(|_, task| !task.is_finished());
        while self.tasks.try_join_next().is_some() {}
    }

    async fn remove(&mut self, address: IpAddr, errors: &mut Vec<AddressError>) {
        let Some(place) = self.owned.get(&address) else {
            return;
        };
        if let Some(announcement) = self.announcing.remove(&address) {
            announcement.abort();
        }
        let mut message = AddressMessage::default();
        message.header.family = match address {
            IpAddr::V4(_) => netlink_packet_route::AddressFamily::Inet,
            IpAddr::V6(_) => netlink_packet_route::AddressFamily::Inet6,
        };
        message.header.index = place.ifindex;
        message.header.prefix_len = host_length(address);
        message.attributes =
            vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
        match self.handle.address().del(message).execute().await.map_err(io_error) {
            Ok(()) => tracing::info!(%address, interface = %place.interface, "removed an address"),
            Err(source) if is_gone(&source) => {}
            Err(source) => {
                let action = format!("removing it from {}", place.interface);
                errors.push(AddressError { address, action, source });
                return;
            }
        }
        self.owned.remove(&address);
    }

    fn save(&mut self) -> io::Result<()> {
        if self.owned == self.noted {
            return Ok(());
        }
        if self.owned.is_empty() {
            self.note.remove()?;
        } else {
            self.note.write(&self.owned)?;
        }
        self.noted.clone_from(&self.owned);
        Ok(())
    }
}

/// Deprecated, so that the kernel never chooses it for connections of its own; usable at once, as
/// duplicate address detection would refuse the address while its former holder still has it.
fn not_for_own_connections(message: &mut AddressMessage) {
    message.header.flags |= AddressHeaderFlags::Nodad;
    message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    let mut lifetimes = CacheInfo::default();
    lifetimes.ifa_preferred = 0;
    lifetimes.ifa_valid = u32::MAX;
    message.attributes.push(AddressAttribute::CacheInfo(lifetimes));
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::ENODEV | libc::ENOENT))
}

/// 32 or 128: the address alone, without a subnet.
fn host_length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// What to do, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan<'a> {
    /// No longer there, or no longer ours.
    forget: BTreeSet<IpAddr>,
    remove: Vec<IpAddr>,
    add: Vec<(IpAddr, &'a Interface)>,
}

fn plan<'a>(
    owned: &Owned,
    wanted: &BTreeSet<IpAddr>,
    attached: &[u32],
    present: &Addresses,
    interfaces: &'a BTreeMap<u32, Interface>,
) -> Plan<'a> {
    let mut plan = Plan::default();
    let usable = usable_interfaces(attached, interfaces);
    for (address, place) in owned {
        if !is_in_place(*address, place, present, interfaces) {
            plan.forget.insert(*address);
        } else if !wanted.contains(address) {
            plan.remove.push(*address);
        }
    }
    for address in wanted {
        let ours = owned.get(address).filter(|_| !plan.forget.contains(address));
        let best = best_interface(*address, &usable, owned, present, interfaces);
        match ours {
            // Where it is it stays, although the subnet may be away for a moment: a DHCP client
            // takes the interface's own address down and up.
            Some(place) if usable.contains(&place.ifindex) => {}
            Some(place) if best.is_some_and(|best| best.index == place.ifindex) => {}
            Some(_) => {
                plan.remove.push(*address);
                plan.add.extend(best.map(|best| (*address, best)));
            }
            None if present.contains_key(address) => {}
            None => plan.add.extend(best.map(|best| (*address, best))),
        }
    }
    plan
}

/// Whether the address still is where we put it, exactly as we did.
fn is_in_place(
    address: IpAddr,
    place: &Place,
    present: &Addresses,
    interfaces: &BTreeMap<u32, Interface>,
) -> bool {
    let same_interface =
        interfaces.get(&place.ifindex).is_some_and(|interface| interface.name == place.interface);
    let exact = LocalAddress { ifindex: place.ifindex, prefix_len: host_length(address) };
    same_interface && present.get(&address).is_some_and(|places| places.contains(&exact))
}

/// The attached interfaces and their VLAN devices.
fn usable_interfaces(attached: &[u32], interfaces: &BTreeMap<u32, Interface>) -> Vec<u32> {
    let vlans = interfaces
        .values()
        .filter(|interface| interface.vlan.is_some_and(|vlan| attached.contains(&vlan.parent)));
    attached.iter().copied().chain(vlans.map(|interface| interface.index)).collect()
}

/// The usable interface with the longest prefix that holds `address`, not counting our own
/// addresses; the loopback device if there is none.
fn best_interface<'a>(
    address: IpAddr,
    usable: &[u32],
    owned: &Owned,
    present: &Addresses,
    interfaces: &'a BTreeMap<u32, Interface>,
) -> Option<&'a Interface> {
    let subnets = present
        .iter()
        .filter(|(local, _)| !owned.contains_key(local))
        .flat_map(|(local, places)| places.iter().map(move |place| (*local, place)));
    let holding = subnets.filter(|(local, place)| {
        usable.contains(&place.ifindex)
            && IpNet::new(*local, place.prefix_len).is_ok_and(|subnet| subnet.contains(&address))
    });
    let longest = holding.max_by_key(|(_, place)| place.prefix_len);
    longest
        .and_then(|(_, place)| interfaces.get(&place.ifindex))
        .or_else(|| interfaces.values().find(|interface| interface.layer == LinkLayer::Loopback))
}

#[cfg(test)]
mod tests {
    use super::super::network::Vlan;
    use super::*;

    const LO: u32 = 1;
    const ETH0: u32 = 2;
    const ETH1: u32 = 3;
    const ETH0_10: u32 = 4;

    fn interfaces() -> BTreeMap<u32, Interface> {
        let make = |index, name: &str, layer, vlan| Interface {
            index,
            name: name.into(),
            layer,
            mac: [2, 0, 0, 0, 0, index as u8],
            mtu: 1500,
            up: true,
            vlan,
            controller: None,
            lower: None,
            xdp: None,
        };
        let vlan = Some(Vlan { parent: ETH0, id: 10, service_tag: false });
        [
            make(LO, "lo", LinkLayer::Loopback, None),
            make(ETH0, "eth0", LinkLayer::Ethernet, None),
            make(ETH1, "eth1", LinkLayer::Ethernet, None),
            make(ETH0_10, "eth0.10", LinkLayer::Ethernet, vlan),
        ]
        .into_iter()
        .map(|interface| (interface.index, interface))
        .collect()
    }

    fn present(list: &[(&str, u32, u8)]) -> Addresses {
        let mut addresses = Addresses::new();
        for (address, ifindex, prefix_len) in list {
            let place = LocalAddress { ifindex: *ifindex, prefix_len: *prefix_len };
            addresses.entry(address.parse().unwrap()).or_default().insert(place);
        }
        addresses
    }

    fn set(list: &[&str]) -> BTreeSet<IpAddr> {
        list.iter().map(|address| address.parse().unwrap()).collect()
    }

    fn owned(list: &[(&str, u32, &str)]) -> Owned {
        let place =
            |ifindex: &u32, name: &&str| Place { ifindex: *ifindex, interface: (*name).into() };
        list.iter().map(|(address, i, name)| (address.parse().unwrap(), place(i, name))).collect()
    }

    /// (forget, remove, add) of the plan, with eth0 attached.
    fn planned(
        owned: &Owned,
        wanted: &[&str],
        present: &Addresses,
    ) -> (Vec<String>, Vec<String>, Vec<(String, u32)>) {
        let interfaces = interfaces();
        let plan = plan(owned, &set(wanted), &[ETH0], present, &interfaces);
        (
            plan.forget.iter().map(ToString::to_string).collect(),
            plan.remove.iter().map(ToString::to_string).collect(),
            plan.add.iter().map(|(address, i)| (address.to_string(), i.index)).collect(),
        )
    }

    fn added(wanted: &str, present: &Addresses) -> u32 {
        planned(&Owned::new(), &[wanted], present).2[0].1
    }

    #[test]
    fn an_address_goes_where_its_subnet_is() {
        let present = present(&[
            ("127.0.0.1", LO, 8),
            ("10.0.0.1", ETH0, 8),
            ("10.1.0.1", ETH0_10, 16),
            ("172.16.0.1", ETH1, 16),
            ("2001:db8::1", ETH0, 64),
        ]);
        assert_eq!(added("10.0.0.100", &present), ETH0);
        assert_eq!(added("10.1.0.100", &present), ETH0_10, "the longest prefix");
        assert_eq!(added("2001:db8::100", &present), ETH0);
        assert_eq!(added("172.16.0.100", &present), LO, "eth1 is not attached");
        assert_eq!(added("192.0.2.1", &present), LO);
    }

    #[test]
    fn what_was_there_is_neither_taken_over_nor_removed() {
        let present = present(&[("10.0.0.100", ETH0, 32), ("10.0.0.1", ETH0, 24)]);
        let nothing = (vec![], vec![], vec![]);
        assert_eq!(planned(&Owned::new(), &["10.0.0.100"], &present), nothing);
        assert_eq!(planned(&Owned::new(), &[], &present), nothing);
    }

    #[test]
    fn ours_is_kept_while_wanted_and_removed_after() {
        let owned = owned(&[("10.0.0.100", ETH0, "eth0")]);
        let present = present(&[("10.0.0.100", ETH0, 32), ("10.0.0.1", ETH0, 24)]);
        assert_eq!(planned(&owned, &["10.0.0.100"], &present), (vec![], vec![], vec![]));
        let expected = (vec![], vec!["10.0.0.100".to_owned()], vec![]);
        assert_eq!(planned(&owned, &[], &present), expected);
    }

    #[test]
    fn what_somebody_removed_is_added_anew_and_never_removed_twice() {
        let owned = owned(&[("10.0.0.100", ETH0, "eth0")]);
        let present = present(&[("10.0.0.1", ETH0, 24)]);
        let address = "10.0.0.100".to_owned();
        let expected = (vec![address.clone()], vec![], vec![(address.clone(), ETH0)]);
        assert_eq!(planned(&owned, &["10.0.0.100"], &present), expected);
        assert_eq!(planned(&owned, &[], &present), (vec![address], vec![], vec![]));
    }

    #[test]
    fn an_address_that_somebody_put_elsewhere_is_theirs() {
        let owned = owned(&[("10.0.0.100", ETH0, "eth0")]);
        for there in [("10.0.0.100", ETH1, 32), ("10.0.0.100", ETH0, 24)] {
            let expected = (vec!["10.0.0.100".to_owned()], vec![], vec![]);
            assert_eq!(planned(&owned, &["10.0.0.100"], &present(&[there])), expected);
        }
    }

    #[test]
    fn another_interface_with_the_same_index_is_not_where_we_put_it() {
        let owned = owned(&[("10.0.0.100", ETH0, "wlan0")]);
        let present = present(&[("10.0.0.100", ETH0, 32)]);
        assert_eq!(planned(&owned, &[], &present), (vec!["10.0.0.100".to_owned()], vec![], vec![]));
    }

    #[test]
    fn an_address_moves_from_loopback_once_its_subnet_appears() {
        let owned = owned(&[("10.0.0.100", LO, "lo")]);
        let before = present(&[("10.0.0.100", LO, 32)]);
        assert_eq!(planned(&owned, &["10.0.0.100"], &before), (vec![], vec![], vec![]));
        let after = present(&[("10.0.0.100", LO, 32), ("10.0.0.1", ETH0, 24)]);
        let address = "10.0.0.100".to_owned();
        let expected = (vec![], vec![address.clone()], vec![(address, ETH0)]);
        assert_eq!(planned(&owned, &["10.0.0.100"], &after), expected);
    }

    #[test]
    fn an_address_stays_while_its_subnet_is_away() {
        let owned = owned(&[("10.0.0.100", ETH0, "eth0")]);
        let present = present(&[("10.0.0.100", ETH0, 32)]);
        assert_eq!(planned(&owned, &["10.0.0.100"], &present), (vec![], vec![], vec![]));
    }
}
