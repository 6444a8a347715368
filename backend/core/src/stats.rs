//! Numbers an engine publishes after each turn; counters only grow.

use serde::{Deserialize, Serialize};

use crate::id::AdapterDigest;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    pub running: u32,
    pub waiting: u32,
    pub kv_blocks_total: u32,
    /// Held by sequences (cached but free blocks are not).
    pub kv_blocks_used: u32,
    pub steps: u64,
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    pub prefix_queried_tokens: u64,
    pub prefix_hit_tokens: u64,
    pub preemptions: u64,
    pub failed_steps: u64,
    pub step_seconds: f64,
    pub resident_adapters: Vec<AdapterDigest>,
    pub adapter_bytes: u64,
    pub adapter_loads: u64,
    pub trained_tokens: u64,
    pub train_steps: u64,
    pub train_seconds: f64,
    pub job_running: bool,
}
