//! What the benchmark programs share: percentiles, a machine line, a device's ceilings, a small HTTP client. Not here: what is measured.

pub mod device;
pub mod http;
pub mod machine;
pub mod percentile;
