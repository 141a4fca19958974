//! The header of the PROXY protocol, version 2, with which a connection to a target begins.

use std::net::{IpAddr, SocketAddr};

/// What no other protocol begins with (section 2.2 of the PROXY protocol's text).
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Version 2, command LOCAL, of no address family: a connection of the sender's own, as health checks
/// are.
pub const LOCAL: [u8; 16] = *b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

/// Version 2, command PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;

/// Tells a target that `client` connected to `listener`. Addresses and ports are in network byte
/// order. Where one address is of IPv4 and the other is not, both are written as of IPv6.
pub fn header(client: SocketAddr, listener: SocketAddr) -> Vec<u8> {
    let mut header = SIGNATURE.to_vec();
    header.push(VERSION_AND_COMMAND);
    let addresses = match (client.ip(), listener.ip()) {
        (IpAddr::V4(client), IpAddr::V4(listener)) => {
            header.push(TCP_OVER_IPV4);
            [client.octets(), listener.octets()].concat()
        }
        (client, listener) => {
            header.push(TCP_OVER_IPV6);
            [octets6(client), octets6(listener)].concat()
        }
    };
    let ports = [client.port().to_be_bytes(), listener.port().to_be_bytes()].concat();
    let length = u16::try_from(addresses.len() + ports.len()).unwrap_or(u16::MAX);
    header.extend(length.to_be_bytes());
    header.extend(addresses);
    header.extend(ports);
    header
}

fn octets6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::header;

    #[test]
    fn version_4() {
        let bytes = header("192.0.2.1:1000".parse().unwrap(), "192.0.2.2:443".parse().unwrap());
        let expected =
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x01\xc0\0\x02\x02\x03\xe8\x01\xbb";
        assert_eq!(bytes, expected);
    }

    #[test]
    fn version_6() {
        let bytes = header("[2001:db8::1]:1000".parse().unwrap(), "[::2]:443".parse().unwrap());
        assert_eq!(bytes.len(), 16 + 36);
        assert_eq!(bytes[12..16], [0x21, 0x21, 0, 36]);
        assert_eq!(bytes[16..20], [0x20, 0x01, 0x0d, 0xb8]);
        assert_eq!(bytes[48..], [0x03, 0xe8, 0x01, 0xbb]);
    }
}
