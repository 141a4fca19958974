//! `cargo xtask demo`: the load balancer at work, seen from outside.
//!
//! Every step shows something and fails if it did not happen.

mod alb;
mod balancer;
mod client;
mod daemon;
mod namespace;
mod pass;
mod report;
mod server;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use self::balancer::{ADDRESSES, Balancer};
use self::client::Request;
use self::namespace::{BALANCER, CLIENT, FORBIDDEN, Network, PICTURE, Segment, TARGETS};
use self::report::{heading, quote, shown, transcript};
use self::server::{CLIENT_PAGE, Server};
use crate::process::{as_root, capture, interrupted, is_root, pause, run as run_command};
use crate::{agent, setup};

/// Requests of a step that looks at shares.
const REQUESTS: usize = 300;
/// With equal shares each of three targets gets 100, with a standard deviation of 8. Correct code
/// gets below this less than once in a million runs.
const LEAST_SHARE: usize = 55;

/// Installs what is missing and builds, unless a binary is given; then shows it.
pub fn run(which: Which, binary: Option<PathBuf>) -> Result<()> {
    let binary = match binary {
        Some(binary) => fs::canonicalize(&binary).with_context(|| binary.display().to_string())?,
        None => {
            setup::run()?;
            agent::build(agent::Profile::Dev)?
        }
    };
    if !is_root() {
        let this = std::env::current_exe()?;
        let mut again = as_root(&this.to_string_lossy())?;
        return run_command(again.args(["demo", which.name(), "--agent"]).arg(binary));
    }
    let begin = Instant::now();
    match which {
        Which::Network => show(&binary)?,
        Which::Alb => alb::show(&binary)?,
    }
    println!("\nAll shown, in {:.0} s.", begin.elapsed().as_secs_f64());
    Ok(())
}

/// What is shown.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Which {
    /// The network load balancer
    Network,
    /// The application load balancer: HTTP, rules, names, two zones
    Alb,
}

impl Which {
    /// As the command line has it.
    const fn name(self) -> &'static str {
        match self {
            Self::Network => "network",
            Self::Alb => "alb",
        }
    }
}

