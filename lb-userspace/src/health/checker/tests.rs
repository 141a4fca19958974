//! The clock of most tests is tokio's paused one: time passes only when every task waits.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tokio::net::TcpSocket;
use tokio::time::{sleep, timeout};

use super::*;
use crate::config::model::{HealthCheck, HttpProbe, ProbeKind};
use crate::health::machine::Outcome;
use crate::health::{HealthState, Reason};

const INTERVAL: Duration = Duration::from_secs(10);

fn key(target: u16) -> CheckKey {
    let [high, low] = target.to_be_bytes();
    let address = IpAddr::V4(Ipv4Addr::new(127, 1, high, low));
    CheckKey { target_group: "web".into(), address, port: 80 }
}

fn spec(key: &CheckKey, path: &str) -> CheckSpec {
    let http = HttpProbe { path: path.to_owned(), matcher: vec![200..=299], http2: false };
    CheckSpec {
        check: HealthCheck {
            probe: ProbeKind::Http(http),
            port: None,
            interval: INTERVAL,
            timeout: Duration::from_secs(2),
            healthy_threshold: 3,
            unhealthy_threshold: 2,
        },
        address: key.address,
        port: key.port,
        proxy_protocol: false,
    }
}

fn wanted(targets: impl IntoIterator<Item = u16>, path: &str) -> BTreeMap<CheckKey, CheckSpec> {
    let target = |target| {
        let key = key(target);
        let spec = spec(&key, path);
        (key, spec)
    };
    targets.into_iter().map(target).collect()
}

/// Targets that are scripted by address: they fail while they are listed in `down`.
#[derive(Debug, Default)]
struct Script {
    down: Mutex<HashSet<IpAddr>>,
    takes: Duration,
    calls: Mutex<Vec<(Instant, CheckSpec)>>,
    in_flight: Mutex<HashMap<IpAddr, usize>>,
    in_flight_of_all: AtomicUsize,
    most_in_flight: AtomicUsize,
    most_of_one: AtomicUsize,
}

/// Counts a check out again, also one that is cancelled.
struct InFlight<'a>(&'a Script, IpAddr);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        *self.0.in_flight.lock().unwrap().get_mut(&self.1).unwrap() -= 1;
        self.0.in_flight_of_all.fetch_sub(1, Relaxed);
    }
}

impl Script {
    fn taking(takes: Duration) -> Arc<Self> {
        Arc::new(Self { takes, ..Self::default() })
    }

    fn calls(&self) -> usize {
        self.calls.lock().unwrap().len()
    }

    fn enter(&self, address: IpAddr) -> InFlight<'_> {
        let mut in_flight = self.in_flight.lock().unwrap();
        let of_one = in_flight.entry(address).or_default();
        *of_one += 1;
        self.most_of_one.fetch_max(*of_one, Relaxed);
        let of_all = self.in_flight_of_all.fetch_add(1, Relaxed) + 1;
        self.most_in_flight.fetch_max(of_all, Relaxed);
        InFlight(self, address)
    }
}

impl Probe for Arc<Script> {
    async fn probe(&self, spec: &CheckSpec) -> Outcome {
        self.calls.lock().unwrap().push((Instant::now(), spec.clone()));
        let _in_flight = self.enter(spec.address);
        sleep(self.takes).await;
        if self.down.lock().unwrap().contains(&spec.address) {
            let description = "connection refused".to_owned();
            return Outcome::Fail { reason: Reason::FailedHealthChecks, description };
        }
        Outcome::Pass
    }
}

fn start(script: &Arc<Script>) -> (Checker<Arc<Script>>, mpsc::Receiver<HealthEvent>) {
    let (sender, events) = mpsc::channel(16);
    (Checker::with_probe(sender, script.clone()), events)
}

/// How long it took until the next event, which must be about `target` and say `state`.
async fn expect(events: &mut mpsc::Receiver<HealthEvent>, target: u16, state: HealthState) -> f64 {
    let since = Instant::now();
    let event = events.recv().await.unwrap();
    assert_eq!((event.key, event.health.state), (key(target), state));
    since.elapsed().as_secs_f64()
}

#[tokio::test(start_paused = true)]
async fn a_target_flaps() {
    let script = Script::taking(Duration::from_millis(1));
    let (mut checker, mut events) = start(&script);
    checker.reconcile(wanted([1], "/"));
    let first = expect(&mut events, 1, HealthState::Healthy).await;
    assert!(first < 0.01, "the first check of a lone target came after {first} s");

    script.down.lock().unwrap().insert(key(1).address);
    let seconds = expect(&mut events, 1, HealthState::Unhealthy).await;
    assert!((17.9..22.1).contains(&seconds), "two failures took {seconds} s");

    script.down.lock().unwrap().clear();
    let seconds = expect(&mut events, 1, HealthState::Healthy).await;
    assert!((26.9..33.1).contains(&seconds), "three passes took {seconds} s");

    assert!(timeout(INTERVAL * 20, events.recv()).await.is_err(), "reported without a change");
}

