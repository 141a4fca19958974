//! The proxies that are compared, and the target behind them all.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;

/// Bytes of the large answer.
pub const LARGE: u64 = 1 << 20;

/// Everything that runs; ends with it.
pub struct Site {
    proxies: Vec<Proxy>,
    load_cpu: usize,
    _target: Running,
    _folder: TempDir,
}

/// A proxy with one thread.
pub struct Proxy {
    name: &'static str,
    version: String,
    port: u16,
    tls_port: u16,
    /// The process that serves.
    pid: u32,
    _running: Running,
}

impl Proxy {
    /// Which of [`Site::proxies`] nginx is.
    pub const NGINX: usize = 2;

    /// What it is.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// As it says itself.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Of the http listener on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Of the https listener.
    pub fn tls_port(&self) -> u16 {
        self.tls_port
    }

    /// Of the process that serves.
    pub fn pid(&self) -> u32 {
        self.pid
    }
}

/// A program that ends with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        // Gone already is as good; nginx ends its worker only if it is asked.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

impl Site {
    /// Starts the target and every proxy.
    pub fn start(cpu: usize, proxy: &Path) -> Result<Self> {
        let load_cpu = if cpu == 0 { 1 } else { cpu - 1 };
        let folder = tempfile::tempdir()?;
        let place = Place { folder: folder.path(), cpu };
        place.certificate()?;
        fs::write(folder.path().join("large"), vec![b'x'; LARGE as usize])?;
        let target_port = free_port()?;
        let target = Place { cpu: load_cpu, ..place }
            .nginx("target", &target_config(folder.path(), ([127, 0, 0, 1], target_port).into()))?;
        answers(target_port)?;
        let proxies = vec![
            place.lb(proxy, target_port, 0, "lb")?,
            place.lb(proxy, target_port, 99, "lb, 100 rules")?,
            place.nginx_proxy(target_port)?,
            place.haproxy(target_port)?,
        ];
        Ok(Self { proxies, load_cpu, _target: target, _folder: folder })
    }

    /// All of them.
    pub fn proxies(&self) -> &[Proxy] {
        &self.proxies
    }

    /// Where the load is made.
    pub fn load_cpu(&self) -> usize {
        self.load_cpu
    }
}

/// Where programs run.
#[derive(Clone, Copy)]
struct Place<'a> {
    folder: &'a Path,
    cpu: usize,
}

impl Place<'_> {
    /// One certificate for all, on the curve that most use today.
    fn certificate(&self) -> Result<()> {
        let made = rcgen::generate_simple_self_signed(["bench.example".to_owned()])?;
        let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        fs::write(self.folder.join("cert.pem"), &certificate)?;
        fs::write(self.folder.join("key.pem"), &key)?;
        fs::write(self.folder.join("both.pem"), certificate + &key)?;
        Ok(())
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn start(&self, program: &str, arguments: &[&str], log: &str) -> Result<Running> {
        let log = fs::File::create(self.folder.join(log))?;
        let child = Command::new("taskset")
            .args(["-c", &self.cpu.to_string(), program])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn();
        Ok(Running(child.with_context(|| format!("start {program}"))?))
    }

    fn nginx(&self, name: &str, config: &str) -> Result<Running> {
        let file = self.path(&format!("{name}.conf"));
        fs::write(&file, config)?;
        self.start("nginx", &["-p", &self.path(""), "-c", &file], &format!("{name}.log"))
    }

    fn lb(&self, program: &Path, target: u16, rules: u32, name: &'static str) -> Result<Proxy> {
        let (port, tls_port) = (free_port()?, free_port()?);
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port)).to_string();
        let running = self.start(
            &program.display().to_string(),
            &[
                "--http",
                &at(port),
                "--https",
                &at(tls_port),
                "--cert",
                &self.path("cert.pem"),
                "--key",
                &self.path("key.pem"),
                "--target",
                &at(target),
                "--rules",
                &rules.to_string(),
            ],
            &format!("lb-{rules}.log"),
        )?;
        answers(port)?;
        answers(tls_port)?;
        let pid = running.0.id();
        let version = format!("{}", program.display());
        Ok(Proxy { name, version, port, tls_port, pid, _running: running })
    }

    fn nginx_proxy(&self, target: u16) -> Result<Proxy> {
        let (port, tls_port) = (free_port()?, free_port()?);
        let running = self.nginx("nginx", &proxy_config(self.folder, port, tls_port, target))?;
        answers(port)?;
        answers(tls_port)?;
        let pid = only_child(running.0.id())?;
        let version = version("nginx", "-v")?;
        Ok(Proxy { name: "nginx", version, port, tls_port, pid, _running: running })
    }

    fn haproxy(&self, target: u16) -> Result<Proxy> {
        let (port, tls_port) = (free_port()?, free_port()?);
        let file = self.path("haproxy.cfg");
        fs::write(&file, haproxy_config(self.folder, port, tls_port, target))?;
        let running = self.start("haproxy", &["-db", "-f", &file], "haproxy.log")?;
        answers(port)?;
        answers(tls_port)?;
        let pid = running.0.id();
        let version = version("haproxy", "-v")?;
        Ok(Proxy { name: "HAProxy", version, port, tls_port, pid, _running: running })
    }
}

