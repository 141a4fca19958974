//! What depends on the kernel: that it takes the programs, and how its own VLAN devices and tunnel
//! receivers get on with them. `cargo xtask vm` runs this on the kernels that we support.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{fs, net::SocketAddr};

use lb_tests::{
    agent::Agent,
    clients::{self, TIMEOUT},
    devices::has_devices,
    netns::{Namespace, link},
    programs::{Attached, Floor},
    scene::{GUE_PORT, OPTIONS},
    servers::{HttpServer, body},
    site::{PATIENCE, Site},
    topology::{Dual, Picture, client_host, target_host},
    wait_until,
};
use lb_userspace::{
    dataplane::{Dataplane, OLDEST_KERNEL},
    target::{TargetDataplane, TargetLoadOptions},
};
use serde_json::Value;

const MEGABYTE: usize = 1 << 20;

/// The verifier's limit (BPF_COMPLEXITY_LIMIT_INSNS).
const MOST_INSTRUCTIONS: u32 = 1_000_000;

/// A kernel that is too old is told so by its name, with what it lacks: by a plain error.
#[test]
fn the_programs_load() {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let release = release.trim();
    let mut numbers = release.split('.').map_while(|number| number.parse::<u32>().ok());
    let version = numbers.next().zip(numbers.next()).unwrap();
    let mut dataplane = match Dataplane::load(&OPTIONS) {
        Ok(dataplane) => dataplane,
        Err(error) => {
            assert!(version < OLDEST_KERNEL, "Linux {release}: {error:#}");
            assert!(error.to_string().contains(release), "{error:#}");
            println!("{error:#}");
            return;
        }
    };
    for (name, program) in dataplane.programs().unwrap() {
        // Since 5.16 the kernel says how many it looked at.
        let verified = program.verified_instruction_count();
        println!("{name}: {verified:?} instructions verified");
        assert!(verified.is_none_or(|count| count < MOST_INSTRUCTIONS), "{name}: {verified:?}");
    }
    TargetDataplane::load(&TargetLoadOptions { flow_table_size: 1 << 16 }).unwrap();
}

/// Client and target are in VLANs of their own, as the balancer is with devices on top of its NICs:
/// requests and replies change their tags.
#[test]
fn vlan_devices() {
    let probe = "link add probe type veth\nlink add link probe name tagged type vlan id 10";
    if !has_devices("vlan_devices", probe).unwrap() {
        return;
    }
    let [client, balancer, target] =
        ["client", "balancer", "target"].map(|role| Namespace::new(role).unwrap());
    for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        balancer.sysctl(key, "1").unwrap();
    }
    let mut pass = Attached::load(Floor::Pass).unwrap();
    for (machine, nic) in [(&client, "eth0"), (&target, "eth1")] {
        link((machine, nic), (&balancer, nic)).unwrap();
        pass.attach(machine, nic).unwrap();
    }
    let (gateways, listener) = ([Dual::new(1, 1), Dual::new(2, 1)], Dual::new(3, 100));
    tagged(&client, "eth0", 10, client_host());
    tagged(&balancer, "eth0", 10, gateways[0]);
    tagged(&balancer, "eth1", 20, gateways[1]);
    tagged(&target, "eth1", 20, target_host(0));
    for (machine, gateway) in [(&client, gateways[0]), (&target, gateways[1])] {
        let Dual { v4, v6 } = gateway;
        machine.ip(&format!("route add default via {v4}\nroute add default via {v6}")).unwrap();
    }
    let at = target_host(0).both().map(|address| SocketAddr::new(address, 8080));
    let _servers = at.map(|at| HttpServer::start(&target, at).unwrap());
    let config = format!(
        "[agent]\nflow_table_size = 65536\n\
         [target_group.web]\nprotocol = \"tcp\"\nport = 8080\ntargets = [{}]\n\
         [target_group.web.health_check]\nprotocol = \"tcp\"\ninterval = \"1s\"\ntimeout = \"1s\"\n\
         healthy_threshold = 2\n\
         [load_balancer.site]\naddresses = [{listener}]\n\
         [[load_balancer.site.listener]]\nprotocol = \"tcp\"\nport = 80\ntarget_group = \"web\"\n",
        target_host(0)
    );
    let agent = Agent::start(&balancer, &["eth0", "eth1"], &config).unwrap();
    client.run(|| {
        for web in listener.both().map(|address| SocketAddr::new(address, 80)) {
            let source = SocketAddr::new(client_host().like(web.ip()), 4321);
            let get = |path: &str| clients::http_get(None, web, path);
            wait_until("an answer", PATIENCE, || get("/").is_ok()).unwrap();
            let seen = clients::http_get(Some(source), web, "/client").unwrap();
            assert_eq!(seen.text(), source.to_string(), "the client's address is kept");
            let posted = clients::http_post(web, &body(MEGABYTE)).unwrap();
            assert!(posted.body == body(MEGABYTE), "{} bytes", posted.body.len());
        }
    });
    let counted = &agent.status().unwrap()["load_balancers"][0]["listeners"][0];
    for counter in ["packets", "reply_packets"] {
        assert!(counted[counter].as_u64().unwrap() > 500, "{counted}");
    }
}

