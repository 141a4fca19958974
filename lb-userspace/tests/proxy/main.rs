//! The proxy on the loopback device, between real clients and servers.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod decisions;
mod errors;
mod fields;
mod forwarding;
mod harness;
mod http2;
mod own_answers;
mod reload;
mod repeats;
mod stickiness;
mod tls;
mod upgrades;
