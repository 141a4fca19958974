//! A balancer in compressed time: the agent's state, its walks, and the pipeline over the host's
//! tables. No kernel, no clock: hours pass in seconds.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use etherparse::PacketBuilder;
use lb_common::{
    flow::{Flow, FlowKey, FlowTable},
    lru::Lru,
    model::{Bytes, Model},
    snat::PortPool,
    tables::{Slot, SlotState, Tables as _},
    verdict::Verdict,
};
use lb_userspace::{
    config,
    health::{CheckKey, Health, HealthEvent, HealthState},
    netlink::{Interface, LinkLayer, Network, NextHop},
    reconcile::Desired,
    state::{Findings, FlowStore, State, Walk},
};

/// How often the agent walks over the flows, and how long a walk takes here.
const WALK: Duration = Duration::from_secs(30);
const WALK_TAKES: Duration = Duration::from_secs(2);
/// How often time passes for the agent.
const TICK: Duration = Duration::from_secs(1);
/// The only NIC.
const NIC: u32 = 2;
/// The kernel's clock when history begins, nanoseconds.
const BOOT: u64 = 1_000_000_000_000;
/// Ports of the listeners.
const PORT: u16 = 80;

use flags::SYN;

/// Something to be broken on purpose, so that a test is seen to fail.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Sabotage {
    /// Nothing.
    #[default]
    None,
    /// Slots never learn: the hash alone decides.
    HashAlone,
    /// Slots settle as soon as they are pinned, whatever is remembered.
    SettlesUnseen,
    /// SYNs are remembered with the flows that have shown themselves: a flood pushes them out.
    OneTable,
    /// Slots learn for a minute only.
    LearnsTooShort,
    /// Nothing is remembered for longer than a second.
    Forgets,
    /// Slots go by the map of exceptions before one was made for them.
    MapsUnseen,
    /// Nothing: but there is no map of exceptions.
    NoMap,
}

/// What a balancer is made with.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Of the flow hash.
    pub seed: u64,
    /// Slots of a ring; a prime.
    pub ring_size: u32,
    /// Entries of the tables, by [`FlowTable`].
    pub tables: [usize; FlowTable::ALL.len()],
    /// What is broken.
    pub sabotage: Sabotage,
}

/// One end of a connection: what names it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Client {
    /// Which client; its address follows.
    pub number: u32,
    /// Its port.
    pub port: u16,
    /// Whether it speaks IPv6.
    pub is_v6: bool,
    /// Whether it speaks TCP.
    pub is_tcp: bool,
}

/// TCP control bits of a packet.
pub mod flags {
    /// Opens a connection.
    pub const SYN: u8 = 0x02;
    /// Amid a connection.
    pub const ACK: u8 = 0x10;
    /// Ends it.
    pub const FIN: u8 = 0x11;
    /// Aborts it.
    pub const RST: u8 = 0x04;
}

/// Where a packet went.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Went {
    /// To the target whose address ends in this.
    To(u8),
    /// Back to the client: it was refused.
    Refused,
    /// Nowhere.
    Dropped,
}

/// See the module's documentation.
pub struct Balancer {
    options: Options,
    state: State,
    /// The tables.
    pub model: Model,
    tables: Arc<Desired>,
    start: Instant,
    now: Duration,
    next_tick: Duration,
    last_walk: Duration,
    /// When it begins and ends, and what it finds.
    walk: Option<(Instant, Duration, Findings)>,
    templates: [Vec<u8>; 4],
}

impl std::fmt::Debug for Balancer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Balancer").field("now", &self.now).finish_non_exhaustive()
    }
}

/// A registered target: the last octet of its addresses, and its weight.
pub type Member = (u8, u16);