/// A step: its heading and what it does.
type Step = (&'static str, fn(&mut Demo) -> Result<()>);

const STEPS: [Step; 9] = [
    ("Requests are spread over the targets", spread),
    ("The target sees the client's own address", client_address),
    ("The balancer's NICs run native XDP", native_xdp),
    ("IPv6 as well", ipv6),
    ("What the agent says", what_it_says),
    ("A target is killed: traffic moves on", target_killed),
    ("The target is back", target_back),
    ("A client outside the security group is refused", forbidden),
    ("Requests a second over the path", rate),
];

/// Everything that runs. Fields drop in this order: programs end before their namespaces go.
struct Demo {
    balancer: Balancer,
    servers: Vec<Option<Server>>,
    network: Network,
    folder: Folder,
}

fn show(binary: &Path) -> Result<()> {
    let folder = Folder::new()?;
    let mut demo = Demo::start(binary, folder)?;
    let shown = demo.steps();
    if shown.is_ok() {
        return demo.take_down();
    }
    if !interrupted() {
        println!("\nWhat the agent says now, and its log:");
        if let Err(error) = transcript(demo.balancer.command(&["status"])) {
            quote(&format!("{error:#}"));
        }
        quote(&demo.balancer.log());
    }
    shown
}

impl Demo {
    fn start(binary: &Path, folder: Folder) -> Result<Self> {
        heading("Two clients, a balancer and three targets in network namespaces");
        let segments = [(Segment::Clients, "eth0"), (Segment::Targets, "eth1")];
        let hosts: Vec<_> = [&CLIENT, &FORBIDDEN].into_iter().chain(&TARGETS).collect();
        let network = Network::new(&segments, &hosts).context("make the namespaces")?;
        quote(PICTURE);
        let start = |host| Server::start(&network, host, &folder.path, CLIENT_PAGE).map(Some);
        let servers = TARGETS.iter().map(start).collect::<Result<_>>()?;
        shown("nginx answers on each target");
        let balancer =
            Balancer::start(&network, binary, &folder.path, &["eth0", "eth1"], &balancer::text())
                .context("start the agent")?;
        Ok(Self { balancer, servers, network, folder })
    }

    fn steps(&mut self) -> Result<()> {
        heading("lb-userspace --iface eth0 --iface eth1 --config lb.toml");
        quote(&fs::read_to_string(&self.balancer.configuration)?);
        self.balancer.wait_until_all(2 * TARGETS.len(), "healthy").context("start the agent")?;
        shown("all targets are healthy");
        for (name, step) in STEPS {
            heading(name);
            step(self).with_context(|| format!("step \"{name}\""))?;
        }
        Ok(())
    }

    /// Ends everything, and looks whether anything is left.
    fn take_down(mut self) -> Result<()> {
        heading("Everything is taken down");
        self.balancer.stop()?;
        for interface in ["eth0", "eth1"] {
            let link = self.ip(&["link", "show", "dev", interface])?;
            ensure!(!link.contains("xdp"), "{interface} still runs XDP: {link}");
        }
        let addresses = self.ip(&["address", "show"])?;
        for address in ADDRESSES {
            let left = addresses.split([' ', '/']).any(|word| word == address);
            ensure!(!left, "{address} is still there: {addresses}");
        }
        shown("the agent ended; no XDP program and no listener address is left on its NICs");
        for server in self.servers.into_iter().flatten() {
            server.stop()?;
        }
        self.network.take_down()?;
        self.folder.remove()?;
        shown("no process, namespace or file is left");
        Ok(())
    }

    /// `ip` in the balancer's namespace.
    fn ip(&self, arguments: &[&str]) -> Result<String> {
        capture(self.network.tool(BALANCER, "ip").args(arguments))
    }
}

/// The URL of an address. curl expands brackets, so those of IPv6 are escaped.
fn url(address: &str) -> String {
    if address.contains(':') {
        format!("http://\\[{address}\\]/")
    } else {
        format!("http://{address}/")
    }
}

/// Sends requests and prints who answered; an error unless each target answered its share.
fn spread_over(demo: &Demo, address: &str) -> Result<()> {
    let responses = client::curl(&demo.network, &url(address), REQUESTS)?;
    let counts = client::count_by_target(&responses);
    for (target, count) in &counts {
        quote(&format!("hello world from {target}  × {count}"));
    }
    ensure!(counts.values().sum::<usize>() == REQUESTS, "not every request was answered");
    for (target, count) in &counts {
        ensure!(*count >= LEAST_SHARE, "{target} answered only {count} of {REQUESTS} requests");
    }
    shown(&format!("{REQUESTS} requests to {address}, each answered, by all three targets"));
    Ok(())
}

fn spread(demo: &mut Demo) -> Result<()> {
    spread_over(demo, ADDRESSES[0])
}

fn client_address(demo: &mut Demo) -> Result<()> {
    sees_client(demo, ADDRESSES[0], &CLIENT.ipv4())
}

fn sees_client(demo: &Demo, address: &str, client: &str) -> Result<()> {
    let response = client::curl(&demo.network, &url(address), 1)?;
    quote(&response);
    ensure!(response.trim_end().ends_with(&format!("client {client}")), "not {client}");
    shown(&format!("{client} is the client itself, not the balancer"));
    Ok(())
}

fn native_xdp(demo: &mut Demo) -> Result<()> {
    for interface in ["eth0", "eth1"] {
        let link = demo.ip(&["link", "show", "dev", interface])?;
        quote(&link);
        let native = link.split_whitespace().any(|word| word == "xdp");
        ensure!(native, "{interface} does not run native XDP");
    }
    shown("\"xdp\", not \"xdpgeneric\": the programs run in the driver");
    Ok(())
}

fn ipv6(demo: &mut Demo) -> Result<()> {
    spread_over(demo, ADDRESSES[1])?;
    sees_client(demo, ADDRESSES[1], &CLIENT.ipv6())
}

fn what_it_says(demo: &mut Demo) -> Result<()> {
    transcript(demo.balancer.command(&["status"]))?;
    transcript(demo.balancer.command(&["targets"]))?;
    shown("status and targets");
    Ok(())
}

fn target_killed(demo: &mut Demo) -> Result<()> {
    let victim = &TARGETS[1];
    let Demo { balancer, servers, network, .. } = demo;
    let ((killed, marked), requests) =
        client::stream(network, &format!("{}:80", ADDRESSES[0]), || {
            pause(Duration::from_secs(1))?;
            let killed = Instant::now();
            servers[1].take().context("the target is already dead")?.kill()?;
            balancer.wait_for_state(&victim.ipv4(), "unhealthy")?;
            let marked = Instant::now();
            pause(Duration::from_secs(2))?;
            Ok((killed, marked))
        })?;
    let count = |when: &dyn Fn(&Request) -> bool| {
        let failed = |request: &&Request| request.failure.is_some();
        let those = || requests.iter().filter(|request| when(request));
        (those().count(), those().filter(failed).count())
    };
    let (total, before) = count(&|request| request.end < killed);
    let (unmarked, between) = count(&|request| request.end >= killed && request.begin < marked);
    let (after, failures) = count(&|request| request.begin >= marked);
    let time = (marked - killed).as_secs_f64();
    quote(&format!("{total:>6} requests before, {before} failed"));
    quote(&format!("{unmarked:>6} requests until it was marked unhealthy, {between} failed"));
    quote(&format!("{after:>6} requests after that, {failures} failed"));
    for (reason, times) in client::failures(&requests) {
        quote(&format!("failure: {reason}  × {times}"));
    }
    ensure!(before == 0, "{before} requests failed while all targets were alive");
    ensure!(failures == 0, "{failures} requests failed after {} was unhealthy", victim.name);
    ensure!(after > 0, "no request was sent after {} was unhealthy", victim.name);
    transcript(balancer.command(&["targets"]))?;
    shown(&format!(
        "{} was unhealthy {time:.1} s after its death; no request failed since",
        victim.name
    ));
    Ok(())
}

fn target_back(demo: &mut Demo) -> Result<()> {
    let host = &TARGETS[1];
    demo.servers[1] = Some(Server::start(&demo.network, host, &demo.folder.path, CLIENT_PAGE)?);
    demo.balancer.wait_for_state(&host.ipv4(), "healthy")?;
    shown(&format!("{} is healthy again", host.name));
    spread_over(demo, ADDRESSES[0])
}

fn forbidden(demo: &mut Demo) -> Result<()> {
    const REASON: &str = "SecurityGroupDenied";
    let before = demo.balancer.drops(REASON)?;
    let url = url(ADDRESSES[0]);
    let mut curl = demo.network.tool(FORBIDDEN.name, "curl");
    let output = curl.args(["--silent", "--show-error", "--max-time", "1", &url]).output()?;
    quote(&format!("{}$ curl {url}", FORBIDDEN.name));
    quote(&String::from_utf8_lossy(&output.stderr));
    ensure!(!output.status.success(), "{} got an answer", FORBIDDEN.ipv4());
    let after = demo.balancer.drops(REASON)?;
    ensure!(after > before, "the drop counter {REASON} stayed at {before}");
    shown(&format!("{} got no answer; {REASON} went from {before} to {after}", FORBIDDEN.ipv4()));
    Ok(())
}

fn rate(demo: &mut Demo) -> Result<()> {
    let (rate, failed) = client::wrk(&demo.network, &url(ADDRESSES[0]), 3)?;
    ensure!(rate > 0.0, "wrk got no answer");
    ensure!(failed == 0, "{failed} requests of wrk failed");
    let cpus = std::thread::available_parallelism()?;
    shown(&format!(
        "{rate:.0} requests a second over 32 connections, none failed; the client, the balancer \
         and the targets share this machine's {cpus} CPUs"
    ));
    Ok(())
}

/// Where the demo's files are; dropping it removes them.
struct Folder {
    path: PathBuf,
}

impl Folder {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("lb-demo-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self { path })
    }

    fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.path).with_context(|| format!("remove {}", self.path.display()))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Already gone when all went well.
        let _ = fs::remove_dir_all(&self.path);
    }
}
