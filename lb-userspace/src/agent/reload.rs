//! Where the configuration comes from, and when it is read again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::bail;
use tracing::{error, warn};

use crate::api::snapshot;
use crate::config::{self, Agent, Config, LoadError, Role};

/// Where the agent looks without `--config`.
pub const DEFAULT_PATH: &str = "/etc/lb/lb.toml";
/// The configuration file.
pub struct Source {
    path: PathBuf,
    /// What was read last, whether it was taken over or not; or why nothing could be read.
    last: Result<Vec<u8>, String>,
    /// Why what was read last is not in force.
    error: Option<String>,
    /// When the agent began, seconds since 1970.
    started: u64,
}

impl Source {
    /// Reads the configuration for the first time. A file named on purpose must exist; the default
    /// one need not.
    ///
    /// # Errors
    /// [`LoadError`] with everything that is wrong with it.
    pub fn open(named: Option<PathBuf>) -> Result<(Self, Config), LoadError> {
        let is_named = named.is_some();
        let path = named.unwrap_or_else(|| DEFAULT_PATH.into());
        let content = config::read(&path);
        let last = remembered(&content);
        let config = match content.and_then(|bytes| config::parse_bytes(&path, bytes)) {
            Ok(parsed) => {
                warn_of(&parsed);
                parsed.config
            }
            Err(LoadError::Missing(_)) if !is_named => Config::default(),
            Err(error) => return Err(error),
        };
        let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        Ok((Self { path, last, error: None, started }, config))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is such a file, as far as is known.
    pub fn is_there(&self) -> bool {
        self.last.is_ok()
    }

    /// What `status` says of an agent with this configuration.
    pub fn describe(&self, role: Role, generation: u64) -> snapshot::Agent {
        snapshot::Agent {
            version: env!("CARGO_PKG_VERSION").into(),
            role: role.to_string(),
            pid: std::process::id(),
            started: self.started,
            configuration: self.is_there().then(|| self.path.clone()),
            generation,
            reload_error: self.error.clone(),
        }
    }

    /// Reads the file again: what is to be taken over, if anything. Of what is wrong with it the log
    /// and `status` tell.
    pub fn reload(&mut self, is_asked: bool, running: &Config) -> Option<Config> {
        match self.read_again(is_asked, running) {
            Ok(Some(config)) => {
                self.error = None;
                Some(config)
            }
            Ok(None) => None,
            Err(error) => {
                error!(
                    "the configuration is not taken over, the running one stays in force:\n{error:#}"
                );
                self.error = Some(format!("{error:#}"));
                None
            }
        }
    }

    /// `None`: it is as before, and nobody asked for it.
    ///
    /// # Errors
    /// Everything that is wrong with it, and an empty file where load balancers run.
    fn read_again(&mut self, is_asked: bool, running: &Config) -> anyhow::Result<Option<Config>> {
        let content = config::read(&self.path);
        let last = remembered(&content);
        if last == self.last && !is_asked {
            return Ok(None);
        }
        self.last = last;
        let bytes = content?;
        let is_empty = bytes.trim_ascii().is_empty();
        let parsed = config::parse_bytes(&self.path, bytes)?;
        if is_empty && !running.load_balancers.is_empty() {
            bail!(
                "{} is empty, but {} load balancer(s) run: a half-written file? To end them all, \
                 leave a file with a comment in it",
                self.path.display(),
                running.load_balancers.len()
            );
        }
        refuse_another_hash(running, &parsed.config)?;
        new_forwardings(running, &parsed.config).for_each(|warning| warn!("{warning}"));
        warn_of(&parsed);
        let mut config = parsed.config;
        keep_what_is_fixed(&mut config.agent, &running.agent);
        Ok(Some(config))
    }
}

/// What is said of target groups whose established connections do not outlive the reload.
fn new_forwardings(running: &Config, new: &Config) -> impl Iterator<Item = String> {
    new.target_groups.iter().filter_map(|(name, group)| {
        let before = running.target_groups.get(name)?;
        (!before.forwarding.keeps_connections(group.forwarding)).then(|| {
            format!(
                "target group {name} gets another `forwarding`: its established connections end. \
                 To keep them, name another target group with the new forwarding in the listeners"
            )
        })
    })
}

/// A listener that gets or loses stickiness would look for its flows by another hash than the one
/// that placed them: unless it remembers every one, they would go astray.
fn refuse_another_hash(running: &Config, new: &Config) -> anyhow::Result<()> {
    let listeners = |config: &Config| -> BTreeMap<_, _> {
        let balancers = config.load_balancers.values();
        let listeners = balancers.flat_map(|balancer| {
            let addresses = balancer.addresses.iter();
            addresses.flat_map(|address| balancer.listeners.iter().map(move |it| (*address, it)))
        });
        let hashes = listeners.map(|(address, listener)| {
            let groups = listener.target_groups.iter();
            let groups: Vec<_> =
                groups.filter_map(|group| config.target_groups.get(&group.name)).collect();
            let stickiness = groups.first().map(|group| group.stickiness);
            let tracks = groups.iter().any(|group| group.tracks_every_flow());
            ((address, listener.protocol, listener.port), (stickiness, tracks))
        });
        hashes.collect()
    };
    let before = listeners(running);
    for ((address, protocol, port), (stickiness, tracks)) in listeners(new) {
        let Some((had, tracked)) = before.get(&(address, protocol, port)) else { continue };
        if *had != stickiness && !(tracks && *tracked) {
            bail!(
                "the {protocol} listener on {} cannot get or lose `stickiness` while it runs: its \
                 established connections would go to other targets. Restart the agent, or set \
                 flow_tracking = \"always\" in its target groups first, let it run for as long as \
                 the oldest connection may be silent (350 s), then change the stickiness",
                std::net::SocketAddr::new(address, port)
            );
        }
    }
    Ok(())
}

/// What can be compared with the next reading.
fn remembered(content: &Result<Vec<u8>, LoadError>) -> Result<Vec<u8>, String> {
    match content {
        Ok(bytes) => Ok(bytes.clone()),
        Err(error) => Err(error.to_string()),
    }
}

/// What looks wrong all the same. A certificate that cannot be used must not keep the agent from
/// everything else; its file can be put right without a reload.
fn warn_of(parsed: &config::Parsed) {
    let findings = parsed.file_findings();
    parsed.warnings_here().chain(&findings).for_each(|warning| warn!("{warning}"));
}

/// What cannot change while the program is loaded keeps its value, and the log says so.
fn keep_what_is_fixed(new: &mut Agent, running: &Agent) {
    let Agent {
        interfaces,
        role,
        xdp_mode,
        availability_zone: _,
        manage_addresses: _,
        hash_seed,
        maglev_table_size,
        flow_table_size,
        half_open_table_size,
        once_seen_table_size,
        api_socket,
        tunnel_sources: _,
        cookie_key: _,
    } = new;
    keep("interfaces", interfaces, &running.interfaces);
    keep("role", role, &running.role);
    keep("xdp_mode", xdp_mode, &running.xdp_mode);
    keep("hash_seed", hash_seed, &running.hash_seed);
    keep("maglev_table_size", maglev_table_size, &running.maglev_table_size);
    keep("flow_table_size", flow_table_size, &running.flow_table_size);
    keep("half_open_table_size", half_open_table_size, &running.half_open_table_size);
    keep("once_seen_table_size", once_seen_table_size, &running.once_seen_table_size);
    keep("api_socket", api_socket, &running.api_socket);
}

fn keep<T: PartialEq + Clone>(key: &str, new: &mut T, running: &T) {
    if new != running {
        warn!("agent.{key} cannot change by a reload: it keeps its value until the agent restarts");
        *new = running.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_does_not_end_what_runs() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lb.toml");
        std::fs::write(&path, "[target_group.a]\nport = 80\n").unwrap();
        let (mut source, mut running) = Source::open(Some(path.clone())).unwrap();
        let balancer = config::LoadBalancer {
            scheme: config::Scheme::Internal,
            addresses: vec!["10.0.0.1".parse().unwrap()],
            security_groups: None,
            cross_zone: true,
            listeners: Vec::new(),
            kind: config::LoadBalancerType::Network,
            zones: config::AddressZones::new(),
            proxied: Vec::new(),
            attributes: config::Attributes::default(),
        };
        running.load_balancers.insert("web".into(), balancer);
        std::fs::write(&path, " \n").unwrap();
        let error = source.read_again(false, &running).unwrap_err();
        assert!(error.to_string().contains("is empty, but 1 load balancer(s) run"), "{error}");
        assert_eq!(source.read_again(false, &running).unwrap(), None);
        std::fs::write(&path, "# none\n").unwrap();
        assert_eq!(source.read_again(false, &running).unwrap(), Some(Config::default()));
    }

    #[test]
    fn a_live_listener_keeps_its_hash_unless_it_tracks_every_flow() {
        let config = |group: &str, port: u16| {
            let text = format!(
                "[target_group.web]\n{group}\n[load_balancer.web]\naddresses = [\"10.0.0.1\"]\n\
                 listener = [{{ port = {port}, target_group = \"web\" }}]\n"
            );
            config::parse("lb.toml", &text).unwrap().config
        };
        let sticky = "stickiness = { type = \"source_ip\" }";
        let always = "flow_tracking = \"always\"";
        let both = format!("{sticky}\n{always}");
        let plain = config("", 80);
        for (running, new) in [("", sticky), (sticky, ""), ("", &both), (always, sticky)] {
            let refused = refuse_another_hash(&config(running, 80), &config(new, 80));
            let error = refused.expect_err(new).to_string();
            assert!(error.contains("the tcp listener on 10.0.0.1:80 cannot"), "{error}");
        }
        for (running, new) in [("", always), (sticky, &both), (always, &both), (&both, always)] {
            refuse_another_hash(&config(running, 80), &config(new, 80)).unwrap();
        }
        refuse_another_hash(&plain, &config(sticky, 81)).unwrap();
        refuse_another_hash(&Config::default(), &config(sticky, 80)).unwrap();
    }

    #[test]
    fn a_change_of_forwarding_that_ends_connections_is_told() {
        let config = |forwarding: &str| {
            let text = format!("[target_group.web]\nport = 80\nforwarding = \"{forwarding}\"\n");
            config::parse("lb.toml", &text).unwrap().config
        };
        for (running, new, is_told) in [
            ("nat", "snat", true),
            ("snat", "nat", true),
            ("nat", "dsr_gue", true),
            ("dsr_l2", "nat", true),
            ("dsr_l2", "dsr_ipip", false),
            ("dsr_gue", "dsr_ipip", false),
            ("snat", "snat", false),
        ] {
            let told: Vec<_> = new_forwardings(&config(running), &config(new)).collect();
            assert_eq!(told.len(), usize::from(is_told), "{running} {new}: {told:?}");
        }
        assert_eq!(new_forwardings(&Config::default(), &config("snat")).count(), 0);
    }

    #[test]
    fn what_is_fixed_keeps_its_value() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lb.toml");
        std::fs::write(&path, "").unwrap();
        let (mut source, running) = Source::open(Some(path.clone())).unwrap();
        std::fs::write(&path, "[agent]\nmaglev_table_size = 251\nmanage_addresses = false\n")
            .unwrap();
        let config = source.read_again(false, &running).unwrap().unwrap();
        assert_eq!(config.agent.maglev_table_size, running.agent.maglev_table_size);
        assert!(!config.agent.manage_addresses);
    }

