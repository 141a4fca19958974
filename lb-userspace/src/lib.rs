//! The agent of lb: what should be true is configured, observed and written to the kernel.
//!
//! Data flows one way: [`config`] -> [`state`] -> [`reconcile`] -> [`dataplane`]; [`health`],
//! [`netlink`] and [`api`] only send events to the owner of the state. [`target`] is the other role
//! that a machine can have, with a data plane of its own.

pub mod agent;
mod any_certificate;
pub mod api;
pub mod cli;
pub mod config;
pub mod dataplane;
pub mod dns;
pub mod health;
pub mod netlink;
pub mod proxy;
mod proxy_protocol;
pub mod reconcile;
mod regular_expression;
pub mod state;
pub mod target;

/// The proxy takes and gives back a few dozen pieces of memory for each request.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
