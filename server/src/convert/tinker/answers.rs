//! What a future is answered with, and lists of what was saved.

use std::collections::BTreeMap;

use axum::Json;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use prost::Message;
use serde::Serialize;
use tandem_core::learner::{Scores, Stepped};
use tandem_openapi::tinker::proto;
use tandem_openapi::tinker::{
    Checkpoint, CreateModelResponse, FutureFailed, LoadWeightsResponse, OptimStepResponse,
    SaveWeightsForSamplerResponse, SaveWeightsResponse, TrainingRun,
};
use tandem_router::time::iso;
use tandem_router::tinker as api;
use tandem_router::tinker::{By, Failure, Kept, Learning, Outcome, Shape};

use super::arrays::{f32_bytes, i32_bytes, i64_bytes};

/// For a place without an alternative.
const NO_LOGPROB: f32 = -99999.0;

/// What a future is answered with.
pub fn answer(outcome: &Outcome) -> Response {
    match outcome {
        Outcome::Created { model_id } => json(CreateModelResponse {
            model_id: model_id.clone(),
        }),
        Outcome::Scored { scores, shapes } => protobuf(&scored(scores, shapes)),
        Outcome::Stepped(Stepped { step, grad_norm }) => json(OptimStepResponse {
            metrics: [
                ("step:max".to_owned(), *step as f64),
                ("grad_norm:mean".to_owned(), *grad_norm),
            ]
            .into(),
        }),
        Outcome::Saved { path } => json(SaveWeightsResponse { path: path.clone() }),
        Outcome::Sampler { id } => json(SaveWeightsForSamplerResponse {
            path: None,
            sampling_session_id: Some(id.clone()),
        }),
        Outcome::Loaded { path, model_id } => json(LoadWeightsResponse {
            path: path.clone(),
            model_id: model_id.clone(),
        }),
        Outcome::Sampled(samples) => protobuf(&sampled(samples)),
        Outcome::Failed(Failure { message, by }) => json(FutureFailed {
            error: message.clone(),
            category: match by {
                By::User => "user",
                By::Server => "server",
            },
        }),
    }
}

fn json(body: impl Serialize) -> Response {
    Json(body).into_response()
}

fn protobuf(message: &impl Message) -> Response {
    let headers = [(header::CONTENT_TYPE, proto::MEDIA_TYPE)];
    (headers, message.encode_to_vec()).into_response()
}

fn scored(scores: &Scores, shapes: &[Shape]) -> proto::ForwardBackwardOutput {
    // A record holds data of one shape behind their first dimension; neighbours share one.
    let mut records: Vec<proto::ArrayRecord> = vec![];
    let mut at = 0;
    while at < shapes.len() {
        let shape = shapes[at];
        let end = at + shapes[at..].iter().take_while(|other| **other == shape).count();
        let (mut data, mut offsets) = (vec![], vec![0i64]);
        for logprobs in &scores.logprobs[at..end] {
            data.extend(f32_bytes(logprobs));
            offsets.push(data.len() as i64);
        }
        let tensor = proto::BatchedTensor {
            data,
            offsets: i64_bytes(&offsets),
            dtype: proto::FLOAT32,
            trailing_shape: shape.map(|columns| columns as i64).into_iter().collect(),
        };
        records.push(proto::ArrayRecord {
            fields: [("logprobs".to_owned(), tensor)].into(),
            num_datums: (end - at) as i64,
        });
        at = end;
    }
    proto::ForwardBackwardOutput {
        loss_fn_output_type: "ArrayRecord".to_owned(),
        loss_fn_outputs: records,
        metrics: [("loss:sum".to_owned(), scores.loss)].into(),
    }
}

