//! Addresses, and which of them packets can be balanced to or from.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::reader::{Value, Wrong};

pub(super) const ADDRESS_HELP: &str =
    "write an IP address in quotes, such as \"10.0.0.100\" or \"2001:db8::100\"";

/// An address of one host that other hosts can reach.
pub(super) fn host_address(value: Value<'_>) -> Option<IpAddr> {
    value.parsed(ADDRESS_HELP, |text| parse_host_address(value, text))
}

/// As [`host_address`], where `text` is the address within `value`.
pub(super) fn parse_host_address(value: Value<'_>, text: &str) -> Result<IpAddr, Wrong> {
    let Ok(address) = text.parse::<IpAddr>() else {
        return Err(Wrong::new(value.refusal(), ADDRESS_HELP));
    };
    refuse_special(address)?;
    Ok(address)
}

/// Refuses what is no address of one host, or none that others can reach.
pub(super) fn refuse_special(address: IpAddr) -> Result<(), Wrong> {
    let kind = match address {
        IpAddr::V6(v6) => {
            if let Some(v4) = v6.to_ipv4_mapped() {
                return Err(mapped(&v6.to_string(), &v4.to_string()));
            }
            special_v6(v6)
        }
        IpAddr::V4(v4) => special_v4(v4),
    };
    kind.map_or(Ok(()), |kind| {
        let help = "write an address that other machines can reach";
        Err(Wrong::new(format!("{address} is {kind}"), help))
    })
}

fn special_v4(address: Ipv4Addr) -> Option<&'static str> {
    match address {
        _ if address.is_unspecified() => Some("the unspecified address"),
        _ if address.is_loopback() => Some("a loopback address"),
        _ if address.is_multicast() => Some("a multicast address"),
        _ if address.is_broadcast() => Some("the broadcast address"),
        _ => None,
    }
}

fn special_v6(address: Ipv6Addr) -> Option<&'static str> {
    match address {
        _ if address.is_unspecified() => Some("the unspecified address"),
        _ if address.is_loopback() => Some("the loopback address"),
        _ if address.is_multicast() => Some("a multicast address"),
        // It means something else on every link, and the packet path knows no scopes.
        _ if address.is_unicast_link_local() => Some("a link-local address"),
        _ => None,
    }
}

/// IPv4 in IPv6's clothes: on the wire it is IPv4, so it must be written so.
pub(super) fn mapped(written: &str, v4: &str) -> Wrong {
    Wrong::new(format!("{written} is an IPv4-mapped IPv6 address"), format!("write \"{v4}\""))
}
