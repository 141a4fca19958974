//! Network namespaces and the network between them.
//!
//! Two bridges stand for the switches of two segments, and have a namespace of their own.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

use super::pass::Pass;
use crate::process::{capture, command, find};

/// What is built.
pub const PICTURE: &str = "\
client     10.0.1.10 ─┐                                            ┌─ 10.0.2.11  target-1
                      ├─ clients ─ eth0  balancer  eth1 ─ targets ─┼─ 10.0.2.12  target-2
forbidden  10.0.1.66 ─┘                                            └─ 10.0.2.13  target-3
IPv6 alike: 2001:db8:1::10 and so on. Each name is a network namespace, each line a veth pair.";

/// A host of the demo.
pub struct Host {
    /// Its name, of which the namespace's name is made.
    pub name: &'static str,
    /// The segment it is on.
    pub segment: Segment,
    /// Last part of its addresses: 10.0.x.N and 2001:db8:x::N.
    pub number: &'static str,
}

/// A switch.
#[derive(Clone, Copy)]
pub enum Segment {
    /// 10.0.1.0/24.
    Clients,
    /// 10.0.2.0/24.
    Targets,
    /// 10.0.2.0/24 of the application load balancer's demo.
    ZoneA,
    /// 10.0.3.0/24.
    ZoneB,
}

impl Segment {
    const fn bridge(self) -> &'static str {
        match self {
            Self::Clients => "clients",
            Self::Targets => "targets",
            Self::ZoneA => "zone-a",
            Self::ZoneB => "zone-b",
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::Clients => 1,
            Self::Targets | Self::ZoneA => 2,
            Self::ZoneB => 3,
        }
    }
}

impl Host {
    /// Its IPv4 address.
    pub fn ipv4(&self) -> String {
        format!("10.0.{}.{}", self.segment.number(), self.number)
    }

    /// Its IPv6 address.
    pub fn ipv6(&self) -> String {
        format!("2001:db8:{}::{}", self.segment.number(), self.number)
    }
}

/// The client that may.
pub const CLIENT: Host = Host { name: "client", segment: Segment::Clients, number: "10" };
/// The client that may not.
pub const FORBIDDEN: Host = Host { name: "forbidden", segment: Segment::Clients, number: "66" };
/// The servers.
pub const TARGETS: [Host; 3] = [
    Host { name: "target-1", segment: Segment::Targets, number: "11" },
    Host { name: "target-2", segment: Segment::Targets, number: "12" },
    Host { name: "target-3", segment: Segment::Targets, number: "13" },
];
/// The balancer, at 10.0.x.1 and 2001:db8:x::1 on both segments.
pub const BALANCER: &str = "balancer";
const SWITCHES: &str = "switches";

/// The namespaces; dropping it deletes them.
pub struct Network {
    prefix: String,
    made: Vec<&'static str>,
    passes: Vec<Pass>,
}

