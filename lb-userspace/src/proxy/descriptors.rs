//! Descriptors: every connection needs one, and the agent needs some for itself.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::time::Instant;

/// What is left to the agent's own files and sockets.
const RESERVE: u64 = 64;

/// How many descriptors connections may use. The system gives a new descriptor the lowest number
/// that is free (accept(2), socket(2)): its number says how many there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptors {
    /// Clients' connections have lower numbers than that: a quarter is left to connections to
    /// targets, without which clients would be of no use.
    clients: u64,
    /// Connections to targets have lower numbers than that.
    targets: u64,
}

impl Descriptors {
    /// What this process may have now.
    pub fn of_process() -> Self {
        // It cannot fail for a limit that there is.
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        Self::of(limit)
    }

    fn of(limit: u64) -> Self {
        let targets = limit.saturating_sub(RESERVE);
        Self { clients: targets / 4 * 3, targets }
    }

    /// Whether a client's connection with that descriptor can be served.
    pub fn has_room_for_client(self, descriptor: RawFd) -> bool {
        u64::try_from(descriptor).is_ok_and(|number| number < self.clients)
    }

    /// Whether a connection to a target with that descriptor can be used.
    pub fn has_room_for_target(self, descriptor: RawFd) -> bool {
        u64::try_from(descriptor).is_ok_and(|number| number < self.targets)
    }
}

/// Lets this process have as many descriptors as its hard limit says. How many that are.
///
/// # Errors
/// If the system refuses.
pub fn raise() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// Whether the system, or this process, has no descriptors left.
pub fn are_exhausted(error: &io::Error) -> bool {
    let codes = [Errno::EMFILE, Errno::ENFILE].map(|code| Some(code as i32));
    codes.contains(&error.raw_os_error())
}

/// Something that is worth a line of the log now and then, and not each time that it happens.
#[derive(Debug)]
pub struct Seldom {
    epoch: Instant,
    /// Milliseconds since the epoch from which on it may be said again.
    next: AtomicU64,
}

impl Default for Seldom {
    fn default() -> Self {
        Self { epoch: Instant::now(), next: AtomicU64::new(0) }
    }
}

impl Seldom {
    /// Between two lines.
    const PAUSE: Duration = Duration::from_secs(10);

    /// Whether it should be said now.
    pub fn is_due(&self) -> bool {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let now = self.epoch.elapsed();
        let is_due = millis(now) >= self.next.load(Relaxed);
        if is_due {
            self.next.store(millis(now + Self::PAUSE), Relaxed);
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::{Descriptors, Seldom, raise};

    #[tokio::test(start_paused = true)]
    async fn what_happens_often_is_said_seldom() {
        let seldom = Seldom::default();
        assert!(seldom.is_due());
        assert!(!seldom.is_due());
        tokio::time::advance(Seldom::PAUSE).await;
        assert!(seldom.is_due());
        assert!(!seldom.is_due());
    }

    #[test]
    fn targets_and_the_agent_have_their_share() {
        let some = Descriptors::of(1064);
        assert!(some.has_room_for_client(749) && !some.has_room_for_client(750));
        assert!(some.has_room_for_target(999) && !some.has_room_for_target(1000));
        // Too few for anything is no reason to panic.
        assert!(!Descriptors::of(10).has_room_for_client(3));
        assert!(Descriptors::of(u64::MAX).has_room_for_client(i32::MAX));
    }

    #[test]
    fn the_limit_is_raised() {
        let limit = raise().unwrap();
        assert_eq!(Descriptors::of_process(), Descriptors::of(limit));
    }
}
