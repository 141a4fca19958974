//! When the configuration file is to be read again.
//!
//! Two directories are watched: the one that the file's name is in, and the one that holds the file
//! itself, which differ where links lead to it. inotify follows a directory, not its name, so that
//! both are looked up again now and then: a directory that was replaced, and a link that leads
//! elsewhere (as a mounted ConfigMap is updated), are noticed by that.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::warn;

/// Quiet time after a write before the file is read: editors and copies write in pieces.
const QUIET: Duration = Duration::from_millis(200);
/// How often it is looked where the file is.
const LOOK: Duration = Duration::from_secs(2);

/// Tells when the file may have changed and has been left alone for a moment.
pub struct Watch {
    path: PathBuf,
    place: Place,
    sender: mpsc::UnboundedSender<Touch>,
    events: mpsc::UnboundedReceiver<Touch>,
    quiet_at: Option<Instant>,
    look_at: Instant,
    /// Whether it has been said that there is no watching.
    has_complained: bool,
    watcher: Option<RecommendedWatcher>,
}

/// What happened in a watched directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Touch {
    /// The file is being written.
    Began,
    /// The file was closed after writing, or renamed.
    Ended,
    /// Something else came, went or moved: perhaps a link that leads to the file.
    Beside,
}

/// Where the file is: what has to be watched to see it change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Place {
    /// The name, and where it leads if it leads anywhere.
    files: BTreeSet<PathBuf>,
    /// The directories of both, with device and inode: the same name can become another directory.
    directories: BTreeSet<(PathBuf, u64, u64)>,
}

impl Place {
    fn of(path: &Path) -> Self {
        let mut files = BTreeSet::from([path.to_owned()]);
        files.extend(fs::canonicalize(path));
        let directories = files.iter().filter_map(|file| {
            let directory = directory_of(file);
            let metadata = fs::metadata(directory).ok()?;
            Some((directory.to_owned(), metadata.dev(), metadata.ino()))
        });
        Self { directories: directories.collect(), files: files.clone() }
    }

    /// The event's paths are the watched directory with the name behind it.
    fn names(&self) -> BTreeSet<PathBuf> {
        let name = |file: &PathBuf| Some(directory_of(file).join(file.file_name()?));
        self.files.iter().filter_map(name).collect()
    }
}

fn directory_of(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

impl Watch {
    /// Watches the file `path`, which need not be there yet, nor its directory.
    pub fn new(path: &Path) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        let mut watch = Self {
            path: path.to_owned(),
            place: Place::of(path),
            sender,
            events,
            quiet_at: None,
            look_at: Instant::now() + LOOK,
            has_complained: false,
            watcher: None,
        };
        watch.establish();
        watch
    }

    /// Waits until the file may have changed. Can be dropped and called again at any time.
    pub async fn changed(&mut self) {
        loop {
            let wake = self.quiet_at.map_or(self.look_at, |quiet_at| quiet_at.min(self.look_at));
            tokio::select! {
                touch = self.events.recv() => match touch {
                    Some(Touch::Ended) => self.quiet_at = Some(Instant::now() + QUIET),
                    Some(Touch::Began) => self.quiet_at = None,
                    Some(Touch::Beside) => self.look(),
                    None => std::future::pending().await,
                },
                () = sleep_until(wake) => {
                    if self.look_at <= Instant::now() {
                        self.look();
                    }
                    if self.quiet_at.is_some_and(|quiet_at| quiet_at <= Instant::now()) {
                        self.quiet_at = None;
                        return;
                    }
                }
            }
        }
    }

    /// Watches anew if the file is elsewhere now.
    fn look(&mut self) {
        self.look_at = Instant::now() + LOOK;
        let place = Place::of(&self.path);
        let has_moved = place != self.place;
        let can_be_watched = !place.directories.is_empty();
        if !has_moved && self.watcher.is_some() == can_be_watched {
            return;
        }
        self.place = place;
        self.establish();
        if has_moved && self.watcher.is_some() {
            self.quiet_at = Some(Instant::now() + QUIET);
        }
    }

    fn establish(&mut self) {
        loop {
            self.watcher = None;
            if self.place.directories.is_empty() {
                return;
            }
            match watch(&self.place, self.sender.clone()) {
                Ok(watcher) => self.watcher = Some(watcher),
                Err(error) => return self.complain(&error),
            }
            self.has_complained = false;
            // What moved before the watching began gave no event.
            let place = Place::of(&self.path);
            if place == self.place {
                return;
            }
            self.place = place;
        }
    }

    fn complain(&mut self, error: &notify::Error) {
        if !std::mem::replace(&mut self.has_complained, true) {
            warn!(
                "changes of {} are not noticed (SIGHUP has it read again): {error}; trying again \
                 every {LOOK:?}",
                self.path.display()
            );
        }
    }
}

