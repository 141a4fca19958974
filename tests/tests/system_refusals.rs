//! Packets that nobody is there for: what the client hears, what is counted.

use std::{io::ErrorKind, net::SocketAddr};

use anyhow::Error;
use lb_tests::{
    clients::{self, TIMEOUT},
    frames::PacketSocket,
    packets::{Packet, endpoints},
    servers::Server,
    site::{PATIENCE, Site},
    topology::{CLIENTS, Dual, Picture, client_host},
    wait_until,
};

fn kind(error: &Error) -> Option<ErrorKind> {
    error.downcast_ref::<std::io::Error>().map(std::io::Error::kind)
}

#[test]
fn without_a_target_clients_are_refused_at_once() {
    for picture in [Picture::TwoNics, Picture::OneNic] {
        let site = Site::start_with(picture, 0, |_| {}).unwrap();
        // So that the balancer knows the way back.
        for address in site.topology.listener.both() {
            site.client(|| clients::ping(address)).unwrap();
        }
        for (web, echo) in site.web().into_iter().zip(site.echo()) {
            let error = site.client(|| clients::connect(None, web).unwrap_err());
            assert_eq!(kind(&error), Some(ErrorKind::ConnectionRefused), "{web}: {error:#}");
            let ask = || clients::udp_ping(None, echo, b"anybody?", TIMEOUT).unwrap_err();
            let error = site.client(ask);
            assert_eq!(kind(&error), Some(ErrorKind::ConnectionRefused), "{echo}: {error:#}");
        }
        assert_eq!(site.drops("NoTarget").unwrap(), 4, "two of TCP, two of UDP");
    }
}

#[test]
fn a_removed_last_target_is_no_target() {
    let mut site = Site::start_with(Picture::TwoNics, 1, |config| {
        config.group = "deregistration_delay = \"0s\"\n".into();
    })
    .unwrap();
    let [web, _] = site.web();
    site.client(|| clients::http_get(None, web, "/").unwrap());
    site.reload(site.config.with_targets([])).unwrap();
    let error = site.client(|| clients::connect(None, web).unwrap_err());
    assert_eq!(kind(&error), Some(ErrorKind::ConnectionRefused), "{error:#}");
    site.reload(site.config.with_targets([0])).unwrap();
    site.wait_for_web(0, "healthy").unwrap();
    wait_until("the target's return", PATIENCE, || {
        site.client(|| clients::http_get(None, web, "/").is_ok())
    })
    .unwrap();
}

/// The balancer's own services must not appear on an address that the agent added.
#[test]
fn other_ports_of_the_listeners_address_are_closed() {
    const SSH: u16 = 22;
    let site = Site::start(Picture::TwoNics, 1).unwrap();
    for (everywhere, listener, own) in [
        ("0.0.0.0", site.web()[0], Dual::new(CLIENTS, 1).v4_port(SSH)),
        ("[::]", site.web()[1], Dual::new(CLIENTS, 1).v6_port(SSH)),
    ] {
        let everywhere: SocketAddr = format!("{everywhere}:{SSH}").parse().unwrap();
        let tcp = Server::tcp_echo(&site.topology.balancer, everywhere).unwrap();
        let udp = Server::udp_echo(&site.topology.balancer, everywhere).unwrap();
        let before = site.drops("NoListener").unwrap();
        let closed = SocketAddr::new(listener.ip(), SSH);
        site.client(|| {
            clients::echo(&clients::connect(None, own).unwrap(), b"own address").unwrap();
            clients::udp_ping(None, own, b"own address", TIMEOUT).unwrap();
            let error = clients::connect(None, closed).unwrap_err();
            assert_eq!(kind(&error), Some(ErrorKind::TimedOut), "{error:#}");
            clients::udp_ping(None, closed, b"listener's", TIMEOUT).unwrap_err();
        });
        assert!(site.drops("NoListener").unwrap() >= before + 2);
        assert_eq!((tcp.served(), udp.served()), (1, 1));
    }
}

/// An address that was there before stays the machine's: its own services answer.
#[test]
fn services_on_an_address_of_the_machine_stay() {
    let own = Dual::new(CLIENTS, 1);
    let site = Site::start_with(Picture::TwoNics, 1, |config| config.listener = own).unwrap();
    let ssh = Server::tcp_echo(&site.topology.balancer, own.v4_port(22)).unwrap();
    site.client(|| {
        clients::echo(&clients::connect(None, ssh.address()).unwrap(), b"still here").unwrap();
        for port in [own.v4_port(80), own.v6_port(80)] {
            clients::http_get(None, port, "/").unwrap();
        }
    });
    site.agent.stop().unwrap();
    site.topology.client.run(|| clients::ping(own.v4.into())).unwrap();
}

#[test]
fn a_hop_limit_that_is_used_up_ends_the_way() {
    let site = Site::start(Picture::TwoNics, 1).unwrap();
    let socket = PacketSocket::open(&site.topology.client, "eth0").unwrap();
    for echo in site.echo() {
        site.client(|| clients::ping(echo.ip())).unwrap();
        let send = |hop_limit| {
            let source = SocketAddr::new(client_host().like(echo.ip()), 5000);
            let packet = Packet {
                source_mac: client_host().mac(),
                destination_mac: Dual::new(CLIENTS, 1).mac(),
                hop_limit,
                ..Packet::udp(source, echo)
            };
            socket.send(&packet.build()).unwrap();
        };
        let before = site.drops("TtlExceeded").unwrap();
        send(1);
        wait_until("drop", PATIENCE, || site.drops("TtlExceeded").unwrap() == before + 1).unwrap();
        send(2);
        let is_answer = |frame: &[u8]| endpoints(frame).is_ok_and(|(from, _)| from == echo);
        socket.receive(TIMEOUT, is_answer).unwrap();
    }
}

/// The program's own messages come with the agent's log.
#[test]
fn a_drop_is_in_the_log() {
    let mut site = Site::start(Picture::TwoNics, 1).unwrap();
    let [web, _] = site.web();
    let ask = || clients::udp_ping(None, (web.ip(), 9).into(), b"?", TIMEOUT).unwrap_err();
    site.client(ask);
    site.agent.wait_for_log("lb_ebpf::maps: dropped: NoListener").unwrap();
}
