//! Clients and targets that mean no good, through all of the load balancer, in namespaces. In every
//! test a client that means well is served meanwhile.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

#[expect(dead_code, reason = "shared with system_application_clients, which uses all of it")]
#[path = "../system_application_clients/authority.rs"]
mod authority;
mod bystander;
mod http;
mod idle;
mod large;
mod lies;
mod scene;
mod silence;
mod slow;
mod storms;
mod target;
#[expect(dead_code, reason = "shared with system_application_clients, which uses all of it")]
#[path = "../system_application_clients/world.rs"]
mod world;
