//! A target's programs in the kernel beside the same pipeline on the host, over equal tables; see
//! [`progrun`](crate::progrun).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Result, bail, ensure};
use aya::programs::{TestRun as _, TestRunOptions};
use lb_common::{
    flow::SECOND,
    model::Bytes,
    target::{
        admit_target,
        model::TargetModel,
        record,
        tables::{CLASSES, DENIED, Unwrapped},
    },
    verdict::{DropReason, Verdict},
};
use lb_userspace::{
    config,
    target::{Tables, TargetDataplane, TargetLoadOptions, compile, diff},
};

use crate::progrun::{Action, hex, monotonic};

/// How far the two sides' times of a flow may be apart, nanoseconds: a time is refreshed when it is
/// older than a second, which one side may see before the other.
const SLACK: u64 = 2 * SECOND;

/// Kernel and host with equal tables.
pub struct TargetWorld {
    kernel: TargetDataplane,
    model: TargetModel,
    tables: Tables,
}

impl std::fmt::Debug for TargetWorld {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TargetWorld").field("model", &self.model).finish_non_exhaustive()
    }
}

impl TargetWorld {
    /// A machine with these addresses and this configuration.
    ///
    /// # Errors
    ///
    /// What is wrong with the configuration; what the kernel refuses.
    pub fn new(config: &str, addresses: &[&str]) -> Result<Self> {
        let kernel = TargetDataplane::load(&TargetLoadOptions { flow_table_size: 1 << 16 })?;
        let mut world = Self { kernel, model: TargetModel::default(), tables: Tables::default() };
        world.set(config, addresses)?;
        Ok(world)
    }

    /// Changes the configuration.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn set(&mut self, config: &str, addresses: &[&str]) -> Result<()> {
        let config = config::parse("target.toml", config).map_err(|e| anyhow::anyhow!("{e}"))?;
        let addresses: BTreeSet<IpAddr> =
            addresses.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        let tables = compile(&config.config, &addresses, &self.tables).tables;
        self.kernel.apply(&diff(&self.tables, &tables))?;
        let model = &mut self.model;
        model.settings = tables.settings;
        model.tunnel_ends = tables.tunnel_ends.clone();
        model.classes = (0..CLASSES)
            .zip(tables.places.iter().copied())
            .filter(|(_, class)| *class != DENIED)
            .collect();
        let senders = tables.classes.iter().flat_map(|(class, senders)| {
            senders.iter().map(|sender| {
                (u32::from(*class) | sender.space, sender.address, u32::from(sender.bits))
            })
        });
        model.senders = senders.collect();
        self.tables = tables;
        Ok(())
    }

    /// Runs a frame that comes in through both sides; the verdict, and what the stack gets.
    ///
    /// # Errors
    ///
    /// If they disagree.
    pub fn comes_in(&mut self, frame: &[u8]) -> Result<(Action, Vec<u8>)> {
        self.model.now.set(monotonic()?);
        let mut bytes = Bytes { bytes: frame.to_vec(), ingress: 1 };
        let host = match admit_target(&mut bytes, &self.model) {
            Verdict::Pass => (Action::Pass, bytes.bytes),
            Verdict::Drop => (Action::Drop, bytes.bytes),
            other => bail!("a target says {other:?}"),
        };
        let mut output = vec![0; frame.len() + 256];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut output),
            ..TestRunOptions::default()
        };
        let result = self.kernel.way_in()?.test_run(options)?;
        output.truncate(result.data_size_out as usize);
        let kernel = match result.return_value {
            1 => (Action::Drop, output),
            2 => (Action::Pass, output),
            other => bail!("verdict {other}"),
        };
        ensure!(
            host == kernel,
            "host and kernel disagree on\n{}\nhost: {:?}\n{}\nkernel: {:?}\n{}",
            hex(frame),
            host.0,
            hex(&host.1),
            kernel.0,
            hex(&kernel.1),
        );
        Ok(host)
    }

    /// Runs a frame that goes out through both sides; it stays as it is.
    ///
    /// # Errors
    ///
    /// If the kernel's side changes it or holds it back.
    pub fn goes_out(&mut self, frame: &[u8]) -> Result<()> {
        self.model.now.set(monotonic()?);
        record(&Bytes { bytes: frame.to_vec(), ingress: 0 }, &self.model);
        let mut output = vec![0; frame.len() + 256];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut output),
            ..TestRunOptions::default()
        };
        let result = self.kernel.way_out()?.test_run(options)?;
        // TC_ACT_UNSPEC: whatever else is attached decides.
        ensure!(result.return_value.cast_signed() == -1, "verdict {}", result.return_value);
        ensure!(output[..result.data_size_out as usize] == *frame, "the frame is changed");
        Ok(())
    }

    /// Dropped packets by reason, which must be equal on both sides; and what came out of tunnels.
    ///
    /// # Errors
    ///
    /// If they are not.
    pub fn counts(&self) -> Result<(BTreeMap<DropReason, u64>, Unwrapped)> {
        let host = (self.model.drops.borrow().clone(), *self.model.unwrapped.borrow());
        let mut kernel = (self.kernel.drops()?, self.kernel.unwrapped()?);
        kernel.0.retain(|_, count| *count != 0);
        ensure!(host == kernel, "counters differ:\nhost {host:?}\nkernel {kernel:?}");
        Ok(host)
    }

    /// Checks that both sides remember the same flows; how many they are, own ones and admitted.
    ///
    /// # Errors
    ///
    /// If they do not.
    pub fn check_flows(&self) -> Result<(usize, usize)> {
        let (host, kernel) = (self.model.own_flows.borrow(), self.kernel.own_flows());
        for key in host.keys().chain(kernel.keys()) {
            let agree = host.get(key).zip(kernel.get(key)).is_some_and(|(host, kernel)| {
                host.closing == kernel.closing && host.last_seen.abs_diff(kernel.last_seen) < SLACK
            });
            ensure!(agree, "own {key:?}: {:?}, {:?}", host.get(key), kernel.get(key));
        }
        let own = host.len();
        let (host, kernel) = (self.model.admitted_flows.borrow(), self.kernel.admitted_flows());
        for key in host.keys().chain(kernel.keys()) {
            let agree = host.get(key).zip(kernel.get(key));
            let agree = agree.is_some_and(|(host, kernel)| host.abs_diff(*kernel) < SLACK);
            ensure!(agree, "admitted {key:?}: {:?}, {:?}", host.get(key), kernel.get(key));
        }
        Ok((own, host.len()))
    }
}
