//! Everything that decides what happens to a packet, in one crate for two worlds.
//!
//! [`forward::forward`] is generic over [`Frame`](forward::Frame), the bytes of a packet, and
//! [`Tables`](tables::Tables), the lookups. lb-ebpf implements both for the kernel; tests and
//! fuzzers implement them for slices and hash maps ([`model`]). The way of a packet:
//!
//! ```text
//! frame -> parse -> classify -> admit -> select -> rewrite -> emit
//! ```
#![no_std]
#![forbid(unsafe_code)]

#[cfg(any(test, feature = "std"))]
extern crate std;

// What fills the tables: the host's part.
#[cfg(any(test, feature = "std"))]
pub mod endpoints;
#[cfg(any(test, feature = "std"))]
pub mod lru;
#[cfg(any(test, feature = "std"))]
pub mod maglev;
#[cfg(any(test, feature = "std"))]
pub mod model;

pub mod flow;
pub mod forward;
pub mod load;
pub mod snat;
pub mod tables;
pub mod target;
pub mod tunnel;
pub mod verdict;
pub mod wire;
