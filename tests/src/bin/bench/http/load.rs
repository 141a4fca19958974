//! Load by wrk, and what it did to a proxy.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::servers::Proxy;

/// A kind of load.
#[derive(Clone, Copy)]
pub struct Load {
    /// What the table calls it.
    pub name: &'static str,
    path: &'static str,
    is_tls: bool,
    /// Whether every request has a connection of its own.
    is_new: bool,
    /// Whether every connection begins with a whole handshake, of a client that was never here: wrk
    /// resumes sessions.
    is_stranger: bool,
    connections: u32,
    /// Bytes of an answer's body.
    body: u64,
}

const SMALL: Load = Load {
    name: "small",
    path: "/",
    is_tls: false,
    is_new: false,
    is_stranger: false,
    connections: 50,
    body: 12,
};
const LARGE: Load =
    Load { name: "1 MB", path: "/large", connections: 8, body: super::servers::LARGE, ..SMALL };

impl Load {
    /// All kinds.
    pub const ALL: [Self; 7] = [
        SMALL,
        Self { name: "small, new connections", is_new: true, ..SMALL },
        LARGE,
        Self { name: "TLS, small", is_tls: true, ..SMALL },
        Self { name: "TLS, handshakes", is_tls: true, is_stranger: true, ..SMALL },
        Self { name: "TLS, resumed", is_tls: true, is_new: true, ..SMALL },
        Self { name: "TLS, 1 MB", is_tls: true, ..LARGE },
    ];

    /// Small answers, one after the other in one connection.
    pub const ONE: Self = Self { connections: 1, ..SMALL };

    /// Puts this load on a proxy for so long.
    ///
    /// # Errors
    /// If wrk is not there, or some answer was not what it should be.
    pub fn put_on(&self, proxy: &Proxy, cpu: usize, length: Duration) -> Result<Measured> {
        let (scheme, port) =
            if self.is_tls { ("https", proxy.tls_port()) } else { ("http", proxy.port()) };
        let mut program = Command::new("taskset");
        program.args(["-c", &cpu.to_string()]);
        let before = cpu_time(proxy.pid())?;
        let measured = if self.is_stranger {
            handshakes(program, port, length)?
        } else {
            program.arg("wrk");
            self.run(program, &format!("{scheme}://127.0.0.1:{port}{}", self.path), length)?
        };
        let cpu = cpu_time(proxy.pid())? - before;
        Ok(Measured { cpu, ..measured })
    }

    /// Runs wrk with this load; nobody's CPU time is measured.
    ///
    /// # Errors
    /// As [`Self::put_on`].
    pub fn run(&self, mut wrk: Command, url: &str, length: Duration) -> Result<Measured> {
        wrk.args(["--latency", "-t1"])
            .arg(format!("-c{}", self.connections))
            .arg(format!("-d{}s", length.as_secs()))
            .args(["-H", "Host: bench.example"]);
        if self.is_new {
            wrk.args(["-H", "Connection: close"]);
        }
        let output = wrk.arg(url).output().context("run wrk")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "wrk: {text}{}", String::from_utf8_lossy(&output.stderr));
        let measured = Measured::read(&text).with_context(|| format!("wrk said: {text}"))?;
        let bytes = measured.bytes / measured.requests as f64;
        // wrk rounds to a hundredth of its unit; requests that have no answer yet count for a few.
        ensure!(bytes > self.body as f64 * 0.9, "answers have {bytes} bytes: {text}");
        Ok(measured)
    }
}

