//! The maps of source address translation.

use std::sync::Arc;

use anyhow::{Context as _, bail};
use aya::Ebpf;
use aya::maps::{Map, MapData};
use lb_common::flow::FlowKey;
use lb_common::snat::{MAX_SNAT_ADDRESSES, PortPool, SnatFlow, SnatReturn, SnatSource};
use lb_common::tables::MAX_TARGETS;

use crate::reconcile::Step;

use super::{MappedArray, Owned, Raw, mapped};

/// The maps, as the owner of the data plane has them.
pub(super) struct Snat {
    sources: MappedArray<SnatSource>,
    pools: Arc<PortPools>,
    /// Ids of the tables of flows.
    flows: u32,
    returns: u32,
}

impl Snat {
    pub(super) fn new(ebpf: &mut Ebpf, pools: u32) -> anyhow::Result<Self> {
        Ok(Self {
            sources: mapped(ebpf, "SNAT_SOURCES", MAX_TARGETS * MAX_SNAT_ADDRESSES)?,
            pools: Arc::new(PortPools(mapped(ebpf, "PORT_POOLS", pools)?)),
            flows: id_of(ebpf, "SNAT_FLOWS")?,
            returns: id_of(ebpf, "SNAT_RETURNS")?,
        })
    }

    /// Carries out a step that concerns these maps; `false` for another one.
    pub(super) fn step(&self, step: &Step) -> bool {
        match step {
            Step::SetSource(index, source) => self.sources.store(*index, source),
            Step::ClearSource(index) => self.sources.store(*index, &SnatSource::default()),
            Step::ResetPool(number, start) => {
                if let Some(pool) = self.pools.get(*number) {
                    pool.reset(*start);
                }
            }
            _ => return false,
        }
        true
    }

    /// The tables, for a walk in another thread.
    pub(super) fn tables(&self) -> anyhow::Result<SnatTables> {
        let open = |id| anyhow::Ok(Map::HashMap(MapData::from_id(id)?));
        Ok(SnatTables {
            flows: open(self.flows)?.try_into()?,
            returns: open(self.returns)?.try_into()?,
            pools: Arc::clone(&self.pools),
        })
    }
}

fn id_of(ebpf: &Ebpf, name: &str) -> anyhow::Result<u32> {
    match ebpf.map(name) {
        Some(Map::HashMap(data)) => Ok(data.info()?.id()),
        other => bail!("{name} is no hash map but {other:?}"),
    }
}

/// The pools in shared memory.
pub struct PortPools(MappedArray<[u64; PortPool::LENGTH]>);

impl PortPools {
    /// A pool by number.
    pub fn get(&self, number: u32) -> Option<&PortPool> {
        let words = self.0.words(number);
        let first = words.first().filter(|_| words.len() == PortPool::LENGTH)?;
        // SAFETY: a pool is that many words of 8 bytes, each of them valid whatever it holds; those
        // that change are atomic on both sides, and the mapping lives as long as `self`.
        Some(unsafe { &*std::ptr::from_ref(first).cast::<PortPool>() })
    }
}

/// Flows whose both ends are rewritten, and their ports.
pub struct SnatTables {
    flows: Owned<FlowKey, SnatFlow>,
    returns: Owned<FlowKey, SnatReturn>,
    pools: Arc<PortPools>,
}

impl SnatTables {
    /// Every flow by its client's packets, as far as the table stands still meanwhile.
    pub fn flows(&self) -> impl Iterator<Item = (FlowKey, SnatFlow)> {
        self.flows.iter().filter_map(Result::ok).map(|(key, flow)| (key.0, flow.0))
    }

    /// Every flow by its target's packets, as far as the table stands still meanwhile.
    pub fn returns(&self) -> impl Iterator<Item = (FlowKey, SnatReturn)> {
        self.returns.iter().filter_map(Result::ok).map(|(key, flow)| (key.0, flow.0))
    }

    /// The ports.
    pub fn pools(&self) -> &PortPools {
        &self.pools
    }

    /// Removes an entry by its client's packets, if it still is as `is_over` wants it.
    pub fn remove_flow(&mut self, key: &FlowKey, is_over: impl FnOnce(&SnatFlow) -> bool) {
        // The client may have begun another flow from the same port since.
        if self.flows.get(&Raw(*key), 0).is_ok_and(|flow| is_over(&flow.0)) {
            // Gone already is as good.
            let _ = self.flows.remove(&Raw(*key));
        }
    }

    /// Removes an entry by its target's packets, then gives its port back.
    ///
    /// # Errors
    /// What the kernel says; the port stays taken.
    pub fn remove_return(&mut self, key: &FlowKey, flow: &SnatReturn) -> anyhow::Result<()> {
        self.returns.remove(&Raw(*key)).context("remove a flow")?;
        if let Some(pool) = self.pools.get(flow.pool) {
            pool.release(key.destination_port.get());
        }
        Ok(())
    }
}
