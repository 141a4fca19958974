//! Which target new connections go to: weights, several target groups, zones, stickiness, slow
//! start; and what becomes of the connections that are there.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr, TcpStream},
};

use lb_tests::{
    agent::Agent,
    clients,
    servers::Server,
    site::{ECHO, PATIENCE, Servers, WEB},
    topology::{Dual, Picture, Topology, target_host},
    wait_until,
};

const PICTURE: Picture = Picture::TwoNics;

/// A network whose targets all have their servers, behind an agent with a configuration of the
/// test's own.
struct Ground {
    agent: Agent,
    servers: Vec<Servers>,
    topology: Topology,
}

/// A target group of these lines and targets: number, and what else its table has.
fn group(name: &str, port: u16, lines: &str, targets: &[(u8, &str)]) -> String {
    let targets: String = targets
        .iter()
        .flat_map(|(index, keys)| target_host(*index).both().map(|address| (address, *keys)))
        .map(|(address, keys)| format!("  {{ address = \"{address}\"{keys} }},\n"))
        .collect();
    let check = if port == 8000 + WEB { "path = \"/health\"" } else { "protocol = \"tcp\"" };
    format!(
        "[target_group.{name}]\nport = {port}\n{lines}\ntargets = [\n{targets}]\n\
         [target_group.{name}.health_check]\ninterval = \"1s\"\ntimeout = \"1s\"\n\
         healthy_threshold = 2\n{check}\n"
    )
}

fn web(name: &str, lines: &str, targets: &[(u8, &str)]) -> String {
    group(name, 8000 + WEB, lines, targets)
}

fn echo(name: &str, lines: &str, targets: &[(u8, &str)]) -> String {
    group(name, 8000 + ECHO, lines, targets)
}

/// A load balancer of these lines, with listeners: port and where it forwards to.
fn balancer(listener: Dual, lines: &str, listeners: &[(u16, &str)]) -> String {
    let listeners: String = listeners
        .iter()
        .map(|(port, keys)| format!("[[load_balancer.site.listener]]\nport = {port}\n{keys}\n"))
        .collect();
    format!(
        "[load_balancer.site]\naddresses = [{listener}]\n{lines}\n{listeners}\n\
         [agent]\nflow_table_size = 65536\navailability_zone = \"a\"\n"
    )
}

impl Ground {
    fn start(targets: u8, config: impl FnOnce(Dual) -> String) -> Self {
        let topology = Topology::new(PICTURE, targets).unwrap();
        let servers = (0..targets).map(|n| Servers::start(&topology, PICTURE, n).unwrap());
        let servers = servers.collect();
        let config = config(topology.listener);
        let agent = Agent::start(&topology.balancer, topology.interfaces, &config).unwrap();
        Self { agent, servers, topology }
    }

    fn reload(&self, config: &str) {
        let reloads = || self.agent.log().matches("configuration reloaded").count();
        let before = reloads();
        self.agent.reload(config).unwrap();
        wait_until("reload", PATIENCE, || reloads() > before).unwrap();
    }

    fn at(&self, port: u16) -> [SocketAddr; 2] {
        self.topology.listener.both().map(|address| (address, port).into())
    }

    /// Requests that each target answered, of so many in each family.
    fn answers(&self, port: u16, requests: u32) -> BTreeMap<u8, u32> {
        let mut answers = BTreeMap::new();
        self.topology.client.run(|| {
            for server in self.at(port) {
                for _ in 0..requests {
                    *answers.entry(ask(None, server)).or_default() += 1;
                }
            }
        });
        answers
    }

    fn connect(&self, port: u16, count: usize) -> Vec<TcpStream> {
        let servers = self.at(port).into_iter().cycle().take(count);
        let connect = |server| clients::connect(None, server).unwrap();
        self.topology.client.run(|| servers.map(connect).collect())
    }

    fn set_healthy(&self, target: usize, healthy: bool) {
        self.servers[target].web.iter().for_each(|web| web.set_healthy(healthy));
        let state = if healthy { "healthy" } else { "unhealthy" };
        for address in target_host(target as u8).both() {
            self.agent.wait_for_target(&address.to_string(), state).unwrap();
        }
    }

    fn connections(&self, target: usize) -> u64 {
        self.servers[target].tcp.iter().map(Server::served).sum()
    }
}

