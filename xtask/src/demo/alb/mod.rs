//! `cargo xtask demo alb`: the way of a user of AWS's application load balancer, step by step.

mod guard;
mod world;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use self::guard::Guard;
use self::world::{ADDRESSES, NAME_SERVER, PICTURE, SEGMENTS, TARGETS};
use super::Folder;
use super::balancer::Balancer;
use super::namespace::{BALANCER, CLIENT, FORBIDDEN, Network, Segment};
use super::report::{heading, quote, shown, transcript};
use super::server::{PORT, Server};
use crate::process::{capture, command, interrupted, show as shown_as, wait_for};

/// What a page says beside its server's name.
const PAGE: &str = "for $http_x_forwarded_for over $http_x_forwarded_proto, asked by $remote_addr";

type Step = (&'static str, fn(&mut Demo) -> Result<()>);

const STEPS: [Step; 10] = [
    ("The targets are registered, initial, then healthy", registered),
    ("The name resolves: an address in each zone", name),
    ("The page, by the name", page),
    ("Who is not in the load balancer's security group is refused", forbidden),
    ("A target is for the load balancer alone", direct),
    ("Rules by path and by host lead to other groups, elsewhere, or to an answer", rules),
    ("A cookie keeps a user on one target", cookie),
    ("The TLS listener serves the same page", tls),
    ("A zone goes dark, and the page stays", dark),
    ("What the agent says", what_it_says),
];

/// Everything that runs. Fields drop in this order: programs end before their namespaces go.
struct Demo {
    balancer: Balancer,
    guards: Vec<Guard>,
    servers: Vec<Server>,
    resolver: Resolver,
    network: Network,
    folder: Folder,
    /// The load balancer's.
    name: String,
}

/// Shows it.
pub fn show(binary: &Path) -> Result<()> {
    let mut demo = Demo::start(binary, Folder::new()?)?;
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
        heading("A client, a balancer, and two zones with two targets each, in network namespaces");
        let hosts: Vec<_> = [&CLIENT, &FORBIDDEN].into_iter().chain(&TARGETS).collect();
        let network = Network::new(&SEGMENTS, &hosts).context("make the namespaces")?;
        quote(PICTURE);
        let start = |host| Server::start(&network, host, &folder.path, PAGE);
        let servers: Vec<_> = TARGETS.iter().map(start).collect::<Result<_>>()?;
        shown("nginx answers on each target");
        // Accepts the first health check, and leaves it without an answer.
        servers.iter().try_for_each(|server| server.freeze(true))?;
        certificate(&folder.path)?;
        let resolver = Resolver::new(&network.namespace(CLIENT.name))?;
        heading("lb-userspace --iface eth0 --iface eth1 --iface eth2 --config lb.toml");
        let interfaces = SEGMENTS.map(|(_, interface)| interface);
        let text = world::text(&folder.path);
        quote(&text);
        let balancer = Balancer::start(&network, binary, &folder.path, &interfaces, &text)
            .context("start the agent")?;
        let (guards, name) = (Vec::new(), String::new());
        let demo = Self { balancer, guards, servers, resolver, network, folder, name };
        demo.with_guards(binary)
    }

    fn with_guards(mut self, binary: &Path) -> Result<Self> {
        // While the first checks wait for an answer.
        self.balancer.wait_until_all(TARGETS.len(), "initial")?;
        transcript(self.balancer.command(&["targets"]))?;
        shown("all targets are initial: no check has an answer yet");
        self.servers.iter().try_for_each(|server| server.freeze(false))?;
        let Self { network, folder, balancer, .. } = &self;
        let start =
            |host| Guard::start(network, host, binary, &folder.path, &balancer.configuration);
        let guards = TARGETS.iter().map(start).collect::<Result<_>>();
        self.guards = guards.context("start the targets' agents")?;
        shown("lb-userspace --role target runs on each target");
        Ok(self)
    }

    fn steps(&mut self) -> Result<()> {
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
        let addresses = capture(self.network.tool(BALANCER, "ip").args(["address", "show"]))?;
        for address in ADDRESSES {
            let left = addresses.split([' ', '/']).any(|word| word == address);
            ensure!(!left, "{address} is still there: {addresses}");
        }
        shown("the agent ended; no load balancer address is left");
        self.guards.into_iter().try_for_each(Guard::stop)?;
        self.servers.into_iter().try_for_each(Server::stop)?;
        self.resolver.remove()?;
        self.network.take_down()?;
        self.folder.remove()?;
        shown("no process, namespace or file is left");
        Ok(())
    }

    /// A command of the client, whose resolver asks the balancer.
    fn client(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = self.network.tool(CLIENT.name, program);
        command.args(arguments);
        command
    }

    /// What curl writes for the client; shown as it would be typed.
    fn curl(&self, arguments: &[&str]) -> Result<String> {
        let mut curl = self.client("curl", &["--silent", "--show-error", "--max-time", "5"]);
        quote(&format!("{}$ curl {}", CLIENT.name, arguments.join(" ")));
        let text = capture(curl.args(arguments))?;
        quote(&text);
        Ok(text)
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.name)
    }

    /// The addresses that the name has now.
    fn addresses(&self) -> Result<Vec<String>> {
        let server = format!("@{NAME_SERVER}");
        let text = capture(&mut self.client("dig", &[&server, "+short", &self.name, "A"]))?;
        let mut addresses: Vec<_> = text.lines().map(str::to_owned).collect();
        addresses.sort();
        Ok(addresses)
    }
}

