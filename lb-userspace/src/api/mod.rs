//! The agent's API: HTTP/1 with JSON over a Unix socket.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | [`snapshot::Status`] |
//! | `GET /v1/targets[?group=NAME]` | a list of [`snapshot::Target`]; 404 for an unknown group |
//!
//! Anything but 200 carries `{"error": "a sentence for humans"}`.

pub mod client;
pub mod server;
pub mod snapshot;

use serde::{Deserialize, Serialize};

/// The body of every answer that is not a success.
#[derive(Debug, Serialize, Deserialize)]
struct ErrorBody {
    error: String,
}

#[cfg(test)]
mod tests;
