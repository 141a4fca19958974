//! Targets that do not answer.

use std::{
    future::pending,
    net::SocketAddr,
    time::{Duration, Instant},
};

use futures::future::{join_all, join3};
use lb_tests::{
    servers::{HttpServer, Server},
    topology::{Topology, target_host},
};
use socket2::{Domain, Socket, Type};
use tokio::{net::TcpStream, time::sleep};

use crate::{
    bystander::Bystander,
    http::{ask, get},
    scene::{self, Servers},
    world::{PORT, World, group},
};

/// Where a target's system accepts nothing.
const FULL: u16 = 8082;
/// Where target 0 accepts and never answers, and target 1 is a web server.
const HALF: u16 = 8083;

/// Sockets that use up the queue of one that listens: its system drops every further SYN.
fn swallows(at: SocketAddr) -> Vec<Socket> {
    let new = || Socket::new(Domain::for_address(at), Type::STREAM, None).unwrap();
    let socket = new();
    socket.bind(&at.into()).unwrap();
    socket.listen(0).unwrap();
    let mut all = vec![socket];
    loop {
        let client = new();
        if client.connect_timeout(&at.into(), Duration::from_millis(500)).is_err() {
            return all;
        }
        all.push(client);
    }
}

/// All servers of these tests; they live for as long as the world.
struct Silent {
    _servers: Servers,
    _silent: Vec<Server>,
    _web: Vec<HttpServer>,
    _full: Vec<Vec<Socket>>,
}

fn servers(topology: &Topology) -> Silent {
    let [first, second] = [0, 1].map(|index| &topology.targets[index]);
    let silent = |address| {
        let serve = |stream: TcpStream| async {
            let _stream = stream;
            pending::<()>().await;
        };
        Server::connections(first, SocketAddr::new(address, HALF), serve).unwrap()
    };
    let web = |address| HttpServer::start(second, SocketAddr::new(address, HALF)).unwrap();
    let full = |address| first.run(|| swallows((address, FULL).into()));
    Silent {
        _servers: scene::servers(topology),
        _silent: target_host(0).both().map(silent).into(),
        _web: target_host(1).both().map(web).into(),
        _full: target_host(0).both().map(full).into(),
    }
}

/// So many requests at once, all answered with 504 and not before. How many that are.
async fn are_given_up(at: SocketAddr, path: &str, after: Duration) -> u64 {
    let began = Instant::now();
    let answers = join_all((0..50).map(|_| ask(at, get(path)))).await;
    let took = began.elapsed();
    assert!(took > after.mul_f32(0.9), "{path}: {took:?}");
    let statuses = answers.into_iter().map(|answer| answer.unwrap().status);
    statuses.inspect(|&status| assert_eq!(status, 504, "{path}")).count() as u64
}

#[test]
fn silent_targets_cost_their_own_requests_only() {
    let check = format!(", path = \"/health\", port = {PORT}");
    let world = World::start(servers, |authority| {
        let fair = "protocol = \"http\"\nalgorithm = \"least_outstanding_requests\"";
        let groups = group("full", FULL, &[0], "protocol = \"http\"", &check)
            + &group("half", HALF, &[0, 1], fair, &check);
        let rule = |priority: u8, name: &str| {
            format!(
                "[[load_balancer.site.listener.rule]]\npriority = {priority}\n\
                 path_pattern = [\"/{name}\"]\ntarget_group = \"{name}\"\n"
            )
        };
        let rules = rule(2, "full") + &rule(3, "half");
        groups + &scene::config_with(authority, "idle_timeout = \"8s\"", &rules)
    });
    let bystander = Bystander::start(&world);
    let at = world.at(80)[0];
    let given_up = scene::inside(&world, async || {
        // The time for a connection is fixed; an answer has the idle timeout.
        let full = are_given_up(at, "/full", Duration::from_secs(10));
        let silence = are_given_up(at, "/hostile/silence", Duration::from_secs(8));
        // Requests that wait count: a target that has some gets no more while the other has none.
        let half = join_all((0..100).map(async |number| {
            sleep(Duration::from_millis(20) * number).await;
            ask(at, get("/half")).await.unwrap().status
        }));
        let (full, silence, half) = join3(full, silence, half).await;
        let served = half.iter().filter(|&&status| status == 200).count();
        assert!(served > 75, "{served} of 100: {half:?}");
        full + silence + (100 - served) as u64
    });
    assert_eq!(world.metric("HTTPCode_ELB_504_Count"), given_up);
    bystander.finish();
}
