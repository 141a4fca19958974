//! Whether a packet's flow may come in: by a rule, or because the target opened it.

use crate::flow::{REFRESH, TCP};
use crate::verdict::DropReason;

use super::Step;
use super::tables::{DENIED, OPEN, TargetTables, space};

/// Rules first: most of what reaches a target is what it is there for.
#[inline(never)]
pub fn judge<T: TargetTables>(tables: &T, step: &mut Step) -> u32 {
    let now = tables.now();
    if is_allowed(tables, step) {
        if step.flow.protocol != TCP {
            note_admitted(tables, step, now);
        }
        Step::PASS
    } else if is_own(tables, step, now) {
        Step::PASS
    } else {
        step.argument = DropReason::SecurityGroupDenied as u32;
        Step::DROP
    }
}

#[inline(always)]
fn is_allowed<T: TargetTables>(tables: &T, step: &Step) -> bool {
    let class = tables.class(step.class_index);
    match class {
        DENIED => false,
        OPEN => true,
        _ => {
            tables.admits(class as u32 | space::SOURCE, step.flow.source)
                || tables.admits(class as u32 | step.space, step.via)
        }
    }
}

/// What the target sends back on this flow opens none. A TCP connection shows by its SYN who opened
/// it, other protocols do not.
#[inline(always)]
fn note_admitted<T: TargetTables>(tables: &T, step: &Step, now: u64) {
    let before = tables.admitted(&step.flow);
    if before.is_none_or(|before| now.saturating_sub(before) > REFRESH) {
        tables.remember_admitted(&step.flow, now);
    }
}

#[inline(always)]
fn is_own<T: TargetTables>(tables: &T, step: &Step, now: u64) -> bool {
    let Some(mut flow) = tables.own_flow(&step.flow) else { return false };
    if !flow.is_alive(now, step.flow.protocol) {
        return false;
    }
    // What ends is kept alive by the target's own packets only.
    if flow.closing == 0 && now.saturating_sub(flow.last_seen) > REFRESH {
        flow.last_seen = now;
        tables.remember_own(&step.flow, &flow);
    }
    true
}
