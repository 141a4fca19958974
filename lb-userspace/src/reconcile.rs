//! From what is to what should be: an ordered plan of writes. Pure.
//!
//! The order is the whole point. Whatever a packet meets halfway through a plan must be complete:
//! a listener is shown only when its ring, its targets, its security groups and the way back of
//! its replies are there, and is hidden before any of them goes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use lb_common::load::Share;
use lb_common::snat::SnatSource;
use lb_common::tables::{Endpoint, EndpointKey, Interface, Listener, Slot, Target};
use lb_common::wire::Address;
use lb_common::wire::eth::OwnMac;

/// A source prefix; bits count from the first of the 128, so `10.0.0.0/8` has 104.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Prefix {
    /// The network's address.
    pub address: Address,
    /// Length, 0 to 128.
    pub bits: u8,
}

/// Everything the kernel's tables should hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// NICs and VLAN devices that packets leave by, by index.
    pub interfaces: BTreeMap<u32, Interface>,
    /// NICs that packets may be redirected to.
    pub devices: BTreeSet<u32>,
    /// NICs' own addresses, by place ([`NIC_PLACES`](lb_common::tables::NIC_PLACES)).
    pub own_macs: BTreeMap<u32, OwnMac>,
    /// Targets by index.
    pub targets: BTreeMap<u32, Target>,
    /// What targets are due that are chosen by their connections, by index.
    pub shares: BTreeMap<u32, Share>,
    /// Listeners by index.
    pub listeners: BTreeMap<u32, Listener>,
    /// Rings by number.
    pub rings: BTreeMap<u32, Arc<[Slot]>>,
    /// Admission classes by number.
    pub classes: BTreeMap<u32, Arc<BTreeSet<Prefix>>>,
    /// Listeners, targets and addresses as packets find them.
    pub endpoints: BTreeMap<EndpointKey, Endpoint>,
    /// Addresses that packets to targets come from, by `target * MAX_SNAT_ADDRESSES + number`.
    pub sources: BTreeMap<u32, SnatSource>,
    /// Pools of their ports by number; where the search for a port begins, counted from the first.
    pub pools: BTreeMap<u32, u16>,
}

/// Writes, to be carried out in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The writes.
    pub steps: Vec<Step>,
}

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the variants are the documentation")]
pub enum Step {
    SetInterface(u32, Interface),
    RemoveInterface(u32),
    AddDevice(u32),
    RemoveDevice(u32),
    SetOwnMac(u32, OwnMac),
    ForgetOwnMac(u32),
    SetTarget(u32, Target),
    ClearTarget(u32),
    SetShare(u32, Share),
    ClearShare(u32),
    SetListener(u32, Listener),
    ClearListener(u32),
    SetRing(u32, Arc<[Slot]>),
    AddPrefix(u32, Prefix),
    RemovePrefix(u32, Prefix),
    SetEndpoint(Endpoint),
    RemoveEndpoint(EndpointKey),
    SetSource(u32, SnatSource),
    ClearSource(u32),
    ResetPool(u32, u16),
}

