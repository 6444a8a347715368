//! Prometheus metrics: vLLM's names where the meaning is the same, `tandem:` for the rest. What the engine counts is
//! read from its published numbers when Prometheus asks; what only the edge sees (latencies, ends) is counted here. What
//! the router knows of each replica is in `fleet`.

mod fleet;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use prometheus::{
    Counter, Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry, TextEncoder,
};
use tandem_core::stats::Stats;
use tandem_router::Router;
use tandem_router::api::{Finish, Piece, What};

use crate::gpus::Gpus;

/// Finer than vLLM's below 10 ms: small models on a CPU live there.
const TOKEN_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
];
const FIRST_TOKEN_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0,
];
const REQUEST_SECONDS: &[f64] = &[
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
];

pub struct Metrics {
    registry: Registry,
    /// From the engine: a number of `Stats` and the counter that follows it.
    counters: Vec<(Number<u64>, IntCounter)>,
    seconds: Vec<(Number<f64>, Counter)>,
    gauges: Vec<(Number<f64>, Gauge)>,
    lora_info: GaugeVec,
    max_loras: u32,
    uploads: IntCounter,
    unknown_fields: IntCounter,
    open_calls: IntGauge,
    ends: IntCounterVec,
    first_token_seconds: Histogram,
    token_seconds: Histogram,
    request_seconds: Histogram,
    /// Calls to each adapter now.
    adapters: Mutex<BTreeMap<String, AdapterCalls>>,
}

#[derive(Default)]
struct AdapterCalls {
    waiting: u32,
    running: u32,
}

/// A number the engine publishes.
type Number<T> = fn(&Stats) -> T;
/// Name, help, number.
type Of<T> = (&'static str, &'static str, Number<T>);

const COUNTERS: [Of<u64>; 16] = [
    (
        "vllm:prompt_tokens_total",
        "Prompt tokens computed or found cached",
        |s| s.prompt_tokens,
    ),
    ("vllm:generation_tokens_total", "Tokens generated", |s| {
        s.generated_tokens
    }),
    (
        "vllm:prefix_cache_queries_total",
        "Prompt tokens looked up in the prefix cache",
        |s| s.prefix_queried_tokens,
    ),
    (
        "vllm:prefix_cache_hits_total",
        "Prompt tokens found in the prefix cache",
        |s| s.prefix_hit_tokens,
    ),
    (
        "vllm:num_preemptions_total",
        "Sequences that lost their cache blocks and started over",
        |s| s.preemptions,
    ),
    (
        "vllm:spec_decode_num_draft_tokens_total",
        "Tokens guessed by --speculative-config",
        |s| s.guessed_tokens,
    ),
    (
        "vllm:spec_decode_num_accepted_tokens_total",
        "Of them, those that were right",
        |s| s.accepted_tokens,
    ),
    ("tandem:engine_steps_total", "Steps of the engine", |s| s.steps),
    (
        "tandem:engine_failed_steps_total",
        "Steps that failed in the tensor library",
        |s| s.failed_steps,
    ),
    ("tandem:train_tokens_total", "Tokens trained on", |s| {
        s.trained_tokens
    }),
    ("tandem:train_steps_total", "Optimizer steps", |s| s.train_steps),
    (
        "tandem:train_shared_passes_total",
        "Passes through the model that slices of several jobs or training clients had together",
        |s| s.shared_passes,
    ),
    (
        "tandem:train_shared_slices_total",
        "Slices of jobs and training clients that shared a pass",
        |s| s.shared_slices,
    ),
    (
        "tandem:grammar_requests_total",
        "Sequences that are bound to a grammar",
        |s| s.grammar_requests,
    ),
    ("tandem:grammar_compiles_total", "Grammars compiled", |s| {
        s.grammar_compiles
    }),
    ("tandem:grammar_masks_total", "Masks of tokens made", |s| {
        s.grammar_masks
    }),
];

const SECONDS: [Of<f64>; 5] = [
    (
        "tandem:engine_step_seconds_total",
        "Time that the engine's steps took",
        |s| s.step_seconds,
    ),
    (
        "tandem:train_seconds_total",
        "Time that training took on the engine's thread",
        |s| s.train_seconds,
    ),
    (
        "tandem:grammar_compile_seconds_total",
        "Time that compiling grammars took, beside the engine",
        |s| s.grammar_compile_seconds,
    ),
    (
        "tandem:grammar_mask_seconds_total",
        "Time that masks took, beside the engine",
        |s| s.grammar_mask_seconds,
    ),
    (
        "tandem:grammar_wait_seconds_total",
        "Time that the engine waited for masks",
        |s| s.grammar_wait_seconds,
    ),
];

