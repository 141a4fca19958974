//! The proxy: connections that end in the agent. HTTP for application load balancers, TLS for the
//! `tls` listeners of network ones.
//!
//! It knows the configuration's types and [`Routes`], nothing of state, health and the agent.

pub mod access_log;
pub mod balance;
mod body;
mod connection;
pub mod cookies;
pub mod counters;
pub mod descriptors;
pub mod desync;
mod errors;
mod exchange;
mod forward;
pub mod headers;
pub mod host;
mod io;
mod listener;
mod note;
pub mod redirect;
mod replay;
mod request;
pub mod rewrite;
pub mod routes;
pub mod rules;
mod select;
mod streams;
mod table;
mod tls;
mod tunnel;
mod upstream;
mod watchdog;
mod worker;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::time::timeout;

pub use counters::Counters;
pub use routes::Routes;

use self::access_log::AccessLogs;
use self::connection::MAX_HEAD;
use self::routes::ListenerRoute;
use self::table::{Groups, Listener, LoadBalancer, Maker, Served};
use self::tls::{ListenerConfig, Watch};
use self::worker::WorkerHandle;
use crate::config::model::ProxyProtocol;

/// Bytes that are read or written at a time, at most. A quarter of it costs a third of the
/// throughput of large bodies.
const BUFFER: usize = 256 * 1024;

/// Bytes of buffers in a thread, about: each connection has a few. Many connections have smaller ones,
/// down to what a head needs.
const BUFFERS: usize = 128 * 1024 * 1024;

/// Bytes that are read or written at a time, at most, where a thread has so many connections.
fn buffer(connections: usize) -> usize {
    (BUFFERS / connections.max(1)).clamp(MAX_HEAD, BUFFER)
}

/// How long the connections of a listener that is no longer served may take to end by themselves:
/// AWS's default for targets that are deregistered.
pub const ENDING: Duration = Duration::from_secs(300);

/// How long the end waits for access logs to be written.
const LOGS: Duration = Duration::from_secs(2);

/// The running proxy: worker threads of its own, which serve what [`Self::apply`] said last.
#[derive(Debug)]
pub struct Proxy {
    workers: Vec<WorkerHandle>,
    groups: Arc<ArcSwap<Groups>>,
    watch: Watch,
    logs: AccessLogs,
    table: Mutex<Table>,
}

/// What is served now, as the handle knows it.
#[derive(Debug)]
struct Table {
    listeners: BTreeMap<SocketAddr, Arc<Listener>>,
    /// Listeners that are no longer served. Their connections hold them.
    ending: Vec<Weak<Listener>>,
    load_balancers: HashMap<Arc<str>, Arc<LoadBalancer>>,
    maker: Maker,
}

impl Table {
    /// Lets a listener end.
    fn end(&mut self, listener: &Arc<Listener>) {
        listener.closing.send_replace(true);
        self.ending.push(Arc::downgrade(listener));
    }

    /// The groups of listeners that end, or will with these routes: requests of connections that
    /// they have still go there.
    fn groups_of_ending(&mut self, routes: &Routes) -> HashSet<String> {
        self.ending.retain(|it| it.strong_count() > 0);
        let leaving = self.listeners.iter().filter(|(at, _)| !routes.listeners.contains_key(at));
        let leaving = leaving.map(|(_, listener)| listener.clone());
        leaving
            .chain(self.ending.iter().filter_map(Weak::upgrade))
            .flat_map(|listener| {
                let served = listener.current.load();
                let groups = served.route.listener.target_groups();
                groups.map(|group| group.name.clone()).collect::<Vec<_>>()
            })
            .collect()
    }
}

impl Proxy {
    /// Starts so many worker threads, which serve nothing yet.
    ///
    /// # Errors
    /// If the system has no thread or descriptor for one.
    pub fn start(workers: usize) -> std::io::Result<Self> {
        let groups = Arc::new(ArcSwap::default());
        let start = |index| WorkerHandle::start(index, groups.clone());
        let table = Table {
            listeners: BTreeMap::new(),
            ending: Vec::new(),
            load_balancers: HashMap::new(),
            maker: Maker::new(workers),
        };
        Ok(Self {
            workers: (0..workers).map(start).collect::<Result<_, _>>()?,
            groups,
            watch: Watch::start()?,
            logs: AccessLogs::default(),
            table: Mutex::new(table),
        })
    }

