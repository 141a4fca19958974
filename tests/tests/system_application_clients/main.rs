//! Real clients of every protocol, through all of the load balancer: XDP, the agent's proxy and
//! its names, in namespaces.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod authority;
mod browser;
mod http;
mod observation;
mod rpc;
mod streams;
mod world;
