//! Who may come in: keys that a file holds, and whether the server is open to other machines without any. Not here: what
//! a key is and how a request shows one.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use tandem_rpc::{ClientTls, Token};
use tracing::warn;

use crate::cli::{BackendSslOptions, TokenOptions};
use crate::exit::WrongSetting;
use crate::tls;

/// The keys of `--api-key` and those of `--api-key-file`, one a line.
pub fn keys(given: &[String], file: Option<&Path>) -> Result<Vec<String>> {
    let mut keys = given.to_vec();
    let Some(file) = file else { return Ok(keys) };
    let doing = || match Path::new("/proc/self").metadata() {
        Ok(own) => format!("--api-key-file {} (as user {})", file.display(), own.uid()),
        Err(_) => format!("--api-key-file {}", file.display()),
    };
    let kind = file.metadata().with_context(doing)?.file_type();
    // The null device says "none" on purpose; an empty file is a secret that nobody filled.
    if kind.is_char_device() {
        return Ok(keys);
    }
    let text = std::fs::read_to_string(file).with_context(doing)?;
    let before = keys.len();
    // Some editors begin a file with a byte order mark.
    let text = text.trim_start_matches('\u{feff}');
    let lines = text.lines().map(str::trim);
    for (n, line) in lines
        .enumerate()
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
    {
        if line.contains(char::is_whitespace) {
            bail!(WrongSetting(format!(
                "--api-key-file {}: line {} has a space in it: a key has none, and a comment begins with #",
                file.display(),
                n + 1
            )));
        }
        keys.push(line.to_owned());
    }
    if keys.len() == before {
        bail!(WrongSetting(format!(
            "--api-key-file {} holds no key: write one on each line (/dev/null says that none is wanted)",
            file.display()
        )));
    }
    Ok(keys)
}

/// The token of `--backend-token`, or of the file.
pub fn token(options: &TokenOptions) -> Result<Option<Token>> {
    let TokenOptions {
        backend_token,
        backend_token_file,
    } = options;
    let (name, text) = match (backend_token, backend_token_file) {
        (None, None) => return Ok(None),
        (Some(token), None) => ("--backend-token".to_owned(), token.clone()),
        (_, Some(file)) => {
            let name = format!("--backend-token-file {}", file.display());
            let text = std::fs::read_to_string(file).with_context(|| name.clone())?;
            (name, text)
        }
    };
    match Token::new(&text) {
        Ok(token) => Ok(Some(token)),
        Err(error) => bail!(WrongSetting(format!("{name} {error}"))),
    }
}

/// How a router knows its backends, and shows who it is. `None`: all of them speak plainly.
pub fn backend_tls(options: &BackendSslOptions, backends: &[String]) -> Result<Option<ClientTls>> {
    let BackendSslOptions {
        backend_ssl_ca_certs: roots,
        backend_ssl_certfile: certificate,
        backend_ssl_keyfile: key,
    } = options;
    let is_given = roots.is_some() || certificate.is_some() || key.is_some();
    let Some(url) = backends.iter().find(|url| url.starts_with("https://")) else {
        if is_given {
            bail!(WrongSetting(
                "--backend-ssl-ca-certs, --backend-ssl-certfile and --backend-ssl-keyfile are for backends at https://, and no \
                 --backend is"
                    .to_owned()
            ));
        }
        return Ok(None);
    };
    let Some(roots) = roots else {
        bail!(WrongSetting(format!(
            "--backend {url} wants --backend-ssl-ca-certs: a file with the certificates of those who sign backends'"
        )));
    };
    if certificate.is_none() && key.is_some() {
        bail!(WrongSetting(
            "--backend-ssl-keyfile wants --backend-ssl-certfile".to_owned()
        ));
    }
    // What is no certificate or no key is told now, not with each attempt to reach a backend.
    let wrong = |error: anyhow::Error| WrongSetting(format!("{error:#}"));
    let read = |file: &Path| std::fs::read(file).with_context(|| file.display().to_string());
    tls::certificates(roots)
        .context("--backend-ssl-ca-certs")
        .map_err(wrong)?;
    let roots = read(roots)?;
    let own = match certificate {
        None => None,
        Some(certificate) => {
            let key = key.as_ref().unwrap_or(certificate);
            tls::certificates(certificate)
                .context("--backend-ssl-certfile")
                .map_err(wrong)?;
            tls::private_key(key)
                .context("--backend-ssl-keyfile")
                .map_err(wrong)?;
            Some((read(certificate)?, read(key)?))
        }
    };
    let own = own
        .as_ref()
        .map(|(certificate, key)| (&certificate[..], &key[..]));
    Ok(Some(ClientTls::new(&roots, own)))
}

/// A backend obeys whoever reaches it: other machines only with a token, or with a certificate.
pub fn check_backend(listen: SocketAddr, knows_routers: bool) -> Result<()> {
    if knows_routers || listen.ip().is_loopback() {
        return Ok(());
    }
    bail!(WrongSetting(format!(
        "--listen {listen} lets other machines command this backend, and there is no token: give it and its routers the \
         same --backend-token-file (or the variable TANDEM_BACKEND_TOKEN), let it ask for their certificates (--ssl-cert-reqs 2), or \
         listen at 127.0.0.1"
    )))
}

