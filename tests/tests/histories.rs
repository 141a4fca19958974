//! Random histories in compressed time: no established connection may break, whatever happens to
//! the targets; and the same histories with something broken on purpose, which must be noticed.
//!
//! What may end a connection stands in docs/connections.md: its target is deregistered and its
//! delay is over, or its target is unhealthy. The histories know of nothing else.

#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    env,
    time::Duration,
};

use lb_tests::history::{Balancer, Client, Options, Sabotage, Went, configuration, flags};
use lb_userspace::health::HealthState;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

/// How long a deregistered target keeps its connections.
const DELAY: Duration = Duration::from_secs(300);

/// What happens in a history.
#[derive(Clone, Copy, Debug)]
struct Plot {
    /// Seconds between two changes of the targets, at least and at most.
    changes: (u64, u64),
    /// Packets a second of floods: SYNs, ACKs. They last for minutes at a time.
    floods: (u32, u32),
    /// Most seconds between two packets of a connection.
    silence: u64,
    /// Connections at a time.
    connections: usize,
    /// How long the history is, seconds.
    length: u64,
    /// Whether targets are chosen by their connections.
    algorithm: Algorithm,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Algorithm {
    Maglev,
    LeastConnections,
    /// Now this, now that.
    Alternating,
}

const QUIET: Plot = Plot {
    changes: (200, 900),
    floods: (0, 0),
    silence: 349,
    connections: 1000,
    length: 3600,
    algorithm: Algorithm::Maglev,
};
const RESTLESS: Plot = Plot { changes: (5, 120), ..QUIET };
/// Every 10 seconds a change.
const STORM: Plot = Plot { changes: (10, 10), length: 1800, ..QUIET };
/// Packets come in pairs: what is seen once is what floods push out.
const FLOODED: Plot = Plot {
    changes: (30, 300),
    floods: (400, 400),
    silence: 60,
    connections: 400,
    length: 1500,
    ..QUIET
};

/// A target as the world has it.
#[derive(Clone, Copy, Debug)]
struct Member {
    weight: u16,
    is_healthy: bool,
    /// When it was registered, as far as its connections go.
    joined: Duration,
    /// When it was deregistered.
    left: Option<Duration>,
}

/// A connection, and what the test knows of it.
#[derive(Clone, Copy, Debug)]
struct Connection {
    client: Client,
    stage: Stage,
    /// The target that it must stay with.
    target: u8,
    began: Duration,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// Nothing sent.
    New,
    /// A SYN was sent.
    HalfOpen,
    Established,
    /// A FIN was sent.
    Closing,
}

#[derive(Debug, Default)]
struct Tally {
    packets: u64,
    opened: u64,
    ended: u64,
    reused: u64,
    changes: u64,
    broken: u64,
    evictions: [u64; 3],
    lookups: u64,
    /// Most slots at a time that went by the map of exceptions.
    mapped: usize,
    /// Of each target that is chosen by them: as counted, and as remembered.
    connections: Vec<(u32, usize)>,
    first_broken: Option<String>,
}

struct History {
    rng: StdRng,
    plot: Plot,
    balancer: Balancer,
    members: BTreeMap<u8, Member>,
    connections: Vec<Connection>,
    due: BinaryHeap<Reverse<(Duration, usize)>>,
    next_change: Duration,
    recovers: Vec<(Duration, u8)>,
    next_client: u32,
    by_connections: bool,
    last_flood: Duration,
    tally: Tally,
}

impl History {
    fn new(seed: u64, plot: Plot, sabotage: Sabotage) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        // Of these floods they hold more than a second, as the defaults do of 262,144 packets.
        let small = if plot.floods == (0, 0) { 1 << 20 } else { 1024 };
        let tables = [if plot.floods == (0, 0) { 1 << 16 } else { 2048 }, small, small];
        let options = Options { seed: rng.random(), ring_size: 1021, tables, sabotage };
        let whole = Member { weight: 1, is_healthy: true, joined: Duration::ZERO, left: None };
        let mut history = Self {
            plot,
            balancer: Balancer::new(options),
            members: (1..=10).map(|last| (last, whole)).collect(),
            connections: Vec::new(),
            due: BinaryHeap::new(),
            next_change: Duration::from_secs(60),
            recovers: Vec::new(),
            next_client: 0,
            by_connections: plot.algorithm == Algorithm::LeastConnections,
            last_flood: Duration::ZERO,
            tally: Tally::default(),
            rng,
        };
        history.configure();
        for last in 1..=10 {
            history.balancer.set_health(last, HealthState::Healthy);
        }
        for n in 0..plot.connections {
            let connection = history.fresh();
            history.connections.push(connection);
            let at = Duration::from_millis(history.rng.random_range(0..60_000));
            history.due.push(Reverse((at, n)));
        }
        history
    }

