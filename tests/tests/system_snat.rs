//! Source address translation between real clients and real servers.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{fs, io, net::SocketAddr};

use lb_tests::{
    clients::{self, TIMEOUT},
    servers::body,
    site::{PATIENCE, Site},
    topology::{Dual, Picture, TARGETS},
    wait_until,
};

/// The balancer on the targets' segment.
fn balancer() -> Dual {
    Dual::new(TARGETS, 1)
}

fn start(picture: Picture, targets: u8, keys: &str) -> Site {
    let site = Site::start_with(picture, targets, |config| {
        config.group = format!("forwarding = \"snat\"\n{keys}");
    });
    let site = site.unwrap();
    for target in &site.topology.targets {
        // Nothing leads back to the clients but the balancer's own address.
        let [v4, v6] = balancer().both();
        target.ip(&format!("route del default via {v4}\nroute del default via {v6}")).unwrap();
    }
    site
}

fn reserved(site: &Site) -> String {
    let path = "/proc/sys/net/ipv4/ip_local_reserved_ports";
    site.topology.balancer.run(|| fs::read_to_string(path)).unwrap().trim().to_owned()
}

fn use_site(site: &Site) {
    for (web, echo) in site.web().into_iter().zip(site.echo()) {
        site.client(|| {
            let seen = clients::http_get(None, web, "/client").unwrap().text();
            let seen: SocketAddr = seen.parse().unwrap();
            assert_eq!(seen.ip(), balancer().like(web.ip()));
            assert!((10_000..60_000).contains(&seen.port()), "{seen}");
            let large = clients::http_get(None, web, "/bytes/1000000").unwrap();
            assert_eq!(large.body, body(1_000_000));
            let stream = clients::connect(None, echo).unwrap();
            clients::echo(&stream, b"one").unwrap();
            clients::transfer(&stream, 1_000_000).unwrap();
            assert_eq!(clients::udp_ping(None, echo, b"ping", TIMEOUT).unwrap(), b"ping");
        });
    }
}

#[test]
fn targets_without_a_route_back() {
    for picture in [Picture::TwoNics, Picture::OneNic] {
        let site = start(picture, 2, "");
        assert_eq!(reserved(&site), "10000-59999");
        use_site(&site);
        // Health checks go to the same targets from the same address.
        for index in 0..2 {
            site.wait_for_web(index, "healthy").unwrap();
        }
        let Site { agent, topology, .. } = site;
        agent.stop().unwrap();
        let path = "/proc/sys/net/ipv4/ip_local_reserved_ports";
        let reserved = topology.balancer.run(|| fs::read_to_string(path)).unwrap();
        assert_eq!(reserved.trim(), "", "given back at the end");
    }
}

/// What `nat` cannot do: the reply would bypass the balancer.
#[test]
fn a_client_on_the_targets_segment() {
    let mut site = start(Picture::OneNic, 2, "");
    site.reload(site.config.with_targets([0])).unwrap();
    let [target, neighbour] = &site.topology.targets[..] else { panic!("two") };
    for client in [neighbour, target] {
        for (web, echo) in site.web().into_iter().zip(site.echo()) {
            client.run(|| {
                let large = clients::http_get(None, web, "/bytes/1000000").unwrap();
                assert_eq!(large.body, body(1_000_000), "by {}", client.role());
                assert_eq!(clients::udp_ping(None, echo, b"ping", TIMEOUT).unwrap(), b"ping");
            });
        }
    }
}

#[test]
fn ports_run_out_and_come_back() {
    let site = start(Picture::TwoNics, 1, "snat_ports = \"20000-20003\"\n");
    for echo in site.echo() {
        let before = site.drops("PortAllocationError").unwrap();
        let streams: Vec<_> =
            site.client(|| (0..4).map(|_| clients::connect(None, echo).unwrap()).collect());
        let refused = site.client(|| clients::connect(None, echo).unwrap_err());
        let refused = refused.downcast::<io::Error>().unwrap();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert!(site.drops("PortAllocationError").unwrap() > before);
        for stream in &streams {
            clients::echo(stream, b"unharmed").unwrap();
        }
        drop(streams);
        wait_until("a port is free again", PATIENCE, || {
            site.client(|| clients::connect(None, echo).is_ok())
        })
        .unwrap();
    }
}
