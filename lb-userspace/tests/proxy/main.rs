//! The proxy on the loopback device, between real clients and servers.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod errors;
mod forwarding;
mod harness;
mod reload;
mod tls;
mod upgrades;