/// Puts a machine into a VLAN. Tags are in the frames: what a NIC takes out no XDP program sees.
fn tagged(machine: &Namespace, nic: &str, id: u16, host: Dual) {
    let ethtool = machine.command("ethtool").args(["-K", nic, "txvlan", "off"]).output().unwrap();
    assert!(ethtool.status.success(), "{ethtool:?}");
    let Dual { v4, v6 } = host;
    let commands = format!(
        "link add link {nic} name {nic}.{id} type vlan id {id}\n\
         link set {nic}.{id} up\n\
         address add {v4}/24 dev {nic}.{id}\n\
         address add {v6}/64 dev {nic}.{id} nodad"
    );
    machine.ip(&commands).unwrap();
}

/// The kernel's receivers of each family in each, at a target's own address.
fn receivers(target: Dual) -> String {
    let Dual { v4, v6 } = target;
    format!(
        "link add tunnel4 type ipip local {v4}\n\
         link add tunnel46 type sit local {v4}\n\
         link add tunnel6 type ip6tnl mode any local {v6}\n\
         link set tunnel4 up\n\
         link set tunnel46 up\n\
         link set tunnel6 up"
    )
}

#[test]
fn kernel_ipip_receiver() {
    if has_devices("kernel_ipip_receiver", &receivers(target_host(0))).unwrap() {
        through_receivers("dsr_ipip", "");
    }
}

#[test]
fn kernel_gue_receiver() {
    let ports = format!("fou add port {GUE_PORT} gue\nfou add port {GUE_PORT} gue -6");
    let receivers = receivers(target_host(0));
    if has_devices("kernel_gue_receiver", &format!("{receivers}\n{ports}")).unwrap() {
        through_receivers("dsr_gue", &ports);
    }
}

/// Clients reach targets that have nothing but the kernel's own devices.
fn through_receivers(forwarding: &str, more: &str) {
    let site = Site::start_with(Picture::Dsr, 1, |config| {
        config.group = format!("forwarding = \"{forwarding}\"\n");
    })
    .unwrap();
    let target = &site.topology.targets[0];
    target.ip(&format!("{}\n{more}", receivers(target_host(0)))).unwrap();
    for interface in ["all", "tunnel4"] {
        // Clients are not behind it.
        target.sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "0").unwrap();
    }
    for (web, echo) in site.web().into_iter().zip(site.echo()) {
        let source = SocketAddr::new(client_host().like(web.ip()), 4321);
        site.client(|| {
            let seen = clients::http_get(Some(source), web, "/client").unwrap();
            assert_eq!(seen.text(), source.to_string(), "the client's address is kept");
            // To both addresses of the target.
            for _ in 0..40 {
                clients::echo(&clients::connect(None, echo).unwrap(), b"one").unwrap();
                let answer = clients::udp_ping(None, echo, b"ping", TIMEOUT);
                assert_eq!(answer.unwrap(), b"ping");
            }
        });
    }
    for device in ["tunnel4", "tunnel46", "tunnel6"] {
        assert!(received(target, device) > 40, "nothing by {device}");
    }
}

/// Packets that a device has received.
fn received(machine: &Namespace, device: &str) -> u64 {
    let output = machine.command("ip").args(["-s", "-j", "link", "show", device]).output().unwrap();
    let links: Value = serde_json::from_slice(&output.stdout).unwrap();
    links[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
}
