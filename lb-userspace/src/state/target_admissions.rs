//! Targets that carry a security group: what a client sends to a target's own address through this
//! machine is refused here if the group does not let it in.
//!
//! The target cannot tell such a packet from a balanced one by its MAC address: both come from us.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use lb_common::flow;
use lb_common::tables::{Endpoint, EndpointKey, OPEN};
use lb_common::wire::Be16;

use crate::config::{Config, SecurityGroup};
use crate::reconcile::{Desired, Prefix};

use super::admission::{Service, admitted};
use super::desired::Classes;
use super::{State, protocol_number};

/// Whom targets let in, by address and service; `None`: everybody.
pub type TargetAdmissions = BTreeMap<(IpAddr, Service), Option<Arc<BTreeSet<Prefix>>>>;

/// Compiles the security groups of all targets. A machine carries the groups of every target group
/// that it is in. Targets that have left the file stay as they are in `old` while they drain.
pub fn compile(config: &Config, old: &TargetAdmissions, draining: &[IpAddr]) -> TargetAdmissions {
    let mut carried: BTreeMap<IpAddr, BTreeSet<&str>> = BTreeMap::new();
    for group in config.target_groups.values() {
        let Some(name) = &group.security_group else { continue };
        for target in &group.targets {
            carried.entry(target.address).or_default().insert(name);
        }
    }
    let mut admissions = TargetAdmissions::new();
    for group in config.target_groups.values() {
        for target in &group.targets {
            let Some(names) = carried.get(&target.address) else { continue };
            let groups: Vec<&SecurityGroup> =
                names.iter().filter_map(|name| config.security_groups.get(*name)).collect();
            for service in [Service::Port(group.protocol, target.port), Service::Echo] {
                admissions.entry((target.address, service)).or_insert_with(|| {
                    let is_v4 = target.address.is_ipv4();
                    admitted(&groups, &config.security_groups, service, is_v4).map(Arc::new)
                });
            }
        }
    }
    for (key, admission) in old.iter().filter(|((address, _), _)| draining.contains(address)) {
        admissions.entry(*key).or_insert_with(|| admission.clone());
    }
    admissions
}

impl State {
    /// Gives the ways back of such targets their classes, and guards what has no way back.
    pub(super) fn put_target_admissions(&mut self, desired: &mut Desired, classes: &mut Classes) {
        for ((address, service), admission) in &self.target_admissions {
            if self.network.addresses.contains_key(address) {
                continue;
            }
            let class = classes.number(Some(admission), &mut self.next_class);
            if class == OPEN {
                continue;
            }
            let (protocol, port) = match *service {
                Service::Port(protocol, port) => (protocol_number(protocol), port),
                Service::Echo if address.is_ipv4() => (flow::ICMP, 0),
                Service::Echo => (flow::ICMPV6, 0),
            };
            let key = EndpointKey::new((*address).into(), Be16::new(port), protocol);
            let guard = Endpoint {
                address: key.address,
                port: key.port,
                protocol,
                kind: Endpoint::GUARD,
                ..Endpoint::default()
            };
            desired.endpoints.entry(key).or_insert(guard).class = class;
        }
    }
}
