//! Connections that last for hours, in compressed time, and a dozen changes of the targets: none
//! breaks, and the figures that docs/connections.md gives are printed.

use std::time::Duration;

use lb_common::flow::FlowTable;
use lb_tests::history::{Balancer, Client, Options, Sabotage, Went, configuration, flags};
use lb_userspace::health::HealthState;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

/// Three connections for each slot, as 50,000 are for the default ring.
const CONNECTIONS: u32 = 6000;
const RING_SIZE: u32 = 2039;
const CHANGES: u8 = 12;
/// Time between two changes: each slot has learned, and what remains is pinned.
const BETWEEN: Duration = Duration::from_secs(600);
/// Time between two packets of a connection, seconds.
const PAUSE: u64 = 120;

#[test]
fn hours_long_connections_survive_a_dozen_changes() {
    let mut rng = StdRng::seed_from_u64(1);
    let (seed, tables) = (rng.random(), [1 << 16; 3]);
    let options = Options { seed, ring_size: RING_SIZE, tables, sabotage: Sabotage::None };
    let mut balancer = Balancer::new(options);
    // Targets come one by one; none goes, so that every connection has a right to its own.
    let members = |count: u8| (1..=count).map(|last| (last, 1)).collect::<Vec<_>>();
    balancer.configure(&configuration(&members(10), ""));
    (1..=10).for_each(|last| balancer.set_health(last, HealthState::Healthy));
    let mut connections = Vec::new();
    for number in 0..CONNECTIONS {
        let client = Client { number, port: rng.random(), is_v6: false, is_tcp: true };
        let Went::To(target) = balancer.send(client, flags::SYN) else { panic!("no target") };
        connections.push((client, target));
    }
    println!("change  entries  exceptions  looked up  with a bitmap  slots settled/pinned");
    let (mut broken, mut last_share) = (0, 0.0);
    for change in 0..=CHANGES {
        if change > 0 {
            balancer.configure(&configuration(&members(10 + change), ""));
            balancer.set_health(10 + change, HealthState::Healthy);
        }
        let end = balancer.now() + BETWEEN;
        let mut packets = 0_u64;
        while balancer.now() < end {
            // Every connection once in each pause, spread over it.
            let step = Duration::from_secs(PAUSE) / CONNECTIONS;
            balancer.model.lookups.set(0);
            packets = 0;
            for (client, target) in &connections {
                balancer.advance(balancer.now() + step);
                packets += 1;
                broken += u32::from(balancer.send(*client, flags::ACK) != Went::To(*target));
            }
        }
        let exceptions: usize = FlowTable::ALL
            .map(|table| balancer.model.flow_table(table).borrow().len())
            .iter()
            .sum();
        last_share = balancer.model.lookups.get() as f64 / packets as f64;
        // A bitmap answers for all but the exceptions themselves.
        let with_bitmap = exceptions as f64 / f64::from(CONNECTIONS);
        let [settled, _, _, pinned] = balancer.slots();
        println!(
            "{change:6}  {:7}  {:9.1} %  {:7.1} %  {:11.1} %  {settled}/{pinned}",
            exceptions,
            100.0 * with_bitmap,
            100.0 * last_share,
            100.0 * with_bitmap,
        );
    }
    assert_eq!(broken, 0);
    assert!(last_share > 0.2, "without exceptions this shows nothing: {last_share}");
    assert!(last_share < 0.9, "most slots should be settled by now: {last_share}");
    assert_eq!(balancer.model.flow_table(FlowTable::Flows).borrow().evictions(), 0);
    println!("{CONNECTIONS} connections lasted {} minutes", balancer.now().as_secs() / 60);
    assert!(balancer.now() > Duration::from_secs(2 * 3600));
}
