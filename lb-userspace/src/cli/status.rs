//! `status`, for humans.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use comfy_table::{Cell, Color};

use super::output::{self, Column, NOTHING, Style, bytes, count};
use crate::api::snapshot::{
    Agent, AttachMode, FlowTable, Listener, LoadBalancer, OwnTarget, Status,
};

/// The text for this moment and this stdout.
pub(super) fn render_now(status: &Status) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    render(status, now, Style::detect())
}

fn render(status: &Status, now: u64, style: Style) -> String {
    let mut text = agent(&status.agent, now);
    let mut section = |heading: &str, body: String| {
        let _ = write!(text, "\n{heading}\n{}", output::indent(&body));
    };
    section("Interfaces", interfaces(status, style));
    if let Some(target) = &status.own_target {
        section("Target", own_target(target));
    } else if status.load_balancers.is_empty() {
        section("Load balancers", "none: all traffic passes; add one to the configuration".into());
    }
    for load_balancer in &status.load_balancers {
        section(&heading(load_balancer), listeners(load_balancer, style));
    }
    if !status.flow_tables.is_empty() {
        section("Remembered flows", flow_tables(&status.flow_tables, style));
    }
    section("Drops", drops(status, style));
    if !status.warnings.is_empty() {
        section("Warnings", status.warnings.join("\n"));
    }
    text
}

fn agent(agent: &Agent, now: u64) -> String {
    let Agent { version, role, pid, generation, .. } = agent;
    let up = humantime::format_duration(Duration::from_secs(now.saturating_sub(agent.started)));
    let configuration = match &agent.configuration {
        Some(path) => format!("configuration {}", path.display()),
        None => "no configuration file".to_owned(),
    };
    let mut text = format!(
        "lb-userspace {version}, {role}, pid {pid}, up {up}\n{configuration}, generation {generation}\n"
    );
    if let Some(error) = &agent.reload_error {
        text.push_str("\nThe last reload was refused, what ran before goes on:\n");
        text.push_str(&output::indent(error));
    }
    text
}

fn interfaces(status: &Status, style: Style) -> String {
    if status.interfaces.is_empty() {
        return "none".to_owned();
    }
    let columns = [Column::Text("NAME"), Column::Number("INDEX"), Column::Text("XDP MODE")];
    let rows = status.interfaces.iter().map(|interface| {
        let mode = match interface.mode {
            AttachMode::Native => output::coloured("native", Color::Green),
            AttachMode::Generic => output::coloured("generic", Color::Yellow),
        };
        vec![Cell::new(&interface.name), Cell::new(interface.index), mode]
    });
    output::table(style, &columns, rows.collect())
}

fn own_target(target: &OwnTarget) -> String {
    let list = |names: &[String]| match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    };
    let addresses: Vec<_> = target.addresses.iter().map(ToString::to_string).collect();
    let security_groups = match &target.security_groups[..] {
        [] => "none: everybody is let in".to_owned(),
        names => names.join(", "),
    };
    format!(
        "addresses        {}\ntarget groups    {}\nsecurity groups  {security_groups}\n\
         unwrapped        {} packets, {}",
        list(&addresses),
        list(&target.target_groups),
        count(target.unwrapped_packets),
        bytes(target.unwrapped_bytes)
    )
}

fn heading(load_balancer: &LoadBalancer) -> String {
    let LoadBalancer { name, kind, scheme, addresses, dns_name, .. } = load_balancer;
    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    let name_there = dns_name.as_ref().map_or_else(String::new, |it| format!(", called {it}"));
    format!("Load balancer {name} ({kind}, {scheme}) on {}{name_there}", addresses.join(", "))
}

fn listeners(load_balancer: &LoadBalancer, style: Style) -> String {
    let columns = [
        Column::Text("LISTENER"),
        Column::Text("TARGET GROUP"),
        Column::Number("NEW FLOWS"),
        Column::Number("PACKETS"),
        Column::Number("BYTES"),
        Column::Number("REPLY PACKETS"),
        Column::Number("REPLY BYTES"),
    ];
    let rows = load_balancer.listeners.iter().map(|listener| {
        vec![
            Cell::new(format!("{} {}", listener.protocol, listener.port)),
            Cell::new(target_groups(listener)),
            Cell::new(count(listener.new_flows)),
            Cell::new(count(listener.packets)),
            Cell::new(bytes(listener.bytes)),
            reply(listener, count(listener.reply_packets)),
            reply(listener, bytes(listener.reply_bytes)),
        ]
    });
    output::table(style, &columns, rows.collect()) + &metrics(load_balancer, style)
}

