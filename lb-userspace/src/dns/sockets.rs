//! UDP that answers from the address that was asked, also where the socket listens on all of them.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, UdpSocket as StdSocket};
use std::os::fd::AsRawFd as _;

use nix::libc::{in_pktinfo, in6_pktinfo};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt,
};
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// The address of this machine that a datagram came to, and the NIC.
#[derive(Debug, Clone, Copy)]
enum Local {
    V4(in_pktinfo),
    V6(in6_pktinfo),
    Unknown,
}

/// Where an answer goes.
#[derive(Debug, Clone, Copy)]
pub struct Client {
    address: SockaddrStorage,
    local: Local,
}

/// A socket for queries.
#[derive(Debug)]
pub struct Datagrams {
    socket: UdpSocket,
}

impl Datagrams {
    /// Listens.
    ///
    /// # Errors
    /// If the address is another's, or none of this machine.
    pub fn bind(listen: SocketAddr) -> io::Result<Self> {
        let socket = StdSocket::bind(listen)?;
        socket.set_nonblocking(true)?;
        if listen.is_ipv4() {
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        }
        Ok(Self { socket: UdpSocket::from_std(socket)? })
    }

    /// The next datagram: its length, what is beyond the buffer is lost; and whose it is.
    ///
    /// # Errors
    /// What the kernel says, such as that a former answer found nobody.
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, Client)> {
        let socket = self.socket.as_raw_fd();
        let receive = || {
            let mut parts = [IoSliceMut::new(buffer)];
            let mut space = nix::cmsg_space!(in6_pktinfo);
            let message = recvmsg::<SockaddrStorage>(
                socket,
                &mut parts,
                Some(&mut space),
                MsgFlags::MSG_DONTWAIT,
            )?;
            let local = message.cmsgs()?.find_map(|control| match control {
                ControlMessageOwned::Ipv4PacketInfo(info) => Some(Local::V4(info)),
                ControlMessageOwned::Ipv6PacketInfo(info) => Some(Local::V6(info)),
                _ => None,
            });
            let address = message.address.ok_or(io::ErrorKind::AddrNotAvailable)?;
            Ok((message.bytes, Client { address, local: local.unwrap_or(Local::Unknown) }))
        };
        self.socket.async_io(Interest::READABLE, receive).await
    }

    /// Answers, unless there is no room now: the client asks again.
    pub fn send(&self, answer: &[u8], client: &Client) {
        let parts = [IoSlice::new(answer)];
        let (v4, v6);
        let control = match client.local {
            Local::V4(info) => {
                // From that address, by whichever way leads to the client.
                v4 = in_pktinfo { ipi_ifindex: 0, ..info };
                Some(ControlMessage::Ipv4PacketInfo(&v4))
            }
            Local::V6(info) => {
                v6 = info;
                Some(ControlMessage::Ipv6PacketInfo(&v6))
            }
            Local::Unknown => None,
        };
        let socket = self.socket.as_raw_fd();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        if let Err(error) =
            sendmsg(socket, &parts, control.as_slice(), flags, Some(&client.address))
        {
            tracing::debug!(%error, "a DNS answer was not sent");
        }
    }
}
