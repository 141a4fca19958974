//! An application load balancer among real machines, with curl and dig as its clients.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    process::{Child, Stdio},
};

use lb_tests::{
    agent::{Agent, Home},
    clients,
    netns::Namespace,
    servers::HttpServer,
    site::PATIENCE,
    topology::{CLIENTS, Dual, Picture, TARGETS, Topology, client_host, target_host},
    wait_until,
};
use nix::sys::signal::Signal;
use serde_json::Value;

const DENIED: &str = "SecurityGroupDenied";
const PORT: u16 = 8080;
/// curl's exit codes.
const CONNECTED: i32 = 0;
const REFUSED: i32 = 7;
const UNANSWERED: i32 = 28;
/// The second zone's address; the first one's is the topology's.
const SECOND: u8 = 101;

/// Everything of these tests, running.
struct Application {
    agent: Agent,
    config: Config,
    servers: Vec<Option<Vec<HttpServer>>>,
    topology: Topology,
}

/// What differs between them.
#[derive(Clone, Default)]
struct Config {
    /// Lines of the target group.
    group: String,
    /// Lines of the load balancer.
    balancer: String,
    /// Further tables.
    tables: String,
}

impl Config {
    /// Target 0 is in zone a, all others are in zone b.
    fn write(&self, topology: &Topology) -> String {
        let zone = |is_first: bool| if is_first { "a" } else { "b" };
        let mut targets = String::new();
        for index in 0..topology.targets.len() as u8 {
            let zone = zone(index == 0);
            for address in target_host(index).both() {
                let _ = write!(
                    targets,
                    "{{ address = \"{address}\", availability_zone = \"{zone}\" }}, "
                );
            }
        }
        let mut addresses = String::new();
        for (host, is_first) in [(topology.listener, true), (Dual::new(CLIENTS, SECOND), false)] {
            let zone = zone(is_first);
            for address in host.both() {
                let _ = write!(
                    addresses,
                    "{{ address = \"{address}\", availability_zone = \"{zone}\" }}, "
                );
            }
        }
        let server = Dual::new(CLIENTS, 1).v4;
        let Self { group, balancer, tables } = self;
        format!(
            "[agent]\nflow_table_size = 65536\n\
             [dns]\nlisten = \"{server}:53\"\nzone = \"elb.internal\"\n\
             [target_group.web]\nprotocol = \"http\"\nport = {PORT}\ntargets = [{targets}]\n{group}\n\
             [target_group.web.health_check]\npath = \"/health\"\ninterval = \"1s\"\n\
             timeout = \"1s\"\nhealthy_threshold = 2\n\
             [load_balancer.site]\ntype = \"application\"\nscheme = \"internal\"\n\
             addresses = [{addresses}]\n{balancer}\n\
             listener = [{{ protocol = \"http\", port = 80, target_group = \"web\" }}]\n{tables}"
        )
    }
}

impl Application {
    fn start(targets: u8, config: Config) -> Self {
        let topology = Topology::new(Picture::TwoNics, targets).unwrap();
        let serve = |index| Some(start_servers(&topology, index));
        let servers = (0..targets).map(serve).collect();
        let text = config.write(&topology);
        let agent = Agent::start(&topology.balancer, topology.interfaces, &text).unwrap();
        Self { agent, config, servers, topology }
    }

    /// The load balancer's addresses in zone a.
    fn listener(&self) -> [IpAddr; 2] {
        self.topology.listener.both()
    }

    fn client(&self) -> &Namespace {
        &self.topology.client
    }

    fn drops(&self) -> u64 {
        self.agent.status().unwrap()["drops"][DENIED].as_u64().unwrap_or(0)
    }

    fn balancer(&self) -> Value {
        let status = self.agent.status().unwrap();
        let balancers = status["load_balancers"].as_array().unwrap();
        balancers.iter().find(|it| it["name"] == "site").unwrap().clone()
    }

