//! `bench packet`: our program and the floors in the same rounds, over packets made by the wrapper.
//!
//! All packets come in by the loopback device, which program runs have unless told otherwise, and
//! what they are sent to is behind it too: so all that is forwarded is `XDP_TX`, as in the floor
//! that it is compared with. One row is redirected to another device.

use std::{
    collections::BTreeSet,
    fmt::{self, Display, Formatter},
    fs,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{ProgramFd, ProgramInfo};
use lb_common::{
    flow::{TCP, UDP},
    tables::{Endpoint, Interface, OPEN, Slot, SlotState, Target},
    wire::eth::OwnMac,
};
use lb_tests::{
    packets::{OUR_MAC, Packet},
    programs::{FIRST_PORT, Floor, PORT_BITS, Varying, Wrapper, pin_to_cpu},
    progrun::Network,
    scene::{Scene, Way},
    tunnels::verify_checksums,
};
use lb_userspace::{
    dataplane::{Dataplane, LoadOptions},
    reconcile::{Desired, Prefix, diff},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use serde_json::json;

use crate::PacketOptions;

/// The default configuration's rings; flow tables that 1,000,000 flows fit into.
const LOAD: LoadOptions = LoadOptions {
    hash_seed: 0x5eed,
    ring_size: 16_381,
    flow_table_size: 1 << 21,
    half_open_table_size: 1 << 21,
    once_seen_table_size: 1 << 21,
    port_pools: 256,
    log: false,
};
/// Targets of each listener.
const TARGETS: u32 = 100;
/// The listener whose slots all learn: every flow is remembered.
const LEARNING: &str = "10.0.10.100:87";
/// The listener whose slots are all pinned: every flow is looked up, none is found.
const PINNED: &str = "10.0.10.100:88";
/// The same, mapped: no flow is in the map of exceptions.
const MAPPED: &str = "10.0.10.100:89";
/// The listener whose one target sees [`SNAT_SOURCE`].
const SNAT: &str = "10.0.10.100:90";
/// With the ports that the wrapper gives the clients: so its replies are those of requests.
const SNAT_SOURCE: &str = "10.11.0.0";
/// The flows of all those ports.
const SNAT_FLOWS: u32 = 1 << PORT_BITS;
/// The device that program runs come in by.
const LOOPBACK: u32 = 1;
/// Prefixes of the security group.
const PREFIXES: u32 = 10_000;

const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;
const XDP_REDIRECT: u32 = 4;

/// What runs.
#[derive(Clone, Copy)]
enum Subject {
    Floor(Floor),
    Balancer,
    /// The other build.
    Other,
}

/// One line of the table.
#[derive(Clone)]
struct Row {
    name: String,
    subject: Subject,
    packet: Packet,
    varying: Varying,
    flows: u32,
    verdict: u32,
    /// Nanoseconds a packet, by round.
    samples: Vec<f64>,
}

/// Measures, prints, and writes the file.
pub fn run(options: &PacketOptions) -> Result<()> {
    let network = Network::new()?;
    // All clients of a million flows, behind one gateway.
    network.ip("route add 192.0.0.0/16 via 10.0.10.1\n")?;
    network.run(|| measure(options))
}

fn measure(options: &PacketOptions) -> Result<()> {
    pin_to_cpu(options.cpu).with_context(|| format!("run on CPU {}", options.cpu))?;
    let mut dataplane = ready(Dataplane::load(&LOAD)?)?;
    let mut rows = rows();
    let is_wanted = |row: &Row| {
        row.name.contains(&options.only) && options.flows.is_none_or(|flows| row.flows == flows)
    };
    rows.retain(|row| row.is_floor() || is_wanted(row));
    let is_checked = !options.unchecked;
    let mut subjects = Subjects { balancer: program(&mut dataplane)?, other: None, is_checked };
    // Kept until the end: with it the program's tables would go.
    let mut _other = None;
    if let Some(path) = &options.against {
        let object = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let other = _other.insert(ready(Dataplane::load_object(&object, &LOAD)?)?);
        subjects.other = Some(program(other)?);
        println!("* is {}", path.display());
        Program::all(other)?.iter().for_each(|program| println!("* {program}"));
        rows = with_other(rows);
    }
    let mut wrapper = Wrapper::load()?;

    // Once without counting: flow tables and caches fill, and every row does what it should.
    for row in &mut rows {
        let repeats = options.repeats.max(row.flows);
        row.measure(&mut wrapper, &subjects, repeats)?;
        row.samples.clear();
    }
    for round in 1..=options.rounds {
        eprint!("\rround {round} of {}", options.rounds);
        for row in &mut rows {
            row.measure(&mut wrapper, &subjects, options.repeats)?;
        }
    }
    eprintln!("\r{:30}", "");
    let programs = Program::all(&mut dataplane)?;
    print_table(&rows, &programs, options);
    write_json(&rows, &programs, options)
}

/// The programs that are measured.
struct Subjects {
    balancer: ProgramFd,
    other: Option<ProgramFd>,
    /// Whether the packets that they leave are looked at.
    is_checked: bool,
}

fn program(dataplane: &mut Dataplane) -> Result<ProgramFd> {
    Ok(dataplane.program()?.fd()?.try_clone()?)
}

fn ready(mut dataplane: Dataplane) -> Result<Dataplane> {
    dataplane.apply(&diff(&Desired::default(), &tables()))?;
    Ok(dataplane)
}

/// Every row of ours, followed by the other build's.
fn with_other(rows: Vec<Row>) -> Vec<Row> {
    let twice = |row: Row| {
        let other = (!row.is_floor()).then(|| Row {
            name: format!("* {}", row.name),
            subject: Subject::Other,
            ..row.clone()
        });
        [Some(row), other].into_iter().flatten()
    };
    rows.into_iter().flat_map(twice).collect()
}

impl Row {
    fn measure(&mut self, wrapper: &mut Wrapper, subjects: &Subjects, repeats: u32) -> Result<()> {
        match self.subject {
            Subject::Floor(floor) => wrapper.call_floor(floor)?,
            Subject::Balancer => wrapper.call(&subjects.balancer)?,
            Subject::Other => wrapper.call(subjects.other.as_ref().context("no other build")?)?,
        }
        wrapper.make(&self.packet, self.varying, self.flows)?;
        let run = wrapper.run(repeats)?;
        let (name, wanted) = (&self.name, self.verdict);
        ensure!(run.verdict == wanted, "{name}: verdict {} instead of {wanted}", run.verdict);
        if !self.is_floor() && subjects.is_checked {
            verify_checksums(&run.frame).with_context(|| name.clone())?;
        }
        self.samples.push(run.nanoseconds);
        Ok(())
    }

    fn is_floor(&self) -> bool {
        matches!(self.subject, Subject::Floor(_))
    }

    fn median(&self) -> f64 {
        quantile(&self.samples, 0.5)
    }
}

fn quantile(samples: &[f64], at: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * at).round() as usize]
}

