//! A replica on another machine: [`connect`] makes a `ReplicaHandle` of a URL, [`Service`] serves one over gRPC. Both
//! carry tandem-core's messages and change none. Not here: which replica answers (router), engines, files' meaning.
//!
//! One session is one stream of commands and one of events. Events of all requests that are ready together travel in
//! one message, and each request has its own credit, so a client that does not read parks its own sequence only.

mod client;
#[doc(hidden)] // for tests/fuzz
pub mod codec;
mod files;
mod learn;
mod service;
#[cfg(test)]
mod tests;
mod tls;
mod token;
#[doc(hidden)] // for tests/fuzz
pub mod weighed;

pub use client::{ConnectError, Remote, connect};
pub use files::ModelFiles;
pub use service::{Acceptor, Hooks, Service, serve};
pub use tls::ClientTls;
pub use token::{BadToken, Token};

use std::time::Duration;

/// What protox and prost made of proto/replica.proto.
#[doc(hidden)] // for tests/fuzz
pub mod wire {
    #![allow(clippy::all)]
    tonic::include_proto!("tandem.replica.v1");
}

/// Bytes of one message at most: a model's tokenizer files, or a prompt with its log-probabilities.
const MESSAGE_BYTES: usize = 64 << 20;
/// Of one command: a prompt's tokens, a grammar, biases.
const UP_BYTES: usize = 16 << 20;
/// Bytes that may be under way on a stream and on a connection. Fixed: the adaptive window costs pings of its own.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// A silent connection is asked whether it lives, and dropped when it does not answer.
const KEEP_ALIVE_PERIOD: Duration = Duration::from_secs(2);
const KEEP_ALIVE_PATIENCE: Duration = Duration::from_secs(5);