    fn run(mut self) -> Tally {
        while let Some(Reverse((at, n))) = self.due.pop() {
            if at.as_secs() >= self.plot.length {
                break;
            }
            while self.next_change <= at {
                self.change();
            }
            self.recover(at);
            self.balancer.advance(at);
            self.tally.mapped = self.tally.mapped.max(self.balancer.mapped());
            self.act(n);
            self.flood(at);
        }
        let tables = &self.balancer.model.flows;
        self.tally.evictions = [0, 1, 2].map(|n: usize| tables[n].borrow().evictions());
        self.tally.lookups = self.balancer.model.lookups.get();
        self.tally.connections = self.balancer.connections();
        self.tally
    }

    fn fresh(&mut self) -> Connection {
        self.next_client += 1;
        let client = Client {
            number: self.next_client,
            port: self.rng.random_range(1024..=u16::MAX),
            is_v6: self.rng.random_ratio(1, 3),
            is_tcp: self.rng.random_ratio(3, 4),
        };
        Connection { client, stage: Stage::New, target: 0, began: self.balancer.now() }
    }

    /// The configuration file is written anew.
    fn configure(&mut self) {
        let registered: Vec<_> = self
            .members
            .iter()
            .filter(|(_, member)| member.left.is_none())
            .map(|(last, member)| (*last, member.weight))
            .collect();
        let algorithm = if self.by_connections { "least_connections" } else { "maglev" };
        let delay = DELAY.as_secs();
        let keys = format!("deregistration_delay = \"{delay}s\"\nalgorithm = \"{algorithm}\"");
        self.balancer.configure(&configuration(&registered, &keys));
    }

    /// Something happens to a target.
    fn change(&mut self) {
        let at = self.next_change;
        let (least, most) = self.plot.changes;
        self.next_change += Duration::from_secs(self.rng.random_range(least..=most));
        self.recover(at);
        self.balancer.advance(at);
        self.tally.changes += 1;
        self.members.retain(|_, member| !member.is_over(at));
        let registered: Vec<u8> =
            self.members.iter().filter(|(_, m)| m.left.is_none()).map(|(last, _)| *last).collect();
        let last = *registered.choose(&mut self.rng).unwrap();
        let member = self.members.get_mut(&last).unwrap();
        if self.plot.algorithm == Algorithm::Alternating && self.rng.random_ratio(1, 4) {
            self.by_connections = !self.by_connections;
            return self.configure();
        }
        match self.rng.random_range(0..8) {
            0 | 1 if registered.len() > 4 => {
                member.left = Some(at);
                self.configure();
            }
            0..=3 => self.join(at),
            4 => {
                member.weight = self.rng.random_range(0..4);
                self.configure();
            }
            5 if member.is_healthy => {
                member.is_healthy = false;
                self.balancer.set_health(last, HealthState::Unhealthy);
                let later = at + Duration::from_secs(self.rng.random_range(1..200));
                self.recovers.push((later, last));
            }
            // A long time apart: a whole new set.
            6 if self.rng.random_ratio(1, 4) => {
                for last in registered.into_iter().take(3) {
                    self.members.get_mut(&last).unwrap().weight = 1;
                }
                self.configure();
            }
            _ => {}
        }
    }

    /// A new target, or one that drains comes back; its first check takes a while.
    fn join(&mut self, at: Duration) {
        let last = self.rng.random_range(1..=16);
        if self.members.get(&last).is_some_and(|member| member.left.is_none()) {
            return;
        }
        let known = self.members.get(&last).is_some_and(|member| member.is_healthy);
        let joined = self.members.get(&last).map_or(at, |member| member.joined);
        self.members.insert(last, Member { weight: 1, is_healthy: known, joined, left: None });
        self.configure();
        if !known {
            self.recovers.push((at + Duration::from_secs(self.rng.random_range(1..10)), last));
        }
    }

    fn recover(&mut self, to: Duration) {
        self.recovers.sort();
        while let Some((at, last)) = self.recovers.first().copied().filter(|(at, _)| *at <= to) {
            self.recovers.remove(0);
            self.balancer.advance(at);
            if let Some(member) = self.members.get_mut(&last)
                && member.left.is_none()
            {
                member.is_healthy = true;
                self.balancer.set_health(last, HealthState::Healthy);
            }
        }
    }

