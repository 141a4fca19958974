//! Where the configuration comes from, and when it is read again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

use crate::config::{self, Agent, Config, LoadError};

/// Where the agent looks without `--config`.
pub const DEFAULT_PATH: &str = "/etc/lb/lb.toml";
/// Quiet time after a write before the file is read: editors and copies write in pieces.
const QUIET: Duration = Duration::from_millis(200);

/// The configuration file.
pub struct Source {
    path: PathBuf,
    /// What was read last, whether it was taken over or not.
    text: Option<String>,
}

impl Source {
    /// Reads the configuration for the first time. A file named on purpose must exist; the default
    /// one need not.
    ///
    /// # Errors
    /// [`LoadError`] with everything that is wrong with it.
    pub fn open(named: Option<PathBuf>) -> Result<(Self, Config), LoadError> {
        let is_named = named.is_some();
        let path = named.unwrap_or_else(|| DEFAULT_PATH.into());
        let text = std::fs::read_to_string(&path).ok();
        let config = match config::load(&path) {
            Ok(parsed) => {
                parsed.warnings_here().for_each(|warning| warn!("{warning}"));
                parsed.config
            }
            Err(LoadError::Missing(_)) if !is_named => Config::default(),
            Err(error) => return Err(error),
        };
        Ok((Self { path, text }, config))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is such a file, as far as is known.
    pub fn is_there(&self) -> bool {
        self.text.is_some()
    }

    /// Reads the file again. `None`: it is as before, and nobody asked for it.
    ///
    /// # Errors
    /// Everything that is wrong with it, and an empty file where load balancers run.
    pub fn read_again(
        &mut self,
        is_asked: bool,
        running: &Config,
    ) -> anyhow::Result<Option<Config>> {
        let text = std::fs::read_to_string(&self.path).ok();
        if text == self.text && !is_asked {
            return Ok(None);
        }
        self.text = text;
        let parsed = config::load(&self.path)?;
        let is_empty = self.text.as_ref().is_none_or(|text| text.trim().is_empty());
        if is_empty && !running.load_balancers.is_empty() {
            bail!(
                "{} is empty, but {} load balancer(s) run: a half-written file? To end them all, \
                 leave a file with a comment in it",
                self.path.display(),
                running.load_balancers.len()
            );
        }
        parsed.warnings_here().for_each(|warning| warn!("{warning}"));
        let mut config = parsed.config;
        keep_what_is_fixed(&mut config.agent, &running.agent);
        Ok(Some(config))
    }
}

/// What cannot change while the program is loaded keeps its value, and the log says so.
fn keep_what_is_fixed(new: &mut Agent, running: &Agent) {
    let Agent {
        interfaces,
        xdp_mode,
        availability_zone: _,
        manage_addresses: _,
        hash_seed,
        maglev_table_size,
        flow_table_size,
        api_socket,
    } = new;
    keep("interfaces", interfaces, &running.interfaces);
    keep("xdp_mode", xdp_mode, &running.xdp_mode);
    keep("hash_seed", hash_seed, &running.hash_seed);
    keep("maglev_table_size", maglev_table_size, &running.maglev_table_size);
    keep("flow_table_size", flow_table_size, &running.flow_table_size);
    keep("api_socket", api_socket, &running.api_socket);
}

fn keep<T: PartialEq + Clone>(key: &str, new: &mut T, running: &T) {
    if new != running {
        warn!("agent.{key} cannot change by a reload: it keeps its value until the agent restarts");
        *new = running.clone();
    }
}

/// How often a directory is looked for that is not there yet.
const LOOK: Duration = Duration::from_secs(2);

/// Tells when the file may have changed and has been left alone for a moment.
pub struct Watch {
    path: PathBuf,
    sender: mpsc::UnboundedSender<Touch>,
    events: mpsc::UnboundedReceiver<Touch>,
    quiet_at: Option<Instant>,
    look_at: Instant,
    watcher: Option<RecommendedWatcher>,
}

/// What happened to something in the file's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Touch {
    /// It is being written.
    Began,
    /// It was closed after writing, or renamed.
    Ended,
}

