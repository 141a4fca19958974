//! Clients: curl for a few requests, wrk for many, and a steady stream that knows when each
//! request began.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use super::namespace::{CLIENT, Network, TARGETS};
use crate::process::capture;

/// What curl got, one response a line, from `count` requests with a connection each; an error if
/// one of them fails.
pub fn curl(network: &Network, url: &str, count: usize) -> Result<String> {
    let url = format!("{url}?[1-{count}]");
    let mut curl = network.tool(CLIENT.name, "curl");
    curl.args(["--silent", "--show-error", "--fail", "--fail-early", "--max-time", "5"]);
    curl.args(["--header", "Connection: close", &url]);
    capture(&mut curl)
}

/// How many of the lines came from each target.
pub fn count_by_target(lines: &str) -> BTreeMap<&'static str, usize> {
    let count = |name| lines.lines().filter(|line| target_of(line) == Some(name)).count();
    TARGETS.iter().map(|target| (target.name, count(target.name))).collect()
}

/// Which target answered so.
fn target_of(response: &str) -> Option<&'static str> {
    let rest = response.split("hello world from ").nth(1)?;
    TARGETS.iter().map(|target| target.name).find(|name| rest.starts_with(*name))
}

/// Requests a second by wrk, and how many requests failed.
pub fn wrk(network: &Network, url: &str, seconds: u32) -> Result<(f64, u64)> {
    let mut wrk = network.tool(CLIENT.name, "wrk");
    wrk.args(["--threads", "2", "--connections", "32", "--timeout", "2s", "--duration"]);
    parse_wrk(&capture(wrk.arg(format!("{seconds}s")).arg(url))?)
}

fn parse_wrk(text: &str) -> Result<(f64, u64)> {
    let after = |key: &str| text.lines().find_map(|line| line.trim().strip_prefix(key));
    let rate = after("Requests/sec:").context("wrk names no rate")?.trim().parse()?;
    let socket_errors = after("Socket errors:").unwrap_or_default();
    let bad_responses = after("Non-2xx or 3xx responses:").unwrap_or_default();
    let numbers = [socket_errors, bad_responses]
        .into_iter()
        .flat_map(|line| line.split(|c: char| !c.is_ascii_digit()))
        .filter_map(|number| number.parse::<u64>().ok());
    Ok((rate, numbers.sum()))
}

/// One request of a stream.
pub struct Request {
    /// When it began.
    pub begin: Instant,
    /// When it was answered or failed.
    pub end: Instant,
    /// Why it was not answered by a target.
    pub failure: Option<anyhow::Error>,
}

/// Why requests failed, and how often each.
pub fn failures(requests: &[Request]) -> BTreeMap<String, usize> {
    let mut reasons = BTreeMap::new();
    for failure in requests.iter().filter_map(|request| request.failure.as_ref()) {
        *reasons.entry(format!("{failure:#}")).or_default() += 1;
    }
    reasons
}

/// Sends a steady stream of requests from the client, each on a new connection, while `work` runs.
pub fn stream<T>(
    network: &Network,
    address: &str,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Vec<Request>)> {
    const CLIENTS: usize = 8;
    let address: SocketAddr = address.parse()?;
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        let one = || {
            network.inside(CLIENT.name, || {
                let mut requests = Vec::new();
                while !end.load(Ordering::Relaxed) {
                    let begin = Instant::now();
                    let failure = get(address).err();
                    requests.push(Request { begin, end: Instant::now(), failure });
                    thread::sleep(Duration::from_millis(5));
                }
                Ok(requests)
            })
        };
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(one)).collect();
        let worked = work();
        end.store(true, Ordering::Relaxed);
        let mut requests = Vec::new();
        for client in clients {
            requests.extend(client.join().map_err(|_| anyhow!("a client panicked"))??);
        }
        Ok((worked?, requests))
    })
}

/// An error unless a target answers.
fn get(address: SocketAddr) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(1);
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).context("connect")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response).context("read the response")?;
    target_of(&response).with_context(|| format!("unexpected response {response:?}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses_are_counted_by_target() {
        let lines = "hello world from target-1, client 10.0.1.10\n\
                     hello world from target-3, client 10.0.1.10\n\
                     hello world from target-1, client 10.0.1.10\n\
                     502 Bad Gateway\n";
        let expected = BTreeMap::from([("target-1", 2), ("target-2", 0), ("target-3", 1)]);
        assert_eq!(count_by_target(lines), expected);
    }

    #[test]
    fn wrk_report_is_read() {
        let clean = "  2 threads and 32 connections\nRequests/sec:  68123.45\nTransfer/sec: 1MB\n";
        assert_eq!(parse_wrk(clean).unwrap(), (68123.45, 0));
        let broken = "  Socket errors: connect 1, read 20, write 0, timeout 300\n  \
                      Non-2xx or 3xx responses: 4000\nRequests/sec: 1.0\n";
        assert_eq!(parse_wrk(broken).unwrap(), (1.0, 4321));
        assert!(parse_wrk("unable to connect").is_err());
    }
}
