//! The room against the kernel, in network namespaces of its own. Needs root.

mod harness;

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::*;
use harness::*;

const PATIENCE: Duration = Duration::from_secs(15);

fn set(list: &[&str]) -> BTreeSet<IpAddr> {
    list.iter().map(|address| address.parse().unwrap()).collect()
}

const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];

#[test]
fn the_first_snapshot_has_links_and_addresses() {
    on_segment(async |_neighbour| {
        let mut observer = Observer::start();
        let network = observer.until(|n| n.interface_named("eth0").is_some_and(|i| i.up)).await;
        let eth0 = network.interface_named("eth0").unwrap();
        assert_eq!(eth0.mac, [2, 0, 0, 0, 0, 1]);
        assert_eq!((eth0.mtu, eth0.layer), (1500, LinkLayer::Ethernet));
        assert_eq!((eth0.vlan, eth0.xdp), (None, None));
        assert_eq!(network.interface_named("lo").unwrap().layer, LinkLayer::Loopback);
        let at = |address: &str| &network.addresses[&address.parse::<IpAddr>().unwrap()];
        let place = |prefix_len| BTreeSet::from([LocalAddress { ifindex: eth0.index, prefix_len }]);
        assert_eq!(*at("10.0.0.1"), place(24));
        assert_eq!(*at("2001:db8::1"), place(64));
        assert_eq!(read_interfaces().await.unwrap(), network.interfaces);
    });
}

#[test]
fn changes_are_followed() {
    on_segment(async |_neighbour| {
        let mut observer = Observer::start();
        observer.snapshot().await;
        let address: IpAddr = "10.9.0.1".parse().unwrap();
        ip("address add 10.9.0.1/16 dev eth0");
        observer.until(|network| network.addresses.contains_key(&address)).await;
        ip("address del 10.9.0.1/16 dev eth0");
        observer.until(|network| !network.addresses.contains_key(&address)).await;
        ip("link set eth0 mtu 1400");
        observer.until(|network| network.interface_named("eth0").unwrap().mtu == 1400).await;
        ip("link delete eth0");
        observer.until(|network| network.interface_named("eth0").is_none()).await;
    });
}

#[test]
fn neighbours_are_resolved_and_their_moves_followed() {
    on_segment(async |neighbour| {
        let mut observer = Observer::start();
        observer.netlink.want(set(&["10.0.0.2", "2001:db8::2", "10.0.0.1", "192.0.2.1"]));
        observer.unresolved("10.0.0.1", Unresolved::Local).await;
        let next_hop = observer.resolved_to("2001:db8::2", PEER).await;
        assert_eq!(next_hop.source_mac, [2, 0, 0, 0, 0, 1]);
        assert_eq!((next_hop.vlan, next_hop.mtu), (None, 1500));

        ip("route add default via 10.0.0.2 mtu 1300");
        let behind_gateway = observer.resolved_to("192.0.2.1", PEER).await;
        assert_eq!(behind_gateway.mtu, 1300);

        let moved = [2, 0, 0, 0, 0, 9];
        neighbour.ip("link set peer0 address 02:00:00:00:00:09");
        // Any packet of the peer's tells; a peer that stays silent is found by verification.
        neighbour.ip("neighbour flush dev peer0");
        neighbour.run(|| {
            let socket = std::net::UdpSocket::bind("10.0.0.2:0").unwrap();
            socket.send_to(b"x", "10.0.0.1:9").unwrap();
        });
        observer.resolved_to("192.0.2.1", moved).await;

        ip("route del default");
        observer.unresolved("192.0.2.1", Unresolved::NoRoute).await;
        ip("route add 192.0.2.0/24 via inet6 2001:db8::2");
        observer.resolved_to("192.0.2.1", PEER).await;
    });
}

#[test]
fn a_link_without_carrier_resolves_nothing() {
    on_segment(async |neighbour| {
        let mut observer = Observer::start();
        observer.netlink.want(set(&["10.0.0.2"]));
        let ifindex = observer.resolved_to("10.0.0.2", PEER).await.ifindex;
        neighbour.ip("link set peer0 down");
        observer.unresolved("10.0.0.2", Unresolved::LinkDown { ifindex }).await;
        neighbour.ip("link set peer0 up");
        observer.resolved_to("10.0.0.2", PEER).await;
        ip("link set eth0 down");
        observer.unresolved("10.0.0.2", Unresolved::NoRoute).await;
    });
}

