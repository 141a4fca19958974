//! curl: HTTP/1.1 and HTTP/2, with and without TLS; rules; cookies.

use std::{collections::BTreeSet, fs};

use lb_tests::{servers::HttpServer, servers::body, topology::client_host};

use crate::world::{PORT, World, application, group, listener, web_servers};

/// HTTP on port 80 and HTTPS on port 443.
fn listeners(certificates: &str) -> String {
    format!(
        "[[load_balancer.site.listener]]\nprotocol = \"http\"\ntarget_group = \"web\"\n\
         [[load_balancer.site.listener]]\nprotocol = \"https\"\ntarget_group = \"web\"\n\
         certificates = [{certificates}]\n"
    )
}

fn web(lines: &str) -> String {
    group("web", PORT, &[0, 1], &format!("protocol = \"http\"\n{lines}"), ", path = \"/health\"")
}

#[test]
fn http1_and_http2_with_and_without_tls() {
    let world = World::start(web_servers, |authority| {
        web("") + &application("", &listeners(&authority.issue("*.elb.internal")))
    });
    let name = &world.name;
    let sent = world.authority.folder().join("sent");
    fs::write(&sent, body(1_000_000)).unwrap();
    let upload = format!("@{}", sent.display());
    let received = world.authority.folder().join("received");
    let output = received.to_str().unwrap();
    for (scheme, option, version) in [
        ("http", "--http1.1", "1.1"),
        ("http", "--http2-prior-knowledge", "2"),
        ("https", "--http1.1", "1.1"),
        ("https", "--http2", "2"),
    ] {
        for family in ["-4", "-6"] {
            let client = client_host();
            let client = if family == "-4" { client.v4.to_string() } else { client.v6.to_string() };
            let url = format!("{scheme}://{name}/headers");
            let format = "%{http_version} %{num_connects}";
            // Two requests, the second one over the first one's connection. This curl (7.88) cannot
            // with prior knowledge, whoever the server is.
            let again = if option == "--http2-prior-knowledge" { &[][..] } else { &[&*url] };
            let first = [option, family, "--fail", "--write-out", format, &url];
            let text = world.curl(&[&first[..], again].concat());
            assert!(text.contains(&format!("x-forwarded-for: {client}\n")), "{text}");
            assert!(text.contains(&format!("x-forwarded-proto: {scheme}\n")), "{text}");
            assert!(text.contains(&format!("host: {name}\n")), "{text}");
            assert_eq!(text.matches(&format!("{version} 1")).count(), 1, "{option}: {text}");
            let others = text.matches(&format!("{version} 0")).count();
            assert_eq!(others, again.len(), "{option}: {text}");

            let url = format!("{scheme}://{name}/");
            let more = ["--fail", "--data-binary", &upload, "--output", output, &url];
            world.curl(&[&[option, family], &more[..]].concat());
            assert!(fs::read(&received).unwrap() == body(1_000_000), "{option} {family}");
        }
    }
}

#[test]
fn certificates_by_the_name_that_curl_asks_for() {
    let world = World::start(web_servers, |authority| {
        let certificates = ["a.site.test", "*.b.test"].map(|name| authority.issue(name));
        web("") + &application("", &listeners(&certificates.join(", ")))
    });
    let curl = |name: &str| {
        let at = format!("{name}:443:{}", listener().v4);
        world.try_curl(&["--fail", "--resolve", &at, &format!("https://{name}/")])
    };
    for name in ["a.site.test", "www.b.test"] {
        let (code, text) = curl(name);
        assert!(code == 0 && text.starts_with("hello world from "), "{name}: {code} {text}");
    }
    // The first certificate is shown to those who ask for another name; curl refuses it.
    assert_eq!(curl("other.test").0, 60);
    let openssl = world
        .command("sh")
        .arg("-c")
        .arg(format!(
            "openssl s_client -connect {}:443 -servername other.test </dev/null 2>/dev/null \
             | openssl x509 -noout -ext subjectAltName",
            listener().v4
        ))
        .output()
        .unwrap();
    let shown = String::from_utf8(openssl.stdout).unwrap();
    assert!(shown.contains("DNS:a.site.test"), "{shown}");
}

