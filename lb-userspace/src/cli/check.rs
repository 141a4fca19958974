//! `check`: what is right or wrong with a configuration file, without an agent.

use std::path::Path;

use super::output;
use crate::config::{self, Config, ConfigErrors, LoadError};

/// Checks `file`: a summary goes to stdout, warnings go to stderr.
///
/// # Errors
/// [`config::LoadError`] with everything that is wrong with it.
pub(super) fn run(file: &Path) -> anyhow::Result<()> {
    let parsed = config::load(file)?;
    let findings = parsed.file_findings();
    if let Some(errors) = ConfigErrors::among(&findings) {
        return Err(LoadError::Invalid(errors).into());
    }
    for warning in parsed.warnings_here().chain(&findings) {
        output::complain(&format!("{warning}\n\n"));
    }
    output::print(&summary(file, &parsed.config))
}

fn summary(file: &Path, config: &Config) -> String {
    let listeners =
        config.load_balancers.values().map(|it| it.listeners.len() + it.proxied.len()).sum();
    let targets = config.target_groups.values().map(|it| it.targets.len()).sum();
    let counts = [
        counted(config.load_balancers.len(), "load balancer"),
        counted(listeners, "listener"),
        counted(config.target_groups.len(), "target group"),
        counted(targets, "target"),
    ];
    format!("{}: ok: {}\n", file.display(), counts.join(", "))
}

fn counted(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_OF_EACH: &str = r#"
        [target_group.dns]
        protocol = "udp"
        port = 53
        targets = ["10.0.2.53"]

        [target_group.web]
        protocol = "tcp"
        port = 8080
        targets = ["10.0.2.11", "10.0.2.12"]

        [load_balancer.dns]
        type = "network"
        addresses = ["10.0.0.53"]
        listener = [{ protocol = "udp", port = 53, target_group = "dns" }]

        [load_balancer.web]
        type = "network"
        addresses = ["10.0.0.100"]
        listener = [
          { protocol = "tcp", port = 80, target_group = "web" },
          { protocol = "tcp", port = 8000, target_group = "web" },
        ]
    "#;

    #[test]
    fn what_a_file_has_is_counted() {
        let config = config::parse("lb.toml", TWO_OF_EACH).unwrap().config;
        assert_eq!(
            summary(Path::new("lb.toml"), &config),
            "lb.toml: ok: 2 load balancers, 3 listeners, 2 target groups, 3 targets\n"
        );
    }

    #[test]
    fn one_is_singular() {
        assert_eq!(counted(0, "target"), "0 targets");
        assert_eq!(counted(1, "target"), "1 target");
    }
}