    /// A download in progress, which takes so many seconds.
    fn slow_download(&self, port: u16, seconds: u64) -> Download {
        let length = 4_000_000 * seconds;
        let began = tempfile::NamedTempFile::new().unwrap();
        let at = SocketAddr::new(self.listener()[0], port);
        let mut command = self.client().command("curl");
        command.args(["--silent", "--show-error", "--fail", "--limit-rate", "4M"]);
        command.args(["--speed-limit", "1", "--speed-time", "10", "--output"]).arg(began.path());
        command.args(["--write-out", "%{size_download}"]);
        command.arg(format!("http://{at}/bytes/{length}"));
        let (stdout, stderr) = (Stdio::piped(), Stdio::piped());
        let curl = command.stdout(stdout).stderr(stderr).spawn().unwrap();
        wait_until("a first byte", PATIENCE, || began.as_file().metadata().unwrap().len() > 0)
            .unwrap();
        Download { curl, length }
    }

    /// Waits until a connection to a port ends like this: curl's exit code.
    fn wait_for_code(&self, port: u16, code: i32) {
        let at = SocketAddr::new(self.listener()[0], port);
        let url = format!("http://{at}/");
        wait_until(&format!("code {code} of port {port}"), PATIENCE, || {
            curl(self.client(), &["--connect-timeout", "1", &url]).0 == code
        })
        .unwrap();
    }

    /// Waits for the state of a target, by both addresses.
    fn wait_for(&self, index: u8, state: &str) {
        for address in target_host(index).both() {
            self.agent.wait_for_target(&address.to_string(), state).unwrap();
        }
    }
}

/// A download that takes a while.
struct Download {
    curl: Child,
    length: u64,
}

impl Download {
    fn finish(self) {
        let output = self.curl.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), self.length.to_string());
    }
}

fn start_servers(topology: &Topology, index: u8) -> Vec<HttpServer> {
    let namespace = &topology.targets[usize::from(index)];
    let start = |address| HttpServer::start(namespace, SocketAddr::new(address, PORT)).unwrap();
    target_host(index).both().map(start).into()
}

/// curl's exit code and what it wrote.
fn curl(namespace: &Namespace, arguments: &[&str]) -> (i32, String) {
    let mut command = namespace.command("curl");
    command.args(["--silent", "--show-error", "--max-time", "10"]).args(arguments);
    let output = command.output().unwrap();
    let code = output.status.code().unwrap();
    (code, String::from_utf8(output.stdout).unwrap())
}

fn page(namespace: &Namespace, url: &str) -> String {
    let (code, text) = curl(namespace, &["--fail", url]);
    assert_eq!(code, 0, "{url}: {text}");
    text
}

fn url(address: IpAddr, path: &str) -> String {
    format!("http://{}{path}", SocketAddr::new(address, 80))
}

