//! A real browser opens the load balancer's name.

use std::{
    convert::Infallible,
    fs,
    process::{Command, Stdio},
    time::Duration,
};

use aws_lc_rs::digest;
use data_encoding::BASE64;
use http_body_util::Full;
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    header::CONTENT_TYPE,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use lb_tests::{
    netns::Process,
    servers::Server,
    topology::{Topology, client_host},
};
use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::world::{PORT, World, application, group, sockets};

/// How long the browser may take. It is large, and the machine may be busy.
const TIMEOUT: Duration = Duration::from_secs(180);

/// A page whose script, a request of its own, writes what the target saw.
const PAGE: &str =
    "<!doctype html><title>site</title><h1>hello world</h1><script src=\"/seen.js\"></script>";

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let field = |name: &str| {
        let value = request.headers().get(name).map_or(&b"none"[..], |it| it.as_bytes());
        value.escape_ascii().to_string()
    };
    let (kind, text) = match request.uri().path() {
        "/" => ("text/html", PAGE.to_owned()),
        "/seen.js" => (
            "application/javascript",
            format!(
                "document.write('<p>client {} by {} for {}</p>')",
                field("x-forwarded-for"),
                field("x-forwarded-proto"),
                field("host")
            ),
        ),
        _ => ("text/plain", String::new()),
    };
    let response = Response::new(Full::new(text.into()));
    let (mut parts, body) = response.into_parts();
    parts.headers.insert(CONTENT_TYPE, kind.parse().unwrap());
    Ok(Response::from_parts(parts, body))
}

async fn serve(stream: TcpStream) {
    // A health check ends as it likes.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)).await;
}

fn pages(topology: &Topology) -> Vec<Server> {
    let start = |(target, address)| Server::connections(target, address, serve).unwrap();
    sockets(topology, PORT).into_iter().map(start).collect()
}

/// What the browser shows, as HTML.
fn dump(world: &World<Vec<Server>>, url: &str, key: &str) -> String {
    let profile = TempDir::new().unwrap();
    let mut command: Command = world.command("chromium");
    command.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]);
    command.args(["--disable-dev-shm-usage", "--no-first-run", "--disable-sync"]);
    command.args(["--disable-background-networking", "--disable-component-update"]);
    command.arg(format!("--user-data-dir={}", profile.path().display()));
    command.arg(format!("--ignore-certificate-errors-spki-list={key}"));
    command.env("HOME", profile.path()).args(["--dump-dom", url]);
    // Killed when it is dropped, and with it, as they share its PID namespace, all its processes.
    let mut browser = Process::spawn(&mut command).unwrap();
    let ended = browser.wait(TIMEOUT);
    let output = browser.output();
    assert!(ended.as_ref().is_ok_and(|it| it.success()), "{url}: {ended:?}\n{output}");
    output
}

/// What the browser trusts: SHA-256 of the certificate's key (SubjectPublicKeyInfo).
fn fingerprint(world: &World<Vec<Server>>) -> String {
    let certificate = world.authority.folder().join("any.elb.internal.pem");
    let mut openssl = Command::new("openssl");
    openssl.args(["x509", "-noout", "-pubkey", "-in"]).arg(certificate).stdin(Stdio::null());
    let pem = String::from_utf8(openssl.output().unwrap().stdout).unwrap();
    let base64: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    let key = BASE64.decode(base64.as_bytes()).unwrap();
    BASE64.encode(digest::digest(&digest::SHA256, &key).as_ref())
}

#[test]
fn a_browser_opens_the_load_balancer_s_name() {
    let world = World::start(pages, |authority| {
        let certificate = authority.issue("*.elb.internal");
        let listeners = format!(
            "[[load_balancer.site.listener]]\nprotocol = \"http\"\ntarget_group = \"web\"\n\
             [[load_balancer.site.listener]]\nprotocol = \"https\"\ntarget_group = \"web\"\n\
             certificates = [{certificate}]\n"
        );
        group("web", PORT, &[0, 1], "protocol = \"http\"", "") + &application("", &listeners)
    });
    let name = &world.name;
    assert!(name.starts_with("internal-site-") && name.ends_with(".elb.internal"), "{name}");
    let log = fs::read_to_string(world.authority.folder().join("resolv.conf")).unwrap();
    assert_eq!(log, "nameserver 10.0.1.1\n", "nobody else is asked");
    let key = fingerprint(&world);
    for scheme in ["http", "https"] {
        let page = dump(&world, &format!("{scheme}://{name}/"), &key);
        assert!(page.contains("<h1>hello world</h1>"), "{page}");
        let seen = client_host()
            .both()
            .map(|client| format!("<p>client {client} by {scheme} for {name}</p>"));
        assert!(seen.iter().any(|seen| page.contains(seen)), "{seen:?}: {page}");
    }
}
