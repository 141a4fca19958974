//! `cargo xtask setup`: what a fresh Debian or Ubuntu machine lacks.
//!
//! Everything is looked for first, so that a machine that has it all is done in a moment.

use std::env::consts::ARCH;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::{as_root, capture, cargo, command, find, root, run as run_command};

/// The compiler of rust-toolchain.toml, which builds everything.
const TOOLCHAIN: &str = "1.95.0";

/// The version whose LLVM reader fits that compiler's bitcode.
const BPF_LINKER: &str = "0.10.3";

/// A system command, the package that has it, and what it is for.
const PACKAGES: [(&str, &str, &str); 10] = [
    ("ip", "iproute2", "network namespaces"),
    ("ethtool", "ethtool", "checksum offload of virtual NICs"),
    ("curl", "curl", "the clients of the demo"),
    ("dig", "bind9-dnsutils", "who asks for the names of load balancers"),
    ("openssl", "openssl", "the certificate of the demo"),
    ("chromium", "chromium", "the browser among the test's clients"),
    ("wrk", "wrk", "HTTP load"),
    ("nginx", "nginx", "the targets of the demo"),
    ("haproxy", "haproxy", "what the proxy is measured against"),
    ("c++", "g++", "the fuzzer's runtime"),
];

/// What boots other kernels, in the same columns.
const MACHINE: [(&str, &str, &str); 3] = [
    ("qemu-system-x86_64", "qemu-system-x86", "runs other kernels"),
    ("busybox", "busybox-static", "their first user space"),
    ("xz", "xz-utils", "their modules are compressed"),
];

/// Components of the toolchain, a file of each below its sysroot, and what it is for.
const COMPONENTS: [(&str, &str, &str); 3] = [
    ("rust-src", "lib/rustlib/src/rust/library/core/Cargo.toml", "core is built for BPF"),
    ("rustfmt", "bin/rustfmt", "format check"),
    ("clippy", "bin/cargo-clippy", "lints"),
];

/// Installs what is missing.
pub fn run() -> Result<()> {
    let begin = Instant::now();
    packages(&PACKAGES)?;
    let sysroot = toolchain()?;
    components(&sysroot)?;
    bpf_linker()?;
    println!("setup: complete ({:.1} s)", begin.elapsed().as_secs_f64());
    Ok(())
}

/// Installs what is missing for `cargo xtask vm`.
pub fn machine() -> Result<()> {
    ensure!(ARCH == "x86_64", "the kernels are Debian's for x86-64, this machine is {ARCH}");
    packages(&MACHINE)
}

/// Does one step and says what, why and how long.
fn step(what: &str, why: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("setup: {what} ({why}) ...");
    let begin = Instant::now();
    work()?;
    println!("setup: {what}: done in {:.1} s", begin.elapsed().as_secs_f64());
    Ok(())
}

fn packages(wanted: &[(&'static str, &'static str, &'static str)]) -> Result<()> {
    // Ubuntu has the browser as a snap only.
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let is_ubuntu = release.lines().any(|line| line == "ID=ubuntu");
    let is_packaged = |package: &str| !(is_ubuntu && package == "chromium");
    let is_missing = |program, package| is_packaged(package) && find(program).is_none();
    let missing: Vec<_> = wanted
        .iter()
        .filter(|(program, package, _)| is_missing(program, package))
        .copied()
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|(_, package, _)| *package).collect();
    let names_text = names.join(" ");
    let reasons: Vec<_> = missing.iter().map(|(_, _, why)| *why).collect();
    ensure!(
        find("apt-get").is_some(),
        "{names_text} missing, and no apt-get here: install the programs {} by hand",
        missing.iter().map(|(program, ..)| *program).collect::<Vec<_>>().join(", ")
    );
    step(&format!("apt-get install {names_text}"), &reasons.join(", "), || {
        let nginx_is_ours = names.contains(&"nginx");
        let _quiet = if nginx_is_ours { ServicesStayDown::new()? } else { None };
        let by_hand = || format!("by hand: apt-get update && apt-get install {names_text}");
        run_command(apt()?.args(["update", "-qq"])).with_context(by_hand)?;
        run_command(apt()?.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&names))
            .with_context(by_hand)?;
        if nginx_is_ours {
            stay_down_after_boot("nginx")?;
        }
        for (program, package, _) in &missing {
            ensure!(find(program).is_some(), "package {package} has no program {program}");
        }
        Ok(())
    })
}

