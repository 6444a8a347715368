//! The hub's routes: what a repository holds, what is known of a file, its bytes from anywhere on. Not here: which files,
//! where they go.

use std::time::Duration;

use reqwest::header::{ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, LOCATION, RANGE};
use reqwest::redirect::Policy;
use reqwest::{RequestBuilder, Response, StatusCode};
use serde::Deserialize;

use super::error::Refusal;
use super::{HubError, Kind, Place, RepoName};

const CONNECT: Duration = Duration::from_secs(10);
/// Without a byte.
const SILENCE: Duration = Duration::from_secs(30);
const MAX_REDIRECTS: usize = 5;

pub struct Client<'a> {
    place: &'a Place,
    kind: Kind,
    name: &'a RepoName,
    http: reqwest::Client,
    /// Does not follow: what is known of a large file stands in the hub's redirect to where it lies.
    straight: reqwest::Client,
}

pub struct Listing {
    pub commit: String,
    pub files: Vec<String>,
}

/// What the hub says of a file.
#[derive(Debug)]
pub struct Facts {
    /// The blob's name: the SHA-256 of a large file, git's own hash of a small one.
    pub etag: String,
    pub size: Option<u64>,
}

impl Facts {
    pub fn sha256(&self) -> Option<&str> {
        let is_hex = self.etag.len() == 64 && self.etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hex.then_some(&*self.etag)
    }
}

/// The rest of a file.
pub struct Piece {
    pub body: Response,
    /// Where it begins: 0 where the server sends the whole, whatever was asked.
    pub start: u64,
}

