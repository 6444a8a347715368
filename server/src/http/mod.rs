//! The routes, one file per resource: take the request apart, ask the router, put the answer together. Not here:
//! checks of values (convert/), status codes (error.rs).

pub mod adapters;
pub mod chat;
pub mod completions;
pub mod feed;
pub mod files;
pub mod fine_tunes;
pub mod fine_tuning;
pub mod models;
pub mod pages;
pub mod server;
pub mod stream;
pub mod tokenize;
