//! Which group and which target a request gets: the ones its cookies name, else the next in turn.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use hyper::header::{HeaderMap, SET_COOKIE};

use super::connection::Connection;
use super::cookies::{Cookies, Kind, has_cookie, sets_cookie, takes_same_site};
use super::errors::ElbError;
use super::rules::Decision;
use super::table::{Group, Groups, Served, Target};
use crate::config::model::{CookieStickiness, Forward};

/// What was chosen.
#[derive(Debug)]
pub struct Chosen {
    /// The group.
    pub group: Arc<Group>,
    /// The target; `None`: no target of the group takes requests.
    pub target: Option<Arc<Target>>,
}

/// Chooses for a request.
///
/// # Errors
/// If there is no such group.
pub fn choose(
    connection: &Connection,
    served: &Served,
    decision: &Decision,
    forward: &Forward,
    headers: &HeaderMap,
) -> Result<Chosen, ElbError> {
    let groups = connection.worker.groups.load();
    let kept = forward.stickiness.and_then(|_| {
        let name =
            groups.cookies()?.group(headers, &served.route.load_balancer, SystemTime::now())?;
        let is_here = forward.target_groups.iter().any(|it| it.name == name);
        if is_here { groups.get(&name) } else { None }
    });
    let group = match kept {
        Some(group) => group,
        None => next_group(&groups, served, decision.place, forward)
            .ok_or(ElbError::ServiceUnavailable)?,
    };
    let target = kept_target(&groups, group, headers)
        .and_then(|address| group.kept(address))
        .or_else(|| group.pick(served.route.preferred_zone()));
    Ok(Chosen { group: group.clone(), target })
}

/// The next group in turn, and its next target in turn. `place` is the decision's.
pub fn in_turn(
    groups: &Groups,
    served: &Served,
    place: usize,
    forward: &Forward,
) -> Option<Chosen> {
    let group = next_group(groups, served, place, forward)?.clone();
    let target = group.pick(served.route.preferred_zone());
    Some(Chosen { group, target })
}

fn next_group<'a>(
    groups: &'a Groups,
    served: &Served,
    place: usize,
    forward: &Forward,
) -> Option<&'a Arc<Group>> {
    let turn = served.turns.get(place)?;
    let chosen = turn.cycle.next(&turn.turn)?;
    groups.get(&forward.target_groups.get(chosen)?.name)
}

/// The target that the client's cookies name.
fn kept_target(groups: &Groups, group: &Group, headers: &HeaderMap) -> Option<SocketAddr> {
    let kind = match group.settings.stickiness.as_ref()? {
        CookieStickiness::LbCookie { .. } => Kind::Target,
        CookieStickiness::AppCookie { name, .. } if has_cookie(headers, name) => Kind::Application,
        CookieStickiness::AppCookie { .. } => return None,
    };
    groups.cookies()?.target(headers, kind, &group.name, SystemTime::now())
}

/// What keeps a client where its request went: cookies that its answer gets.
#[derive(Debug)]
pub struct Keep {
    cookies: Arc<Cookies>,
    same_site: bool,
}

impl Keep {
    /// `None`: nothing keeps it.
    pub fn new(
        connection: &Connection,
        forward: &Forward,
        group: &Group,
        headers: &HeaderMap,
    ) -> Option<Self> {
        if forward.stickiness.is_none() && group.settings.stickiness.is_none() {
            return None;
        }
        let cookies = connection.worker.groups.load().cookies()?.clone();
        let same_site = connection.tls.is_some() && takes_same_site(headers);
        Some(Self { cookies, same_site })
    }

    /// Puts them into the answer's fields.
    pub fn put(
        &self,
        served: &Served,
        forward: &Forward,
        group: &Group,
        target: SocketAddr,
        headers: &mut HeaderMap,
    ) {
        let now = SystemTime::now();
        let mut all = Vec::new();
        if let Some(duration) = forward.stickiness {
            let load_balancer = &served.route.load_balancer;
            all.extend(self.cookies.keep_group(load_balancer, &group.name, duration, now));
        }
        let mut keep = |kind, duration| {
            let it = &self.cookies;
            all.extend(it.keep_target(kind, &group.name, target, duration, now, self.same_site));
        };
        match &group.settings.stickiness {
            Some(CookieStickiness::LbCookie { duration }) => keep(Kind::Target, *duration),
            Some(CookieStickiness::AppCookie { name, duration }) if sets_cookie(headers, name) => {
                keep(Kind::Application, *duration);
            }
            _ => {}
        }
        for cookie in all {
            headers.append(SET_COOKIE, cookie);
        }
    }
}
