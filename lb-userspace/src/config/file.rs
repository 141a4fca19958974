//! The configuration file on disk.

use std::collections::BTreeSet;
use std::fmt::{self, Display};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

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

/// Reads and checks the configuration file `path`.
///
/// # Errors
///
/// Everything that is wrong with the file, see [`LoadError`].
pub fn load(path: &Path) -> Result<Parsed, LoadError> {
    let bytes = read(path)?;
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

fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => LoadError::Missing(path.to_owned()),
        _ => LoadError::Unreadable(path.to_owned(), error),
    };
    // Asked first: reading a FIFO or a terminal would wait for ever.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(LoadError::NotAFile(path.to_owned()));
    }
    std::fs::read(path).map_err(failed)
}