impl<'a> Client<'a> {
    pub fn new(place: &'a Place, kind: Kind, name: &'a RepoName) -> Result<Client<'a>, HubError> {
        tandem_store::use_ring();
        let build = |policy| {
            let agent = concat!("tandem/", env!("CARGO_PKG_VERSION"));
            let builder = reqwest::Client::builder()
                .user_agent(agent)
                .connect_timeout(CONNECT)
                .read_timeout(SILENCE)
                .redirect(policy);
            builder
                .build()
                .map_err(|error| HubError::Client(error.to_string()))
        };
        Ok(Client {
            place,
            kind,
            name,
            http: build(Policy::limited(MAX_REDIRECTS))?,
            straight: build(Policy::none())?,
        })
    }

    pub fn name(&self) -> &str {
        self.name.as_str()
    }

    /// What a revision holds, and which commit it is now.
    pub async fn listing(&self, revision: &str) -> Result<Listing, HubError> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
            #[serde(default)]
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let url = format!(
            "{}/api/{}/{}/revision/{}",
            self.place.endpoint,
            self.kind.plural(),
            self.name(),
            escaped(revision)
        );
        let response = self.send(self.http.get(&url), revision).await?;
        let bytes = response.bytes().await.map_err(|error| self.away(&error))?;
        let strange = |why: String| HubError::Strange {
            url: url.clone(),
            why,
        };
        let Info { sha, siblings } =
            serde_json::from_slice(&bytes).map_err(|error| strange(error.to_string()))?;
        let files: Vec<String> = siblings.into_iter().map(|file| file.rfilename).collect();
        // They become paths.
        let is_path =
            |name: &str| !name.is_empty() && name.split('/').all(|part| !part.is_empty() && part != "..");
        if !is_path(&sha) || sha.contains('/') {
            return Err(strange(format!("{sha:?} is no commit")));
        }
        match files.iter().find(|file| !is_path(file)) {
            Some(file) => Err(strange(format!("{file:?} is no file name"))),
            None => Ok(Listing { commit: sha, files }),
        }
    }

    pub async fn facts(&self, commit: &str, file: &str) -> Result<Facts, HubError> {
        let mut url = self.url(commit, file);
        for _ in 0..MAX_REDIRECTS {
            let request = self.straight.head(&url).header(ACCEPT_ENCODING, "identity");
            let response = self.send(request, commit).await?;
            let headers = response.headers();
            // A repository that was renamed: the same hub, another path.
            if response.status().is_redirection()
                && let Some(path) =
                    text(headers, LOCATION.as_str()).filter(|to| to.starts_with('/') && !to.starts_with("//"))
            {
                let origin = response.url().origin().ascii_serialization();
                url = format!("{origin}{path}");
                continue;
            }
            let strange = |why: &str| HubError::Strange {
                url: url.clone(),
                why: why.to_owned(),
            };
            let etag = text(headers, "x-linked-etag").or_else(|| text(headers, ETAG.as_str()));
            let etag = etag.ok_or_else(|| strange("the answer has no ETag"))?;
            let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
            if etag.is_empty() || etag.contains(['/', '\\']) || etag.starts_with('.') {
                return Err(strange("its ETag cannot name a file"));
            }
            let is_here = response.status().is_success();
            let own = || text(headers, CONTENT_LENGTH.as_str()).filter(|_| is_here);
            let size = text(headers, "x-linked-size")
                .or_else(own)
                .and_then(|size| size.parse().ok());
            return Ok(Facts { etag, size });
        }
        Err(HubError::Strange {
            url,
            why: "it leads from one place to the next".to_owned(),
        })
    }

    /// A file's bytes from `start` on.
    pub async fn open(&self, commit: &str, file: &str, start: u64) -> Result<Piece, HubError> {
        let request = self
            .http
            .get(self.url(commit, file))
            .header(ACCEPT_ENCODING, "identity");
        let request = match start {
            0 => request,
            start => request.header(RANGE, format!("bytes={start}-")),
        };
        let body = self.send(request, commit).await?;
        // `bytes 5-9/10`
        let range = text(body.headers(), CONTENT_RANGE.as_str()).and_then(|range| {
            let range = range.trim_start_matches("bytes ");
            range.split('-').next()?.parse().ok()
        });
        let start = match body.status() {
            StatusCode::PARTIAL_CONTENT if range == Some(start) => start,
            StatusCode::PARTIAL_CONTENT => {
                return Err(HubError::Strange {
                    url: self.url(commit, file),
                    why: format!("bytes from {start} on were asked, it sends from {range:?} on"),
                });
            }
            _ => 0,
        };
        Ok(Piece { body, start })
    }

    pub async fn next(
        &self,
        body: &mut Response,
    ) -> Result<Option<impl std::ops::Deref<Target = [u8]> + use<>>, HubError> {
        body.chunk().await.map_err(|error| self.away(&error))
    }

    fn url(&self, commit: &str, file: &str) -> String {
        let path: Vec<String> = file.split('/').map(escaped).collect();
        let kind = match self.kind {
            Kind::Model => "",
            Kind::Dataset => "datasets/",
        };
        format!(
            "{}/{kind}{}/resolve/{}/{}",
            self.place.endpoint,
            self.name(),
            escaped(commit),
            path.join("/")
        )
    }

    async fn send(&self, request: RequestBuilder, revision: &str) -> Result<Response, HubError> {
        let request = match &self.place.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        };
        let response = request.send().await.map_err(|error| self.away(&error))?;
        let status = response.status();
        if status.is_success() || status.is_redirection() {
            return Ok(response);
        }
        let header = |name: &str| text(response.headers(), name).unwrap_or_default().to_owned();
        let (code, said) = (header("x-error-code"), header("x-error-message"));
        let url = response.url().clone();
        if status.is_server_error()
            || [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT].contains(&status)
        {
            return Err(HubError::Away {
                endpoint: self.place.endpoint.clone(),
                name: self.name().to_owned(),
                why: format!("{} answers {status} {said}", url.path())
                    .trim_end()
                    .to_owned(),
            });
        }
        Err(Refusal {
            endpoint: &self.place.endpoint,
            kind: self.kind,
            name: self.name(),
            revision,
            has_token: self.place.token.is_some(),
            status: status.as_u16(),
            code: &code,
            said: &said,
            path: url.path(),
        }
        .into_error())
    }

    fn away(&self, error: &reqwest::Error) -> HubError {
        // reqwest's own text names the URL; the reason lies below it.
        let mut why = error.to_string();
        let mut below: Option<&dyn std::error::Error> = std::error::Error::source(error);
        while let Some(source) = below {
            why = source.to_string();
            below = source.source();
        }
        HubError::Away {
            endpoint: self.place.endpoint.clone(),
            name: self.name().to_owned(),
            why,
        }
    }
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// One segment of a path, or a revision, which may have slashes.
fn escaped(text: impl AsRef<str>) -> String {
    let mut escaped = String::new();
    for byte in text.as_ref().bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                escaped.push(char::from(byte))
            }
            byte => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}