/// A configuration with groups `tcp` and `udp` of the same targets, each with an IPv4 and an IPv6
/// address, behind one load balancer.
pub fn configuration(members: &[Member], group_keys: &str) -> String {
    let target = |(last, weight): &Member| {
        format!(
            "{{ address = \"10.0.2.{last}\", weight = {weight} }}, {{ address = \"fd00:2::{last:x}\", \
             weight = {weight} }}"
        )
    };
    let targets = members.iter().map(target).collect::<Vec<_>>().join(",\n  ");
    let group = |protocol: &str| {
        format!(
            "[target_group.{protocol}]\nprotocol = \"{protocol}\"\nport = 8080\n{group_keys}\n\
             targets = [\n  {targets}\n]\n"
        )
    };
    format!(
        "{}{}[load_balancer.lb]\naddresses = [\"10.0.1.100\", \"fd00:1::100\"]\nlistener = [\n\
         {{ protocol = \"tcp\", port = {PORT}, target_group = \"tcp\" }},\n\
         {{ protocol = \"udp\", port = {PORT}, target_group = \"udp\" }},\n]\n",
        group("tcp"),
        group("udp")
    )
}

impl Balancer {
    /// A balancer without a configuration.
    pub fn new(options: Options) -> Self {
        let mut state = State::new(options.ring_size);
        state.set_network(Arc::new(network()));
        state.set_attached([NIC].into());
        let mut model = Model::new(options.seed, options.ring_size);
        for (table, capacity) in model.flows.iter_mut().zip(options.tables) {
            *table.get_mut() = Lru::with_capacity(capacity);
        }
        Self {
            options,
            state,
            model,
            tables: Arc::default(),
            start: Instant::now(),
            now: Duration::ZERO,
            next_tick: TICK,
            last_walk: Duration::ZERO,
            walk: None,
            templates: [(false, false), (false, true), (true, false), (true, true)]
                .map(|(is_v6, is_tcp)| template(is_v6, is_tcp)),
        }
    }

    /// The time since history began.
    pub fn now(&self) -> Duration {
        self.now
    }

    fn instant(&self) -> Instant {
        self.start + self.now
    }

    /// Loads a configuration, as a reload does.
    ///
    /// # Panics
    ///
    /// If it is wrong.
    pub fn configure(&mut self, text: &str) {
        let config = config::parse("lb.toml", text).expect("a right file").config;
        self.state.set_config(config, self.instant());
        self.reconcile();
    }

    /// What the checks of a target found, in both groups and families.
    pub fn set_health(&mut self, last: u8, state: HealthState) {
        for group in ["tcp", "udp"] {
            for address in addresses(last) {
                let key = CheckKey { target_group: group.into(), address, port: 8080 };
                let health = Health { state, reason: None, description: None };
                let now = self.instant();
                self.state.set_health(HealthEvent { key, health }, now);
            }
        }
        self.reconcile();
    }

    fn reconcile(&mut self) {
        let desired = self.state.desired(self.instant());
        copy_tables(&mut self.model, &self.tables, &desired);
        if self.options.sabotage == Sabotage::HashAlone {
            for ring in self.model.rings.values_mut() {
                ring.iter_mut().for_each(|slot| *slot = Slot::settled(slot.current));
            }
        }
        if self.options.sabotage == Sabotage::LearnsTooShort {
            self.shorten_learning();
        }
        if self.options.sabotage == Sabotage::MapsUnseen {
            let slots = self.model.rings.values_mut().flatten();
            slots.filter(|s| s.state() == SlotState::Pinned).for_each(|s| *s = s.mapped());
        }
        self.tables = Arc::new(desired);
    }

    /// Pins what the agent has learn: a stand-in for a timer that is too fast.
    fn shorten_learning(&mut self) {
        let is_late = self.now.as_secs().is_multiple_of(60);
        let slots = self.model.rings.values_mut().flatten();
        for slot in slots.filter(|slot| is_late && slot.state() == SlotState::Learning) {
            *slot = Slot::new(slot.current, slot.previous(), SlotState::Pinned);
        }
    }

    /// Lets time pass.
    pub fn advance(&mut self, to: Duration) {
        while self.next_tick <= to {
            self.now = self.next_tick;
            self.next_tick += TICK;
            self.tick();
        }
        self.now = self.now.max(to);
        self.model.now.set(BOOT + self.now.as_nanos() as u64);
    }

