//! `members` of a security group: what packets of its machines are known by elsewhere.

use std::net::IpAddr;

use ipnet::IpNet;

use super::address::refuse_special;
use super::model::Member;
use super::reader::{Value, Wrong};
use super::security_group::parse_network;

const HELP: &str = "write addresses, MAC addresses and networks of tunnel sources, such as \
                    [\"10.0.2.1\", \"02:00:0a:00:02:01\", \"172.16.0.0/16\"]";

/// Reads the list, in the file's order.
pub(super) fn members(value: Value<'_>) -> Vec<Member> {
    let mut members: Vec<Member> = Vec::new();
    for item in value.items(HELP).unwrap_or_default() {
        let Some(member) = item.parsed(HELP, |text| member(item, text)) else { continue };
        if members.contains(&member) {
            item.error(format!("`members` has {} twice", item.quote()), "leave one out");
        } else {
            members.push(member);
        }
    }
    members
}

fn member(value: Value<'_>, text: &str) -> Result<Member, Wrong> {
    if let Some(mac) = mac(text) {
        // The first byte's lowest bit marks group addresses (IEEE 802), which send nothing.
        if mac[0] & 1 != 0 || mac == [0; 6] {
            let message = format!("{} is no MAC address that frames come from", value.quote());
            return Err(Wrong::new(message, "write the MAC address of a network interface"));
        }
        return Ok(Member::Mac(mac));
    }
    let network = parse_network(value, text, HELP)?;
    if network.prefix_len() == network.max_prefix_len() {
        return host(network.addr());
    }
    if network.prefix_len() < SHORTEST {
        let message = format!("{} holds most of all addresses", value.quote());
        let help = format!("write a network of /{SHORTEST} or longer: one for tunnel sources");
        return Err(Wrong::new(message, help));
    }
    Ok(Member::Tunnels(network))
}

/// Shorter networks are mistaken for tunnel sources.
const SHORTEST: u8 = 8;

fn host(address: IpAddr) -> Result<Member, Wrong> {
    refuse_special(address)?;
    Ok(Member::Address(address))
}

/// Six bytes in hexadecimal digits with `:` between them.
fn mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part = parts.next()?;
        if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(bytes)
}

impl Member {
    /// The sources of tunnel headers that it stands for.
    pub fn tunnel_sources(self) -> Option<IpNet> {
        match self {
            Self::Address(address) => Some(address.into()),
            Self::Tunnels(network) => Some(network),
            Self::Mac(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_are_told_from_ipv6_addresses() {
        assert_eq!(mac("02:00:0A:00:02:fe"), Some([2, 0, 10, 0, 2, 254]));
        for text in ["2:0:a:0:2:1", "02:00:0a:00:02", "02:00:0a:00:02:01:03", "2001:db8::1", ""] {
            assert_eq!(mac(text), None, "{text}");
        }
    }
}
