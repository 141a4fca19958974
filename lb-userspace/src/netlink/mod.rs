//! Addresses, neighbours, routes and links: what the machine's network looks like, and the
//! listener addresses that the agent puts on it.
//!
//! Two halves that meet only in [`Network`]:
//!
//! - [`Netlink`] observes. It follows the kernel's notifications, keeps the next hops of the wanted
//!   destinations resolved, and sends [`NetworkEvent`]s to the owner of the state. It changes
//!   nothing but neighbour entries, which it asks the kernel to resolve.
//! - [`AddressManager`], [`VlanOffload`], [`ReservedPorts`] change the machine, and put back what they changed, also
//!   what a killed predecessor had changed: they note it below the state directory first.
//!
//! Everything here acts in the network namespace of the thread that calls the constructor.

mod addresses;
mod announce;
mod claim;
mod follow;
mod links;
mod manage;
mod network;
mod next_hops;
mod note;
mod offload;
mod probe;
mod reserved_ports;
mod sysctl;
#[cfg(test)]
mod tests;

pub use claim::StateDirectory;
pub use follow::{Netlink, NetworkEvent};
pub use links::read_interfaces;
pub use manage::{AddressError, AddressManager};
pub use network::{
    Interface, LinkLayer, LocalAddress, Network, NextHop, Unresolved, Vlan, XdpAttachment,
    XdpAttachmentMode,
};
pub use offload::{VlanOffload, VlanStripping};
pub use reserved_ports::ReservedPorts;
pub use sysctl::{IpFamily, missing_forwarding};

use std::io;

/// The default directory of all agents' [`StateDirectory`]s: what they changed on the machine is
/// noted there.
pub const DEFAULT_STATE_DIRECTORY: &str = "/run/lb";

/// The kernel's own error where there is one, so that callers can match on its kind.
fn io_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}
