//! Tinker's bodies to calls, and outcomes to its answers. What is wrong with a call that has a number is a text: it fails
//! in its turn.

mod answers;
mod arrays;
mod calls;

pub use answers::{answer, checkpoint, training_runs};
pub use calls::{MAX_SAMPLES, ask, batch, metadata, new_model, path, save, save_for_sampler, step};