const GAUGES: [Of<f64>; 6] = [
    ("vllm:num_requests_running", "Sequences that run", |s| {
        f64::from(s.running)
    }),
    ("vllm:num_requests_waiting", "Sequences that wait", |s| {
        f64::from(s.waiting)
    }),
    (
        "vllm:kv_cache_usage_perc",
        "Part of the KV cache that sequences hold; 1 is all",
        |s| f64::from(s.kv_blocks_used) / f64::from(s.kv_blocks_total.max(1)),
    ),
    ("tandem:job_running", "1 while a job trains", |s| {
        f64::from(u8::from(s.training_jobs > 0))
    }),
    ("tandem:adapters_resident", "Adapters in memory", |s| {
        s.resident_adapters.len() as f64
    }),
    ("tandem:adapter_bytes", "Memory of the resident adapters", |s| {
        s.adapter_bytes as f64
    }),
];

impl Metrics {
    /// `model`: the label `model_name` of every series.
    pub fn new(model: &str, max_loras: u32) -> Result<Metrics, prometheus::Error> {
        let registry =
            Registry::new_custom(None, Some([("model_name".to_owned(), model.to_owned())].into()))?;
        registry.register(Box::new(Gpus::new("/".into(), tandem_backend::nvidia::gpus)?))?;
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok::<_, prometheus::Error>(histogram)
        };
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = Gauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let counters = COUNTERS
            .iter()
            .map(|&(name, help, of)| Ok((of, counter(name, help)?)));
        let counters = counters.collect::<Result<_, prometheus::Error>>()?;
        let seconds = SECONDS.iter().map(|&(name, help, of)| {
            let counter = Counter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok((of, counter))
        });
        let seconds = seconds.collect::<Result<_, prometheus::Error>>()?;
        let gauges = GAUGES
            .iter()
            .map(|&(name, help, of)| Ok((of, gauge(name, help)?)));
        let gauges = gauges.collect::<Result<_, prometheus::Error>>()?;
        let lora_info = GaugeVec::new(
            Opts::new(
                "vllm:lora_requests_info",
                "Adapters with calls; the value is the time of this look",
            ),
            &["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )?;
        registry.register(Box::new(lora_info.clone()))?;
        let ends = IntCounterVec::new(
            Opts::new("vllm:request_success_total", "Choices that ended, by how"),
            &["finished_reason"],
        )?;
        registry.register(Box::new(ends.clone()))?;
        // A series that exists from the start shows its first event to rate().
        ["stop", "length", "abort", "error"]
            .iter()
            .for_each(|reason| drop(ends.with_label_values(&[reason])));
        let open_calls = IntGauge::new("tandem:open_calls", "Calls whose answer is not complete")?;
        registry.register(Box::new(open_calls.clone()))?;
        let uploads = counter("tandem:uploaded_bytes_total", "Bytes of uploaded files")?;
        let unknown_fields = counter(
            "tandem:unknown_fields_total",
            "Fields of requests that were ignored because nothing is known of them; the log names each once",
        )?;
        let first_token_seconds = histogram(
            "vllm:time_to_first_token_seconds",
            "From admission to the first token",
            FIRST_TOKEN_SECONDS,
        )?;
        let token_seconds = histogram(
            "vllm:inter_token_latency_seconds",
            "Between two tokens of a choice",
            TOKEN_SECONDS,
        )?;
        let request_seconds = histogram(
            "vllm:e2e_request_latency_seconds",
            "From admission to the end of a choice",
            REQUEST_SECONDS,
        )?;
        Ok(Metrics {
            counters,
            seconds,
            gauges,
            lora_info,
            max_loras,
            uploads,
            unknown_fields,
            open_calls,
            ends,
            first_token_seconds,
            token_seconds,
            request_seconds,
            adapters: Mutex::default(),
            registry,
        })
    }

    pub fn text(&self, stats: &Stats) -> String {
        for (of, counter) in &self.counters {
            // The engine's numbers only grow; the counter follows.
            counter.inc_by(of(stats).saturating_sub(counter.get()));
        }
        for (of, counter) in &self.seconds {
            counter.inc_by((of(stats) - counter.get()).max(0.0));
        }
        for (of, gauge) in &self.gauges {
            gauge.set(of(stats));
        }
        self.look_at_adapters();
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .expect("the metrics are well-formed");
        String::from_utf8(text).expect("the text format is UTF-8")
    }

    /// With what the router measures itself, and each replica's numbers.
    pub fn text_of(&self, router: &Router) -> String {
        let mut text = self.text(&router.stats());
        let model = &router.config().served_model_name;
        fleet::write(&mut text, model, &router.admissions(), &router.fleet().reports());
        fleet::write_batches(&mut text, model, &router.batch_numbers());
        fleet::write_parts(&mut text, model, &router.away());
        text
    }

    fn look_at_adapters(&self) {
        let adapters = self
            .adapters
            .lock()
            .expect("nothing panics while it holds this lock");
        let names = |pick: fn(&AdapterCalls) -> u32| {
            let with_calls = adapters.iter().filter(|(_, calls)| pick(calls) > 0);
            with_calls
                .map(|(name, _)| name.as_str())
                .collect::<Vec<_>>()
                .join(",")
        };
        let (running, waiting) = (names(|calls| calls.running), names(|calls| calls.waiting));
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs_f64();
        self.lora_info.reset();
        self.lora_info
            .with_label_values(&[&self.max_loras.to_string(), &running, &waiting])
            .set(now);
    }

    pub fn unknown_fields(&self) -> IntCounter {
        self.unknown_fields.clone()
    }

    pub fn uploaded(&self, bytes: u64) {
        self.uploads.inc_by(bytes);
    }

    fn adapter(&self, name: &str, change: impl FnOnce(&mut AdapterCalls)) {
        let mut adapters = self
            .adapters
            .lock()
            .expect("nothing panics while it holds this lock");
        let calls = adapters.entry(name.to_owned()).or_default();
        change(calls);
        if calls.waiting == 0 && calls.running == 0 {
            adapters.remove(name);
        }
    }
}

/// Watches one call. Dropped before all choices have ended, it counts the rest as aborted.
pub struct Meter {
    metrics: Arc<Metrics>,
    adapter: Option<String>,
    admitted: Instant,
    /// Of each choice; `None` before its first token.
    last_token: Vec<Option<Instant>>,
    first_seen: bool,
    open: u32,
}

impl Meter {
    /// `adapter`: the name it was asked by, if it is not the base.
    pub fn new(metrics: Arc<Metrics>, adapter: Option<String>, n: u32) -> Meter {
        if let Some(name) = &adapter {
            metrics.adapter(name, |calls| calls.waiting += 1);
        }
        metrics.open_calls.inc();
        let last_token = vec![None; n as usize];
        Meter {
            metrics,
            adapter,
            admitted: Instant::now(),
            last_token,
            first_seen: false,
            open: n,
        }
    }

