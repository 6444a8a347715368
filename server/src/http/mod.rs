//! The routes, one file per resource: take the request apart, ask the router, put the answer together. Not here:
//! checks of values (convert/), status codes (error.rs).

pub mod adapters;
pub mod batches;
pub mod chat;
pub mod completions;
pub mod embeddings;
pub mod feed;
pub mod files;
pub mod fine_tunes;
pub mod fine_tuning;
pub mod generate;
pub mod merge;
pub mod messages;
pub mod models;
pub mod pages;
pub mod parts;
pub mod responses;
mod responses_stream;
pub mod scores;
pub mod server;
pub mod stream;
pub mod tinker;
pub mod tokenize;
pub mod uploads;

/// Finishes what was begun also when the client leaves, and axum drops the handler: between a commit and what memory
/// knows of it there must be no such end.
async fn to_the_end<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(work).await {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}
