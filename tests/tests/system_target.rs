//! Targets that enforce their security group, among real machines.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "target_progrun/frames.rs"]
#[expect(dead_code, reason = "the program runs build more kinds of frames")]
mod frames;

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use aya::programs::{SchedClassifier, TcAttachType};
use lb_tests::{
    agent::{Agent, Home},
    clients,
    frames::PacketSocket,
    netns::{Namespace, link},
    servers::{HttpServer, Server, body},
    site::{Config, PATIENCE, Site, target_port},
    topology::{CLIENTS, Dual, Picture, TARGETS, Topology, client_host, target_host},
    wait_until,
};
use nix::sys::signal::Signal;

const DENIED: &str = "SecurityGroupDenied";
/// Long enough for an answer that would come.
const SHORT: Duration = Duration::from_millis(300);

/// The load balancer's group, and the targets': from the load balancer and nobody else.
fn groups(picture: Picture) -> String {
    let balancer = Dual::new(TARGETS, 1);
    let mac = balancer.mac().map(|byte| format!("{byte:02x}")).join(":");
    let ports = [7, 80].map(|port| target_port(picture, port));
    let rules =
        [("tcp", ports[0]), ("tcp", ports[1]), ("udp", ports[0])].map(|(protocol, port)| {
            format!("{{ protocol = \"{protocol}\", ports = \"{port}\", sources = [\"sg:lb\"] }},\n")
        });
    format!(
        "[security_group.lb]\nmembers = [{balancer}, \"{mac}\"]\n\
         ingress = [{{ protocol = \"all\", sources = [\"0.0.0.0/0\", \"::/0\"] }}]\n\
         [security_group.target]\ningress = [{}]\n",
        rules.concat()
    )
}

fn guarded(config: &mut Config, picture: Picture) {
    config.group += "security_group = \"target\"\n";
    config.balancer = "security_groups = [\"lb\"]\n".into();
    config.tables = groups(picture);
}

/// The configuration of a machine that is a target of group `web` and lets in what `rules` say.
fn target_config(index: u8, rules: &str) -> String {
    format!(
        "[security_group.target]\ningress = [{rules}]\n[target_group.web]\nport = 8080\n\
         security_group = \"target\"\ntargets = [{}]\n",
        target_host(index)
    )
}

fn start_target(machine: &Namespace, config: &str) -> Agent {
    let home = Home::new(config).unwrap();
    Agent::start_in(home, machine, &["eth0"], &["--role", "target"]).unwrap()
}

fn denied(agent: &Agent) -> u64 {
    agent.status().unwrap()["drops"][DENIED].as_u64().unwrap_or(0)
}

/// What `ip` and `tc` say that an agent could have changed, and programs on the way out.
fn machine(namespace: &Namespace) -> String {
    let said = |program: &str, arguments: &[&str]| {
        let output = namespace.command(program).args(arguments).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        // A program has another number each time: `xdp/id:7`, or `prog/xdp id 7`.
        let words: Vec<&str> = text.split(' ').collect();
        let before = std::iter::once("").chain(words.iter().copied());
        let stays = before
            .zip(&words)
            .filter(|(before, word)| *before != "id" && !word.starts_with("xdp/id:"));
        stays.map(|(_, word)| *word).collect::<Vec<_>>().join(" ")
    };
    let attached = namespace
        .run(|| SchedClassifier::query_tcx("eth0", TcAttachType::Egress).map(|(_, all)| all.len()));
    [
        said("ip", &["address"]),
        said("ip", &["link"]),
        said("tc", &["qdisc", "show"]),
        format!("{} programs on the way out", attached.unwrap()),
    ]
    .join("\n")
}

