//! What is served now: [`Routes`] as the worker threads use them. What a change
//! leaves as it was is the same object after it.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::ops::Not;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::time::sleep;

use super::ENDING;
use super::access_log::AccessLog;
use super::balance::{self, Balancer, Candidate, Cycle, InProgress, Load, Turn};
use super::cookies::Cookies;
use super::counters::{Counters, GroupCounters, Shards};
use super::routes::{GroupRoute, ListenerRoute, Routes, TargetRoute, TargetState};
use super::rules::{Action, CompileError, Decision, Rules};
use super::tls::ListenerConfig;
use crate::config::model::{ProxySettings, RequestAlgorithm};

/// A listener, for as long as it is served at its address, whatever changes about it.
#[derive(Debug)]
pub struct Listener {
    /// Where it listens.
    pub address: SocketAddr,
    /// What holds for it now.
    pub current: ArcSwap<Served>,
    /// Turns true when it ends: no connections any more, requests in progress may end. Also says
    /// that something else about it changed.
    pub closing: watch::Sender<bool>,
}

impl Listener {
    /// Resolves when it ends.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + use<> {
        is_true(self.closing.subscribe())
    }

    /// Whether it ends, to begin with and whenever something about it changes.
    pub fn changes(&self) -> watch::Receiver<bool> {
        let mut changes = self.closing.subscribe();
        changes.mark_changed();
        changes
    }

    /// Resolves when its connections have had their time after its end.
    pub async fn expired(&self) {
        self.closed().await;
        sleep(ENDING).await;
    }
}

async fn is_true(mut flag: watch::Receiver<bool>) {
    // It also ends when nobody can set it any more.
    let _ = flag.wait_for(|flag| *flag).await;
}

/// What holds for a listener at some time.
#[derive(Debug)]
pub struct Served {
    /// As the state says.
    pub route: ListenerRoute,
    /// For listeners with TLS.
    pub tls: Option<ListenerConfig>,
    /// Its load balancer.
    pub load_balancer: Arc<LoadBalancer>,
    /// Its rules.
    pub rules: Rules,
    /// Where requests are noted.
    pub log: Option<Arc<AccessLog>>,
    /// Which of a decision's groups is next, by the decision's place.
    pub turns: Vec<GroupTurn>,
}

/// Which of several groups is next.
#[derive(Debug, Default)]
pub struct GroupTurn {
    /// Their order.
    pub cycle: Cycle,
    /// Where it is.
    pub turn: Turn,
}

impl Served {
    /// Compiles what a listener should do.
    ///
    /// # Errors
    /// If its rules do not compile.
    pub fn new(
        route: &ListenerRoute,
        tls: Option<ListenerConfig>,
        load_balancer: Arc<LoadBalancer>,
        log: Option<Arc<AccessLog>>,
    ) -> Result<Self, CompileError> {
        let rules = Rules::compile(&route.listener)?;
        let turn = |decision: &Decision| {
            let Action::Forward(forward) = &decision.action else { return GroupTurn::default() };
            let weights: Vec<_> =
                forward.target_groups.iter().map(|it| u32::from(it.weight)).collect();
            GroupTurn { cycle: Cycle::new(&weights), turn: Turn::default() }
        };
        let turns = rules.decisions().map(turn).collect();
        Ok(Self { route: route.clone(), tls, load_balancer, rules, log, turns })
    }
}

/// A load balancer, for as long as it has a listener.
#[derive(Debug)]
pub struct LoadBalancer {
    /// What is counted for it.
    pub counters: Shards,
    /// Connections of clients that are open now.
    pub connections: AtomicU32,
}

/// All target groups at some time.
#[derive(Debug, Default)]
pub struct Groups {
    by_name: HashMap<Arc<str>, Arc<Group>>,
    /// Seals and opens stickiness cookies, with its key; `None`: nothing was served yet.
    cookies: Option<([u8; 32], Arc<Cookies>)>,
}

