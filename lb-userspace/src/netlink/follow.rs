//! Following the kernel: one task reads notifications, keeps the picture and sends it on.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::channel::mpsc::UnboundedReceiver;
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::sys::SocketAddr;
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::network::{LinkLayer, Network};
use super::next_hops::{Neighbours, Route, poke, resolve, route_to};
use super::probe::{Prober, RequestLimiter};
use super::{addresses, links};

const GROUPS: [MulticastGroup; 8] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];
/// Asked of the kernel for the notifications; it grants what `net.core.rmem_max` allows.
const RECEIVE_BUFFER: i32 = 4 << 20;
/// Notifications come in flocks: what arrives within this time is one change.
const COALESCE: Duration = Duration::from_millis(20);
/// However fast notifications come, reading takes at most one part in so many of the time.
const READING_SHARE: u32 = 5;
/// A change is never kept back longer than this.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// The kernel answers at once; this guards against an answer that was lost.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// How often due attempts and failed reads are looked for.
const TICK: Duration = Duration::from_secs(1);
/// Requests waiting at most; further ones are dropped, as the packets that cause them go on.
const REQUESTS: usize = 256;

/// What the owner of the state gets to know.
#[derive(Debug, Clone)]
pub enum NetworkEvent {
    /// The network, fully read; sent at the start and whenever it differs from the last one sent.
    Snapshot(Arc<Network>),
    /// Some route, rule, link, address or usable neighbour changed, of a wanted destination or not:
    /// whatever was cached of the kernel's forwarding decisions is void. Comes before the
    /// snapshot of the same change.
    RoutesChanged,
    /// The kernel's notifications ended; nothing more will come. Start anew.
    Lost,
}

/// The observer of the machine's network. Dropping it ends its task.
#[derive(Debug)]
pub struct Netlink {
    wanted: watch::Sender<BTreeSet<IpAddr>>,
    requests: mpsc::Sender<IpAddr>,
}

impl Netlink {
    /// Starts to observe the network namespace of the calling thread. Must be called within a tokio
    /// runtime. The task ends when the returned value or the receiver of `events` is dropped.
    ///
    /// # Errors
    /// When the kernel gives no netlink socket.
    pub fn start(events: mpsc::Sender<NetworkEvent>) -> io::Result<Self> {
        // Two sockets: a flood of notifications must not push out the answers to requests.
        let (mut notifier, _, notifications) = rtnetlink::new_multicast_connection(&GROUPS)?;
        rtnetlink::sys::AsyncSocket::socket_mut(notifier.socket_mut())
            .set_rx_buf_sz(RECEIVE_BUFFER)?;
        let (requester, handle, _) = rtnetlink::new_connection()?;
        let mut connections = JoinSet::new();
        connections.spawn(notifier);
        connections.spawn(requester);

        let (wanted, wanted_receiver) = watch::channel(BTreeSet::new());
        let (requests, requests_receiver) = mpsc::channel(REQUESTS);
        let follower = Follower {
            picture: Picture::new(handle),
            events,
            notifications,
            wanted: wanted_receiver,
            requests: requests_receiver,
            limiter: RequestLimiter::default(),
            _connections: connections,
        };
        tokio::spawn(follower.run());
        Ok(Self { wanted, requests })
    }

    /// Replaces the set of destinations that are kept resolved; the next snapshot has all of them.
    /// The kernel's neighbour table must hold them: `net.ipv4.neigh.default.gc_thresh3` is 1024 by
    /// default.
    pub fn want(&self, destinations: BTreeSet<IpAddr>) {
        self.wanted.send_if_modified(|wanted| {
            let changed = *wanted != destinations;
            *wanted = destinations;
            changed
        });
    }

    /// Has the kernel resolve the next hop to `destination` at once, wanted or not; at most once a
    /// second for each address. Never waits.
    pub fn resolve_now(&self, destination: IpAddr) {
        // Full: others are being resolved, and the next packet asks again.
        let _ = self.requests.try_send(destination);
    }
}

struct Follower {
    picture: Picture,
    events: mpsc::Sender<NetworkEvent>,
    notifications: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    wanted: watch::Receiver<BTreeSet<IpAddr>>,
    requests: mpsc::Receiver<IpAddr>,
    limiter: RequestLimiter,
    /// Ended with this task.
    _connections: JoinSet<()>,
}