    pub fn see(&mut self, piece: &Piece) {
        let reason = match &piece.what {
            What::Text { tokens, .. } if !tokens.is_empty() => {
                return self.tokens(piece.choice, tokens.len());
            }
            What::Text { .. } | What::Prompt(_) | What::Pooled(_) => return,
            What::Finished {
                reason: Finish::Stop, ..
            } => "stop",
            What::Finished {
                reason: Finish::Calls,
                ..
            } => "tool_calls",
            What::Finished {
                reason: Finish::Length,
                ..
            } => "length",
            What::Failed(_) => "error",
        };
        self.metrics.ends.with_label_values(&[reason]).inc();
        self.metrics
            .request_seconds
            .observe(self.admitted.elapsed().as_secs_f64());
        self.open = self.open.saturating_sub(1);
    }

    fn tokens(&mut self, choice: u32, count: usize) {
        let now = Instant::now();
        if !self.first_seen {
            self.first_seen = true;
            self.metrics
                .first_token_seconds
                .observe((now - self.admitted).as_secs_f64());
            if let Some(name) = &self.adapter {
                self.metrics.adapter(name, |calls| {
                    calls.waiting -= 1;
                    calls.running += 1;
                });
            }
        }
        let Some(last) = self.last_token.get_mut(choice as usize) else {
            return;
        };
        if let Some(last) = last.replace(now) {
            // Tokens that arrived together shared the time since the one before.
            let each = (now - last).as_secs_f64() / count as f64;
            (0..count).for_each(|_| self.metrics.token_seconds.observe(each));
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.metrics.open_calls.dec();
        self.metrics
            .ends
            .with_label_values(&["abort"])
            .inc_by(u64::from(self.open));
        if let Some(name) = &self.adapter {
            let first_seen = self.first_seen;
            self.metrics.adapter(name, |calls| match first_seen {
                true => calls.running -= 1,
                false => calls.waiting -= 1,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use tandem_core::message::Guessed;

    use super::*;

    #[test]
    fn numbers_appear_under_vllm_names() {
        let metrics = Arc::new(Metrics::new("base", 4).unwrap());
        let stats = Stats {
            generated_tokens: 7,
            running: 2,
            ..Stats::default()
        };
        metrics.text(&stats);
        let mut meter = Meter::new(metrics.clone(), Some("a".to_owned()), 2);
        let finished = What::Finished {
            reason: Finish::Length,
            stop_string: None,
            completion_tokens: 1,
            cached_tokens: 0,
            guessed: Guessed::default(),
        };
        meter.see(&Piece {
            choice: 0,
            what: finished,
        });
        let text = metrics.text(&stats);
        for line in [
            "vllm:generation_tokens_total{model_name=\"base\"} 7",
            "vllm:num_requests_running{model_name=\"base\"} 2",
            "vllm:request_success_total{finished_reason=\"length\",model_name=\"base\"} 1",
            "waiting_lora_adapters=\"a\"",
            "tandem:open_calls{model_name=\"base\"} 1",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        drop(meter);
        let text = metrics.text(&stats);
        assert!(
            text.contains("finished_reason=\"abort\",model_name=\"base\"} 1"),
            "{text}"
        );
        assert!(text.contains("waiting_lora_adapters=\"\""), "{text}");
    }
}