fn watch(
    place: &Place,
    sender: mpsc::UnboundedSender<Touch>,
) -> notify::Result<RecommendedWatcher> {
    let files = place.names();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        let Ok(event) = event else { return };
        let is_it = event.paths.iter().any(|path| files.contains(path));
        // Nobody writes to a link: it is there at once.
        let is_link = || event.paths.iter().any(|path| path.is_symlink());
        let touch = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Modify(ModifyKind::Name(_))
                if is_it =>
            {
                Touch::Ended
            }
            EventKind::Modify(ModifyKind::Data(_)) if is_it => Touch::Began,
            EventKind::Create(_) if is_it && !is_link() => Touch::Began,
            EventKind::Create(_)
            | EventKind::Remove(_)
            | EventKind::Modify(ModifyKind::Name(_)) => Touch::Beside,
            _ => return,
        };
        // Nobody listens any more: the agent is ending.
        let _ = sender.send(touch);
    })?;
    for (directory, ..) in &place.directories {
        watcher.watch(directory, RecursiveMode::NonRecursive)?;
    }
    Ok(watcher)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::symlink;

    use tokio::time::timeout;

    use super::*;

    const WAIT: Duration = Duration::from_secs(5);
    const SHORT: Duration = Duration::from_millis(600);

    #[tokio::test]
    async fn a_write_and_a_rename_are_noticed_once_and_an_open_file_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lb.toml");
        let mut watch = Watch::new(&path);
        fs::write(&path, "# one").unwrap();
        timeout(WAIT, watch.changed()).await.unwrap();
        timeout(SHORT, watch.changed()).await.unwrap_err();

        let other = directory.path().join("new");
        fs::write(&other, "# two").unwrap();
        fs::rename(&other, &path).unwrap();
        timeout(WAIT, watch.changed()).await.unwrap();

        let mut half = fs::File::create(&path).unwrap();
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
        fs::create_dir(directory.path().join("lb")).unwrap();
        timeout(WAIT, watch.changed()).await.unwrap();
        fs::write(&path, "# one").unwrap();
        timeout(WAIT, watch.changed()).await.unwrap();
    }

    /// An editor keeps a swap file beside the file and writes it whenever it likes.
    #[tokio::test]
    async fn a_neighbour_that_is_being_written_is_no_matter() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lb.toml");
        fs::write(&path, "# one").unwrap();
        let mut watch = Watch::new(&path);
        let mut swap = fs::File::create(directory.path().join(".lb.toml.swp")).unwrap();
        swap.write_all(b"b0VIM").unwrap();
        timeout(SHORT, watch.changed()).await.unwrap_err();
        fs::write(&path, "# two").unwrap();
        let writing = tokio::spawn(async move {
            for _ in 0..1000 {
                swap.write_all(b"line").unwrap();
                swap.flush().unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        timeout(WAIT, watch.changed()).await.unwrap();
        timeout(SHORT, watch.changed()).await.unwrap_err();
        writing.abort();
    }

    #[tokio::test]
    async fn a_replaced_directory_is_found() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("etc");
        let path = directory.join("lb.toml");
        fs::create_dir(&directory).unwrap();
        fs::write(&path, "# one").unwrap();
        let mut watch = Watch::new(&path);
        for round in ["two", "three"] {
            fs::rename(&directory, parent.path().join(round)).unwrap();
            fs::create_dir(&directory).unwrap();
            fs::write(&path, round).unwrap();
            timeout(WAIT, watch.changed()).await.unwrap();
            timeout(SHORT, watch.changed()).await.unwrap_err();
            // From then on as before.
            fs::write(&path, "again").unwrap();
            timeout(WAIT, watch.changed()).await.unwrap();
        }
        fs::remove_dir_all(&directory).unwrap();
        timeout(3 * LOOK / 2, watch.changed()).await.unwrap_err();
        fs::create_dir(&directory).unwrap();
        fs::write(&path, "# four").unwrap();
        timeout(WAIT, watch.changed()).await.unwrap();
    }

    #[tokio::test]
    async fn what_a_link_leads_to_is_watched_as_well() {
        let home = tempfile::tempdir().unwrap();
        let (etc, elsewhere) = (home.path().join("etc"), home.path().join("elsewhere"));
        fs::create_dir(&etc).unwrap();
        fs::create_dir(&elsewhere).unwrap();
        fs::write(elsewhere.join("web.toml"), "# one").unwrap();
        let path = etc.join("lb.toml");
        symlink("../elsewhere/web.toml", &path).unwrap();
        let mut watch = Watch::new(&path);
        fs::write(elsewhere.join("other.toml"), "# no matter").unwrap();
        timeout(SHORT, watch.changed()).await.unwrap_err();
        fs::write(elsewhere.join("web.toml"), "# two").unwrap();
        timeout(WAIT, watch.changed()).await.unwrap();
        // The link itself: to a file that is there already.
        fs::remove_file(&path).unwrap();
        symlink("../elsewhere/other.toml", &path).unwrap();
        timeout(WAIT, watch.changed()).await.unwrap();
        fs::write(elsewhere.join("other.toml"), "# three").unwrap();
        timeout(WAIT, watch.changed()).await.unwrap();
    }

    /// lb.toml -> ..data/lb.toml, ..data -> ..1; an update makes ..2 and renames a new ..data.
    #[tokio::test]
    async fn an_updated_config_map_is_noticed() {
        let mount = tempfile::tempdir().unwrap();
        let at = |name: &str| mount.path().join(name);
        let version = |name: &str| {
            fs::create_dir(at(name)).unwrap();
            fs::write(at(name).join("lb.toml"), name).unwrap();
            symlink(name, at("..data_tmp")).unwrap();
            fs::rename(at("..data_tmp"), at("..data")).unwrap();
        };
        version("..1");
        symlink("..data/lb.toml", at("lb.toml")).unwrap();
        let mut watch = Watch::new(&at("lb.toml"));
        for name in ["..2", "..3"] {
            version(name);
            timeout(WAIT, watch.changed()).await.unwrap();
            assert_eq!(fs::read_to_string(at("lb.toml")).unwrap(), name);
            timeout(SHORT, watch.changed()).await.unwrap_err();
        }
    }
}
