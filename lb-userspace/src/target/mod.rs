//! The role `target`: unwraps tunnels and enforces the machine's security groups.
//!
//! ```text
//! configuration ─┐
//!                ├─ policy (pure) ─ tables ─ plan (pure) ─ dataplane ─ kernel
//! own addresses ─┘
//! ```

mod agent;
mod clsact;
mod dataplane;
mod plan;
mod policy;
mod seed;

pub(crate) use agent::run;
pub use dataplane::{TARGET_OBJECT, TargetDataplane, TargetLoadOptions, WAY_IN};
pub use plan::{Plan, Sender, Step, Tables, diff};
pub use policy::{Policy, compile};
