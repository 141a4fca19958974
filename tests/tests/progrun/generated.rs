//! Host against kernel on generated frames.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    time::Duration,
};

use lb_common::tables::{EXCEPTION_WORDS, Slot, SlotState, Target};
use lb_tests::generate::{Generator, MTUS};
use rand::{Rng as _, seq::IndexedRandom as _};

use super::*;

/// Frames a run.
const FRAMES: u32 = 100_000;
/// Frames between two changes of the tables. Short enough that no flow comes near the age at which
/// it is treated otherwise: the two sides look at the clock one after the other.
const BATCH: u32 = 1_000;

/// Ages of remembered flows, seconds: on either side of, and not near, every limit.
const AGES: [u64; 8] = [0, 0, 3, 8, 12, 110, 130, 400];

/// The seed is fixed so that a change is judged by what it changes. `LB_SEED` chooses another one,
/// `LB_FRAMES` a longer run.
#[test]
fn host_and_kernel_agree() {
    let seed = number("LB_SEED", 1);
    let frames = number("LB_FRAMES", u64::from(FRAMES)) as u32;
    println!("LB_SEED={seed} LB_FRAMES={frames}");
    let mut scene = Scene::everything();
    let mut generator = Generator::new(seed, &scene);
    let mut actions: BTreeMap<Action, u32> = BTreeMap::new();
    in_world(&scene.clone(), |world| {
        for batch in 0..frames.div_ceil(BATCH) {
            for n in 0..BATCH {
                let (ingress, frame) = generator.frame();
                let outcome = world
                    .run(ingress, &frame)
                    .unwrap_or_else(|e| panic!("LB_SEED={seed}, batch {batch}, frame {n}: {e}"));
                *actions.entry(outcome.action).or_default() += 1;
            }
            world.counts().unwrap_or_else(|e| panic!("LB_SEED={seed}, batch {batch}: {e}"));
            world.check_flows().unwrap_or_else(|e| panic!("LB_SEED={seed}, batch {batch}: {e}"));
            change(&mut scene, &mut generator);
            world.set(scene.desired.clone()).unwrap();
            age(world, &mut generator);
            let rng = generator.rng();
            let words: Vec<u64> = (0..EXCEPTION_WORDS).map(|_| rng.random()).collect();
            world.map_exceptions(&words);
            let corrections = scene.desired.shares.keys().map(|n| (*n, rng.random_range(0..9)));
            world.correct(&corrections.collect()).unwrap();
            world.walk_snat().unwrap();
        }
        let counts = world.counts().unwrap();
        println!("{actions:?} {:?}", counts.drops);
        assert_meaningful(&scene, &actions, &counts, frames);
    });
}

/// The run met all there is: agreement over nothing proves nothing.
fn assert_meaningful(scene: &Scene, actions: &BTreeMap<Action, u32>, counts: &Counts, frames: u32) {
    for action in [Action::Drop, Action::Pass, Action::Transmit, Action::Redirect] {
        let seen = actions.get(&action).copied().unwrap_or(0);
        assert!(seen > frames / 50, "{action:?} {seen} times only");
    }
    for reason in DropReason::ALL {
        // The first is a bug, the second a driver's refusal.
        let never = matches!(reason, DropReason::TableInconsistent | DropReason::NoHeadroom);
        assert_eq!(counts.drops.contains_key(&reason), !never, "{}", reason.name());
    }
    let began = Scene::everything().desired;
    let proxied = began.endpoints.values().filter(|endpoint| endpoint.kind() == Endpoint::PROXIED);
    let proxied: BTreeSet<u32> = proxied.map(|endpoint| endpoint.listener).collect();
    for listener in scene.desired.listeners.keys() {
        let ring = began.rings.get(listener);
        let targets = ring.into_iter().flat_map(|slots| slots.iter().map(|slot| slot.current));
        let mut ways = targets.map(|target| began.targets[&target].hop.ifindex);
        let is_counted = counts.listeners.contains_key(listener);
        if proxied.contains(listener) {
            assert!(is_counted, "listener {listener}");
        } else if ring.is_none() {
            assert!(!is_counted, "listener {listener}");
        } else if ways.any(|ifindex| ifindex != 0) {
            assert!(is_counted, "listener {listener}");
        }
    }
    let replied = counts.listeners.values().filter(|traffic| traffic.reply_packets > 0).count();
    assert!(replied > 20, "replies by {replied} listeners only");
}

/// A target fails or recovers, loses its next hop or moves to another; slots move through their
/// states.
fn change(scene: &mut Scene, generator: &mut Generator) {
    let rng = generator.rng();
    let desired = &mut scene.desired;
    let numbers: Vec<u32> = desired.targets.keys().copied().collect();
    for _ in 0..4 {
        let number = numbers.choose(rng).expect("a target");
        let target = desired.targets.get_mut(number).expect("a target");
        match rng.random_range(0..8) {
            0 => target.flags = *[0, Target::SERVES].choose(rng).expect("two"),
            1 => target.hop.ifindex = *[0, 10, 11, 13].choose(rng).expect("some"),
            2 => target.hop.vlan = rng.random_range(1..4095),
            3 => target.hop.mtu = *MTUS.choose(rng).expect("some"),
            _ => {
                target.flags = Target::SERVES | Target::IN_RING;
                target.hop.ifindex = 11;
                target.hop.vlan = 0;
                target.hop.mtu = 1500;
            }
        }
    }
    use SlotState::{Learning, LearningTcp, Pinned, Settled};
    for number in [20, 22, 24, 26, 28, 32, 33, 34, 35, 73, 74, 110, 111, 112, 113, 114] {
        let ring = desired.rings.get_mut(&number).expect("a ring");
        let choices = [Settled, Learning, LearningTcp, Pinned];
        *ring = ring
            .iter()
            .map(|slot| {
                let previous = if number < 33 { number + 1 } else { slot.current };
                let state = *choices.choose(rng).expect("four");
                let previous = if state == Settled { 0 } else { previous };
                let slot = Slot::new(slot.current, previous, state);
                if state == Pinned && rng.random() { slot.mapped() } else { slot }
            })
            .collect();
    }
}

/// Gives remembered flows other ages; some are forgotten.
fn age(world: &mut World<'_>, generator: &mut Generator) {
    let direct = world.model.direct_flows.borrow().len();
    if direct > 500 {
        world.forget_all().unwrap();
    }
    let mut ago = || Duration::from_secs(*AGES.choose(generator.rng()).expect("some"));
    world.age(|_| ago()).unwrap();
    world.age_snat(&mut ago).unwrap();
    world.age_returns(&mut ago).unwrap();
}

fn number(variable: &str, default: u64) -> u64 {
    match env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable} is a number")),
        Err(_) => default,
    }
}
