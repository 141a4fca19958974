//! The harness itself, without a load balancer. Needs root.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    collections::HashSet,
    io::Read as _,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::Duration,
};

use lb_tests::{
    clients,
    frames::PacketSocket,
    netns::{Namespace, Process, link},
    packets::{Packet, endpoints, verify_checksums},
    programs::{Attached, FIRST_PORT, Floor, PORT_BITS, Varying, Wrapper},
    servers::{HttpServer, Server, body},
    topology::{CLIENTS, Dual, Picture, TARGETS, Topology, client_host, target_host},
    wait_until,
};

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;

#[test]
fn a_namespace_goes_with_all_that_is_in_it() {
    let namespace = Namespace::new("gone").unwrap();
    let path = Path::new("/run/netns").join(namespace.name());
    assert!(path.exists());
    let names = |namespace: &Namespace| {
        let output = namespace.command("ip").args(["-br", "link"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(names(&namespace).lines().count(), 1, "only lo");

    let other = Namespace::new("other").unwrap();
    link((&namespace, "eth0"), (&other, "eth0")).unwrap();
    assert!(names(&other).contains("eth0"));
    drop(namespace);
    assert!(!path.exists());
    // The kernel takes a namespace apart after the last reference is gone.
    wait_until("end of veth", Duration::from_secs(5), || !names(&other).contains("eth0")).unwrap();
}

#[test]
fn a_panic_tears_down_too() {
    let name = thread::spawn(|| {
        let namespace = Namespace::new("panic").unwrap();
        std::panic::panic_any(namespace.name().to_owned());
    });
    let name = name.join().unwrap_err().downcast::<String>().unwrap();
    assert!(!Path::new("/run/netns").join(*name).exists());
}

#[test]
fn what_a_killed_test_left_is_removed() {
    // No process has such a number: the limit of the kernel is 2^22.
    let name = "lbtest-99999999-0-orphan";
    assert!(Command::new("ip").args(["netns", "add", name]).status().unwrap().success());
    let _namespace = Namespace::new("next").unwrap();
    assert!(!Path::new("/run/netns").join(name).exists());
}

#[test]
fn a_process_is_inside_and_its_output_is_kept() {
    let namespace = Namespace::new("inside").unwrap();
    let mut command = namespace.command("sh");
    command.args(["-c", "readlink /proc/self/ns/net; echo error >&2; sleep 1000"]);
    let mut process = Process::spawn(&mut command).unwrap();
    wait_until("output", Duration::from_secs(5), || process.output().contains("error")).unwrap();
    let inside = namespace.run(|| std::fs::read_link("/proc/thread-self/ns/net").unwrap());
    assert!(process.output().starts_with(inside.to_str().unwrap()));
    assert_ne!(inside, std::fs::read_link("/proc/thread-self/ns/net").unwrap());

    assert!(process.is_running().unwrap());
    let id = process.id();
    drop(process);
    assert!(!Path::new("/proc").join(id.to_string()).exists());
}

/// Everything that a client does, with a target directly: by the kernel's own forwarding.
#[test]
fn every_picture_forwards_both_families() {
    for picture in [Picture::OneNic, Picture::TwoNics, Picture::Dsr] {
        let topology = Topology::new(picture, 2).unwrap();
        for index in 0..2 {
            let target = &topology.targets[usize::from(index)];
            for address in target_host(index).both() {
                let web = HttpServer::start(target, (address, 80).into()).unwrap();
                let tcp = Server::tcp_echo(target, (address, 7).into()).unwrap();
                let udp = Server::udp_echo(target, (address, 7).into()).unwrap();
                topology.client.run(|| {
                    clients::ping(address).unwrap();
                    use_web_server(&web, &format!("target{index}"));
                    use_echo_servers(&tcp, &udp);
                });
            }
        }
        // A reply that goes back by the balancer has seen every router of the picture.
        let hops = reply_hop_limit(&topology);
        assert_eq!(hops, if picture == Picture::OneNic { 62 } else { 63 }, "{picture:?}");
    }
}

fn use_web_server(web: &HttpServer, name: &str) {
    let get = |path| clients::http_get(None, web.address(), path).unwrap();
    assert_eq!(get("/").text(), format!("hello world from {name}"));
    assert_eq!(get("/bytes/100000").body, body(100_000));
    let source = SocketAddr::new(client_host().like(web.address().ip()), 4321);
    let client = clients::http_get(Some(source), web.address(), "/client").unwrap();
    assert_eq!(client.text(), source.to_string());
    assert_eq!(clients::http_post(web.address(), b"posted").unwrap().body, b"posted");
    assert_eq!(get("/health").status, 200);
    web.set_healthy(false);
    assert_eq!(get("/health").status, 503);
    assert_eq!(web.served(), 6);
}

fn use_echo_servers(tcp: &Server, udp: &Server) {
    let stream = clients::connect(None, tcp.address()).unwrap();
    clients::echo(&stream, b"one").unwrap();
    clients::echo(&stream, b"two").unwrap();
    clients::transfer(&stream, 1 << 20).unwrap();
    assert_eq!(tcp.served(), 1);
    for port in 5000..5010 {
        let source = SocketAddr::new(client_host().like(udp.address().ip()), port);
        let answer = clients::udp_ping(Some(source), udp.address(), b"ping", clients::TIMEOUT);
        assert_eq!(answer.unwrap(), b"ping");
    }
    assert_eq!(udp.served(), 10);
}

/// What is left of 64 hops in a target's datagram as the client gets it.
fn reply_hop_limit(topology: &Topology) -> u8 {
    let target = target_host(0).v4_port(7);
    let _server = Server::udp_echo(&topology.targets[0], target).unwrap();
    let socket = PacketSocket::open(&topology.client, "eth0").unwrap();
    let send = || clients::udp_ping(None, target, b"hops?", clients::TIMEOUT).unwrap();
    topology.client.run(send);
    let from_target = |frame: &[u8]| endpoints(frame).is_ok_and(|(source, _)| source == target);
    let frame = socket.receive(clients::TIMEOUT, from_target).unwrap();
    frame[14 + 8]
}

/// A child has copies of the parent's descriptors until its exec.
#[test]
fn commands_that_start_meanwhile_keep_no_dropped_server_open() {
    let namespace = Namespace::new("server").unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], 7));
    let closes_at_once = || {
        let started = Server::tcp_echo(&namespace, address).map(drop);
        started.is_ok() && namespace.run(|| clients::connect(None, address)).is_err()
    };
    let end = AtomicBool::new(false);
    let closed = thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Relaxed) {
                assert!(namespace.command("true").status().unwrap().success());
            }
        });
        let closed = (0..200).filter(|_| closes_at_once()).count();
        end.store(true, Relaxed);
        closed
    });
    assert_eq!(closed, 200);
}

