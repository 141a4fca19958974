//! What the proxy should serve now: plain data that the state builds, whole, at every change.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::config::model::{Attributes, ProxyListener, ProxySettings};

/// Everything that the proxy should serve. Whatever is not in here ends: a listener gracefully, the
/// requests at a target at once, since a target stays in here (as [`TargetState::Draining`]) until
/// its deregistration delay is over.
#[derive(Debug, Clone, Default)]
pub struct Routes {
    /// By the address that clients connect to.
    pub listeners: BTreeMap<SocketAddr, ListenerRoute>,
    /// Target groups by name: at least those that a listener's actions name.
    pub groups: BTreeMap<Arc<str>, GroupRoute>,
    /// Key of the stickiness cookies, equal on all nodes that should read each other's.
    pub cookie_key: [u8; 32],
}

/// An address with a port that clients connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerRoute {
    /// Name of the load balancer.
    pub load_balancer: Arc<str>,
    /// What clients find there. Shared by all addresses of the load balancer.
    pub listener: Arc<ProxyListener>,
    /// What holds for all listeners of the load balancer. Shared by them.
    pub attributes: Arc<Attributes>,
    /// Zone of the address, if it has one.
    pub zone: Option<Arc<str>>,
    /// Whether requests that come here may go to targets of other zones while one in `zone` could
    /// take them. Of no meaning without a zone.
    pub cross_zone: bool,
}

/// A target group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupRoute {
    /// How its targets are spoken to.
    pub settings: ProxySettings,
    /// How long the share of a target grows that joins others; zero: it is full at once. Targets'
    /// shares are in [`TargetRoute::share`], so this is for what is remembered about them only.
    pub slow_start: Duration,
    /// Its targets, (address, port) is unique.
    pub targets: Vec<TargetRoute>,
}

/// A target of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetRoute {
    /// Where it is.
    pub address: SocketAddr,
    /// Its share relative to the group's other targets, 0 to 999; 0 takes no new requests.
    pub weight: u32,
    /// How much of its weight counts during slow start, in steps of [`crate::state`]'s: 1 to
    /// [`FULL_SHARE`].
    pub share: u32,
    /// Zone that it stands in; `None`: in every one.
    pub zone: Option<Arc<str>>,
    /// What it may get.
    pub state: TargetState,
}

/// The share of a target outside slow start.
pub const FULL_SHARE: u32 = 10;

/// What a target may get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetState {
    /// Requests. Where every target of a group is unhealthy, the state says so of all of them.
    InService,
    /// It was deregistered: requests in progress end, and sticky clients keep it, until it is no
    /// longer in the routes.
    Draining,
    /// No new requests; those in progress end.
    OutOfService,
}

impl ListenerRoute {
    /// The zone whose targets are preferred, if one is.
    pub fn preferred_zone(&self) -> Option<&str> {
        if self.cross_zone { None } else { self.zone.as_deref() }
    }
}