impl Watch {
    /// Watches the file's directory: an editor replaces the file, a mounted configuration changes
    /// a link beside it. A directory that is not there yet is looked for now and then.
    pub fn new(path: &Path) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        let watcher = watch(path, sender.clone());
        if let Err(error) = &watcher {
            debug!("{error:#}: looking for it every {LOOK:?}");
        }
        let (path, look_at) = (path.to_owned(), Instant::now() + LOOK);
        Self { path, sender, events, quiet_at: None, look_at, watcher: watcher.ok() }
    }

    /// Waits until the file may have changed. Can be dropped and called again at any time.
    pub async fn changed(&mut self) {
        loop {
            let wake = match (&self.watcher, self.quiet_at) {
                (None, _) => Some(self.look_at),
                (Some(_), quiet_at) => quiet_at,
            };
            let quiet = async {
                match wake {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                touch = self.events.recv() => match touch {
                    Some(Touch::Ended) => self.quiet_at = Some(Instant::now() + QUIET),
                    Some(Touch::Began) => self.quiet_at = None,
                    None => std::future::pending().await,
                },
                () = quiet => {
                    self.quiet_at = None;
                    if self.watcher.is_none() {
                        self.look_at = Instant::now() + LOOK;
                        self.watcher = watch(&self.path, self.sender.clone()).ok();
                    }
                    if self.watcher.is_some() {
                        return;
                    }
                }
            }
        }
    }
}

fn watch(path: &Path, sender: mpsc::UnboundedSender<Touch>) -> anyhow::Result<RecommendedWatcher> {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        let touch = match event.map(|event| event.kind) {
            Ok(EventKind::Access(AccessKind::Close(AccessMode::Write)))
            | Ok(EventKind::Modify(ModifyKind::Name(_))) => Touch::Ended,
            Ok(EventKind::Modify(ModifyKind::Data(_)) | EventKind::Create(_)) => Touch::Began,
            _ => return,
        };
        // Nobody listens any more: the agent is ending.
        let _ = sender.send(touch);
    })?;
    watcher
        .watch(directory, RecursiveMode::NonRecursive)
        .with_context(|| format!("watch {}", directory.display()))?;
    Ok(watcher)
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const WAIT: Duration = Duration::from_secs(5);
    const SHORT: Duration = Duration::from_millis(600);

    #[tokio::test]
    async fn a_write_and_a_rename_are_noticed_once_and_an_open_file_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lb.toml");
        let mut watch = Watch::new(&path);
        std::fs::write(&path, "# one").unwrap();
        timeout(WAIT, watch.changed()).await.unwrap();
        timeout(SHORT, watch.changed()).await.unwrap_err();

        let other = directory.path().join("new");
        std::fs::write(&other, "# two").unwrap();
        std::fs::rename(&other, &path).unwrap();
        timeout(WAIT, watch.changed()).await.unwrap();

        use std::io::Write as _;
        let mut half = std::fs::File::create(&path).unwrap();
        half.write_all(b"[agent").unwrap();
        half.flush().unwrap();
        timeout(SHORT, watch.changed()).await.unwrap_err();
        drop(half);
        timeout(WAIT, watch.changed()).await.unwrap();
    }

    #[tokio::test]
    async fn a_directory_that_comes_later_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lb/lb.toml");
        let mut watch = Watch::new(&path);
        timeout(SHORT, watch.changed()).await.unwrap_err();
        std::fs::create_dir(directory.path().join("lb")).unwrap();
        timeout(WAIT, watch.changed()).await.unwrap();
        std::fs::write(&path, "# one").unwrap();
        timeout(WAIT, watch.changed()).await.unwrap();
    }

    #[test]
    fn an_empty_file_does_not_end_what_runs() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lb.toml");
        std::fs::write(&path, "[target_group.a]\nport = 80\n").unwrap();
        let (mut source, mut running) = Source::open(Some(path.clone())).unwrap();
        let balancer = config::LoadBalancer {
            scheme: config::Scheme::Internal,
            addresses: vec!["10.0.0.1".parse().unwrap()],
            security_groups: None,
            listeners: Vec::new(),
        };
        running.load_balancers.insert("web".into(), balancer);
        std::fs::write(&path, " \n").unwrap();
        let error = source.read_again(false, &running).unwrap_err();
        assert!(error.to_string().contains("is empty, but 1 load balancer(s) run"), "{error}");
        assert_eq!(source.read_again(false, &running).unwrap(), None);
        std::fs::write(&path, "# none\n").unwrap();
        assert_eq!(source.read_again(false, &running).unwrap(), Some(Config::default()));
    }

    #[test]
    fn what_is_fixed_keeps_its_value() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lb.toml");
        std::fs::write(&path, "").unwrap();
        let (mut source, running) = Source::open(Some(path.clone())).unwrap();
        std::fs::write(&path, "[agent]\nmaglev_table_size = 251\nmanage_addresses = false\n")
            .unwrap();
        let config = source.read_again(false, &running).unwrap().unwrap();
        assert_eq!(config.agent.maglev_table_size, running.agent.maglev_table_size);
        assert!(!config.agent.manage_addresses);
    }
}
