//! Request smuggling: a corpus of requests, answers and HTTP/2 streams that were made to be
//! misunderstood, sent through the proxy to a target that keeps every byte. Whatever the target
//! gets must be valid for a strict reader, and be what the client was answered for.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod cases;
mod frames;
#[path = "../proxy/harness.rs"]
#[expect(dead_code, reason = "the other tests of the proxy need more of it")]
mod harness;
mod http2;
mod mutations;
mod notation;
mod oracle;
mod requests;
mod responses;
mod target;
mod traffic;
#[path = "../proxy/http2/wire.rs"]
#[expect(dead_code, reason = "the other tests of the proxy need more of it")]
mod wire;