/// Listeners of every kind that is measured, each with [`TARGETS`] targets of its own.
fn tables() -> Desired {
    let mut scene = Scene::new();
    // The way to the gateway leads out where the packets came in.
    let loopback = Interface { ifindex: LOOPBACK, vlan: 0, mtu: 1500 };
    scene.desired.interfaces.insert(10, loopback);
    scene.desired.own_macs.insert(LOOPBACK, OwnMac::new(OUR_MAC));
    for (listener, (protocol, at, mode, class, flags, device)) in (1..).zip([
        (TCP, "10.0.10.100:80", Target::NAT, OPEN, 0, LOOPBACK),
        (UDP, "10.0.10.100:53", Target::NAT, OPEN, 0, LOOPBACK),
        (TCP, "[fd00:10::100]:80", Target::NAT, OPEN, 0, LOOPBACK),
        (TCP, "10.0.10.100:81", Target::DSR_L2, OPEN, 0, LOOPBACK),
        (TCP, "[fd00:10::100]:81", Target::DSR_L2, OPEN, 0, LOOPBACK),
        (TCP, "10.0.10.100:82", Target::NAT, 1, 0, LOOPBACK),
        (TCP, "10.0.10.100:83", Target::NAT, OPEN, Endpoint::TRACKED, LOOPBACK),
        (TCP, "10.0.10.100:84", Target::NAT, OPEN, 0, 11),
        (TCP, LEARNING, Target::NAT, OPEN, 0, LOOPBACK),
        (TCP, PINNED, Target::NAT, OPEN, 0, LOOPBACK),
        (TCP, MAPPED, Target::NAT, OPEN, 0, LOOPBACK),
        (TCP, "10.0.10.100:85", Target::DSR_IPIP, OPEN, 0, LOOPBACK),
        (TCP, "[fd00:10::100]:85", Target::DSR_IPIP, OPEN, 0, LOOPBACK),
        (TCP, "10.0.10.100:86", Target::DSR_GUE, OPEN, 0, LOOPBACK),
        (TCP, "[fd00:10::100]:86", Target::DSR_GUE, OPEN, 0, LOOPBACK),
    ]) {
        let first = listener * TARGETS;
        let mut slots = add_targets(&mut scene, first, mode, at.starts_with('['), device);
        let state = match at {
            LEARNING => SlotState::Learning,
            PINNED | MAPPED => SlotState::Pinned,
            _ => SlotState::Settled,
        };
        unsettle(&mut slots, state);
        if at == MAPPED {
            slots.iter_mut().for_each(|slot| *slot = slot.mapped());
        }
        scene.listener_of(listener, protocol, at, &slots, class, flags);
        scene.desired.rings.insert(listener, slots.into());
    }
    snat(&mut scene);
    scene.desired.classes.insert(1, Arc::new(prefixes()));
    scene.desired
}

