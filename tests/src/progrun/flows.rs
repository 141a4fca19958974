//! What both sides remember of flows.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, MapData};
use lb_common::{
    flow::{Flow, FlowKey, FlowTable, ReturnFlow, ReturnTable},
    lru::Lru,
    snat::{SnatFlow, SnatReturn, Stamp},
    tables::Tables as _,
};
use lb_userspace::dataplane::{FlowTableUsage, Raw, map_name};

use super::{World, monotonic};

/// How far the two sides' clocks may be apart, nanoseconds: they look one after the other.
const CLOCK_SLACK: u64 = 500_000_000;

/// The kernel's tables of ways back.
const RETURNS: [(ReturnTable, &str); ReturnTable::ALL.len()] =
    [(ReturnTable::Established, "RETURN_FLOWS"), (ReturnTable::Fresh, "FRESH_RETURNS")];

impl World<'_> {
    /// Checks that both sides remember the same flows.
    ///
    /// # Errors
    ///
    /// If they do not; last times may differ by what lies between the two looks at the clock.
    pub fn check_flows(&mut self) -> Result<()> {
        for table in FlowTable::ALL {
            let flows: BTreeMap<FlowKey, Flow> = self.dump(map_name(table))?;
            let known = contents(&self.model.flow_table(table).borrow());
            same(map_name(table), &known, &flows, |a, b| {
                let times = [a.last_seen, b.last_seen];
                times[0].abs_diff(times[1]) < CLOCK_SLACK
                    && Flow { last_seen: times[1], ..*a } == *b
            })?;
        }
        for (table, name) in RETURNS {
            let returns: BTreeMap<FlowKey, ReturnFlow> = self.dump(name)?;
            let known = contents(&self.model.return_table(table).borrow());
            same(name, &known, &returns, |a, b| {
                let times = [a.last_seen, b.last_seen];
                times[0].abs_diff(times[1]) < CLOCK_SLACK
                    && ReturnFlow { last_seen: times[1], ..*a } == *b
            })?;
        }
        for target in self.desired.shares.keys() {
            let (host, kernel) = (self.model.load(*target), self.kernel.load_of(*target));
            ensure!(host == kernel, "target {target}: host {host:?}, kernel {kernel:?}");
        }
        let direct: BTreeMap<FlowKey, u32> = self.dump("DIRECT_FLOWS")?;
        let known = self.model.direct_flows.borrow();
        let known: BTreeMap<FlowKey, u32> = known.iter().map(|key| (*key, 1)).collect();
        same("direct flow", &known, &direct, |a, b| a == b)?;
        self.check_snat()
    }

    /// Checks that both sides remember the same flows whose both ends are rewritten, and that exactly
    /// their ports are taken.
    fn check_snat(&self) -> Result<()> {
        let tables = self.kernel.snat_tables()?;
        let (flows, returns) = (tables.flows().collect(), tables.returns().collect());
        let same_stamp = |a: Stamp, b: Stamp| {
            a.state() == b.state() && a.time().abs_diff(b.time()) < CLOCK_SLACK
        };
        let model = &self.model.snat;
        same("snat flow", &model.flows.borrow(), &flows, |a: &SnatFlow, b: &SnatFlow| {
            same_stamp(a.stamp, b.stamp) && SnatFlow { stamp: b.stamp, ..*a } == *b
        })?;
        same(
            "snat return",
            &model.returns.borrow(),
            &returns,
            |a: &SnatReturn, b: &SnatReturn| {
                same_stamp(a.stamp, b.stamp) && SnatReturn { stamp: b.stamp, ..*a } == *b
            },
        )?;
        for (number, pool) in &model.pools {
            let of_pool = returns.iter().filter(|(_, flow)| flow.pool == *number);
            let ports: BTreeSet<u16> = of_pool.map(|(key, _)| key.destination_port.get()).collect();
            let kernel = tables.pools().get(*number).context("a pool")?;
            for (side, pool) in [("host", &**pool), ("kernel", kernel)] {
                let taken: BTreeSet<u16> = pool.ports().collect();
                ensure!(taken == ports, "pool {number}, {side}: {taken:?}, flows have {ports:?}");
            }
        }
        Ok(())
    }

    /// Makes both sides believe that the last packet of every flow whose both ends are rewritten came
    /// as long ago as `ago` says, which is asked once a flow.
    ///
    /// # Errors
    ///
    /// If the kernel's tables do not take it.
    pub fn age_snat(&mut self, mut ago: impl FnMut() -> Duration) -> Result<()> {
        let now = monotonic()?;
        let returns: Vec<_> =
            self.model.snat.returns.borrow().iter().map(|(k, f)| (*k, *f)).collect();
        for (reply, mut back) in returns {
            let stamp =
                |old: Stamp, ago: Duration| Stamp::new(now - ago.as_nanos() as u64, old.state());
            let ago = ago();
            back.stamp = stamp(back.stamp, ago);
            self.model.snat.returns.borrow_mut().insert(reply, back);
            self.map::<SnatReturn>("SNAT_RETURNS")?.insert(Raw(reply), Raw(back), 0)?;
            let listener = self.desired.listeners.get(&back.listener).context("a listener")?;
            let key = FlowKey {
                source: back.client,
                source_port: back.client_port,
                destination: listener.address,
                destination_port: listener.port,
                ..reply
            };
            let Some(mut flow) = self.model.snat.flows.borrow().get(&key).copied() else {
                continue;
            };
            if flow.port == reply.destination_port && flow.address == reply.destination {
                flow.stamp = stamp(flow.stamp, ago);
                self.model.snat.flows.borrow_mut().insert(key, flow);
                self.map::<SnatFlow>("SNAT_FLOWS")?.insert(Raw(key), Raw(flow), 0)?;
            }
        }
        Ok(())
    }

    /// Does what the agent's walk does, on both sides: removes flows that are over.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn walk_snat(&mut self) -> Result<()> {
        let now = monotonic()?;
        let mut tables = self.kernel.snat_tables()?;
        let model = &self.model.snat;
        model.flows.borrow_mut().retain(|key, flow| {
            let is_over = flow.stamp.is_over(now, key.protocol, flow.idle);
            if is_over {
                tables.remove_flow(key, |flow| flow.stamp.is_over(now, key.protocol, flow.idle));
            }
            !is_over
        });
        let over: Vec<_> = model
            .returns
            .borrow()
            .iter()
            .filter(|(key, back)| back.stamp.is_over(now, key.protocol, back.idle))
            .map(|(key, back)| (*key, *back))
            .collect();
        for (key, back) in over {
            tables.remove_return(&key, &back)?;
            model.returns.borrow_mut().remove(&key);
            model.pools[&back.pool].release(key.destination_port.get());
        }
        Ok(())
    }

    /// A walk has made another map of exceptions.
    pub fn map_exceptions(&mut self, words: &[u64]) {
        self.model.map_exceptions(words);
        self.kernel.map_exceptions(words);
    }

    /// A walk has found that targets have so many connections more than both sides know.
    ///
    /// # Errors
    ///
    /// If there is no such target.
    pub fn correct(&mut self, corrections: &BTreeMap<u32, u64>) -> Result<()> {
        self.model.correct(corrections);
        self.kernel.correct(corrections)
    }

    /// Makes both sides remember a flow that was last seen some time ago.
    ///
    /// # Errors
    ///
    /// If the kernel's table does not take it.
    pub fn remember(
        &mut self,
        key: FlowKey,
        target: u32,
        closing: u32,
        ago: Duration,
    ) -> Result<()> {
        let flow = Flow { last_seen: monotonic()? - ago.as_nanos() as u64, target, closing };
        self.model.flow_table(FlowTable::Flows).borrow_mut().insert(key, flow);
        let mut map = self.map::<Flow>(map_name(FlowTable::Flows))?;
        Ok(map.insert(Raw(key), Raw(flow), 0)?)
    }

    /// Makes all that both sides remember as old as `age` says, by key.
    ///
    /// # Errors
    ///
    /// If the kernel's table does not take it.
    pub fn age(&mut self, mut age: impl FnMut(&FlowKey) -> Duration) -> Result<()> {
        let now = monotonic()?;
        for table in FlowTable::ALL {
            let flows = contents(&self.model.flow_table(table).borrow());
            for (key, flow) in flows {
                let flow = Flow { last_seen: now - age(&key).as_nanos() as u64, ..flow };
                self.model.flow_table(table).borrow_mut().insert(key, flow);
                self.map::<Flow>(map_name(table))?.insert(Raw(key), Raw(flow), 0)?;
            }
        }
        Ok(())
    }

    /// The same for ways back.
    ///
    /// # Errors
    ///
    /// If the kernel's table does not take it.
    pub fn age_returns(&mut self, mut age: impl FnMut() -> Duration) -> Result<()> {
        let now = monotonic()?;
        for (table, name) in RETURNS {
            let flows = contents(&self.model.return_table(table).borrow());
            for (key, flow) in flows {
                let flow = ReturnFlow { last_seen: now - age().as_nanos() as u64, ..flow };
                self.model.return_table(table).borrow_mut().insert(key, flow);
                self.map::<ReturnFlow>(name)?.insert(Raw(key), Raw(flow), 0)?;
            }
        }
        Ok(())
    }

    /// Makes both sides remember the way back of an established flow that was last seen some time
    /// ago.
    ///
    /// # Errors
    ///
    /// If the kernel's table does not take it.
    pub fn remember_return(
        &mut self,
        key: FlowKey,
        listener: u32,
        target: u32,
        ago: Duration,
    ) -> Result<()> {
        let flow = ReturnFlow { last_seen: monotonic()? - ago.as_nanos() as u64, listener, target };
        self.model.return_table(ReturnTable::Established).borrow_mut().insert(key, flow);
        let mut map = self.map::<ReturnFlow>("RETURN_FLOWS")?;
        Ok(map.insert(Raw(key), Raw(flow), 0)?)
    }

    /// Makes both sides forget every flow.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn forget_all(&mut self) -> Result<()> {
        for table in FlowTable::ALL {
            self.model.flow_table(table).borrow_mut().clear();
            self.clear::<Flow>(map_name(table))?;
        }
        self.model.direct_flows.borrow_mut().clear();
        for (table, name) in RETURNS {
            self.model.return_table(table).borrow_mut().clear();
            self.clear::<ReturnFlow>(name)?;
        }
        self.clear::<u32>("DIRECT_FLOWS")
    }

    /// How full the kernel's tables of flows are.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn usage(&mut self) -> Result<[FlowTableUsage; FlowTable::ALL.len()]> {
        self.kernel.flow_table_usage()
    }

    /// How many flows a table of the kernel's holds.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn entries(&mut self, table: FlowTable) -> Result<usize> {
        Ok(self.dump::<Flow>(map_name(table))?.len())
    }

    fn map<V: bytemuck::Pod>(&mut self, name: &str) -> Result<FlowMap<'_, V>> {
        let map = self.kernel.ebpf().map_mut(name).with_context(|| format!("no map {name}"))?;
        Ok(map.try_into()?)
    }

    fn dump<V: bytemuck::Pod>(&mut self, name: &str) -> Result<BTreeMap<FlowKey, V>> {
        let entries = self.map::<V>(name)?;
        let entries = entries.iter().map(|entry| entry.map(|(key, value)| (key.0, value.0)));
        Ok(entries.collect::<Result<_, _>>()?)
    }

    fn clear<V: bytemuck::Pod>(&mut self, name: &str) -> Result<()> {
        for key in self.dump::<V>(name)?.into_keys() {
            self.map::<V>(name)?.remove(&Raw(key))?;
        }
        Ok(())
    }
}

type FlowMap<'a, V> = HashMap<&'a mut MapData, Raw<FlowKey>, Raw<V>>;

fn contents<V: Copy>(table: &Lru<FlowKey, V>) -> BTreeMap<FlowKey, V> {
    table.iter().map(|(key, value)| (*key, *value)).collect()
}

fn same<V: std::fmt::Debug>(
    what: &str,
    model: &BTreeMap<FlowKey, V>,
    kernel: &BTreeMap<FlowKey, V>,
    equal: impl Fn(&V, &V) -> bool,
) -> Result<()> {
    for key in model.keys().chain(kernel.keys()) {
        let (host, kernel) = (model.get(key), kernel.get(key));
        let agree = host.zip(kernel).is_some_and(|(host, kernel)| equal(host, kernel));
        ensure!(agree, "{what} {key:?}: host {host:?}, kernel {kernel:?}");
    }
    Ok(())
}
