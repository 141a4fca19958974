//! TLS of listeners and towards targets.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lb_userspace::config::model::{
    Action, CertificateFiles, FixedResponse, ListenerTls, LogSink, ProxyProtocol, TargetProtocol,
    TlsPolicy,
};
use lb_userspace::proxy::Proxy;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::harness::{HELLO, Site, answers, count, origin, wait_count};

const POLICY: TlsPolicy =
    TlsPolicy { name: "ELBSecurityPolicy-TLS13-1-2-2021-06", tls12: true, tls13: true };

/// Writes a certificate of these names, with its key.
pub fn certificate(directory: &Path, file: &str, names: &[&str]) -> CertificateFiles {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    write(directory, file, names, &key)
}

fn write(directory: &Path, file: &str, names: &[&str], key: &KeyPair) -> CertificateFiles {
    let names: Vec<_> = names.iter().map(|it| (*it).to_owned()).collect();
    let certificate = CertificateParams::new(names).unwrap().self_signed(key).unwrap();
    let files = CertificateFiles {
        certificate: directory.join(format!("{file}.pem")),
        key: directory.join(format!("{file}.key")),
    };
    fs::write(&files.key, key.serialize_pem()).unwrap();
    fs::write(&files.certificate, certificate.pem()).unwrap();
    files
}

pub fn listener(certificates: Vec<CertificateFiles>) -> ListenerTls {
    ListenerTls { certificates, policy: POLICY, alpn: Vec::new() }
}

/// Takes every certificate; the test looks at it.
#[derive(Debug)]
struct Any(Vec<SignatureScheme>);

impl ServerCertVerifier for Any {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.clone()
    }
}

pub const ALL: [SignatureScheme; 2] =
    [SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ED25519];

pub async fn handshake(
    address: SocketAddr,
    name: &'static str,
    alpn: &[&str],
    schemes: &[SignatureScheme],
    version: &'static rustls::SupportedProtocolVersion,
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Any(schemes.to_vec())))
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|it| it.as_bytes().to_vec()).collect();
    let stream = TcpStream::connect(address).await.unwrap();
    TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(name).unwrap(), stream).await
}

async fn connect(address: SocketAddr, name: &'static str) -> TlsStream<TcpStream> {
    handshake(address, name, &[], &ALL, &rustls::version::TLS13).await.unwrap()
}

/// Whether the certificate that was shown is that of these files.
fn shows(stream: &TlsStream<TcpStream>, files: &CertificateFiles) -> bool {
    let expected = CertificateDer::from_pem_file(&files.certificate).unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0] == expected
}

async fn exchange(mut stream: TlsStream<TcpStream>) -> String {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // Some end without a farewell of TLS.
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn certificates_are_chosen_by_name_and_by_what_the_client_knows() {
    let directory = TempDir::new().unwrap();
    let directory = directory.path();
    let default = certificate(directory, "default", &["default.test"]);
    let exact = certificate(directory, "exact", &["www.site.test"]);
    let wildcard = certificate(directory, "wildcard", &["*.site.test"]);
    let edwards = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let edwards = write(directory, "edwards", &["www.site.test"], &edwards);
    let (mut site, _) = Site::new(&[answers(HELLO).await]);
    let all = vec![default.clone(), exact.clone(), wildcard.clone(), edwards.clone()];
    let address = site.listener(ProxyProtocol::Https, Some(listener(all)));
    let _proxy = site.start();

    assert!(shows(&connect(address, "www.site.test").await, &exact));
    assert!(shows(&connect(address, "api.site.test").await, &wildcard));
    assert!(shows(&connect(address, "a.b.site.test").await, &default), "one label only");
    assert!(shows(&connect(address, "other.test").await, &default));
    let only = [SignatureScheme::ED25519];
    let stream = handshake(address, "www.site.test", &[], &only, &rustls::version::TLS13);
    assert!(shows(&stream.await.unwrap(), &edwards));
    assert!(exchange(connect(address, "www.site.test").await).await.ends_with("hello"));
}

#[tokio::test]
async fn http2_is_agreed_on_unless_it_is_off() {
    let directory = TempDir::new().unwrap();
    let tls = listener(vec![certificate(directory.path(), "a", &["a.test"])]);
    for is_on in [true, false] {
        let (mut site, _) = Site::new(&[answers(HELLO).await]);
        let address = site.listener(ProxyProtocol::Https, Some(tls.clone()));
        let _proxy = site.attributes(|it| it.http2 = is_on).start();
        let both = ["h2", "http/1.1"];
        let stream = handshake(address, "a.test", &both, &ALL, &rustls::version::TLS12).await;
        let stream = stream.unwrap();
        let expected = if is_on { "h2" } else { "http/1.1" };
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(expected.as_bytes()));
    }
}