#[test]
fn rules_redirects_and_fixed_responses() {
    let world = World::start(web_servers, |authority| {
        let rules = "[[load_balancer.site.listener.rule]]\npriority = 10\n\
             path_pattern = [\"/api/*\"]\ntarget_group = \"api\"\n\
             url_rewrite = { regex = \"^/api/(.*)$\", replace = \"/$1\" }\n\
             [[load_balancer.site.listener.rule]]\npriority = 20\n\
             host_header = [\"api.*\"]\ntarget_group = \"api\"\n\
             [[load_balancer.site.listener.rule]]\npriority = 30\npath_pattern = [\"/teapot\"]\n\
             fixed_response = { status = 418, content_type = \"text/html\", body = \"short\" }\n";
        let redirect = "[[load_balancer.site.listener]]\nprotocol = \"http\"\nport = 80\n\
             redirect = { protocol = \"HTTPS\", port = \"443\", status = 301 }\n";
        let certificate = authority.issue("*.elb.internal");
        let secure = format!(
            "[[load_balancer.site.listener]]\nprotocol = \"https\"\ntarget_group = \"web\"\n\
             certificates = [{certificate}]\n"
        );
        let one = |name, index| group(name, PORT, &[index], "protocol = \"http\"", "");
        let listeners = format!("{redirect}{secure}{rules}");
        one("web", 0) + &one("api", 1) + &application("", &listeners)
    });
    let url = |path: &str| format!("https://{}{path}", world.name);
    let page = |arguments: &[&str]| world.curl(&[&["--fail"], arguments].concat());
    assert_eq!(page(&[&url("/")]), "hello world from target0");
    assert_eq!(page(&[&url("/api/bytes/3")]), "\0\u{1}\u{2}", "the rule's rewrite");
    assert_eq!(page(&[&url("/api/")]), "hello world from target1");
    assert_eq!(page(&[&url("/API/")]), "hello world from target0", "paths have case");
    assert_eq!(page(&["--header", "Host: Api.example", &url("/")]), "hello world from target1");

    let format = "\n%{http_code} %{content_type}";
    let fixed = world.curl(&["--write-out", format, &url("/teapot")]);
    assert_eq!(fixed, "short\n418 text/html");

    let plain = format!("http://{}/path?a=b", world.name);
    let told = world.curl(&[
        "--output",
        "/dev/null",
        "--write-out",
        "%{http_code} %{redirect_url}",
        &plain,
    ]);
    assert_eq!(told, format!("301 https://{}:443/path?a=b", world.name));
    let format = "\n%{num_redirects} %{scheme}";
    let followed = world.curl(&["--fail", "--location", "--write-out", format, &plain]);
    assert_eq!(followed.to_uppercase(), "HELLO WORLD FROM TARGET0\n1 HTTPS");
}

/// A browser's cookies, kept by curl: the agent's reload makes no difference to them.
#[test]
fn cookies_keep_a_client_with_its_target_over_a_reload() {
    let sticky = "stickiness = { type = \"lb_cookie\", duration = \"1h\" }";
    let listener = "[[load_balancer.site.listener]]\nprotocol = \"http\"\ntarget_group = \"web\"\n";
    let config = web(sticky) + &application("", listener);
    let world: World<Vec<HttpServer>> = World::start(web_servers, |_| config.clone());
    let url = format!("http://{}/", world.name);
    let jar = |name: &str| world.authority.folder().join(name).to_str().unwrap().to_owned();
    let visit = |jar: &str| world.curl(&["--fail", "--cookie", jar, "--cookie-jar", jar, &url]);
    let jars: Vec<String> = (0..4).map(|number| jar(&format!("jar{number}"))).collect();
    let homes: Vec<String> = jars.iter().map(|jar| visit(jar)).collect();
    assert_eq!(homes.iter().collect::<BTreeSet<_>>().len(), 2, "both targets: {homes:?}");
    let stay = || {
        for _ in 0..4 {
            for (jar, home) in jars.iter().zip(&homes) {
                assert_eq!(visit(jar), *home);
            }
        }
    };
    stay();
    let cookies = fs::read_to_string(&jars[0]).unwrap();
    assert!(cookies.contains("\tAWSALB\t"), "{cookies}");

    let more = "[[load_balancer.site.listener.rule]]\npriority = 1\npath_pattern = [\"/new\"]\n\
         fixed_response = { status = 200, body = \"new\" }\n";
    world.reload(&(config + more));
    assert_eq!(world.curl(&[&format!("http://{}/new", world.name)]), "new");
    stay();
}