impl Follower {
    async fn run(mut self) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if self.publish().await.is_err() {
                return;
            }
            tokio::select! {
                notification = self.notifications.next() => {
                    let Some((message, _)) = notification else {
                        tracing::error!("the kernel's network notifications ended");
                        let _ = self.events.send(NetworkEvent::Lost).await;
                        return;
                    };
                    self.picture.note(&message.payload);
                    self.gather().await;
                }
                changed = self.wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let wanted = self.wanted.borrow_and_update().clone();
                    self.picture.want(wanted);
                }
                Some(destination) = self.requests.recv() => self.resolve_now(destination).await,
                _ = tick.tick() => self.picture.probe().await,
                () = self.events.closed() => return,
            }
        }
    }

    /// Lets the rest of a flock arrive; longer when reading takes long.
    async fn gather(&mut self) {
        let pause = self.picture.last_read_took * READING_SHARE;
        let pause = sleep(pause.clamp(COALESCE, LONGEST_PAUSE));
        tokio::pin!(pause);
        loop {
            tokio::select! {
                () = &mut pause => break,
                // Packets are being dropped for want of it.
                Some(destination) = self.requests.recv() => self.resolve_now(destination).await,
            }
        }
        while let Ok((message, _)) = self.notifications.try_recv() {
            self.picture.note(&message.payload);
        }
    }

    async fn resolve_now(&mut self, destination: IpAddr) {
        if self.limiter.admit(destination, Instant::now()) {
            self.picture.resolve_now(destination).await;
        }
    }

    /// Reads what changed and sends it on; fails when nobody listens any more.
    async fn publish(&mut self) -> Result<(), mpsc::error::SendError<NetworkEvent>> {
        if std::mem::take(&mut self.picture.routes_changed) {
            self.events.send(NetworkEvent::RoutesChanged).await?;
        }
        if !self.picture.is_stale() {
            return Ok(());
        }
        match timeout(READ_TIMEOUT, self.picture.read()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "reading the network failed; trying again");
                sleep(TICK).await;
                return Ok(());
            }
            Err(_) => {
                tracing::warn!("reading the network timed out; trying again");
                return Ok(());
            }
        }
        if let Some(network) = self.picture.changed() {
            self.events.send(NetworkEvent::Snapshot(network)).await?;
        }
        // New destinations and vanished neighbours are asked for at once.
        self.picture.probe().await;
        Ok(())
    }
}

/// What has to be read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stale {
    links: bool,
    addresses: bool,
    neighbours: bool,
    routes: bool,
    /// Nothing to read, but the next hops are to be put together anew.
    next_hops: bool,
}

impl Stale {
    const NOTHING: Self =
        Self { links: false, addresses: false, neighbours: false, routes: false, next_hops: false };
    const ALL: Self =
        Self { links: true, addresses: true, neighbours: true, routes: true, next_hops: true };
}

/// What is known of the kernel's tables. Links and addresses are read whole when one changed (few
/// changes, few entries); neighbours follow each notification; a route is read for each wanted
/// destination when any route changed.
struct Picture {
    handle: Handle,
    network: Network,
    neighbours: Neighbours,
    routes: HashMap<IpAddr, Route>,
    wanted: BTreeSet<IpAddr>,
    prober: Prober,
    stale: Stale,
    routes_changed: bool,
    last_read_took: Duration,
    sent: Option<Arc<Network>>,
}

impl Picture {
    fn new(handle: Handle) -> Self {
        Self {
            handle,
            network: Network::default(),
            neighbours: Neighbours::default(),
            routes: HashMap::new(),
            wanted: BTreeSet::new(),
            prober: Prober::default(),
            stale: Stale::ALL,
            routes_changed: false,
            last_read_took: Duration::ZERO,
            sent: None,
        }
    }

    fn is_stale(&self) -> bool {
        self.stale != Stale::NOTHING
    }

    fn note(&mut self, payload: &NetlinkPayload<RouteNetlinkMessage>) {
        use RouteNetlinkMessage as Message;
        let message = match payload {
            NetlinkPayload::InnerMessage(message) => message,
            NetlinkPayload::Overrun(_) => {
                tracing::debug!("network notifications were lost; reading everything");
                self.stale = Stale::ALL;
                self.routes_changed = true;
                return;
            }
            _ => return,
        };
        let forwarding_changed = match message {
            // Routes go and come with links and addresses, not always with notifications of
            // their own.
            Message::NewLink(_) | Message::DelLink(_) => {
                self.stale.links = true;
                self.stale.routes = true;
                true
            }
            Message::NewAddress(_) | Message::DelAddress(_) => {
                self.stale.addresses = true;
                self.stale.routes = true;
                true
            }
            Message::NewRoute(_)
            | Message::DelRoute(_)
            | Message::NewRule(_)
            | Message::DelRule(_) => {
                self.stale.routes = true;
                true
            }
            Message::NewNeighbour(message) => self.neighbours.note_new(message),
            Message::DelNeighbour(message) => self.neighbours.note_gone(message),
            _ => false,
        };
        self.routes_changed |= forwarding_changed;
        self.stale.next_hops |= forwarding_changed;
    }