    #[test]
    fn a_first_file_that_cannot_be_read_is_told_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lb.toml");
        let mut source = Source {
            path: path.clone(),
            last: remembered(&config::read(&path)),
            error: None,
            started: 0,
        };
        let running = Config::default();
        assert_eq!(source.read_again(false, &running).unwrap(), None);
        assert!(!source.is_there());
        std::fs::write(&path, b"# caf\xe9\n").unwrap();
        let error = source.read_again(false, &running).unwrap_err();
        assert!(error.to_string().contains("lb.toml:1: is not UTF-8"), "{error}");
        assert_eq!(source.read_again(false, &running).unwrap(), None);
        std::fs::write(&path, b"# caf\xe8\n").unwrap();
        source.read_again(false, &running).unwrap_err();
        std::fs::write(&path, "# café\n").unwrap();
        assert_eq!(source.read_again(false, &running).unwrap(), Some(Config::default()));
    }

    #[test]
    fn a_fifo_does_not_hold_the_agent_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lb.toml");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = Source::open(Some(path.clone())).map(|_| ()).unwrap_err();
        assert!(matches!(error, LoadError::NotAFile(_)), "{error}");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        let (mut source, running) = Source::open(Some(path.clone())).unwrap();
        std::fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = source.read_again(true, &running).unwrap_err();
        assert!(error.to_string().contains("is not a regular file"), "{error}");
    }
}
