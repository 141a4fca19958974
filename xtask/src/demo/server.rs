//! The targets' web servers: nginx, with a configuration of our own.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use super::daemon::Daemon;
use super::namespace::{Host, Network};
use crate::process::wait_for;

/// The port they listen on.
pub const PORT: u16 = 8080;

/// The page that names who asks.
pub const CLIENT_PAGE: &str = "client $remote_addr";

/// nginx on a target; dropping it ends it.
pub struct Server {
    daemon: Daemon,
}

impl Server {
    /// Starts nginx on `host`, its files in `folder`, and waits until it answers there.
    /// Every path is the page: what follows "hello world from NAME".
    pub fn start(network: &Network, host: &Host, folder: &Path, page: &str) -> Result<Self> {
        let prefix = folder.join(host.name);
        fs::create_dir_all(&prefix)?;
        let file = prefix.join("nginx.conf");
        fs::write(&file, configuration(host.name, &prefix, page))?;
        let mut nginx = network.tool(host.name, "nginx");
        nginx.arg("-p").arg(&prefix).arg("-c").arg(&file);
        let mut server = Self { daemon: Daemon::start(nginx, &log(&prefix))? };
        server
            .wait(network, host)
            .with_context(|| format!("nginx on {}: {}", host.name, server.daemon.log().trim()))?;
        Ok(server)
    }

    /// Kills all of its processes at once; the kernel closes its connections.
    pub fn kill(mut self) -> Result<()> {
        self.daemon.kill()
    }

    /// Stops it where it is: it accepts connections, and does not answer. Or lets it go on.
    pub fn freeze(&self, is_frozen: bool) -> Result<()> {
        self.daemon.signal(if is_frozen { Signal::SIGSTOP } else { Signal::SIGCONT })
    }

    /// Ends it.
    pub fn stop(mut self) -> Result<()> {
        self.daemon.terminate().map(drop)
    }

    fn wait(&mut self, network: &Network, host: &Host) -> Result<()> {
        let address = SocketAddr::new(host.ipv4().parse()?, PORT);
        wait_for("answer", Duration::from_secs(10), || {
            self.daemon.still_runs()?;
            network.inside(host.name, || {
                Ok(TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok().map(drop))
            })
        })
    }
}

fn log(prefix: &Path) -> PathBuf {
    prefix.join("nginx.log")
}

fn configuration(name: &str, prefix: &Path, page: &str) -> String {
    let prefix = prefix.display();
    format!(
        r#"daemon off;
worker_processes 1;
pid {prefix}/nginx.pid;
error_log stderr;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  default_type text/plain;
  server {{
    listen {PORT};
    listen [::]:{PORT};
    location / {{ return 200 "hello world from {name}, {page}\n"; }}
  }}
}}
"#
    )
}
