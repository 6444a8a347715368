//! TLS of the API: certificate and key, and who signs those of clients, read at the start and again at SIGHUP. Not here:
//! the socket.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context, Result, bail};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto};
use tracing::{info, warn};

use crate::cli::SslOptions;
use crate::exit::WrongSetting;

/// Whether clients must show a certificate, by the numbers of Python's `ssl` module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertReqs {
    None,
    Optional,
    Required,
}

#[derive(Clone, Debug)]
pub struct Files {
    certificate: PathBuf,
    /// May be the same file.
    key: PathBuf,
    /// Of those who sign clients' certificates.
    clients: Option<(PathBuf, CertReqs)>,
}

/// What new connections are accepted with. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    files: Arc<Files>,
    config: Arc<RwLock<Arc<ServerConfig>>>,
}

impl Files {
    /// `None`: TLS was not asked for.
    pub fn given(options: &SslOptions) -> Result<Option<Files>> {
        let SslOptions {
            ssl_certfile: certificate,
            ssl_keyfile: key,
            ssl_ca_certs: ca,
            ssl_cert_reqs: reqs,
        } = options.clone();
        let Some(certificate) = certificate else {
            if key.is_some() || ca.is_some() || reqs != CertReqs::None {
                bail!(WrongSetting(
                    "--ssl-keyfile, --ssl-ca-certs and --ssl-cert-reqs want --ssl-certfile".to_owned()
                ));
            }
            return Ok(None);
        };
        let clients = match (reqs, ca) {
            (CertReqs::None, _) => None,
            (reqs, Some(ca)) => Some((ca, reqs)),
            (_, None) => bail!(WrongSetting(
                "--ssl-cert-reqs 1 and 2 want --ssl-ca-certs: a file with the certificates of those who sign clients'"
                    .to_owned()
            )),
        };
        Ok(Some(Files {
            key: key.unwrap_or_else(|| certificate.clone()),
            certificate,
            clients,
        }))
    }

    /// Whether who comes in must show a certificate.
    pub fn know_clients(&self) -> bool {
        matches!(self.clients, Some((_, CertReqs::Required)))
    }

    fn read(&self) -> Result<ServerConfig> {
        let Files {
            certificate,
            key,
            clients,
        } = self;
        let chain = certificates(certificate).context("--ssl-certfile")?;
        let key = private_key(key).context("--ssl-keyfile")?;
        let provider = Arc::new(crypto::ring::default_provider());
        let builder =
            ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some((ca, reqs)) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(ca).context("--ssl-ca-certs")? {
                    roots.add(certificate).context("--ssl-ca-certs")?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                let verifier = match reqs {
                    CertReqs::Optional => verifier.allow_unauthenticated(),
                    CertReqs::None | CertReqs::Required => verifier,
                };
                builder.with_client_cert_verifier(verifier.build().context("--ssl-ca-certs")?)
            }
        };
        let mut config = builder
            .with_single_cert(chain, key)
            .context("--ssl-certfile and --ssl-keyfile")?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

impl Tls {
    /// Reads the files now, and again at each SIGHUP from now on, whatever the process is at: loading a model, waiting for a
    /// backend. Connections that are open keep what they began with.
    pub fn open(files: Files) -> Result<Tls> {
        let config = files.read().map_err(|error| WrongSetting(format!("{error:#}")))?;
        let tls = Tls {
            files: Arc::new(files),
            config: Arc::new(RwLock::new(Arc::new(config))),
        };
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let signals = {
            let _inside = runtime.enter();
            signal(SignalKind::hangup()).context("SIGHUP")?
        };
        let follower = tls.clone();
        std::thread::Builder::new()
            .name("tandem-tls".to_owned())
            .spawn(move || follower.follow(&runtime, signals))?;
        Ok(tls)
    }

    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.config.read().unwrap_or_else(PoisonError::into_inner).clone())
    }

    fn follow(self, runtime: &Runtime, mut signals: Signal) {
        while runtime.block_on(signals.recv()).is_some() {
            match self.files.read() {
                Ok(config) => {
                    *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
                    info!("certificates read again; new connections have them");
                }
                Err(error) => warn!("certificates stay as they were: {error:#}"),
            }
        }
    }
}

pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = || CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>();
    let found = read().with_context(|| format!("cannot read certificates (PEM) from {}", path.display()))?;
    if found.is_empty() {
        bail!("{} has no certificate (PEM)", path.display());
    }
    Ok(found)
}

pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(path).with_context(|| {
        format!(
            "cannot read a private key (PEM, without a password: `openssl pkey` takes it off) from {}",
            path.display()
        )
    })
}
