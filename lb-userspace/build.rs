//! Builds the eBPF object that the agent embeds.

use anyhow::Context as _;
use aya_build::{Package, Toolchain, build_ebpf};

/// The compiler of rust-toolchain.toml, which builds everything.
const TOOLCHAIN: &str = "1.95.0";

fn main() -> anyhow::Result<()> {
    println!("cargo:rerun-if-changed=../lb-common/src");
    // `-Z build-std=core` needs the one; the other keeps cargo from telling its progress, which
    // would come out as warnings of this package. Both are set for the eBPF build alone.
    for (name, value) in [("RUSTC_BOOTSTRAP", "1"), ("CARGO_TERM_QUIET", "true")] {
        // SAFETY: a build script is one thread, nothing reads the environment meanwhile.
        unsafe { std::env::set_var(name, value) };
    }
    let package = Package { name: "lb-ebpf", root_dir: "../lb-ebpf", ..Package::default() };
    build_ebpf([package], Toolchain::Custom(TOOLCHAIN))
        .context("build lb-ebpf (`cargo xtask setup` installs bpf-linker and rust-src)")
}
