//! Whole frames in and out of an interface, by AF_PACKET.

use std::{
    io::{self, IoSliceMut},
    mem::size_of_val,
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    libc,
    net::if_::if_nametoindex,
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg},
};
use socket2::{Domain, SockAddr, SockAddrStorage, Socket, Type};

use crate::netns::Namespace;

/// Sends frames from an interface and receives what arrives at it.
#[derive(Debug)]
pub struct PacketSocket(Socket);

impl PacketSocket {
    /// Opens it. Frames are kept from now on until they are received.
    ///
    /// # Errors
    ///
    /// If there is no such interface.
    pub fn open(namespace: &Namespace, interface: &str) -> Result<Self> {
        let socket = Self::watch(namespace, interface)?;
        set_option(&socket.0, libc::PACKET_IGNORE_OUTGOING)?;
        Ok(socket)
    }

    /// Opens one that receives what leaves the interface, too.
    ///
    /// # Errors
    ///
    /// If there is no such interface.
    pub fn watch(namespace: &Namespace, interface: &str) -> Result<Self> {
        namespace.run(|| {
            let index = if_nametoindex(interface).with_context(|| interface.to_owned())?;
            // No protocol yet: only `bind` makes frames arrive, of this interface alone.
            let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
            set_option(&socket, libc::PACKET_AUXDATA)?;
            socket.bind(&link_address(index))?;
            Ok(Self(socket))
        })
    }

    /// Sends a frame as it is.
    ///
    /// # Errors
    ///
    /// If the interface is down or the frame too long.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        self.0.send(frame)?;
        Ok(())
    }

    /// The next frame that is `wanted`; others are thrown away.
    ///
    /// # Errors
    ///
    /// If none comes within `timeout`.
    pub fn receive(&self, timeout: Duration, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no such frame within {timeout:?}");
            }
            self.0.set_read_timeout(Some(left))?;
            match self.receive_any() {
                Ok(frame) if wanted(&frame) => return Ok(frame),
                Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn receive_any(&self) -> nix::Result<Vec<u8>> {
        let mut frame = vec![0; 64 * 1024];
        let mut control = nix::cmsg_space!(libc::tpacket_auxdata);
        let mut buffers = [IoSliceMut::new(&mut frame)];
        let descriptor = self.0.as_raw_fd();
        let message =
            recvmsg::<()>(descriptor, &mut buffers, Some(&mut control), MsgFlags::empty())?;
        let tag = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::Unknown(control) => stripped_tag(&control.data_bytes),
            _ => None,
        });
        let length = message.bytes;
        frame.truncate(length);
        if let Some(tag) = tag {
            frame.splice(12..12, tag);
        }
        Ok(frame)
    }
}

/// The outer VLAN tag, which the kernel takes out of every frame and tells apart: the last two of
/// the 16-bit fields of `struct tpacket_auxdata` (packet(7)).
fn stripped_tag(auxdata: &[u8]) -> Option<[u8; 4]> {
    let &[s0, s1, s2, s3, .., tci0, tci1, tpid0, tpid1] = auxdata else { return None };
    let has_tag = u32::from_ne_bytes([s0, s1, s2, s3]) & libc::TP_STATUS_VLAN_VALID != 0;
    let [tpid0, tpid1] = u16::from_ne_bytes([tpid0, tpid1]).to_be_bytes();
    let [tci0, tci1] = u16::from_ne_bytes([tci0, tci1]).to_be_bytes();
    has_tag.then_some([tpid0, tpid1, tci0, tci1])
}

/// Turns on a boolean option of packet sockets.
fn set_option(socket: &Socket, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option's value is an int, and its size is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            option,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// All protocols on the interface.
fn link_address(index: libc::c_uint) -> SockAddr {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: a sockaddr_ll is plain numbers, and the storage is as large as any address.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as libc::c_ushort;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index.cast_signed();
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the storage holds an address of this length.
    unsafe { SockAddr::new(storage, length) }
}