/// A target group at some time.
#[derive(Debug)]
pub struct Group {
    /// Its name.
    pub name: Arc<str>,
    /// How its targets are spoken to.
    pub settings: ProxySettings,
    /// Its targets, with what holds for them now.
    pub targets: Vec<Registered>,
    /// Chooses among all that are in service.
    all: Choice,
    /// Chooses among those of a zone that are in service, for zones that have one.
    near: HashMap<Arc<str>, Choice>,
    /// Where the turn is; goes on over changes.
    turn: Arc<Turn>,
}

/// Chooses among some targets.
#[derive(Debug)]
struct Choice {
    targets: Vec<Arc<Target>>,
    balancer: Balancer,
}

impl Choice {
    fn new<'a>(settings: &ProxySettings, registered: impl Iterator<Item = &'a Registered>) -> Self {
        let (targets, candidates) = registered
            .filter(|it| it.route.state == TargetState::InService)
            .map(|it| {
                let weight = it.route.weight * it.route.share;
                (it.target.clone(), Candidate { load: it.target.load.clone(), weight })
            })
            .unzip();
        Self { targets, balancer: Balancer::new(settings.algorithm, candidates) }
    }

    fn pick(&self, turn: &Turn) -> Option<Arc<Target>> {
        self.targets.get(self.balancer.pick(turn)?).cloned()
    }
}

/// A target with what holds for it at some time.
#[derive(Debug)]
pub struct Registered {
    /// As the state says.
    pub route: TargetRoute,
    /// The target.
    pub target: Arc<Target>,
}

/// A target, for as long as it is in the routes and is spoken to in the same way.
#[derive(Debug)]
pub struct Target {
    /// For the pools.
    pub id: u64,
    /// Where it is.
    pub address: SocketAddr,
    /// How it is spoken to.
    pub settings: ProxySettings,
    /// Requests in progress, and how they end.
    pub load: Arc<Load>,
    /// What is counted for it.
    pub counters: Shards,
    /// Turns true when it is no longer in the routes: connections to it end.
    pub gone: watch::Sender<bool>,
}

impl Groups {
    /// The group of that name.
    pub fn get(&self, name: &str) -> Option<&Arc<Group>> {
        self.by_name.get(name)
    }

    /// Looks at how requests ended of late.
    pub fn mitigate(&self) {
        self.by_name.values().for_each(|group| group.mitigate());
    }

    /// Seals and opens stickiness cookies.
    pub fn cookies(&self) -> Option<&Arc<Cookies>> {
        self.cookies.as_ref().map(|(_, cookies)| cookies)
    }

    /// What follows: that of `routes`, with the targets of `self` that are still there. Groups that
    /// are `kept` and not in the routes stay as they are.
    pub fn follow(&self, routes: &Routes, kept: &HashSet<String>, maker: &mut Maker) -> Self {
        let follow = |(name, route): (&Arc<str>, &GroupRoute)| {
            let before = self.by_name.get(name);
            (name.clone(), Arc::new(Group::follow(before.map(|it| &**it), name, route, maker)))
        };
        let kept = self.by_name.iter().filter(|(name, _)| kept.contains(&***name));
        let kept = kept.map(|(name, group)| (name.clone(), group.clone()));
        let by_name = kept.chain(routes.groups.iter().map(follow)).collect();
        let key = routes.cookie_key;
        let cookies = match &self.cookies {
            Some((before, cookies)) if *before == key => cookies.clone(),
            _ => Arc::new(Cookies::new(&key)),
        };
        let next = Self { by_name, cookies: Some((key, cookies)) };
        self.end_all_but(&next);
        next
    }

    /// Ends the connections to targets that `next` has not.
    fn end_all_but(&self, next: &Self) {
        for (name, group) in &self.by_name {
            for before in &group.targets {
                let stays = next.get(name).is_some_and(|group| {
                    group.targets.iter().any(|it| Arc::ptr_eq(&it.target, &before.target))
                });
                if !stays {
                    before.target.gone.send_replace(true);
                }
            }
        }
    }

    /// What has been counted for targets.
    pub fn count(&self, counters: &mut Counters) {
        for (name, group) in &self.by_name {
            let targets = group
                .targets
                .iter()
                .map(|it| (it.target.address, it.target.counters.target()))
                .collect();
            counters.target_groups.insert(name.clone(), GroupCounters { targets });
        }
    }
}