#[test]
fn a_dropped_server_resets_its_connections_and_can_be_started_again() {
    let namespace = Namespace::new("server").unwrap();
    let localhost = |port| SocketAddr::from(([127, 0, 0, 1], port));
    let server = Server::tcp_echo(&namespace, localhost(7)).unwrap();
    let mut stream = namespace.run(|| clients::connect(None, server.address())).unwrap();
    clients::echo(&stream, b"alive").unwrap();
    drop(server);
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(namespace.run(|| clients::connect(None, localhost(7))).is_err());

    let server = Server::tcp_echo(&namespace, localhost(7)).unwrap();
    namespace.run(|| {
        clients::echo(&clients::connect(None, server.address()).unwrap(), b"again").unwrap();
    });

    let web = HttpServer::start(&namespace, localhost(80)).unwrap();
    let mut stream = namespace.run(|| clients::connect(None, web.address())).unwrap();
    // Accepted before the request is complete.
    std::io::Write::write_all(&mut stream, b"GET / HTTP/1.1\r\n").unwrap();
    thread::sleep(Duration::from_millis(50));
    drop(web);
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn a_client_may_have_more_addresses() {
    let topology = Topology::new(Picture::TwoNics, 1).unwrap();
    let host = topology.add_client(66).unwrap();
    assert_eq!(host, Dual::new(CLIENTS, 66));
    for address in target_host(0).both() {
        let web = HttpServer::start(&topology.targets[0], (address, 80).into()).unwrap();
        let source = SocketAddr::new(host.like(address), 0);
        let get = || clients::http_get(Some(source), web.address(), "/client").unwrap();
        let seen: SocketAddr = topology.client.run(get).text().parse().unwrap();
        assert_eq!(seen.ip(), source.ip());
    }
}

#[test]
fn frames_arrive_as_they_were_sent() {
    let (a, b) = (Namespace::new("a").unwrap(), Namespace::new("b").unwrap());
    link((&a, "eth0"), (&b, "eth0")).unwrap();
    let sender = PacketSocket::open(&a, "eth0").unwrap();
    let receiver = PacketSocket::open(&b, "eth0").unwrap();
    let from: SocketAddr = "10.0.1.10:4000".parse().unwrap();
    let to: SocketAddr = "10.0.1.100:80".parse().unwrap();
    for vlans in [vec![], vec![7], vec![7, 8]] {
        let packet = Packet { vlans, payload: b"payload".to_vec(), ..Packet::udp(from, to) };
        let frame = packet.build();
        sender.send(&frame).unwrap();
        let ours = |frame: &[u8]| endpoints(frame).is_ok_and(|ends| ends == (from, to));
        assert_eq!(receiver.receive(clients::TIMEOUT, ours).unwrap(), frame, "{packet:?}");
    }
    assert!(sender.receive(Duration::from_millis(100), |f| endpoints(f).is_ok()).is_err());
}

/// Without the pass program on the right peers, nothing would come back.
#[test]
fn what_a_balancer_sends_by_xdp_arrives() {
    for picture in [Picture::OneNic, Picture::TwoNics] {
        let topology = Topology::new(picture, 1).unwrap();
        let balancer = &topology.balancer;
        let mut swap = Attached::load(Floor::Swap).unwrap();
        for interface in topology.interfaces {
            swap.attach(balancer, interface).unwrap();
            let link = balancer.command("ip").args(["link", "show", interface]).output().unwrap();
            let link = String::from_utf8(link.stdout).unwrap();
            assert!(link.contains(" xdp "), "native: {link}");
        }
        mirror(&topology.targets[0], target_host(0), Dual::new(TARGETS, 1));
        if picture == Picture::TwoNics {
            mirror(&topology.client, client_host(), Dual::new(CLIENTS, 1));
        }
    }
}

/// Sends a frame to a balancer that swaps MAC addresses, and awaits it.
fn mirror(namespace: &Namespace, host: Dual, balancer: Dual) {
    let socket = PacketSocket::open(namespace, "eth0").unwrap();
    let sent = Packet {
        source_mac: host.mac(),
        destination_mac: balancer.mac(),
        ..Packet::udp(host.v4_port(1), balancer.v4_port(2))
    };
    let returned =
        Packet { source_mac: balancer.mac(), destination_mac: host.mac(), ..sent.clone() }.build();
    socket.send(&sent.build()).unwrap();
    socket.receive(clients::TIMEOUT, |frame| frame.starts_with(&returned)).unwrap();
}

/// One packet of each kind that the wrapper can make.
fn packets() -> [Packet; 6] {
    let addresses: [(SocketAddr, SocketAddr); 2] = [
        ("10.7.8.9:1000".parse().unwrap(), "10.0.1.100:80".parse().unwrap()),
        ("[fd00:1::10]:1000".parse().unwrap(), "[fd00:1::100]:80".parse().unwrap()),
    ];
    let [v4, v6] = addresses;
    let long = |packet| Packet { payload: body(701), ..packet };
    [
        Packet::tcp(v4.0, v4.1),
        Packet::udp(v4.0, v4.1),
        Packet::tcp(v6.0, v6.1),
        Packet::udp(v6.0, v6.1),
        long(Packet::syn(v4.0, v4.1)),
        long(Packet::udp(v6.0, v6.1)),
    ]
}

#[test]
fn the_wrapper_makes_the_packets_it_should() {
    let mut wrapper = Wrapper::load().unwrap();
    wrapper.call_floor(Floor::Pass).unwrap();
    for packet in packets() {
        for varying in [Varying::Source, Varying::Destination] {
            for flows in [1, 7, 100_000] {
                wrapper.make(&packet, varying, flows).unwrap();
                let mut seen = HashSet::new();
                let runs = flows.min(500);
                for _ in 0..runs {
                    let run = wrapper.run(1).unwrap();
                    assert_eq!(run.verdict, XDP_PASS);
                    check_packet(&run.frame, &packet, varying, flows);
                    seen.insert(run.frame);
                }
                assert_eq!(seen.len(), runs as usize, "every flow once");
                // Back at the first flow after all of them.
                wrapper.run(flows - runs % flows).unwrap();
                assert!(seen.contains(&wrapper.run(1).unwrap().frame), "{flows} flows");
            }
        }
    }
}

fn check_packet(frame: &[u8], packet: &Packet, varying: Varying, flows: u32) {
    verify_checksums(frame).unwrap();
    let (source, destination) = endpoints(frame).unwrap();
    let (client, template) = match varying {
        Varying::Source => (source, packet.source),
        Varying::Destination => (destination, packet.destination),
    };
    let (last_16_bits, rest_is_kept) = match (client.ip(), template.ip()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            (a.to_bits() as u16, a.to_bits() >> 16 == b.to_bits() >> 16)
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            (a.to_bits() as u16, a.to_bits() >> 16 == b.to_bits() >> 16)
        }
        _ => panic!("family changed"),
    };
    assert!(rest_is_kept);
    let flow = u32::from(last_16_bits) << PORT_BITS | u32::from(client.port() - FIRST_PORT);
    assert!(flow < flows, "flow {flow} of {flows}");
    // All else is as the packet builder makes it, the filling of short frames apart.
    let expected = Packet { source, destination, ..packet.clone() };
    let filling = frame.len() - expected.build().len();
    let payload = [&packet.payload[..], &vec![0; filling]].concat();
    assert_eq!(frame, Packet { payload, ..expected }.build());
}

