//! The NICs that the agent was told to attach to: at the start, and again when one that went away
//! has come back (a hot-plugged NIC, a virtual one made anew, a driver reloaded).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Context as _;
use tracing::{info, warn};

use crate::config::XdpMode;
use crate::dataplane::Dataplane;
use crate::netlink::{Interface, LinkLayer, Network, VlanOffload, VlanStripping};

/// What was asked for, and what keeps it from being so.
pub(super) struct Nics {
    names: Vec<String>,
    mode: XdpMode,
    vlan_offload: VlanOffload,
    problems: BTreeMap<String, String>,
}

impl Nics {
    /// Attaches to every NIC, or to none. Restores what a killed predecessor changed of others.
    ///
    /// # Errors
    /// The first NIC that it is impossible on, with what to do about it.
    pub(super) fn attach(
        dataplane: &mut Dataplane,
        nics: &[Interface],
        mode: XdpMode,
        state_directory: &Path,
    ) -> anyhow::Result<Self> {
        let mut vlan_offload =
            VlanOffload::new(state_directory).context("note the NICs' settings")?;
        for nic in nics {
            let attachment = dataplane.attach(nic, mode)?;
            info!(interface = %nic.name, mode = mode_name(attachment.is_native), "attached");
        }
        let indices: Vec<u32> = nics.iter().map(|nic| nic.index).collect();
        if let Err(error) = vlan_offload.restore_all_but(&indices) {
            warn!("a former run's NICs keep rxvlan off: {error}");
        }
        for nic in nics {
            keep_tags(&mut vlan_offload, nic);
        }
        let names = nics.iter().map(|nic| nic.name.clone()).collect();
        Ok(Self { names, mode, vlan_offload, problems: BTreeMap::new() })
    }

    /// What an operator should know.
    pub(super) fn problems(&self) -> impl Iterator<Item = &String> {
        self.problems.values()
    }

    /// Lets go of NICs that are gone, and attaches to those that are back.
    pub(super) fn follow(&mut self, dataplane: &mut Dataplane, network: &Network) {
        for gone in dataplane.detach_all_but(|index| network.interfaces.contains_key(&index)) {
            self.tell(
                &gone.name,
                format!(
                    "{} is gone: lb attaches again once there is an interface of that name",
                    gone.name
                ),
            );
        }
        let attached: BTreeSet<String> =
            dataplane.attachments().iter().map(|nic| nic.name.clone()).collect();
        for name in self.names.clone() {
            let is_it = |nic: &&Interface| nic.name == name && nic.layer == LinkLayer::Ethernet;
            if attached.contains(&name) {
                continue;
            }
            let Some(nic) = network.interfaces.values().find(is_it) else { continue };
            match dataplane.attach(nic, self.mode) {
                Ok(attachment) => {
                    let mode = mode_name(attachment.is_native);
                    info!(interface = %name, mode, "the interface is back: attached");
                    self.problems.remove(&name);
                    keep_tags(&mut self.vlan_offload, nic);
                }
                Err(error) => {
                    self.tell(&name, format!("{name} is back, but lb cannot attach: {error:#}"));
                }
            }
        }
    }

    /// Puts the NICs' settings back.
    ///
    /// # Errors
    /// As [`VlanOffload::restore`].
    pub(super) fn restore(&mut self) -> std::io::Result<()> {
        self.vlan_offload.restore()
    }

    fn tell(&mut self, name: &str, problem: String) {
        if self.problems.get(name) != Some(&problem) {
            warn!("{problem}");
            self.problems.insert(name.to_owned(), problem);
        }
    }
}

fn mode_name(is_native: bool) -> &'static str {
    if is_native { "native" } else { "generic" }
}

/// Has a NIC leave VLAN tags in the frames, where the program can see them.
fn keep_tags(vlan_offload: &mut VlanOffload, nic: &Interface) {
    match vlan_offload.turn_off(nic) {
        Ok(VlanStripping::Refused) => warn!(
            interface = %nic.name,
            "the NIC strips VLAN tags and does not let that be turned off: tagged frames look untagged"
        ),
        Ok(_) => {}
        Err(error) => warn!(interface = %nic.name, "rxvlan not known: {error}"),
    }
}