#[tokio::test(start_paused = true)]
async fn the_first_check_is_reported_though_it_fails() {
    let script = Script::taking(Duration::ZERO);
    script.down.lock().unwrap().insert(key(1).address);
    let (mut checker, mut events) = start(&script);
    checker.reconcile(wanted([1], "/"));
    let event = events.recv().await.unwrap();
    assert_eq!(event.health.state, HealthState::Initial);
    assert_eq!(event.health.reason, Some(Reason::InitialHealthChecking));
    assert_eq!(event.health.description.as_deref(), Some("connection refused"));
    expect(&mut events, 1, HealthState::Unhealthy).await;
}

#[tokio::test(start_paused = true)]
async fn intervals_are_jittered_from_start_to_start() {
    let script = Script::taking(Duration::from_secs(2));
    let (mut checker, _events) = start(&script);
    checker.reconcile(wanted([1], "/"));
    sleep(INTERVAL * 200).await;
    let calls = script.calls.lock().unwrap();
    let starts: Vec<_> = calls.iter().map(|(start, _)| *start).collect();
    let gaps: Vec<_> = starts.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    assert!(gaps.len() > 175, "{} checks in 2000 s", gaps.len());
    assert!(gaps.iter().all(|gap| (8.99..=11.01).contains(gap)), "{gaps:?}");
    let shortest = gaps.iter().copied().fold(f64::MAX, f64::min);
    let longest = gaps.iter().copied().fold(0.0, f64::max);
    assert!(longest - shortest > 1.0, "hardly any jitter: {shortest} to {longest}");
}

