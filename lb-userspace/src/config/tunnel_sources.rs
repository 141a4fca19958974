//! `tunnel_sources`: what outer headers of tunnels have as their source.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::address::refuse_special;
use super::model::TunnelSources;
use super::reader::{Value, Wrong};
use super::security_group::parse_network;

const HELP: &str = "write one network or address of each family, such as [\"172.16.0.0/16\", \
                    \"100::/64\"]";
/// Shorter ones would take addresses of everybody.
const V4_LENGTHS: RangeInclusive<u8> = 8..=32;
/// Or one address: then nothing of it varies. In between, too little would.
const V6_LENGTHS: RangeInclusive<u8> = 16..=96;

impl Default for TunnelSources {
    /// Private (RFC 1918) and discard-only (RFC 6666) addresses: nothing is to be sent to them.
    fn default() -> Self {
        Self {
            v4: Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 16),
            v6: Ipv6Net::new_assert(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0), 64),
        }
    }
}

/// A family that is not given keeps its default.
pub(super) fn read(value: Value<'_>) -> TunnelSources {
    let mut sources = TunnelSources::default();
    let (mut v4_line, mut v6_line) = (None, None);
    for item in value.items(HELP).unwrap_or_default() {
        let Some(network) = item.parsed(HELP, |text| network(item, text)) else { continue };
        let (family, first) = match network {
            IpNet::V4(_) => ("IPv4", &mut v4_line),
            IpNet::V6(_) => ("IPv6", &mut v6_line),
        };
        if let Some(line) = first {
            item.error(
                format!("`tunnel_sources` has a second {family} network, {}", item.quote()),
                format!("leave one out; the first is in line {line}"),
            );
            continue;
        }
        *first = Some(item.line());
        match network {
            IpNet::V4(v4) => sources.v4 = v4,
            IpNet::V6(v6) => sources.v6 = v6,
        }
    }
    sources
}

fn network(value: Value<'_>, text: &str) -> Result<IpNet, Wrong> {
    let network = parse_network(value, text, HELP)?;
    refuse_special(network.addr())?;
    let is_right = match network {
        IpNet::V4(v4) => V4_LENGTHS.contains(&v4.prefix_len()),
        IpNet::V6(v6) => V6_LENGTHS.contains(&v6.prefix_len()) || is_one_address(v6),
    };
    if is_right {
        return Ok(network);
    }
    let help = match network {
        IpNet::V4(_) => "write a network of /8 to /32",
        IpNet::V6(_) => "write a network of /16 to /96, or an address that does not end in zeroes",
    };
    Err(Wrong::new(value.refusal(), help))
}

/// An address whose last 32 bits are not all 0: those would stand for a network's that vary.
fn is_one_address(network: Ipv6Net) -> bool {
    network.prefix_len() == 128 && network.addr().to_bits() as u32 != 0
}