#[test]
fn a_silent_neighbour_is_named_and_found_once_it_speaks() {
    on_segment(async |neighbour| {
        let mut observer = Observer::start();
        observer.netlink.want(set(&["10.0.0.3"]));
        let address: IpAddr = "10.0.0.3".parse().unwrap();
        let ifindex = eth0();
        observer.unresolved("10.0.0.3", Unresolved::NoNeighbour { address, ifindex }).await;
        neighbour.ip("address add 10.0.0.3/24 dev peer0");
        observer.resolved_to("10.0.0.3", PEER).await;
    });
}

#[test]
fn verification_finds_a_neighbour_that_moved_in_silence() {
    on_segment(async |_neighbour| {
        let settings = Path::new("/proc/sys/net/ipv4/neigh/eth0");
        fs::write(settings.join("delay_first_probe_time"), "1").unwrap();
        fs::write(settings.join("retrans_time_ms"), "100").unwrap();
        let mut observer = Observer::start();
        observer.netlink.want(set(&["10.0.0.2"]));
        let ifindex = observer.resolved_to("10.0.0.2", PEER).await.ifindex;
        ip("neighbour replace 10.0.0.2 lladdr 02:00:00:00:00:ff nud stale dev eth0");
        observer.resolved_to("10.0.0.2", [2, 0, 0, 0, 0, 0xff]).await;

        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        let address = "10.0.0.2".parse().unwrap();
        next_hops::poke(&handle, next_hops::NeighbourKey { ifindex, address }).await.unwrap();
        observer.resolved_to("10.0.0.2", PEER).await;
    });
}