/// Answers of the proxy leave by the kernel, which nobody counts by listener.
fn reply(listener: &Listener, counted: String) -> Cell {
    Cell::new(if listener.rules.is_some() { NOTHING.to_owned() } else { counted })
}

/// What the proxy counted; empty if that is nothing.
fn metrics(load_balancer: &LoadBalancer, style: Style) -> String {
    let counted = load_balancer.metrics.as_ref().and_then(|metrics| metrics.as_object());
    let counts = counted.into_iter().flatten();
    let counts = counts.filter_map(|(name, value)| Some((name, value.as_u64()?)));
    let rows: Vec<_> = counts
        .filter(|(_, number)| *number > 0)
        .map(|(name, number)| vec![Cell::new(name), Cell::new(count(number))])
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    format!("\n{}", output::table(style, &[Column::Text("METRIC"), Column::Number("COUNT")], rows))
}

/// The one group, or all with their weights, or what is done instead, and how many rules may lead elsewhere.
fn target_groups(listener: &Listener) -> String {
    let default = match listener.target_groups.as_slice() {
        [] => listener.default_action.clone().unwrap_or_default(),
        [_] => listener.target_group.clone(),
        groups => {
            let groups: Vec<_> =
                groups.iter().map(|group| format!("{} ({})", group.name, group.weight)).collect();
            groups.join(", ")
        }
    };
    let rules = match listener.rules {
        None | Some(0) => return default,
        Some(1) => "1 rule".to_owned(),
        Some(rules) => format!("{rules} rules"),
    };
    if default.is_empty() { rules } else { format!("{default}, {rules}") }
}

fn flow_tables(tables: &[FlowTable], style: Style) -> String {
    let columns = [
        Column::Text("TABLE"),
        Column::Number("ENTRIES"),
        Column::Number("SIZE"),
        Column::Number("EVICTIONS"),
    ];
    let rows = tables.iter().map(|table| {
        let FlowTable { name, size, entries, evictions } = table;
        let numbers = [*entries, u64::from(*size), *evictions].map(|n| Cell::new(count(n)));
        std::iter::once(Cell::new(name)).chain(numbers).collect()
    });
    output::table(style, &columns, rows.collect())
}

/// Reasons that occurred, the most frequent first, equal ones by name.
fn drops(status: &Status, style: Style) -> String {
    let mut drops: Vec<_> = status.drops.iter().filter(|&(_, &number)| number > 0).collect();
    if drops.is_empty() {
        return "none".to_owned();
    }
    drops.sort_by_key(|&(reason, &number)| (std::cmp::Reverse(number), reason));
    let columns = [Column::Text("REASON"), Column::Number("PACKETS")];
    let rows = drops
        .into_iter()
        .map(|(reason, &number)| vec![Cell::new(reason), Cell::new(count(number))]);
    output::table(style, &columns, rows.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::snapshot::fixture;

    const NOW: u64 = 1_700_000_000 + 2 * 3600 + 3 * 60;

    #[test]
    fn everything() {
        insta::assert_snapshot!(render(&fixture::snapshot().status, NOW, Style::Plain));
    }

    #[test]
    fn a_target() {
        let mut status = fixture::snapshot().status;
        status.agent.role = "target".into();
        status.load_balancers.clear();
        status.own_target = Some(OwnTarget {
            addresses: vec!["10.0.2.11".parse().unwrap(), "fd00:2::11".parse().unwrap()],
            target_groups: vec!["api".into(), "web".into()],
            security_groups: vec!["web-target".into()],
            unwrapped_packets: 1_234_567,
            unwrapped_bytes: 2_345_678_901,
        });
        status.warnings.clear();
        insta::assert_snapshot!(render(&status, NOW, Style::Plain));
    }

    #[test]
    fn a_refused_reload_stands_at_the_top() {
        let mut status = fixture::snapshot().status;
        status.agent.reload_error =
            Some("error: unknown key `prot`\n --> /etc/lb/lb.toml:3:1".into());
        status.load_balancers.truncate(1);
        status.warnings.clear();
        insta::assert_snapshot!(render(&status, NOW, Style::Plain));
    }

    #[test]
    fn an_idle_agent() {
        let mut status = fixture::snapshot().status;
        status.agent.configuration = None;
        status.load_balancers.clear();
        status.drops.clear();
        status.warnings.clear();
        insta::assert_snapshot!(render(&status, NOW, Style::Plain));
    }
}