    /// Serves this from now on, and nothing else. What is as it was goes on undisturbed. When it
    /// returns, new listeners accept connections.
    ///
    /// What does not work is in the answer, and tried again by the next call; the rest is served.
    pub fn apply(&self, routes: Routes) -> Vec<Problem> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = table.groups_of_ending(&routes);
        let groups = self.groups.load().follow(&routes, &kept, &mut table.maker);
        self.groups.store(Arc::new(groups));
        let mut problems = Vec::new();
        let mut before = std::mem::take(&mut table.listeners);
        for (&address, route) in &routes.listeners {
            let result = self.listen(&mut table, address, route, before.get(&address));
            match result {
                Ok(listener) => {
                    if before.get(&address).is_some_and(|it| Arc::ptr_eq(it, &listener)) {
                        before.remove(&address);
                    }
                    table.listeners.insert(address, listener);
                }
                Err(reason) => problems.push(Problem { listener: address, reason }),
            }
        }
        for listener in before.into_values() {
            table.end(&listener);
        }
        let listeners: Vec<_> = routes.listeners.values().map(|it| &it.load_balancer).collect();
        table.load_balancers.retain(|name, _| listeners.contains(&name));
        problems
    }

    /// Serves one listener: that of before, if it can be. If it does not work: why.
    fn listen(
        &self,
        table: &mut Table,
        address: SocketAddr,
        route: &ListenerRoute,
        before: Option<&Arc<Listener>>,
    ) -> Result<Arc<Listener>, String> {
        let load_balancer = table
            .load_balancers
            .entry(route.load_balancer.clone())
            .or_insert_with(|| table.maker.load_balancer())
            .clone();
        let current = before.map(|it| it.current.load_full());
        let is_same =
            |it: &Served| it.route == *route && Arc::ptr_eq(&it.load_balancer, &load_balancer);
        if current.as_deref().is_some_and(is_same)
            && let Some(before) = before
        {
            return Ok(before.clone());
        }
        let tls = self.tls(route, current.as_deref())?;
        let sink = route.attributes.access_log.as_ref();
        let log = sink.map(|sink| self.logs.get(sink)).transpose();
        let log = log.map_err(|error| format!("access log: {error}"))?;
        let served =
            Served::new(route, tls, load_balancer, log).map_err(|error| error.to_string())?;
        let protocol = |it: &Served| it.route.listener.protocol;
        // Clients that speak something else end as if it were gone.
        if let Some(before) = before
            && current.as_deref().map(protocol) == Some(protocol(&served))
        {
            before.current.store(Arc::new(served));
            // Connections that are open see what changed.
            before.closing.send_modify(|_| {});
            return Ok(before.clone());
        }
        let listener = Arc::new(Listener {
            address,
            current: ArcSwap::from_pointee(served),
            closing: watch::Sender::new(false),
        });
        let sockets: Vec<_> = self
            .workers
            .iter()
            .map(|_| listener::bind(address))
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())?;
        for (worker, socket) in self.workers.iter().zip(sockets) {
            worker.listen(socket, listener.clone());
        }
        Ok(listener)
    }

    /// What a listener shows in TLS; as long as nothing changed about it, the same object, so that
    /// clients can resume their sessions.
    fn tls(
        &self,
        route: &ListenerRoute,
        before: Option<&Served>,
    ) -> Result<Option<ListenerConfig>, String> {
        let Some(tls) = &route.listener.tls else { return Ok(None) };
        let alpn = |route: &ListenerRoute| match route.listener.protocol {
            ProxyProtocol::Tls => {
                route.listener.tls.as_ref().map(|it| it.alpn.clone()).unwrap_or_default()
            }
            _ if route.attributes.http2 => vec!["h2".to_owned(), "http/1.1".to_owned()],
            _ => vec!["http/1.1".to_owned()],
        };
        if let Some(before) = before
            && before.route.listener.tls.as_ref() == Some(tls)
            && alpn(&before.route) == alpn(route)
        {
            return Ok(before.tls.clone());
        }
        let config =
            ListenerConfig::load(tls, before.and_then(|it| it.tls.as_ref()), &alpn(route))?;
        self.watch.add(&config);
        Ok(Some(config))
    }

    /// Where it listens, or has connections of listeners that are no longer served.
    pub fn places(&self) -> BTreeSet<SocketAddr> {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let ending = table.ending.iter().filter_map(Weak::upgrade).map(|it| it.address);
        ending.chain(table.listeners.keys().copied()).collect()
    }

    /// What has been counted.
    pub fn counters(&self) -> Counters {
        let mut counters = Counters::default();
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, load_balancer) in &table.load_balancers {
            counters.load_balancers.insert(name.clone(), load_balancer.counters.load_balancer());
        }
        self.groups.load().count(&mut counters);
        counters
    }

    /// What is not as it should be although all listeners serve: access logs, certificates. Nothing
    /// needs to be done but to put it right.
    pub fn defects(&self) -> Vec<String> {
        let mut defects = self.logs.problems();
        defects.extend(self.watch.problems());
        defects
    }

    /// Opens the access logs' files again, after they were renamed.
    pub fn reopen_logs(&self) {
        self.logs.reopen();
    }

    /// Accepts no connections any more, lets requests in progress end for at most so long, then
    /// ends the rest.
    pub async fn end(self, grace: Duration) {
        let table = self.table.into_inner().unwrap_or_else(PoisonError::into_inner);
        for listener in table.listeners.values() {
            listener.closing.send_replace(true);
        }
        let idle = async {
            for worker in &self.workers {
                worker.idle().await;
            }
        };
        // What is left after the grace ends with its thread.
        let _ = timeout(grace, idle).await;
        for worker in self.workers {
            worker.end();
        }
        drop(table);
        if !self.logs.finish(LOGS) {
            tracing::warn!("access logs are not written to their end");
        }
    }
}

/// Why a listener does not serve as it should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Which.
    pub listener: SocketAddr,
    /// Why, for the log.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "listener {}: {}", self.listener, self.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::{BUFFER, BUFFERS, MAX_HEAD, buffer};

    #[test]
    fn many_connections_have_small_buffers() {
        assert_eq!((buffer(0), buffer(BUFFERS / BUFFER)), (BUFFER, BUFFER));
        assert_eq!(buffer(1024), 128 * 1024);
        assert_eq!(buffer(1_000_000), MAX_HEAD);
    }
}