#[test]
fn an_unwanted_destination_is_resolved_on_request() {
    on_segment(async |_neighbour| {
        let mut observer = Observer::start();
        observer.until(|n| n.interface_named("eth0").is_some_and(|i| i.up)).await;
        ip("route add default via 10.0.0.2");
        observer.netlink.resolve_now("192.0.2.1".parse().unwrap());
        let resolved = || {
            let output = Command::new("ip").args(["neighbour", "show", "10.0.0.2"]).output();
            String::from_utf8(output.unwrap().stdout).unwrap().contains("02:00:00:00:00:02")
        };
        let deadline = Instant::now() + PATIENCE;
        while !resolved() {
            assert!(Instant::now() < deadline, "the gateway was not resolved");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
}

#[test]
fn changes_of_no_wanted_destination_are_told_too() {
    on_segment(async |_neighbour| {
        let mut observer = Observer::start();
        let first = observer.until(|n| n.interface_named("eth0").is_some_and(|i| i.up)).await;
        // Let what the machine's making set off pass.
        while timeout(Duration::from_millis(500), observer.events.recv()).await.is_ok() {}
        ip("route add 198.51.100.0/24 via 10.0.0.2");
        let event = timeout(PATIENCE, observer.events.recv()).await.unwrap();
        assert!(matches!(event, Some(NetworkEvent::RoutesChanged)), "{event:?}");
        let quiet = timeout(Duration::from_millis(200), observer.events.recv()).await;
        assert!(quiet.is_err(), "the picture is the same: {quiet:?} after {first:?}");
    });
}

#[test]
fn a_thousand_destinations_behind_one_gateway() {
    on_segment(async |_neighbour| {
        ip("route add default via 10.0.0.2");
        let mut observer = Observer::start();
        let destinations: BTreeSet<IpAddr> =
            (0..1000_u16).map(|i| IpAddr::from([192, 0, (i >> 8) as u8, i as u8])).collect();
        observer.netlink.want(destinations);
        let complete = |network: &Network| {
            network.next_hops.len() == 1000 && network.next_hops.values().all(Result::is_ok)
        };
        observer.until(complete).await;
        let start = Instant::now();
        ip("route change default via 10.0.0.2 mtu 1300");
        let mtu = |network: &Network| {
            network.next_hops.values().all(|hop| hop.is_ok_and(|hop| hop.mtu == 1300))
        };
        observer.until(mtu).await;
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    });
}

fn eth0() -> u32 {
    nix::net::if_::if_nametoindex("eth0").unwrap()
}

/// What `ip -oneline address show` says about `address`; empty: it is not there.
fn shown(address: &str) -> String {
    let output = Command::new("ip").args(["-oneline", "address", "show"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter(|line| line.contains(&format!(" {address}/"))).collect()
}

async fn reconcile(manager: &mut AddressManager, wanted: &[&str]) {
    let errors = manager.reconcile(&set(wanted), &[eth0()]).await.unwrap();
    assert!(errors.is_empty(), "{errors:?}");
}

#[test]
fn addresses_are_added_adopted_and_removed_exactly() {
    on_segment(async |_neighbour| {
        let state = tempfile::tempdir().unwrap();
        let all = ["10.0.0.100", "2001:db8::100", "192.0.2.1", "10.0.0.50"];
        ip("address add 10.0.0.50/32 dev eth0");

        let mut manager = AddressManager::new(state.path()).unwrap();
        reconcile(&mut manager, &all).await;
        assert!(shown("10.0.0.100").contains("eth0    inet 10.0.0.100/32"));
        let v6 = shown("2001:db8::100");
        assert!(v6.contains("eth0    inet6 2001:db8::100/128"), "{v6}");
        assert!(v6.contains("deprecated") && v6.contains("nodad"), "{v6}");
        assert!(!v6.contains("tentative"), "{v6}");
        assert!(shown("192.0.2.1").contains("lo    inet 192.0.2.1/32"));
        assert_eq!(manager.owned(), set(&["10.0.0.100", "2001:db8::100", "192.0.2.1"]));

        // Killed: nothing is released. The next one adopts and removes what is not wanted.
        drop(manager);
        let mut manager = AddressManager::new(state.path()).unwrap();
        reconcile(&mut manager, &["10.0.0.100", "10.0.0.50"]).await;
        assert_eq!(manager.owned(), set(&["10.0.0.100"]));
        assert_eq!((shown("2001:db8::100"), shown("192.0.2.1")), (String::new(), String::new()));

        // Removed by somebody: added anew.
        ip("address del 10.0.0.100/32 dev eth0");
        reconcile(&mut manager, &["10.0.0.100", "10.0.0.50"]).await;
        assert_ne!(shown("10.0.0.100"), "");

        assert!(manager.release().await.unwrap().is_empty());
        assert_eq!(shown("10.0.0.100"), "");
        assert_ne!(shown("10.0.0.50"), "", "it was there before us");
        assert_ne!(shown("10.0.0.1"), "");
        assert_eq!(fs::read_dir(state.path()).unwrap().count(), 0, "nothing is left to note");
    });
}

#[test]
fn an_interface_that_returns_gets_its_address_back() {
    on_segment(async |_neighbour| {
        let state = tempfile::tempdir().unwrap();
        let mut manager = AddressManager::new(state.path()).unwrap();
        reconcile(&mut manager, &["10.0.0.100"]).await;
        ip("link delete eth0");
        ip("link add eth0 type veth peer name peer0");
        ip("address add 10.0.0.1/24 dev eth0");
        reconcile(&mut manager, &["10.0.0.100"]).await;
        assert!(shown("10.0.0.100").contains("eth0"));
        assert!(manager.release().await.unwrap().is_empty());
    });
}

#[test]
fn a_failure_is_told_by_address_and_the_others_are_added() {
    on_segment(async |_neighbour| {
        let state = tempfile::tempdir().unwrap();
        let mut manager = AddressManager::new(state.path()).unwrap();
        let wanted = set(&["ff02::5", "10.0.0.100"]);
        let errors = manager.reconcile(&wanted, &[eth0()]).await.unwrap();
        let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(texts.len(), 1, "{texts:?}");
        assert!(texts[0].starts_with("address ff02::5: adding it to "), "{texts:?}");
        assert_eq!(manager.owned(), set(&["10.0.0.100"]));
    });
}

#[test]
fn new_addresses_are_announced() {
    on_segment(async |neighbour| {
        let state = tempfile::tempdir().unwrap();
        let mut observer = Observer::start();
        observer.until(|n| n.interface_named("eth0").is_some_and(|i| i.up)).await;
        let capture = neighbour.capture();
        let mut manager = AddressManager::new(state.path()).unwrap();
        reconcile(&mut manager, &["10.0.0.100", "2001:db8::100", "192.0.2.1"]).await;
        let seen = tokio::task::spawn_blocking(move || {
            let arp: Vec<u8> =
                [&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1][..], &[2, 0, 0, 0, 0, 1], &[10, 0, 0, 100]]
                    .concat();
            let first = capture.expect("gratuitous ARP", &arp);
            let header = [0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255];
            let source: std::net::Ipv6Addr = "2001:db8::100".parse().unwrap();
            let advertisement = [&header[..], &source.octets()].concat();
            capture.expect("neighbour advertisement", &advertisement);
            capture.expect("second gratuitous ARP", &arp);
            first
        });
        let arp = seen.await.unwrap();
        assert_eq!(arp[..6], [0xff; 6]);
        assert_eq!(arp[38..42], [10, 0, 0, 100]);
        assert!(manager.release().await.unwrap().is_empty());
    });
}

#[test]
fn what_is_on_an_interface_is_announced_when_its_mac_changes() {
    on_segment(async |neighbour| {
        let state = tempfile::tempdir().unwrap();
        let mut observer = Observer::start();
        observer.until(|n| n.interface_named("eth0").is_some_and(|i| i.up)).await;
        let mut manager = AddressManager::new(state.path()).unwrap();
        reconcile(&mut manager, &["10.0.0.100"]).await;
        let capture = neighbour.capture();
        ip("link set eth0 address 02:00:00:00:00:77");
        reconcile(&mut manager, &["10.0.0.100"]).await;
        let seen = tokio::task::spawn_blocking(move || {
            let new = [2, 0, 0, 0, 0, 0x77];
            let arp = [&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1][..], &new, &[10, 0, 0, 100]].concat();
            capture.expect("gratuitous ARP", &arp);
        });
        seen.await.unwrap();
        assert!(manager.release().await.unwrap().is_empty());
    });
}

#[test]
fn vlan_stripping_is_turned_off_and_restored() {
    on_segment(async |_neighbour| {
        let state = tempfile::tempdir().unwrap();
        let interfaces = read_interfaces().await.unwrap();
        let (lo, eth0) = (&interfaces[&1], &interfaces[&eth0()]);
        let mut offload = VlanOffload::new(state.path()).unwrap();
        assert_eq!(offload.turn_off(eth0).unwrap(), VlanStripping::TurnedOff);

        // Killed and started again: still ours, and restored by the second.
        drop(offload);
        let mut offload = VlanOffload::new(state.path()).unwrap();
        assert_eq!(offload.turn_off(eth0).unwrap(), VlanStripping::TurnedOff);
        offload.restore_all_but(&[eth0.index]).unwrap();
        assert_eq!(offload.turn_off(eth0).unwrap(), VlanStripping::TurnedOff);
        offload.restore().unwrap();
        assert_eq!(fs::read_dir(state.path()).unwrap().count(), 0);

        // It was on again: turning it off is a change once more.
        let mut offload = VlanOffload::new(state.path()).unwrap();
        assert_eq!(offload.turn_off(eth0).unwrap(), VlanStripping::TurnedOff);
        assert_eq!(offload.turn_off(lo).unwrap(), VlanStripping::AlreadyOff);
        offload.restore().unwrap();
    });
}

#[test]
fn forwarding_is_read_in_the_own_namespace() {
    on_segment(async |_neighbour| {
        let missing = || missing_forwarding("eth0", IpFamily::V4).unwrap();
        fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        assert_eq!(missing().as_deref(), Some("net.ipv4.ip_forward"));
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        assert_eq!(missing(), None);
    });
}
