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
const V6_LENGTHS: RangeInclusive<u8> = 16..=128;

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
    let lengths = if network.addr().is_ipv4() { V4_LENGTHS } else { V6_LENGTHS };
    if lengths.contains(&network.prefix_len()) {
        return Ok(network);
    }
    let help = format!("write a network of /{} to /{}", lengths.start(), lengths.end());
    Err(Wrong::new(value.refusal(), help))
}