    fn tick(&mut self) {
        self.model.now.set(BOOT + self.now.as_nanos() as u64);
        if self.options.sabotage == Sabotage::Forgets {
            self.model.flows.iter().for_each(|table| table.borrow_mut().clear());
        }
        if self.state.tick(self.instant()) || self.options.sabotage == Sabotage::LearnsTooShort {
            self.reconcile();
        }
        if let Some((begun, _, mut findings)) = self.walk.take_if(|(_, end, _)| *end <= self.now) {
            if self.options.sabotage == Sabotage::NoMap {
                findings.mapped.clear();
            }
            self.state.settle(&findings, begun);
            self.model.map_exceptions(&findings.exceptions);
            self.model.correct(&findings.corrections);
            self.reconcile();
        }
        if self.walk.is_none() && self.now >= self.last_walk + WALK {
            self.last_walk = self.now;
            let pinned = self.state.pinned();
            if !pinned.is_empty() || self.state.counts_flows() {
                self.walk = Some((self.instant(), self.now + WALK_TAKES, self.walk(pinned)));
            }
        }
    }

    fn walk(&self, pinned: lb_userspace::state::Slots) -> Findings {
        if self.options.sabotage == Sabotage::SettlesUnseen {
            return Findings { settled: pinned, ..Findings::default() };
        }
        let (keys, ring_size) = (self.model.hash_keys, self.options.ring_size);
        let walk = Walk { tables: self.tables.clone(), keys, ring_size, pinned };
        walk.run(&mut Store(&self.model), self.model.now.get())
    }

    /// Sends a packet of a client now.
    pub fn send(&mut self, client: Client, flags: u8) -> Went {
        let template = &self.templates[usize::from(client.is_v6) * 2 + usize::from(client.is_tcp)];
        let mut frame = Bytes { bytes: template.clone(), ingress: NIC };
        let l4 = if client.is_v6 { 54 } else { 34 };
        // The last octets of the source address.
        let source = if client.is_v6 { 14 + 8 + 12 } else { 14 + 12 };
        let number = client.number.to_be_bytes();
        frame.bytes[source + 1..source + 4].copy_from_slice(&number[1..]);
        frame.bytes[l4..l4 + 2].copy_from_slice(&client.port.to_be_bytes());
        if client.is_tcp {
            frame.bytes[l4 + 13] = flags;
        }
        let is_syn = client.is_tcp && flags == SYN;
        let verdict = self.model.run(&mut frame);
        if is_syn && self.options.sabotage == Sabotage::OneTable {
            self.move_half_open();
        }
        match verdict {
            Verdict::Transmit if frame.bytes[..6] == CLIENT_MAC => Went::Refused,
            Verdict::Transmit => Went::To(frame.bytes[if client.is_v6 { 53 } else { 33 }]),
            _ => Went::Dropped,
        }
    }

    fn move_half_open(&mut self) {
        let mut half_open = self.model.flow_table(FlowTable::HalfOpen).borrow_mut();
        let mut flows = self.model.flow_table(FlowTable::Flows).borrow_mut();
        half_open.iter().for_each(|(key, flow)| flows.insert(*key, *flow));
        half_open.clear();
    }

    /// How many connections each target that is chosen by them has, and how many of its flows are
    /// remembered as open; waits until no walk has yet to say what it found.
    pub fn connections(&mut self) -> Vec<(u32, usize)> {
        while self.walk.is_some() {
            self.advance(self.now + TICK);
        }
        let flows = self.model.flow_table(FlowTable::Flows).borrow();
        let open = |target| {
            flows.iter().filter(|(_, flow)| flow.target == target && flow.closing == 0).count()
        };
        let shares = self.tables.shares.keys();
        shares.map(|n| (self.model.load(*n).connections(), open(*n))).collect()
    }

    /// Slots of all rings that go by the map of exceptions.
    pub fn mapped(&self) -> usize {
        self.model.rings.values().flatten().filter(|slot| slot.is_mapped()).count()
    }

