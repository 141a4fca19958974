//! What a request costs in the proxy, beside nginx and HAProxy: same machine, same core, same target,
//! one after the other in every round.
//!
//! Each proxy has one thread on a CPU of its own; the load and the target share the other. The CPU
//! time that the proxy's process took for each request counts: it says the same on a busy machine.

mod latency;
mod load;
mod servers;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use latency::Network;
use load::{Load, Measured};
use servers::{Proxy, Site};

/// How to measure requests.
#[derive(clap::Args)]
pub struct HttpOptions {
    /// Rounds; each has every proxy and every kind of load once, the medians count
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds of each kind of load in each round
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// The CPU of the proxies; load and target have the one before it, or the one behind CPU 0
    #[arg(long, default_value_t = 1)]
    cpu: usize,
    /// Only the kinds of load whose name contains this text
    #[arg(long, default_value = "")]
    only: String,
    /// The proxy of lb alone: `cargo build --release --example proxy`
    #[arg(long, value_name = "PROGRAM", default_value = "target/release/examples/proxy")]
    proxy: PathBuf,
    /// The agent, for the time that is added to a request: `cargo build --release --bin lb-userspace`
    #[arg(long, value_name = "PROGRAM", default_value = "target/release/lb-userspace")]
    agent: PathBuf,
    /// Where to write the figures
    #[arg(long, default_value = "target/bench/http.json")]
    json: PathBuf,
}

/// By kind of load and proxy.
type Samples = BTreeMap<(usize, usize), Vec<Measured>>;

/// Measures, prints a table, writes the figures.
///
/// # Errors
/// If a proxy does not start or answers wrongly, or a program is missing.
pub fn run(options: &HttpOptions) -> Result<()> {
    for program in [&options.proxy, &options.agent] {
        ensure!(program.exists(), "there is no {}", program.display());
    }
    let network = Network::start(&options.agent)?;
    let site = Site::start(options.cpu, &options.proxy)?;
    let loads: Vec<Load> =
        Load::ALL.into_iter().filter(|load| load.name.contains(&options.only)).collect();
    let mut samples = Samples::new();
    let mut latencies: [Vec<Measured>; 3] = Default::default();
    let length = Duration::from_secs(options.seconds);
    for round in 1..=options.rounds {
        eprint!("\rround {round} of {}", options.rounds);
        for (row, load) in loads.iter().enumerate() {
            for (column, proxy) in site.proxies().iter().enumerate() {
                let measured = load
                    .put_on(proxy, site.load_cpu(), length)
                    .with_context(|| format!("{} with {}", load.name, proxy.name()))?;
                samples.entry((row, column)).or_default().push(measured);
            }
        }
        for (way, latencies) in network.ways().iter().zip(&mut latencies) {
            latencies.push(network.measure(way, length).context(way.name)?);
        }
    }
    eprintln!("\r{:30}", "");
    print_table(&loads, site.proxies(), &samples, options);
    print_latencies(&network, &latencies);
    write_json(&loads, site.proxies(), &samples, options)
}

/// One request at a time, through the whole of it: XDP, agent, namespaces.
fn print_latencies(network: &Network, latencies: &[Vec<Measured>; 3]) {
    let p50 = |samples: &[Measured]| middle(samples.iter().map(|it| microseconds(it.p50)));
    println!("\n{:<28} {:>9} {:>9}", "one request at a time", "p50, us", "added, us");
    let base = p50(&latencies[0]);
    for (way, samples) in network.ways().iter().zip(latencies) {
        println!("{:<28} {:>9.0} {:>9.0}", way.name, p50(samples), p50(samples) - base);
    }
}

fn print_table(loads: &[Load], proxies: &[Proxy], samples: &Samples, options: &HttpOptions) {
    for proxy in proxies {
        println!("{}: {}", proxy.name(), proxy.version());
    }
    println!(
        "medians of {} rounds of {} s, one thread on CPU {}; x nginx: requests a second of CPU time\n",
        options.rounds, options.seconds, options.cpu
    );
    println!(
        "{:<28} {:<16} {:>10} {:>9} {:>9} {:>11} {:>8}",
        "", "", "requests/s", "p50, us", "p99, us", "CPU us/req", "x nginx"
    );
    for (row, load) in loads.iter().enumerate() {
        let nginx = median(samples, (row, Proxy::NGINX), |it| it.cpu_of_request());
        for (column, proxy) in proxies.iter().enumerate() {
            let of = |figure: fn(&Measured) -> f64| median(samples, (row, column), figure);
            let cpu = of(Measured::cpu_of_request);
            println!(
                "{:<28} {:<16} {:>10.0} {:>9.0} {:>9.0} {:>11.2} {:>8.2}",
                if column == 0 { load.name } else { "" },
                proxy.name(),
                of(Measured::requests_a_second),
                of(|it| microseconds(it.p50)),
                of(|it| microseconds(it.p99)),
                cpu * 1e6,
                nginx / cpu
            );
        }
    }
}

fn median(samples: &Samples, at: (usize, usize), figure: impl Fn(&Measured) -> f64) -> f64 {
    middle(samples.get(&at).into_iter().flatten().map(figure))
}

/// Not a number where it was not measured.
fn microseconds(time: Option<Duration>) -> f64 {
    time.map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
}

/// The median.
fn middle(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

fn write_json(
    loads: &[Load],
    proxies: &[Proxy],
    samples: &Samples,
    options: &HttpOptions,
) -> Result<()> {
    let rows: Vec<_> = samples
        .iter()
        .map(|((row, column), samples)| {
            json!({
                "load": loads[*row].name,
                "proxy": proxies[*column].name(),
                "samples": samples.iter().map(Measured::json).collect::<Vec<_>>(),
            })
        })
        .collect();
    let figures = json!({
        "rounds": options.rounds,
        "seconds": options.seconds,
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        "versions": proxies.iter().map(|it| (it.name(), it.version())).collect::<BTreeMap<_, _>>(),
        "rows": rows,
    });
    if let Some(folder) = options.json.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&options.json, serde_json::to_string_pretty(&figures)?)
        .with_context(|| format!("write {}", options.json.display()))?;
    println!("\nwritten to {}", options.json.display());
    Ok(())
}