#[tokio::test]
async fn a_client_beyond_the_capacity_is_told() {
    let directory = TempDir::new().unwrap();
    let tls = listener(vec![certificate(directory.path(), "a", &["a.test"])]);
    let (mut site, _) = Site::new(&[answers(HELLO).await]);
    let address = site.listener(ProxyProtocol::Https, Some(tls));
    let proxy = site.attributes(|it| it.max_connections = Some(1)).start();
    let first = connect(address, "a.test").await;
    let both = ["h2", "http/1.1"];
    let second = handshake(address, "a.test", &both, &ALL, &rustls::version::TLS13).await.unwrap();
    assert_eq!(second.get_ref().1.alpn_protocol(), Some(b"http/1.1".as_slice()));
    let answer = exchange(second).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert_eq!(count(&proxy, "RejectedConnectionCount"), 1);
    // The one that is there notices nothing.
    assert!(exchange(first).await.ends_with("hello"));
}

#[tokio::test]
async fn clients_beyond_the_capacity_cannot_use_it_up() {
    let directory = TempDir::new().unwrap();
    let tls = listener(vec![certificate(directory.path(), "a", &["a.test"])]);
    let (mut site, _) = Site::new(&[answers(HELLO).await]);
    let address = site.listener(ProxyProtocol::Https, Some(tls));
    let proxy = site.attributes(|it| it.max_connections = Some(1)).start();
    let _first = connect(address, "a.test").await;
    // They say nothing, and would be waited for.
    let mut silent = Vec::new();
    for n in 1..=64 {
        silent.push(TcpStream::connect(address).await.unwrap());
        wait_count(&proxy, "RejectedConnectionCount", n).await;
    }
    let began = std::time::Instant::now();
    let mut further = TcpStream::connect(address).await.unwrap();
    assert_eq!(further.read(&mut [0; 1]).await.unwrap(), 0);
    assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_policy_refuses_old_versions() {
    let directory = TempDir::new().unwrap();
    let mut tls = listener(vec![certificate(directory.path(), "a", &["a.test"])]);
    tls.policy =
        TlsPolicy { name: "ELBSecurityPolicy-TLS13-1-3-2021-06", tls12: false, tls13: true };
    let (mut site, _) = Site::new(&[answers(HELLO).await]);
    let address = site.listener(ProxyProtocol::Https, Some(tls));
    let proxy = site.start();
    let refused = handshake(address, "a.test", &[], &ALL, &rustls::version::TLS12).await;
    assert!(refused.is_err());
    wait_count(&proxy, "ClientTLSNegotiationErrorCount", 1).await;
    connect(address, "a.test").await;
}

#[tokio::test]
async fn certificates_are_read_again_and_connections_stay() {
    let directory = TempDir::new().unwrap();
    let files = certificate(directory.path(), "a", &["a.test"]);
    let (mut site, _) = Site::new(&[answers(HELLO).await]);
    let address = site.listener(ProxyProtocol::Https, Some(listener(vec![files.clone()])));
    let _proxy = site.start();
    let before = connect(address, "a.test").await;
    // A certificate without its key is not used.
    let old = fs::read(&files.certificate).unwrap();
    let other = certificate(directory.path(), "b", &["a.test"]);
    fs::copy(&other.certificate, &files.certificate).unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let shown = connect(address, "a.test").await;
    assert!(shown.get_ref().1.peer_certificates() == before.get_ref().1.peer_certificates());
    assert!(fs::read(&files.certificate).unwrap() != old);
    fs::copy(&other.key, &files.key).unwrap();
    let changed = async {
        while !shows(&connect(address, "a.test").await, &other) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(crate::harness::LIMIT, changed).await.unwrap();
    assert!(exchange(before).await.ends_with("hello"));
}

#[tokio::test]
async fn a_certificate_that_cannot_be_read_is_a_problem_of_its_listener_only() {
    let (mut site, address) = Site::new(&[answers(HELLO).await]);
    let nowhere =
        CertificateFiles { certificate: "/nowhere.pem".into(), key: "/nowhere.key".into() };
    let broken = site.listener(ProxyProtocol::Https, Some(listener(vec![nowhere])));
    let proxy = Proxy::start(1).unwrap();
    let problems = proxy.apply(site.routes());
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].listener, broken);
    assert!(problems[0].reason.contains("/nowhere.pem"), "{}", problems[0]);
    let answer = crate::harness::Client::connect(address).await.get("/").await;
    assert_eq!(answer.status(), 200);
}