/// The number of the target that answers a request.
fn ask(source: Option<SocketAddr>, server: SocketAddr) -> u8 {
    let answer = clients::http_get(source, server, "/").unwrap().text();
    answer.strip_prefix("hello world from target").unwrap().parse().unwrap()
}

fn echo_all(connections: &[TcpStream], what: &str) {
    for (index, stream) in connections.iter().enumerate() {
        let result = clients::echo(stream, what.as_bytes());
        result.unwrap_or_else(|error| panic!("connection {index}, {what}: {error:#}"));
    }
}

/// Shares within five standard deviations: a right balancer misses that once in 1.7 million.
fn assert_shares(answers: &BTreeMap<u8, u32>, shares: &[(u8, f64)]) {
    let total = f64::from(answers.values().sum::<u32>());
    for (target, share) in shares {
        let count = f64::from(answers.get(target).copied().unwrap_or(0));
        let deviation = (total * share * (1.0 - share)).sqrt();
        let off = (count - total * share).abs();
        assert!(off <= 5.0 * deviation, "target {target} should have {share}: {answers:?}");
    }
}

const TWO_GROUPS: [&str; 2] = [
    "target_groups = [{ name = \"web\", weight = 90 }, { name = \"canary\", weight = 10 }]",
    "target_groups = [{ name = \"web\", weight = 20 }, { name = \"canary\", weight = 80 }]",
];

#[test]
fn a_canary_grows_without_a_broken_connection() {
    let config = |listener, action: &str| {
        let echo_action = action.replace("\"web\"", "\"tcp\"").replace("canary", "tcp-canary");
        [
            web("web", "", &[(0, ", weight = 3"), (1, ", weight = 1")]),
            web("canary", "", &[(2, "")]),
            echo("tcp", "", &[(0, ""), (1, "")]),
            echo("tcp-canary", "", &[(2, "")]),
            balancer(listener, "", &[(WEB, action), (ECHO, &echo_action)]),
        ]
        .concat()
    };
    let ground = Ground::start(3, |listener| config(listener, TWO_GROUPS[0]));
    let connections = ground.connect(ECHO, 100);
    echo_all(&connections, "at first");
    let answers = ground.answers(WEB, 200);
    assert_shares(&answers, &[(0, 0.675), (1, 0.225), (2, 0.1)]);

    ground.reload(&config(ground.topology.listener, TWO_GROUPS[1]));
    echo_all(&connections, "the canary has grown");
    let answers = ground.answers(WEB, 200);
    assert_shares(&answers, &[(0, 0.15), (1, 0.05), (2, 0.8)]);

    // Only the canary, by another way of saying it: the other group is no longer named.
    ground.reload(&config(ground.topology.listener, "target_group = \"canary\""));
    echo_all(&connections, "the canary has taken over");
    assert_eq!(ground.answers(WEB, 20), [(2, 40)].into());
    assert!(ground.connections(0) > 20, "they were on the other group");
    let status = ground.agent.status().unwrap();
    assert_eq!(status["load_balancers"][0]["listeners"][0]["target_group"], "canary");
}

#[test]
fn weight_0_takes_no_new_connection_and_keeps_those_it_has() {
    let config = |listener, keys: &str| {
        let targets = [(0, ""), (1, keys)];
        let listeners = [(WEB, "target_group = \"web\""), (ECHO, "target_group = \"tcp\"")];
        [web("web", "", &targets), echo("tcp", "", &targets), balancer(listener, "", &listeners)]
            .concat()
    };
    let ground = Ground::start(2, |listener| config(listener, ", weight = 999"));
    let connections = ground.connect(ECHO, 60);
    assert_shares(&ground.answers(WEB, 100), &[(1, 0.999)]);
    ground.reload(&config(ground.topology.listener, ", weight = 0"));
    assert_eq!(ground.answers(WEB, 40), [(0, 80)].into());
    let before = ground.connections(1);
    assert!(before > 40, "{before}");
    echo_all(&connections, "drained by weight");
    let more = ground.connect(ECHO, 20);
    echo_all(&more, "new ones");
    assert_eq!(ground.connections(1), before);
    let target = |address: IpAddr| {
        let targets = ground.agent.targets().unwrap();
        let of = |t: &&serde_json::Value| t["address"] == address.to_string();
        targets.as_array().unwrap().iter().find(of).unwrap().clone()
    };
    assert_eq!(target(target_host(1).v6.into())["weight"], 0);
    assert_eq!(target(target_host(1).v6.into())["state"], "healthy");
}

