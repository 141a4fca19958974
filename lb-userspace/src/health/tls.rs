//! TLS towards targets, without verifying who they are.

use std::sync::Arc;

use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs;

use crate::any_certificate::AnyCertificate;

/// The client side of an HTTPS health check. No session is resumed, so that every check proves
/// that the target can do a whole handshake. `alpn` is what is spoken inside; empty: HTTP/1.1.
pub(super) fn client_config(alpn: &[&[u8]]) -> Arc<ClientConfig> {
    // The provider is named here and not taken from the process: nobody has to install one first,
    // and a second one among the dependencies does no harm.
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider has cipher suites of TLS 1.2 and 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Arc::new(config)
}