    /// A connection's next packets.
    fn act(&mut self, n: usize) {
        let connection = self.connections[n];
        match connection.stage {
            Stage::New => {
                self.open(n);
                // What is seen once only is pushed out by a flood of its like.
                let Connection { client, stage, .. } = self.connections[n];
                if !client.is_tcp && stage == Stage::Established {
                    self.talk(n, 0);
                }
            }
            Stage::HalfOpen if self.rng.random_ratio(1, 20) => self.open(n),
            Stage::HalfOpen => {
                self.talk(n, flags::ACK);
                self.connections[n].stage = Stage::Established;
            }
            Stage::Established if self.rng.random_ratio(1, 40) => self.end(n),
            Stage::Established => {
                self.talk(n, flags::ACK);
                if self.plot.floods != (0, 0) || self.rng.random() {
                    self.talk(n, flags::ACK);
                }
            }
            // The last ACK, or half-closed for a long time yet.
            Stage::Closing if self.rng.random_ratio(1, 3) => {
                self.talk(n, flags::ACK);
                self.reopen(n);
            }
            Stage::Closing => {
                self.talk(n, flags::ACK);
            }
        }
        let pause = self.pause(n);
        self.due.push(Reverse((self.balancer.now() + pause, n)));
    }

    fn pause(&mut self, n: usize) -> Duration {
        let Connection { client, stage, .. } = self.connections[n];
        let silence = if client.is_tcp { self.plot.silence } else { self.plot.silence.min(119) };
        let rng = &mut self.rng;
        Duration::from_millis(match stage {
            Stage::HalfOpen => rng.random_range(1..400),
            Stage::Closing => rng.random_range(1..9_000),
            Stage::New => rng.random_range(1..30_000),
            Stage::Established => match rng.random_range(0..4) {
                0 => rng.random_range(1..500),
                1 => rng.random_range(500..10_000),
                2 => rng.random_range(10_000..60_000.min(silence * 1000)),
                _ => rng.random_range(silence * 500..silence * 1000),
            },
        })
    }

    fn open(&mut self, n: usize) {
        let Connection { client, .. } = self.connections[n];
        let went = self.balancer.send(client, flags::SYN);
        self.tally.packets += 1;
        let Went::To(target) = went else { return };
        self.tally.opened += 1;
        let stage = if client.is_tcp { Stage::HalfOpen } else { Stage::Established };
        let began = self.balancer.now();
        if client.is_tcp && !self.takes_new(target) {
            self.breaks(n, &format!("a SYN went to {target}, which takes none"));
        }
        self.connections[n] = Connection { stage, target, began, ..self.connections[n] };
    }

    /// Whether a target is one of those that a new connection may get.
    fn takes_new(&self, target: u8) -> bool {
        let takes = |member: &Member| member.left.is_none() && member.weight > 0;
        let is_it = |member: &Member| takes(member) && member.is_healthy;
        let fails_open = !self.members.values().any(is_it);
        self.members.get(&target).is_some_and(|m| is_it(m) || fails_open && takes(m)) || fails_open
    }

    /// A packet of an established connection: it goes where those before it went.
    fn talk(&mut self, n: usize, flags: u8) {
        let connection = self.connections[n];
        let went = self.balancer.send(connection.client, flags);
        self.tally.packets += 1;
        if went == Went::To(connection.target) {
            return;
        }
        if self.may_end(&connection) {
            self.tally.ended += 1;
            self.reopen(n);
            if let (false, Went::To(target)) = (connection.client.is_tcp, went) {
                // A datagram takes the next target, and the flow begins there.
                let (stage, began) = (Stage::Established, self.balancer.now());
                self.connections[n] = Connection { target, stage, began, ..connection };
                // What is seen once only is pushed out by a flood of its like.
                self.talk(n, 0);
            }
        } else {
            self.breaks(n, &format!("a packet {went:?}"));
            self.connections[n] = self.fresh();
        }
    }

    /// Whether what happened to its target may end a connection.
    fn may_end(&self, connection: &Connection) -> bool {
        let now = self.balancer.now();
        match self.members.get(&connection.target) {
            None => true,
            Some(member) => {
                !member.is_healthy || member.is_over(now) || member.joined > connection.began
            }
        }
    }

    fn breaks(&mut self, n: usize, what: &str) {
        self.tally.broken += 1;
        let (now, slots) = (self.balancer.now(), self.balancer.slots());
        let connection = self.connections[n];
        let member = self.members.get(&connection.target);
        let text = || format!("at {now:?}: {what}: {connection:?} of {member:?}; slots {slots:?}");
        self.tally.first_broken.get_or_insert_with(text);
    }

    /// FIN, RST, or nothing at all.
    fn end(&mut self, n: usize) {
        let is_tcp = self.connections[n].client.is_tcp;
        match self.rng.random_range(0..4) {
            0 | 1 if is_tcp => {
                self.talk(n, flags::FIN);
                if self.connections[n].stage == Stage::Established {
                    self.connections[n].stage = Stage::Closing;
                }
            }
            2 if is_tcp => {
                self.talk(n, flags::RST);
                self.reopen(n);
            }
            _ => self.reopen(n),
        }
    }