/// Refuses to serve other machines without a key where an operator said that they come in (`published`); inside a
/// container `host` says nothing about that. Elsewhere it is said aloud.
pub fn check(published: Option<&str>, host: IpAddr, has_keys: bool) -> Result<()> {
    let reached = published.map(published_address).transpose()?;
    if has_keys {
        return Ok(());
    }
    match (published, reached) {
        (Some(published), Some(address)) if !address.is_loopback() => bail!(WrongSetting(format!(
            "--published {published} lets other machines in, and there is no key: name a file with keys \
             (--api-key-file; of docker/compose.yaml: API_KEYS), or publish at 127.0.0.1 (of docker/compose.yaml: PUBLISH)"
        ))),
        (None, None) if !host.is_loopback() => {
            warn!(%host, "whoever reaches this address is served: there is no --api-key or --api-key-file");
            Ok(())
        }
        _ => Ok(()),
    }
}

/// As Docker reads it: `127.0.0.1:8000`, `[::1]:8000`, or `8000`, which is every network.
fn published_address(published: &str) -> Result<IpAddr> {
    let (host, port) = published.rsplit_once(':').unwrap_or(("0.0.0.0", published));
    let is_port = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
    let host = host.trim_start_matches('[').trim_end_matches(']').parse();
    match host {
        Ok(host) if is_port => Ok(host),
        _ => bail!(WrongSetting(format!(
            "--published {published} is not an address and a port, such as 127.0.0.1:8000"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_from_a_file_and_an_empty_one_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (text, expected) in [
            ("one\n", Some(vec!["flag", "one"])),
            ("one\r\n\n  two \n", Some(vec!["flag", "one", "two"])),
            ("", None),
            (" \n\n", None),
        ] {
            std::fs::write(file.path(), text).unwrap();
            let found = keys(&["flag".to_owned()], Some(file.path()));
            match expected {
                Some(expected) => assert_eq!(found.unwrap(), expected, "{text:?}"),
                None => assert!(
                    found.unwrap_err().to_string().contains("holds no key"),
                    "{text:?}"
                ),
            }
        }
        assert!(keys(&[], Some(Path::new("/dev/null"))).unwrap().is_empty());
        let missing = format!("{:#}", keys(&[], Some(Path::new("/no/such"))).unwrap_err());
        assert!(missing.contains("--api-key-file /no/such"), "{missing}");
    }

    #[test]
    fn a_backend_beyond_this_machine_needs_a_token() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "0123456789abcdef\n").unwrap();
        let path = || Some(file.path().to_owned());
        let text = |text: &str| Some(text.to_owned());
        for (backend_token, backend_token_file, expected) in [
            (None, None, Ok(false)),
            (text("0123456789abcdef"), None, Ok(true)),
            (None, path(), Ok(true)),
            (text("short"), path(), Ok(true)),
            (text(""), None, Err("--backend-token has 0 characters")),
            (text("short"), None, Err("--backend-token has 5 characters")),
            (
                None,
                Some("/dev/null".into()),
                Err("--backend-token-file /dev/null has 0"),
            ),
            (
                None,
                Some("/no/such".into()),
                Err("--backend-token-file /no/such"),
            ),
        ] {
            let options = TokenOptions {
                backend_token,
                backend_token_file,
            };
            match (token(&options), expected) {
                (Ok(token), Ok(expected)) => assert_eq!(token.is_some(), expected),
                (Err(error), Err(text)) => assert!(error.to_string().contains(text), "{error}"),
                (found, expected) => panic!("{:?}, expected {expected:?}", found.map(|_| ())),
            }
        }
        for (listen, has_token, fits) in [
            ("127.0.0.1:8001", false, true),
            ("[::1]:8001", false, true),
            ("0.0.0.0:8001", false, false),
            ("10.0.0.7:8001", false, false),
            ("0.0.0.0:8001", true, true),
        ] {
            let checked = check_backend(listen.parse().unwrap(), has_token);
            assert_eq!(checked.is_ok(), fits, "{listen}");
        }
    }

    #[test]
    fn others_come_in_with_a_key_alone() {
        let everywhere = IpAddr::from([0, 0, 0, 0]);
        for (published, has_keys, expected) in [
            (Some("127.0.0.1:8000"), false, None),
            (Some("[::1]:8000"), false, None),
            (Some("0.0.0.0:8000"), false, Some("lets other machines in")),
            (Some("8000"), false, Some("lets other machines in")),
            (Some("10.0.0.7:80"), false, Some("lets other machines in")),
            (Some("[::]:8000"), false, Some("lets other machines in")),
            (Some("0.0.0.0:8000"), true, None),
            (Some("localhost"), true, Some("is not an address")),
            (Some("somewhere:80"), false, Some("is not an address")),
            (None, false, None),
        ] {
            let found = check(published, everywhere, has_keys).map_err(|error| error.to_string());
            match expected {
                None => assert_eq!(found, Ok(()), "{published:?}"),
                Some(expected) => assert!(found.unwrap_err().contains(expected), "{published:?}"),
            }
        }
    }
}
