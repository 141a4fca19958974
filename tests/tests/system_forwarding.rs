//! Real clients and real servers on both sides of the real agent.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{collections::HashSet, net::SocketAddr};

use lb_tests::{
    clients::{self, TIMEOUT},
    frames::PacketSocket,
    packets::{Packet, endpoints},
    servers::body,
    site::{ECHO, Site, target_port},
    topology::{CLIENTS, Dual, Picture, client_host, target_host},
};

const SOURCE_PORT: u16 = 4321;

/// Everything a client does: requests, the address that the target sees, both echo services.
fn use_site(site: &Site) {
    for (web, echo) in site.web().into_iter().zip(site.echo()) {
        let source = SocketAddr::new(client_host().like(web.ip()), SOURCE_PORT);
        site.client(|| {
            let hello = clients::http_get(None, web, "/").unwrap();
            assert!(hello.text().starts_with("hello world from target"), "{hello:?}");
            let seen = clients::http_get(Some(source), web, "/client").unwrap();
            assert_eq!(seen.text(), source.to_string(), "the client's address is kept");

            let stream = clients::connect(None, echo).unwrap();
            clients::echo(&stream, b"one").unwrap();
            clients::echo(&stream, b"two").unwrap();
            clients::transfer(&stream, 100_000).unwrap();
            let answer = clients::udp_ping(Some(source), echo, b"ping", TIMEOUT);
            assert_eq!(answer.unwrap(), b"ping");
        });
    }
}

/// Requests of many clients reach all targets.
fn use_all_targets(site: &Site) {
    for web in site.web() {
        let names: HashSet<_> = site.client(|| {
            (0..40).map(|_| clients::http_get(None, web, "/").unwrap().text()).collect()
        });
        assert_eq!(names.len(), site.servers.len(), "{names:?}");
    }
}

#[test]
fn nat_with_two_nics() {
    let site = Site::start(Picture::TwoNics, 2).unwrap();
    use_site(&site);
    use_all_targets(&site);
}

#[test]
fn nat_with_one_nic() {
    let site = Site::start(Picture::OneNic, 2).unwrap();
    use_site(&site);
    use_all_targets(&site);
}

#[test]
fn direct_server_return() {
    let site = Site::start(Picture::Dsr, 2).unwrap();
    use_site(&site);
    use_all_targets(&site);
    let listener = &site.agent.status().unwrap()["load_balancers"][0]["listeners"][0];
    assert!(listener["packets"].as_u64().unwrap() > 0, "{listener}");
    assert_eq!(listener["reply_packets"], 0, "replies do not pass here");
}

#[test]
fn large_bodies_are_intact_both_ways() {
    const MEGABYTE: usize = 1 << 20;
    for picture in [Picture::TwoNics, Picture::Dsr] {
        let site = Site::start(picture, 2).unwrap();
        for (web, echo) in site.web().into_iter().zip(site.echo()) {
            site.client(|| {
                let got = clients::http_get(None, web, &format!("/bytes/{MEGABYTE}")).unwrap();
                assert!(got.body == body(MEGABYTE), "{} bytes", got.body.len());
                let posted = clients::http_post(web, &body(MEGABYTE)).unwrap();
                assert!(posted.body == body(MEGABYTE), "{} bytes", posted.body.len());
                clients::transfer(&clients::connect(None, echo).unwrap(), MEGABYTE).unwrap();
            });
        }
    }
}

#[test]
fn a_thousand_connections_at_once() {
    let site = Site::start(Picture::TwoNics, 3).unwrap();
    let [v4, v6] = site.echo();
    site.client(|| {
        let open = |index| clients::connect(None, if index % 2 == 0 { v4 } else { v6 }).unwrap();
        let connections: Vec<_> = (0..1000).map(open).collect();
        for round in 0..3 {
            for (index, connection) in connections.iter().enumerate() {
                clients::echo(connection, format!("{round} {index}").as_bytes()).unwrap();
            }
        }
    });
    let listeners = &site.agent.status().unwrap()["load_balancers"][0]["listeners"];
    let echo = listeners.as_array().unwrap().iter();
    let echo = echo.clone().find(|l| l["port"] == ECHO && l["protocol"] == "tcp").unwrap();
    assert_eq!(echo["new_flows"], 1000);
}

/// What arrives tagged leaves untagged: the targets' segment has no VLAN.
#[test]
fn vlan_tags_of_requests_are_removed() {
    let site = Site::start(Picture::TwoNics, 1).unwrap();
    let socket = PacketSocket::open(&site.topology.client, "eth0").unwrap();
    // A client that only sends frames answers no question about its MAC address in time.
    for address in Dual::new(CLIENTS, 1).both() {
        site.client(|| clients::ping(address)).unwrap();
    }
    for (port, vlans) in [(5001, vec![]), (5002, vec![7]), (5003, vec![7, 8])] {
        for echo in site.echo() {
            let source = SocketAddr::new(client_host().like(echo.ip()), port);
            let packet = Packet {
                source_mac: client_host().mac(),
                destination_mac: Dual::new(CLIENTS, 1).mac(),
                vlans: vlans.clone(),
                payload: b"tagged".to_vec(),
                ..Packet::udp(source, echo)
            };
            socket.send(&packet.build()).unwrap();
            let is_answer = |frame: &[u8]| endpoints(frame).is_ok_and(|e| e == (echo, source));
            let answer = socket.receive(TIMEOUT, is_answer);
            let answer = answer.unwrap_or_else(|e| panic!("{vlans:?}: {e}\n{}", site.agent.log()));
            assert_eq!(answer[..6], client_host().mac());
            assert!(answer.ends_with(b"tagged"));
        }
    }
    assert_eq!(site.servers[0].as_ref().unwrap().datagrams(), 6);
}