    /// Slots of all rings that are in each state: settled, learning, learning TCP, pinned.
    pub fn slots(&self) -> [usize; 4] {
        let mut counts = [0; 4];
        for slot in self.model.rings.values().flatten() {
            counts[slot.state() as usize] += 1;
        }
        counts
    }
}

const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// The addresses of a target.
fn addresses(last: u8) -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, last.into());
    [Ipv4Addr::new(10, 0, 2, last).into(), v6.into()]
}

fn network() -> Network {
    let nic = Interface {
        index: NIC,
        name: "eth0".into(),
        layer: LinkLayer::Ethernet,
        mac: OUR_MAC,
        mtu: 1500,
        up: true,
        vlan: None,
        controller: None,
        lower: None,
        xdp: None,
    };
    let hop = |last| NextHop {
        ifindex: NIC,
        vlan: None,
        source_mac: OUR_MAC,
        destination_mac: [2, 0, 0, 0, 1, last],
        mtu: 1500,
        source: None,
    };
    let hops = (1..=254).flat_map(|last| addresses(last).map(|address| (address, Ok(hop(last)))));
    Network { interfaces: [(NIC, nic)].into(), next_hops: hops.collect(), ..Network::default() }
}

fn template(is_v6: bool, is_tcp: bool) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(CLIENT_MAC, OUR_MAC);
    let mut bytes = Vec::new();
    let builder = if is_v6 {
        let v6 = |net, last| Ipv6Addr::new(0xfd00, net, 0, 0, 0, 0, 0, last).octets();
        builder.ipv6(v6(9, 0), v6(1, 0x100), 64)
    } else {
        builder.ipv4([11, 0, 0, 0], [10, 0, 1, 100], 64)
    };
    let written = if is_tcp {
        builder.tcp(0, PORT, 1, 1024).write(&mut bytes, b"payload")
    } else {
        builder.udp(0, PORT).write(&mut bytes, b"payload")
    };
    written.expect("a vector takes all");
    bytes
}

/// Brings the host's tables from one picture to another.
pub fn copy_tables(model: &mut Model, from: &Desired, to: &Desired) {
    model.own_macs = to.own_macs.clone();
    model.listeners = to.listeners.clone();
    model.targets = to.targets.clone();
    for target in from.shares.keys().chain(to.shares.keys()) {
        model.set_share(*target, to.shares.get(target).copied());
    }
    model.rings = to.rings.iter().map(|(n, ring)| (*n, ring.to_vec())).collect();
    let prefixes = to.classes.iter().flat_map(|(class, prefixes)| {
        prefixes.iter().map(|prefix| (*class, prefix.address, u32::from(prefix.bits)))
    });
    model.prefixes = prefixes.collect();
    for key in from.endpoints.keys().filter(|key| !to.endpoints.contains_key(key)) {
        model.endpoints.remove(key);
    }
    for endpoint in to.endpoints.values() {
        model.endpoints.insert(*endpoint);
    }
    model.snat.sources = to.sources.clone();
    for (number, start) in &to.pools {
        if from.pools.get(number) != Some(start) {
            let pool = PortPool::new();
            pool.reset(*start);
            model.snat.pools.insert(*number, pool);
        }
    }
}

/// The host's tables, as a walk sees them.
struct Store<'a>(&'a Model);

impl FlowStore for Store<'_> {
    fn each(&self, table: FlowTable, visit: &mut dyn FnMut(FlowKey, Flow)) {
        let table = self.0.flow_table(table).borrow();
        table.iter().for_each(|(key, flow)| visit(*key, *flow));
    }

    fn balance(&self, target: u32) -> u64 {
        self.0.load(target).balance
    }

    fn forget(&mut self, table: FlowTable, key: &FlowKey, target: u32) {
        let mut table = self.0.flow_table(table).borrow_mut();
        if table.peek(key).is_some_and(|flow| flow.target == target) {
            table.remove(key);
        }
    }
}
