//! `[[load_balancer.NAME.listener.rule]]`.

use std::collections::BTreeMap;

use super::super::forward::GroupDraft;
use super::super::model::{Action, Rule};
use super::super::reader::{Table, Value};
use super::action::{self, Place};
use super::{condition, transform};

/// AWS's quota of a load balancer's rules, without the defaults.
const MANY: usize = 100;
const MAX_PRIORITY: u32 = 50_000;

/// Rules by priority, and the groups that they name.
#[derive(Default)]
pub(super) struct Draft<'a> {
    pub(super) rules: Vec<Rule>,
    pub(super) groups: Vec<GroupDraft<'a>>,
}

pub(super) fn read<'a>(value: Value<'a>, place: Place) -> Draft<'a> {
    let help = "write a section [[load_balancer.NAME.listener.rule]] for each rule, with two \
                brackets";
    let items = value.items(help).unwrap_or_default();
    if items.len() > MANY {
        value.warning(
            format!("this listener has {} rules; AWS's quota is {MANY}", items.len()),
            "a request may be compared with every one: put conditions of one action into one rule",
        );
    }
    let mut draft = Draft::default();
    let mut lines = BTreeMap::new();
    for item in items {
        let Some(mut table) = item.table("this rule", help) else { continue };
        let priority = table.required("priority", "add priority = 10, from 1 to 50000");
        let priority = priority.and_then(|value| {
            let priority = u16::try_from(value.integer(1..=MAX_PRIORITY)?).ok()?;
            if let Some(line) = lines.insert(priority, value.line()) {
                let message = format!("two rules of this listener have priority {priority}");
                value.error(message, format!("give one another; the first is in line {line}"));
            }
            Some(priority)
        });
        let read = rule(&mut table, place, &mut draft.groups);
        table.finish();
        if let (Some(priority), Some(rule)) = (priority, read) {
            draft.rules.push(Rule { priority, ..rule });
        }
    }
    draft.rules.sort_by_key(|rule| rule.priority);
    draft
}

/// Everything but its priority.
fn rule<'a>(table: &mut Table<'a>, place: Place, groups: &mut Vec<GroupDraft<'a>>) -> Option<Rule> {
    let conditions = condition::read(table);
    if conditions.given == 0 {
        let message = format!("{} has no condition", table.name());
        let help = format!(
            "add {}; what holds for all other requests is the listener's own action",
            condition::KEYS
        );
        table.error(message, help);
    }
    let (transforms, first) = transform::read(table);
    let draft = action::read(table, place);
    groups.extend(draft.groups);
    if let (Some(value), Some(Action::Redirect(_) | Action::FixedResponse(_))) =
        (first, &draft.action)
    {
        value.error(
            format!("`{}` has no meaning in a rule that does not forward", value.key()),
            "leave it out: it changes what a target is asked",
        );
    }
    let conditions = conditions.conditions;
    Some(Rule { priority: 0, conditions, transforms, action: draft.action? })
}
