//! The balancer that is fuzzed: every mode, every state of a slot, both families.
//!
//! Addresses and ports are those of the program runs, so their frames are worth something here.

use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use lb_common::flow::{ICMP, ICMPV6, TCP, UDP};
use lb_common::model::Model;
use lb_common::tables::{
    Endpoint, EndpointKey, Listener, NO_RING, NextHop, OPEN, Slot, SlotState, Target,
};
use lb_common::wire::{
    Address, Be16,
    eth::{Macs, OwnMac},
};

use crate::packets::OUR_MAC;

const RING_SIZE: u32 = 7;
/// The class of listeners with a security group.
const CLASS: u32 = 7;
/// The UDP port that tunnels end at.
pub const GUE_PORT: u16 = 6080;
/// The client that every route leads to, by family.
const CLIENTS: [&str; 2] = ["192.0.10.7", "2001:db8:10::7"];

/// What the balancer is like: the first byte of an input.
#[derive(Clone, Copy)]
pub struct Control(pub u8);

impl Control {
    fn has(self, bit: u8) -> bool {
        self.0 & 1 << bit != 0
    }

    /// The NIC that the frame comes in by.
    pub fn ingress(self) -> u32 {
        if self.has(0) { 11 } else { 10 }
    }

    /// A slot of a target that others of its family share.
    fn slot(self, target: u32) -> Slot {
        self.slot_of(target, 20)
    }

    fn slot_of(self, target: u32, previous: u32) -> Slot {
        match (self.has(1), self.has(2)) {
            (false, false) => Slot::settled(target),
            (false, true) => Slot::new(target, previous, SlotState::Learning),
            (true, false) => Slot::new(target, previous, SlotState::LearningTcp),
            (true, true) => Slot::new(target, previous, SlotState::Pinned),
        }
    }

    fn target_flags(self) -> u8 {
        if self.has(3) { 0 } else { Target::SERVES | Target::IN_RING }
    }

    fn vlan(self) -> u16 {
        if self.has(4) { 100 } else { 0 }
    }

    fn listener_flags(self) -> u8 {
        if self.has(5) { Endpoint::TRACKED } else { 0 }
    }

    fn mode(self) -> u8 {
        if self.has(6) { Target::DSR_L2 } else { Target::NAT }
    }

    fn mtu(self) -> u16 {
        if self.has(7) { 100 } else { 1500 }
    }
}

thread_local! {
    static MODEL: RefCell<(Model, Option<u8>)> = RefCell::new((Model::new(0x5eed, RING_SIZE), None));
}

/// Runs `f` over a balancer that remembers no flow.
pub fn with_balancer(control: Control, f: impl FnOnce(&Model)) {
    MODEL.with_borrow_mut(|(model, last)| {
        if *last != Some(control.0) {
            fill(model, control);
            *last = Some(control.0);
        }
        model.flows.iter().for_each(|table| table.borrow_mut().clear());
        model.return_flows.iter().for_each(|table| table.borrow_mut().clear());
        model.direct_flows.take();
        model.direct_targets.take();
        model.unresolved.take();
        f(model);
    });
}

fn fill(model: &mut Model, control: Control) {
    model.now.set(1_000_000_000_000);
    for (n, protocol, at, target) in [
        (1, TCP, "10.0.10.100:80", Some("10.0.11.21:8080")),
        (2, UDP, "10.0.10.100:53", Some("10.0.11.22:5353")),
        (3, TCP, "[fd00:10::100]:80", Some("[fd00:11::23]:8080")),
        (4, UDP, "[fd00:10::100]:53", Some("[fd00:11::24]:5353")),
        (10, TCP, "10.0.10.100:85", None),
        (11, UDP, "10.0.10.100:85", None),
        (12, TCP, "[fd00:10::100]:85", None),
        (13, UDP, "[fd00:10::100]:85", None),
        // The target that flows of other slots may be on.
        (20, TCP, "10.0.10.100:90", Some("10.0.11.60:8080")),
    ] {
        add(model, control, n, protocol, at, target, OPEN);
    }
    for n in 60..68 {
        for (n, protocol) in [(n, TCP), (n + 20, UDP)] {
            add_tunnelled(model, control, n, protocol);
        }
    }
    add(model, control, 9, TCP, "10.0.10.100:84", Some("10.0.11.29:8080"), CLASS);
    add(model, control, 19, TCP, "[fd00:10::100]:84", Some("[fd00:11::39]:8080"), CLASS);
    model.prefixes =
        vec![(CLASS, address("192.0.10.0"), 96 + 24), (CLASS, address("2001:db8:10::"), 64)];
    for (vip, protocol) in [("10.0.10.100", ICMP), ("fd00:10::100", ICMPV6)] {
        let address = address(vip);
        let kind = Endpoint::OWNED;
        model.endpoints.insert(Endpoint { address, kind, ..Endpoint::default() });
        let kind = Endpoint::GUARD;
        model.endpoints.insert(Endpoint {
            address,
            protocol,
            kind,
            class: CLASS,
            ..Endpoint::default()
        });
    }
    model.own_macs.insert(11, OwnMac::new(OUR_MAC));
    let kind = Endpoint::LOCAL;
    model.endpoints.insert(Endpoint { address: address("10.0.11.2"), kind, ..Endpoint::default() });
    for client in CLIENTS {
        model.routes.insert(address(client), hop(control, 10));
    }
}