#[test]
fn nat_clients_come_in_through_the_load_balancer_only() {
    let picture = Picture::TwoNics;
    let site = Site::start_with(picture, 2, |config| guarded(config, picture)).unwrap();
    let guards: Vec<Agent> = site
        .topology
        .targets
        .iter()
        .map(|target| start_target(target, &site.config.to_string()))
        .collect();
    for web in site.web() {
        for _ in 0..8 {
            site.client(|| clients::http_get(None, web, "/").unwrap());
        }
    }
    for echo in site.echo() {
        let ask = || site.client(|| clients::udp_ping(None, echo, b"may I?", SHORT).is_ok());
        wait_until("an answer through the load balancer", PATIENCE, ask).unwrap();
    }
    assert_eq!(guards.iter().map(denied).sum::<u64>(), 0, "health checks come in as well");

    // To the target itself, over the balancer as a router: refused there, the target cannot tell.
    for target in target_host(0).both() {
        let before = site.drops(DENIED).unwrap();
        let web = SocketAddr::new(target, target_port(picture, 80));
        site.client(|| clients::connect(None, web).unwrap_err());
        let echo = SocketAddr::new(target, target_port(picture, 7));
        site.client(|| clients::udp_ping(None, echo, b"may I?", SHORT).unwrap_err());
        assert!(site.drops(DENIED).unwrap() >= before + 2);
        assert_eq!(denied(&guards[0]), 0);
    }
    // From the targets' segment: refused by the target.
    for target in target_host(0).both() {
        let before = denied(&guards[0]);
        let web = SocketAddr::new(target, target_port(picture, 80));
        site.topology.targets[1].run(|| clients::connect(None, web).unwrap_err());
        assert!(denied(&guards[0]) > before);
    }
    // Through the balancer the same client is still served.
    for web in site.web() {
        site.client(|| clients::http_get(None, web, "/").unwrap());
    }
}

/// Packets come from the load balancer's address, so that is what its group is known by.
#[test]
fn snat_clients_come_in_through_the_load_balancer_only() {
    let picture = Picture::TwoNics;
    let balancer = Dual::new(TARGETS, 1);
    let site = Site::start_with(picture, 2, |config| {
        config.group = "forwarding = \"snat\"\n".into();
        guarded(config, picture);
        // Its MAC address would let in what it only routes.
        let (before, after) = config.tables.split_once("members = [").unwrap();
        let (_, after) = after.split_once(']').unwrap();
        config.tables = format!("{before}members = [{balancer}]{after}");
    })
    .unwrap();
    let guards: Vec<Agent> = site
        .topology
        .targets
        .iter()
        .map(|target| start_target(target, &site.config.to_string()))
        .collect();
    for (web, echo) in site.web().into_iter().zip(site.echo()) {
        for _ in 0..8 {
            let answer = site.client(|| clients::http_get(None, web, "/client").unwrap());
            assert!(answer.text().contains(&balancer.like(web.ip()).to_string()));
        }
        let ask = || site.client(|| clients::udp_ping(None, echo, b"may I?", SHORT).is_ok());
        wait_until("an answer through the load balancer", PATIENCE, ask).unwrap();
    }
    assert_eq!(guards.iter().map(denied).sum::<u64>(), 0, "health checks come in as well");

    for target in target_host(0).both() {
        // Over the balancer as a router, and from the targets' segment.
        for stranger in [&site.topology.client, &site.topology.targets[1]] {
            let refused = || denied(&guards[0]) + site.drops(DENIED).unwrap();
            let before = refused();
            let web = SocketAddr::new(target, target_port(picture, 80));
            stranger.run(|| clients::connect(None, web).unwrap_err());
            let echo = SocketAddr::new(target, target_port(picture, 7));
            stranger.run(|| clients::udp_ping(None, echo, b"may I?", SHORT).unwrap_err());
            assert!(refused() >= before + 2, "{}", stranger.role());
        }
    }
    for web in site.web() {
        site.client(|| clients::http_get(None, web, "/").unwrap());
    }
}