/// The plan that turns `from` into `to`.
pub fn diff(from: &Desired, to: &Desired) -> Plan {
    let mut steps = Vec::new();

    // A NIC that has another address now must not refuse its frames for a moment longer.
    steps.extend(changed(&from.own_macs, &to.own_macs).map(|(i, new)| Step::SetOwnMac(i, *new)));
    steps.extend(removed(&from.own_macs, &to.own_macs).map(Step::ForgetOwnMac));

    // What listeners lean on, before them.
    steps.extend(
        changed(&from.interfaces, &to.interfaces).map(|(i, new)| Step::SetInterface(i, *new)),
    );
    steps.extend(to.devices.difference(&from.devices).copied().map(Step::AddDevice));
    steps.extend(changed(&from.pools, &to.pools).map(|(n, start)| Step::ResetPool(n, *start)));
    steps.extend(changed(&from.sources, &to.sources).map(|(i, new)| Step::SetSource(i, *new)));
    steps.extend(changed(&from.targets, &to.targets).map(|(i, new)| Step::SetTarget(i, *new)));
    steps.extend(changed(&from.shares, &to.shares).map(|(i, new)| Step::SetShare(i, *new)));
    steps
        .extend(changed(&from.listeners, &to.listeners).map(|(i, new)| Step::SetListener(i, *new)));
    for (class, prefixes) in changed_shared(&from.classes, &to.classes) {
        let old = from.classes.get(&class).map(|old| &**old).unwrap_or(&EMPTY);
        steps.extend(prefixes.difference(old).map(|prefix| Step::AddPrefix(class, *prefix)));
    }
    steps.extend(
        changed_shared(&from.rings, &to.rings).map(|(ring, s)| Step::SetRing(ring, s.clone())),
    );

    // The way back before the way there; the way there is hidden before the way back.
    let (there, back): (Vec<_>, Vec<_>) =
        changed(&from.endpoints, &to.endpoints).partition(|(_, new)| leads_there(new));
    steps.extend(back.into_iter().chain(there).map(|(_, new)| Step::SetEndpoint(*new)));
    let gone = from.endpoints.iter().filter(|(key, _)| !to.endpoints.contains_key(key));
    let (there, back): (Vec<_>, Vec<_>) = gone.partition(|(_, old)| leads_there(old));
    steps.extend(there.into_iter().chain(back).map(|(key, _)| Step::RemoveEndpoint(*key)));

    // What nothing leans on any more. A ring that no listener names needs no clearing.
    for (class, prefixes) in &from.classes {
        let new = to.classes.get(class).map(|new| &**new).unwrap_or(&EMPTY);
        steps.extend(prefixes.difference(new).map(|prefix| Step::RemovePrefix(*class, *prefix)));
    }
    steps.extend(removed(&from.listeners, &to.listeners).map(Step::ClearListener));
    steps.extend(removed(&from.shares, &to.shares).map(Step::ClearShare));
    steps.extend(removed(&from.targets, &to.targets).map(Step::ClearTarget));
    steps.extend(removed(&from.sources, &to.sources).map(Step::ClearSource));
    steps.extend(from.devices.difference(&to.devices).copied().map(Step::RemoveDevice));
    steps.extend(removed(&from.interfaces, &to.interfaces).map(Step::RemoveInterface));
    Plan { steps }
}

static EMPTY: BTreeSet<Prefix> = BTreeSet::new();

fn leads_there(endpoint: &Endpoint) -> bool {
    matches!(endpoint.kind(), Endpoint::LISTENER | Endpoint::GUARD)
}

fn changed<'a, K: Ord + Copy, V: PartialEq>(
    from: &'a BTreeMap<K, V>,
    to: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (K, &'a V)> {
    to.iter().filter(|(key, new)| from.get(key) != Some(new)).map(|(key, new)| (*key, new))
}

/// Like [`changed`], without comparing what is the same memory.
fn changed_shared<'a, V: PartialEq + ?Sized>(
    from: &'a BTreeMap<u32, Arc<V>>,
    to: &'a BTreeMap<u32, Arc<V>>,
) -> impl Iterator<Item = (u32, &'a Arc<V>)> {
    to.iter()
        .filter(|(key, new)| from.get(key).is_none_or(|old| !Arc::ptr_eq(old, new) && old != *new))
        .map(|(key, new)| (*key, new))
}