fn snat(scene: &mut Scene) {
    const NUMBER: u32 = 99;
    scene.target(NUMBER, Target::SNAT, "10.11.255.1:8080", Way::by(LOOPBACK));
    let slot = Slot::settled(NUMBER);
    scene.listener_of(NUMBER, TCP, SNAT, &[slot], OPEN, Endpoint::TRACKED);
    scene.desired.rings.insert(NUMBER, vec![slot; LOAD.ring_size as usize].into());
    scene.address(SNAT_SOURCE, Endpoint::LOCAL);
    let last = FIRST_PORT + (SNAT_FLOWS - 1) as u16;
    scene.source(NUMBER, SNAT_SOURCE, 0, (FIRST_PORT, last));
}

/// Targets from a number on, and a whole ring that has them in random order.
fn add_targets(scene: &mut Scene, first: u32, mode: u8, is_v6: bool, device: u32) -> Vec<Slot> {
    for n in first..first + TARGETS {
        let at = if is_v6 {
            format!("[fd00:11::{n:x}]:8080")
        } else {
            format!("{}:8080", Ipv4Addr::from(0x0a0b_0000 + n))
        };
        scene.target(n, mode, &at, Way::by(device));
    }
    let mut slots: Vec<Slot> =
        (0..LOAD.ring_size).map(|slot| Slot::settled(first + slot % TARGETS)).collect();
    slots.shuffle(&mut StdRng::seed_from_u64(u64::from(first)));
    slots
}

/// Brings settled slots into another state, with the next slot's target as the one before.
fn unsettle(slots: &mut [Slot], state: SlotState) {
    if state == SlotState::Settled {
        return;
    }
    let previous: Vec<u32> =
        slots.iter().cycle().skip(1).take(slots.len()).map(|s| s.current).collect();
    for (slot, previous) in slots.iter_mut().zip(previous) {
        *slot = Slot::new(slot.current, previous, state);
    }
}

/// Networks of 256 addresses all over IPv4, and the clients'.
fn prefixes() -> BTreeSet<Prefix> {
    let mut rng = StdRng::seed_from_u64(1);
    let clients = Prefix { address: Ipv4Addr::new(192, 0, 0, 0).into(), bits: 96 + 16 };
    let mut prefixes = BTreeSet::from([clients]);
    while prefixes.len() < PREFIXES as usize {
        let network = Ipv4Addr::from(rng.random::<u32>() & !0xff);
        prefixes.insert(Prefix { address: network.into(), bits: 96 + 24 });
    }
    prefixes
}

