//! What a client asks, read and checked.

use std::collections::BTreeMap;

use tandem_core::learner::{Adam, Batch, Clip, Datum, Loss, Pass};
use tandem_openapi::tinker::proto::{self, ForwardBackwardRequest, Piece};
use tandem_openapi::tinker::{
    AdamParams, CreateModelRequest, LoraConfig, OptimStepRequest, OptimizerConfig, SampleRequest,
    SamplingParams, SaveWeightsForSamplerRequest, SaveWeightsRequest, Stop,
};
use tandem_router::tinker as api;
use tandem_router::tinker::{Ask, Call, Keep, NewModel, Reach, SamplerKind, Shape};

use super::arrays::{self, Array};
use crate::error::{ApiError, invalid};

type Metadata = BTreeMap<String, serde_json::Value>;

/// The SDK's own defaults, should a client leave one away.
const RANK: u32 = 32;
const ADAM: Adam = Adam {
    learning_rate: 1e-4,
    beta1: 0.9,
    beta2: 0.95,
    epsilon: 1e-12,
    weight_decay: 0.0,
    grad_clip_norm: 0.0,
};
/// Samples of one question at most; the router's own limit may be lower.
pub const MAX_SAMPLES: u32 = 1024;
const METADATA_BYTES: usize = 16 << 10;
const PATH_BYTES: usize = 4 << 10;

