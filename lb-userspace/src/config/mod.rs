//! The configuration file: TOML in, a [`Config`] that is valid by construction out.

pub mod model;

pub use model::*;
