//! The target groups that a listener or a rule forwards to.

use super::model::WeightedTargetGroup;
use super::reader::{Table, Value};

/// A target group of a listener or a rule.
#[derive(Clone, Copy)]
pub(super) struct GroupDraft<'a> {
    /// Where the file has its name.
    pub(super) value: Value<'a>,
    pub(super) name: &'a str,
    pub(super) weight: u16,
}

impl From<&GroupDraft<'_>> for WeightedTargetGroup {
    fn from(draft: &GroupDraft<'_>) -> Self {
        Self { name: draft.name.to_owned(), weight: draft.weight }
    }
}

const GROUPS_HELP: &str = "write [{ name = \"NAME\", weight = 90 }, { name = \"OTHER\", weight = \
                           10 }], or target_group = \"NAME\"";
const NAME_HELP: &str = "write the name of a target group in quotes";
const MAX_WEIGHT: u32 = 999;
const DEFAULT_WEIGHT: u16 = 1;

/// `target_group = NAME`, or `target_groups`, of a listener that forwards packets.
pub(super) fn target_groups<'a>(table: &mut Table<'a>) -> Vec<GroupDraft<'a>> {
    match (table.optional("target_group"), table.optional("target_groups")) {
        (Some(value), None) => only_group(value),
        (None, Some(value)) => weighted_groups(value),
        (Some(_), Some(value)) => {
            let message = "this listener has both `target_group` and `target_groups`";
            value.error(message, "leave one of them out");
            Vec::new()
        }
        (None, None) => {
            let message = format!("{} has no `target_group`", table.name());
            table.error(message, "add target_group = \"NAME\", where its packets go");
            Vec::new()
        }
    }
}

/// One group, which gets everything.
pub(super) fn only_group(value: Value<'_>) -> Vec<GroupDraft<'_>> {
    let name = value.string(NAME_HELP);
    name.map(|name| GroupDraft { value, name, weight: DEFAULT_WEIGHT }).into_iter().collect()
}

/// Groups and their shares.
pub(super) fn weighted_groups<'a>(value: Value<'a>) -> Vec<GroupDraft<'a>> {
    let Some(items) = value.items(GROUPS_HELP) else { return Vec::new() };
    let key = value.key();
    let mut groups: Vec<GroupDraft<'a>> = Vec::new();
    for item in &items {
        let Some(group) = weighted_group(*item) else { continue };
        if groups.iter().any(|other| other.name == group.name) {
            let message = format!("`{key}` has {} twice", group.value.quote());
            group.value.error(message, "leave one out");
        }
        groups.push(group);
    }
    let nowhere = "so packets have nowhere to go";
    if items.is_empty() {
        value.error(format!("`{key}` is [], {nowhere}"), GROUPS_HELP);
    } else if groups.len() == items.len() && groups.iter().all(|group| group.weight == 0) {
        let message = format!("every weight in `{key}` is 0, {nowhere}");
        value.error(message, format!("give one of them a weight from 1 to {MAX_WEIGHT}"));
    }
    groups
}

fn weighted_group<'a>(item: Value<'a>) -> Option<GroupDraft<'a>> {
    let mut table = item.table("this target group", GROUPS_HELP)?;
    let weight = match table.optional("weight") {
        Some(weight) => weight.integer(0..=MAX_WEIGHT).and_then(|weight| weight.try_into().ok()),
        None => Some(DEFAULT_WEIGHT),
    };
    let value = table.required("name", "add name = \"NAME\"");
    let name = value.and_then(|value| value.string(NAME_HELP));
    table.finish();
    Some(GroupDraft { value: value?, name: name?, weight: weight? })
}
