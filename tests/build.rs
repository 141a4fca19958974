//! Builds the eBPF programs of the harness.

use anyhow::Context as _;
use aya_build::{Package, Toolchain, build_ebpf};

/// The compiler of rust-toolchain.toml, which builds everything.
const TOOLCHAIN: &str = "1.95.0";

fn main() -> anyhow::Result<()> {
    // `-Z build-std=core` needs the one; the other keeps cargo from telling its progress, which
    // would come out as warnings of this package. Both are set for the eBPF build alone.
    for (name, value) in [("RUSTC_BOOTSTRAP", "1"), ("CARGO_TERM_QUIET", "true")] {
        // SAFETY: a build script is one thread, nothing reads the environment meanwhile.
        unsafe { std::env::set_var(name, value) };
    }
    let package = Package { name: "lb-tests-ebpf", root_dir: "ebpf", ..Package::default() };
    build_ebpf([package], Toolchain::Custom(TOOLCHAIN))
        .context("build lb-tests-ebpf (`cargo xtask setup` installs bpf-linker and rust-src)")
}
