//! Token ids <-> text: the tokenizer, the chat template, streaming detokenisation, stop strings, training rows.
//! Not here: HTTP shapes, the engine (it sees ids only), where files come from.

mod bytes;
pub mod chat;
pub mod dataset;
pub mod error;
#[cfg(test)]
mod fixture;
mod label;
mod python;
pub mod reasoning;
pub mod stop;
pub mod stream;
pub mod tokenizer;
pub mod tools;

pub use chat::{ChatTemplate, Content, Ending, Message};
pub use error::TextError;
pub use tokenizer::{Skip, SpecialTokens, Tokenizer};
