//! For build scripts that embed eBPF programs: how each of them builds one.

use std::env;
use std::path::PathBuf;
use std::process::{Command, exit};

use anyhow::Context as _;
use aya_build::{Package, Toolchain, build_ebpf};

/// The compiler of rust-toolchain.toml, which builds everything.
const TOOLCHAIN: &str = "1.95.0";

/// Set where the build script runs in [`environment`].
const IS_PREPARED: &str = "LB_EBPF_BUILD";

/// Builds the package in `root_dir`; its binaries are then in `OUT_DIR`.
pub fn build(name: &'static str, root_dir: &'static str) -> anyhow::Result<()> {
    if env::var_os(IS_PREPARED).is_none() {
        return start_again();
    }
    let package = Package { name, root_dir, ..Package::default() };
    build_ebpf([package], Toolchain::Custom(TOOLCHAIN))
        .with_context(|| format!("build {name} (`cargo xtask setup` installs what is missing)"))
}

/// Runs this build script once more, in the environment that aya-build hands on to cargo: a process
/// could change its own by unsafe code only.
fn start_again() -> anyhow::Result<()> {
    let itself = env::current_exe().context("this build script is not to be found")?;
    let status = Command::new(itself)
        .envs(environment()?)
        .env(IS_PREPARED, "1")
        .status()
        .context("run this build script again")?;
    if !status.success() {
        // It has said why.
        exit(1);
    }
    Ok(())
}

fn environment() -> anyhow::Result<[(&'static str, PathBuf); 6]> {
    Ok([
        // `-Z build-std=core` needs it.
        ("RUSTC_BOOTSTRAP", "1".into()),
        // With 32-bit instructions and jumps (Linux 5.1): a tenth fewer instructions. aya-build sets
        // flags of its own, so these come with the profile; the second keeps them from the host's.
        ("CARGO_UNSTABLE_PROFILE_RUSTFLAGS", "true".into()),
        ("CARGO_PROFILE_RELEASE_RUSTFLAGS", "-Ctarget-cpu=v3".into()),
        ("CARGO_PROFILE_RELEASE_BUILD_OVERRIDE_RUSTFLAGS", "-Cdebuginfo=0".into()),
        // Progress would come out as warnings of the package.
        ("CARGO_TERM_QUIET", "true".into()),
        // `core` and the rest are built once, not for every profile and set of features of ours.
        ("CARGO_BUILD_BUILD_DIR", shared_build_dir()?),
    ])
}

/// `target/ebpf`, as seen from `target/PROFILE/build/PACKAGE/out`.
fn shared_build_dir() -> anyhow::Result<PathBuf> {
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    Ok(out.ancestors().nth(4).context("OUT_DIR is not in a target folder")?.join("ebpf"))
}