#[test]
fn the_agent_s_zone_first_and_the_others_when_it_is_ill() {
    let ground = Ground::start(3, |listener| {
        let zone = |zone| format!(", availability_zone = \"{zone}\"");
        let (a, b) = (zone("a"), zone("b"));
        web("web", "", &[(0, &a), (1, &b), (2, &b)])
            + &balancer(listener, "cross_zone = false", &[(WEB, "target_group = \"web\"")])
    });
    assert_eq!(ground.answers(WEB, 20), [(0, 40)].into());
    ground.set_healthy(0, false);
    let others = ground.answers(WEB, 40);
    assert_eq!(others.keys().collect::<Vec<_>>(), [&1, &2], "{others:?}");
    ground.set_healthy(0, true);
    assert_eq!(ground.answers(WEB, 20), [(0, 40)].into());
}

const STICKY: &str = "stickiness = { type = \"source_ip\" }";

/// One listener, whose flows nobody remembers, and two of one group, whose flows are tracked.
#[test]
fn a_sticky_client_always_meets_the_same_target() {
    for listeners in [&[WEB][..], &[WEB, WEB + 1]] {
        let action = |port: &u16| (*port, "target_group = \"web\"");
        let actions: Vec<_> = listeners.iter().map(action).collect();
        let ground = Ground::start(3, |listener| {
            web("web", STICKY, &[(0, ""), (1, ""), (2, "")]) + &balancer(listener, "", &actions)
        });
        let add = |host| ground.topology.add_client(host).unwrap();
        let clients: Vec<Dual> = (30..46).map(add).collect();
        for family in [0, 1] {
            let mut used = BTreeSet::new();
            for client in &clients {
                let source = SocketAddr::new(client.both()[family], 0);
                let targets: BTreeSet<u8> = ground.topology.client.run(|| {
                    let servers = listeners.iter().map(|port| ground.at(*port)[family]);
                    servers
                        .flat_map(|server| (0..3).map(move |_| ask(Some(source), server)))
                        .collect()
                });
                assert_eq!(targets.len(), 1, "{source}: {targets:?}");
                used.extend(targets);
            }
            // All 16 on one of three targets: 3^-15.
            assert!(used.len() > 1, "{used:?}");
        }
    }
}

#[test]
fn a_live_listener_does_not_become_sticky() {
    let config = |listener, lines| {
        web("web", lines, &[(0, "")]) + &balancer(listener, "", &[(WEB, "target_group = \"web\"")])
    };
    let ground = Ground::start(1, |listener| config(listener, ""));
    ground.agent.reload(&config(ground.topology.listener, STICKY)).unwrap();
    let error = || {
        let status = ground.agent.status().unwrap();
        status["agent"]["reload_error"].as_str().map(ToOwned::to_owned)
    };
    wait_until("refusal", PATIENCE, || error().is_some()).unwrap();
    assert!(error().unwrap().contains("cannot get or lose `stickiness`"), "{:?}", error());
    assert_eq!(ground.answers(WEB, 2), [(0, 4)].into());
}

#[test]
fn a_target_that_recovers_starts_slowly() {
    let ground = Ground::start(2, |listener| {
        web("web", "slow_start = \"900s\"", &[(0, ""), (1, "")])
            + &balancer(listener, "", &[(WEB, "target_group = \"web\"")])
    });
    assert_shares(&ground.answers(WEB, 100), &[(1, 0.5)]);
    ground.set_healthy(1, false);
    ground.set_healthy(1, true);
    // The first of its ten steps, or the second: 1/11 or 2/12 of the whole.
    let answers = ground.answers(WEB, 100);
    let share = f64::from(answers.get(&1).copied().unwrap_or(0)) / 200.0;
    assert!((0.005..0.31).contains(&share), "{answers:?}");
}

/// An echo group whose health checks go to another port: its servers see clients alone.
fn clients_echo(lines: &str, targets: &[(u8, &str)]) -> String {
    let elsewhere = format!("protocol = \"tcp\"\nport = {}", 8000 + WEB);
    echo("tcp", lines, targets).replace("protocol = \"tcp\"", &elsewhere)
}

/// Connections that the echo servers of each target hold or held.
fn held(ground: &Ground, targets: u8) -> Vec<u64> {
    (0..targets).map(|target| ground.connections(target.into())).collect()
}