/// The seed is fixed and so are the flows: what this finds, it finds always.
#[test]
fn ten_thousand_flows_are_spread_by_weight() {
    const FLOWS: u16 = 10_000;
    let weights = [1, 2, 3, 4];
    let site = Site::start_with(Picture::TwoNics, 4, |config| {
        config.agent += "hash_seed = \"0x1234567890abcdef\"\n";
        config.targets = (0..).zip(weights).collect();
    })
    .unwrap();
    let [v4, _] = site.echo();
    site.client(|| {
        for port in 20_000..20_000 + FLOWS {
            let source = client_host().v4_port(port);
            clients::udp_ping(Some(source), v4, b"flow", TIMEOUT).unwrap();
        }
    });
    let sum: u16 = weights.iter().sum();
    for (servers, weight) in site.servers.iter().flatten().zip(weights) {
        let share = f64::from(weight) / f64::from(sum);
        let expected = f64::from(FLOWS) * share;
        let deviation = (expected * (1.0 - share)).sqrt();
        let served = servers.datagrams() as f64;
        assert!((served - expected).abs() < 4.0 * deviation, "weight {weight}: {served}");
    }
    let counted: u64 = (0..4)
        .map(|index| {
            site.target("udp", target_host(index).v4).unwrap()["packets"].as_u64().unwrap()
        })
        .sum();
    assert_eq!(counted, u64::from(FLOWS), "the agent's counters agree");
}

/// The client talks to a target's own address through the balancer: it must get that address
/// back, also when it uses the listener from the same port.
#[test]
fn a_targets_own_address_stays_reachable() {
    let site = Site::start(Picture::TwoNics, 1).unwrap();
    for echo in site.echo() {
        let port = target_port(Picture::TwoNics, ECHO);
        let target = SocketAddr::new(target_host(0).like(echo.ip()), port);
        let source = Some(SocketAddr::new(client_host().like(echo.ip()), SOURCE_PORT));
        site.client(|| {
            // A connected socket takes answers of that address only.
            for destination in [target, echo, target, target, echo, echo, target] {
                let answer = clients::udp_ping(source, destination, b"who?", TIMEOUT);
                assert_eq!(answer.unwrap(), b"who?", "{destination}");
            }
            let direct = clients::connect(None, target).unwrap();
            let balanced = clients::connect(None, echo).unwrap();
            for stream in [&direct, &balanced, &direct] {
                clients::echo(stream, b"own address").unwrap();
            }
        });
    }
}

/// At a target, a client's port is one connection, whichever listener it came by.
#[test]
fn one_client_port_through_two_listeners() {
    let second = |port| {
        format!(
            "[[load_balancer.site.listener]]\nport = {port}\nprotocol = \"tcp\"\n\
             target_group = \"tcp\"\n"
        )
    };
    let mut site = Site::start_with(Picture::TwoNics, 2, |config| {
        config.tables = second(1007);
    })
    .unwrap();
    for echo in site.echo() {
        let other = SocketAddr::new(echo.ip(), 1007);
        let source = |port| Some(SocketAddr::new(client_host().like(echo.ip()), port));
        site.client(|| {
            for port in 6000..6020 {
                let one = clients::connect(source(port), echo).unwrap();
                let two = clients::connect(source(port), other).unwrap();
                for stream in [&one, &two, &one] {
                    clients::echo(stream, b"not mixed up").unwrap();
                }
            }
        });
    }

    // With one target the second connection has nowhere to go.
    site.reload(site.config.with_targets([0])).unwrap();
    let [echo, _] = site.echo();
    let other = SocketAddr::new(echo.ip(), 1007);
    let source = Some(client_host().v4_port(7000));
    site.client(|| {
        let one = clients::connect(source, echo).unwrap();
        let error = clients::connect(source, other).unwrap_err();
        let error = error.downcast::<std::io::Error>().unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        clients::echo(&one, b"unharmed").unwrap();
    });
    assert!(site.drops("PortAllocationError").unwrap() > 0);
}

/// Counters follow what happens.
#[test]
fn replies_are_counted() {
    let site = Site::start(Picture::TwoNics, 1).unwrap();
    let [_, v6] = site.echo();
    site.client(|| clients::udp_ping(None, v6, b"12345678", TIMEOUT).unwrap());
    let target = site.target("udp", target_host(0).v6).unwrap();
    let ip_udp_and_payload = 40 + 8 + 8;
    for (packets, bytes) in [("packets", "bytes"), ("reply_packets", "reply_bytes")] {
        assert_eq!(target[packets], 1, "{target}");
        assert_eq!(target[bytes], ip_udp_and_payload, "{target}");
    }
}
