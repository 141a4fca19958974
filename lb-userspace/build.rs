//! Builds the eBPF object that the agent embeds.

#[path = "../lb-ebpf/embed.rs"]
mod embed;

fn main() -> anyhow::Result<()> {
    println!("cargo:rerun-if-changed=../lb-common/src");
    embed::build("lb-ebpf", "../lb-ebpf")
}
