//! The NICs' own addresses, by which frames for other machines are told.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::tables::NIC_PLACES;
use lb_common::wire::eth::OwnMac;

use crate::netlink::Interface;

/// The addresses of the attached NICs, by place.
///
/// A NIC that takes frames for other addresses too has none: those of a `macvlan` on it (as
/// keepalived makes for a virtual router), of a VLAN device, or of the bridge or bond that it is a
/// port of. Neither have NICs that share a place.
pub fn own_macs(
    interfaces: &BTreeMap<u32, Interface>,
    attached: &BTreeSet<u32>,
) -> BTreeMap<u32, OwnMac> {
    let mut macs = BTreeMap::new();
    let mut taken = BTreeSet::new();
    for nic in attached.iter().filter_map(|index| interfaces.get(index)) {
        let has_others = above(interfaces, nic).iter().any(|other| other.mac != nic.mac);
        let place = nic.index % NIC_PLACES;
        if !taken.insert(place) || has_others {
            macs.remove(&place);
        } else {
            macs.insert(place, OwnMac::new(nic.mac));
        }
    }
    macs
}

/// What takes frames that came by a NIC, devices on devices included.
fn above<'a>(interfaces: &'a BTreeMap<u32, Interface>, nic: &Interface) -> Vec<&'a Interface> {
    let mut known = BTreeSet::from([nic.index]);
    let mut found: Vec<&Interface> = Vec::new();
    loop {
        let takes_frames = |other: &&Interface| {
            let controls = |index| interfaces.get(&index).and_then(|it| it.controller);
            other.lower.is_some_and(|lower| known.contains(&lower))
                || known.iter().any(|index| controls(*index) == Some(other.index))
        };
        let next = interfaces.values().filter(|other| !known.contains(&other.index));
        let next: Vec<&Interface> = next.filter(takes_frames).collect();
        if next.is_empty() {
            return found;
        }
        known.extend(next.iter().map(|other| other.index));
        found.extend(next);
    }
}

#[cfg(test)]
mod tests {
    use crate::netlink::LinkLayer;

    use super::*;

    fn nic(index: u32) -> Interface {
        Interface {
            index,
            name: format!("eth{index}"),
            layer: LinkLayer::Ethernet,
            mac: mac(index),
            mtu: 1500,
            up: true,
            vlan: None,
            controller: None,
            lower: None,
            xdp: None,
        }
    }

    fn mac(index: u32) -> [u8; 6] {
        [2, 0, 0, 0, (index >> 8) as u8, index as u8]
    }

    /// The addresses, all of these NICs and only the first `attached` of them being attached.
    fn of(nics: &[Interface], attached: usize) -> BTreeMap<u32, OwnMac> {
        let indices = nics.iter().take(attached).map(|nic| nic.index).collect();
        own_macs(&nics.iter().map(|nic| (nic.index, nic.clone())).collect(), &indices)
    }

    #[test]
    fn an_attached_nic_has_its_address() {
        assert_eq!(of(&[nic(2), nic(300), nic(4)], 2), {
            BTreeMap::from([(2, OwnMac::new(mac(2))), (300 - 256, OwnMac::new(mac(300)))])
        });
    }

    #[test]
    fn what_takes_frames_for_other_addresses_has_none() {
        let on = |lower, mac| Interface { lower: Some(lower), mac, ..nic(9) };
        assert_eq!(of(&[nic(2), on(2, [0, 0, 0x5e, 0, 1, 51])], 1), BTreeMap::new());
        assert_eq!(of(&[nic(2), on(2, mac(2))], 1).len(), 1, "the same address");
        assert_eq!(of(&[nic(2), on(3, mac(9))], 1).len(), 1, "on another NIC");
        let port = Interface { controller: Some(9), ..nic(2) };
        assert_eq!(of(&[port.clone(), nic(9)], 1), BTreeMap::new());
        assert_eq!(of(&[port, Interface { mac: mac(2), ..nic(9) }], 1).len(), 1);
    }

    #[test]
    fn devices_on_devices_count() {
        let vlan = Interface { lower: Some(2), mac: mac(2), ..nic(9) };
        let router = Interface { lower: Some(9), mac: [0, 0, 0x5e, 0, 1, 51], ..nic(10) };
        assert_eq!(of(&[nic(2), vlan.clone()], 1).len(), 1);
        assert_eq!(of(&[nic(2), vlan, router.clone()], 1), BTreeMap::new());
        let port = Interface { controller: Some(9), ..nic(2) };
        let bridge = Interface { mac: mac(2), ..nic(9) };
        assert_eq!(of(&[port.clone(), bridge.clone()], 1).len(), 1);
        assert_eq!(of(&[port, bridge, router], 1), BTreeMap::new(), "on the bridge");
    }

    #[test]
    fn nics_that_share_a_place_have_none() {
        assert_eq!(of(&[nic(2), nic(258), nic(514), nic(3)], 4).len(), 1);
        let other = Interface { lower: Some(2), ..nic(9) };
        assert_eq!(of(&[nic(2), nic(258), other], 2), BTreeMap::new());
    }
}