/// What is measured with `algorithm`: of 200 new connections, those that go to the target without
/// 40 old ones.
fn to_the_idle_one(algorithm: &str) -> u64 {
    let config = |listener, weight: &str| {
        let lines = format!("algorithm = \"{algorithm}\"");
        clients_echo(&lines, &[(0, ""), (1, weight)])
            + &balancer(listener, "", &[(ECHO, "target_group = \"tcp\"")])
    };
    let ground = Ground::start(2, |listener| config(listener, ", weight = 0"));
    let long = ground.connect(ECHO, 40);
    echo_all(&long, "all on one target");
    assert_eq!(held(&ground, 2), [40, 0]);
    ground.reload(&config(ground.topology.listener, ""));
    for _ in 0..10 {
        let short = ground.connect(ECHO, 20);
        echo_all(&short, "short");
    }
    echo_all(&long, "those from before");
    let flows = || -> Vec<Option<u64>> {
        let targets = ground.agent.targets().unwrap();
        targets.as_array().unwrap().iter().map(|t| t["flows"].as_u64()).collect()
    };
    if algorithm == "least_connections" {
        // Of each target in both families: those of the long ones, and none.
        let of_long = |flows: &[Option<u64>]| {
            let mut flows: Vec<_> = flows.iter().flatten().copied().collect();
            flows.sort_unstable();
            flows == [0, 0, 20, 20]
        };
        wait_until("the long ones", PATIENCE, || of_long(&flows())).unwrap();
    }
    held(&ground, 2)[1]
}

#[test]
fn who_holds_long_connections_gets_fewer_new_ones() {
    let [least, hashed] = ["least_connections", "maglev"].map(to_the_idle_one);
    println!("of 200 to the idle target: {least} with least_connections, {hashed} with maglev");
    assert!(least >= 190, "{least} of 200 only went to the idle target");
    assert!(hashed < 150, "by the hash half of 200: {hashed}");
}

/// Long connections among short ones, over three targets of different weights.
#[test]
fn connections_are_balanced_by_weight_better_than_by_the_hash() {
    let weights = [1_u64, 1, 2];
    let spread = |algorithm: &str| {
        let targets = [(0, ""), (1, ""), (2, ", weight = 2")];
        let lines = format!("algorithm = \"{algorithm}\"");
        let ground = Ground::start(3, |listener| {
            clients_echo(&lines, &targets)
                + &web("web", &lines, &targets)
                + &balancer(
                    listener,
                    "",
                    &[(ECHO, "target_group = \"tcp\""), (WEB, "target_group = \"web\"")],
                )
        });
        let mut long = Vec::new();
        for _ in 0..20 {
            long.extend(ground.connect(ECHO, 10));
            ground.answers(WEB, 10);
        }
        echo_all(&long, "long");
        let held = held(&ground, 3);
        assert_eq!(held.iter().sum::<u64>(), 200);
        let due = weights.map(|weight| 50 * weight);
        let off = held.iter().zip(due).map(|(held, due)| held.abs_diff(due)).max();
        println!("{algorithm}: {held:?}, due {due:?}");
        off.unwrap()
    };
    // By family 25, 25 and 50; by the hash a standard deviation is 6 or 7.
    assert!(spread("least_connections") <= 4);
    spread("maglev");
}

#[test]
fn live_flows_are_counted_where_every_one_is_tracked() {
    let ground = Ground::start(2, |listener| {
        echo("tcp", "flow_tracking = \"always\"", &[(0, ""), (1, "")])
            + &web("web", "", &[(0, "")])
            + &balancer(
                listener,
                "",
                &[(ECHO, "target_group = \"tcp\""), (WEB, "target_group = \"web\"")],
            )
    });
    let connections = ground.connect(ECHO, 40);
    echo_all(&connections, "hello");
    let flows = |group: &str| -> Vec<Option<u64>> {
        let targets = ground.agent.targets().unwrap();
        let targets = targets.as_array().unwrap().iter();
        targets.filter(|t| t["target_group"] == group).map(|t| t["flows"].as_u64()).collect()
    };
    let total = || flows("tcp").into_iter().flatten().sum::<u64>();
    wait_until("40 flows", PATIENCE, || total() == 40).unwrap();
    assert_eq!(flows("web"), [None, None], "not known where the hash alone decides");
    drop(connections);
    wait_until("no flow", PATIENCE, || total() == 0).unwrap();
}
