//! What becomes of a request: exactly one of a listener's or a rule's keys says it.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::super::forward::{GroupDraft, only_group, weighted_groups};
use super::super::model::{Action, FixedResponse, Forward, ProxyProtocol};
use super::super::reader::{Table, Value, Wrong};
use super::redirect;

/// Where an action stands.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) protocol: ProxyProtocol,
    /// `None` where it could not be read.
    pub(super) port: Option<u16>,
    /// The key of weighted groups: `target_groups` of a listener, `forward` of a rule.
    pub(super) groups_key: &'static str,
}

/// An action, and the groups that it names; `None` where it could not be read.
pub(super) struct Draft<'a> {
    pub(super) action: Option<Action>,
    pub(super) groups: Vec<GroupDraft<'a>>,
}

/// AWS's bounds of the stickiness of groups and targets.
pub(super) const STICKY_FOR: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(7 * 24 * 3600);

pub(super) fn read<'a>(table: &mut Table<'a>, place: Place) -> Draft<'a> {
    let keys = ["target_group", place.groups_key, "redirect", "fixed_response"];
    let given: Vec<Value<'a>> = keys.into_iter().filter_map(|key| table.optional(key)).collect();
    let stickiness = table.optional("target_group_stickiness");
    let nothing = Draft { action: None, groups: Vec::new() };
    match given[..] {
        [] => {
            let message = format!("{} has no action", table.name());
            let help = if place.protocol == ProxyProtocol::Tls {
                "add target_group = \"NAME\", where its connections go"
            } else {
                "add target_group = \"NAME\", redirect = { ... } or fixed_response = { ... }: what \
                 becomes of a request"
            };
            table.error(message, help);
            nothing
        }
        [only] => one(only, stickiness, place),
        [first, second, ..] => {
            let (name, [first, second]) = (table.name(), [first, second].map(|value| value.key()));
            let message = format!("{name} has both `{first}` and `{second}`");
            given[1].error(message, "leave one of them out: a request can have one action");
            nothing
        }
    }
}

fn one<'a>(value: Value<'a>, stickiness: Option<Value<'a>>, place: Place) -> Draft<'a> {
    let key = value.key();
    if key == place.groups_key {
        let groups = weighted_groups(value);
        let stickiness = stickiness.and_then(|value| value.whole_seconds(STICKY_FOR));
        return forward(groups, stickiness);
    }
    if let Some(stickiness) = stickiness {
        let message = format!("`target_group_stickiness` has no meaning with `{key}`");
        let help = format!(
            "leave it out: only several groups, in `{}`, are chosen from",
            place.groups_key
        );
        stickiness.error(message, help);
    }
    match key {
        "target_group" => forward(only_group(value), None),
        "redirect" => {
            let action = redirect::read(value, place).map(Action::Redirect);
            Draft { action, groups: Vec::new() }
        }
        _ => {
            let action = fixed_response(value).map(Action::FixedResponse);
            Draft { action, groups: Vec::new() }
        }
    }
}

fn forward(groups: Vec<GroupDraft<'_>>, stickiness: Option<Duration>) -> Draft<'_> {
    let target_groups: Vec<_> = groups.iter().map(Into::into).collect();
    // Why there is none was said where it was read.
    let action = (!target_groups.is_empty())
        .then_some(Action::Forward(Forward { target_groups, stickiness }));
    Draft { action, groups }
}

const RESPONSE_HELP: &str = "write fixed_response = { status = 503, content_type = \"text/plain\", \
                             body = \"later\" }";
/// AWS's.
const MAX_BODY: usize = 1024;
/// AWS's.
const CONTENT_TYPES: [&str; 5] =
    ["text/plain", "text/css", "text/html", "application/javascript", "application/json"];

fn fixed_response(value: Value<'_>) -> Option<FixedResponse> {
    let mut table = value.table("this fixed response", RESPONSE_HELP)?;
    let status = table.required("status", "add status = 200, or another from 200 to 599");
    let content_type = match table.optional("content_type") {
        Some(value) => value.choice(&CONTENT_TYPES.map(|name| (name, name)), &[]),
        None => Some(CONTENT_TYPES[0]),
    };
    let body = match table.optional("body") {
        Some(value) => body(value),
        None => Some(String::new()),
    };
    table.finish();
    Some(FixedResponse {
        status: status.and_then(response_status)?,
        content_type: content_type?.to_owned(),
        body: body?,
    })
}

/// 200 to 299 or 400 to 599.
fn response_status(value: Value<'_>) -> Option<u16> {
    let status = value.integer(200..=599)?;
    if (300..400).contains(&status) {
        value.refuse(
            "write a status from 200 to 299 or 400 to 599; redirect = { ... } is for 301 and 302",
        );
        return None;
    }
    u16::try_from(status).ok()
}

fn body(value: Value<'_>) -> Option<String> {
    let help = format!("write a text of at most {MAX_BODY} bytes in quotes");
    value.parsed(&help, |body| {
        if body.len() <= MAX_BODY {
            return Ok(body.to_owned());
        }
        Err(Wrong::new(format!("`body` has {} bytes, {} is the most", body.len(), MAX_BODY), &help))
    })
}
