//! Targets that fall ill, recover, come and go, under load.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use anyhow::Result;
use lb_tests::{
    clients,
    netns::Namespace,
    programs::{Attached, Floor},
    servers::{HttpServer, Server},
    site::{PATIENCE, Site},
    topology::{Picture, target_host},
    wait_until,
};

/// A client that sends request after request.
struct Load {
    running: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: JoinHandle<Vec<Request>>,
}

struct Request {
    begun: Instant,
    result: Result<String>,
}

impl Load {
    fn start(client: &Namespace, servers: [SocketAddr; 2]) -> Self {
        let running = Arc::new(AtomicBool::new(true));
        let done = Arc::new(AtomicU64::new(0));
        let (is_running, count) = (Arc::clone(&running), Arc::clone(&done));
        let work = move || {
            let mut requests = Vec::new();
            for server in servers.into_iter().cycle() {
                if !is_running.load(Relaxed) {
                    break;
                }
                let begun = Instant::now();
                let result = clients::http_get(None, server, "/").map(|answer| answer.text());
                requests.push(Request { begun, result });
                count.fetch_add(1, Relaxed);
            }
            requests
        };
        Self { running, done, thread: client.run(|| thread::spawn(work)) }
    }

    /// Waits until so many more requests are over.
    fn wait_for(&self, requests: u64) {
        let goal = self.done.load(Relaxed) + requests;
        wait_until("load", PATIENCE, || self.done.load(Relaxed) >= goal).unwrap();
    }

    fn stop(self) -> Vec<Request> {
        self.running.store(false, Relaxed);
        self.thread.join().unwrap()
    }
}

fn failures(requests: &[Request]) -> Vec<String> {
    requests.iter().filter_map(|r| r.result.as_ref().err().map(|e| format!("{e:#}"))).collect()
}

fn answers_of<'a>(requests: &'a [Request], target: &'a str) -> impl Iterator<Item = &'a Request> {
    requests.iter().filter(move |r| r.result.as_ref().is_ok_and(|text| text.ends_with(target)))
}

#[test]
fn a_target_killed_under_load() {
    let mut site = Site::start(Picture::TwoNics, 3).unwrap();
    let load = Load::start(&site.topology.client, site.web());
    load.wait_for(30);
    site.kill_servers(1);
    site.wait_for_web(1, "unhealthy").unwrap();
    let unhealthy = Instant::now();
    load.wait_for(50);
    site.start_servers(1).unwrap();
    site.wait_for_web(1, "healthy").unwrap();
    let healthy = Instant::now();
    load.wait_for(60);

    let requests = load.stop();
    let late: Vec<_> = requests.into_iter().filter(|r| r.begun > unhealthy).collect();
    assert_eq!(failures(&late), [""; 0], "none fails once it is marked unhealthy");
    let back = answers_of(&late, "target1").filter(|r| r.begun > healthy).count();
    assert!(back > 5, "{back} requests after its return");
}

#[test]
fn a_target_added_under_load() {
    let mut site =
        Site::start_with(Picture::TwoNics, 3, |config| *config = config.with_targets([0, 1]))
            .unwrap();
    let connections = long_connections(&site);
    let load = Load::start(&site.topology.client, site.web());
    load.wait_for(20);

    site.reload(site.config.with_targets([0, 1, 2])).unwrap();
    for address in target_host(2).both() {
        let gets_traffic = || site.target("web", address).unwrap()["packets"].as_u64() > Some(0);
        wait_until("the new target's share", PATIENCE, gets_traffic).unwrap();
    }
    load.wait_for(60);
    echo_all(&connections, "a target more");
    let requests = load.stop();
    assert_eq!(failures(&requests), [""; 0]);
    assert!(answers_of(&requests, "target2").count() > 5, "it gets its share");
    echo_all(&connections, "still alive");
}

#[test]
fn a_target_removed_under_load_drains() {
    let mut site = Site::start(Picture::TwoNics, 3).unwrap();
    let connections = long_connections(&site);
    let load = Load::start(&site.topology.client, site.web());
    load.wait_for(20);

    site.reload(site.config.with_targets([0, 1])).unwrap();
    let removed = Instant::now();
    let target = site.target("web", target_host(2).v4).unwrap();
    assert_eq!(target["state"], "draining");
    assert_eq!(target["reason"], "Target.DeregistrationInProgress");
    load.wait_for(40);
    echo_all(&connections, "draining");
    let requests = load.stop();
    assert_eq!(failures(&requests), [""; 0]);
    let late = answers_of(&requests, "target2").filter(|r| r.begun > removed).count();
    assert_eq!(late, 0, "no new connection");
    let on_it: u64 = site.servers[2].as_ref().unwrap().tcp.iter().map(Server::served).sum();
    assert!(on_it > 10, "{on_it} of the long connections were on it");

    // Back before the end of its delay.
    site.reload(site.config.with_targets([0, 1, 2])).unwrap();
    site.wait_for_web(2, "healthy").unwrap();
    echo_all(&connections, "back again");
}

