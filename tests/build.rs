//! Builds the eBPF programs of the harness.

use anyhow::Context as _;
use aya_build::{Package, Toolchain, build_ebpf};

/// The compiler of rust-toolchain.toml, which builds everything.
const TOOLCHAIN: &str = "1.95.0";

fn main() -> anyhow::Result<()> {
    // SAFETY: a build script is one thread, nothing reads the environment meanwhile.
    // `-Z build-std=core` needs it; it is set for the eBPF build alone.
    unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "1") };
    let package = Package { name: "lb-tests-ebpf", root_dir: "ebpf", ..Package::default() };
    build_ebpf([package], Toolchain::Custom(TOOLCHAIN))
        .context("build lb-tests-ebpf (`cargo xtask setup` installs bpf-linker and rust-src)")
}
