//! Builds the eBPF object that the agent embeds.

use anyhow::Context as _;
use aya_build::{Package, Toolchain, build_ebpf};

/// The compiler of rust-toolchain.toml, which builds everything.
const TOOLCHAIN: &str = "1.95.0";

fn main() -> anyhow::Result<()> {
    println!("cargo:rerun-if-changed=../lb-common/src");
    // SAFETY: a build script is one thread, nothing reads the environment meanwhile.
    // `-Z build-std=core` needs it; it is set for the eBPF build alone.
    unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "1") };
    let package = Package { name: "lb-ebpf", root_dir: "../lb-ebpf", ..Package::default() };
    build_ebpf([package], Toolchain::Custom(TOOLCHAIN))
        .context("build lb-ebpf (`cargo xtask setup` installs bpf-linker and rust-src)")
}