#[test]
fn tunnelled_clients_come_in_through_the_load_balancer_only() {
    for forwarding in ["dsr_ipip", "dsr_gue"] {
        let picture = Picture::Dsr;
        let site = Site::start_with(picture, 2, |config| {
            config.group = format!("forwarding = \"{forwarding}\"\n");
            guarded(config, picture);
            let members = "members = [\"172.16.0.0/16\", \"100::/64\", ";
            config.tables = config.tables.replacen("members = [", members, 1);
        })
        .unwrap();
        let guards: Vec<Agent> = site
            .topology
            .targets
            .iter()
            .map(|target| start_target(target, &site.config.to_string()))
            .collect();
        site.wait_for_web(0, "healthy").unwrap();
        site.wait_for_web(1, "healthy").unwrap();
        for web in site.web() {
            let get = || site.client(|| clients::http_get(None, web, "/").is_ok());
            wait_until("an answer through the load balancer", PATIENCE, get).unwrap();
            for _ in 0..8 {
                let answer = site.client(|| clients::http_get(None, web, "/client").unwrap());
                assert!(answer.text().contains(&client_host().like(web.ip()).to_string()));
            }
        }
        assert_eq!(guards.iter().map(denied).sum::<u64>(), 0, "{forwarding}");
        let unwrapped = |agent: &Agent| {
            agent.status().unwrap()["own_target"]["unwrapped_packets"].as_u64().unwrap()
        };
        assert!(guards.iter().map(unwrapped).sum::<u64>() > 0, "{forwarding}");

        for target in target_host(0).both() {
            let before = denied(&guards[0]);
            let web = SocketAddr::new(target, target_port(picture, 80));
            site.client(|| clients::connect(None, web).unwrap_err());
            assert!(denied(&guards[0]) > before, "{forwarding}");
        }
        for web in site.web() {
            site.client(|| clients::http_get(None, web, "/").unwrap());
        }
        site.wait_for_web(0, "healthy").unwrap();
    }
}

/// A minimal name server: answers any question for an A record with 192.0.2.53 (RFC 1035).
fn answer(query: &[u8]) -> Vec<u8> {
    let mut answer = query.to_vec();
    answer[2] |= 0x80;
    answer[7] = 1;
    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 53]);
    answer
}

#[test]
fn a_closed_target_can_still_ask_and_download() {
    let topology = Topology::new(Picture::TwoNics, 1).unwrap();
    let target = &topology.targets[0];
    let agent = start_target(target, &target_config(0, ""));
    assert_eq!(agent.status().unwrap()["agent"]["role"], "target");
    assert_eq!(agent.status().unwrap()["own_target"]["security_groups"][0], "target");
    for (own, client) in target_host(0).both().into_iter().zip(client_host().both()) {
        let before = denied(&agent);
        // DNS, with a server outside.
        let server = topology.client.run(|| UdpSocket::bind((client, 53)).unwrap());
        let serving = std::thread::spawn(move || {
            let mut query = [0; 512];
            let (length, from) = server.recv_from(&mut query).unwrap();
            server.send_to(&answer(&query[..length]), from).unwrap();
        });
        let query =
            b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03www\x02lb\x00\x00\x01\x00\x01";
        let resolved = target.run(|| {
            clients::udp_ping(None, (client, 53).into(), query, Duration::from_secs(5)).unwrap()
        });
        assert!(resolved.starts_with(b"\x12\x34") && resolved.ends_with(&[192, 0, 2, 53]));
        serving.join().unwrap();
        // An answer in fragments.
        let echo = Server::udp_echo(&topology.client, (client, 5353).into()).unwrap();
        let large = body(4000);
        let same = target.run(|| clients::udp_ping(None, echo.address(), &large, SHORT).unwrap());
        assert_eq!(same, large);
        // A download.
        let web = HttpServer::start(&topology.client, (client, 80).into()).unwrap();
        let download =
            target.run(|| clients::http_get(None, web.address(), "/bytes/2000000").unwrap());
        assert_eq!(download.body, body(2_000_000));
        target.run(|| clients::ping(client).unwrap());
        assert_eq!(denied(&agent), before);

        // Nothing else.
        let inside = HttpServer::start(target, (own, 8080).into()).unwrap();
        topology.client.run(|| clients::connect(None, inside.address()).unwrap_err());
        topology.client.run(|| clients::ping(own).unwrap_err());
        assert!(denied(&agent) > before);
    }
}

#[test]
fn connections_from_before_go_on() {
    let topology = Topology::new(Picture::TwoNics, 1).unwrap();
    let target = &topology.targets[0];
    let outside = Server::tcp_echo(&topology.client, client_host().v4_port(7)).unwrap();
    let connection = target.run(|| clients::connect(None, outside.address()).unwrap());
    let agent = start_target(target, &target_config(0, ""));
    clients::echo(&connection, b"still here").unwrap();
    let before = machine(target);
    // Killed, and started anew.
    agent.signal(Signal::SIGKILL).unwrap();
    let is_gone = || {
        let links = target.command("ip").arg("link").output().unwrap().stdout;
        !String::from_utf8(links).unwrap().contains("xdp")
    };
    wait_until("end of the program", PATIENCE, is_gone).unwrap();
    clients::echo(&connection, b"unguarded").unwrap();
    let agent = start_target(target, &target_config(0, ""));
    clients::echo(&connection, b"guarded again").unwrap();
    assert_eq!(machine(target), before);
    let inside = HttpServer::start(target, target_host(0).v4_port(8080)).unwrap();
    topology.client.run(|| clients::connect(None, inside.address()).unwrap_err());
    agent.stop().unwrap();
}

