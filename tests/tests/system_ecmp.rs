//! Long transfers through two balancers behind a router that spreads flows over them (ECMP), while
//! targets come and go, and one of the balancers goes too.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    io::{self, Write as _},
    mem,
    net::{SocketAddr, TcpStream},
    ops::Range,
    thread,
    time::{Duration, Instant},
};

use lb_tests::{
    agent::Agent,
    ecmp::{Ecmp, INTERFACES, Replies},
    servers::Server,
    site::PATIENCE,
    topology::{client_host, target_host},
    transfers::{Direction, Outcome, Transfers, probe},
    tunnels::Decapsulator,
    wait_until,
};

/// The listener's port.
const PORT: u16 = 9000;
/// Targets of the network.
const TARGETS: u8 = 4;
/// Which target joins, which is deregistered, and which dies.
const JOINING: u8 = 3;
const DRAINED: u8 = 0;
const KILLED: u8 = 1;
/// Which balancer dies.
const LOST: usize = 1;
/// The transfers that begin before anything changes, by the client's ports, each in both families.
const EARLY: Range<u16> = 20_000..20_050;
/// Those that begin between the changes.
const LATE: Range<u16> = 20_050..20_086;
/// Those that begin while one balancer is dead.
const MEANWHILE: Range<u16> = 20_086..20_126;
/// Of these the router moves at least so many: fewer of 40 happen less than once in a million runs.
const LEAST_MOVED: usize = 5;
/// How long nothing happens between two events, while bytes flow.
const PEACE: Duration = Duration::from_millis(800);

#[test]
fn long_transfers_with_nat() {
    let mut scenario = Scenario::start("nat");
    scenario.run();
    scenario.run_return();
}

#[test]
fn long_transfers_through_tunnels() {
    let mut scenario = Scenario::start("dsr_gue");
    scenario.run();
    scenario.run_return();
}

#[test]
fn long_transfers_with_direct_server_return() {
    Scenario::start("dsr_l2").run();
}

/// The switch does not know where a dead target is, and gives what is for it to both balancers: each
/// would send the other's packets to the target once more, with nothing that counts the hops.
#[test]
fn a_switch_that_floods_makes_no_loop() {
    let mut scenario = Scenario::start("dsr_l2");
    let network = &mut scenario.network;
    network.kill_target(KILLED).unwrap();
    let ports = [0, 1].map(|balancer| network.watch_switch(balancer).unwrap());
    let listener = network.listener;
    network.client.run(|| {
        for address in listener.both().into_iter().cycle().take(60) {
            // Long enough for whoever lives, short enough for no second SYN.
            let _ = TcpStream::connect_timeout(&(address, PORT).into(), Duration::from_millis(50));
        }
    });
    let mut seen: BTreeMap<SocketAddr, [usize; 2]> = BTreeMap::new();
    for (balancer, port) in ports.iter().enumerate() {
        for source in network.segments(port, Duration::from_millis(200)) {
            seen.entry(source).or_default()[balancer] += 1;
        }
    }
    let flooded = seen.values().filter(|counts| counts.iter().all(|count| *count > 0)).count();
    let most = seen.values().flatten().max().copied().unwrap_or(0);
    say(&format!("{flooded} of {} flows flooded, {most} segments at most", seen.len()));
    // A third of 60 goes to the dead target: fewer happen less than once in a million runs.
    assert!(flooded >= 4, "{seen:?}");
    assert!(most < 10, "{seen:?}");
}

/// Two agents, targets, and transfers under way.
struct Scenario {
    forwarding: &'static str,
    registered: Vec<u8>,
    /// The target that a client's address and port got before anything changed.
    homes: BTreeMap<SocketAddr, u8>,
    /// Of the late transfers' ports, those that are left.
    ports: Range<u16>,
    transfers: Transfers,
    agents: Vec<Agent>,
    /// What take the outer headers off, where there are any.
    _ends: Vec<Decapsulator>,
    _servers: Vec<Server>,
    network: Ecmp,
}

impl Scenario {
    fn start(forwarding: &'static str) -> Self {
        let replies = if forwarding == "nat" { Replies::Balancers } else { Replies::Router };
        let network = Ecmp::new(replies, TARGETS).unwrap();
        let servers = start_servers(&network, replies);
        let has_tunnels = forwarding == "dsr_gue";
        let ends = network.targets.iter().filter(|_| has_tunnels);
        let ends = ends.map(|target| Decapsulator::start(target).unwrap()).collect();
        let registered = vec![0, 1, 2];
        let config = configuration(&network, forwarding, &registered, "");
        let start = |balancer| Agent::start(balancer, &INTERFACES, &config).unwrap();
        let agents = thread::scope(|scope| {
            let starting: Vec<_> =
                network.balancers.iter().map(|balancer| scope.spawn(|| start(balancer))).collect();
            starting.into_iter().map(|agent| agent.join().unwrap()).collect()
        });
        let transfers = Transfers::new(&network.client).unwrap();
        let scenario = Self {
            forwarding,
            registered,
            homes: BTreeMap::new(),
            ports: LATE,
            transfers,
            agents,
            _ends: ends,
            _servers: servers,
            network,
        };
        for target in [0, 1, 2] {
            scenario.wait_for(target, "healthy");
        }
        scenario.network.announce().unwrap();
        scenario
    }

