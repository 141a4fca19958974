//! What the agent serves itself, beside the kernel: the proxy, and the names of load balancers.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZero;
use std::thread::available_parallelism;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::time::sleep;
use tracing::{info, warn};

use crate::api::snapshot::Snapshot;
use crate::dns::{Responder, Zone};
use crate::proxy::routes::Routes;
use crate::proxy::{Proxy, descriptors};
use crate::state::State;

use super::port_holder::{has_unsent, holder};

/// How long requests in progress may take when the agent ends.
pub const GRACE: Duration = Duration::from_secs(20);

/// Between two looks whether clients have everything.
const PAUSE: Duration = Duration::from_millis(50);

/// The proxy and the responder, each once it has something to do.
pub struct Serving {
    proxy: Option<Proxy>,
    names: Option<Names>,
    /// Key of stickiness cookies where the configuration has none.
    cookie_key: [u8; 32],
    /// What does not work, and is tried again.
    problems: Vec<String>,
    /// What is not as it should be and mends itself once its cause is gone.
    defects: Vec<String>,
}

struct Names {
    listen: SocketAddr,
    responder: Option<Responder>,
    zone: Zone,
}

impl Serving {
    /// Serves nothing yet.
    pub fn new() -> Self {
        Self {
            proxy: None,
            names: None,
            cookie_key: rand::random(),
            problems: Vec::new(),
            defects: Vec::new(),
        }
    }

    /// What does not work now.
    pub fn problems(&self) -> impl Iterator<Item = &String> {
        self.problems.iter().chain(&self.defects)
    }

    /// Looks at what the proxy says of itself, and tries again what does not work.
    pub fn look(&mut self, state: &State) {
        if self.problems.is_empty() {
            self.follow_defects();
        } else {
            self.follow(state);
        }
    }

    fn follow_defects(&mut self) {
        let defects = self.proxy.as_ref().map(Proxy::defects).unwrap_or_default();
        tell_changes(&self.defects, &defects);
        self.defects = defects;
    }

    /// Serves what the state says. Problems are told to the log when they come and go.
    pub fn follow(&mut self, state: &State) {
        let mut problems = self.follow_routes(state);
        problems.extend(self.follow_names(state));
        tell_changes(&self.problems, &problems);
        self.problems = problems;
        self.follow_defects();
    }

    fn follow_routes(&mut self, state: &State) -> Vec<String> {
        let key = state.config().agent.cookie_key.as_ref();
        let routes = state.routes(key.map_or(self.cookie_key, |key| key.0));
        match self.proxy_for(&routes) {
            Ok(Some(proxy)) => {
                let problems = proxy.apply(routes);
                problems.iter().map(|it| tell(it.listener, &it.reason)).collect()
            }
            Ok(None) => Vec::new(),
            Err(error) => vec![format!("the proxy cannot be started: {error}")],
        }
    }

    /// The proxy, if it runs or is needed.
    fn proxy_for(&mut self, routes: &Routes) -> std::io::Result<Option<&Proxy>> {
        if self.proxy.is_none() && !routes.listeners.is_empty() {
            match descriptors::raise() {
                Ok(limit) => info!(limit, "descriptors for connections"),
                Err(error) => warn!(%error, "the limit of descriptors stays as it is"),
            }
            let workers = available_parallelism().map_or(1, NonZero::get);
            self.proxy = Some(Proxy::start(workers)?);
        }
        Ok(self.proxy.as_ref())
    }

