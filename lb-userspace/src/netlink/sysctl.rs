//! Kernel settings that forwarding depends on; only read, never written.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// An address family, as the kernel's settings are split by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// The sysctl to set to 1 before packets that come in by `interface` may be forwarded, in the
/// thread's network namespace; `None` if they are forwarded already.
///
/// # Errors
/// When the settings cannot be read: no such interface, or the kernel has no such family.
pub fn missing_forwarding(interface: &str, family: IpFamily) -> io::Result<Option<String>> {
    missing_below(Path::new("/proc/sys"), interface, family)
}

fn missing_below(root: &Path, interface: &str, family: IpFamily) -> io::Result<Option<String>> {
    let (protocol, all) = match family {
        IpFamily::V4 => ("ipv4", ["net", "ipv4", "ip_forward"].as_slice()),
        IpFamily::V6 => ("ipv6", ["net", "ipv6", "conf", "all", "forwarding"].as_slice()),
    };
    // The interface's own setting is the one that bpf_fib_lookup obeys. Setting the general one
    // sets every interface's, so that one is named while it is off.
    let own = ["net", protocol, "conf", interface, "forwarding"];
    if is_on(root, &own)? {
        return Ok(None);
    }
    let missing = if is_on(root, all)? { own.as_slice() } else { all };
    Ok(Some(name_of(missing)))
}

fn is_on(root: &Path, setting: &[&str]) -> io::Result<bool> {
    let path: PathBuf = root.join(setting.iter().collect::<PathBuf>());
    fs::read_to_string(path).map(|value| value.trim() != "0")
}

/// The name as sysctl(8) takes it: dots within a part, as in `eth0.10`, become slashes.
fn name_of(setting: &[&str]) -> String {
    setting.iter().map(|part| part.replace('.', "/")).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(own: &str, all: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let net = root.path().join("net");
        for (path, value) in [
            ("ipv4/ip_forward", all),
            ("ipv4/conf/eth0.10/forwarding", own),
            ("ipv6/conf/all/forwarding", all),
            ("ipv6/conf/eth0.10/forwarding", own),
        ] {
            let path = net.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }
        root
    }

    fn missing(own: &str, all: &str, family: IpFamily) -> Option<String> {
        missing_below(settings(own, all).path(), "eth0.10", family).unwrap()
    }

    #[test]
    fn the_general_setting_is_named_first() {
        assert_eq!(missing("0", "0", IpFamily::V4).as_deref(), Some("net.ipv4.ip_forward"));
        assert_eq!(
            missing("0", "0", IpFamily::V6).as_deref(),
            Some("net.ipv6.conf.all.forwarding")
        );
    }

    #[test]
    fn then_the_interfaces_own() {
        let expected = "net.ipv4.conf.eth0/10.forwarding";
        assert_eq!(missing("0", "1", IpFamily::V4).as_deref(), Some(expected));
    }

    #[test]
    fn nothing_is_missing_where_the_interface_forwards() {
        assert_eq!(missing("1", "0", IpFamily::V4), None);
        assert_eq!(missing("1", "1", IpFamily::V6), None);
    }

    #[test]
    fn an_unknown_interface_is_an_error() {
        let error = missing_below(settings("0", "0").path(), "eth9", IpFamily::V4).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
