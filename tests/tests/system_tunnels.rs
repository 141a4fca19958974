//! Real clients and servers with tunnels between balancer and targets.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{collections::HashSet, net::SocketAddr};

use lb_tests::{
    clients::{self, TIMEOUT},
    servers::body,
    site::{PATIENCE, Site},
    topology::{Picture, client_host},
    tunnels::{Decapsulator, Seen},
    wait_until,
};

const MEGABYTE: usize = 1 << 20;

/// The network of direct server return, whose targets take the outer header off.
fn start(forwarding: &str, targets: u8) -> (Site, Vec<Decapsulator>) {
    let site = Site::start_with(Picture::Dsr, targets, |config| {
        config.group = format!("forwarding = \"{forwarding}\"\n");
    })
    .unwrap();
    let ends = site.topology.targets.iter().map(|target| Decapsulator::start(target).unwrap());
    let ends = ends.collect();
    (site, ends)
}

/// What all ends saw.
fn seen(ends: &[Decapsulator]) -> Seen {
    let mut all = Seen::default();
    for end in ends {
        let Seen { sources, ports, families, faults } = end.seen();
        all.sources.extend(sources);
        all.ports.extend(ports);
        all.families.extend(families);
        all.faults.extend(faults);
    }
    assert!(all.faults.is_empty(), "{:?}", all.faults);
    all
}

fn use_site(site: &Site) {
    for (web, echo) in site.web().into_iter().zip(site.echo()) {
        let source = SocketAddr::new(client_host().like(web.ip()), 4321);
        site.client(|| {
            let texts: HashSet<_> =
                (0..40).map(|_| clients::http_get(None, web, "/").unwrap().text()).collect();
            assert_eq!(texts.len(), site.servers.len(), "{texts:?}");
            let address = clients::http_get(Some(source), web, "/client").unwrap();
            assert_eq!(address.text(), source.to_string(), "the client's address is kept");
            for _ in 0..20 {
                let stream = clients::connect(None, echo).unwrap();
                clients::echo(&stream, b"one").unwrap();
                clients::echo(&stream, b"two").unwrap();
                let answer = clients::udp_ping(None, echo, b"ping", TIMEOUT);
                assert_eq!(answer.unwrap(), b"ping");
            }
        });
    }
    let listener = &site.agent.status().unwrap()["load_balancers"][0]["listeners"][0];
    assert!(listener["packets"].as_u64().unwrap() > 0, "{listener}");
    assert_eq!(listener["reply_packets"], 0, "replies do not pass here");
}

#[test]
fn ip_in_ip() {
    let (site, ends) = start("dsr_ipip", 2);
    use_site(&site);
    let seen = seen(&ends);
    assert_eq!(seen.families.len(), 4, "each family in each: {:?}", seen.families);
    assert!(seen.sources.len() > 50, "{} sources", seen.sources.len());
    assert!(seen.ports.is_empty());
}

#[test]
fn ip_in_udp() {
    let (site, ends) = start("dsr_gue", 2);
    use_site(&site);
    let seen = seen(&ends);
    assert_eq!(seen.families.len(), 4, "each family in each: {:?}", seen.families);
    assert!(seen.sources.len() > 50, "{} sources", seen.sources.len());
    assert!(seen.ports.len() > 50, "{} ports", seen.ports.len());
}

/// Between balancer and targets there is no more room than between client and balancer, so full
/// segments do not fit into the tunnel: the client learns it, and sends smaller ones.
#[test]
fn path_mtu_discovery() {
    for forwarding in ["dsr_ipip", "dsr_gue"] {
        let (site, ends) = start(forwarding, 2);
        for (web, echo) in site.web().into_iter().zip(site.echo()) {
            let before = site.drops("TooBig").unwrap();
            site.client(|| {
                let posted = clients::http_post(web, &body(MEGABYTE)).unwrap();
                assert!(posted.body == body(MEGABYTE), "{} bytes", posted.body.len());
                let got = clients::http_get(None, web, &format!("/bytes/{MEGABYTE}")).unwrap();
                assert!(got.body == body(MEGABYTE), "{} bytes", got.body.len());
                clients::transfer(&clients::connect(None, echo).unwrap(), MEGABYTE).unwrap();
            });
            let refused = site.drops("TooBig").unwrap() - before;
            assert!(refused > 0, "{forwarding} to {web}: everything fitted");
            // What was on its way when the client learned it, at each of a few times.
            assert!(refused < 200, "{forwarding} to {web}: {refused} packets too big");
        }
        seen(&ends);
    }
}

/// Connections go on through another kind of tunnel.
#[test]
fn a_reload_changes_the_tunnel() {
    let (mut site, ends) = start("dsr_ipip", 1);
    let [v4, v6] = site.echo();
    let streams = site.client(|| [v4, v6].map(|echo| clients::connect(None, echo).unwrap()));
    site.client(|| streams.iter().for_each(|stream| clients::echo(stream, b"before").unwrap()));
    assert!(ends[0].seen().ports.is_empty());
    let mut config = site.config.clone();
    config.group = "forwarding = \"dsr_gue\"\n".into();
    config.agent += "tunnel_sources = [\"10.0.2.1\", \"fd00:2::1\"]\n";
    site.reload(config).unwrap();
    let before = ends[0].seen().sources;
    for (family, stream) in ["IPv4", "IPv6"].iter().zip(&streams) {
        let ports = ends[0].seen().ports;
        wait_until(&format!("GUE for {family}"), PATIENCE, || {
            site.client(|| clients::echo(stream, b"after").unwrap());
            ends[0].seen().ports != ports
        })
        .unwrap();
    }
    let seen = seen(&ends);
    let new: HashSet<_> = seen.sources.difference(&before).map(ToString::to_string).collect();
    assert!(!new.is_empty(), "the sources are the balancer's own now");
    for source in new {
        assert!(["10.0.2.1", "fd00:2::1"].contains(&source.as_str()), "{source}");
    }
}
