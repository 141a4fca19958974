//! TCP connections that the machine opened before its flows were recorded.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lb_common::flow::{FlowKey, TCP};
use lb_common::wire::Be16;

/// What `/proc/net/tcp` lists (proc_net_tcp(5)): local and remote end, state.
type Connection = (SocketAddr, SocketAddr, u8);

/// States of the kernel's `enum` in tcp_states.h.
const SYN_RECV: u8 = 3;
const LISTEN: u8 = 10;

/// The flows that answer this network namespace's own connections: those whose local port nothing
/// listens on.
///
/// # Errors
/// When the kernel's list cannot be read.
pub fn own_connections() -> io::Result<Vec<FlowKey>> {
    let mut connections = Vec::new();
    for list in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        match fs::read_to_string(list) {
            Ok(text) => connections.extend(text.lines().skip(1).filter_map(connection)),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(own(&connections))
}

fn own(connections: &[Connection]) -> Vec<FlowKey> {
    let listening: BTreeSet<u16> = connections
        .iter()
        .filter(|(_, _, state)| *state == LISTEN)
        .map(|(local, ..)| local.port())
        .collect();
    connections
        .iter()
        .filter(|(_, _, state)| !matches!(*state, LISTEN | SYN_RECV))
        .filter(|(local, ..)| !listening.contains(&local.port()))
        .map(|(local, remote, _)| FlowKey {
            source: remote.ip().into(),
            destination: local.ip().into(),
            source_port: Be16::new(remote.port()),
            destination_port: Be16::new(local.port()),
            protocol: TCP,
            zero: [0; 3],
        })
        .collect()
}

fn connection(line: &str) -> Option<Connection> {
    let mut words = line.split_whitespace().skip(1);
    let (local, remote, state) = (words.next()?, words.next()?, words.next()?);
    Some((end(local)?, end(remote)?, u8::from_str_radix(state, 16).ok()?))
}

/// An address, each 32 bits as a number of the machine's byte order, and a port.
fn end(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| {
        let digits = address.get(at..at + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    let address: IpAddr = match address.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let mut octets = [0; 16];
            for (chunk, at) in octets.chunks_mut(4).zip([0, 8, 16, 24]) {
                chunk.copy_from_slice(&word(at)?);
            }
            Ipv6Addr::from(octets).to_canonical()
        }
        _ => return None,
    };
    Some((address, u16::from_str_radix(port, 16).ok()?).into())
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    /// Lines of a machine: a listener, a connection to it, one of its own in each family.
    const LIST: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0B02000A:1F90 0A01000A:9C40 01 00000000:00000000 00:00000000 00000000     0        0 2 1
   2: 0B02000A:C350 0101000A:1538 01 00000000:00000000 00:00000000 00000000     0        0 3 1
   3: 000200FD000000000000000011000000:C351 000100FD000000000000000010000000:01BB 08 0:0 0:0 0 0
   4: 0000000000000000FFFF00000B02000A:C352 0000000000000000FFFF00000101000A:01BB 01 0:0 0:0 0 0
";

    #[test]
    fn connections_to_a_listening_port_are_not_own() {
        let connections: Vec<_> = LIST.lines().skip(1).filter_map(connection).collect();
        let own: Vec<String> = own(&connections)
            .iter()
            .map(|key| {
                let ends = [
                    SocketAddr::new(key.source.into(), key.source_port.get()),
                    SocketAddr::new(key.destination.into(), key.destination_port.get()),
                ];
                format!("{} {}", ends[0], ends[1])
            })
            .collect();
        assert_eq!(
            own,
            [
                "10.0.1.1:5432 10.0.2.11:50000",
                "[fd00:100::10]:443 [fd00:200::11]:50001",
                "10.0.1.1:443 10.0.2.11:50002",
            ]
        );
    }
}
