//! The files of certificates: whether they hold what the configuration says. They can change while
//! it does not, so they are no part of [`super::parse`].

use std::path::Path;

use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, Error, InconsistentKeys, RootCertStore};

use super::diagnostic::{Diagnostic, Severity};
use super::file::{self, LoadError};
use super::model::CertificateFiles;
use super::reader::Wrong;

/// What is wrong with a certificate at `now`: errors, and a warning if it cannot be used at that
/// time. `place` is where the configuration has it.
pub(super) fn finding(
    files: &CertificateFiles,
    place: &Diagnostic,
    now: UnixTime,
) -> Option<Diagnostic> {
    let provider = aws_lc_rs::default_provider();
    match certified_key(files, &provider) {
        Ok(certified) => {
            let Wrong { message, help } = untimely(files, &certified, &provider, now)?;
            Some(place.with(Severity::Warning, message, help))
        }
        Err(Wrong { message, help }) => Some(place.with(Severity::Error, message, help)),
    }
}

fn certified_key(
    files: &CertificateFiles,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, Wrong> {
    let path = files.certificate.as_path();
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    let chain = chain.map_err(|error| no_pem(path, &error))?;
    if chain.is_empty() {
        let help = "write the path of a file with -----BEGIN CERTIFICATE-----";
        return Err(wrong(path, "has no certificate in PEM", help));
    }
    let path = files.key.as_path();
    let key = PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| match error {
        pem::Error::NoItemsFound => {
            let help = "write the path of a file with -----BEGIN PRIVATE KEY-----, not encrypted";
            wrong(path, "has no private key in PEM", help)
        }
        error => no_pem(path, &error),
    })?;
    let key = provider.key_provider.load_private_key(key).map_err(|error| {
        let help = "use an RSA key of 2048 to 8192 bits, ECDSA on P-256 or P-384, or Ed25519";
        wrong(path, &format!("has a private key that cannot be used: {error}"), help)
    })?;
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(certified),
        Err(Error::InconsistentKeys(_)) => {
            let message = format!(
                "has a private key that does not belong to {}",
                files.certificate.display()
            );
            let help = "the certificate for the key must be the first in its file";
            Err(wrong(path, &message, help))
        }
        Err(error) => {
            let message = format!("has a certificate that cannot be read: {error}");
            Err(wrong(&files.certificate, &message, "use a certificate of X.509, version 3"))
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Wrong> {
    file::read(path).map_err(|error| {
        let what = match error {
            LoadError::Missing(_) => "is not there".to_owned(),
            LoadError::Unreadable(_, error) => format!("cannot be read: {error}"),
            LoadError::NotAFile(_) => "is not a regular file".to_owned(),
            LoadError::TooLarge(_) => "is too large".to_owned(),
            LoadError::NotUtf8(..) | LoadError::Invalid(_) => "cannot be read".to_owned(),
        };
        wrong(path, &what, "create it, or write the path of another")
    })
}

fn no_pem(path: &Path, error: &pem::Error) -> Wrong {
    wrong(path, &format!("is not PEM: {error}"), "write the path of a file in PEM")
}

fn wrong(path: &Path, what: &str, help: &str) -> Wrong {
    Wrong::new(format!("{} {what}", path.display()), help)
}

/// Whether the time is outside of the certificate's. Who issued it is not asked.
fn untimely(
    files: &CertificateFiles,
    certified: &CertifiedKey,
    provider: &CryptoProvider,
    now: UnixTime,
) -> Option<Wrong> {
    let certificate = ParsedCertificate::try_from(certified.end_entity_cert().ok()?).ok()?;
    // Nobody is trusted, so this always fails; but the time is looked at first.
    let verified = verify_server_cert_signed_by_trust_anchor(
        &certificate,
        &RootCertStore::empty(),
        &[],
        now,
        provider.signature_verification_algorithms.all,
    );
    let Err(Error::InvalidCertificate(error)) = verified else { return None };
    let path = &files.certificate;
    let help = "clients will refuse it: put another in its place";
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            Some(wrong(path, "has a certificate that has expired", help))
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            Some(wrong(path, "has a certificate that is not valid yet", help))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::super::parse;

    /// What is said of a certificate and a key in these files.
    fn said_of(certificate: Option<&str>, key: Option<&str>) -> String {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: Option<&str>| {
            let path = dir.path().join(name);
            if let Some(content) = content {
                fs::write(&path, content).unwrap();
            }
            path.display().to_string()
        };
        let (cert, key) = (file("site.pem", certificate), file("site.key", key));
        let text = format!(
            "[load_balancer.site]\ntype = \"application\"\naddresses = [\"192.0.2.1\"]\n\
             [[load_balancer.site.listener]]\nprotocol = \"https\"\ncertificates = [\n\
             {{ cert = \"{cert}\", key = \"{key}\" }}]\nfixed_response = {{ status = 200 }}"
        );
        let parsed = parse("lb.toml", &text).unwrap_or_else(|errors| panic!("{errors}"));
        assert_eq!(parsed.warnings, []);
        let findings = parsed.file_findings();
        let shown = findings.iter().map(|finding| {
            let shown = finding.to_string();
            let first = shown.lines().next().unwrap_or_default();
            first.replace(&dir.path().display().to_string(), "DIR")
        });
        shown.collect::<Vec<_>>().join("\n")
    }

    fn certificate(key: &KeyPair, not_after: i32) -> String {
        let mut params = CertificateParams::new(vec!["www.example.com".to_owned()]).unwrap();
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(not_after, 1, 1);
        params.self_signed(key).unwrap().pem()
    }

    #[test]
    fn a_good_certificate_is_not_spoken_of() {
        let key = KeyPair::generate().unwrap();
        assert_eq!(said_of(Some(&certificate(&key, 4000)), Some(&key.serialize_pem())), "");
    }

    #[test]
    fn what_is_wrong_with_a_certificate_is_said() {
        let [key, other] = [(), ()].map(|()| KeyPair::generate().unwrap());
        let (good, pem) = (certificate(&key, 4000), key.serialize_pem());
        let (good, pem) = (Some(good.as_str()), Some(pem.as_str()));
        insta::assert_snapshot!(said_of(None, pem), @"lb.toml:7:1: error: DIR/site.pem is not there");
        insta::assert_snapshot!(said_of(good, None), @"lb.toml:7:1: error: DIR/site.key is not there");
        insta::assert_snapshot!(said_of(Some("hello"), pem), @"lb.toml:7:1: error: DIR/site.pem has no certificate in PEM");
        insta::assert_snapshot!(said_of(good, Some("hello")), @"lb.toml:7:1: error: DIR/site.key has no private key in PEM");
        insta::assert_snapshot!(said_of(good, good), @"lb.toml:7:1: error: DIR/site.key has no private key in PEM");
        insta::assert_snapshot!(said_of(good, Some(&other.serialize_pem())), @"lb.toml:7:1: error: DIR/site.key has a private key that does not belong to DIR/site.pem");
        insta::assert_snapshot!(said_of(Some(&certificate(&key, 2021)), pem), @"lb.toml:7:1: warning: DIR/site.pem has a certificate that has expired");
        let broken = "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n";
        insta::assert_snapshot!(said_of(Some(broken), pem), @"lb.toml:7:1: error: DIR/site.pem is not PEM: base64 decode error: InvalidCharacter(33)");
        let nonsense = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        insta::assert_snapshot!(said_of(Some(nonsense), pem), @"lb.toml:7:1: error: DIR/site.pem has a certificate that cannot be read: invalid peer certificate: BadEncoding");
        let nonsense = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        insta::assert_snapshot!(said_of(good, Some(nonsense)), @"lb.toml:7:1: error: DIR/site.key has a private key that cannot be used: unexpected error: failed to parse private key as RSA, ECDSA, or EdDSA");
    }
}
