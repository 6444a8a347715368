//! Whom a router believes to be a backend, and what it shows of itself. Not here: the backend's side (`service::door`), files
//! (server).

use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// For backends at `https://`.
#[derive(Clone)]
pub struct ClientTls(ClientTlsConfig);

impl ClientTls {
    /// `roots`: certificates (PEM) of those who sign backends'. `own`: a certificate and its key (PEM), for backends that want
    /// one.
    pub fn new(roots: &[u8], own: Option<(&[u8], &[u8])>) -> ClientTls {
        let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots));
        ClientTls(match own {
            None => config,
            Some((certificate, key)) => config.identity(Identity::from_pem(certificate, key)),
        })
    }

    pub(crate) fn config(&self) -> ClientTlsConfig {
        self.0.clone()
    }
}
