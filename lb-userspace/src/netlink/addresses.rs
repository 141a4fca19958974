//! Reading local addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use futures::TryStreamExt as _;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::Handle;

use super::io_error;
use super::network::LocalAddress;

pub(super) type Addresses = BTreeMap<IpAddr, BTreeSet<LocalAddress>>;

pub(super) async fn read(handle: &Handle) -> io::Result<Addresses> {
    let mut messages = handle.address().get().execute().map_err(io_error);
    let mut addresses = Addresses::new();
    while let Some(message) = messages.try_next().await? {
        if let Some(address) = address_of(&message) {
            addresses.entry(address).or_default().insert(LocalAddress {
                ifindex: message.header.index,
                prefix_len: message.header.prefix_len,
            });
        }
    }
    Ok(addresses)
}

/// On a point-to-point link IFA_ADDRESS is the peer's; IFA_LOCAL, where present, is always ours.
fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_of_a_point_to_point_link_is_not_local() {
        let ours = IpAddr::from([10, 0, 0, 1]);
        let mut message = AddressMessage::default();
        message.attributes = vec![
            AddressAttribute::Address(IpAddr::from([10, 0, 0, 2])),
            AddressAttribute::Local(ours),
        ];
        assert_eq!(address_of(&message), Some(ours));
    }

    #[test]
    fn ipv6_has_only_the_address() {
        let ours: IpAddr = "2001:db8::1".parse().unwrap();
        let mut message = AddressMessage::default();
        message.attributes = vec![AddressAttribute::Address(ours)];
        assert_eq!(address_of(&message), Some(ours));
    }
}
