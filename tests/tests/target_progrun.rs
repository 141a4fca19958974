//! A target's programs in the kernel and on the host, packet by packet.
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

#[path = "target_progrun/admission.rs"]
mod admission;
#[path = "target_progrun/frames.rs"]
mod frames;
#[path = "target_progrun/generated.rs"]
mod generated;
#[path = "target_progrun/tunnels.rs"]
mod tunnels;

use lb_common::verdict::DropReason;
use lb_tests::{
    progrun::{Action, hex},
    target_world::TargetWorld,
};

/// The machine's addresses: its own, and a load balancer's on its loopback.
const ADDRESSES: [&str; 4] = ["10.0.2.11", "fd00:2::11", "10.0.2.100", "fd00:2::100"];

/// A target of every kind of tunnel that lets in, beside the load balancer: one network to ports 22
/// and 5353, and its pings.
const CONFIG: &str = r#"
[security_group.lb]
members = ["10.0.2.1", "fd00:2::1", "02:00:0a:00:02:01", "172.16.0.0/16", "100::/64"]
ingress = [{ protocol = "all", sources = ["0.0.0.0/0", "::/0"] }]

[security_group.target]
ingress = [
  { protocol = "tcp", ports = "80", sources = ["sg:lb"] },
  { protocol = "udp", ports = "53", sources = ["sg:lb"] },
  { protocol = "tcp", ports = "22", sources = ["192.0.2.0/24", "2001:db8:2::/48"] },
  { protocol = "udp", ports = "5353", sources = ["192.0.2.0/24", "2001:db8:2::/48"] },
  { protocol = "icmp", sources = ["192.0.2.0/24", "2001:db8:2::/48"] },
]

[target_group.web]
port = 80
forwarding = "dsr_ipip"
security_group = "target"
targets = ["10.0.2.11", "fd00:2::11"]

[target_group.dns]
protocol = "udp"
port = 53
forwarding = "dsr_gue"
security_group = "target"
targets = ["10.0.2.11", "fd00:2::11"]
"#;

fn world() -> TargetWorld {
    TargetWorld::new(CONFIG, &ADDRESSES).unwrap()
}

/// A fixture: what it shows, a frame, what becomes of it.
enum Step {
    /// It goes out, and is remembered or not.
    Out(&'static str, Vec<u8>),
    /// It comes in, as it is.
    In(&'static str, Vec<u8>),
    /// It comes in as another frame.
    Unwrapped(&'static str, Vec<u8>, Vec<u8>),
    /// It dies.
    Dropped(&'static str, Vec<u8>, DropReason),
}

impl Step {
    fn denied(what: &'static str, frame: Vec<u8>) -> Self {
        Self::Dropped(what, frame, DropReason::SecurityGroupDenied)
    }
}

/// What the fuzzer's target does in every fixture; see `tests/fuzz`.
const ALL_ON: u8 = 0xf << 1;

/// Keeps a step's frame as an input of the fuzzer, in the folder that `LB_CORPUS` names.
fn keep(step: &Step) {
    let Some(folder) = std::env::var_os("LB_CORPUS") else { return };
    let (what, frame, is_sent) = match step {
        Step::Out(what, frame) => (what, frame, 1),
        Step::In(what, frame) | Step::Unwrapped(what, frame, _) | Step::Dropped(what, frame, _) => {
            (what, frame, 0)
        }
    };
    let name: String =
        what.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let input = [vec![ALL_ON | is_sent], frame.clone()].concat();
    std::fs::write(std::path::Path::new(&folder).join(name), input).unwrap();
}

/// Runs steps, one after the other.
fn run(world: &mut TargetWorld, steps: Vec<Step>) {
    for step in steps {
        keep(&step);
        let (drops, unwrapped) = world.counts().unwrap();
        let (what, died, is_unwrapped) = match step {
            Step::Out(what, frame) => {
                world.goes_out(&frame).unwrap_or_else(|error| panic!("{what}: {error}"));
                (what, None, false)
            }
            Step::In(what, frame) => {
                comes_in(world, what, &frame, &frame);
                (what, None, false)
            }
            Step::Unwrapped(what, frame, inner) => {
                comes_in(world, what, &frame, &inner);
                (what, None, true)
            }
            Step::Dropped(what, frame, reason) => {
                let (action, _) =
                    world.comes_in(&frame).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(action, Action::Drop, "{what}");
                (what, Some(reason), false)
            }
        };
        world.check_flows().unwrap_or_else(|error| panic!("{what}: {error}"));
        let mut expected = drops;
        if let Some(reason) = died {
            *expected.entry(reason).or_default() += 1;
        }
        let (counted, now_unwrapped) = world.counts().unwrap();
        assert_eq!(counted, expected, "{what}");
        // A packet may be dropped after its tunnel header is gone.
        let more = now_unwrapped.packets - unwrapped.packets;
        assert!(more == u64::from(is_unwrapped) || died.is_some(), "{what}: {more} unwrapped");
    }
}

fn comes_in(world: &mut TargetWorld, what: &str, frame: &[u8], expected: &[u8]) {
    let (action, output) = world.comes_in(frame).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(action, Action::Pass, "{what}; {:?}", world.counts());
    assert!(output == expected, "{what}\nis\n{}\nnot\n{}", hex(&output), hex(expected));
}
