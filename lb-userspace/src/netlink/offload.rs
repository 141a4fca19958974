//! VLAN stripping by the NIC: a tag that the NIC takes out of the frame never reaches an XDP
//! program, so the agent has it left in (`ethtool -K eth0 rxvlan off`) and puts the setting back.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::network::Interface;
use super::note::Note;

/// What became of a NIC's VLAN stripping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VlanStripping {
    /// The NIC does not strip tags; nothing was changed.
    AlreadyOff,
    /// Turned off by us (or by a predecessor that was killed); to be restored.
    TurnedOff,
    /// The NIC strips tags and refuses to stop: tagged frames look untagged to the data plane.
    Refused,
}

/// The NICs whose VLAN stripping is off because of us.
///
/// Noted in the state directory first, so that it survives kill -9. Dropping it restores nothing, as
/// a data plane that stays attached still needs the tags: call [`restore`](Self::restore).
#[derive(Debug)]
pub struct VlanOffload {
    socket: OwnedFd,
    note: Note<BTreeMap<u32, String>>,
    /// Interface index to name.
    turned_off: BTreeMap<u32, String>,
}

impl VlanOffload {
    /// For the network namespace of the calling thread; takes over what the notes in
    /// `state_directory` name.
    ///
    /// # Errors
    /// When there is no socket to be had or the notes cannot be read.
    pub fn new(state_directory: &Path) -> io::Result<Self> {
        let (note, turned_off) = Note::open(state_directory, "rxvlan")?;
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Self { socket, note, turned_off })
    }

    /// Has the NIC leave VLAN tags in the frames it receives.
    ///
    /// # Errors
    /// When the interface is gone, the caller lacks `CAP_NET_ADMIN`, or the note cannot be written.
    pub fn turn_off(&mut self, interface: &Interface) -> io::Result<VlanStripping> {
        let name = &interface.name;
        if !self.strips(name)? {
            let ours = self.turned_off.contains_key(&interface.index);
            return Ok(if ours { VlanStripping::TurnedOff } else { VlanStripping::AlreadyOff });
        }
        self.turned_off.insert(interface.index, name.clone());
        self.save()?;
        let outcome = self.set_stripping(name, false);
        if outcome.is_ok() && !self.strips(name)? {
            return Ok(VlanStripping::TurnedOff);
        }
        self.turned_off.remove(&interface.index);
        self.save()?;
        match outcome {
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::EINVAL) => Ok(VlanStripping::Refused),
            Err(error) => Err(error.into()),
        }
    }

    /// Turns stripping on again for every NIC but the `attached` ones (interface indices): what a
    /// killed predecessor with other interfaces left behind.
    ///
    /// # Errors
    /// The last error of a NIC or of the note; the other NICs are restored all the same.
    pub fn restore_all_but(&mut self, attached: &[u32]) -> io::Result<()> {
        let mut outcome = Ok(());
        for (index, name) in self.turned_off.clone() {
            if attached.contains(&index) {
                continue;
            }
            // Gone, or its name is another's now: nothing to restore.
            let still_there = if_nametoindex(name.as_str()) == Ok(index);
            match still_there.then(|| self.set_stripping(&name, true)) {
                None | Some(Ok(()) | Err(Errno::ENODEV)) => {
                    self.turned_off.remove(&index);
                }
                Some(Err(error)) => outcome = Err(error.into()),
            }
        }
        self.save().and(outcome)
    }

    /// Turns stripping on again for every NIC that it was turned off for.
    ///
    /// # Errors
    /// As [`restore_all_but`](Self::restore_all_but).
    pub fn restore(&mut self) -> io::Result<()> {
        self.restore_all_but(&[])
    }

    fn save(&self) -> io::Result<()> {
        let nothing = self.turned_off.is_empty();
        if nothing { self.note.remove() } else { self.note.write(&self.turned_off) }
    }

    fn strips(&self, name: &str) -> io::Result<bool> {
        match self.flags(name) {
            Ok(flags) => Ok(flags & ETH_FLAG_RXVLAN != 0),
            Err(Errno::EOPNOTSUPP) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn flags(&self, name: &str) -> nix::Result<u32> {
        let mut value = EthtoolValue { command: ETHTOOL_GFLAGS, data: 0 };
        ethtool(&self.socket, name, &mut value)?;
        Ok(value.data)
    }

    fn set_stripping(&self, name: &str, on: bool) -> nix::Result<()> {
        let flags = self.flags(name)?;
        let data = if on { flags | ETH_FLAG_RXVLAN } else { flags & !ETH_FLAG_RXVLAN };
        ethtool(&self.socket, name, &mut EthtoolValue { command: ETHTOOL_SFLAGS, data })
    }
}

// From linux/ethtool.h and linux/sockios.h.
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_SFLAGS: u32 = 0x26;
const ETH_FLAG_RXVLAN: u32 = 1 << 8;
const SIOCETHTOOL: libc::c_int = 0x8946;

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

nix::ioctl_readwrite_bad!(siocethtool, SIOCETHTOOL, libc::ifreq);

fn ethtool(socket: &OwnedFd, name: &str, value: &mut EthtoolValue) -> nix::Result<()> {
    let data = std::ptr::from_mut(value).cast();
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: data },
    };
    // The last byte stays the terminating zero.
    if name.len() >= request.ifr_name.len() {
        return Err(Errno::ENODEV);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: the request is whole, and its pointer is to the structure that ETHTOOL_GFLAGS and
    // ETHTOOL_SFLAGS read and write; both live until the call returns and nothing else has them.
    unsafe { siocethtool(socket.as_raw_fd(), &raw mut request) }?;
    Ok(())
}