fn rows() -> Vec<Row> {
    let client: IpAddr = [192, 0, 2, 1].into();
    let client6: IpAddr = "2001:db8:10::1".parse().expect("an address");
    let to = |at: &str| Packet::tcp((client, 0).into(), at.parse().expect("an address and a port"));
    let to6 =
        |at: &str| Packet::tcp((client6, 0).into(), at.parse().expect("an address and a port"));
    let tcp = to("10.0.10.100:80");
    let udp = Packet::udp(tcp.source, "10.0.10.100:53".parse().expect("an address and a port"));
    let reply = Packet::tcp("10.11.0.100:8080".parse().expect("an address and a port"), tcp.source);
    let (one, some, many) = (1, 10_000, 1_000_000);
    let ours = |name, packet: &Packet, flows: &[u32]| -> Vec<Row> {
        flows.iter().map(|flows| Row::new(name, Subject::Balancer, packet, *flows)).collect()
    };
    let floor =
        |name, floor, verdict| Row { verdict, ..Row::new(name, Subject::Floor(floor), &tcp, one) };
    let replies = ours("nat, reply, TCP, IPv4", &reply, &[one, some, many]);
    let redirected =
        ours("nat, request, TCP, IPv4, redirected", &to("10.0.10.100:84"), &[one, many]);
    let passing = ours("no listener: passed", &to("198.51.100.1:80"), &[one, many]);
    let mut rows = vec![
        floor("floor: drop", Floor::Drop, 1),
        floor("floor: swap", Floor::Swap, XDP_TX),
        floor("floor: encap", Floor::Encap, XDP_TX),
    ];
    rows.extend(ours("nat, request, TCP, IPv4", &tcp, &[one, some, many]));
    rows.extend(ours(
        "nat, request, SYN, IPv4",
        &Packet::syn(tcp.source, tcp.destination),
        &[many],
    ));
    rows.extend(ours("nat, request, UDP, IPv4", &udp, &[one, some, many]));
    rows.extend(ours("nat, request, TCP, IPv6", &to6("[fd00:10::100]:80"), &[one, some, many]));
    rows.extend(ours("dsr_l2, request, TCP, IPv4", &to("10.0.10.100:81"), &[one, some, many]));
    rows.extend(ours("dsr_l2, request, TCP, IPv6", &to6("[fd00:10::100]:81"), &[one, some, many]));
    for (name, at) in [
        ("dsr_ipip, request, TCP, IPv4 in IPv4", "10.0.10.100:85"),
        ("dsr_gue, request, TCP, IPv4 in IPv4", "10.0.10.100:86"),
    ] {
        rows.extend(ours(name, &to(at), &[one, some, many]));
    }
    for (name, at) in [
        ("dsr_ipip, request, TCP, IPv6 in IPv6", "[fd00:10::100]:85"),
        ("dsr_gue, request, TCP, IPv6 in IPv6", "[fd00:10::100]:86"),
    ] {
        rows.extend(ours(name, &to6(at), &[one, some, many]));
    }
    rows.extend(replies.into_iter().map(|row| Row { varying: Varying::Destination, ..row }));
    rows.extend(redirected.into_iter().map(|row| Row { verdict: XDP_REDIRECT, ..row }));
    let group = to("10.0.10.100:82");
    rows.extend(ours("nat, TCP, IPv4, group of 10,000 prefixes", &group, &[one, some, many]));
    let tracked = to("10.0.10.100:83");
    rows.extend(ours("nat, TCP, IPv4, every flow tracked", &tracked, &[one, some, many]));
    for (name, at) in [
        ("nat, TCP, IPv4, every slot learning", LEARNING),
        ("nat, TCP, IPv4, every slot pinned", MAPPED),
        ("nat, TCP, IPv4, every slot pinned, before a walk", PINNED),
    ] {
        rows.extend(ours(name, &to(at), &[one, some, many]));
    }
    rows.extend(ours("snat, request, TCP, IPv4", &to(SNAT), &[one, SNAT_FLOWS]));
    let source = format!("{SNAT_SOURCE}:0").parse().expect("an address and a port");
    let reply = Packet::tcp("10.11.255.1:8080".parse().expect("an address and a port"), source);
    let replies = ours("snat, reply, TCP, IPv4", &reply, &[one, SNAT_FLOWS]);
    rows.extend(replies.into_iter().map(|row| Row { varying: Varying::Destination, ..row }));
    rows.extend(passing.into_iter().map(|row| Row { verdict: XDP_PASS, ..row }));
    rows
}

