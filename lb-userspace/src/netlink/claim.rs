//! Whose notes are whose: each agent has a directory of its own for them, and a lock on it as long
//! as it lives.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use serde::{Deserialize, Serialize};

/// In each agent's directory: who it is, and the lock.
const OWNER: &str = "owner";
/// An agent that is ending may take that long to put everything back.
const ENDING: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(50);

/// The directory of an agent's notes. The same network namespace and API socket give the same
/// directory, so that the next start after kill -9 finds them. Dropping it gives it up, and removes
/// it unless a note is left.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
    owner: Flock<File>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Owner {
    pid: u32,
    /// Inode of the network namespace, by which it can be looked for.
    network_namespace: u64,
    boot_id: String,
}

impl StateDirectory {
    /// Claims the directory below `parent` of the agent that listens on `api_socket`, in the calling
    /// thread's network namespace. Removes what agents left in namespaces that are gone.
    ///
    /// # Errors
    /// When a living agent has it ([`io::ErrorKind::WouldBlock`]), or files cannot be made.
    pub async fn claim(parent: &Path, api_socket: &Path) -> io::Result<Self> {
        let name = format!("{:x}-{}", namespace_cookie()?, file_name(&absolute(api_socket)?));
        let path = parent.join("agents").join(name);
        let give_up = Instant::now() + ENDING;
        let owner = loop {
            fs::create_dir_all(&path)?;
            match lock(&path.join(OWNER)) {
                Ok(Some(owner)) => break owner,
                // Removed by the one who had it.
                Ok(None) => {}
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                Err(_) if Instant::now() > give_up => return Err(taken(&path)),
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        };
        let mut directory = Self { path, owner };
        directory.sign()?;
        if let Err(error) = directory.remove_dead() {
            tracing::debug!(%error, "notes of dead network namespaces stay");
        }
        Ok(directory)
    }

    /// Where the notes go.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn sign(&mut self) -> io::Result<()> {
        let owner = Owner {
            pid: std::process::id(),
            network_namespace: namespace_inode()?,
            boot_id: boot_id()?,
        };
        self.owner.set_len(0)?;
        self.owner.rewind()?;
        let text = serde_json::to_string(&owner)?;
        writeln!(self.owner, "{text}")
    }

    fn remove_dead(&self) -> io::Result<()> {
        let Some(agents) = self.path.parent() else { return Ok(()) };
        let others = fs::read_dir(agents)?.filter_map(Result::ok).map(|entry| entry.path());
        let others: Vec<_> = others.filter(|path| *path != self.path).collect();
        if others.is_empty() {
            return Ok(());
        }
        let (living, boot_id) = (living_namespaces()?, boot_id()?);
        for path in others {
            // Who is alive holds the lock.
            let Ok(Some(mut file)) = lock(&path.join(OWNER)) else { continue };
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            let is_dead = serde_json::from_str::<Owner>(&text).map_or(true, |owner| {
                owner.boot_id != boot_id || !living.contains(&owner.network_namespace)
            });
            if is_dead {
                tracing::debug!(path = %path.display(), "removing notes of a namespace that is gone");
                fs::remove_dir_all(&path)?;
            }
        }
        Ok(())
    }
}

impl Drop for StateDirectory {
    fn drop(&mut self) {
        let notes = fs::read_dir(&self.path).map_or(1, |entries| {
            entries.filter_map(Result::ok).filter(|entry| entry.file_name() != OWNER).count()
        });
        if notes == 0 {
            // Whoever waits for the lock sees that the file is gone and makes another.
            let removed = fs::remove_file(self.path.join(OWNER));
            if let Err(error) = removed.and_then(|()| fs::remove_dir(&self.path)) {
                tracing::debug!(path = %self.path.display(), %error, "the state directory stays");
            }
        }
    }
}

/// The lock on `path`; `None` if that is not the file any more that was locked.
fn lock(path: &Path) -> io::Result<Option<Flock<File>>> {
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    let file = match open {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)?;
    let is_it = fs::metadata(path).is_ok_and(|now| {
        lock.metadata().is_ok_and(|ours| (ours.dev(), ours.ino()) == (now.dev(), now.ino()))
    });
    Ok(is_it.then_some(lock))
}

fn taken(path: &Path) -> io::Error {
    let owner = fs::read_to_string(path.join(OWNER)).unwrap_or_default();
    let who = serde_json::from_str::<Owner>(&owner)
        .map_or_else(|_| String::new(), |owner| format!(" (pid {})", owner.pid));
    let text = format!(
        "another agent{who} with the same API socket runs in this network namespace; end it, or \
         give this one a socket of its own with --api-socket"
    );
    io::Error::new(io::ErrorKind::WouldBlock, text)
}

/// The path by whatever name it is given; the file itself need not be there.
fn absolute(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => {
            Ok(fs::canonicalize(parent).unwrap_or(parent.into()).join(name))
        }
        _ => Ok(path),
    }
}

