//! The wire: what clients send and get, one file per resource, as OpenAI's API (and vLLM's extensions) spell it.
//! In requests an optional field that is null is absent. What has no field here is the server's to judge. Not here:
//! checks of values, status codes, what anything means.

pub mod adapters;
pub mod batches;
pub mod chat;
pub mod common;
pub mod completions;
pub mod embeddings;
pub mod error;
pub mod files;
pub mod fine_tunes;
pub mod fine_tuning;
pub mod generate;
pub mod messages;
pub mod models;
pub mod responses;
pub mod scores;
pub mod server;
pub mod structured;
pub mod tinker;
pub mod tokenize;
pub mod tools;
pub mod uploads;
pub mod usage;

/// The generated document, committed so that a change of the contract shows in review.
pub const COMMITTED: &str = include_str!("../openapi.json");
