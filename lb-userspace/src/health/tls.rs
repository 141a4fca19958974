//! TLS towards targets, without verifying who they are.

use std::sync::Arc;

use rustls::ClientConfig;
use rustls::client::Resumption;

/// The client side of an HTTPS health check. No session is resumed, so that every check proves
/// that the target can do a whole handshake. `alpn` is what is spoken inside; empty: HTTP/1.1.
pub(super) fn client_config(alpn: &[&[u8]]) -> Arc<ClientConfig> {
    Arc::new(crate::any_certificate::client_config(alpn, Resumption::disabled()))
}
