//! The configuration file: TOML in, a [`Config`] that is valid by construction out.
//!
//! [`parse`] reads the whole file whatever it finds, so that one run shows every error; only TOML
//! that is none ends it early. Each section has its module, which takes the keys that it knows
//! from a `reader::Table`; what is left is an unknown key. `references` has the checks across
//! sections.

mod address;
mod agent;
mod application;
mod certificate;
mod diagnostic;
mod dns;
mod file;
mod forward;
mod health_check;
mod load_balancer;
pub mod model;
mod protocol;
mod reader;
mod references;
mod security_group;
mod security_group_member;
mod security_group_uses;
mod snat;
mod target_group;
#[cfg(test)]
mod tests;
mod tunnel_sources;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rustls::pki_types::UnixTime;
use toml::de::DeTable;

pub use agent::DEFAULT_API_SOCKET;
pub use diagnostic::{ConfigErrors, Diagnostic, Severity};
pub use file::{LoadError, load, parse_bytes, read};
pub use model::*;
pub use references::{MAX_ENDPOINTS, MAX_FORWARD_ACTIONS, MAX_TARGETS};

use diagnostic::Report;
use reader::Table;
use references::Sections;

/// A usable configuration, and what looks wrong in it all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed {
    /// What the file says.
    pub config: Config,
    /// In the file's order.
    pub warnings: Vec<Diagnostic>,
    /// Warnings that hold on a machine without this address.
    pub unless_local: Vec<(IpAddr, Diagnostic)>,
    /// Where the file names certificates; [`Self::file_findings`] looks at them.
    certificates: Vec<(CertificateFiles, Diagnostic)>,
    /// Where it names logs.
    logs: Vec<(PathBuf, Diagnostic)>,
}

impl Parsed {
    /// What is wrong with the files that it names, as they are now: errors where certificates cannot
    /// be used, warnings where clients will not take them or logs have no directory. A target has no
    /// use for them.
    pub fn file_findings(&self) -> Vec<Diagnostic> {
        if self.config.agent.role == Role::Target {
            return Vec::new();
        }
        let now = UnixTime::now();
        let certificates = self.certificates.iter();
        let certificates =
            certificates.filter_map(|(files, place)| certificate::finding(files, place, now));
        let logs = self.logs.iter().filter_map(|(path, place)| no_directory(path, place));
        certificates.chain(logs).collect()
    }

    /// All warnings that hold on this machine, in its network namespace.
    pub fn warnings_here(&self) -> impl Iterator<Item = &Diagnostic> {
        let local: BTreeSet<IpAddr> =
            if self.unless_local.is_empty() { BTreeSet::new() } else { file::local_addresses() };
        let foreign = self.unless_local.iter().filter(move |(address, _)| !local.contains(address));
        self.warnings.iter().chain(foreign.map(|(_, warning)| warning))
    }
}

/// A warning if a log has no directory to be in.
fn no_directory(log: &Path, place: &Diagnostic) -> Option<Diagnostic> {
    let directory = log.parent().filter(|it| !it.is_dir())?.display();
    let message = format!("the directory {directory} of this log is not there");
    let help = format!("create it with `mkdir -p {directory}`: requests are not noted until then");
    Some(place.with(Severity::Warning, message, help))
}

const SYNTAX_HELP: &str = "write strings in quotes and each key once in its section; \
                           https://toml.io has the rules";

/// Reads a configuration from `text`; `file_name` is what the diagnostics call it.
///
/// An empty text is a valid configuration, [`Config::default`].
///
/// # Errors
///
/// Every error of the file at once. If it is not TOML, only where it is not.
pub fn parse(file_name: &str, text: &str) -> Result<Parsed, ConfigErrors> {
    let report = Report::new(file_name, text);
    let (root, syntax_errors) = DeTable::parse_recoverable(text);
    for error in &syntax_errors {
        let span = error.span().unwrap_or(0..0);
        let place = match report.quote(&span).as_str() {
            "" => String::new(),
            text => format!(" at `{text}`"),
        };
        let message = format!("not valid TOML{place}: {}", error.message());
        report.error(span, message, SYNTAX_HELP);
    }
    let config = if syntax_errors.is_empty() {
        read_sections(&report, root.get_ref())
    } else {
        Config::default()
    };
    let unless_local = report.take_unless_local();
    let certificates = report.take_certificates();
    let logs = report.take_logs();
    Ok(Parsed { warnings: report.finish()?, unless_local, certificates, logs, config })
}

/// Reads the whole file; worth nothing if it notes an error.
fn read_sections<'a>(report: &'a Report<'a>, root: &'a DeTable<'a>) -> Config {
    let mut root = Table::root(report, root);
    let agent = root.subtable("agent", "[agent]".to_owned()).map(agent::read).unwrap_or_default();
    let sections = Sections {
        availability_zone: agent.availability_zone.clone(),
        security_groups: root
            .sections("security_group")
            .into_iter()
            .map(|section| (section.name, security_group::read(section.table)))
            .collect(),
        target_groups: root
            .sections("target_group")
            .into_iter()
            .map(|section| (section.name, target_group::read(section.table)))
            .collect(),
        load_balancers: root
            .sections("load_balancer")
            .into_iter()
            .map(|section| (section.name, load_balancer::read(section.table)))
            .collect(),
        dns: root.subtable("dns", "[dns]".to_owned()).and_then(dns::read),
    };
    root.finish();
    references::check(report, &sections);
    snat::check(&sections.target_groups, &sections.load_balancers);
    let Sections { security_groups, target_groups, load_balancers, dns, .. } = sections;
    Config {
        agent,
        security_groups: owned(
            security_groups.into_iter().map(|(name, draft)| (name, draft.group)),
        ),
        target_groups: owned(target_groups.into_iter().map(|(name, draft)| (name, draft.group))),
        load_balancers: owned(
            load_balancers.into_iter().map(|(name, draft)| (name, draft.into_load_balancer())),
        ),
        dns: dns.map(Into::into),
    }
}

fn owned<'a, T>(named: impl IntoIterator<Item = (&'a str, T)>) -> BTreeMap<String, T> {
    named.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
