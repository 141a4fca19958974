//! Builds the eBPF programs of the harness.

use std::env;
use std::path::PathBuf;

use anyhow::Context as _;
use aya_build::{Package, Toolchain, build_ebpf};

/// The compiler of rust-toolchain.toml, which builds everything.
const TOOLCHAIN: &str = "1.95.0";

fn main() -> anyhow::Result<()> {
    let variables = [
        // `-Z build-std=core` needs it.
        ("RUSTC_BOOTSTRAP", "1".into()),
        // Progress would come out as warnings of this package.
        ("CARGO_TERM_QUIET", "true".into()),
        // `core` and the rest are built once, not for every profile and set of features of ours.
        ("CARGO_BUILD_BUILD_DIR", shared_build_dir()?),
    ];
    for (name, value) in variables {
        // SAFETY: a build script is one thread, nothing reads the environment meanwhile.
        unsafe { env::set_var(name, value) };
    }
    let package = Package { name: "lb-tests-ebpf", root_dir: "ebpf", ..Package::default() };
    build_ebpf([package], Toolchain::Custom(TOOLCHAIN))
        .context("build lb-tests-ebpf (`cargo xtask setup` installs bpf-linker and rust-src)")
}

/// `target/ebpf`, as seen from `target/PROFILE/build/PACKAGE/out`.
fn shared_build_dir() -> anyhow::Result<PathBuf> {
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    Ok(out.ancestors().nth(4).context("OUT_DIR is not in a target folder")?.join("ebpf"))
}