/// Waits until so many things are not as they should be.
async fn wait_defects(proxy: &Proxy, count: usize) -> Vec<String> {
    let reached = async {
        while proxy.defects().len() != count {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let is_reached = tokio::time::timeout(crate::harness::LIMIT, reached).await;
    is_reached.unwrap_or_else(|_| panic!("not {count}: {:?}", proxy.defects()));
    proxy.defects()
}

#[tokio::test]
async fn a_pair_that_cannot_be_used_is_told_and_the_others_serve() {
    let directory = TempDir::new().unwrap();
    let good = certificate(directory.path(), "a", &["a.test"]);
    let nowhere =
        CertificateFiles { certificate: "/nowhere.pem".into(), key: "/nowhere.key".into() };
    let (mut site, _) = Site::new(&[answers(HELLO).await]);
    let pairs = vec![nowhere.clone(), good.clone()];
    let address = site.listener(ProxyProtocol::Https, Some(listener(pairs)));
    let proxy = site.start();
    for name in ["a.test", "b.test"] {
        assert!(shows(&connect(address, name).await, &good));
    }
    let defects = wait_defects(&proxy, 1).await;
    assert!(defects[0].starts_with("certificate /nowhere.pem: "), "{defects:?}");

    // A renewal that fails is told for as long as it lasts.
    let key = fs::read(&good.key).unwrap();
    fs::remove_file(&good.key).unwrap();
    let defects = wait_defects(&proxy, 2).await;
    assert!(defects.iter().any(|it| it.contains("a.key: ")), "{defects:?}");
    assert!(shows(&connect(address, "a.test").await, &good));
    fs::write(&good.key, key).unwrap();
    wait_defects(&proxy, 1).await;

    // What else changed holds, although no certificate of the new ones can be used.
    let route = site.listeners.get_mut(&address).unwrap();
    let mut changed = (*route.listener).clone();
    changed.tls = Some(listener(vec![nowhere]));
    changed.default_action = Action::FixedResponse(FixedResponse {
        status: 200,
        content_type: "text/plain".to_owned(),
        body: "changed".to_owned(),
    });
    route.listener = Arc::new(changed);
    assert_eq!(proxy.apply(site.routes()), []);
    let stream = connect(address, "a.test").await;
    assert!(shows(&stream, &good));
    assert!(exchange(stream).await.ends_with("changed"));
    wait_defects(&proxy, 1).await;
}

#[tokio::test]
async fn a_log_that_cannot_be_opened_stops_nothing() {
    let (site, address) = Site::new(&[answers(HELLO).await]);
    let proxy = site.start();
    let site = site.attributes(|it| it.access_log = Some(LogSink::File("/nowhere/log".into())));
    assert_eq!(proxy.apply(site.routes()), []);
    let answer = crate::harness::Client::connect(address).await.get("/").await;
    assert_eq!(answer.status(), 200);
    let defects = wait_defects(&proxy, 1).await;
    assert!(defects[0].starts_with("access log /nowhere/log cannot be opened: "), "{defects:?}");
}

/// A server with TLS, whose certificate nobody knows, that does `serve` with each connection.
async fn tls_origin(answer: &'static [u8]) -> SocketAddr {
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(vec!["x".to_owned()]).unwrap().self_signed(&key).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    origin(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let mut stream = acceptor.accept(stream).await.unwrap();
            let mut buffer = [0; 4096];
            while stream.read(&mut buffer).await.is_ok_and(|n| n > 0) {
                stream.write_all(answer).await.unwrap();
            }
        }
    })
    .await
}

#[tokio::test]
async fn targets_in_tls() {
    let (mut site, address) = Site::new(&[tls_origin(HELLO.as_bytes()).await]);
    site.groups.get_mut("web").unwrap().settings.protocol = TargetProtocol::Https;
    let _proxy = site.start();
    let mut client = crate::harness::Client::connect(address).await;
    for _ in 0..2 {
        assert_eq!(client.get("/").await.body, b"hello");
    }
}