/// One connection after the other, each with one request.
fn handshakes(mut program: Command, port: u16, length: Duration) -> Result<Measured> {
    let seconds = length.as_secs();
    program.args(["openssl", "s_time", "-new", "-www", "/"]).args([
        "-connect",
        &format!("127.0.0.1:{port}"),
        "-time",
        &seconds.to_string(),
    ]);
    let began = Instant::now();
    let output = program.output().context("run openssl")?;
    let time = began.elapsed();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // `564 connections in 3 real seconds, 155 bytes read per connection`
    let line = text.lines().find(|line| line.contains("real seconds")).context("no summary")?;
    let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [requests, _, bytes] = numbers[..] else { bail!("openssl said: {line}") };
    ensure!(requests > 0 && bytes > SMALL.body, "openssl said: {line}");
    let bytes = (requests * bytes) as f64;
    Ok(Measured { requests, bytes, time, cpu: Duration::ZERO, p50: None, p99: None })
}

/// What came of a load.
#[derive(Clone, Copy)]
pub struct Measured {
    requests: u64,
    bytes: f64,
    time: Duration,
    cpu: Duration,
    /// Of the time until an answer was there, the median.
    pub p50: Option<Duration>,
    /// And what 1 % took longer than.
    pub p99: Option<Duration>,
}

impl Measured {
    fn read(text: &str) -> Result<Self> {
        if text.contains("Non-2xx") {
            bail!("some answers were errors");
        }
        let line = |mark: &str| {
            text.lines()
                .map(str::trim)
                .find(|line| line.contains(mark))
                .with_context(|| format!("no {mark}"))
        };
        let percentile = |mark: &str| {
            let words = line(mark)?.split_whitespace().nth(1).context("no value")?;
            duration(words)
        };
        // `49152 requests in 2.00s, 8.01MB read`
        let mut summary = line("requests in")?.split_whitespace();
        let requests = summary.next().context("no number")?.parse()?;
        let time = duration(summary.nth(2).context("no time")?.trim_end_matches(','))?;
        let bytes = bytes(summary.next().context("no bytes")?)?;
        let (p50, p99) = (Some(percentile("50%")?), Some(percentile("99%")?));
        Ok(Self { requests, bytes, time, cpu: Duration::ZERO, p50, p99 })
    }

    /// Answers in a second.
    pub fn requests_a_second(&self) -> f64 {
        self.requests as f64 / self.time.as_secs_f64()
    }

    /// CPU time of a request, seconds.
    pub fn cpu_of_request(&self) -> f64 {
        self.cpu.as_secs_f64() / self.requests as f64
    }

    /// For the file of figures; times in microseconds.
    pub fn json(&self) -> serde_json::Value {
        json!({
            "requests_per_second": self.requests_a_second(),
            "cpu_per_request": self.cpu_of_request() * 1e6,
            "p50": self.p50.map(|it| it.as_secs_f64() * 1e6),
            "p99": self.p99.map(|it| it.as_secs_f64() * 1e6),
        })
    }
}

/// As wrk writes it: `812.00us`, `1.25ms`, `2.00s`.
fn duration(text: &str) -> Result<Duration> {
    scaled(text, &[("us", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0)])
        .map(Duration::from_secs_f64)
        .with_context(|| format!("`{text}` is no time"))
}

/// As wrk writes it: `8.01MB`.
fn bytes(text: &str) -> Result<f64> {
    let units =
        [("KB", 1024.0), ("MB", 1024.0 * 1024.0), ("GB", 1024.0 * 1024.0 * 1024.0), ("B", 1.0)];
    scaled(text, &units).with_context(|| format!("`{text}` is no number of bytes"))
}

fn scaled(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    units.iter().find_map(|(unit, factor)| {
        let number: f64 = text.strip_suffix(unit)?.parse().ok()?;
        Some(number * factor)
    })
}

/// User and system time of a process with all its threads (proc_pid_stat(5), fields 14 and 15).
fn cpu_time(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    // Behind the program's name, which may have anything in it.
    let (_, rest) = stat.rsplit_once(')').context("no name in stat")?;
    let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    let ticks: u64 = ticks.sum::<Result<_, _>>()?;
    Ok(Duration::from_millis(ticks * 1000 / TICKS))
}

/// In a second, of every Linux (`USER_HZ`).
const TICKS: u64 = 100;
