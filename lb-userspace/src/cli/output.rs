//! What the commands share to print: tables, numbers, and streams that may go away.

use std::env;
use std::io::{self, IsTerminal as _, Write as _};

use comfy_table::presets;
use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Row, Table};
use serde::Serialize;

/// How text is dressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// For a program or a file: no colours.
    Plain,
    /// For eyes: colours.
    Terminal,
}

impl Style {
    /// What fits stdout. `NO_COLOR` (no-color.org) asks for plain text.
    pub(super) fn detect() -> Self {
        let no_color = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if io::stdout().is_terminal() && !no_color { Self::Terminal } else { Self::Plain }
    }
}

/// What stands where there is nothing to say.
pub(super) const NOTHING: &str = "-";

/// A column's heading, by what stands under it.
pub(super) enum Column {
    /// Words and names.
    Text(&'static str),
    /// Numbers, aligned at the right.
    Number(&'static str),
}

/// A table without lines. It never wraps cells: broken addresses and numbers are unreadable.
pub(super) fn table(style: Style, columns: &[Column], rows: Vec<Vec<Cell>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if style == Style::Plain {
        table.force_no_tty();
    }
    table.set_header(columns.iter().map(|column| match column {
        Column::Text(heading) | Column::Number(heading) => *heading,
    }));
    table.add_rows(rows.into_iter().map(Row::from));
    for (column, kind) in table.column_iter_mut().zip(columns) {
        column.set_padding((0, 2));
        if matches!(kind, Column::Number(_)) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

/// Each line moved two to the right.
pub(super) fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

/// A cell that stands out on a terminal.
pub(super) fn coloured(text: &str, colour: Color) -> Cell {
    Cell::new(text).fg(colour)
}

/// `1234567` as `1,234,567`.
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Bytes in the largest binary unit that they reach: `1.5 MiB`.
pub(super) fn bytes(number: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if number < 1024 {
        return format!("{number} B");
    }
    let power = number.ilog2() / 10;
    let unit = UNITS[power as usize - 1];
    // Whole tenths, rounded down: what is short of a unit never reads as the whole of it.
    let tenths = (u128::from(number) * 10) >> (10 * power);
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

/// A value as indented JSON, with a line end.
pub(super) fn json<T: Serialize>(value: &T) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// Prints to stdout. A reader that went away (`| head`) is no failure.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    print_bytes(text.as_bytes())
}

/// [`print`] for what is not known to be UTF-8.
pub(super) fn print_bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// Prints to stderr; if that fails there is nobody left to tell.
pub(super) fn complain(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_grouped() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (123_456, "123,456"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(count(number), text);
        }
    }

    #[test]
    fn bytes_have_the_largest_unit_that_fits() {
        for (number, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1_048_575, "1023.9 KiB"),
            (1_572_864, "1.5 MiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(bytes(number), text);
        }
    }
}