#[test]
fn draining_ends() {
    let mut site = Site::start_with(Picture::TwoNics, 2, |config| {
        config.group = "deregistration_delay = \"1s\"\n".into();
    })
    .unwrap();
    let connections = long_connections(&site);
    site.reload(site.config.with_targets([0])).unwrap();
    let is_gone = || site.target("web", target_host(1).v4).is_err();
    wait_until("end of draining", PATIENCE, is_gone).unwrap();
    let alive = |stream: &TcpStream| clients::echo(stream, b"alive?").is_ok();
    let survivors = site.client(|| connections.iter().filter(|stream| alive(stream)).count());
    let on_it: u64 = site.servers[0].as_ref().unwrap().tcp.iter().map(Server::served).sum();
    assert!(survivors < connections.len(), "those of the target are reset");
    assert!(survivors > 10, "{survivors} of {on_it} others live");
}

/// A hundred connections to the echo servers, half of them in each family.
fn long_connections(site: &Site) -> Vec<TcpStream> {
    let [v4, v6] = site.echo();
    let connections: Vec<_> = site.client(|| {
        let open = |index| clients::connect(None, if index % 2 == 0 { v4 } else { v6 }).unwrap();
        (0..100).map(open).collect()
    });
    echo_all(&connections, "hello");
    connections
}

fn echo_all(connections: &[TcpStream], message: &str) {
    for (index, stream) in connections.iter().enumerate() {
        let result = clients::echo(stream, message.as_bytes());
        result.unwrap_or_else(|error| panic!("connection {index}, {message}: {error:#}"));
    }
}

#[test]
fn states_and_reasons() {
    let mut site = Site::start_with(Picture::TwoNics, 4, |config| {
        config.tables = "[target_group.idle]\nport = 80\ntargets = [\"10.0.2.11\"]\n".into();
    })
    .unwrap();
    site.wait_for_web(0, "healthy").unwrap();
    for web in &site.servers[1].as_ref().unwrap().web {
        web.set_healthy(false);
    }
    site.kill_servers(2);
    // It hears nothing any more.
    let mut silent = Attached::load(Floor::Drop).unwrap();
    silent.attach(&site.topology.targets[3], "eth0").unwrap();
    for index in 1..4 {
        site.wait_for_web(index, "unhealthy").unwrap();
    }

    let reason = |index| site.target("web", target_host(index).v6).unwrap()["reason"].clone();
    assert_eq!(reason(0), serde_json::Value::Null);
    assert_eq!(reason(1), "Target.ResponseCodeMismatch");
    assert_eq!(reason(2), "Target.FailedHealthChecks");
    assert_eq!(reason(3), "Target.Timeout");
    let idle = site.target("idle", target_host(0).v4).unwrap();
    assert_eq!(idle["state"], "unused");
    assert_eq!(idle["reason"], "Target.NotInUse");

    drop(silent);
    site.start_servers(2).unwrap();
    for web in &site.servers[1].as_ref().unwrap().web {
        web.set_healthy(true);
    }
    for index in 1..4 {
        site.wait_for_web(index, "healthy").unwrap();
    }
}

#[test]
fn targets_are_asked_by_https() {
    const PORT: u16 = 8443;
    let site = Site::start_with(Picture::TwoNics, 2, |config| {
        config.health_check = format!("protocol = \"https\"\npath = \"/health\"\nport = {PORT}\n");
    })
    .unwrap();
    let start = |index: u8| {
        let namespace = &site.topology.targets[usize::from(index)];
        let both = target_host(index).both();
        both.map(|address| HttpServer::start_tls(namespace, (address, PORT).into()).unwrap())
    };
    let reason = |index| site.target("web", target_host(index).v4).unwrap()["reason"].clone();
    // Target 1 speaks HTTP without TLS there.
    let secure = start(0);
    let plain = target_host(1).both().map(|address| {
        HttpServer::start(&site.topology.targets[1], (address, PORT).into()).unwrap()
    });
    site.wait_for_web(0, "healthy").unwrap();
    site.wait_for_web(1, "unhealthy").unwrap();
    assert_eq!(reason(1), "Target.FailedHealthChecks");
    drop(plain);
    let _secure_too = start(1);
    site.wait_for_web(1, "healthy").unwrap();

    secure.iter().for_each(|server| server.set_healthy(false));
    site.wait_for_web(0, "unhealthy").unwrap();
    assert_eq!(reason(0), "Target.ResponseCodeMismatch");
    for web in site.web() {
        let text = site.client(|| clients::http_get(None, web, "/").unwrap().text());
        assert!(text.ends_with("target1"), "{text}");
    }
}

#[test]
fn all_unhealthy_fails_open() {
    let site = Site::start(Picture::TwoNics, 2).unwrap();
    for servers in site.servers.iter().flatten() {
        servers.web.iter().for_each(|web| web.set_healthy(false));
    }
    site.wait_for_web(0, "unhealthy").unwrap();
    site.wait_for_web(1, "unhealthy").unwrap();
    for web in site.web() {
        let names: std::collections::HashSet<_> = site.client(|| {
            (0..40).map(|_| clients::http_get(None, web, "/").unwrap().text()).collect()
        });
        assert_eq!(names.len(), 2, "both get traffic: {names:?}");
    }
}