/// Static answers without a log, connections kept. One process: a worker would outlive a master that is
/// killed.
pub fn target_config(folder: &Path, address: SocketAddr) -> String {
    format!(
        "daemon off; master_process off; pid target.pid; error_log target.error; user root;
events {{ worker_connections 4096; }}
http {{
    access_log off; keepalive_requests 1000000000; keepalive_timeout 3600; sendfile on; tcp_nopush on;
    server {{
        listen {address};
        location = / {{ return 200 'hello world\\n'; }}
        location = /large {{ root {}; }}
    }}
}}
",
        folder.display()
    )
}

/// What its manual advises for throughput.
fn proxy_config(folder: &Path, port: u16, tls_port: u16, target: u16) -> String {
    format!(
        "daemon off; worker_processes 1; pid nginx.pid; error_log nginx.error; user root;
events {{ worker_connections 4096; }}
http {{
    access_log off; keepalive_requests 1000000000; keepalive_timeout 3600;
    proxy_http_version 1.1; proxy_set_header Connection ''; proxy_set_header Host $host;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_set_header X-Forwarded-Proto $scheme; proxy_set_header X-Forwarded-Port $server_port;
    proxy_buffers 16 64k; proxy_buffer_size 64k; proxy_busy_buffers_size 128k;
    proxy_max_temp_file_size 0;
    ssl_protocols TLSv1.2 TLSv1.3;
    upstream target {{ server 127.0.0.1:{target}; keepalive 128; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port};
        listen 127.0.0.1:{tls_port} ssl;
        ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;
        location / {{ proxy_pass http://target; }}
    }}
}}
",
        folder = folder.display()
    )
}

fn haproxy_config(folder: &Path, port: u16, tls_port: u16, target: u16) -> String {
    format!(
        "global
    nbthread 1
    maxconn 4096
    tune.bufsize 65536
    ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
    mode http
    timeout connect 10s
    timeout client 60s
    timeout server 60s
    option forwardfor
    http-reuse always
frontend bench
    bind 127.0.0.1:{port}
    bind 127.0.0.1:{tls_port} ssl crt {folder}/both.pem
    http-request set-header X-Forwarded-Proto https if {{ ssl_fc }}
    http-request set-header X-Forwarded-Proto http unless {{ ssl_fc }}
    http-request set-header X-Forwarded-Port %[dst_port]
    default_backend target
backend target
    server target 127.0.0.1:{target}
",
        folder = folder.display()
    )
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Waits until somebody accepts connections there.
fn answers(port: u16) -> Result<()> {
    let begin = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        ensure!(begin.elapsed() < Duration::from_secs(10), "nothing listens on port {port}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// nginx has a process that serves below the one that was started.
fn only_child(pid: u32) -> Result<u32> {
    let begin = Instant::now();
    loop {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        let children: Vec<u32> =
            children.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        match children[..] {
            [child] => return Ok(child),
            [] if begin.elapsed() < Duration::from_secs(10) => {
                std::thread::sleep(Duration::from_millis(20));
            }
            _ => bail!("{pid} has {} processes, not one", children.len()),
        }
    }
}

/// The first line that a program says of itself.
fn version(program: &str, argument: &str) -> Result<String> {
    let output =
        Command::new(program).arg(argument).output().with_context(|| format!("run {program}"))?;
    let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
    let line = BufReader::new(&text[..]).lines().next().context("no version")??;
    let end = line.find(" - ").unwrap_or(line.len());
    Ok(line[..end].to_owned())
}
