//! Listeners whose connections end in the agent's proxy, as the kernel's tables have them: packets
//! are admitted, counted and passed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use lb_common::flow::TCP;
use lb_common::tables::{Endpoint, EndpointKey, Listener};
use lb_common::wire::{Address, Be16};

use crate::config::{Config, LoadBalancer, Protocol, ProxyListener};
use crate::reconcile::{Desired, Prefix};

use super::desired::{Admission, Classes, admission};
use super::{ListenerKey, State, TargetKey};

/// Every listener of the proxy on every address of its load balancer, which comes with its name.
pub fn proxied_keys(
    config: &Config,
) -> impl Iterator<Item = (ListenerKey, &ProxyListener, &String, &LoadBalancer)> {
    config.load_balancers.iter().flat_map(|(name, balancer)| {
        balancer.proxied.iter().flat_map(move |listener| {
            balancer.addresses.iter().map(move |address| {
                let (protocol, port) = (Protocol::Tcp, listener.port);
                (ListenerKey { address: *address, protocol, port }, listener, name, balancer)
            })
        })
    })
}

impl State {
    /// Whether only the proxy opens connections to a target: no packet is forwarded to it.
    pub(super) fn is_proxied(&self, key: &TargetKey) -> bool {
        let name = &*key.target_group;
        self.used.contains(name) && !self.forwarded.contains(name)
    }

    /// Groups that packets are forwarded to.
    pub fn forwarded_groups(&self) -> &BTreeSet<String> {
        &self.forwarded
    }

    pub(super) fn put_proxied(&mut self, desired: &mut Desired, classes: &mut Classes) {
        let mut by_address: BTreeMap<IpAddr, Admission> = BTreeMap::new();
        let served = proxied_keys(&self.config)
            .map(|(key, _, balancer, _)| (admission(&self.admissions, &key, balancer), key));
        let ending = self.ending.iter().map(|(key, it)| (it.admission.as_ref(), key.clone()));
        for (admitted, key) in served.chain(ending) {
            let Some(number) = self.listeners.get(&key) else { continue };
            let (address, port) = (Address::from(key.address), Be16::new(key.port));
            let listener = Listener { address, port, protocol: TCP, ..Listener::default() };
            desired.listeners.insert(number, listener);
            let everybody = None;
            let also = admitted.unwrap_or(&everybody);
            by_address
                .entry(key.address)
                .and_modify(|known| *known = union(known, also))
                .or_insert_with(|| also.clone());
            let endpoint = Endpoint {
                address,
                port,
                protocol: TCP,
                kind: Endpoint::PROXIED,
                listener: number,
                index: 0,
                class: classes.number(admitted, &mut self.next_class),
            };
            desired.endpoints.insert(endpoint.key(), endpoint);
        }
        for (address, admission) in by_address.iter().filter(|(it, _)| self.owned.contains(it)) {
            let key = EndpointKey::of_address((*address).into());
            if let Some(endpoint) = desired.endpoints.get_mut(&key) {
                endpoint.kind |= Endpoint::REASSEMBLED;
                endpoint.class = classes.number(Some(admission), &mut self.next_class);
            }
        }
    }
}

/// Whom either admits.
fn union(one: &Admission, other: &Admission) -> Admission {
    let (one, other) = (one.as_ref()?, other.as_ref()?);
    if one == other {
        return Some(one.clone());
    }
    Some(Arc::new(one.union(other).copied().collect::<BTreeSet<Prefix>>()))
}
