//! The certificates of a listener: chosen by the name that the client asks for and by what it can
//! verify, read again when their files change.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{SignatureAlgorithm, SignatureScheme};
use webpki::EndEntityCert;

use crate::config::model::CertificateFiles;

/// Certificates with their keys.
#[derive(Debug)]
pub struct Certificates {
    files: Vec<CertificateFiles>,
    provider: Arc<CryptoProvider>,
    /// What the files were like when they were read.
    seen: Mutex<Vec<Stamp>>,
    index: ArcSwap<Index>,
}

impl Certificates {
    /// Reads them. The first is for clients that name no server, or one that none is for.
    ///
    /// # Errors
    /// If one of them cannot be read, or is not what it should be.
    pub fn load(files: &[CertificateFiles], provider: Arc<CryptoProvider>) -> Result<Self, String> {
        // Before the files: what changes in between is seen by the next look.
        let seen = Mutex::new(stamps(files));
        let index = ArcSwap::from_pointee(Index::load(files, &provider)?);
        Ok(Self { files: files.to_vec(), provider, seen, index })
    }

    /// Reads them again if a file changed. What cannot be read leaves all as they were, and is
    /// tried again when a file changes once more.
    pub fn refresh(&self) {
        let now = stamps(&self.files);
        {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            if *seen == now {
                return;
            }
            *seen = now;
        }
        match Index::load(&self.files, &self.provider) {
            Ok(index) => {
                self.index.store(Arc::new(index));
                tracing::info!(first = %self.files[0].certificate.display(), "certificates read again");
            }
            Err(error) => tracing::warn!(%error, "changed certificates are not used"),
        }
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.index.load().choose(hello.server_name(), hello.signature_schemes())
    }
}

/// What tells that a file changed: device, inode, size, time of change.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

fn stamps(files: &[CertificateFiles]) -> Vec<Stamp> {
    let stamp = |path: &Path| {
        let it = fs::metadata(path).ok()?;
        Some((it.dev(), it.ino(), it.size(), it.mtime(), it.mtime_nsec()))
    };
    files.iter().flat_map(|it| [stamp(&it.certificate), stamp(&it.key)]).collect()
}

/// Certificates by the names that they are for, in lower case; wildcards without their `*`.
#[derive(Debug)]
struct Index {
    exact: HashMap<String, Vec<Arc<CertifiedKey>>>,
    wildcard: HashMap<String, Vec<Arc<CertifiedKey>>>,
    default: Arc<CertifiedKey>,
}

impl Index {
    fn load(files: &[CertificateFiles], provider: &CryptoProvider) -> Result<Self, String> {
        let mut exact = HashMap::<_, Vec<_>>::new();
        let mut wildcard = HashMap::<_, Vec<_>>::new();
        let mut default = None;
        for file in files {
            let (key, names) = load(file, provider)?;
            let key = Arc::new(key);
            for name in names {
                match name.strip_prefix('*') {
                    Some(rest) => wildcard.entry(rest.to_owned()).or_default().push(key.clone()),
                    None => exact.entry(name).or_default().push(key.clone()),
                }
            }
            default.get_or_insert(key);
        }
        let default = default.ok_or("a listener with TLS needs a certificate")?;
        let mut index = Self { exact, wildcard, default };
        // What a client can verify with less work is preferred: as AWS, ECDSA before RSA.
        for keys in index.exact.values_mut().chain(index.wildcard.values_mut()) {
            keys.sort_by_key(|it| it.key.algorithm() == SignatureAlgorithm::RSA);
        }
        Ok(index)
    }

    fn choose(&self, name: Option<&str>, schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let is_usable = |it: &&Arc<CertifiedKey>| it.key.choose_scheme(schemes).is_some();
        let name = name.map(str::to_ascii_lowercase).unwrap_or_default();
        let parent = name.find('.').map_or("", |dot| &name[dot..]);
        let by_name = [self.exact.get(&name), self.wildcard.get(parent)];
        let mut by_name = by_name.into_iter().flatten().flatten();
        Some(by_name.find(is_usable).unwrap_or(&self.default).clone())
    }
}

/// A certificate with its key, and the names it is for.
fn load(
    files: &CertificateFiles,
    provider: &CryptoProvider,
) -> Result<(CertifiedKey, Vec<String>), String> {
    let of = |path: &Path| {
        let path = path.display().to_string();
        move |error: String| format!("{path}: {error}")
    };
    let chain: Vec<_> = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect)
        .map_err(|error| of(&files.certificate)(error.to_string()))?;
    let leaf = chain
        .first()
        .ok_or_else(|| of(&files.certificate)("there is no certificate in it".to_owned()))?;
    let names = EndEntityCert::try_from(leaf)
        .map_err(|error| of(&files.certificate)(error.to_string()))?
        .valid_dns_names()
        .map(str::to_ascii_lowercase)
        .collect();
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| of(&files.key)(error.to_string()))?;
    let key = provider
        .key_provider
        .load_private_key(key)
        .map_err(|error| of(&files.key)(error.to_string()))?;
    let certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(|error| {
        of(&files.key)(format!("not the key of {}: {error}", files.certificate.display()))
    })?;
    Ok((certified, names))
}
