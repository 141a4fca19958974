//! The state as readers are shown it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use lb_common::tables::Traffic;
use lb_common::verdict::DropReason;

use crate::api::snapshot::{self, Agent, Interface, LoadBalancer, Snapshot, Status};
use crate::config::{self, Action, LoadBalancerType, Protocol, ProxyListener, Scheme};
use crate::dns;
use crate::health::Health;

use super::{ListenerKey, State, TargetKey};

/// The kernel's counters.
pub trait Counters {
    /// Of a listener, by number.
    ///
    /// # Errors
    /// What the kernel says.
    fn listener(&self, number: u32) -> anyhow::Result<Traffic>;
    /// Of a target, by number.
    ///
    /// # Errors
    /// What the kernel says.
    fn target(&self, number: u32) -> anyhow::Result<Traffic>;
    /// Packets that died.
    ///
    /// # Errors
    /// What the kernel says.
    fn drops(&self) -> anyhow::Result<BTreeMap<DropReason, u64>>;
}

/// What the agent adds to the picture.
#[derive(Debug, Clone)]
pub struct About {
    /// The agent.
    pub agent: Agent,
    /// What it is attached to.
    pub interfaces: Vec<Interface>,
    /// The tables that remember flows.
    pub flow_tables: Vec<snapshot::FlowTable>,
    /// What an operator should know, beside what the state has to say.
    pub warnings: Vec<String>,
}

fn weighted(group: &config::WeightedTargetGroup) -> snapshot::WeightedTargetGroup {
    snapshot::WeightedTargetGroup { name: group.name.clone(), weight: group.weight }
}

impl State {
    /// Everything a reader may ask for.
    ///
    /// # Errors
    /// Counters that cannot be read.
    pub fn snapshot(&self, about: About, counters: &dyn Counters) -> anyhow::Result<Snapshot> {
        let About { agent, interfaces, flow_tables, mut warnings } = about;
        warnings.extend(self.warnings.iter().cloned());
        let balancers = self.config.load_balancers.iter();
        let load_balancers = balancers
            .map(|(name, balancer)| self.load_balancer(name, balancer, counters))
            .collect::<anyhow::Result<_>>()?;
        let drops = counters.drops()?;
        let drops =
            drops.into_iter().map(|(reason, count)| (reason.name().into(), count)).collect();
        Ok(Snapshot {
            status: Status {
                agent,
                interfaces,
                load_balancers,
                own_target: None,
                flow_tables,
                drops,
                warnings,
            },
            target_groups: self.config.target_groups.keys().cloned().collect(),
            targets: self
                .all_targets()
                .map(|(key, target)| self.target(key, target, counters))
                .collect::<anyhow::Result<_>>()?,
        })
    }

    fn load_balancer(
        &self,
        name: &str,
        balancer: &config::LoadBalancer,
        counters: &dyn Counters,
    ) -> anyhow::Result<LoadBalancer> {
        let listeners = balancer.listeners.iter();
        let proxied = balancer.proxied.iter();
        let proxied = proxied.map(|it| self.proxied_listener(it, &balancer.addresses, counters));
        let zone = self.config.dns.as_ref().map(|dns| dns.zone.as_str());
        Ok(LoadBalancer {
            name: name.into(),
            dns_name: zone.map(|zone| format!("{}.{zone}", dns::label(name, balancer.scheme))),
            metrics: None,
            kind: match balancer.kind {
                LoadBalancerType::Network => "network".into(),
                LoadBalancerType::Application => "application".into(),
            },
            scheme: match balancer.scheme {
                Scheme::Internal => "internal".into(),
                Scheme::InternetFacing => "internet-facing".into(),
            },
            addresses: balancer.addresses.clone(),
            listeners: listeners
                .map(|listener| self.listener(listener, &balancer.addresses, counters))
                .chain(proxied)
                .collect::<anyhow::Result<_>>()?,
        })
    }