    fn follow_names(&mut self, state: &State) -> Option<String> {
        let Some(dns) = &state.config().dns else {
            self.names = None;
            return None;
        };
        let before = self.names.take();
        let names = state.names();
        let servers = servers(dns.listen, state);
        let same = |it: &Names| it.listen == dns.listen && it.zone.origin == dns.zone;
        let mut names = match before.filter(same) {
            Some(mut known) => {
                if known.zone.names != names || known.zone.servers != servers {
                    let serial = known.zone.serial.wrapping_add(1);
                    known.zone = Zone { serial, names, servers, ..known.zone };
                }
                known
            }
            None => {
                let zone = Zone { origin: dns.zone.clone(), serial: serial(), servers, names };
                Names { listen: dns.listen, responder: None, zone }
            }
        };
        let problem = match &names.responder {
            Some(responder) => {
                responder.tell(names.zone.clone());
                None
            }
            None => match Responder::start(dns.listen, names.zone.clone()) {
                Ok(responder) => {
                    names.responder = Some(responder);
                    None
                }
                Err(error) => Some(tell_dns(dns.listen, &error)),
            },
        };
        self.names = Some(names);
        problem
    }

    /// Which of these listeners, which are no longer served, are over: clients have everything.
    pub fn ended(&self, ending: impl Iterator<Item = SocketAddr>) -> BTreeSet<SocketAddr> {
        let busy = self.proxy.as_ref().map(Proxy::places).unwrap_or_default();
        // The kernel's table is long: it is read only if it matters.
        let ended = ending.filter(|at| !busy.contains(at));
        ended.filter(|at| !has_unsent(|unsent| unsent == *at)).collect()
    }

    /// Opens logs again that were renamed.
    pub fn reopen_logs(&self) {
        if let Some(proxy) = &self.proxy {
            proxy.reopen_logs();
        }
    }

    /// Puts what the proxy counted into the picture.
    pub fn complete(&self, snapshot: &mut Snapshot) -> serde_json::Result<()> {
        let Some(proxy) = &self.proxy else { return Ok(()) };
        let counters = proxy.counters();
        for balancer in &mut snapshot.status.load_balancers {
            let counted = counters.load_balancers.get(balancer.name.as_str());
            balancer.metrics = counted.map(serde_json::to_value).transpose()?;
        }
        for target in &mut snapshot.targets {
            let group = counters.target_groups.get(target.target_group.as_str());
            let at = SocketAddr::new(target.address, target.port);
            let counted = group.and_then(|group| group.targets.get(&at));
            target.metrics = counted.map(serde_json::to_value).transpose()?;
        }
        Ok(())
    }

    /// Lets requests in progress end: until the clients at these addresses have what was sent.
    pub async fn end(self, addresses: BTreeSet<IpAddr>) {
        drop(self.names);
        let Some(proxy) = self.proxy else { return };
        let begun = Instant::now();
        proxy.end(GRACE).await;
        // The kernel has it still, and sends it for as long as the address is there.
        while begun.elapsed() < GRACE && has_unsent(|at| addresses.contains(&at.ip())) {
            sleep(PAUSE).await;
        }
    }
}

fn tell_changes(before: &[String], now: &[String]) {
    for problem in now.iter().filter(|problem| !before.contains(problem)) {
        warn!("{problem}");
    }
    for problem in before.iter().filter(|problem| !now.contains(problem)) {
        info!("no longer so: {problem}");
    }
}

/// The name server's own addresses: where it listens, or all that clients may know it by.
fn servers(listen: SocketAddr, state: &State) -> Vec<IpAddr> {
    if !listen.ip().is_unspecified() {
        return vec![listen.ip()];
    }
    let own = state.network().addresses.keys();
    own.filter(|it| !it.is_loopback() && it.is_ipv4() == listen.is_ipv4()).copied().collect()
}

/// Serial numbers grow, also over restarts.
fn serial() -> u32 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs() as u32)
}

fn tell(listener: SocketAddr, reason: &str) -> String {
    format!("listener {listener} does not serve: {reason}{}; it is tried again", held(listener))
}

fn tell_dns(listen: SocketAddr, error: &std::io::Error) -> String {
    format!("names are not answered on {listen}: {error}{}; it is tried again", held(listen))
}

fn held(at: SocketAddr) -> String {
    holder(at).map_or_else(String::new, |who| format!(", {who} listens there"))
}