#[test]
fn a_nic_that_comes_back_is_attached_again() {
    let [here, there] = ["target", "peer"].map(|role| Namespace::new(role).unwrap());
    let make = || {
        link((&here, "eth0"), (&there, "eth0")).unwrap();
        for (machine, host) in [(&here, 1), (&there, 2)] {
            machine.ip(&format!("address add 10.0.2.{host}/24 dev eth0")).unwrap();
        }
    };
    make();
    let config = "[security_group.target]\ningress = []\n[target_group.web]\nport = 8080\n\
                  security_group = \"target\"\ntargets = [\"10.0.2.1\"]\n";
    let mut agent = start_target(&here, config);
    let _inside = HttpServer::start(&here, "10.0.2.1:8080".parse().unwrap()).unwrap();
    let is_closed = || {
        let before = denied(&agent);
        there.run(|| clients::connect(None, "10.0.2.1:8080".parse().unwrap()).is_err())
            && denied(&agent) > before
    };
    let interfaces = || agent.status().unwrap()["interfaces"].as_array().unwrap().len();
    assert!(is_closed());
    for _ in 0..2 {
        here.ip("link delete eth0").unwrap();
        wait_until("the end of eth0", PATIENCE, || interfaces() == 0).unwrap();
        let warnings = agent.status().unwrap()["warnings"].to_string();
        assert!(warnings.contains("eth0 is gone"), "{warnings}");
        make();
        wait_until("eth0 attached", PATIENCE, || interfaces() == 1).unwrap();
        wait_until("the rules", PATIENCE, is_closed).unwrap();
        // Its own flows are recorded, by the other program.
        let outside = Server::tcp_echo(&there, "10.0.2.2:7".parse().unwrap()).unwrap();
        let connection = here.run(|| clients::connect(None, outside.address()).unwrap());
        clients::echo(&connection, b"own").unwrap();
        let warnings = agent.status().unwrap()["warnings"].to_string();
        assert!(!warnings.contains("eth0 is gone"), "{warnings}");
    }
    agent.wait_for_log("the interface is back").unwrap();
    agent.stop().unwrap();
}

#[test]
fn nothing_is_left_behind() {
    let topology = Topology::new(Picture::TwoNics, 1).unwrap();
    let target = &topology.targets[0];
    let before = machine(target);
    for _ in 0..2 {
        let agent = start_target(target, &target_config(0, ""));
        assert_ne!(machine(target), before);
        for interface in agent.status().unwrap()["interfaces"].as_array().unwrap() {
            assert_eq!(interface["mode"], "native");
        }
        agent.stop().unwrap();
        assert_eq!(machine(target), before);
    }
}

#[test]
fn a_reload_takes_effect_at_once() {
    let topology = Topology::new(Picture::TwoNics, 1).unwrap();
    let target = &topology.targets[0];
    let rule =
        |host: Dual| format!("{{ protocol = \"tcp\", ports = \"8007\", sources = [{host}] }}");
    let agent = start_target(target, &target_config(0, ""));
    let echo = Server::tcp_echo(target, target_host(0).v4_port(8007)).unwrap();
    let reload = |config: &str| {
        let reloads = || agent.log().matches("configuration reloaded").count();
        let before = reloads();
        agent.reload(config).unwrap();
        wait_until("reload", PATIENCE, || reloads() > before).unwrap();
    };
    topology.client.run(|| clients::connect(None, echo.address()).unwrap_err());
    reload(&target_config(0, &rule(client_host())));
    let connection = topology.client.run(|| clients::connect(None, echo.address()).unwrap());
    clients::echo(&connection, b"allowed").unwrap();

    // What is wrong changes nothing.
    agent.reload(&target_config(0, "oops")).unwrap();
    let refused = || !agent.status().unwrap()["agent"]["reload_error"].is_null();
    wait_until("a refused reload", PATIENCE, refused).unwrap();
    clients::echo(&connection, b"still allowed").unwrap();

    reload(&target_config(0, &rule(Dual::new(CLIENTS, 66))));
    clients::echo(&connection, b"cut off").unwrap_err();
    assert!(denied(&agent) > 0);

    // Another machine's target: nothing is enforced here.
    reload(&target_config(1, ""));
    topology.client.run(|| clients::connect(None, echo.address()).unwrap());
    let warnings = agent.status().unwrap()["warnings"].to_string();
    assert!(warnings.contains("no target group has an address of this machine"), "{warnings}");
}

