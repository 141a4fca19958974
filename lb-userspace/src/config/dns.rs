//! `[dns]`: the names of load balancers.

use std::net::{IpAddr, SocketAddr};

use super::model::Dns;
use super::reader::{Table, Value, Wrong};

/// The table, and where the file has the address.
pub(super) struct Draft<'a> {
    pub(super) listen: (Value<'a>, SocketAddr),
    pub(super) zone: String,
}

impl From<Draft<'_>> for Dns {
    fn from(draft: Draft<'_>) -> Self {
        Self { listen: draft.listen.1, zone: draft.zone }
    }
}

pub(super) fn read(mut table: Table<'_>) -> Option<Draft<'_>> {
    let listen = table.required("listen", "add listen = \"10.0.0.53:53\", where it is asked");
    let zone = table.required("zone", "add zone = \"elb.internal\", what every name ends in");
    table.finish();
    let listen = listen.and_then(|value| Some((value, socket(value)?)));
    let zone = zone.and_then(zone_name);
    Some(Draft { listen: listen?, zone: zone? })
}

fn socket(value: Value<'_>) -> Option<SocketAddr> {
    let help = "write an address of this machine and a port in quotes, such as \"10.0.0.53:53\" \
                or \"[2001:db8::53]:53\"";
    value.parsed(help, |text| {
        let socket: Option<SocketAddr> = text.parse().ok();
        let is_right = |socket: &SocketAddr| {
            let mapped = match socket.ip() {
                IpAddr::V6(v6) => v6.to_ipv4_mapped().is_some(),
                IpAddr::V4(v4) => v4.is_broadcast(),
            };
            socket.port() != 0 && !mapped && !socket.ip().is_multicast() && !text.contains('%')
        };
        socket.filter(is_right).ok_or_else(|| Wrong::new(value.refusal(), help))
    })
}

/// A domain name (RFC 1035, section 2.3.4), with room in front for the names of load balancers.
fn zone_name(value: Value<'_>) -> Option<String> {
    const MAX_BYTES: usize = 150;
    let help = "write a domain name in quotes, such as \"elb.internal\"";
    value.parsed(help, |text| {
        let zone = text.trim_end_matches('.').to_ascii_lowercase();
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if zone.len() <= MAX_BYTES && text.len() <= zone.len() + 1 && zone.split('.').all(is_label)
        {
            Ok(zone)
        } else {
            Err(Wrong::new(value.refusal(), help))
        }
    })
}
