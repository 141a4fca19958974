//! The proxy: connections that end in the agent. HTTP for application load balancers, TLS for the
//! `tls` listeners of network ones.
//!
//! It knows the configuration's types and [`Routes`], nothing of state, health and the agent.

pub mod counters;
pub mod routes;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

pub use counters::Counters;
pub use routes::Routes;

/// The running proxy: worker threads of its own, which serve what [`Self::apply`] said last.
#[derive(Debug)]
pub struct Proxy {}

impl Proxy {
    /// Starts so many worker threads, which serve nothing yet.
    ///
    /// # Errors
    /// If the system has no thread or descriptor for one.
    pub fn start(workers: usize) -> io::Result<Self> {
        let _ = workers;
        Ok(Self {})
    }

    /// Serves this from now on, and nothing else. What is as it was goes on undisturbed. When it
    /// returns, new listeners accept connections.
    ///
    /// What does not work is in the answer, and tried again by the next call; the rest is served.
    pub fn apply(&self, routes: Routes) -> Vec<Problem> {
        let _ = routes;
        Vec::new()
    }

    /// What has been counted.
    pub fn counters(&self) -> Counters {
        Counters::default()
    }

    /// Opens the access logs' files again, after they were renamed.
    pub fn reopen_logs(&self) {}

    /// Accepts no connections any more, lets requests in progress end for at most so long, then
    /// ends the rest.
    pub async fn end(self, grace: Duration) {
        let _ = grace;
    }
}

/// Why a listener does not serve as it should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Which.
    pub listener: SocketAddr,
    /// Why, for the log.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "listener {}: {}", self.listener, self.reason)
    }
}
