//! Real clients and real servers on both sides of the real agent.

use std::{collections::HashSet, net::SocketAddr};

use lb_tests::{
    agent::Agent,
    clients,
    servers::body,
    site::{Config, PATIENCE, Site},
    topology::{Picture, client_host},
    wait_until,
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
            let answer = clients::udp_ping(Some(source), echo, b"ping", clients::TIMEOUT);
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
