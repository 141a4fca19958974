//! Which kernels the programs are for, and what an older one lacks.

use std::fs;

/// The oldest kernel that the tests run on: major and minor version.
pub const OLDEST: (u32, u32) = (6, 1);

/// What the programs need, and the version that brought it.
const NEEDS: [((u32, u32), &str); 7] = [
    ((5, 4), "maps of devices by hash (BPF_MAP_TYPE_DEVMAP_HASH)"),
    ((5, 5), "array maps in shared memory (BPF_F_MMAPABLE)"),
    ((5, 8), "ring buffers (BPF_MAP_TYPE_RINGBUF)"),
    ((5, 9), "XDP programs attached by links"),
    ((5, 10), "tail calls out of functions"),
    ((5, 11), "the coarse clock (bpf_ktime_get_coarse_ns)"),
    ((5, 12), "atomic exchange (BPF_XCHG)"),
];

/// Why loading failed: beside what the kernel said, whether it is too old and what it lacks. It is
/// asked after the fact, because distributions bring features to older versions.
pub fn explain(error: anyhow::Error) -> anyhow::Error {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    match too_old(release.trim()) {
        Some(text) => error.context(text),
        None => error,
    }
}

fn too_old(release: &str) -> Option<String> {
    let version = version(release)?;
    if version >= OLDEST {
        return None;
    }
    let lacks: Vec<String> = NEEDS
        .iter()
        .filter(|(since, _)| *since > version)
        .map(|((major, minor), what)| format!("{what}, of Linux {major}.{minor}"))
        .collect();
    let lacks = match lacks.as_slice() {
        [] => String::new(),
        lacks => format!("; it lacks {}", lacks.join("; ")),
    };
    let (major, minor) = OLDEST;
    Some(format!(
        "this kernel, Linux {release}, is older than {major}.{minor}, which lb needs{lacks}"
    ))
}

/// `6.1.0-50-amd64` is 6.1.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_kernel_is_told_what_it_lacks() {
        let text = too_old("5.10.0-32-amd64").unwrap();
        assert!(text.contains("Linux 5.10.0-32-amd64, is older than 6.1"), "{text}");
        assert!(text.contains("coarse clock") && text.contains("atomic exchange"), "{text}");
        assert!(!text.contains("ring buffers"), "{text}");
        let text = too_old("5.15.0").unwrap();
        assert!(text.ends_with("which lb needs"), "{text}");
        for release in ["6.1.0-50-amd64", "6.12.107+deb13-amd64", "7.3.4", "unknown"] {
            assert_eq!(too_old(release), None, "{release}");
        }
    }
}
