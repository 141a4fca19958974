//! Listeners of the proxy that left the configuration. The proxy accepts no connections there any
//! more, but those it has may end by themselves: their packets pass, and their address stays on the
//! machine, until they are over.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::proxy::ENDING;

use super::desired::{Admission, admission};
use super::proxied::proxied_keys;
use super::{State, listener_keys};

/// What clients have not acknowledged when the proxy gives up on their connections may take that
/// much longer.
const REST: Duration = Duration::from_secs(20);

/// A listener that ends.
#[derive(Debug, Clone)]
pub struct Ending {
    /// Whom it admitted when it left; `None`: everybody.
    pub admission: Option<Admission>,
    /// When it is over at the latest.
    until: Instant,
}

impl State {
    /// Notes the proxy's listeners that the next configuration no longer has.
    pub(super) fn note_ending(&mut self, next: &Config, now: Instant) {
        let until = now + ENDING + REST;
        for (key, _, balancer, _) in proxied_keys(&self.config) {
            let admission = admission(&self.admissions, &key, balancer).cloned();
            self.ending.insert(key, Ending { admission, until });
        }
        for (key, ..) in listener_keys(next) {
            self.ending.remove(&key);
        }
        for (key, ..) in proxied_keys(next) {
            self.ending.remove(&key);
        }
    }

    /// Where listeners of the proxy end.
    pub fn ending(&self) -> impl Iterator<Item = SocketAddr> {
        self.ending.keys().map(|key| SocketAddr::new(key.address, key.port))
    }

    /// Forgets listeners of which all connections are over, and those that took too long. Whether
    /// there were any.
    pub fn forget_ended(&mut self, is_over: impl Fn(SocketAddr) -> bool, now: Instant) -> bool {
        let before = self.ending.len();
        self.ending.retain(|key, ending| {
            ending.until > now && !is_over(SocketAddr::new(key.address, key.port))
        });
        self.ending.len() != before
    }
}
