//! What is served now: [`Routes`](super::Routes) as the worker threads use them. What a change
//! leaves as it was is the same object after it.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::counters::{Counters, GroupCounters, Shards};
use super::routes::{GroupRoute, ListenerRoute, TargetRoute, TargetState};
use super::tls::ListenerConfig;
use crate::config::model::ProxySettings;

/// A listener, for as long as it is served at its address, whatever changes about it.
#[derive(Debug)]
pub struct Listener {
    /// Where it listens.
    pub address: SocketAddr,
    /// What holds for it now.
    pub current: ArcSwap<Served>,
    /// Turns true when it ends: no connections any more, requests in progress may end.
    pub closing: watch::Sender<bool>,
}

impl Listener {
    /// Resolves when it ends.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + use<> {
        is_true(self.closing.subscribe())
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
pub struct Groups(HashMap<Arc<str>, Arc<Group>>);

/// A target group at some time.
#[derive(Debug)]
pub struct Group {
    /// Its name.
    pub name: Arc<str>,
    /// How its targets are spoken to.
    pub settings: ProxySettings,
    /// Its targets, with what holds for them now.
    pub targets: Vec<Registered>,
    /// Where round robin is; goes on over changes.
    pub turn: Arc<AtomicU64>,
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
    /// Its group's name.
    pub group: Arc<str>,
    /// How it is spoken to.
    pub settings: ProxySettings,
    /// Requests in progress.
    pub outstanding: AtomicU32,
    /// What is counted for it.
    pub counters: Shards,
    /// Turns true when it is no longer in the routes: connections to it end.
    pub gone: watch::Sender<bool>,
}

impl Groups {
    /// The group of that name.
    pub fn get(&self, name: &str) -> Option<&Arc<Group>> {
        self.0.get(name)
    }

    /// What follows: `routes`, with the targets of `self` that are still there.
    pub fn follow(&self, routes: &BTreeMap<Arc<str>, GroupRoute>, maker: &mut Maker) -> Self {
        let next = routes
            .iter()
            .map(|(name, route)| {
                let before = self.0.get(name);
                (name.clone(), Arc::new(Group::follow(before.map(|it| &**it), name, route, maker)))
            })
            .collect();
        let next = Self(next);
        self.end_all_but(&next);
        next
    }

    /// Ends the connections to targets that `next` has not.
    fn end_all_but(&self, next: &Self) {
        for (name, group) in &self.0 {
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
        for (name, group) in &self.0 {
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
                None => maker.target(name, route_of_target.address, &route.settings),
            },
        });
        Self {
            name: name.clone(),
            settings: route.settings.clone(),
            targets: targets.collect(),
            turn: before.map(|it| it.turn.clone()).unwrap_or_default(),
        }
    }

    /// Those that take new requests; of `zone` where one is there and there is such a zone.
    pub fn in_service(&self, zone: Option<&str>) -> Vec<&Registered> {
        let all = || {
            self.targets
                .iter()
                .filter(|it| it.route.state == TargetState::InService && it.route.weight > 0)
        };
        let Some(zone) = zone else { return all().collect() };
        let is_near =
            |it: &&Registered| it.route.zone.as_deref().is_none_or(|target| target == zone);
        let near: Vec<_> = all().filter(is_near).collect();
        if near.is_empty() { all().collect() } else { near }
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

    fn target(
        &mut self,
        group: &Arc<str>,
        address: SocketAddr,
        settings: &ProxySettings,
    ) -> Arc<Target> {
        self.next_id += 1;
        Arc::new(Target {
            id: self.next_id,
            address,
            group: group.clone(),
            settings: settings.clone(),
            outstanding: AtomicU32::new(0),
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
pub struct Outstanding(Arc<Target>);

impl Outstanding {
    /// It begins.
    pub fn begin(target: Arc<Target>) -> Self {
        target.outstanding.fetch_add(1, Relaxed);
        Self(target)
    }

    /// Where.
    pub fn target(&self) -> &Arc<Target> {
        &self.0
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        self.0.outstanding.fetch_sub(1, Relaxed);
    }
}
