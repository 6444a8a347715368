//! The judges of the numbers: transformers' and peft's own results (scripts/fixtures makes them), and what must be equal
//! to what. `cargo test --release -p tandem-tests --test numerics -- --nocapture` prints how close everything is.

mod demo;
mod device;
mod equivalence;
mod families;
mod fixture;
mod golden;
mod head;
mod joint;
mod learners;
mod mates;
mod preferences;
mod quantised;
mod ranks;
mod resume;
mod run;
mod training;
mod windows;
