//! What the demo says on the terminal.

use std::io::{IsTerminal as _, stdout};
use std::process::Command;

use anyhow::Result;

use crate::process::{capture, show};

/// Begins a step.
pub fn heading(text: &str) {
    println!("\n{}", styled("1", text));
}

/// Something that was to be shown, and was.
pub fn shown(text: &str) {
    println!("  {} {text}", styled("32", "✓"));
}

/// Text as it is, indented.
pub fn quote(text: &str) {
    for line in text.trim_end().lines() {
        println!("    {line}");
    }
}

/// A command as one would type it, and what it wrote.
pub fn transcript(mut command: Command) -> Result<String> {
    quote(&format!("$ {}", show(&command)));
    let output = capture(&mut command)?;
    quote(&output);
    Ok(output)
}

fn styled(code: &str, text: &str) -> String {
    if stdout().is_terminal() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}
