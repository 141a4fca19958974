//! The NICs that the agent was told to attach to: at the start, and again when one that went away
//! has come back (a hot-plugged NIC, a virtual one made anew, a driver reloaded).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Context as _;
use tracing::{info, warn};

use crate::api::snapshot::{self, AttachMode};
use crate::config::XdpMode;
use crate::dataplane::Attachment;
use crate::netlink::{Interface, LinkLayer, Network, VlanOffload, VlanStripping};

/// A data plane whose programs go onto NICs.
pub(crate) trait Attaches {
    /// Attaches to a NIC.
    ///
    /// # Errors
    /// What keeps it from that, with what to do about it.
    fn attach(&mut self, nic: &Interface, mode: XdpMode) -> anyhow::Result<&Attachment>;
    /// Lets go of NICs, given by index, that are gone.
    fn detach_all_but(&mut self, stays: impl Fn(u32) -> bool) -> Vec<Attachment>;
    /// What it is attached to.
    fn attachments(&self) -> &[Attachment];
}

/// What was asked for, and what keeps it from being so.
pub(crate) struct Nics {
    names: Vec<String>,
    mode: XdpMode,
    /// For a program that looks at VLAN tags.
    vlan_offload: Option<VlanOffload>,
    problems: BTreeMap<String, String>,
}

impl Nics {
    /// Attaches to every NIC, or to none. With a directory for the NICs' settings, has them leave VLAN
    /// tags in the frames, and restores what a killed predecessor changed of others.
    ///
    /// # Errors
    /// The first NIC that it is impossible on, with what to do about it.
    pub(crate) fn attach(
        dataplane: &mut impl Attaches,
        nics: &[Interface],
        mode: XdpMode,
        settings_directory: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let mut vlan_offload = settings_directory
            .map(VlanOffload::new)
            .transpose()
            .context("note the NICs' settings")?;
        for nic in nics {
            let attachment = dataplane.attach(nic, mode)?;
            info!(interface = %nic.name, mode = mode_name(attachment.is_native), "attached");
        }
        if let Some(vlan_offload) = &mut vlan_offload {
            let indices: Vec<u32> = nics.iter().map(|nic| nic.index).collect();
            if let Err(error) = vlan_offload.restore_all_but(&indices) {
                warn!("a former run's NICs keep rxvlan off: {error}");
            }
            nics.iter().for_each(|nic| keep_tags(vlan_offload, nic));
        }
        let names = nics.iter().map(|nic| nic.name.clone()).collect();
        Ok(Self { names, mode, vlan_offload, problems: BTreeMap::new() })
    }

    /// What an operator should know.
    pub(crate) fn problems(&self) -> impl Iterator<Item = &String> {
        self.problems.values()
    }

    /// Lets go of NICs that are gone, and attaches to those that are back.
    pub(crate) fn follow(&mut self, dataplane: &mut impl Attaches, network: &Network) {
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
                    if let Some(vlan_offload) = &mut self.vlan_offload {
                        keep_tags(vlan_offload, nic);
                    }
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
    pub(crate) fn restore(&mut self) -> std::io::Result<()> {
        self.vlan_offload.as_mut().map_or(Ok(()), VlanOffload::restore)
    }

    fn tell(&mut self, name: &str, problem: String) {
        if self.problems.get(name) != Some(&problem) {
            warn!("{problem}");
            self.problems.insert(name.to_owned(), problem);
        }
    }
}

/// What `status` says of NICs.
pub(crate) fn interfaces(attachments: &[Attachment]) -> Vec<snapshot::Interface> {
    let interface = |nic: &Attachment| snapshot::Interface {
        name: nic.name.clone(),
        index: nic.ifindex,
        mode: if nic.is_native { AttachMode::Native } else { AttachMode::Generic },
    };
    attachments.iter().map(interface).collect()
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
