//! The configuration file on disk.

use std::collections::BTreeSet;
use std::fmt::{self, Display};
use std::fs::{self, OpenOptions};
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::libc;

use super::{ConfigErrors, Parsed, parse};

/// Why a configuration file gave no configuration. The [`Display`] names the file and what to do.
#[derive(Debug)]
pub enum LoadError {
    /// There is no such file.
    Missing(PathBuf),
    /// It is there but cannot be read.
    Unreadable(PathBuf, io::Error),
    /// It is a directory, a device or the like.
    NotAFile(PathBuf),
    /// It has more bytes than any configuration.
    TooLarge(PathBuf),
    /// It is not UTF-8, as TOML must be; the line of the first bad byte, from 1.
    NotUtf8(PathBuf, usize),
    /// It was read and is wrong.
    Invalid(ConfigErrors),
}

impl Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(path) => write!(
                f,
                "{}: there is no such file; create it, or give the path of another",
                path.display()
            ),
            Self::Unreadable(path, error) if error.kind() == io::ErrorKind::PermissionDenied => {
                write!(
                    f,
                    "{}: permission denied; run as root (sudo), or let this user read it",
                    path.display()
                )
            }
            Self::Unreadable(path, error) => {
                write!(f, "{}: cannot be read ({error}); check the path", path.display())
            }
            Self::NotAFile(path) => write!(
                f,
                "{}: is not a regular file; name the configuration file itself, such as \
                 /etc/lb/lb.toml",
                path.display()
            ),
            Self::TooLarge(path) => write!(
                f,
                "{}: is larger than {} MiB, which no configuration is; name the configuration \
                 file itself, such as /etc/lb/lb.toml",
                path.display(),
                MAX_BYTES >> 20
            ),
            Self::NotUtf8(path, line) => write!(
                f,
                "{}:{line}: is not UTF-8 text, as TOML must be; save it as UTF-8",
                path.display()
            ),
            Self::Invalid(errors) => Display::fmt(errors, f),
        }
    }
}

impl std::error::Error for LoadError {}

/// Largest file that is read, bytes: far more than the largest configuration an agent can take.
const MAX_BYTES: u64 = 64 << 20;

/// Reads and checks the configuration file `path`.
///
/// # Errors
///
/// Everything that is wrong with the file, see [`LoadError`].
pub fn load(path: &Path) -> Result<Parsed, LoadError> {
    parse_bytes(path, read(path)?)
}

/// Checks what was [`read`] from `path`.
///
/// # Errors
///
/// As [`load`].
pub fn parse_bytes(path: &Path, bytes: Vec<u8>) -> Result<Parsed, LoadError> {
    let text = String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        LoadError::NotUtf8(path.to_owned(), 1 + good.iter().filter(|b| **b == b'\n').count())
    })?;
    parse(&path.to_string_lossy(), &text).map_err(LoadError::Invalid)
}

/// This machine's addresses; none if the kernel does not say.
pub(super) fn local_addresses() -> BTreeSet<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return BTreeSet::new() };
    let addresses = interfaces.filter_map(|interface| interface.address);
    addresses
        .filter_map(|address| {
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        })
        .collect()
}

/// The content of the regular file `path`. Never waits for a writer.
///
/// # Errors
///
/// As [`load`].
pub fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => LoadError::Missing(path.to_owned()),
        _ => LoadError::Unreadable(path.to_owned(), error),
    };
    let not_a_file = || LoadError::NotAFile(path.to_owned());
    // Asked first: opening a device can have effects.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(not_a_file());
    }
    // What is opened may be something else by now: without O_NONBLOCK a FIFO waits for a writer.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(not_a_file());
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(LoadError::TooLarge(path.to_owned()));
    }
    Ok(bytes)
}
