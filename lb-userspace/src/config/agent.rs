//! `[agent]`: the agent itself.

use std::path::PathBuf;

use super::model::{Agent, CookieKey, Role, TunnelSources, XdpMode};
use super::reader::{Table, Value, Wrong};
use super::tunnel_sources;

/// Where the API listens unless the file says otherwise.
pub const DEFAULT_API_SOCKET: &str = "/run/lb/lb.sock";

impl Default for Agent {
    fn default() -> Self {
        Self {
            interfaces: Vec::new(),
            role: Role::Balancer,
            xdp_mode: XdpMode::Auto,
            availability_zone: None,
            manage_addresses: true,
            hash_seed: None,
            maglev_table_size: 16381,
            flow_table_size: 1_048_576,
            half_open_table_size: 262_144,
            once_seen_table_size: 262_144,
            api_socket: PathBuf::from(DEFAULT_API_SOCKET),
            tunnel_sources: TunnelSources::default(),
            cookie_key: None,
        }
    }
}

pub(super) fn read(mut table: Table<'_>) -> Agent {
    let default = Agent::default();
    let roles = [("balancer", Role::Balancer), ("target", Role::Target)];
    let xdp_modes =
        [("auto", XdpMode::Auto), ("native", XdpMode::Native), ("generic", XdpMode::Generic)];
    let agent = Agent {
        interfaces: table.optional("interfaces").map(interfaces).unwrap_or_default(),
        role: table
            .optional("role")
            .and_then(|role| role.choice(&roles, &[]))
            .unwrap_or(default.role),
        xdp_mode: table
            .optional("xdp_mode")
            .and_then(|mode| mode.choice(&xdp_modes, &[]))
            .unwrap_or(default.xdp_mode),
        availability_zone: table.optional("availability_zone").and_then(availability_zone),
        manage_addresses: table
            .optional("manage_addresses")
            .and_then(|value| value.boolean())
            .unwrap_or(default.manage_addresses),
        hash_seed: table.optional("hash_seed").and_then(hash_seed),
        maglev_table_size: table
            .optional("maglev_table_size")
            .and_then(maglev_table_size)
            .unwrap_or(default.maglev_table_size),
        flow_table_size: flow_table_size(table.optional("flow_table_size"))
            .unwrap_or(default.flow_table_size),
        half_open_table_size: flow_table_size(table.optional("half_open_table_size"))
            .unwrap_or(default.half_open_table_size),
        once_seen_table_size: flow_table_size(table.optional("once_seen_table_size"))
            .unwrap_or(default.once_seen_table_size),
        api_socket: table.optional("api_socket").and_then(api_socket).unwrap_or(default.api_socket),
        tunnel_sources: table
            .optional("tunnel_sources")
            .map(tunnel_sources::read)
            .unwrap_or_default(),
        cookie_key: table.optional("cookie_key").and_then(cookie_key),
    };
    table.not_supported_yet(&["metrics_listen"]);
    table.finish();
    agent
}

/// The name of an availability zone, wherever one is given.
pub(super) fn availability_zone(value: Value<'_>) -> Option<String> {
    let help = "write the zone's name in quotes, such as \"a\", or leave the key out";
    value.parsed(help, |zone| match zone.trim() {
        "" => Err(Wrong::new("`availability_zone` cannot be empty", help)),
        _ => Ok(zone.to_owned()),
    })
}

fn interfaces(value: Value<'_>) -> Vec<String> {
    let help = "write a list of network interfaces, such as [\"eth0\"]; `ip link` shows them";
    let mut names: Vec<String> = Vec::new();
    for item in value.items(help).unwrap_or_default() {
        let Some(name) = item.string(help) else { continue };
        // The kernel's rule (dev_valid_name): IFNAMSIZ with its NUL is 16 bytes.
        let valid = (1..=15).contains(&name.len())
            && !matches!(name, "." | "..")
            && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
        if !valid {
            item.refuse("write the name of a network interface; `ip link` shows them");
        } else if names.iter().any(|other| other == name) {
            item.error(format!("`interfaces` has {} twice", item.quote()), "leave one out");
        } else {
            names.push(name.to_owned());
        }
    }
    names
}

fn hash_seed(value: Value<'_>) -> Option<u64> {
    let help = "write 1 to 16 hexadecimal digits after 0x, such as \"0x5eed5eed5eed5eed\"";
    value.parsed(help, |text| {
        text.strip_prefix("0x")
            .filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .ok_or_else(|| Wrong::new(value.refusal(), help))
    })
}

fn cookie_key(value: Value<'_>) -> Option<CookieKey> {
    let help = "write 64 hexadecimal digits in quotes, such as those of `openssl rand -hex 32`";
    let text = value.string(help)?;
    let key = hex_key(text);
    if key.is_none() {
        value.error("`cookie_key` is not 64 hexadecimal digits", help);
    }
    key.map(CookieKey)
}

fn hex_key(text: &str) -> Option<[u8; 32]> {
    let mut key = [0; 32];
    let is_hex = text.len() == 2 * key.len() && text.bytes().all(|b| b.is_ascii_hexdigit());
    for (byte, at) in key.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    is_hex.then_some(key)
}

fn flow_table_size(value: Option<Value<'_>>) -> Option<u32> {
    value?.integer(1024..=16_777_216)
}

fn maglev_table_size(value: Value<'_>) -> Option<u32> {
    let size = value.integer(MAGLEV_TABLE_SIZES)?;
    if is_prime(size) {
        return Some(size);
    }
    // Both bounds are prime, so there is one on either side.
    let below = (*MAGLEV_TABLE_SIZES.start()..size).rev().find(|n| is_prime(*n));
    let above = (size..=*MAGLEV_TABLE_SIZES.end()).find(|n| is_prime(*n));
    let nearest: Vec<String> = [below, above].iter().flatten().map(u32::to_string).collect();
    value.error(
        format!("`maglev_table_size` must be a prime, which {} is not", value.quote()),
        format!("write {}, the nearest primes", nearest.join(" or ")),
    );
    None
}

const MAGLEV_TABLE_SIZES: std::ops::RangeInclusive<u32> = 251..=65_521;

fn is_prime(n: u32) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

fn api_socket(value: Value<'_>) -> Option<PathBuf> {
    // sun_path has 108 bytes, with the NUL (unix(7)).
    const MAX_BYTES: usize = 107;
    let help = "write the absolute path of a socket, at most 107 bytes, such as \
                \"/run/lb/lb.sock\"";
    value.parsed(help, |path| {
        if path.starts_with('/') && path.len() <= MAX_BYTES && !path.contains('\0') {
            Ok(PathBuf::from(path))
        } else {
            Err(Wrong::new(value.refusal(), help))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_of_ring_sizes_are_prime() {
        assert!(is_prime(*MAGLEV_TABLE_SIZES.start()));
        assert!(is_prime(*MAGLEV_TABLE_SIZES.end()));
        assert!(is_prime(Agent::default().maglev_table_size));
        assert!(!is_prime(251 * 251));
    }
}