/// The answer's data, a line each, sorted.
fn dig(namespace: &Namespace, arguments: &[&str]) -> Vec<String> {
    let server = format!("@{}", Dual::new(CLIENTS, 1).v4);
    let mut command = namespace.command("dig");
    command.args([&server, "+tries=3", "+time=2", "+short"]).args(arguments);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    let mut lines: Vec<_> =
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// The state of the answer: NOERROR, NXDOMAIN, REFUSED.
fn dig_status(namespace: &Namespace, name: &str) -> String {
    let server = format!("@{}", Dual::new(CLIENTS, 1).v4);
    let output = namespace.command("dig").args([&server, "+time=2", name]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (_, rest) = text.split_once("status: ").unwrap_or_else(|| panic!("{text}"));
    rest.split(',').next().unwrap().to_owned()
}

#[test]
fn pages_come_through_and_targets_see_the_client() {
    let app = Application::start(2, Config::default());
    let client = client_host();
    for address in app.listener() {
        let pages: Vec<String> = (0..8).map(|_| page(app.client(), &url(address, "/"))).collect();
        for target in ["target0", "target1"] {
            let expected = format!("hello world from {target}");
            assert!(pages.contains(&expected), "{pages:?}");
        }
        let headers = page(app.client(), &url(address, "/headers"));
        let forwarded = format!("x-forwarded-for: {}\n", client.like(address));
        assert!(headers.contains(&forwarded), "{headers}");
        assert!(headers.contains("x-forwarded-proto: http\n"), "{headers}");
    }
    let (code, _) = curl(app.client(), &[&format!("http://{}:81/", app.topology.listener.v4)]);
    assert_eq!(code, 28, "a port without a listener does not answer");

    let balancer = app.balancer();
    assert_eq!(balancer["type"], "application");
    assert!(balancer["metrics"]["RequestCount"].as_u64().unwrap() >= 18, "{balancer}");
    assert!(balancer["metrics"]["HTTPCode_Target_2XX_Count"].as_u64().unwrap() >= 18);
    let listener = &balancer["listeners"][0];
    assert_eq!((&listener["protocol"], &listener["port"]), (&"http".into(), &80.into()));
    assert_eq!(listener["target_group"], "web");
    assert!(listener["packets"].as_u64().unwrap() > 40, "{listener}");
    assert!(listener["new_flows"].as_u64().unwrap() >= 18, "{listener}");
    let targets = app.agent.targets().unwrap();
    let requests = |target: &Value| target["metrics"]["RequestCount"].as_u64().unwrap_or(0);
    let total: u64 = targets.as_array().unwrap().iter().map(requests).sum();
    assert!(total >= 18, "{targets}");
}

/// The balancer's group decides about clients, the targets' lets in the balancer alone: by its own
/// address, which the proxy's connections come from.
#[test]
fn security_groups_guard_both_sides() {
    let client = client_host();
    let balancer = Dual::new(TARGETS, 1);
    let app = Application::start(
        2,
        Config {
            group: "security_group = \"target\"\n".into(),
            balancer: "security_groups = [\"lb\"]\n".into(),
            tables: format!(
                "[security_group.lb]\nmembers = [{balancer}]\n\
                 ingress = [{{ protocol = \"tcp\", ports = \"80\", sources = [\"{}/32\", \
                 \"{}/128\"] }}]\n\
                 [security_group.target]\n\
                 ingress = [{{ protocol = \"tcp\", ports = \"{PORT}\", sources = [\"sg:lb\"] }}]\n",
                client.v4, client.v6
            ),
        },
    );
    let text = app.config.write(&app.topology);
    let guards: Vec<Agent> = app
        .topology
        .targets
        .iter()
        .map(|target| {
            let home = Home::new(&text).unwrap();
            Agent::start_in(home, target, &["eth0"], &["--role", "target"]).unwrap()
        })
        .collect();
    let denied = |agent: &Agent| agent.status().unwrap()["drops"][DENIED].as_u64().unwrap_or(0);
    for address in app.listener() {
        for _ in 0..4 {
            page(app.client(), &url(address, "/"));
        }
    }
    assert_eq!(guards.iter().map(denied).sum::<u64>(), 0, "health checks come in as well");

    let stranger = app.topology.add_client(66).unwrap();
    for address in app.listener() {
        let before = app.drops();
        let from = stranger.like(address).to_string();
        let url = url(address, "/");
        let (code, _) = curl(app.client(), &["--interface", &from, "--connect-timeout", "1", &url]);
        assert_eq!(code, 28, "a stranger gets no answer");
        assert!(app.drops() > before);
    }
    for target in target_host(0).both() {
        let at = SocketAddr::new(target, PORT);
        // Over the balancer as a router, then from the targets' own segment.
        app.client().run(|| clients::connect(None, at).unwrap_err());
        let before = denied(&guards[0]);
        app.topology.targets[1].run(|| clients::connect(None, at).unwrap_err());
        assert!(denied(&guards[0]) > before);
    }
    // IPv6 prefers the address that was added last.
    for address in app.listener() {
        let from = client.like(address).to_string();
        let (code, text) = curl(app.client(), &["--interface", &from, &url(address, "/")]);
        assert!(code == 0 && text.starts_with("hello world from "), "{text}");
    }
}

#[test]
fn another_target_serves_when_one_dies() {
    let mut app = Application::start(2, Config::default());
    app.servers[0] = None;
    app.wait_for(0, "unhealthy");
    for address in app.listener() {
        for _ in 0..6 {
            assert_eq!(page(app.client(), &url(address, "/")), "hello world from target1");
        }
    }
    // Nobody is healthy: everybody is asked, and who answers is heard.
    for server in app.servers[1].iter().flatten() {
        server.set_healthy(false);
    }
    app.wait_for(1, "unhealthy");
    let pages = || {
        let pages = (0..4).map(|_| curl(app.client(), &[&url(app.listener()[0], "/")]).1);
        pages.filter(|page| page == "hello world from target1").count()
    };
    wait_until("a page of an unhealthy target", PATIENCE, || pages() > 0).unwrap();
    app.servers[0] = Some(start_servers(&app.topology, 0));
    app.wait_for(0, "healthy");
    for _ in 0..6 {
        let text = page(app.client(), &url(app.listener()[0], "/"));
        assert_eq!(text, "hello world from target0");
    }
}

#[test]
fn names_lead_to_zones_that_serve() {
    let mut app = Application::start(2, Config::default());
    let name = app.balancer()["dns_name"].as_str().unwrap().to_owned();
    assert!(name.starts_with("internal-site-") && name.ends_with(".elb.internal"), "{name}");
    let client = app.client();
    let (a, b) = (app.topology.listener, Dual::new(CLIENTS, SECOND));
    let texts = |hosts: &[Ipv4Addr]| hosts.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(dig(client, &[&name, "A"]), texts(&[a.v4, b.v4]));
    assert_eq!(dig(client, &["+tcp", &name.to_uppercase(), "A"]), texts(&[a.v4, b.v4]));
    assert_eq!(dig(client, &[&name, "AAAA"]), [a.v6.to_string(), b.v6.to_string()]);
    assert_eq!(dig(client, &["elb.internal", "NS"]), ["ns.elb.internal."]);
    assert_eq!(dig(client, &["ns.elb.internal", "A"]), [Dual::new(CLIENTS, 1).v4.to_string()]);
    assert_eq!(dig_status(client, "nobody.elb.internal"), "NXDOMAIN");
    assert_eq!(dig_status(client, "example.com"), "REFUSED");

    // A zone without a healthy target leaves the answer; without any, all are answered.
    app.servers[0] = None;
    app.wait_for(0, "unhealthy");
    assert_eq!(dig(app.client(), &[&name, "A"]), texts(&[b.v4]));
    assert_eq!(page(app.client(), &url(b.v4.into(), "/")), "hello world from target1");
    app.servers[1] = None;
    app.wait_for(1, "unhealthy");
    assert_eq!(dig(app.client(), &[&name, "A"]), texts(&[a.v4, b.v4]));
    for index in 0..2 {
        app.servers[usize::from(index)] = Some(start_servers(&app.topology, index));
        app.wait_for(index, "healthy");
    }
    assert_eq!(dig(app.client(), &[&name, "A"]), texts(&[a.v4, b.v4]));
}

/// A target's address and port may be one of a group whose packets are forwarded, too. What it
/// answers the proxy is not taken for an answer to a client.
#[test]
fn a_target_of_both_kinds_of_load_balancers() {
    let targets = target_host(0);
    let vip = Dual::new(CLIENTS, 120);
    let app = Application::start(
        1,
        Config {
            tables: format!(
                "[target_group.packets]\nprotocol = \"tcp\"\nport = {PORT}\ntargets = [{targets}]\n\
                 [load_balancer.packets]\naddresses = [{vip}]\n\
                 listener = [{{ protocol = \"tcp\", port = 80, target_group = \"packets\" }}]\n"
            ),
            ..Config::default()
        },
    );
    let client = client_host();
    for (proxied, forwarded) in app.listener().into_iter().zip(vip.both()) {
        for _ in 0..4 {
            let seen = page(app.client(), &url(forwarded, "/client"));
            assert!(seen.contains(&client.like(forwarded).to_string()), "{seen}");
            let seen = page(app.client(), &url(proxied, "/client"));
            // A target of either family may have been asked.
            let own = Dual::new(TARGETS, 1).both();
            assert!(own.iter().any(|own| seen.contains(&own.to_string())), "{seen}");
        }
    }
}

#[test]
fn a_port_that_another_program_has_is_told_and_tried_again() {
    let topology = Topology::new(Picture::TwoNics, 1).unwrap();
    let _servers = start_servers(&topology, 0);
    let taken = topology.balancer.run(|| TcpListener::bind("0.0.0.0:80").unwrap());
    let text = Config::default().write(&topology);
    let agent = Agent::start(&topology.balancer, topology.interfaces, &text).unwrap();
    let told = format!("listener {}:80 does not serve: ", topology.listener.v4);
    let warnings = || agent.status().unwrap()["warnings"].to_string();
    wait_until("an alert", PATIENCE, || warnings().contains(&told)).unwrap();
    let holder = format!("(process {}) listens there", std::process::id());
    assert!(warnings().contains(&holder), "{}", warnings());
    let url = |address| url(address, "/");
    page(&topology.client, &url(topology.listener.v6.into()));
    drop(taken);
    wait_until("a page", PATIENCE, || {
        curl(&topology.client, &["--fail", &url(topology.listener.v4.into())]).0 == 0
    })
    .unwrap();
    wait_until("no alert", PATIENCE, || !warnings().contains(&told)).unwrap();
}

/// A listener that comes and goes, and the agent's end, leave requests in progress alone.
#[test]
fn requests_in_progress_end_well() {
    let app = Application::start(1, Config::default());
    let during = app.slow_download(80, 6);
    let more = Config {
        balancer: String::new(),
        tables: "[[load_balancer.site.listener]]\nprotocol = \"http\"\nport = 8081\n\
                 fixed_response = { status = 200, content_type = \"text/plain\", body = \"new\" }\n"
            .into(),
        ..app.config.clone()
    };
    // Two forms of one list: the table of listeners goes to the end.
    let text = more.write(&app.topology).replace(
        "listener = [{ protocol = \"http\", port = 80, target_group = \"web\" }]\n",
        "[[load_balancer.site.listener]]\nprotocol = \"http\"\nport = 80\ntarget_group = \"web\"\n",
    );
    app.agent.reload(&text).unwrap();
    let new = format!("http://{}:8081/", app.topology.listener.v4);
    wait_until("the new listener", PATIENCE, || curl(app.client(), &[&new]).1 == "new").unwrap();
    app.agent.reload(&app.config.write(&app.topology)).unwrap();
    wait_until("its end", PATIENCE, || {
        curl(app.client(), &["--connect-timeout", "1", &new]).0 != 0
    })
    .unwrap();
    during.finish();

    let during = app.slow_download(80, 8);
    app.agent.signal(Signal::SIGTERM).unwrap();
    during.finish();
    app.agent.stop().unwrap_or_default();
}

/// The connections of a listener that leaves the configuration, alone or with its whole load
/// balancer and target group, end by themselves; new ones are refused, as by any machine. Then its
/// packets are nobody's, and its address leaves the machine.
#[test]
fn listeners_that_leave_let_their_connections_end() {
    let app = Application::start(1, Config::default());
    let during = app.slow_download(80, 8);
    let text = app.config.write(&app.topology);
    app.agent.reload(&text.replace("port = 80,", "port = 82,")).unwrap();
    app.wait_for_code(82, CONNECTED);
    app.wait_for_code(80, REFUSED);
    during.finish();
    app.wait_for_code(80, UNANSWERED);

    let during = app.slow_download(82, 8);
    let has_address = || {
        let output = app.topology.balancer.command("ip").args(["-j", "address"]).output().unwrap();
        let address = format!("\"{}\"", app.listener()[0]);
        String::from_utf8(output.stdout).unwrap().contains(&address)
    };
    app.agent.reload("# nothing is left\n[agent]\nflow_table_size = 65536\n").unwrap();
    app.wait_for_code(82, REFUSED);
    assert!(has_address());
    during.finish();
    wait_until("the end of the address", PATIENCE, || !has_address()).unwrap();
}