fn registered(demo: &mut Demo) -> Result<()> {
    demo.balancer.wait_until_all(TARGETS.len(), "healthy")?;
    transcript(demo.balancer.command(&["targets"]))?;
    shown("all targets are healthy");
    Ok(())
}

fn name(demo: &mut Demo) -> Result<()> {
    let status = demo.balancer.status()?;
    let name = status["load_balancers"][0]["dns_name"].as_str();
    demo.name = name.context("`status --json` has no dns_name")?.to_owned();
    let addresses = demo.addresses()?;
    quote(&format!("{}$ dig +short {}", CLIENT.name, demo.name));
    quote(&addresses.join("\n"));
    ensure!(addresses == ADDRESSES, "not {ADDRESSES:?}");
    shown("one address in zone a, one in zone b");
    Ok(())
}

fn page(demo: &mut Demo) -> Result<()> {
    let text = demo.curl(&[&demo.url("/")])?;
    ensure!(text.contains("hello world from web-"), "not the page");
    ensure!(text.contains(&format!("for {} over http,", CLIENT.ipv4())), "not the client");
    shown(&format!("hello world; X-Forwarded-For names the client, {}", CLIENT.ipv4()));
    Ok(())
}

fn forbidden(demo: &mut Demo) -> Result<()> {
    const REASON: &str = "SecurityGroupDenied";
    let before = demo.balancer.drops(REASON)?;
    let url = format!("http://{}/", ADDRESSES[0]);
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

/// From the clients' side, and from a neighbour of the target, which only its own agent can refuse.
fn direct(demo: &mut Demo) -> Result<()> {
    let [victim, neighbour, ..] = &TARGETS;
    let url = format!("http://{}:{PORT}/", victim.ipv4());
    let before = demo.guards[0].denied()?;
    for from in [CLIENT.name, neighbour.name] {
        let mut curl = demo.network.tool(from, "curl");
        let output = curl.args(["--silent", "--show-error", "--max-time", "1", &url]).output()?;
        quote(&format!("{from}$ curl {url}"));
        quote(&String::from_utf8_lossy(&output.stderr));
        ensure!(!output.status.success(), "{from} got an answer");
    }
    let after = demo.guards[0].denied()?;
    ensure!(after > before, "the target's agent counted no refusal");
    let refused = after - before;
    shown(&format!(
        "neither got an answer; the agent on {} refused {refused} packets",
        victim.name
    ));
    Ok(())
}

fn rules(demo: &mut Demo) -> Result<()> {
    let by_path = demo.curl(&[&demo.url("/api/users")])?;
    ensure!(by_path.contains("hello world from api-"), "not of group api");
    let by_host = demo.curl(&["--header", "Host: api.example.com", &demo.url("/")])?;
    ensure!(by_host.contains("hello world from api-"), "not of group api");
    shown("/api/* and api.example.com are served by group api");
    let format = "%{http_code} %{redirect_url}\\n";
    let redirected =
        demo.curl(&["--output", "/dev/null", "--write-out", format, &demo.url("/old/page?x=1")])?;
    ensure!(redirected.trim_end().ends_with("/new/old/page?x=1"), "not redirected");
    ensure!(redirected.starts_with("301 "), "not by 301");
    let teapot = demo.curl(&["--write-out", " (%{http_code})\\n", &demo.url("/teapot")])?;
    ensure!(teapot.trim_end() == "short and stout (418)", "not the fixed response");
    shown("a redirect and a fixed response");
    Ok(())
}

fn cookie(demo: &mut Demo) -> Result<()> {
    const REQUESTS: usize = 10;
    let url = demo.url("/?[1-10]");
    let server = |line: &str| {
        line.strip_prefix("hello world from ")
            .and_then(|it| it.split(',').next())
            .map(str::to_owned)
    };
    let servers = |text: &str| {
        let mut servers: Vec<_> = text.lines().filter_map(server).collect();
        ensure!(servers.len() == REQUESTS, "{} of {REQUESTS} answers", servers.len());
        servers.sort();
        servers.dedup();
        Ok(servers)
    };
    let without = servers(&demo.curl(&[&url])?)?;
    ensure!(without.len() == 2, "without a cookie: {without:?}");
    shown("without the cookie requests take turns");
    let jar = demo.folder.path.join("cookies");
    let jar = jar.to_string_lossy();
    demo.curl(&["--cookie-jar", &jar, &demo.url("/")])?;
    quote(&fs::read_to_string(&*jar)?);
    let with = servers(&demo.curl(&["--cookie", &jar, "--cookie-jar", &jar, &url])?)?;
    ensure!(with.len() == 1, "with the cookie: {with:?}");
    shown(&format!("with AWSALB all go to {}", with[0]));
    Ok(())
}

fn tls(demo: &mut Demo) -> Result<()> {
    let authority = demo.folder.path.join("site.pem");
    let authority = authority.to_string_lossy();
    // The certificate was made before the name was known; it is for all names of the zone.
    let url = format!("https://{}/", demo.name);
    let format = "HTTP/%{http_version}, certificate check %{ssl_verify_result}\\n";
    let text = demo.curl(&["--cacert", &authority, "--write-out", format, &url])?;
    ensure!(text.contains("hello world from web-"), "not the page");
    ensure!(text.contains(" over https,"), "X-Forwarded-Proto is not https");
    ensure!(text.contains("HTTP/2, certificate check 0"), "not HTTP/2");
    shown("the same page over HTTPS and HTTP/2, the certificate verified");
    Ok(())
}

fn dark(demo: &mut Demo) -> Result<()> {
    demo.network.switch(Segment::ZoneB, false)?;
    shown("the switch of zone b is off");
    demo.balancer.wait_until_all(TARGETS.len() / 2, "unhealthy")?;
    wait_for("zone b out of the answer", Duration::from_secs(20), || {
        Ok((demo.addresses()? == ADDRESSES[..1]).then_some(()))
    })?;
    quote(&format!("{}$ dig +short {}", CLIENT.name, demo.name));
    quote(&demo.addresses()?.join("\n"));
    transcript(demo.balancer.command(&["targets"]))?;
    shown("the name has zone a's address only");
    for _ in 0..3 {
        let text = demo.curl(&["--fail", &demo.url("/")])?;
        ensure!(text.contains("hello world from web-a,"), "not the page of zone a");
    }
    shown("the page is still there, by the same name");
    demo.network.switch(Segment::ZoneB, true)?;
    demo.balancer.wait_until_all(TARGETS.len(), "healthy")?;
    let addresses = demo.addresses()?;
    ensure!(addresses == ADDRESSES, "{addresses:?}");
    shown("zone b is back, and in the answer");
    Ok(())
}

fn what_it_says(demo: &mut Demo) -> Result<()> {
    transcript(demo.balancer.command(&["status"]))?;
    transcript(demo.balancer.command(&["targets"]))?;
    let status = demo.balancer.status()?;
    let requests = status["load_balancers"][0]["metrics"]["RequestCount"].as_u64();
    ensure!(requests.is_some_and(|requests| requests > 10), "RequestCount is {requests:?}");
    shown("status and targets, with CloudWatch's metrics");
    Ok(())
}

/// A certificate for every name in the zone, which is its own authority.
fn certificate(folder: &Path) -> Result<()> {
    let mut openssl = command("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
    openssl.args(["-nodes", "-days", "1", "-subj", "/CN=elb.internal", "-addext"]);
    openssl.args(["subjectAltName=DNS:*.elb.internal", "-keyout"]).arg(folder.join("site.key"));
    openssl.arg("-out").arg(folder.join("site.pem"));
    capture(&mut openssl).with_context(|| shown_as(&openssl)).map(drop)
}

/// A namespace's own `/etc/resolv.conf`, which `ip netns exec` puts in place.
struct Resolver {
    folder: PathBuf,
}

impl Resolver {
    fn new(namespace: &str) -> Result<Self> {
        let folder = Path::new("/etc/netns").join(namespace);
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let resolver = Self { folder };
        fs::write(resolver.folder.join("resolv.conf"), format!("nameserver {NAME_SERVER}\n"))?;
        Ok(resolver)
    }

    fn remove(&self) -> Result<()> {
        fs::remove_dir_all(&self.folder)
            .with_context(|| format!("remove {}", self.folder.display()))?;
        // Others' may be there.
        let _ = fs::remove_dir("/etc/netns");
        Ok(())
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        // Already gone when all went well.
        let _ = self.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_shows_every_host() {
        for host in [&CLIENT, &FORBIDDEN].into_iter().chain(&TARGETS) {
            assert!(PICTURE.contains(host.name), "{}", host.name);
            assert!(PICTURE.contains(&host.ipv4()), "{}", host.ipv4());
        }
    }
}
