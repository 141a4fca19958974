//! Certificates, and who stands for them.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
};
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};
use tempfile::TempDir;
use tokio_rustls::TlsConnector;

/// An authority and what it issued, in files.
pub struct Authority {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
    roots: RootCertStore,
    pem: String,
}

impl Authority {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = called("authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone()).unwrap();
        let this = Self {
            folder: TempDir::new().unwrap(),
            issuer: Issuer::new(params, key),
            roots,
            pem: certificate.pem(),
        };
        fs::write(this.file(), &this.pem).unwrap();
        this
    }

    /// Its own certificate.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("authority.pem")
    }

    /// The same as text.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Where files can be put that go with it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A certificate for one name, as an element of a listener's `certificates`.
    pub fn issue(&self, name: &str) -> String {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.distinguished_name = called(name);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let file =
            |suffix| self.folder.path().join(format!("{}.{suffix}", name.replace('*', "any")));
        fs::write(file("pem"), certificate.pem()).unwrap();
        fs::write(file("key"), key.serialize_pem()).unwrap();
        let (certificate, key) = (file("pem"), file("key"));
        format!("{{ cert = \"{}\", key = \"{}\" }}", certificate.display(), key.display())
    }

    /// TLS of a client that trusts it alone.
    pub fn connector(&self) -> TlsConnector {
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        Arc::new(config).into()
    }
}

/// Issuers are told from what they issued by their names.
fn called(name: &str) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
}