fn removed<V>(from: &BTreeMap<u32, V>, to: &BTreeMap<u32, V>) -> impl Iterator<Item = u32> {
    from.keys().filter(|key| !to.contains_key(key)).copied()
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetInterface(index, _) => write!(f, "interface {index}"),
            Self::RemoveInterface(index) => write!(f, "no interface {index}"),
            Self::AddDevice(index) => write!(f, "device {index}"),
            Self::RemoveDevice(index) => write!(f, "no device {index}"),
            Self::SetOwnMac(place, _) => write!(f, "own address of the NIC in place {place}"),
            Self::ForgetOwnMac(place) => write!(f, "no own address in place {place}"),
            Self::SetTarget(index, target) => write!(f, "target {index} at {:?}", target.address),
            Self::ClearTarget(index) => write!(f, "no target {index}"),
            Self::SetShare(index, share) => write!(f, "share {} of target {index}", share.weight),
            Self::ClearShare(index) => write!(f, "no share of target {index}"),
            Self::SetListener(index, listener) => {
                write!(f, "listener {index} at {:?} port {}", listener.address, listener.port.get())
            }
            Self::ClearListener(index) => write!(f, "no listener {index}"),
            Self::SetRing(ring, slots) => write!(f, "ring {ring} of {} slots", slots.len()),
            Self::AddPrefix(class, prefix) => {
                write!(f, "class {class} admits {:?} ({} bits)", prefix.address, prefix.bits)
            }
            Self::RemovePrefix(class, prefix) => {
                write!(f, "class {class} no longer admits {:?}", prefix.address)
            }
            Self::SetEndpoint(endpoint) => {
                write!(f, "endpoint {:?} port {}", endpoint.address, endpoint.port.get())
            }
            Self::SetSource(index, source) => write!(
                f,
                "source {index}: {:?} ports {}-{}, pool {}",
                source.address, source.first, source.last, source.pool
            ),
            Self::ClearSource(index) => write!(f, "no source {index}"),
            Self::ResetPool(number, start) => write!(f, "pool {number} from {start} on"),
            Self::RemoveEndpoint(key) => {
                write!(f, "no endpoint {:?} port {}", key.address, key.port.get())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use lb_common::flow::TCP;
    use lb_common::snat::MAX_SNAT_ADDRESSES;
    use lb_common::wire::Be16;
    use proptest::prelude::*;

    use super::*;

    /// The kernel's tables, and after each step what a packet could meet.
    #[derive(Debug, Default)]
    struct Kernel {
        tables: Desired,
    }

    impl Kernel {
        fn apply(&mut self, step: &Step) {
            let tables = &mut self.tables;
            match step.clone() {
                Step::SetInterface(index, interface) => {
                    tables.interfaces.insert(index, interface);
                }
                Step::RemoveInterface(index) => {
                    tables.interfaces.remove(&index).expect("an interface to remove");
                }
                Step::SetOwnMac(place, mac) => {
                    tables.own_macs.insert(place, mac);
                }
                Step::ForgetOwnMac(place) => {
                    tables.own_macs.remove(&place).expect("an address to forget");
                }
                Step::AddDevice(index) => assert!(tables.devices.insert(index)),
                Step::RemoveDevice(index) => assert!(tables.devices.remove(&index)),
                Step::SetTarget(index, target) => {
                    tables.targets.insert(index, target);
                }
                Step::ClearTarget(index) => {
                    tables.targets.remove(&index).expect("a target to clear");
                }
                Step::SetShare(index, share) => {
                    assert!(tables.targets.contains_key(&index), "a share of no target");
                    tables.shares.insert(index, share);
                }
                Step::ClearShare(index) => {
                    tables.shares.remove(&index).expect("a share to clear");
                }
                Step::SetListener(index, listener) => {
                    tables.listeners.insert(index, listener);
                }
                Step::ClearListener(index) => {
                    tables.listeners.remove(&index).expect("a listener to clear");
                }
                Step::SetRing(ring, slots) => {
                    tables.rings.insert(ring, slots);
                }
                Step::AddPrefix(class, prefix) => {
                    let prefixes = tables.classes.entry(class).or_default();
                    assert!(Arc::make_mut(prefixes).insert(prefix));
                }
                Step::RemovePrefix(class, prefix) => {
                    let prefixes = tables.classes.get_mut(&class).expect("a class");
                    assert!(Arc::make_mut(prefixes).remove(&prefix));
                    if prefixes.is_empty() {
                        tables.classes.remove(&class);
                    }
                }
                Step::SetEndpoint(endpoint) => {
                    tables.endpoints.insert(endpoint.key(), endpoint);
                }
                Step::RemoveEndpoint(key) => {
                    tables.endpoints.remove(&key).expect("an endpoint to remove");
                }
                Step::SetSource(index, source) => {
                    assert!(tables.pools.contains_key(&source.pool), "a pool before its source");
                    tables.sources.insert(index, source);
                }
                Step::ClearSource(index) => {
                    tables.sources.remove(&index).expect("a source to clear");
                }
                Step::ResetPool(number, start) => {
                    tables.pools.insert(number, start);
                }
            }
        }

        /// Whatever a listener leads to is there.
        fn assert_complete(&self) {
            for endpoint in self.tables.endpoints.values() {
                if endpoint.kind() == Endpoint::LISTENER {
                    let ring = &self.tables.rings[&endpoint.index];
                    for slot in ring.iter() {
                        let target = &self.tables.targets[&slot.current];
                        let back = EndpointKey::new(target.address, target.port, TCP);
                        assert!(self.tables.endpoints.contains_key(&back), "no way back");
                    }
                    assert!(self.tables.listeners.contains_key(&endpoint.listener));
                    assert!(self.tables.classes.contains_key(&endpoint.class));
                }
            }
        }
    }

    /// A consistent set of tables, made from a few numbers.
    fn tables() -> impl Strategy<Value = Desired> {
        let listener = (1_u32..6, prop::collection::btree_set(1_u32..9, 1..4), 1_u32..4);
        prop::collection::vec((listener, 0_u16..4), 0..4).prop_map(|listeners| {
            let mut desired = Desired::default();
            for ((index, targets, class), hop) in listeners {
                desired.devices.insert(u32::from(hop) + 1);
                desired.interfaces.insert(u32::from(hop) + 1, Interface::default());
                let mac = OwnMac::new([2, 0, 0, 0, index as u8, hop as u8]);
                desired.own_macs.insert(u32::from(hop) + 1, mac);
                let address = Ipv4Addr::new(10, 0, 0, index as u8).into();
                let port = Be16::new(80);
                desired.listeners.insert(index, Listener { address, port, ..Listener::default() });
                for target in &targets {
                    let address: Address = Ipv4Addr::new(10, 0, 1, *target as u8).into();
                    let entry =
                        Target { address, port: Be16::new(8000 + hop), ..Target::default() };
                    desired.targets.insert(*target, entry);
                    if hop % 2 == 0 {
                        let share = Share { weight: u32::from(hop) + 1, group: index };
                        desired.shares.insert(*target, share);
                    }
                    let source =
                        SnatSource { pool: target * 10 + u32::from(hop), ..SnatSource::default() };
                    desired.pools.insert(source.pool, 7);
                    desired.sources.insert(*target * MAX_SNAT_ADDRESSES, source);
                    let endpoint = Endpoint {
                        address,
                        port: Be16::new(8000 + hop),
                        protocol: TCP,
                        kind: Endpoint::TARGET,
                        listener: index,
                        index: *target,
                        class: 0,
                    };
                    desired.endpoints.insert(endpoint.key(), endpoint);
                }
                // Content and number of a ring or class belong together, as in the real thing.
                let ring = targets.iter().fold(index, |ring, target| ring << 4 | target);
                desired.rings.insert(ring, targets.iter().map(|t| Slot::settled(*t)).collect());
                let prefixes = (0..class).map(|n| Prefix {
                    address: Ipv4Addr::new(10, n as u8, 0, 0).into(),
                    bits: 112,
                });
                desired.classes.insert(class, Arc::new(prefixes.collect()));
                let endpoint = Endpoint {
                    address,
                    port,
                    protocol: TCP,
                    kind: Endpoint::LISTENER,
                    listener: index,
                    index: ring,
                    class,
                };
                desired.endpoints.insert(endpoint.key(), endpoint);
            }
            // A later listener may have given an earlier one's target another port.
            let ways: BTreeSet<_> = desired
                .targets
                .values()
                .map(|t| EndpointKey::new(t.address, t.port, TCP))
                .collect();
            desired.endpoints.retain(|key, e| e.kind() != Endpoint::TARGET || ways.contains(key));
            desired
        })
    }

    proptest! {
        #[test]
        fn any_sequence_of_changes_converges_without_a_gap(
            sequence in prop::collection::vec(tables(), 1..8),
        ) {
            let mut kernel = Kernel::default();
            let mut now = Desired::default();
            for next in sequence {
                // A target that changes its port in place has no way back for a moment: indices
                // belong to an (address, port) in the real thing.
                let moved = next.targets.iter().any(|(i, t)| now.targets.get(i).is_some_and(|o| o.port != t.port));
                for step in &diff(&now, &next).steps {
                    kernel.apply(step);
                    if !moved {
                        kernel.assert_complete();
                    }
                }
                now = next;
                // Rings that nobody names may stay.
                kernel.tables.rings.retain(|ring, _| now.rings.contains_key(ring));
                // So may pools without a source.
                kernel.tables.pools.retain(|pool, _| now.pools.contains_key(pool));
                prop_assert_eq!(&kernel.tables, &now);
                prop_assert!(diff(&now, &now).steps.is_empty());
            }
        }
    }
}