/// Frames made by hand, from the client's machine: what matters is where they say they come from.
#[test]
fn tunnels_from_the_load_balancer_are_unwrapped() {
    let topology = Topology::new(Picture::Dsr, 1).unwrap();
    let target = &topology.targets[0];
    let config = |forwarding: &str| {
        format!(
            "[security_group.lb]\nmembers = [\"172.16.0.0/16\", \"100::/64\", \"10.0.2.1\"]\n\
             ingress = [{{ protocol = \"all\", sources = [\"0.0.0.0/0\"] }}]\n\
             [security_group.target]\n\
             ingress = [{{ protocol = \"udp\", ports = \"7\", sources = [\"sg:lb\"] }}]\n\
             [target_group.udp]\nprotocol = \"udp\"\nport = 7\nforwarding = \"{forwarding}\"\n\
             security_group = \"target\"\ntargets = [{}]\n",
            target_host(0)
        )
    };
    let wire = PacketSocket::open(&topology.client, "eth0").unwrap();
    let _servers: Vec<Server> = topology
        .listener
        .both()
        .map(|address| Server::udp_echo(target, (address, 7).into()).unwrap())
        .into();
    for forwarding in ["dsr_ipip", "dsr_gue"] {
        let agent = start_target(target, &config(forwarding));
        for (client, listener) in client_host().both().into_iter().zip(topology.listener.both()) {
            let socket = topology.client.run(|| UdpSocket::bind((client, 0)).unwrap());
            socket.set_read_timeout(Some(SHORT)).unwrap();
            let inner = lb_tests::packets::Packet {
                source_mac: client_host().mac(),
                destination_mac: Dual::new(CLIENTS, 1).mac(),
                ..frames::udp(
                    &socket.local_addr().unwrap().to_string(),
                    &SocketAddr::new(listener, 7).to_string(),
                )
            };
            let answered = |frame: &[u8]| {
                wire.send(frame).unwrap();
                let mut answer = [0; 64];
                let answer = socket
                    .recv_from(&mut answer)
                    .map(|(length, from)| (answer[..length].to_vec(), from));
                match answer {
                    Ok(answer) => {
                        assert_eq!(answer, (inner.payload.clone(), (listener, 7).into()));
                        true
                    }
                    Err(_) => false,
                }
            };
            let outer = |source: IpAddr, target: IpAddr| match forwarding {
                "dsr_ipip" => frames::ipip(&source.to_string(), &target.to_string(), &inner),
                _ => {
                    let (from, to) =
                        (SocketAddr::new(source, 50_000), SocketAddr::new(target, 6080));
                    frames::gue(&from.to_string(), &to.to_string(), &inner)
                }
            };
            for (family, source) in ["172.16.3.4", "100::3:4"].into_iter().enumerate() {
                let destination = target_host(0).both()[family];
                let source: IpAddr = source.parse().unwrap();
                // Neighbours are found out on the way there and back.
                let ask = || answered(&outer(source, destination));
                wait_until(&format!("{forwarding} in {source}"), PATIENCE, ask).unwrap();
                let before = denied(&agent);
                assert!(
                    !answered(&outer(client_host().both()[family], destination)),
                    "a stranger's"
                );
                assert!(denied(&agent) > before);
            }
        }
        let unwrapped = &agent.status().unwrap()["own_target"]["unwrapped_packets"];
        assert!(unwrapped.as_u64().unwrap() >= 4);
        agent.stop().unwrap();
    }
}