impl Row {
    fn new(name: &str, subject: Subject, packet: &Packet, flows: u32) -> Self {
        let (packet, varying, verdict) = (packet.clone(), Varying::Source, XDP_TX);
        Self {
            name: name.to_owned(),
            subject,
            packet,
            varying,
            flows,
            verdict,
            samples: Vec::new(),
        }
    }
}

/// How large a program is.
struct Program {
    name: &'static str,
    instructions: u32,
    jited: u32,
    verified: u32,
}

impl Display for Program {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { name, instructions, jited, verified } = self;
        write!(f, "{name}: {instructions} instructions, {jited} bytes of machine code; ")?;
        write!(f, "the verifier processed {verified}")
    }
}

impl Program {
    fn json(&self) -> serde_json::Value {
        json!({
            "name": self.name,
            "instructions": self.instructions,
            "machine_code_bytes": self.jited,
            "verifier_processed": self.verified,
        })
    }

    fn all(dataplane: &mut Dataplane) -> Result<Vec<Self>> {
        let program = |(name, info): (_, ProgramInfo)| {
            Ok(Self {
                name,
                instructions: info.size_translated().context("size of the program")? / 8,
                jited: info.size_jitted(),
                verified: info.verified_instruction_count().context("the verifier's count")?,
            })
        };
        dataplane.programs()?.into_iter().map(program).collect()
    }
}

/// The floors' medians, nanoseconds: drop, swap, encap.
fn floors(rows: &[Row]) -> [f64; 3] {
    [rows[0].median(), rows[1].median(), rows[2].median()]
}

fn print_table(rows: &[Row], programs: &[Program], options: &PacketOptions) {
    let [drop, swap, encap] = floors(rows);
    programs.iter().for_each(|program| println!("{program}"));
    println!(
        "medians of {} rounds of {} packets, CPU {}\n",
        options.rounds, options.repeats, options.cpu
    );
    println!(
        "{:<42} {:>9} {:>8} {:>15} {:>8} {:>7} {:>7} {:>7}",
        "", "flows", "ns", "middle half", "- swap", "x drop", "x swap", "x encap"
    );
    for row in rows {
        let median = row.median();
        let half = [0.25, 0.75].map(|at| quantile(&row.samples, at));
        println!(
            "{:<42} {:>9} {:>8.1} {:>7.1} {:>7.1} {:>8.1} {:>7.2} {:>7.2} {:>7.2}",
            row.name,
            row.flows,
            median,
            half[0],
            half[1],
            median - swap,
            median / drop,
            median / swap,
            median / encap
        );
    }
}

fn write_json(rows: &[Row], programs: &[Program], options: &PacketOptions) -> Result<()> {
    let [drop, swap, encap] = floors(rows);
    let results: Vec<_> = rows
        .iter()
        .map(|row| {
            let median = row.median();
            json!({
                "name": row.name,
                "flows": row.flows,
                "nanoseconds": median,
                "samples": row.samples,
                "over_swap": median - swap,
                "ratio_to_drop": median / drop,
                "ratio_to_swap": median / swap,
                "ratio_to_encap": median / encap,
            })
        })
        .collect();
    let figures = json!({
        "rounds": options.rounds,
        "repeats": options.repeats,
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        "cpu": cpu_model()?,
        "programs": programs.iter().map(Program::json).collect::<Vec<_>>(),
        "rows": results,
    });
    if let Some(folder) = options.json.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    fs::write(&options.json, serde_json::to_string_pretty(&figures)? + "\n")
        .with_context(|| format!("write {}", options.json.display()))?;
    println!("\nwritten to {}", options.json.display());
    Ok(())
}

fn cpu_model() -> Result<String> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let model = text.lines().find_map(|line| line.strip_prefix("model name"));
    Ok(model.map_or("unknown", |line| line.trim_start_matches([' ', '\t', ':'])).to_owned())
}
