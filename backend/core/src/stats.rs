//! Numbers an engine publishes after each turn; counters only grow. Several replicas' numbers add up.

use serde::{Deserialize, Serialize};

use crate::id::AdapterDigest;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    pub running: u32,
    pub waiting: u32,
    /// Of both: their clients do not read, and nothing is computed for them.
    #[serde(default)]
    pub parked: u32,
    pub kv_blocks_total: u32,
    /// Held by sequences (cached but free blocks are not).
    pub kv_blocks_used: u32,
    pub steps: u64,
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    pub prefix_queried_tokens: u64,
    pub prefix_hit_tokens: u64,
    pub preemptions: u64,
    /// Tokens that were guessed, and those of them that were right.
    #[serde(default)]
    pub guessed_tokens: u64,
    #[serde(default)]
    pub accepted_tokens: u64,
    pub failed_steps: u64,
    pub step_seconds: f64,
    pub resident_adapters: Vec<AdapterDigest>,
    pub adapter_bytes: u64,
    pub adapter_loads: u64,
    pub trained_tokens: u64,
    pub train_steps: u64,
    pub train_seconds: f64,
    /// Passes that slices of several jobs had together, and these slices.
    #[serde(default)]
    pub shared_passes: u64,
    #[serde(default)]
    pub shared_slices: u64,
    /// Requests with a grammar.
    #[serde(default)]
    pub grammar_requests: u64,
    /// Grammars compiled, and the seconds that took, beside the engine.
    #[serde(default)]
    pub grammar_compiles: u64,
    #[serde(default)]
    pub grammar_compile_seconds: f64,
    /// Masks of tokens, the seconds that took beside the engine, and those that the engine waited for them.
    #[serde(default)]
    pub grammar_masks: u64,
    #[serde(default)]
    pub grammar_mask_seconds: f64,
    #[serde(default)]
    pub grammar_wait_seconds: f64,
    /// Jobs that train.
    #[serde(default)]
    pub training_jobs: u32,
    /// What runs ends; nothing new is taken.
    #[serde(default)]
    pub draining: bool,
}

impl Stats {
    /// Add another replica's numbers: sums, and every adapter that is resident somewhere.
    pub fn add(&mut self, other: &Stats) {
        let Stats {
            running,
            waiting,
            parked,
            kv_blocks_total,
            kv_blocks_used,
            steps: _,
            prompt_tokens: _,
            generated_tokens: _,
            prefix_queried_tokens: _,
            prefix_hit_tokens: _,
            preemptions: _,
            guessed_tokens: _,
            accepted_tokens: _,
            failed_steps: _,
            step_seconds: _,
            resident_adapters,
            adapter_bytes,
            adapter_loads: _,
            trained_tokens: _,
            train_steps: _,
            train_seconds: _,
            shared_passes: _,
            shared_slices: _,
            grammar_requests: _,
            grammar_compiles: _,
            grammar_compile_seconds: _,
            grammar_masks: _,
            grammar_mask_seconds: _,
            grammar_wait_seconds: _,
            training_jobs,
            draining: _,
        } = other;
        self.add_counters(other);
        self.running += running;
        self.waiting += waiting;
        self.parked += parked;
        self.kv_blocks_total += kv_blocks_total;
        self.kv_blocks_used += kv_blocks_used;
        self.adapter_bytes += adapter_bytes;
        self.training_jobs += training_jobs;
        for digest in resident_adapters {
            if !self.resident_adapters.contains(digest) {
                self.resident_adapters.push(*digest);
            }
        }
    }

    /// Add what another replica counted: all that stays true of it once it is gone.
    pub fn add_counters(&mut self, other: &Stats) {
        self.steps += other.steps;
        self.prompt_tokens += other.prompt_tokens;
        self.generated_tokens += other.generated_tokens;
        self.prefix_queried_tokens += other.prefix_queried_tokens;
        self.prefix_hit_tokens += other.prefix_hit_tokens;
        self.preemptions += other.preemptions;
        self.guessed_tokens += other.guessed_tokens;
        self.accepted_tokens += other.accepted_tokens;
        self.failed_steps += other.failed_steps;
        self.step_seconds += other.step_seconds;
        self.adapter_loads += other.adapter_loads;
        self.trained_tokens += other.trained_tokens;
        self.train_steps += other.train_steps;
        self.train_seconds += other.train_seconds;
        self.shared_passes += other.shared_passes;
        self.shared_slices += other.shared_slices;
        self.grammar_requests += other.grammar_requests;
        self.grammar_compiles += other.grammar_compiles;
        self.grammar_compile_seconds += other.grammar_compile_seconds;
        self.grammar_masks += other.grammar_masks;
        self.grammar_mask_seconds += other.grammar_mask_seconds;
        self.grammar_wait_seconds += other.grammar_wait_seconds;
    }
}