fn sampled(samples: &api::Samples) -> proto::SampleResponse {
    let api::Samples {
        sequences,
        prompt_logprobs,
        prompt_tops,
        cached_tokens,
    } = samples;
    let sequence = |sampled: &api::Sampled| proto::SampledSequence {
        stop_reason: i32::from(!sampled.stopped),
        tokens: token_bytes(&sampled.tokens),
        logprobs: Some(f32_bytes(&sampled.logprobs)),
        topk_sampled_logprobs: tops(&sampled.tops),
    };
    proto::SampleResponse {
        sequences: sequences.iter().map(sequence).collect(),
        prompt_logprobs: prompt_logprobs.as_deref().map(f32_bytes),
        topk_prompt_logprobs: prompt_tops.as_deref().and_then(tops),
        prompt_cache_hit_tokens: i32::try_from(*cached_tokens).unwrap_or(i32::MAX),
    }
}

/// `None`: none were asked.
fn tops(tops: &[api::Top]) -> Option<proto::TopkLogprobs> {
    let k = tops.iter().map(Vec::len).max().filter(|&k| k > 0)?;
    let (mut ids, mut logprobs) = (vec![], vec![]);
    for top in tops {
        let missing = k - top.len();
        ids.extend(
            top.iter()
                .map(|&(id, _)| id)
                .chain(std::iter::repeat_n(0, missing)),
        );
        logprobs.extend(
            top.iter()
                .map(|&(_, logprob)| logprob)
                .chain(std::iter::repeat_n(NO_LOGPROB, missing)),
        );
    }
    Some(proto::TopkLogprobs {
        token_ids: token_bytes(&ids),
        logprobs: f32_bytes(&logprobs),
        k: k as u32,
        length: tops.len() as u32,
    })
}

fn token_bytes(tokens: &[u32]) -> Vec<u8> {
    // Vocabularies are far below 2^31.
    let tokens: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
    i32_bytes(&tokens)
}

pub fn checkpoint(kept: Kept) -> Checkpoint {
    let Kept {
        run: _,
        id,
        path,
        is_sampler,
        created_at,
        expires_at,
        bytes,
        public,
        rank: _,
        user_metadata,
    } = kept;
    Checkpoint {
        checkpoint_id: id,
        checkpoint_type: if is_sampler { "sampler" } else { "training" },
        time: iso(created_at),
        tinker_path: path,
        size_bytes: bytes,
        public,
        user_metadata,
        expires_at: expires_at.map(iso),
    }
}

/// Runs that live, and those that only saves speak of; the newest first.
pub fn training_runs(learnings: Vec<Learning>, saves: Vec<Kept>, base: String) -> Vec<TrainingRun> {
    struct Run {
        base_model: String,
        rank: u32,
        last: i64,
        checkpoint: Option<Kept>,
        sampler: Option<Kept>,
        user_metadata: Option<BTreeMap<String, serde_json::Value>>,
    }
    let mut runs: BTreeMap<String, Run> = BTreeMap::new();
    for learning in learnings {
        let run = Run {
            base_model: learning.base_model,
            rank: learning.lora.r,
            last: learning.last_request_at,
            checkpoint: None,
            sampler: None,
            user_metadata: learning.user_metadata,
        };
        runs.insert(learning.id, run);
    }
    for kept in saves {
        let run = runs.entry(kept.run.clone()).or_insert_with(|| Run {
            base_model: base.clone(),
            rank: kept.rank,
            last: kept.created_at,
            checkpoint: None,
            sampler: None,
            user_metadata: None,
        });
        run.last = run.last.max(kept.created_at);
        match kept.is_sampler {
            true => run.sampler = Some(kept),
            false => run.checkpoint = Some(kept),
        }
    }
    let mut runs: Vec<(String, Run)> = runs.into_iter().collect();
    runs.sort_by_key(|(_, run)| std::cmp::Reverse(run.last));
    let shown = |(training_run_id, run): (String, Run)| TrainingRun {
        training_run_id,
        base_model: run.base_model,
        model_owner: "tandem".to_owned(),
        is_lora: true,
        corrupted: false,
        lora_rank: run.rank,
        last_request_time: iso(run.last),
        last_checkpoint: run.checkpoint.map(checkpoint),
        last_sampler_checkpoint: run.sampler.map(checkpoint),
        user_metadata: run.user_metadata,
    };
    runs.into_iter().map(shown).collect()
}
