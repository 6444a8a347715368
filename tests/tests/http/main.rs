//! Black-box tests: the real binary on a free port, spoken to over TCP. Modules mirror the API's paths. Not here:
//! anything that looks inside.

mod access;
mod adapters;
mod bad_input;
mod client;
mod eval;
mod fine_tuning;
mod fleet;
mod generate;
mod gguf;
mod inference;
mod lifecycle;
mod ranks;
mod readme;
mod routes;
mod server;
mod structured;
mod sweeps;
mod tools;
mod train;
