//! What the network says about packets, between real clients and real servers.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::io::{self, ErrorKind};

use lb_tests::{
    clients::{self, TIMEOUT},
    servers::body,
    site::Site,
    topology::{Dual, Picture, TARGETS},
    tunnels::Decapsulator,
};

const MEGABYTE: usize = 1 << 20;
/// What the way to the client carries, bytes; every other way carries 1500.
const NARROW: u32 = 1400;
/// Datagrams until the sender must have heard that nobody listens.
const TRIES: usize = 3;

fn start(picture: Picture, forwarding: &str) -> Site {
    Site::start_with(picture, 1, |config| {
        config.group = format!("forwarding = \"{forwarding}\"\n");
    })
    .unwrap()
}

/// A router far away cannot pass a reply on: the target hears of it through the balancer, and the page
/// comes in smaller packets.
fn use_narrow_way(site: &Site) {
    let router = site.topology.router.as_ref().unwrap();
    router.ip(&format!("link set eth0 mtu {NARROW}")).unwrap();
    for web in site.web() {
        site.client(|| {
            let got = clients::http_get(None, web, &format!("/bytes/{MEGABYTE}")).unwrap();
            assert!(got.body == body(MEGABYTE), "{web}: {} bytes", got.body.len());
        });
    }
}

#[test]
fn a_narrow_way_beyond_a_router_with_nat() {
    use_narrow_way(&start(Picture::OneNic, "nat"));
}

#[test]
fn a_narrow_way_beyond_a_router_with_snat() {
    let site = start(Picture::OneNic, "snat");
    let [v4, v6] = Dual::new(TARGETS, 1).both();
    for target in &site.topology.targets {
        target.ip(&format!("route del default via {v4}\nroute del default via {v6}")).unwrap();
    }
    use_narrow_way(&site);
}

/// The replies go past the balancer, what is said about them does not.
#[test]
fn a_narrow_way_beyond_a_router_with_direct_server_return() {
    use_narrow_way(&start(Picture::Dsr, "dsr_l2"));
    for forwarding in ["dsr_ipip", "dsr_gue"] {
        let site = start(Picture::Dsr, forwarding);
        let ends: Vec<_> = site.topology.targets.iter().map(Decapsulator::start).collect();
        use_narrow_way(&site);
        for end in ends {
            let faults = end.unwrap().seen().faults;
            assert!(faults.is_empty(), "{faults:?}");
        }
    }
}

/// The balancer's own way to the client is the narrow one.
#[test]
fn replies_that_do_not_fit_are_sent_smaller() {
    for forwarding in ["nat", "snat"] {
        let site = start(Picture::TwoNics, forwarding);
        let balancer = &site.topology.balancer;
        balancer.ip(&format!("link set eth0 mtu {NARROW}")).unwrap();
        for web in site.web() {
            let before = site.drops("TooBig").unwrap();
            site.client(|| {
                let got = clients::http_get(None, web, &format!("/bytes/{MEGABYTE}")).unwrap();
                assert!(got.body == body(MEGABYTE), "{web}: {} bytes", got.body.len());
            });
            let refused = site.drops("TooBig").unwrap() - before;
            assert!(refused > 0, "{forwarding} to {web}: everything fitted");
        }
    }
}

/// A datagram to a target whose server is gone, before any health check knows.
#[test]
fn a_client_hears_that_nobody_listens() {
    for forwarding in ["nat", "snat"] {
        let mut site = start(Picture::TwoNics, forwarding);
        let echoes = site.echo();
        for echo in echoes {
            site.client(|| clients::udp_ping(None, echo, b"there?", TIMEOUT).unwrap());
        }
        // Its health is asked for by TCP.
        site.servers[0].as_mut().unwrap().udp.clear();
        for echo in echoes {
            // The target's kernel may leave an error out when it is busy with others.
            let ask = || clients::udp_ping(None, echo, b"there?", TIMEOUT).unwrap_err();
            let kind = || site.client(ask).downcast::<io::Error>().unwrap().kind();
            let is_refused = (0..TRIES).any(|_| kind() == ErrorKind::ConnectionRefused);
            assert!(is_refused, "{forwarding}: {echo}");
        }
    }
}

/// The kernel answers nobody any more; the listener's addresses do.
#[test]
fn pings_are_answered_below_the_kernel() {
    for picture in [Picture::TwoNics, Picture::OneNic] {
        let site = Site::start(picture, 0).unwrap();
        let balancer = &site.topology.balancer;
        balancer.sysctl("net/ipv4/icmp_echo_ignore_all", "1").unwrap();
        balancer.sysctl("net/ipv6/icmp/echo_ignore_all", "1").unwrap();
        let own = Dual::new(TARGETS, 1).both();
        for (listener, own) in site.topology.listener.both().into_iter().zip(own) {
            site.client(|| {
                clients::ping(own).unwrap_err();
                clients::ping(listener).unwrap();
            });
        }
    }
}