    fn run(&mut self) {
        let begun = Instant::now();
        self.find_homes();
        self.begin_transfers(EARLY);
        thread::sleep(PEACE);

        self.registered.push(JOINING);
        self.reload("");
        self.wait_for(JOINING, "healthy");
        self.begin_some_more();

        self.registered.retain(|target| *target != DRAINED);
        self.reload("");
        self.wait_for(DRAINED, "draining");
        self.begin_some_more();

        self.reload("[security_group.unused]\ningress = []\n");
        thread::sleep(PEACE);

        self.network.kill_target(KILLED).unwrap();
        self.wait_for(KILLED, "unhealthy");
        self.begin_some_more();
        thread::sleep(PEACE);

        let moved = self.network.flows_of(LOST, PEACE).unwrap();
        self.network.kill_balancer(LOST).unwrap();
        self.agents.remove(LOST).kill().unwrap();
        thread::sleep(2 * PEACE);

        let verdict = Verdict::new(self.finish(), &self.homes, &moved);
        let time = begun.elapsed().as_secs_f64();
        say(&format!("{}, two balancers, {time:.1} s:\n{verdict}", self.forwarding));
        verdict.check();
    }

    /// The dead balancer comes back, and flows are moved to it, of which it has seen none. They began
    /// after the last change, so both choose alike. Linux 6.18 as a router moves half of the IPv4
    /// flows, while those of IPv6 go on as they went, though `ip route get` says otherwise.
    fn run_return(&mut self) {
        let begun = Instant::now();
        self.begin_transfers(MEANWHILE);
        self.network.revive_balancer(LOST).unwrap();
        let config = configuration(&self.network, self.forwarding, &self.registered, "");
        let balancer = &self.network.balancers[LOST];
        self.agents.push(Agent::start(balancer, &INTERFACES, &config).unwrap());
        for target in self.registered.clone() {
            let state = if target == KILLED { "unhealthy" } else { "healthy" };
            self.wait_for(target, state);
        }
        self.network.announce_again(LOST).unwrap();
        wait_until("flows to the returned balancer", PATIENCE, || {
            self.network.flows_of(LOST, PEACE).unwrap().len() >= LEAST_MOVED
        })
        .unwrap();
        thread::sleep(PEACE);
        let moved = self.network.flows_of(LOST, PEACE).unwrap();
        let outcomes = self.finish();
        let time = begun.elapsed().as_secs_f64();
        let broken: Vec<_> = outcomes.iter().filter(|outcome| outcome.result.is_err()).collect();
        let (all, moved, broken_count) = (outcomes.len(), moved.len(), broken.len());
        say(&format!(
            "{}, a balancer comes back, {time:.1} s:\n  {all:>4} transfers, {moved} of them moved \
             to it by ECMP\n  {broken_count:>4} broken",
            self.forwarding
        ));
        assert!(broken.is_empty(), "{broken:#?}");
    }

    /// What became of the transfers so far.
    fn finish(&mut self) -> Vec<Outcome> {
        let next = Transfers::new(&self.network.client).unwrap();
        mem::replace(&mut self.transfers, next).finish()
    }

    /// Asks for the target of every flow that will begin, while all slots are settled.
    fn find_homes(&mut self) {
        for source in sources(EARLY).chain(sources(LATE)) {
            let server = self.server(source);
            let number = self.network.client.run(|| probe(source, server)).unwrap();
            self.homes.insert(source, number);
        }
    }

    fn server(&self, source: SocketAddr) -> SocketAddr {
        (self.network.listener.like(source.ip()), PORT).into()
    }

    fn begin_transfers(&mut self, ports: Range<u16>) {
        let listener = self.network.listener;
        let server = |source: SocketAddr| (listener.like(source.ip()), PORT).into();
        let middle = ports.start.midpoint(ports.end);
        let (down, up) = (ports.start..middle, middle..ports.end);
        self.transfers.open(Direction::Download, sources(down), server).unwrap();
        self.transfers.open(Direction::Upload, sources(up), server).unwrap();
    }

    /// A third of the late transfers.
    fn begin_some_more(&mut self) {
        let end = self.ports.start + LATE.len() as u16 / 3;
        self.begin_transfers(self.ports.start..end);
        self.ports.start = end;
    }

    /// All agents take over what is registered now, with `tables` in the file.
    fn reload(&self, tables: &str) {
        let config = configuration(&self.network, self.forwarding, &self.registered, tables);
        let reloads = |agent: &Agent| agent.log().matches("configuration reloaded").count();
        let before: Vec<_> = self.agents.iter().map(reloads).collect();
        for agent in &self.agents {
            agent.reload(&config).unwrap();
        }
        for (agent, before) in self.agents.iter().zip(before) {
            wait_until("reload", PATIENCE, || reloads(agent) > before).unwrap();
        }
    }

