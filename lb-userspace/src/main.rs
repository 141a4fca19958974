//! `lb-userspace`: the command.

fn main() {}