impl Group {
    fn follow(
        before: Option<&Self>,
        name: &Arc<str>,
        route: &GroupRoute,
        maker: &mut Maker,
    ) -> Self {
        let same = before.filter(|it| it.settings.is_spoken_to_like(&route.settings));
        let known: HashMap<_, _> = same
            .iter()
            .flat_map(|group| &group.targets)
            .map(|it| (it.target.address, &it.target))
            .collect();
        let targets = route.targets.iter().map(|route_of_target| Registered {
            route: route_of_target.clone(),
            target: match known.get(&route_of_target.address) {
                Some(&target) => target.clone(),
                None => maker.target(route_of_target.address, &route.settings),
            },
        });
        let targets: Vec<_> = targets.collect();
        let zones: HashSet<_> = targets.iter().filter_map(|it| it.route.zone.clone()).collect();
        let near = zones.into_iter().filter_map(|zone| {
            let is_near = |it: &&Registered| it.route.zone.as_ref().is_none_or(|it| *it == zone);
            let choice = Choice::new(&route.settings, targets.iter().filter(is_near));
            choice.targets.is_empty().not().then_some((zone, choice))
        });
        Self {
            name: name.clone(),
            settings: route.settings.clone(),
            near: near.collect(),
            all: Choice::new(&route.settings, targets.iter()),
            targets,
            turn: before.map(|it| it.turn.clone()).unwrap_or_default(),
        }
    }

    /// The target that gets the next request; of `zone` where one is there.
    pub fn pick(&self, zone: Option<&str>) -> Option<Arc<Target>> {
        zone.and_then(|zone| self.near.get(zone)?.pick(&self.turn))
            .or_else(|| self.all.pick(&self.turn))
    }

    /// The target of a client that stays with it: it may still drain.
    pub fn kept(&self, address: SocketAddr) -> Option<Arc<Target>> {
        self.targets
            .iter()
            .find(|it| it.target.address == address && it.route.state != TargetState::OutOfService)
            .map(|it| it.target.clone())
    }

    /// Looks at how requests ended of late, where targets that fail get less.
    pub fn mitigate(&self) {
        let algorithm = RequestAlgorithm::WeightedRandom { anomaly_mitigation: true };
        if self.settings.algorithm == algorithm {
            let loads: Vec<_> = self.all.targets.iter().map(|it| it.load.clone()).collect();
            balance::mitigate(&loads);
        }
    }
}

impl ProxySettings {
    /// Whether connections to targets are the same with these.
    fn is_spoken_to_like(&self, other: &Self) -> bool {
        (self.protocol, self.version, self.proxy_protocol_v2)
            == (other.protocol, other.version, other.proxy_protocol_v2)
    }
}

impl Target {
    /// Resolves when it is no longer in the routes.
    pub fn gone(&self) -> impl Future<Output = ()> + Send + use<> {
        is_true(self.gone.subscribe())
    }
}

/// Makes targets.
#[derive(Debug)]
pub struct Maker {
    workers: usize,
    next_id: u64,
}

impl Maker {
    /// For so many threads.
    pub fn new(workers: usize) -> Self {
        Self { workers, next_id: 0 }
    }

    fn target(&mut self, address: SocketAddr, settings: &ProxySettings) -> Arc<Target> {
        self.next_id += 1;
        Arc::new(Target {
            id: self.next_id,
            address,
            settings: settings.clone(),
            load: Arc::default(),
            counters: Shards::new(self.workers),
            gone: watch::Sender::new(false),
        })
    }

    /// A load balancer for which nothing is counted yet.
    pub fn load_balancer(&self) -> Arc<LoadBalancer> {
        Arc::new(LoadBalancer {
            counters: Shards::new(self.workers),
            connections: AtomicU32::new(0),
        })
    }
}

/// A request in progress at a target.
#[derive(Debug)]
pub struct Outstanding {
    target: Arc<Target>,
    /// Ends it when it is dropped.
    _in_progress: InProgress,
}

impl Outstanding {
    /// It begins.
    pub fn begin(target: Arc<Target>) -> Self {
        let in_progress = target.load.begin();
        Self { target, _in_progress: in_progress }
    }

    /// Where.
    pub fn target(&self) -> &Arc<Target> {
        &self.target
    }
}