    /// Until all agents say so of a target, in both families.
    fn wait_for(&self, target: u8, state: &str) {
        for agent in &self.agents {
            for address in target_host(target).both() {
                agent.wait_for_target(&address.to_string(), state).unwrap();
            }
        }
    }
}

/// Not by `println!`, whose text is shown of failed tests only.
fn say(text: &str) {
    let mut output = io::stdout();
    writeln!(output, "{text}").unwrap();
}

/// The client's addresses with these ports.
fn sources(ports: Range<u16>) -> impl Iterator<Item = SocketAddr> {
    ports.flat_map(|port| client_host().both().map(|address| (address, port).into()))
}

fn start_servers(network: &Ecmp, replies: Replies) -> Vec<Server> {
    let start = |(number, namespace)| {
        let mut addresses = target_host(number).both().to_vec();
        if replies == Replies::Router {
            // Health checks come to its own address, clients to the listener's.
            addresses.extend(network.listener.both());
        }
        let port = target_port(replies);
        addresses
            .into_iter()
            .map(move |address| Server::transfers(namespace, (address, port).into(), number))
    };
    (0..).zip(&network.targets).flat_map(start).collect::<Result<_, _>>().unwrap()
}

/// `nat` changes the port too, direct server return cannot.
fn target_port(replies: Replies) -> u16 {
    match replies {
        Replies::Balancers => PORT + 1,
        Replies::Router => PORT,
    }
}

fn configuration(network: &Ecmp, forwarding: &str, registered: &[u8], tables: &str) -> String {
    let port = target_port(if forwarding == "nat" { Replies::Balancers } else { Replies::Router });
    let addresses = registered.iter().map(|target| target_host(*target).to_string());
    let addresses = addresses.collect::<Vec<_>>().join(", ");
    // Three checks of a second: a machine that is busy with other tests is no dead target.
    format!(
        "[agent]
hash_seed = \"0x5eed5eed5eed5eed\"
flow_table_size = 65536
[target_group.transfers]
port = {port}
forwarding = \"{forwarding}\"
targets = [{addresses}]
health_check = {{ protocol = \"tcp\", interval = \"1s\", timeout = \"1s\", unhealthy_threshold = 3 }}
[load_balancer.site]
addresses = [{listener}]
[[load_balancer.site.listener]]
port = {PORT}
target_group = \"transfers\"
{tables}",
        listener = network.listener
    )
}

/// What became of the transfers, sorted by what may become of them.
#[derive(Default)]
struct Verdict {
    /// All that are not below, and how many of them the router moved to the other balancer.
    kept: usize,
    kept_though_moved: usize,
    /// Of the target that died.
    bereft: usize,
    /// Begun on a slot that was not settled and given another target than the slot had before,
    /// which only its balancer knew; then moved to the other one.
    unknown: usize,
    unknown_and_broken: usize,
    /// What should not have happened.
    wrong: Vec<String>,
}

impl Verdict {
    fn new(
        outcomes: Vec<Outcome>,
        homes: &BTreeMap<SocketAddr, u8>,
        moved: &BTreeSet<SocketAddr>,
    ) -> Self {
        let mut verdict = Self::default();
        for outcome in outcomes {
            let has_moved = moved.contains(&outcome.source);
            let is_broken = outcome.result.is_err();
            if outcome.target == KILLED {
                verdict.bereft += 1;
                if !is_broken {
                    verdict.wrong.push(format!("{} on a dead target lives", outcome.source));
                }
            } else if has_moved && outcome.target != homes[&outcome.source] {
                verdict.unknown += 1;
                verdict.unknown_and_broken += usize::from(is_broken);
            } else if is_broken {
                let Outcome { source, target, bytes, result } = outcome;
                let error = result.map_err(|error| format!("{error:#}"));
                verdict.wrong.push(format!(
                    "{source} on target {target}, moved: {has_moved}, {bytes} bytes: {error:?}"
                ));
            } else {
                verdict.kept += 1;
                verdict.kept_though_moved += usize::from(has_moved);
            }
        }
        verdict
    }

    fn check(&self) {
        assert!(self.wrong.is_empty(), "{:#?}", self.wrong);
        // Each with half of the flows: fewer happen less than once in a million runs.
        assert!(self.kept_though_moved > 15, "the router moved {}", self.kept_though_moved);
        assert!(self.kept - self.kept_though_moved > 15, "{self}");
        assert!(self.bereft > 5, "nothing was to be seen of the target's death: {self}");
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kept, kept_though_moved, bereft, unknown, unknown_and_broken, wrong } = self;
        writeln!(f, "  {kept:>4} not broken, {kept_though_moved} of them moved by ECMP")?;
        writeln!(f, "  {bereft:>4} broken: their target died")?;
        writeln!(
            f,
            "  {unknown:>4} begun on an unsettled slot and moved by ECMP before it settled:"
        )?;
        writeln!(f, "       {unknown_and_broken} of these broken")?;
        write!(f, "  {:>4} broken otherwise", wrong.len())
    }
}
