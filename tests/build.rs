//! Builds the eBPF programs of the harness.

#[path = "../lb-ebpf/embed.rs"]
mod embed;

fn main() -> anyhow::Result<()> {
    embed::build("lb-tests-ebpf", "ebpf")
}
