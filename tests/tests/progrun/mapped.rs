//! Pinned slots whose exceptions are in a map.

use lb_common::{
    flow::{HashKeys, Keys as _, TCP, UDP},
    tables::{EXCEPTION_WORDS, Slot, SlotState, Target, exception_place},
};
use lb_tests::scene::Way;

use super::{
    connections::{key, seconds},
    *,
};

/// Of a slot that is mapped only flows with a bit in the map are looked up. What the map lacks is
/// not found, so a walk must have put it there.
#[test]
fn a_mapped_slot_looks_up_what_is_in_the_map() {
    let mut scene = Scene::new();
    for (first, vip, target) in
        [(1, "10.0.10.100:80", "10.0.11.4"), (3, "[fd00:10::100]:80", "[fd00:11::4")]
    {
        for n in [first, first + 1] {
            let at =
                if first == 1 { format!("{target}{n}:8080") } else { format!("{target}{n}]:8080") };
            scene.target(n, Target::NAT, &at, Way::by(11));
        }
        let slot = Slot::new(first, first + 1, SlotState::Pinned).mapped();
        scene.listener(first, TCP, vip, &[slot]);
        scene.listener(first + 1, UDP, vip, &[slot]);
    }
    in_world(&scene, |world| {
        for (first, vip, source) in
            [(1, "10.0.10.100:80", "192.0.10.7:1"), (3, "[fd00:10::100]:80", "[2001:db8:10::7]:1")]
        {
            let to = |what, request: &Packet, listener, target: u32| {
                let at = scene.desired.targets[&target];
                let at = SocketAddr::new(at.address.into(), at.port.get()).to_string();
                Step::to(what, request, &translated(request, target, &at), (listener, target))
            };
            world.map_exceptions(&[]);
            let known = [TCP, UDP].map(|protocol| key(protocol, source, vip));
            for key in known {
                world.remember(key, first + 1, 0, seconds(0)).unwrap();
            }
            let (amid, udp) = (segment(source, vip), datagram(source, vip));
            check(world, &to("not in the map", &amid, first, first));
            check(world, &to("nor UDP", &udp, first + 1, first).with_is_new(true));
            check(world, &to("a SYN", &syn(source, vip), first, first));
            let mut words = vec![0; EXCEPTION_WORDS as usize];
            for key in known {
                let hash = HashKeys::from_seed(OPTIONS.hash_seed).flow(&key);
                let (word, bit) = exception_place(hash as u32);
                words[word as usize] |= bit;
            }
            world.map_exceptions(&words);
            check(world, &to("in the map", &amid, first, first + 1));
            check(world, &to("and UDP", &udp, first + 1, first + 1).with_is_new(false));
            world.forget_all().unwrap();
            check(world, &to("in the map and gone", &amid, first, first));
        }
    });
}
