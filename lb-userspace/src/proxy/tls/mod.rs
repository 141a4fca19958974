//! TLS: what listeners show, and how targets are spoken to.

mod certificates;
mod watch;

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{CipherSuite, ClientConfig, ServerConfig, SupportedProtocolVersion};

pub use watch::Watch;

use self::certificates::Certificates;
use crate::any_certificate::client_config;
use crate::config::model::{ListenerTls, TlsPolicy};

/// Sessions with targets that are remembered, so that a new connection needs half a handshake.
const SESSIONS: usize = 1024;

/// What a listener shows, as long as its configuration is the same; its certificates' files may
/// change.
#[derive(Debug, Clone)]
pub struct ListenerConfig {
    /// For handshakes.
    pub server: Arc<ServerConfig>,
    /// For handshakes with clients that are refused, in HTTP/1.1.
    pub refusing: Arc<ServerConfig>,
    certificates: Arc<Certificates>,
}

impl ListenerConfig {
    /// Reads the certificates. `alpn`: protocols in order of preference. Certificates that cannot be
    /// read now, but were `before`, go on serving.
    ///
    /// # Errors
    /// If no certificate can be read, is what it should be, and fits its key.
    pub fn load(tls: &ListenerTls, before: Option<&Self>, alpn: &[String]) -> Result<Self, String> {
        let provider = Arc::new(provider(tls.policy));
        let certificates = Certificates::load(
            &tls.certificates,
            before.map(|it| &*it.certificates),
            provider.clone(),
        )?;
        let certificates = Arc::new(certificates);
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions(tls.policy))
            .map_err(|error| format!("policy {}: {error}", tls.policy.name))?
            .with_no_client_auth()
            .with_cert_resolver(certificates.clone());
        server.alpn_protocols = alpn.iter().map(|it| it.as_bytes().to_vec()).collect();
        server.ticketer = aws_lc_rs::Ticketer::new().map_err(|error| error.to_string())?;
        server.ignore_client_order = true;
        let mut refusing = server.clone();
        refusing.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { server: Arc::new(server), refusing: Arc::new(refusing), certificates })
    }
}

fn versions(policy: TlsPolicy) -> Vec<&'static SupportedProtocolVersion> {
    let mut versions = Vec::new();
    if policy.tls13 {
        versions.push(&rustls::version::TLS13);
    }
    if policy.tls12 {
        versions.push(&rustls::version::TLS12);
    }
    versions
}

/// The cipher suites of AWS's policies that have forward secrecy and authenticated encryption. Of
/// TLS 1.2, AWS has no suites with ChaCha20.
fn provider(policy: TlsPolicy) -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.retain(|suite| {
        let is_chacha12 = matches!(
            suite.suite(),
            CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
                | CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256
        );
        !is_chacha12 && (policy.tls12 || suite.tls13().is_some())
    });
    // 128 bits first, as AWS orders them.
    provider.cipher_suites.sort_by_key(|suite| {
        let name = format!("{:?}", suite.suite());
        (suite.tls13().is_none(), !name.contains("AES_128"), !name.contains("AES_256"))
    });
    provider
}

/// The client side of TLS with targets, whose certificates are not verified.
pub fn towards_targets(alpn: &[&[u8]]) -> Arc<ClientConfig> {
    let mut config = client_config(alpn, Resumption::in_memory_sessions(SESSIONS));
    config.enable_sni = false;
    Arc::new(config)
}