#[test]
fn the_wrapper_undoes_what_the_program_did() {
    let mut wrapper = Wrapper::load().unwrap();
    for packet in packets() {
        wrapper.make(&packet, Varying::Source, 1).unwrap();
        wrapper.call_floor(Floor::Pass).unwrap();
        let fresh = wrapper.run(1).unwrap().frame;

        wrapper.call_floor(Floor::Swap).unwrap();
        let run = wrapper.run(1001).unwrap();
        assert_eq!(run.verdict, XDP_TX);
        assert_eq!(run.frame[..6], fresh[6..12]);
        assert_eq!(run.frame[6..12], fresh[..6]);
        assert_eq!(run.frame[12..], fresh[12..]);

        wrapper.call_floor(Floor::Encap).unwrap();
        let run = wrapper.run(1001).unwrap();
        assert_eq!(run.verdict, XDP_TX);
        assert_eq!(run.frame[34..], fresh[14..]);
        let (outer, _) = etherparse::Ipv4Header::from_slice(&run.frame[14..]).unwrap();
        assert_eq!(outer.header_checksum, outer.calc_header_checksum());
        assert_eq!(usize::from(outer.total_len), run.frame.len() - 14);
        assert_eq!(outer.protocol, etherparse::ip_number::IPV4);

        wrapper.call_floor(Floor::Drop).unwrap();
        assert_eq!(wrapper.run(1).unwrap().verdict, XDP_DROP);
    }
}

/// Prints the floors. The bound is far above what any machine needs: it shows that the figure is
/// of one packet and in nanoseconds, nothing more.
#[test]
fn the_floors_take_nanoseconds() {
    let mut wrapper = Wrapper::load().unwrap();
    for floor in [Floor::Drop, Floor::Swap, Floor::Encap] {
        wrapper.call_floor(floor).unwrap();
        for flows in [1, 10_000, 1_000_000] {
            let [packet, ..] = packets();
            wrapper.make(&packet, Varying::Source, flows).unwrap();
            let mut rounds: Vec<_> =
                (0..5).map(|_| wrapper.run(1_000_000).unwrap().nanoseconds).collect();
            rounds.sort_by(f64::total_cmp);
            println!("{floor:?}, {flows} flows: {:.1} ns", rounds[2]);
            assert!((1.0..1000.0).contains(&rounds[2]));
        }
    }
}