fn apt() -> Result<Command> {
    // Through env, because sudo drops variables.
    let mut apt = as_root("env")?;
    apt.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]);
    Ok(apt)
}

/// While it lives, no package starts its service: only the demo's own servers are wanted.
struct ServicesStayDown;

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl ServicesStayDown {
    /// `None` where the machine has a policy of its own, which is respected.
    fn new() -> Result<Option<Self>> {
        if Path::new(POLICY).exists() {
            return Ok(None);
        }
        let file = std::env::temp_dir().join(format!("lb-policy-rc.d-{}", std::process::id()));
        fs::write(&file, "#!/bin/sh\nexit 101\n")?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
        let installed = run_command(as_root("install")?.args(["-m", "755"]).arg(&file).arg(POLICY));
        fs::remove_file(&file)?;
        installed.map(|()| Some(Self))
    }
}

impl Drop for ServicesStayDown {
    fn drop(&mut self) {
        if let Err(error) = as_root("rm").and_then(|mut rm| run_command(rm.args(["-f", POLICY]))) {
            eprintln!("warning: remove {POLICY} by hand: {error:#}");
        }
    }
}

/// A package enables its service; one that came only for the demo must not start at the next boot.
fn stay_down_after_boot(service: &str) -> Result<()> {
    if find("systemctl").is_none() {
        return Ok(());
    }
    run_command(as_root("systemctl")?.args(["disable", "--quiet", service]))
}

/// The sysroot of the pinned toolchain.
fn toolchain() -> Result<PathBuf> {
    let sysroot = || {
        capture(command("rustup").args(["run", TOOLCHAIN, "rustc", "--print", "sysroot"]))
            .map(|path| PathBuf::from(path.trim()))
    };
    if find("rustup").is_none() {
        // A distribution's compiler: it serves if it is the right one.
        let version = capture(command("rustc").arg("--version"))?;
        if !version.contains(TOOLCHAIN) {
            bail!("Rust {TOOLCHAIN} is needed, here is {}: https://rustup.rs", version.trim());
        }
        let path = capture(command("rustc").args(["--print", "sysroot"]))?;
        return Ok(PathBuf::from(path.trim()));
    }
    if let Ok(path) = sysroot() {
        return Ok(path);
    }
    step(&format!("Rust {TOOLCHAIN}"), "builds everything", || {
        let args = ["toolchain", "install", TOOLCHAIN, "--profile", "minimal"];
        run_command(command("rustup").args(args))
    })?;
    sysroot()
}

fn components(sysroot: &Path) -> Result<()> {
    let missing: Vec<_> =
        COMPONENTS.iter().filter(|(_, file, _)| !sysroot.join(file).exists()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|(name, ..)| *name).collect();
    let reasons: Vec<_> = missing.iter().map(|(_, _, why)| *why).collect();
    step(&format!("rustup component add {}", names.join(" ")), &reasons.join(", "), || {
        let by_hand =
            || format!("by hand: rustup component add {} --toolchain {TOOLCHAIN}", names.join(" "));
        run_command(
            command("rustup")
                .args(["component", "add"])
                .args(&names)
                .args(["--toolchain", TOOLCHAIN]),
        )
        .with_context(by_hand)
    })
}

fn bpf_linker() -> Result<()> {
    let wanted = format!("bpf-linker {BPF_LINKER}");
    let found =
        || find("bpf-linker").and_then(|file| capture(Command::new(file).arg("--version")).ok());
    if found().is_some_and(|version| version.trim() == wanted) {
        return Ok(());
    }
    step(&format!("cargo install {wanted}"), "links the eBPF programs; 2 to 5 minutes", || {
        // --force: a binary that cargo does not know of may stand in its place.
        let install = ["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force"];
        run_command(cargo(install).current_dir(root())).with_context(|| {
            format!("by hand: cargo install bpf-linker --version {BPF_LINKER} --locked")
        })?;
        let version = found().unwrap_or_default();
        ensure!(
            version.trim() == wanted,
            "installed, but PATH finds {:?} (\"{}\"): put cargo's bin folder first in PATH",
            find("bpf-linker"),
            version.trim()
        );
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_toolchain_is_the_pinned_one() {
        let pinned = fs::read_to_string(root().join("rust-toolchain.toml")).unwrap();
        assert!(pinned.contains(&format!("channel = \"{TOOLCHAIN}\"")), "{pinned}");
    }
}
