//! What the file says of connections that end in the proxy: listeners of application load
//! balancers, `tls` listeners, their rules, and the target groups behind them.

mod action;
mod attributes;
mod condition;
mod group;
mod listener;
mod pattern;
mod redirect;
mod references;
mod rule;
mod tls;
mod transform;

pub(super) use attributes::read as attributes;
pub(super) use group::{FORWARDED_KEYS, algorithm, read as group};
pub(super) use listener::{Draft, KEYS, read as listener};
pub(super) use references::{check, check_forwarded};
