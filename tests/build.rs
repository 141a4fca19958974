//! Builds the eBPF programs of the harness.

#[path = "../lb-ebpf/embed.rs"]
mod embed;

fn main() -> anyhow::Result<()> {
    println!("cargo:rerun-if-changed=../lb-ebpf/src/panic.rs");
    embed::build("lb-tests-ebpf", "ebpf")
}