    fn want(&mut self, wanted: BTreeSet<IpAddr>) {
        self.routes.retain(|destination, _| wanted.contains(destination));
        self.wanted = wanted;
        self.stale.next_hops = true;
    }

    /// Reads what is stale. What could not be read stays stale.
    async fn read(&mut self) -> io::Result<()> {
        let start = Instant::now();
        if self.stale.links {
            self.network.interfaces = links::read(&self.handle).await?;
            self.stale.links = false;
        }
        if self.stale.addresses {
            self.network.addresses = addresses::read(&self.handle).await?;
            self.stale.addresses = false;
        }
        if self.stale.neighbours {
            self.neighbours = Neighbours::read(&self.handle).await?;
            self.stale.neighbours = false;
        }
        if std::mem::take(&mut self.stale.routes) {
            self.routes.clear();
        }
        for destination in &self.wanted {
            if !self.routes.contains_key(destination) {
                let route = route_to(&self.handle, *destination).await?;
                self.routes.insert(*destination, route);
            }
        }
        self.resolve_all();
        self.stale.next_hops = false;
        self.last_read_took = start.elapsed();
        Ok(())
    }

    fn resolve_all(&mut self) {
        let interfaces = &self.network.interfaces;
        self.network.next_hops = self
            .routes
            .iter()
            .map(|(address, route)| (*address, resolve(*route, interfaces, &self.neighbours)))
            .collect();
    }

    /// The picture, if it is not the one last sent.
    fn changed(&mut self) -> Option<Arc<Network>> {
        if self.sent.as_deref() == Some(&self.network) {
            return None;
        }
        let network = Arc::new(self.network.clone());
        self.sent = Some(Arc::clone(&network));
        Some(network)
    }

    /// Has the kernel resolve and verify what is due.
    async fn probe(&mut self) {
        let neighbours: Vec<_> = self
            .routes
            .values()
            .filter_map(|route| match route {
                Route::Via { neighbour, .. } if self.can_ask(neighbour.ifindex) => {
                    Some((*neighbour, self.neighbours.get(*neighbour).map(|entry| entry.state)))
                }
                _ => None,
            })
            .collect();
        for key in self.prober.due(Instant::now(), neighbours) {
            if let Err(error) = poke(&self.handle, key).await {
                tracing::debug!(address = %key.address, ifindex = key.ifindex, %error,
                    "the kernel does not resolve the neighbour");
            }
        }
    }

    fn can_ask(&self, ifindex: u32) -> bool {
        self.network
            .interfaces
            .get(&ifindex)
            .is_some_and(|interface| interface.up && interface.layer == LinkLayer::Ethernet)
    }

    async fn resolve_now(&mut self, destination: IpAddr) {
        let route = match self.routes.get(&destination) {
            Some(route) => Ok(*route),
            None => route_to(&self.handle, destination).await,
        };
        let Ok(Route::Via { neighbour, .. }) = route else {
            return;
        };
        let usable =
            self.neighbours.get(neighbour).is_some_and(|entry| entry.usable_mac().is_some());
        if usable || !self.can_ask(neighbour.ifindex) {
            return;
        }
        if let Err(error) = poke(&self.handle, neighbour).await {
            tracing::debug!(%destination, %error, "the kernel does not resolve the neighbour");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled_picture() -> Picture {
        let (_connection, handle, _) = rtnetlink::new_connection().unwrap();
        Picture { stale: Stale::NOTHING, ..Picture::new(handle) }
    }

    #[tokio::test]
    async fn lost_notifications_make_everything_stale() {
        let mut picture = settled_picture();
        picture.note(&NetlinkPayload::Overrun(Vec::new()));
        assert_eq!(picture.stale, Stale::ALL);
        assert!(picture.routes_changed);
    }

    #[tokio::test]
    async fn a_neighbour_that_nobody_can_use_changes_nothing() {
        let mut picture = settled_picture();
        let message = netlink_packet_route::neighbour::NeighbourMessage::default();
        picture.note(&NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message)));
        assert!(!picture.is_stale() && !picture.routes_changed);
    }

    #[tokio::test]
    async fn a_route_change_is_told_and_read() {
        let mut picture = settled_picture();
        let message = netlink_packet_route::route::RouteMessage::default();
        picture.note(&NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRoute(message)));
        assert!(picture.stale.routes && picture.routes_changed);
    }

    #[tokio::test]
    async fn an_equal_picture_is_not_sent_again() {
        let mut picture = settled_picture();
        assert!(picture.changed().is_some());
        assert!(picture.changed().is_none());
    }
}