pub fn new_model(body: CreateModelRequest) -> Result<NewModel, ApiError> {
    let CreateModelRequest {
        session_id: _,
        model_seq_id: _,
        base_model,
        user_metadata,
        lora_config,
        optimizer_config,
        r#type: _,
    } = body;
    let LoraConfig {
        rank,
        seed,
        train_unembed,
        train_mlp,
        train_attn,
    } = lora_config.unwrap_or(LoraConfig {
        rank: RANK,
        seed: None,
        train_unembed: None,
        train_mlp: None,
        train_attn: None,
    });
    if let Some(OptimizerConfig { r#type: Some(kind) }) = optimizer_config
        && kind != "adamw"
    {
        let message = format!("optimizer_config.type must be \"adamw\", got {kind:?}");
        return Err(invalid("optimizer_config.type", message));
    }
    let [train_attn, train_mlp, train_unembed] =
        [train_attn, train_mlp, train_unembed].map(|asked| asked.unwrap_or(true));
    if !train_attn && !train_mlp && !train_unembed {
        let message = "one of train_attn, train_mlp and train_unembed must be true";
        return Err(invalid("lora_config", message));
    }
    Ok(NewModel {
        base_model,
        reach: Reach {
            rank,
            train_attn,
            train_mlp,
            train_unembed,
        },
        // Its bits, whatever its sign.
        seed: seed.map(|seed| seed as u64),
        user_metadata: metadata(user_metadata).map_err(|message| invalid("user_metadata", message))?,
    })
}

pub fn step(body: OptimStepRequest) -> Result<Call, String> {
    let OptimStepRequest {
        model_id: _,
        seq_id: _,
        adam_params,
        optimizer_params,
        r#type: _,
    } = body;
    let Some(AdamParams {
        learning_rate,
        beta1,
        beta2,
        eps,
        weight_decay,
        grad_clip_norm,
        r#type: _,
    }) = adam_params
    else {
        return Err(match optimizer_params {
            Some(_) => "only adam_params are understood: AdamW is the optimizer here".to_owned(),
            None => "adam_params must be given".to_owned(),
        });
    };
    let adam = Adam {
        learning_rate: learning_rate.unwrap_or(ADAM.learning_rate),
        beta1: beta1.unwrap_or(ADAM.beta1),
        beta2: beta2.unwrap_or(ADAM.beta2),
        epsilon: eps.unwrap_or(ADAM.epsilon),
        weight_decay: weight_decay.unwrap_or(ADAM.weight_decay),
        grad_clip_norm: grad_clip_norm.unwrap_or(ADAM.grad_clip_norm),
    };
    adam.check().map_err(|fault| fault.to_string())?;
    Ok(Call::Step(adam))
}

pub fn save(body: SaveWeightsRequest) -> Result<Call, String> {
    let SaveWeightsRequest {
        model_id: _,
        seq_id,
        path,
        overwrite,
        ttl_seconds,
        user_metadata,
        r#type: _,
    } = body;
    Ok(Call::Save(Keep {
        name: path.map_or_else(|| Ok(format!("seq-{seq_id}")), self::path)?,
        overwrite: overwrite.unwrap_or(false),
        ttl_s: positive("ttl_seconds", ttl_seconds)?,
        user_metadata: metadata(user_metadata)?,
    }))
}

pub fn save_for_sampler(body: SaveWeightsForSamplerRequest) -> Result<Call, String> {
    let SaveWeightsForSamplerRequest {
        model_id: _,
        seq_id: _,
        path,
        sampling_session_seq_id,
        kind,
        overwrite,
        ttl_seconds,
        user_metadata,
        r#type: _,
    } = body;
    let kind = match kind.as_deref() {
        None | Some("snapshot") => SamplerKind::Snapshot,
        Some("inflight") => SamplerKind::Inflight,
        Some(other) => {
            return Err(format!(
                "kind must be \"snapshot\" or \"inflight\", got {other:?}"
            ));
        }
    };
    match (path, sampling_session_seq_id) {
        (Some(name), None) => Ok(Call::SaveForSampler(Keep {
            name: self::path(name)?,
            overwrite: overwrite.unwrap_or(false),
            ttl_s: positive("ttl_seconds", ttl_seconds)?,
            user_metadata: metadata(user_metadata)?,
        })),
        (None, Some(seq)) => Ok(Call::Sampler { seq, kind }),
        _ => {
            Err("either path (a checkpoint) or sampling_session_seq_id (a sampler) must be given".to_owned())
        }
    }
}

/// What a client writes beside a model or a checkpoint.
pub fn metadata(given: Option<Metadata>) -> Result<Option<Metadata>, String> {
    let bytes = given
        .as_ref()
        .map_or(0, |given| serde_json::to_vec(given).map_or(0, |text| text.len()));
    match bytes {
        0..=METADATA_BYTES => Ok(given),
        _ => Err(format!(
            "user_metadata has {bytes} bytes as JSON, at most {METADATA_BYTES} are kept"
        )),
    }
}

/// A checkpoint's path or name.
pub fn path(given: String) -> Result<String, String> {
    match given.len() {
        0..=PATH_BYTES => Ok(given),
        bytes => Err(format!("path has {bytes} bytes, at most {PATH_BYTES} are read")),
    }
}

fn positive(name: &str, value: Option<i64>) -> Result<Option<i64>, String> {
    match value {
        Some(value) if value <= 0 => Err(format!("{name} must be above 0, got {value}")),
        value => Ok(value),
    }
}

pub fn batch(body: ForwardBackwardRequest) -> Result<Call, String> {
    let ForwardBackwardRequest {
        model_id: _,
        seq_id: _,
        data,
        loss_fn,
        loss_fn_config,
        forward_only,
        loss_fn_config_v2,
    } = body;
    let mut config = loss_fn_config;
    for (name, value) in loss_fn_config_v2 {
        match value.value {
            Some(proto::ConfigValue::Number(number)) => drop(config.insert(name, number)),
            _ => return Err(format!("loss_fn_config.{name} must be a number")),
        }
    }
    let loss = loss(&loss_fn, config)?;
    let mut room = arrays::MAX_NUMBERS;
    let mut read = Vec::with_capacity(data.len());
    for (n, one) in data.into_iter().enumerate() {
        read.push(datum(one, loss, &mut room).map_err(|why| format!("datum {n}: {why}"))?);
    }
    let (data, shapes) = read.into_iter().unzip();
    let pass = match forward_only {
        true => Pass::Forward,
        false => Pass::ForwardBackward,
    };
    let batch = Batch {
        loss,
        data,
        pass,
        trace: None,
    };
    Ok(Call::Accumulate { batch, shapes })
}

fn loss(name: &str, mut config: BTreeMap<String, f64>) -> Result<Loss, String> {
    let mut take = |key: &str| config.remove(key);
    let mut clip = |low: Option<f64>, high: Option<f64>| {
        let wanted = |key: &str, default: Option<f64>, got: Option<f64>| {
            let value = got.or(default);
            value.ok_or_else(|| {
                format!("{name} must be told loss_fn_config.{key}: it has no published default")
            })
        };
        let clip = Clip {
            low: wanted("clip_low_threshold", low, take("clip_low_threshold"))?,
            high: wanted("clip_high_threshold", high, take("clip_high_threshold"))?,
        };
        match clip.low >= 0.0 && clip.low <= clip.high && clip.high.is_finite() {
            true => Ok(clip),
            false => Err(format!(
                "loss_fn_config: 0 <= clip_low_threshold <= clip_high_threshold must hold, got {} and {}",
                clip.low, clip.high
            )),
        }
    };
    let loss = match name {
        "cross_entropy" => Loss::CrossEntropy,
        "importance_sampling" => Loss::ImportanceSampling,
        "ppo" => Loss::Ppo(clip(Some(0.8), Some(1.2))?),
        "cispo" => Loss::Cispo(clip(Some(0.0), Some(4.0))?),
        "gspo" => Loss::Gspo(clip(None, None)?),
        "dro" => {
            let beta =
                take("beta").ok_or("dro must be told loss_fn_config.beta: it has no published default")?;
            match beta.is_finite() {
                true => Loss::Dro { beta },
                false => return Err(format!("loss_fn_config.beta must be finite, got {beta}")),
            }
        }
        "stable_reinforce" => {
            return Err(
                "loss_fn \"stable_reinforce\" needs records that only Tinker's own samplers keep: use importance_sampling, \
                 ppo or cispo"
                    .to_owned(),
            );
        }
        other => {
            let names = Loss::NAMES.join(", ");
            return Err(format!("loss_fn {other:?} is none of {names}"));
        }
    };
    match config.keys().next() {
        None => Ok(loss),
        Some(key) => Err(format!("loss_fn_config.{key} means nothing to {name}")),
    }
}

fn datum(datum: proto::Datum, loss: Loss, room: &mut usize) -> Result<(Datum, Shape), String> {
    let mut tokens = vec![];
    for chunk in datum.model_input {
        match chunk.chunk {
            Some(Piece::Text(text)) => {
                tokens.extend(arrays::tokens("model_input", &arrays::i32s(&text.tokens)?)?)
            }
            Some(Piece::Image(_) | Piece::Sound(_)) => {
                return Err("model_input has an image or a sound; this model reads text alone".to_owned());
            }
            None => return Err("model_input has an empty chunk".to_owned()),
        }
    }
    let mut inputs: BTreeMap<String, Array> = BTreeMap::new();
    for (name, tensor) in datum.loss_fn_inputs {
        let array = Array::read(tensor, room).map_err(|why| format!("loss_fn_inputs.{name}: {why}"))?;
        inputs.insert(name, array);
    }
    let targets = inputs
        .remove("target_tokens")
        .ok_or("loss_fn_inputs.target_tokens must be given")?;
    let shape = match targets.shape[..] {
        [_] => None,
        [_, columns] => Some(columns),
        _ => {
            return Err(format!(
                "target_tokens must be [N] or [N, K], got {:?}",
                targets.shape
            ));
        }
    };
    let mut numbers = |name: &str| {
        inputs
            .remove(name)
            .map(|array| array.floats())
            .unwrap_or_default()
    };
    let weights = numbers("weights");
    let (mut sampled, mut advantages, mut ratio_mask) = (vec![], vec![], vec![]);
    if loss.is_of_policy() {
        (sampled, advantages) = (numbers("logprobs"), numbers("advantages"));
    }
    if let Loss::Gspo(_) = loss {
        ratio_mask = numbers("sequence_ratio_mask");
    }
    if let Some(name) = inputs.keys().next() {
        return Err(format!("loss_fn_inputs.{name} means nothing to {}", loss.name()));
    }
    let datum = Datum {
        tokens,
        columns: shape.unwrap_or(1),
        targets: arrays::tokens("target_tokens", &targets.integers()?)?,
        weights,
        sampled,
        advantages,
        ratio_mask,
    };
    Ok((datum, shape))
}

pub fn ask(body: SampleRequest) -> Result<Ask, String> {
    let SampleRequest {
        sampling_session_id: _,
        seq_id: _,
        base_model: _,
        model_path: _,
        num_samples,
        prompt,
        sampling_params,
        prompt_logprobs,
        topk_prompt_logprobs,
        topk_sample_logprobs,
        prompt_logprobs_last_n,
        target_prompt_logprobs,
        prompt_alt_tokens_k,
        record_stability_info,
        r#type: _,
    } = body;
    for (name, given) in [
        ("target_prompt_logprobs", target_prompt_logprobs.is_some()),
        ("prompt_alt_tokens_k", prompt_alt_tokens_k.is_some_and(|k| k > 0)),
        ("record_stability_info", record_stability_info == Some(true)),
    ] {
        if given {
            return Err(format!("{name} is not supported by this server"));
        }
    }
    let SamplingParams {
        max_tokens,
        seed,
        stop,
        temperature,
        top_k,
        top_p,
        r#type: _,
    } = sampling_params;
    let mut tokens = vec![];
    for chunk in prompt.chunks {
        match (chunk.r#type.as_str(), chunk.tokens) {
            ("encoded_text", Some(more)) => tokens.extend(arrays::tokens("prompt", &more)?),
            (kind, _) => {
                return Err(format!(
                    "prompt has a chunk of type {kind:?}; this model reads encoded_text"
                ));
            }
        }
    }
    if tokens.is_empty() {
        return Err("prompt has no token".to_owned());
    }
    let n = num_samples.unwrap_or(1);
    if n == 0 || n > MAX_SAMPLES {
        return Err(format!(
            "num_samples must be between 1 and {MAX_SAMPLES}, got {n}"
        ));
    }
    let max_tokens = max_tokens
        .map(|most| u32::try_from(most).map_err(|_| format!("max_tokens must not be negative, got {most}")));
    let top_prompt_logprobs = topk_prompt_logprobs.unwrap_or(0);
    let stop = match stop {
        None => api::Stop::Model,
        Some(Stop::Text(text)) => api::Stop::Texts(vec![text]),
        Some(Stop::Texts(texts)) => api::Stop::Texts(texts),
        Some(Stop::Tokens(ids)) => api::Stop::Tokens(arrays::tokens("stop", &ids)?),
    };
    Ok(Ask {
        prompt: tokens,
        n,
        max_tokens: max_tokens.transpose()?,
        temperature: temperature.unwrap_or(1.0),
        top_p: top_p.unwrap_or(1.0),
        top_k: top_k.unwrap_or(-1),
        seed: seed.map(|seed| seed as u64),
        stop,
        prompt_logprobs: prompt_logprobs.unwrap_or(false) || top_prompt_logprobs > 0,
        prompt_logprobs_last: prompt_logprobs_last_n,
        top_prompt_logprobs,
        top_logprobs: topk_sample_logprobs.unwrap_or(0),
    })
}
