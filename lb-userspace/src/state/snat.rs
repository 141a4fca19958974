//! Source addresses and ports of the flows whose both ends are rewritten.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use lb_common::snat::{MAX_SNAT_ADDRESSES, SnatSource};
use lb_common::tables::{Endpoint, EndpointKey};

use crate::config::{Config, Forwarding, TargetGroup};
use crate::reconcile::Desired;

use super::{State, protocol_number};

/// Walks in a row that find no flow of a pool before it is taken back: the first one may have begun
/// when there still were new ones.
const EMPTY_WALKS: u32 = 2;
/// Pools that there is room for at least.
const MIN_POOLS: u32 = 256;

/// How many pools of source ports to make room for: twice what the configuration needs, for targets
/// to come.
pub fn port_pools(config: &Config) -> u32 {
    let groups = config.target_groups.values().filter(|group| is_snat(group));
    let needed = groups.map(|group| group.targets.len() * group.snat.addresses.len().max(1));
    u32::try_from(2 * needed.sum::<usize>()).unwrap_or(u32::MAX).max(MIN_POOLS)
}

fn is_snat(group: &TargetGroup) -> bool {
    group.forwarding == Forwarding::Snat
}

/// What has ports of its own: a flow is known by these and its port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct PoolKey {
    target: SocketAddr,
    protocol: u8,
    source: IpAddr,
}

/// Ports of a source address towards a target.
#[derive(Debug, Clone)]
struct Pool {
    number: u32,
    /// Where the search for ports begins. At random: what a former run used is at rest.
    start: u16,
    /// The ranges that flows get ports of, or may still have ports of from before a reload.
    ports: Vec<Range>,
    /// Walks in a row that found no flow with a port of it.
    empty_walks: u32,
}

#[derive(Debug, Clone)]
struct Range {
    ports: RangeInclusive<u16>,
    /// Whether new flows get ports of it.
    is_wanted: bool,
}

impl Pool {
    fn want(&mut self, ports: &RangeInclusive<u16>) {
        match self.ports.iter_mut().find(|range| range.ports == *ports) {
            Some(range) => range.is_wanted = true,
            None => self.ports.push(Range { ports: ports.clone(), is_wanted: true }),
        }
    }
}

/// The pools in use: those that are wanted, and those that flows still have ports of.
#[derive(Debug)]
pub struct Pools {
    pools: BTreeMap<PoolKey, Pool>,
    limit: u32,
}

impl Pools {
    pub(super) fn new() -> Self {
        Self { pools: BTreeMap::new(), limit: MIN_POOLS }
    }

    /// Ranges that are wanted, by their pools' numbers; from now on none is.
    fn take_wanted(&mut self) -> BTreeSet<(u32, u16)> {
        let mut wanted = BTreeSet::new();
        for pool in self.pools.values_mut() {
            for range in pool.ports.iter_mut().filter(|range| range.is_wanted) {
                wanted.insert((pool.number, *range.ports.start()));
                range.is_wanted = false;
            }
        }
        wanted
    }

    /// Walks must look anew where a range was wanted until now.
    fn note_unwanted(&mut self, before: &BTreeSet<(u32, u16)>) {
        for pool in self.pools.values_mut() {
            let mut given_up = pool.ports.iter().filter(|range| !range.is_wanted);
            if given_up.any(|range| before.contains(&(pool.number, *range.ports.start()))) {
                pool.empty_walks = 0;
            }
        }
    }

    /// The number of a pool, a new one if it has none; `None` if there is no room.
    fn want(&mut self, key: PoolKey, ports: &RangeInclusive<u16>) -> Option<u32> {
        if let Some(pool) = self.pools.get_mut(&key) {
            pool.want(ports);
            return Some(pool.number);
        }
        let taken: BTreeSet<u32> = self.pools.values().map(|pool| pool.number).collect();
        let number = (0..self.limit).find(|number| !taken.contains(number))?;
        let mut pool = Pool { number, start: rand::random(), ports: Vec::new(), empty_walks: 0 };
        pool.want(ports);
        self.pools.insert(key, pool);
        Some(number)
    }
}

impl State {
    /// How many pools of source ports there is room for.
    pub fn set_port_pools(&mut self, limit: u32) {
        self.pools.limit = limit;
    }

    /// Ports that flows have or may get: not for connections of this machine's own.
    pub fn snat_ports(&self) -> Vec<RangeInclusive<u16>> {
        let groups = self.config.target_groups.values().filter(|group| is_snat(group));
        let configured = groups.map(|group| group.snat.ports.clone());
        let pools = self.pools.pools.values().flat_map(|pool| &pool.ports);
        configured.chain(pools.map(|range| range.ports.clone())).collect()
    }

    /// Whether there are flows whose ports are to be given back some time.
    pub fn has_pools(&self) -> bool {
        !self.pools.pools.is_empty()
    }

