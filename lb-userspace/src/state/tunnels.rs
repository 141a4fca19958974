//! What the kernel's tables hold of tunnels to targets.

use std::net::IpAddr;

use lb_common::tables::Target;

use crate::config::{Forwarding, TargetGroup};

use super::{State, TargetKey};

/// Every IPv6 path carries packets of this size, bytes (RFC 8200 section 5): a sender need not
/// believe that a packet should be smaller.
const IPV6_MINIMUM_MTU: u16 = 1280;

impl State {
    /// The target's entry with its outer header, if packets of the group go through tunnels.
    pub(super) fn through_tunnel(
        &self,
        entry: Target,
        address: IpAddr,
        group: &TargetGroup,
    ) -> Target {
        if !group.forwarding.is_tunnel() {
            return entry;
        }
        let sources = &self.config().agent.tunnel_sources;
        match address {
            IpAddr::V4(_) => {
                entry.through_v4(sources.v4.network(), sources.v4.prefix_len(), group.gue_port)
            }
            IpAddr::V6(_) => entry.through_v6(sources.v6.network(), group.gue_port),
        }
    }
}

/// A tunnel that does not carry what IPv6 clients may send.
pub(super) fn too_narrow(entry: &Target, key: &TargetKey, group: &TargetGroup) -> Option<String> {
    let is_narrow = entry.hop.ifindex != 0 && entry.hop.mtu < IPV6_MINIMUM_MTU;
    (group.forwarding.is_tunnel() && is_narrow).then(|| {
        format!(
            "target {} of {}: its tunnel carries packets of {} bytes, IPv6 needs {IPV6_MINIMUM_MTU}: \
             raise the MTU on the way to it",
            key.address, key.target_group, entry.hop.mtu
        )
    })
}

/// How packets reach a target, as its entry says it.
pub(super) fn mode(forwarding: Forwarding) -> u8 {
    match forwarding {
        Forwarding::Nat => Target::NAT,
        Forwarding::Snat => Target::SNAT,
        Forwarding::DsrL2 => Target::DSR_L2,
        Forwarding::DsrIpip => Target::DSR_IPIP,
        Forwarding::DsrGue => Target::DSR_GUE,
    }
}
