//! What the kernel tells of TCP sockets (`/proc/net/tcp`, proc(5)): who listens on a port, and
//! whether all was sent.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// State of sockets that listen, in hexadecimal.
const LISTEN: &str = "0A";

const TABLES: [&str; 2] = ["/proc/self/net/tcp", "/proc/self/net/tcp6"];

/// Whether a connection at such an address and port, closed or not, has bytes that the other end has
/// not acknowledged.
pub fn has_unsent(is_there: impl Fn(SocketAddr) -> bool) -> bool {
    let tables = TABLES.iter().filter_map(|path| fs::read_to_string(path).ok());
    tables.into_iter().any(|table| table.lines().skip(1).filter_map(unsent).any(&is_there))
}

/// The local end of a connection, if a line of a table tells of one with such bytes.
fn unsent(line: &str) -> Option<SocketAddr> {
    let mut columns = line.split_ascii_whitespace();
    let (local, state, queues) = (columns.nth(1), columns.nth(1), columns.next());
    let (address, port) = local?.split_once(':')?;
    let (unsent, _) = queues?.split_once(':')?;
    let is_unsent = state? != LISTEN && unsent.bytes().any(|digit| digit != b'0');
    let port = u16::from_str_radix(port, 16).ok()?;
    is_unsent.then_some(SocketAddr::new(parse(address)?, port))
}

/// The process, other than this one, that listens at an address and TCP port.
pub fn holder(at: SocketAddr) -> Option<String> {
    let inodes: Vec<String> = TABLES
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|table| inodes(&table, at))
        .collect();
    if inodes.is_empty() {
        return None;
    }
    let own = std::process::id();
    let pids = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| {
        entry.file_name().to_str()?.parse::<u32>().ok().filter(|pid| *pid != own)
    });
    let mut holders = pids.filter(|pid| has_one_of(*pid, &inodes));
    holders.next().map(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        format!("{} (process {pid})", name.trim_end())
    })
}

fn has_one_of(pid: u32, inodes: &[String]) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors.flatten().filter_map(|entry| fs::read_link(entry.path()).ok()).any(|link| {
        let link = link.to_string_lossy();
        let inode = link.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'));
        inode.is_some_and(|inode| inodes.iter().any(|known| known == inode))
    })
}

/// The inodes of sockets in a table of the kernel's that keep others from listening there.
fn inodes(table: &str, at: SocketAddr) -> Vec<String> {
    let of_line = |line: &str| {
        let mut columns = line.split_ascii_whitespace();
        let (local, state) = (columns.nth(1)?, columns.nth(1)?);
        let inode = columns.nth(5)?;
        let (address, port) = local.split_once(':')?;
        let address = parse(address)?;
        let is_there = u16::from_str_radix(port, 16).ok()? == at.port()
            && (address == at.ip() || address.is_unspecified());
        (state == LISTEN && is_there).then(|| inode.to_owned())
    };
    table.lines().skip(1).filter_map(of_line).collect()
}

/// An address as the kernel prints it: words in the machine's byte order.
fn parse(text: &str) -> Option<IpAddr> {
    let word = |n: usize| {
        let digits = text.get(8 * n..8 * n + 8)?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    match text.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut octets = [0; 16];
            for (n, part) in octets.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(n)?);
            }
            Some(Ipv6Addr::from(octets).to_canonical())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_endian = "little")]
    #[test]
    fn the_kernel_s_table_is_read() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
             0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0000 100 0 0 10 0\n\
             1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4712 1 0000 100 0 0 10 0\n\
             2: 0100007F:1F90 0100007F:A000 01 00000000:00000000 00:00000000 00000000     0        0 4713 1 0000 100 0 0 10 0\n";
        let of = |at: &str| inodes(table, at.parse().unwrap());
        assert_eq!(of("127.0.0.1:8080"), ["4711"]);
        assert_eq!(of("127.0.0.2:8080"), [""; 0]);
        assert_eq!(of("10.0.0.1:80"), ["4712"]);
        assert_eq!(of("10.0.0.1:81"), [""; 0]);
        let six = parse("B80D0120000000000000000001000000").unwrap();
        assert_eq!(six, "2001:db8::1".parse::<IpAddr>().unwrap());
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn what_is_not_acknowledged_is_unsent() {
        let line = |state: &str, queued: &str| {
            format!("0: 6401000A:0050 0A01000A:A000 {state} {queued}:00000000 00:00000000 0 0 0 0")
        };
        let at = Some("10.0.1.100:80".parse().unwrap());
        assert_eq!(unsent(&line("01", "00000010")), at);
        assert_eq!(unsent(&line("04", "00A00000")), at, "closed, but not over");
        assert_eq!(unsent(&line("01", "00000000")), None);
        assert_eq!(unsent(&line(LISTEN, "00000080")), None);
    }

    #[test]
    fn who_is_not_there_is_nobody() {
        // The one listener is this process.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(holder(listener.local_addr().unwrap()), None);
    }
}
