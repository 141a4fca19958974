//! The certificates of a listener: chosen by the name that the client asks for and by what it can
//! verify, read again when their files change.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    provider: Arc<CryptoProvider>,
    pairs: Mutex<Vec<Pair>>,
    index: ArcSwap<Index>,
}

/// A certificate and its key, in files.
#[derive(Debug, Clone)]
struct Pair {
    files: CertificateFiles,
    /// What the files were like when they were read last.
    seen: [Stamp; 2],
    /// What was in them when they could be read last.
    loaded: Option<Loaded>,
    /// Why they cannot be used as they are now.
    problem: Option<String>,
}

impl Pair {
    fn new(files: &CertificateFiles, before: Option<&Self>, provider: &CryptoProvider) -> Self {
        let loaded = before.and_then(|it| it.loaded.clone());
        let mut pair = Self { files: files.clone(), seen: [None; 2], loaded, problem: None };
        pair.read(provider);
        pair
    }

    /// What cannot be read goes on as it was.
    fn read(&mut self, provider: &CryptoProvider) {
        // Before the files: what changes in between is seen by the next look.
        self.seen = stamps(&self.files);
        match load(&self.files, provider) {
            Ok(loaded) => (self.loaded, self.problem) = (Some(loaded), None),
            Err(error) => self.problem = Some(error),
        }
    }

    fn is_as_seen(&self) -> bool {
        self.seen == stamps(&self.files)
    }

    /// What is wrong with it, and what follows.
    fn describe(&self) -> Option<String> {
        let problem = self.problem.as_ref()?;
        let serves = match self.loaded {
            Some(_) => "what was read before goes on serving",
            None => "listeners serve without it",
        };
        Some(format!("certificate {problem}; {serves}, it is tried again"))
    }
}

impl Certificates {
    /// Reads them. The first that can be used is for clients that name no server, or one that none
    /// is for. What cannot be read and was there `before` goes on serving; if nothing can be read,
    /// all that was there before does.
    ///
    /// # Errors
    /// If none of them can be read, or is what it should be.
    pub fn load(
        files: &[CertificateFiles],
        before: Option<&Self>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, String> {
        let known = before.map(Self::lock);
        let find = |files: &CertificateFiles| known.as_ref()?.iter().find(|it| it.files == *files);
        let pairs: Vec<_> =
            files.iter().map(|files| Pair::new(files, find(files), &provider)).collect();
        drop(known);
        let index = match (Index::new(&pairs), before) {
            (Some(index), _) => Arc::new(index),
            (None, Some(before)) => before.index.load_full(),
            (None, None) => {
                let problems: Vec<_> = pairs.into_iter().filter_map(|it| it.problem).collect();
                return Err(problems.join("; "));
            }
        };
        Ok(Self { provider, pairs: Mutex::new(pairs), index: ArcSwap::new(index) })
    }

    /// Reads those again of which a file changed, or that cannot be used. What cannot be read goes
    /// on as it was.
    pub fn refresh(&self) {
        let mut pairs = self.lock();
        let mut is_new = false;
        for pair in pairs.iter_mut().filter(|it| it.problem.is_some() || !it.is_as_seen()) {
            pair.read(&self.provider);
            is_new |= pair.problem.is_none();
        }
        if is_new && let Some(index) = Index::new(&pairs) {
            self.index.store(Arc::new(index));
            let first = pairs.first().map(|it| it.files.certificate.display());
            tracing::info!(first = first.map(tracing::field::display), "certificates read again");
        }
    }

    /// What is wrong with them now.
    pub fn problems(&self) -> Vec<String> {
        self.lock().iter().filter_map(Pair::describe).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Pair>> {
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.index.load().choose(hello.server_name(), hello.signature_schemes())
    }
}

/// What tells that a file changed: device, inode, size, time of change.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

fn stamps(files: &CertificateFiles) -> [Stamp; 2] {
    [&files.certificate, &files.key].map(|path| {
        let it = fs::metadata(path).ok()?;
        Some((it.dev(), it.ino(), it.size(), it.mtime(), it.mtime_nsec()))
    })
}

/// Certificates by the names that they are for, in lower case; wildcards without their `*`.
#[derive(Debug)]
struct Index {
    exact: HashMap<String, Vec<Arc<CertifiedKey>>>,
    wildcard: HashMap<String, Vec<Arc<CertifiedKey>>>,
    default: Arc<CertifiedKey>,
}

impl Index {
    /// Of those that can be used, if any.
    fn new(pairs: &[Pair]) -> Option<Self> {
        let mut exact = HashMap::<_, Vec<_>>::new();
        let mut wildcard = HashMap::<_, Vec<_>>::new();
        let mut default = None;
        for Loaded { key, names } in pairs.iter().filter_map(|it| it.loaded.as_ref()) {
            for name in names {
                match name.strip_prefix('*') {
                    Some(rest) => wildcard.entry(rest.to_owned()).or_default().push(key.clone()),
                    None => exact.entry(name.clone()).or_default().push(key.clone()),
                }
            }
            default.get_or_insert_with(|| key.clone());
        }
        let default = default?;
        let mut index = Self { exact, wildcard, default };
        // What a client can verify with less work is preferred: as AWS, ECDSA before RSA.
        for keys in index.exact.values_mut().chain(index.wildcard.values_mut()) {
            keys.sort_by_key(|it| it.key.algorithm() == SignatureAlgorithm::RSA);
        }
        Some(index)
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
#[derive(Debug, Clone)]
struct Loaded {
    key: Arc<CertifiedKey>,
    names: Vec<String>,
}

fn load(files: &CertificateFiles, provider: &CryptoProvider) -> Result<Loaded, String> {
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
    Ok(Loaded { key: Arc::new(certified), names })
}
