//! `targets`, for humans.

use std::fmt::Write as _;
use std::net::SocketAddr;

use comfy_table::{Cell, Color};

use super::output::{self, Column, NOTHING, Style, bytes, count};
use crate::api::snapshot::Target;

pub(super) fn render(targets: &[Target], style: Style) -> String {
    if targets.is_empty() {
        return "no targets are registered\n".to_owned();
    }
    // Only where there is a proxy.
    let has_requests = targets.iter().any(|target| target.metrics.is_some());
    let mut columns = vec![
        Column::Text("TARGET GROUP"),
        Column::Text("TARGET"),
        Column::Text("ZONE"),
        Column::Number("WEIGHT"),
        Column::Text("STATE"),
        Column::Number("FLOWS"),
        Column::Number("PACKETS"),
        Column::Number("BYTES"),
        Column::Number("REPLY PACKETS"),
        Column::Number("REPLY BYTES"),
    ];
    if has_requests {
        columns.push(Column::Number("REQUESTS"));
    }
    let rows = targets.iter().map(|target| {
        let mut row = vec![
            Cell::new(&target.target_group),
            Cell::new(endpoint(target)),
            Cell::new(target.availability_zone.as_deref().unwrap_or(NOTHING)),
            Cell::new(target.weight),
            state(&target.state),
            Cell::new(target.flows.map_or_else(|| NOTHING.to_owned(), count)),
            forwarded(target, count(target.packets)),
            forwarded(target, bytes(target.bytes)),
            forwarded(target, count(target.reply_packets)),
            forwarded(target, bytes(target.reply_bytes)),
        ];
        if has_requests {
            let counted =
                target.metrics.as_ref().and_then(|metrics| metrics["RequestCount"].as_u64());
            row.push(Cell::new(counted.map_or_else(|| NOTHING.to_owned(), count)));
        }
        row
    });
    output::table(style, &columns, rows.collect()) + &reasons(targets)
}

/// Of packets that were forwarded, of which a target of requests has none.
fn forwarded(target: &Target, counted: String) -> Cell {
    let has_none = target.metrics.is_some() && target.packets == 0 && target.reply_packets == 0;
    Cell::new(if has_none { NOTHING.to_owned() } else { counted })
}

fn endpoint(target: &Target) -> SocketAddr {
    SocketAddr::new(target.address, target.port)
}

/// Why targets are in the state they are in, and the way to them; empty if all are healthy.
fn reasons(targets: &[Target]) -> String {
    let mut text = String::new();
    for target in targets {
        let reason = match (&target.reason, &target.description) {
            (Some(reason), Some(description)) => format!("{reason}: {description}"),
            (Some(text), None) | (None, Some(text)) => text.clone(),
            (None, None) => continue,
        };
        let Target { target_group, state, next_hop, .. } = target;
        let _ = write!(
            text,
            "\n{target_group} {} is {state}\n  {reason}\n  next hop: {next_hop}\n",
            endpoint(target)
        );
    }
    text
}

fn state(state: &str) -> Cell {
    let colour = match state {
        "healthy" => Color::Green,
        "unhealthy" | "unhealthy.draining" => Color::Red,
        "initial" | "draining" => Color::Yellow,
        _ => Color::Reset,
    };
    output::coloured(state, colour)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::snapshot::fixture;

    #[test]
    fn everything() {
        insta::assert_snapshot!(render(&fixture::snapshot().targets, Style::Plain));
    }

    #[test]
    fn none() {
        assert_eq!(render(&[], Style::Plain), "no targets are registered\n");
    }
}
