//! The names of load balancers: an authoritative server for one zone (RFC 1034, RFC 1035).
//!
//! [`Zone`] is what is answered now, plain data that the state builds, and knows no socket; the
//! [`Responder`] has the sockets. What no key of the configuration speaks of is as small as it can be:
//! no recursion, no transfer, no DNSSEC.

mod name;
mod responder;
mod sockets;
mod zone;

pub use name::{label, number};
pub use responder::Responder;
pub use zone::{TTL, Zone};