#[tokio::test(start_paused = true)]
async fn one_check_of_a_target_at_a_time_however_slow() {
    let script = Script::taking(INTERVAL * 3);
    let (mut checker, mut events) = start(&script);
    checker.reconcile(wanted([1, 2], "/"));
    sleep(INTERVAL * 31).await;
    assert_eq!(script.most_of_one.load(Relaxed), 1);
    assert!((20..=22).contains(&script.calls()), "{} checks", script.calls());
    assert!(events.try_recv().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_reload_that_changes_nothing_disturbs_nothing() {
    let script = Script::taking(Duration::from_millis(1));
    let (mut checker, mut events) = start(&script);
    checker.reconcile(wanted([1], "/"));
    expect(&mut events, 1, HealthState::Healthy).await;
    for _ in 0..100 {
        sleep(Duration::from_millis(10)).await;
        checker.reconcile(wanted([1], "/"));
    }
    assert_eq!(script.calls(), 1, "a reload made checks");

    checker.reconcile(wanted([1, 2], "/"));
    expect(&mut events, 2, HealthState::Healthy).await;
    assert_eq!(script.calls(), 2, "a new target made checks of another");
}

#[tokio::test(start_paused = true)]
async fn a_changed_check_asks_anew_and_keeps_the_state() {
    let script = Script::taking(Duration::from_millis(1));
    let (mut checker, mut events) = start(&script);
    checker.reconcile(wanted([1], "/"));
    expect(&mut events, 1, HealthState::Healthy).await;

    script.down.lock().unwrap().insert(key(1).address);
    checker.reconcile(wanted([1], "/health"));
    let seconds = expect(&mut events, 1, HealthState::Unhealthy).await;
    // The first failure at once, the second after an interval.
    assert!((8.9..11.1).contains(&seconds), "two failures took {seconds} s");
    let calls = script.calls.lock().unwrap();
    let paths: Vec<_> = calls
        .iter()
        .map(|(_, spec)| match &spec.check.probe {
            ProbeKind::Http(http) => http.path.as_str(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(paths, ["/", "/health", "/health"]);
}

#[tokio::test(start_paused = true)]
async fn an_outcome_of_the_old_check_does_not_count() {
    let script = Script::taking(Duration::from_secs(2));
    let (mut checker, mut events) = start(&script);
    checker.reconcile(wanted([1], "/"));
    sleep(Duration::from_secs(1)).await;
    checker.reconcile(wanted([1], "/health"));
    let seconds = expect(&mut events, 1, HealthState::Healthy).await;
    assert!(seconds > 1.9, "the check in flight was counted: {seconds} s");
    assert_eq!(script.most_of_one.load(Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_removed_target_is_not_asked_again() {
    let script = Script::taking(Duration::from_millis(1));
    let (mut checker, mut events) = start(&script);
    checker.reconcile(wanted([1, 2], "/"));
    events.recv().await.unwrap();
    events.recv().await.unwrap();
    checker.reconcile(wanted([2], "/"));
    sleep(INTERVAL * 10).await;
    let calls = script.calls.lock().unwrap();
    let of_first = calls.iter().filter(|(_, spec)| spec.address == key(1).address).count();
    assert_eq!(of_first, 1);
    assert!(calls.len() > 9, "the other one is asked no more either");
}

#[tokio::test(start_paused = true)]
async fn a_target_that_comes_back_is_new() {
    let script = Script::taking(Duration::from_millis(1));
    let (mut checker, mut events) = start(&script);
    checker.reconcile(wanted([1], "/"));
    expect(&mut events, 1, HealthState::Healthy).await;
    checker.reconcile(wanted([], "/"));
    script.down.lock().unwrap().insert(key(1).address);
    checker.reconcile(wanted([1], "/"));
    expect(&mut events, 1, HealthState::Initial).await;
}

#[tokio::test(start_paused = true)]
async fn a_dropped_checker_stops_everything() {
    let script = Script::taking(Duration::from_secs(1));
    let (mut checker, mut events) = start(&script);
    checker.reconcile(wanted(1..=10, "/"));
    sleep(Duration::from_millis(500)).await;
    assert_eq!(script.in_flight_of_all.load(Relaxed), 10);
    drop(checker);
    // The last sender goes with the last task.
    assert_eq!(events.recv().await, None);
    assert_eq!(script.in_flight_of_all.load(Relaxed), 0);
    sleep(INTERVAL * 5).await;
    assert_eq!(script.calls(), 10);
}

#[tokio::test(start_paused = true)]
async fn no_event_is_lost_while_the_channel_is_full() {
    let script = Script::taking(Duration::from_millis(1));
    let (mut checker, mut events) = start(&script);
    checker.reconcile(wanted(0..100, "/"));
    sleep(INTERVAL * 3).await;
    // A change meets checks that wait for room in the channel.
    checker.reconcile(wanted(0..100, "/health"));
    let mut seen = HashSet::new();
    while seen.len() < 100 {
        let event = timeout(INTERVAL, events.recv()).await.expect("an event was lost").unwrap();
        assert_eq!(event.health.state, HealthState::Healthy);
        assert!(seen.insert(event.key), "reported twice");
    }
}

#[tokio::test(start_paused = true)]
async fn missed_checks_are_not_made_up_for() {
    let script = Script::taking(Duration::ZERO);
    let (sender, mut events) = mpsc::channel(1);
    let only_slot = sender.clone().reserve_owned().await.unwrap();
    let mut checker = Checker::with_probe(sender, script.clone());
    checker.reconcile(wanted([1], "/"));
    sleep(INTERVAL * 20).await;
    assert_eq!(script.calls(), 1);
    drop(only_slot);
    expect(&mut events, 1, HealthState::Healthy).await;
    sleep(INTERVAL / 2).await;
    assert_eq!(script.calls(), 2, "a burst after a stall");
}

#[tokio::test(start_paused = true)]
async fn many_targets_take_turns_and_the_wait_is_nobodys_fault() {
    let script = Script::taking(Duration::from_secs(2));
    let (mut checker, mut events) = start(&script);
    checker.reconcile(wanted(0..1000, "/"));
    let first = Instant::now();
    for _ in 0..1000 {
        assert_eq!(events.recv().await.unwrap().health.state, HealthState::Healthy);
    }
    assert_eq!(script.most_in_flight.load(Relaxed), MAX_IN_FLIGHT);
    let rounds = first.elapsed().as_secs_f64() / 2.0;
    assert!((4.0..5.0).contains(&rounds), "took {rounds} rounds of {MAX_IN_FLIGHT}");
}

#[tokio::test(start_paused = true)]
async fn first_checks_of_many_targets_are_spread() {
    let script = Script::taking(Duration::ZERO);
    let (mut checker, mut events) = start(&script);
    let start = Instant::now();
    checker.reconcile(wanted(0..1000, "/"));
    for _ in 0..1000 {
        events.recv().await.unwrap();
    }
    assert!(start.elapsed() <= MAX_SPREAD + Duration::from_millis(2));
    let calls = script.calls.lock().unwrap();
    let mut tenths = [0; 10];
    for (at, _) in calls.iter() {
        tenths[((*at - start).as_millis() / 100).min(9) as usize] += 1;
    }
    // Binomial, 100 expected, deviation 9.5: five and a half deviations.
    assert!(tenths.iter().all(|count| (48..=152).contains(count)), "{tenths:?}");
}

#[tokio::test]
async fn a_thousand_real_targets() {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("0.0.0.0:0".parse().unwrap()).unwrap();
    // Room for all of them: they close before they are accepted.
    let listener = socket.listen(1024).unwrap();
    let port = listener.local_addr().unwrap().port();
    let accepted = tokio::spawn(async move {
        let mut seen = HashSet::new();
        while seen.len() < 1000 {
            let (stream, _) = listener.accept().await.unwrap();
            seen.insert(stream.local_addr().unwrap());
        }
    });
    let (sender, mut events) = mpsc::channel(16);
    let mut checker = Checker::new(sender);
    let mut targets = wanted(0..1000, "/");
    for spec in targets.values_mut() {
        spec.port = port;
        spec.check.probe = ProbeKind::Tcp;
        spec.check.timeout = INTERVAL;
    }
    checker.reconcile(targets);
    let all = async {
        for _ in 0..1000 {
            let event = events.recv().await.unwrap();
            assert_eq!(event.health.state, HealthState::Healthy, "{event:?}");
        }
        accepted.await.unwrap();
    };
    // It takes a second, the spread; the rest is for a machine that is busy with other tests.
    timeout(INTERVAL * 2, all).await.expect("a first check of each of a thousand targets");
}
