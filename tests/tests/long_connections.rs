//! Connections that last for hours, in compressed time, and a dozen changes of the targets: none
//! breaks, and what that costs is printed.

use std::time::Duration;

use lb_common::flow::FlowTable;
use lb_tests::history::{Balancer, Client, Options, Sabotage, Went, configuration, flags};
use lb_userspace::health::HealthState;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

/// Three connections for each slot, as 50,000 are for the default ring.
const CONNECTIONS: u32 = 3000;
const RING_SIZE: u32 = 1021;
const CHANGES: u8 = 12;
/// Time between two changes: each slot has learned, and what remains is pinned.
const BETWEEN: Duration = Duration::from_secs(600);
/// Time between two packets of a connection.
const PAUSE: Duration = Duration::from_secs(150);
/// How long a short connection lasts, packets.
const SHORT: u32 = 3;

/// What was found after the last change.
#[derive(Clone, Copy, Debug)]
struct Found {
    broken: u32,
    /// Entries for each connection.
    entries: f64,
    /// Share of packets that are looked up.
    looked_up: f64,
    pinned: usize,
}

/// Every so many connections one lasts throughout; the others come and go.
fn live_through(one_in: u32, sabotage: Sabotage) -> Found {
    let mut rng = StdRng::seed_from_u64(1);
    let (seed, tables) = (rng.random(), [1 << 16; 3]);
    let options = Options { seed, ring_size: RING_SIZE, tables, sabotage };
    let mut balancer = Balancer::new(options);
    // Targets come one by one; none goes, so that every connection has a right to its own.
    let members = |count: u8| (1..=count).map(|last| (last, 1)).collect::<Vec<_>>();
    balancer.configure(&configuration(&members(10), ""));
    (1..=10).for_each(|last| balancer.set_health(last, HealthState::Healthy));
    let open = |balancer: &mut Balancer, number, port| {
        let client = Client { number, port, is_v6: false, is_tcp: true };
        let Went::To(target) = balancer.send(client, flags::SYN) else { panic!("no target") };
        (client, target)
    };
    let mut connections: Vec<_> =
        (0..CONNECTIONS).map(|number| open(&mut balancer, number, rng.random())).collect();
    let mut found = Found { broken: 0, entries: 0.0, looked_up: 0.0, pinned: 0 };
    let map = if sabotage == Sabotage::NoMap { "without" } else { "with" };
    println!(
        "1 in {one_in} lasts for hours, {map} the map of exceptions\n\
         change  entries  looked up  pinned slots"
    );
    let mut round = 0;
    for change in 0..=CHANGES {
        if change > 0 {
            balancer.configure(&configuration(&members(10 + change), ""));
            balancer.set_health(10 + change, HealthState::Healthy);
        }
        let end = balancer.now() + BETWEEN;
        while balancer.now() < end {
            round += 1;
            balancer.model.lookups.set(0);
            for number in 0..CONNECTIONS {
                balancer.advance(balancer.now() + PAUSE / CONNECTIONS);
                let connection = &mut connections[number as usize];
                if number % one_in != 0 && (round + number) % SHORT == 0 {
                    balancer.send(connection.0, flags::FIN);
                    *connection = open(&mut balancer, number, rng.random());
                }
                let (client, target) = *connection;
                found.broken += u32::from(balancer.send(client, flags::ACK) != Went::To(target));
            }
        }
        // What closes and opens sends two packets more.
        let short = CONNECTIONS - CONNECTIONS.div_ceil(one_in);
        let packets = f64::from(CONNECTIONS + 2 * short / SHORT);
        let entries = balancer.model.flow_table(FlowTable::Flows).borrow().len();
        found.entries = entries as f64 / f64::from(CONNECTIONS);
        found.looked_up = balancer.model.lookups.get() as f64 / packets;
        found.pinned = balancer.slots()[3];
        let [entries, looked_up] = [found.entries, found.looked_up].map(|share| 100.0 * share);
        println!("{change:6}  {entries:5.1} %  {looked_up:7.1} %  {:12}", found.pinned);
    }
    println!("{CONNECTIONS} connections, {} minutes: {found:?}", balancer.now().as_secs() / 60);
    assert!(balancer.now() > Duration::from_secs(2 * 3600));
    assert_eq!(balancer.model.flow_table(FlowTable::Flows).borrow().evictions(), 0);
    found
}

#[test]
fn hours_long_connections_survive_a_dozen_changes() {
    let all = live_through(1, Sabotage::None);
    assert_eq!(all.broken, 0);
    assert!(all.entries > 0.3, "without exceptions this shows nothing");
    // Of a slot that moved every connection is an exception: there is nothing to skip.
    assert!(all.looked_up < all.entries + 0.05);
}

#[test]
fn a_few_long_connections_keep_few_entries() {
    let [few, unmapped] = [Sabotage::None, Sabotage::NoMap].map(|map| live_through(8, map));
    assert_eq!((few.broken, unmapped.broken), (0, 0));
    assert_eq!(few.pinned, unmapped.pinned);
    assert!(few.pinned > 0 && few.entries < 0.15, "what the hash does as well is forgotten");
    assert!(unmapped.looked_up > 2.0 * few.looked_up, "a pinned slot's other flows too");
    // A bit of the map is another flow's once in thousands.
    assert!(few.looked_up < few.entries + 0.01);
}