    fn listener(
        &self,
        listener: &config::Listener,
        addresses: &[IpAddr],
        counters: &dyn Counters,
    ) -> anyhow::Result<snapshot::Listener> {
        let sum = self.traffic((listener.protocol, listener.port), addresses, counters)?;
        Ok(snapshot::Listener {
            default_action: None,
            rules: None,
            protocol: listener.protocol.to_string(),
            port: listener.port,
            target_group: listener
                .target_groups
                .first()
                .map_or_else(String::new, |g| g.name.clone()),
            target_groups: listener.target_groups.iter().map(weighted).collect(),
            packets: sum.packets,
            bytes: sum.bytes,
            new_flows: sum.new_flows,
            reply_packets: sum.reply_packets,
            reply_bytes: sum.reply_bytes,
        })
    }

    /// A listener whose connections end in the proxy. What targets answer does not pass the kernel's
    /// tables.
    fn proxied_listener(
        &self,
        listener: &ProxyListener,
        addresses: &[IpAddr],
        counters: &dyn Counters,
    ) -> anyhow::Result<snapshot::Listener> {
        let sum = self.traffic((Protocol::Tcp, listener.port), addresses, counters)?;
        let (default_action, groups) = match &listener.default_action {
            Action::Forward(forward) => ("forward", &forward.target_groups[..]),
            Action::Redirect(_) => ("redirect", &[][..]),
            Action::FixedResponse(_) => ("fixed-response", &[][..]),
        };
        Ok(snapshot::Listener {
            protocol: listener.protocol.to_string(),
            port: listener.port,
            target_group: groups.first().map_or_else(String::new, |group| group.name.clone()),
            target_groups: groups.iter().map(weighted).collect(),
            default_action: Some(default_action.to_owned()),
            rules: Some(listener.rules.len()),
            packets: sum.packets,
            bytes: sum.bytes,
            new_flows: sum.new_flows,
            reply_packets: sum.reply_packets,
            reply_bytes: sum.reply_bytes,
        })
    }

    /// The sum over all addresses.
    fn traffic(
        &self,
        (protocol, port): (Protocol, u16),
        addresses: &[IpAddr],
        counters: &dyn Counters,
    ) -> anyhow::Result<Traffic> {
        let mut sum = Traffic::default();
        for address in addresses {
            let key = ListenerKey { address: *address, protocol, port };
            if let Some(number) = self.listeners.get(&key) {
                let traffic = counters.listener(number)?;
                sum.packets += traffic.packets;
                sum.bytes += traffic.bytes;
                sum.reply_packets += traffic.reply_packets;
                sum.reply_bytes += traffic.reply_bytes;
                sum.new_flows += traffic.new_flows;
            }
        }
        Ok(sum)
    }

    fn target(
        &self,
        key: &TargetKey,
        target: &config::Target,
        counters: &dyn Counters,
    ) -> anyhow::Result<snapshot::Target> {
        let Health { state, reason, description } = self.health_of(key);
        let number = self.targets.get(key);
        let traffic = number.map(|number| counters.target(number)).transpose()?.unwrap_or_default();
        Ok(snapshot::Target {
            target_group: key.target_group.to_string(),
            address: target.address,
            port: target.port,
            availability_zone: target.availability_zone.clone(),
            weight: target.weight,
            state: state.to_string(),
            reason: reason.map(|reason| reason.to_string()),
            description,
            metrics: None,
            next_hop: match self.hop(target.address) {
                _ if self.is_proxied(key) => "by the kernel's routes".into(),
                Ok(hop) => self.describe(&hop),
                Err(no_way) => no_way.problem,
            },
            flows: self.flows_of(key),
            packets: traffic.packets,
            bytes: traffic.bytes,
            reply_packets: traffic.reply_packets,
            reply_bytes: traffic.reply_bytes,
        })
    }

    fn describe(&self, hop: &lb_common::tables::NextHop) -> String {
        let mac: Vec<_> = hop.macs.destination().iter().map(|byte| format!("{byte:02x}")).collect();
        let name = self.network.interfaces.get(&hop.ifindex).map_or("?", |nic| nic.name.as_str());
        let vlan = if hop.vlan == 0 { String::new() } else { format!(" VLAN {}", hop.vlan) };
        format!("{} on {name}{vlan}", mac.join(":"))
    }
}