#[tokio::test]
async fn tls_listener_tells_targets_the_clients_address() {
    let target = origin(|mut stream| async move {
        let mut header = [0; 28];
        stream.read_exact(&mut header).await.unwrap();
        stream.write_all(&header).await.unwrap();
        let mut buffer = [0; 100];
        while let Ok(n @ 1..) = stream.read(&mut buffer).await {
            stream.write_all(&buffer[..n]).await.unwrap();
        }
    })
    .await;
    let directory = TempDir::new().unwrap();
    let mut tls = listener(vec![certificate(directory.path(), "a", &["a.test"])]);
    tls.alpn = vec!["x-own".to_owned()];
    let (mut site, _) = Site::new(&[target]);
    let settings = &mut site.groups.get_mut("web").unwrap().settings;
    settings.protocol = TargetProtocol::Tcp;
    settings.proxy_protocol_v2 = true;
    let address = site.listener(ProxyProtocol::Tls, Some(tls));
    let log = directory.path().join("tls.log");
    let site = site.attributes(|it| it.access_log = Some(LogSink::File(log.clone())));
    let proxy = site.start();
    let mut stream =
        handshake(address, "a.test", &["x-own"], &ALL, &rustls::version::TLS13).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"x-own".as_slice()));
    let mut header = [0; 28];
    stream.read_exact(&mut header).await.unwrap();
    assert_eq!(header[..16], *b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
    assert_eq!(header[16..24], [127, 0, 0, 1, 127, 0, 0, 1]);
    let port = stream.get_ref().0.local_addr().unwrap().port();
    assert_eq!(header[24..26], port.to_be_bytes());
    assert_eq!(header[26..], address.port().to_be_bytes());
    stream.write_all(b"anything").await.unwrap();
    let mut echo = [0; 8];
    stream.read_exact(&mut echo).await.unwrap();
    assert_eq!(echo, *b"anything");
    assert_eq!(count(&proxy, "NewFlowCount_TLS"), 1);
    let client = stream.get_ref().0.local_addr().unwrap();
    drop(stream);
    wait_count(&proxy, "ActiveConnectionCount", 0).await;
    proxy.end(Duration::from_secs(5)).await;
    let log = fs::read_to_string(log).unwrap();
    let fields: Vec<_> = log.split(' ').collect();
    assert_eq!(fields[..2], ["tls", "2.0"], "{log}");
    assert_eq!(fields[5..7], [client.to_string(), address.to_string()]);
    assert_eq!(fields[9..11], ["8", "36"], "{log}");
    assert!(log.contains(" tlsv13 - a.test x-own - \"x-own\" "), "{log}");
}

#[tokio::test]
async fn handshakes_that_fail_are_in_the_log() {
    let directory = TempDir::new().unwrap();
    let mut tls = listener(vec![certificate(directory.path(), "a", &["a.test"])]);
    tls.policy =
        TlsPolicy { name: "ELBSecurityPolicy-TLS13-1-3-2021-06", tls12: false, tls13: true };
    let (mut site, _) = Site::new(&[]);
    let address = site.listener(ProxyProtocol::Tls, Some(tls));
    let log = directory.path().join("tls.log");
    let site = site.attributes(|it| it.access_log = Some(LogSink::File(log.clone())));
    let proxy = site.start();
    let old = handshake(address, "a.test", &["h2"], &ALL, &rustls::version::TLS12).await;
    assert!(old.is_err());
    wait_count(&proxy, "ClientTLSNegotiationErrorCount", 1).await;
    // A client that does not trust the certificate says so: bad_certificate, 42 = 0x2a, or
    // unknown_ca, 48 = 0x30.
    let mut trusting = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    trusting.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("a.test").unwrap();
    assert!(TlsConnector::from(Arc::new(trusting)).connect(name, stream).await.is_err());
    wait_count(&proxy, "ClientTLSNegotiationErrorCount", 2).await;
    wait_count(&proxy, "ActiveConnectionCount", 0).await;
    proxy.end(Duration::from_secs(5)).await;
    let log = fs::read_to_string(log).unwrap();
    let lines: Vec<Vec<_>> = log.lines().map(|line| line.split(' ').collect()).collect();
    assert_eq!(lines.len(), 2, "{log}");
    for line in &lines {
        // No handshake's time, no cipher, no version; but what the client asked for.
        assert_eq!((line[8], line[14], line[15]), ("-", "-", "-"), "{log}");
        assert_eq!((line[17], line[18], line[20]), ("a.test", "-", "\"h2\""), "{log}");
    }
    assert_eq!((lines[0][11], lines[1][11]), ("-", "30"), "{log}");
}

#[tokio::test]
async fn tls_listener_to_tls_targets() {
    let (mut site, _) = Site::new(&[tls_origin(b"anything").await]);
    site.groups.get_mut("web").unwrap().settings.protocol = TargetProtocol::Tls;
    let directory = TempDir::new().unwrap();
    let tls = listener(vec![certificate(directory.path(), "a", &["a.test"])]);
    let address = site.listener(ProxyProtocol::Tls, Some(tls));
    let _proxy = site.start();
    let mut stream = connect(address, "a.test").await;
    stream.write_all(b"x").await.unwrap();
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, *b"anything");
}