    /// Takes back pools and ranges that neither targets nor flows use, after a walk that found the
    /// flows of these pools. Whether there are any.
    pub fn release_pools(&mut self, in_use: &BTreeSet<u32>) -> bool {
        let mut is_changed = false;
        for pool in self.pools.pools.values_mut() {
            let is_empty = !in_use.contains(&pool.number);
            pool.empty_walks = if is_empty { pool.empty_walks.saturating_add(1) } else { 0 };
            if pool.empty_walks >= EMPTY_WALKS {
                let before = pool.ports.len();
                pool.ports.retain(|range| range.is_wanted);
                is_changed |= pool.ports.len() != before;
            }
        }
        self.pools.pools.retain(|_, pool| !pool.ports.is_empty());
        is_changed
    }

    /// Gives targets their source addresses, and marks these for replies to be looked up. After
    /// targets and addresses are there.
    pub(super) fn put_sources(&mut self, desired: &mut Desired) {
        let before = self.pools.take_wanted();
        let mut warnings = Vec::new();
        for (number, key, ports) in self.wanted_sources(&mut warnings) {
            let Some(target) = desired.targets.get_mut(&number) else { continue };
            let sources = target.sources();
            if sources == MAX_SNAT_ADDRESSES {
                continue;
            }
            let (address, named) = (key.source.into(), key.target);
            let Some(pool) = self.pools.want(key, &ports) else {
                warnings.push(format!(
                    "target {named} has no ports: more than {} pairs of target and snat address; \
                     restart the agent to make room",
                    self.pools.limit
                ));
                continue;
            };
            let (first, last) = (*ports.start(), *ports.end());
            let index = number * MAX_SNAT_ADDRESSES + sources;
            target.set_sources(sources + 1);
            desired.sources.insert(index, SnatSource { address, pool, first, last, zero: 0 });
        }
        self.pools.note_unwanted(&before);
        for (key, pool) in &self.pools.pools {
            desired.pools.insert(pool.number, pool.start);
            self.put_source_address(key.source, pool, desired, &mut warnings);
        }
        self.warnings.append(&mut warnings);
    }

    /// Targets' numbers, each with a source address and the ports to use of it.
    fn wanted_sources(
        &self,
        warnings: &mut Vec<String>,
    ) -> Vec<(u32, PoolKey, RangeInclusive<u16>)> {
        let mut wanted = Vec::new();
        for (key, target) in self.all_targets() {
            let (Some(number), Some(group)) =
                (self.targets.get(key), self.config.target_groups.get(&*key.target_group))
            else {
                continue;
            };
            if !is_snat(group) {
                continue;
            }
            let target = SocketAddr::new(target.address, target.port);
            let sources = self.source_addresses(group, target.ip());
            let is_resolved = self.network.next_hops.get(&target.ip()).is_some_and(Result::is_ok);
            if sources.is_empty() && is_resolved {
                warnings.push(format!(
                    "target {target} of {}: this machine has no address of its own towards it, so \
                     name `snat_addresses`",
                    key.target_group
                ));
            }
            let protocol = protocol_number(group.protocol);
            wanted.extend(sources.into_iter().map(|source| {
                (number, PoolKey { target, protocol, source }, group.snat.ports.clone())
            }));
        }
        wanted
    }

    /// Those that the configuration names of the target's family, else the machine's own.
    fn source_addresses(&self, group: &TargetGroup, target: IpAddr) -> Vec<IpAddr> {
        let named = group.snat.addresses.iter().copied();
        let named: Vec<_> = named.filter(|it| it.is_ipv4() == target.is_ipv4()).collect();
        if !named.is_empty() {
            return named;
        }
        let hop = self.network.next_hops.get(&target).and_then(|hop| hop.as_ref().ok());
        hop.and_then(|hop| hop.source).into_iter().collect()
    }

    /// Has packets to a source address looked up.
    fn put_source_address(
        &self,
        address: IpAddr,
        pool: &Pool,
        desired: &mut Desired,
        warnings: &mut Vec<String>,
    ) {
        let key = EndpointKey::of_address(address.into());
        let first = pool.ports.iter().map(|range| u32::from(*range.ports.start())).min();
        let last = pool.ports.iter().map(|range| u32::from(*range.ports.end())).max();
        let (Some(first), Some(last)) = (first, last) else { return };
        let endpoint = desired.endpoints.entry(key).or_insert_with(|| {
            warnings.push(format!(
                "snat address {address} is not one of this machine: replies will not come back"
            ));
            Endpoint { address: key.address, kind: Endpoint::LOCAL, ..Endpoint::default() }
        });
        let is_first = endpoint.kind & Endpoint::SNAT == 0;
        endpoint.kind |= Endpoint::SNAT;
        endpoint.listener = if is_first { first } else { endpoint.listener.min(first) };
        endpoint.index = if is_first { last } else { endpoint.index.max(last) };
    }
}
