//! Which group and which target a request gets.

use std::sync::Arc;

use super::connection::Connection;
use super::errors::ElbError;
use super::rules::Decision;
use super::table::{Group, Groups, Served, Target};
use crate::config::model::Forward;

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
) -> Result<Chosen, ElbError> {
    let groups = connection.worker.groups.load();
    in_turn(&groups, served, decision.place, forward).ok_or(ElbError::ServiceUnavailable)
}

/// The next group in turn, and its next target in turn. `place` is the decision's.
pub fn in_turn(
    groups: &Groups,
    served: &Served,
    place: usize,
    forward: &Forward,
) -> Option<Chosen> {
    let turn = served.turns.get(place)?;
    let chosen = turn.cycle.next(&turn.turn)?;
    let group = groups.get(&forward.target_groups.get(chosen)?.name)?.clone();
    let target = group.pick(served.route.preferred_zone());
    Some(Chosen { group, target })
}
