//! What router and backend both know and nobody else: the router shows it with every call, the backend refuses who does
//! not. Not here: where it is read from (server).

use sha2::{Digest as _, Sha256};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Request, Status};

/// Fewer could be guessed.
const MIN_CHARS: usize = 16;
const HEADER: &str = "authorization";

/// Shown by nothing: there is no Debug, and errors do not repeat it.
#[derive(Clone)]
pub struct Token(MetadataValue<Ascii>);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadToken {
    #[error("has {0} characters, at least {MIN_CHARS} are wanted: `openssl rand -hex 32` makes a good one")]
    Short(usize),
    #[error("holds a character that is not printable ASCII")]
    Unprintable,
}

impl Token {
    /// Space around it goes, and the newline with which files and secrets end.
    pub fn new(text: &str) -> Result<Token, BadToken> {
        let text = text.trim();
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(BadToken::Unprintable);
        }
        if text.len() < MIN_CHARS {
            return Err(BadToken::Short(text.len()));
        }
        let value = format!("Bearer {text}").parse();
        value.map(Token).map_err(|_| BadToken::Unprintable)
    }

    /// On a call of the router's.
    pub(crate) fn show<T>(&self, request: &mut Request<T>) {
        request.metadata_mut().insert(HEADER, self.0.clone());
    }

    /// Of a call to a backend.
    pub(crate) fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        // Digests of what was given and of the token differ everywhere at once: how long the comparison takes says nothing
        // of how much was right.
        let digest = |value: &MetadataValue<Ascii>| Sha256::digest(value.as_encoded_bytes());
        match request.metadata().get(HEADER) {
            Some(given) if digest(given) == digest(&self.0) => Ok(()),
            Some(_) => Err(Status::unauthenticated(
                "the token is not the backend's: router and backend need the same --backend-token",
            )),
            None => Err(Status::unauthenticated(
                "the backend wants a token: give the router the same --backend-token",
            )),
        }
    }
}