/// A path as the name of one file: `run+lb+lb.sock`.
fn file_name(path: &Path) -> String {
    let bytes = path.as_os_str().as_bytes();
    let bytes = bytes.strip_prefix(b"/").unwrap_or(bytes);
    let mut name = String::new();
    for byte in bytes {
        match byte {
            b'/' => name.push('+'),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'-' | b'_' => {
                name.push(char::from(*byte));
            }
            other => name.push_str(&format!("%{other:02x}")),
        }
    }
    name
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn namespace_inode() -> io::Result<u64> {
    Ok(fs::metadata("/proc/thread-self/ns/net")?.ino())
}

/// A number that no other network namespace has until the next boot, unlike its inode's; the inode's
/// on kernels before 5.14.
fn namespace_cookie() -> io::Result<u64> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let (mut cookie, mut length) = (0_u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: both pointers are to what they are said to be, which outlives the call.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    match Errno::result(outcome) {
        Ok(_) => Ok(cookie),
        Err(Errno::ENOPROTOOPT) => namespace_inode(),
        Err(error) => Err(error.into()),
    }
}

/// Inodes of the network namespaces that a thread is in or that are mounted somewhere.
fn living_namespaces() -> io::Result<BTreeSet<u64>> {
    let mut living = BTreeSet::new();
    let numbers = |directory: &Path| {
        let entries = fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
        entries.map(|entry| entry.path()).filter(|path| {
            path.file_name().is_some_and(|name| name.as_bytes().iter().all(u8::is_ascii_digit))
        })
    };
    for process in numbers(Path::new("/proc")) {
        for thread in numbers(&process.join("task")) {
            // It may have ended meanwhile.
            living.extend(fs::metadata(thread.join("ns/net")).map(|metadata| metadata.ino()));
        }
    }
    // A mounted namespace is the line's root: `net:[4026532281]`.
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let inodes = mounts
        .split_ascii_whitespace()
        .filter_map(|field| field.strip_prefix("net:[")?.strip_suffix(']')?.parse::<u64>().ok());
    living.extend(inodes);
    Ok(living)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(parent: &Path) -> Vec<String> {
        let agents = fs::read_dir(parent.join("agents")).unwrap();
        agents.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[tokio::test]
    async fn each_socket_has_its_own_and_a_living_owner_keeps_it() {
        let parent = tempfile::tempdir().unwrap();
        let (one, two) = (Path::new("/nowhere/one.sock"), Path::new("/nowhere/two.sock"));
        let first = StateDirectory::claim(parent.path(), one).await.unwrap();
        let second = StateDirectory::claim(parent.path(), two).await.unwrap();
        assert_ne!(first.path(), second.path());
        assert_eq!(entries(parent.path()).len(), 2, "the other one lives");

        // Given up by one who was killed: the note stays.
        fs::write(first.path().join("addresses.json"), "{}").unwrap();
        let path = first.path().to_owned();
        drop(first);
        let again = StateDirectory::claim(parent.path(), one).await.unwrap();
        assert_eq!(again.path(), path);
        assert!(path.join("addresses.json").exists());

        fs::remove_file(path.join("addresses.json")).unwrap();
        drop((again, second));
        assert_eq!(entries(parent.path()).len(), 0);
    }

    #[tokio::test]
    async fn a_second_agent_of_the_same_socket_is_refused_and_told_by_whom() {
        let parent = tempfile::tempdir().unwrap();
        let socket = parent.path().join("lb.sock");
        let first = StateDirectory::claim(parent.path(), &socket).await.unwrap();
        let error = StateDirectory::claim(parent.path(), &socket).await.unwrap_err();
        let pid = format!("(pid {})", std::process::id());
        assert!(error.to_string().contains(&pid), "{error}");
        // One that is about to end is waited for.
        let later = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(300)).await;
            drop(first);
        });
        StateDirectory::claim(parent.path(), &socket).await.unwrap();
        later.await.unwrap();
    }

    #[tokio::test]
    async fn notes_of_dead_namespaces_go_and_of_others_stay() {
        let parent = tempfile::tempdir().unwrap();
        let put = |name: &str, network_namespace, boot_id| {
            let path = parent.path().join("agents").join(name);
            fs::create_dir_all(&path).unwrap();
            let owner = Owner { pid: 1, network_namespace, boot_id };
            fs::write(path.join(OWNER), serde_json::to_string(&owner).unwrap()).unwrap();
            fs::write(path.join("addresses.json"), "{}").unwrap();
        };
        put("1-dead", 1, boot_id().unwrap());
        put("1-killed", namespace_inode().unwrap(), boot_id().unwrap());
        put("1-earlier", namespace_inode().unwrap(), "earlier".into());
        let ours = StateDirectory::claim(parent.path(), Path::new("/lb.sock")).await.unwrap();
        let mut left = entries(parent.path());
        left.retain(|name| !ours.path().ends_with(name));
        assert_eq!(left, ["1-killed"]);
    }

    #[test]
    fn names_of_different_paths_differ() {
        assert_eq!(file_name(Path::new("/run/lb/lb.sock")), "run+lb+lb.sock");
        let paths = ["/a/b", "/a+b", "/a%2bb", "/a b"];
        let names: BTreeSet<_> = paths.iter().map(|path| file_name(Path::new(path))).collect();
        assert_eq!(names.len(), paths.len());
    }
}