    /// Another connection, often from the same port.
    fn reopen(&mut self, n: usize) {
        if self.connections[n].client.is_tcp && self.rng.random() {
            self.tally.reused += 1;
            self.connections[n].stage = Stage::New;
        } else {
            self.connections[n] = self.fresh();
        }
    }

    /// Floods come and go: as many packets as are due since the last look.
    fn flood(&mut self, at: Duration) {
        let passed = (at - self.last_flood).as_secs_f64().min(1.0);
        self.last_flood = at;
        if at.as_secs() % 400 >= 200 {
            return;
        }
        for (rate, kind) in [(self.plot.floods.0, flags::SYN), (self.plot.floods.1, flags::ACK)] {
            for _ in 0..(f64::from(rate) * passed).round() as u32 {
                let client = Client {
                    number: self.rng.random_range(1 << 22..1 << 23),
                    port: self.rng.random(),
                    is_v6: false,
                    is_tcp: true,
                };
                self.balancer.send(client, kind);
            }
        }
    }
}

impl Member {
    /// Whether its connections' time is over.
    fn is_over(&self, now: Duration) -> bool {
        self.left.is_some_and(|left| now >= left + DELAY)
    }
}

fn seeds() -> std::ops::Range<u64> {
    let number =
        |name: &str, default: u64| env::var(name).map_or(default, |text| text.parse().unwrap());
    let first = number("LB_SEED", 1);
    first..first + number("LB_HISTORIES", 2)
}

fn assert_unbroken(name: &str, plot: Plot) {
    for seed in seeds() {
        let tally = History::new(seed, plot, Sabotage::None).run();
        println!("{name}, LB_SEED={seed}: {tally:?}");
        assert!(tally.opened > 1000 && tally.changes > 2, "too little happened");
        assert_eq!(tally.broken, 0, "{name}, LB_SEED={seed}: {}", tally.first_broken.unwrap());
    }
}

#[test]
fn few_changes_break_nothing() {
    assert_unbroken("quiet", QUIET);
}

#[test]
fn many_changes_break_nothing() {
    assert_unbroken("restless", RESTLESS);
}

#[test]
fn a_storm_of_changes_breaks_nothing() {
    assert_unbroken("storm", STORM);
}

#[test]
fn floods_push_out_only_their_like() {
    for seed in seeds() {
        let tally = History::new(seed, FLOODED, Sabotage::None).run();
        println!("flooded, LB_SEED={seed}: {tally:?}");
        let [flows, half_open, once_seen] = tally.evictions;
        assert_eq!(flows, 0);
        assert!(half_open > 10_000 && once_seen > 10_000, "no flood: {:?}", tally.evictions);
        assert_eq!(tally.broken, 0, "LB_SEED={seed}: {}", tally.first_broken.unwrap());
    }
}

/// What is counted packet by packet is what is remembered.
fn assert_counted(name: &str, plot: Plot) {
    assert_unbroken(name, plot);
    let tally = History::new(3, plot, Sabotage::None).run();
    assert!(tally.connections.len() > 10, "{tally:?}");
    for (counted, open) in &tally.connections {
        assert_eq!(*counted as usize, *open, "{name}: {:?}", tally.connections);
    }
}

#[test]
fn the_better_of_two_breaks_nothing() {
    let algorithm = Algorithm::LeastConnections;
    assert_counted("least connections", Plot { algorithm, ..RESTLESS });
}

#[test]
fn the_better_of_two_breaks_nothing_in_a_flood() {
    let algorithm = Algorithm::LeastConnections;
    assert_counted("least connections, flooded", Plot { algorithm, ..FLOODED });
}

#[test]
fn another_algorithm_breaks_nothing() {
    assert_unbroken("alternating", Plot { algorithm: Algorithm::Alternating, ..RESTLESS });
}

/// The test can fail: each of these is noticed.
#[test]
fn what_is_broken_on_purpose_is_noticed() {
    for (plot, sabotage) in [
        (RESTLESS, Sabotage::HashAlone),
        (RESTLESS, Sabotage::SettlesUnseen),
        (RESTLESS, Sabotage::LearnsTooShort),
        (RESTLESS, Sabotage::MapsUnseen),
        (FLOODED, Sabotage::OneTable),
        (Plot { algorithm: Algorithm::LeastConnections, ..QUIET }, Sabotage::Forgets),
    ] {
        let tally = History::new(1, plot, sabotage).run();
        println!("{sabotage:?}: {} broken of {}", tally.broken, tally.opened);
        assert!(tally.broken > 0, "{sabotage:?} went unnoticed");
    }
}
