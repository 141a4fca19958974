//! The tables of flows: looking through them, and how many entries had to make room.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;
use aya::Ebpf;
use aya::maps::{HashMap, Map, MapData, PerCpuArray};
use lb_common::flow::{Flow, FlowKey, FlowTable};
use lb_common::load::Load;
use lb_common::tables::FlowChanges;

use crate::state::FlowStore;

use super::{MappedArray, Raw, take};

const TABLES: usize = FlowTable::ALL.len();

/// The map of a table.
pub fn map_name(table: FlowTable) -> &'static str {
    match table {
        FlowTable::Flows => "FLOWS",
        FlowTable::HalfOpen => "HALF_OPEN",
        FlowTable::OnceSeen => "ONCE_SEEN",
    }
}

/// How full a table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FlowTableUsage {
    /// Entries that it can hold.
    pub size: u32,
    /// Entries that it holds.
    pub entries: u64,
    /// Entries that had to make room since the program was loaded.
    pub evictions: u64,
}

impl FlowTableUsage {
    /// Takes note of how many entries were made and taken out so far.
    ///
    /// The kernel evicts only while the table is full, and does not say so. What was made and not
    /// taken out, beyond what the table can hold, must have been evicted; of what came and went
    /// between two looks nothing is known, so this counts too few rather than too many.
    fn note(&mut self, created: u64, removed: u64) {
        let rest = created.saturating_sub(removed);
        self.evictions = self.evictions.max(rest.saturating_sub(self.size.into()));
        self.entries = rest.saturating_sub(self.evictions);
    }
}

/// Keeps count of what the tables hold.
pub(super) struct FlowMeter {
    ids: [u32; TABLES],
    usage: [FlowTableUsage; TABLES],
    changes: PerCpuArray<MapData, Raw<FlowChanges>>,
    /// What walks took out.
    removed: Arc<[AtomicU64; TABLES]>,
}

impl FlowMeter {
    pub(super) fn new(ebpf: &mut Ebpf) -> anyhow::Result<Self> {
        let mut meter = Self {
            ids: [0; TABLES],
            usage: [FlowTableUsage::default(); TABLES],
            changes: take(ebpf, "FLOW_CHANGES")?.try_into()?,
            removed: Arc::default(),
        };
        for (n, table) in FlowTable::ALL.into_iter().enumerate() {
            let Some(Map::LruHashMap(data)) = ebpf.map(map_name(table)) else {
                anyhow::bail!("the object lacks the flow table {}", map_name(table));
            };
            let info = data.info()?;
            meter.ids[n] = info.id();
            meter.usage[n].size = info.max_entries();
        }
        Ok(meter)
    }

    pub(super) fn open(&self, loads: Arc<MappedArray<Load>>) -> anyhow::Result<FlowTables> {
        let mut maps = Vec::with_capacity(TABLES);
        for id in self.ids {
            maps.push(Map::LruHashMap(MapData::from_id(id)?).try_into()?);
        }
        Ok(FlowTables { maps, removed: self.removed.clone(), loads })
    }

    pub(super) fn look(&mut self) -> anyhow::Result<[FlowTableUsage; TABLES]> {
        for (n, usage) in self.usage.iter_mut().enumerate() {
            // First what was taken out: an entry that comes and goes in between is no eviction.
            let by_walks = self.removed[n].load(Ordering::SeqCst);
            let changes = self.changes.get(&(n as u32), 0).context("count the flows")?;
            let created = changes.iter().map(|Raw(cpu)| cpu.created).sum();
            let removed: u64 = changes.iter().map(|Raw(cpu)| cpu.removed).sum();
            usage.note(created, removed + by_walks);
        }
        Ok(self.usage)
    }
}

/// The tables of remembered flows, for a walk in another thread.
pub struct FlowTables {
    maps: Vec<HashMap<MapData, Raw<FlowKey>, Raw<Flow>>>,
    removed: Arc<[AtomicU64; TABLES]>,
    loads: Arc<MappedArray<Load>>,
}

impl FlowStore for FlowTables {
    fn each(&self, table: FlowTable, visit: &mut dyn FnMut(FlowKey, Flow)) {
        let entries = self.maps[table as usize].iter().filter_map(Result::ok);
        entries.for_each(|(key, flow)| visit(key.0, flow.0));
    }

    fn balance(&self, target: u32) -> u64 {
        self.loads.load(target).map_or(0, |load| load.balance)
    }

    fn forget(&mut self, table: FlowTable, key: &FlowKey, target: u32) {
        let map = &mut self.maps[table as usize];
        // Gone already is as good.
        let is_same = map.get(&Raw(*key), 0).is_ok_and(|flow| flow.0.target == target);
        if is_same && map.remove(&Raw(*key)).is_ok() {
            self.removed[table as usize].fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use lb_common::lru::Lru;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Of a table whose evictions are known; looked at after every change, none is missed.
        #[test]
        fn evictions_are_what_is_missing(
            keys in prop::collection::vec((0_u32..40, any::<bool>()), 1..300),
        ) {
            let mut table = Lru::with_capacity(16);
            let mut usage = FlowTableUsage { size: 16, ..FlowTableUsage::default() };
            let (mut created, mut removed) = (0, 0);
            for (key, is_new) in keys {
                if !is_new {
                    removed += u64::from(table.remove(&key));
                } else if table.get(&key).is_none() {
                    table.insert(key, ());
                    created += 1;
                }
                usage.note(created, removed);
                prop_assert_eq!(usage.evictions, table.evictions());
                prop_assert_eq!(usage.entries, table.len() as u64);
            }
        }
    }
}
