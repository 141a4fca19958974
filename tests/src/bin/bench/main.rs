//! `cargo xtask bench`: what a packet costs, and what a request costs.

mod http;
mod packet;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

/// Measurements of lb.
#[derive(Parser)]
#[command(name = "cargo xtask bench", version)]
enum Command {
    /// The cost of a packet in the XDP program, beside that of programs with nothing to decide
    Packet(PacketOptions),
    /// The cost of a request in the proxy, beside nginx and HAProxy
    Http(http::HttpOptions),
}

/// How to measure packets.
#[derive(clap::Args)]
struct PacketOptions {
    /// Packets of each kind in each round
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1000..))]
    repeats: u32,
    /// Rounds; each has every kind once, the medians count
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The CPU to measure on
    #[arg(long, default_value_t = 1)]
    cpu: usize,
    /// Only the floors and the kinds whose name contains this text
    #[arg(long, default_value = "")]
    only: String,
    /// Only the floors and the kinds with so many flows
    #[arg(long)]
    flows: Option<u32>,
    /// Another build of the eBPF object, measured in the same rounds; its rows begin with `*`
    #[arg(long, value_name = "OBJECT")]
    against: Option<PathBuf>,
    /// Do not look at the packets' checksums: for builds with a step left out
    #[arg(long)]
    unchecked: bool,
    /// Where to write the figures
    #[arg(long, default_value = "target/bench/packet.json")]
    json: PathBuf,
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Packet(options) => packet::run(&options),
        Command::Http(options) => http::run(&options),
    }
}