fn add(
    model: &mut Model,
    control: Control,
    n: u32,
    protocol: u8,
    at: &str,
    target: Option<&str>,
    class: u32,
) {
    let (address, port) = socket(at);
    let idle = lb_common::flow::TCP_IDLE;
    model.listeners.insert(n, Listener { address, port, protocol, idle, ..Listener::default() });
    let index = if target.is_some() { n } else { NO_RING };
    let kind = Endpoint::LISTENER | control.listener_flags();
    model.endpoints.insert(Endpoint { address, port, protocol, kind, listener: n, index, class });
    let Some(target) = target else { return };
    let (address, port) = socket(target);
    let (mode, flags) = (control.mode(), control.target_flags());
    let hop = hop(control, 11);
    model.targets.insert(n, Target { address, port, mode, flags, hop, ..Target::default() });
    // The previous target of a slot is of its family, as the agent sees to.
    let is_v4 = address.is_v4();
    let slot = if is_v4 { control.slot(n) } else { Slot::settled(n) };
    model.rings.insert(n, vec![slot; RING_SIZE as usize]);
    let key = EndpointKey::new(address, port, protocol);
    if control.mode() == Target::NAT {
        let shared = if control.listener_flags() == 0 { 0 } else { Endpoint::SHARED };
        let kind = Endpoint::TARGET | shared;
        model.endpoints.insert(Endpoint {
            address,
            port,
            protocol,
            kind,
            listener: n,
            index: n,
            class: 0,
        });
    } else {
        model.endpoints.remove(&key);
    }
}

/// A listener whose target is behind a tunnel: every other one in UDP; of each four, the last two with
/// an IPv6 target; the second four IPv6 themselves.
fn add_tunnelled(model: &mut Model, control: Control, n: u32, protocol: u8) {
    let vip = if n % 20 < 4 { "10.0.10.100" } else { "[fd00:10::100]" };
    let is_v4 = n % 4 < 2;
    let target = if is_v4 { format!("10.0.11.{n}:80") } else { format!("[fd00:11::{n:x}]:80") };
    add(model, control, n, protocol, &format!("{vip}:{}", 40 + n), Some(&target), OPEN);
    let target = model.targets.get_mut(&n).expect("just added");
    target.mode = if n % 2 == 0 { Target::DSR_IPIP } else { Target::DSR_GUE };
    *target = if is_v4 {
        target.through_v4(Ipv4Addr::new(172, 16, 0, 0), 16, GUE_PORT)
    } else {
        target.through_v6("100::".parse().expect("an address"), GUE_PORT)
    };
    model.endpoints.remove(&EndpointKey::new(target.address, Be16::new(80), protocol));
    model.rings.insert(n, vec![control.slot_of(n, n); RING_SIZE as usize]);
}

fn hop(control: Control, ifindex: u32) -> NextHop {
    let macs = Macs::new([2, 0, 0, 0, 1, 1], [2, 0, 0, 0, 0, ifindex as u8]);
    NextHop { ifindex, macs, vlan: control.vlan(), mtu: control.mtu() }
}

fn socket(at: &str) -> (Address, Be16) {
    let at: SocketAddr = at.parse().expect("an address and a port");
    (at.ip().into(), Be16::new(at.port()))
}

fn address(text: &str) -> Address {
    text.parse::<IpAddr>().expect("an address").into()
}