impl Network {
    /// Makes all of it: switches, each with the balancer's interface to it, and hosts.
    pub fn new(segments: &[(Segment, &str)], hosts: &[&'static Host]) -> Result<Self> {
        let prefix = format!("lb-demo-{}-", std::process::id());
        let mut network = Self { prefix, made: Vec::new(), passes: Vec::new() };
        network.add(SWITCHES)?;
        for (segment, _) in segments {
            let bridge = segment.bridge();
            network.ip(SWITCHES, &format!("link add {bridge} type bridge mcast_snooping 0"))?;
            network.ip(SWITCHES, &format!("link set {bridge} up"))?;
        }
        network.add(BALANCER)?;
        network.balancer(segments)?;
        for host in hosts {
            network.add(host.name)?;
            network.endpoint(host)?;
        }
        Ok(network)
    }

    /// The whole name of a namespace.
    pub fn namespace(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// A command that runs in a namespace.
    pub fn command(&self, name: &str, program: &Path) -> Command {
        let mut exec = command("ip");
        exec.args(["netns", "exec", &self.namespace(name)]).arg(program);
        exec
    }

    /// The same, of a program that is looked for.
    pub fn tool(&self, name: &str, program: &str) -> Command {
        self.command(name, &find(program).unwrap_or_else(|| program.into()))
    }

    /// Runs `work` on a thread inside a namespace.
    pub fn inside<T: Send>(
        &self,
        name: &str,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        let file = Path::new("/run/netns").join(self.namespace(name));
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    enter(&file).with_context(|| format!("enter {}", file.display()))?;
                    work()
                })
                .join()
                .map_err(|_| anyhow!("a thread in {name} panicked"))?
        })
    }

    /// Deletes everything and proves it.
    pub fn take_down(mut self) -> Result<()> {
        self.delete()?;
        let left = capture(command("ip").args(["netns", "list"]))?;
        if let Some(line) = left.lines().find(|line| line.starts_with(&self.prefix)) {
            bail!("namespace {line} is still there");
        }
        Ok(())
    }

    fn delete(&mut self) -> Result<()> {
        self.passes.clear();
        let mut result = Ok(());
        while let Some(name) = self.made.pop() {
            let namespace = self.namespace(name);
            // One that stays must not keep the others.
            let deleted = capture(command("ip").args(["netns", "delete", &namespace]));
            result = result.and(deleted.map(drop));
        }
        result
    }

    fn add(&mut self, name: &'static str) -> Result<()> {
        capture(command("ip").args(["netns", "add", &self.namespace(name)]))?;
        self.made.push(name);
        self.ip(name, "link set lo up")?;
        // No router speaks here, and duplicate address detection would cost seconds.
        self.sysctl(name, "ipv6/conf/default/accept_dad", "0")?;
        self.sysctl(name, "ipv6/conf/default/accept_ra", "0")
    }

    fn ip(&self, name: &str, arguments: &str) -> Result<String> {
        capture(
            command("ip").args(["-n", &self.namespace(name)]).args(arguments.split_whitespace()),
        )
    }

    fn sysctl(&self, name: &str, key: &str, value: &str) -> Result<()> {
        self.inside(name, || {
            let file = Path::new("/proc/sys/net").join(key);
            fs::write(&file, value).with_context(|| format!("write {}", file.display()))
        })
    }

    /// A cable between a host's interface and a switch.
    fn plug(&self, host: &str, interface: &str, segment: Segment, port: &str) -> Result<()> {
        let namespace = self.namespace(host);
        self.ip(
            SWITCHES,
            &format!("link add {port} type veth peer name {interface} netns {namespace}"),
        )?;
        self.ip(SWITCHES, &format!("link set {port} master {} up", segment.bridge()))?;
        self.ip(host, &format!("link set {interface} up"))?;
        Ok(())
    }

    /// Takes a segment's switch off the power, or puts it back.
    pub fn switch(&self, segment: Segment, is_on: bool) -> Result<()> {
        let state = if is_on { "up" } else { "down" };
        self.ip(SWITCHES, &format!("link set {} {state}", segment.bridge())).map(drop)
    }

    fn balancer(&mut self, segments: &[(Segment, &str)]) -> Result<()> {
        for &(segment, interface) in segments {
            let port = format!("bal-{interface}");
            self.plug(BALANCER, interface, segment, &port)?;
            let number = segment.number();
            self.ip(BALANCER, &format!("addr add 10.0.{number}.1/24 dev {interface}"))?;
            self.ip(BALANCER, &format!("addr add 2001:db8:{number}::1/64 dev {interface}"))?;
            self.passes.push(self.inside(SWITCHES, || Pass::attach(&port))?);
        }
        self.sysctl(BALANCER, "ipv4/ip_forward", "1")?;
        self.sysctl(BALANCER, "ipv6/conf/all/forwarding", "1")
    }

    fn endpoint(&self, host: &Host) -> Result<()> {
        self.plug(host.name, "eth0", host.segment, host.name)?;
        let number = host.segment.number();
        self.ip(host.name, &format!("addr add {}/24 dev eth0", host.ipv4()))?;
        self.ip(host.name, &format!("addr add {}/64 dev eth0", host.ipv6()))?;
        self.ip(host.name, &format!("route add default via 10.0.{number}.1"))?;
        self.ip(host.name, &format!("-6 route add default via 2001:db8:{number}::1"))?;
        // A veth leaves checksums to a NIC that does not exist; XDP would forward them unfinished.
        capture(self.tool(host.name, "ethtool").args(["-K", "eth0", "tx", "off"]))?;
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Err(error) = self.delete() {
            eprintln!("warning: `ip netns delete` by hand: {error:#}");
        }
    }
}

fn enter(namespace: &Path) -> io::Result<()> {
    Ok(setns(File::open(namespace)?, CloneFlags::CLONE_NEWNET)?)
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
