//! Looks whether certificates' files have changed.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use super::{Certificates, ListenerConfig};

/// Between two looks. Files are looked at, not waited for: a rename of a directory or of what a
/// link points to, as certificate managers do it, is seen like any other change.
const INTERVAL: Duration = Duration::from_secs(1);

/// A thread that looks, until this is dropped.
#[derive(Debug)]
pub struct Watch {
    watched: Arc<Mutex<Vec<Weak<Certificates>>>>,
}

impl Watch {
    /// Starts it.
    ///
    /// # Errors
    /// If the system has no thread for it.
    pub fn start() -> io::Result<Self> {
        let watched = Arc::new(Mutex::new(Vec::<Weak<Certificates>>::new()));
        let shared = Arc::downgrade(&watched);
        thread::Builder::new().name("certificates".to_owned()).spawn(move || {
            while let Some(watched) = shared.upgrade() {
                let all = {
                    let mut watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
                    watched.retain(|it| it.strong_count() > 0);
                    watched.clone()
                };
                drop(watched);
                for certificates in all.iter().filter_map(Weak::upgrade) {
                    certificates.refresh();
                }
                thread::sleep(INTERVAL);
            }
        })?;
        Ok(Self { watched })
    }

    /// What is wrong with them now.
    pub fn problems(&self) -> BTreeSet<String> {
        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner).clone();
        watched.iter().filter_map(Weak::upgrade).flat_map(|it| it.problems()).collect()
    }

    /// Looks at these, too, for as long as somebody uses them.
    pub fn add(&self, config: &ListenerConfig) {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.push(Arc::downgrade(&config.certificates));
    }
}
