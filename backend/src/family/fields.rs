//! What the fields of a config.json mean that the model's family did not read: without effect on an answer, or refused.
//! A field that is in neither list is named in the log. Source: transformers 5.23 configuration_utils.py and the
//! configurations of its decoders.

use serde_json::Value;

pub(super) enum Judgement {
    Harmless,
    /// Without effect on answers, but somebody may have counted on it.
    Noted(String),
    Refused(String),
    Unknown,
}

pub(super) fn judge(field: &str, value: &Value) -> Judgement {
    if value.is_null() || HARMLESS.iter().any(|(_, fields)| fields.contains(&field)) {
        return Judgement::Harmless;
    }
    if let Some((_, neutral, what)) = CHANGES.iter().find(|(name, _, _)| *name == field) {
        return match neutral(value) {
            true => Judgement::Harmless,
            false => Judgement::Refused(format!("{what}; this family has none here")),
        };
    }
    match TRAINING.contains(&field) {
        _ if off(value) => Judgement::Harmless,
        true if zero(value) => Judgement::Harmless,
        true => Judgement::Noted("only transformers' own training applies it".to_owned()),
        false => Judgement::Unknown,
    }
}

/// By why they do not matter.
const HARMLESS: [(&str, &[&str]); 10] = [
    (
        "where it came from",
        &[
            "_name_or_path",
            "name_or_path",
            "_commit_hash",
            "transformers_version",
            "transformers.js_config",
            "unsloth_version",
            "unsloth_fixed",
            "auto_map",
            "is_llama_config",
            "is_composition",
        ],
    ),
    (
        "how transformers runs it, not what it computes",
        &[
            "use_cache",
            "cache_implementation",
            "output_attentions",
            "_output_attentions",
            "output_hidden_states",
            "output_scores",
            "return_dict",
            "return_dict_in_generate",
            "tie_last_hidden_states",
            "chunk_size_feed_forward",
            "gradient_checkpointing",
            "attn_implementation",
            "_attn_implementation",
            "_attn_implementation_autoset",
            "_attn_implementation_internal",
            "_experts_implementation",
            "_experts_implementation_internal",
            "_flash_attn_2_enabled",
            "use_flash_attn",
            "torchscript",
            "use_bfloat16",
            "tf_legacy_loss",
            // Sums in slices, of the same products.
            "pretraining_tp",
        ],
    ),
    ("the weight files say it themselves", &["dtype", "torch_dtype"]),
    (
        "what other fields say, in other programs' words",
        &[
            "initial_context_length",
            "max_sequence_length",
            "layer_switch",
            "use_embedding_sharing",
            "use_parallel_embedding",
        ],
    ),
    (
        "who reads the weights reads it",
        &["quantization_config", "compression_config"],
    ),
    (
        "of training routers, which stay as they are here",
        &["output_router_logits", "router_aux_loss_coef"],
    ),
    ("how weights were drawn before training", &["initializer_range"]),
    (
        "tokens that the tokenizer's files name",
        &[
            "bos_token_id",
            "pad_token_id",
            "sep_token_id",
            "cls_token_id",
            "unk_token_id",
            "mask_token_id",
            "decoder_start_token_id",
            "prefix",
        ],
    ),
    (
        "of classifiers and old pipelines",
        &[
            "num_labels",
            "id2label",
            "label2id",
            "problem_type",
            "finetuning_task",
            "task_specific_params",
            "is_decoder",
        ],
    ),
    (
        "sampling defaults, which transformers 5 drops from a config.json, too",
        &[
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
            "do_sample",
            "max_length",
            "max_new_tokens",
            "min_length",
            "num_beams",
            "num_beam_groups",
            "num_return_sequences",
            "early_stopping",
            "diversity_penalty",
            "repetition_penalty",
            "length_penalty",
            "no_repeat_ngram_size",
            "encoder_no_repeat_ngram_size",
            "bad_words_ids",
            "remove_invalid_values",
            "exponential_decay_length_penalty",
            "suppress_tokens",
            "begin_suppress_tokens",
            "forced_bos_token_id",
            "forced_eos_token_id",
        ],
    ),
];

/// Dropout of transformers' training: answers have none, and LoRA here has its own.
const TRAINING: [&str; 9] = [
    "router_jitter_noise",
    "attention_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "residual_dropout",
    "dropout",
];

type Neutral = fn(&Value) -> bool;

/// The field, with which values it changes nothing, and what it says otherwise.
#[rustfmt::skip] // one field, one line
const CHANGES: [(&str, Neutral, &str); 46] = [
    ("per_layer_config", off, "layers that differ from each other"),
    ("layer_types", all_full_attention, "layers of different kinds"),
    ("no_rope_layers", all_one, "layers without rope"),
    ("no_rope_layer_interval", off, "layers without rope"),
    ("partial_rotary_factor", one, "a head rotated in part"),
    ("rotary_pct", one, "a head rotated in part"),
    ("rope_interleave", off, "rope over neighbouring pairs"),
    ("rope_interleaved", off, "rope over neighbouring pairs"),
    ("position_embedding_type", rope, "positions other than rope's"),
    ("alibi", off, "positions other than rope's"),
    ("is_causal", is_true, "attention in both directions"),
    ("use_bidirectional_attention", off, "attention in both directions"),
    ("is_encoder_decoder", off, "an encoder"),
    ("add_cross_attention", off, "an encoder"),
    ("cross_attention_hidden_size", off, "an encoder"),
    ("text_config", off, "a model of several parts"),
    ("vision_config", off, "a model of several parts"),
    ("audio_config", off, "a model of several parts"),
    ("num_local_experts", zero, "experts"),
    ("num_experts", zero, "experts"),
    ("n_routed_experts", zero, "experts"),
    ("num_nextn_predict_layers", zero, "layers that predict further tokens"),
    ("q_lora_rank", off, "latent attention"),
    ("kv_lora_rank", off, "latent attention"),
    ("attn_logit_softcapping", off, "a cap on attention"),
    ("final_logit_softcapping", off, "a cap on logits"),
    ("query_pre_attn_scalar", off, "another scale of attention"),
    ("attention_multiplier", off, "another scale of attention"),
    ("embedding_multiplier", one, "a factor on embeddings"),
    ("scale_emb", one, "a factor on embeddings"),
    ("residual_multiplier", one, "a factor on residuals"),
    ("scale_depth", off, "a factor on residuals"),
    ("logit_scale", one, "a factor on logits"),
    ("logits_scaling", one, "a factor on logits"),
    ("dim_model_base", off, "a factor on logits"),
    ("clip_qkv", off, "a limit on q, k and v"),
    ("qk_norm", off, "norms of q and k"),
    ("use_qk_norm", off, "norms of q and k"),
    ("qk_layernorm", off, "norms of q and k"),
    ("use_parallel_residual", off, "attention and MLP side by side"),
    ("parallel_attn", off, "attention and MLP side by side"),
    ("attention_out_bias", off, "a bias in the output projection alone"),
    ("qkv_bias", off, "biases in q, k and v alone"),
    ("use_bias", off, "biases under another name than `attention_bias` and `mlp_bias`"),
    ("bias", off, "biases under another name than `attention_bias` and `mlp_bias`"),
    ("pruned_heads", off, "heads that were cut out"),
];

/// Nothing is asked for.
fn off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn is_true(value: &Value) -> bool {
    *value == Value::Bool(true)
}

fn rope(value: &Value) -> bool {
    matches!(value.as_str(), Some("rope" | "rotary"))
}

fn all_one(value: &Value) -> bool {
    value.as_array().is_some_and(|items| items.iter().all(one))
}

fn all_full_attention(value: &Value) -> bool {
    let full = |item: &Value| item.as_str() == Some("full_attention");
    value.as_array().is_some_and(|items| items.iter().all(full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_field_is_in_two_lists() {
        let harmless = HARMLESS.iter().flat_map(|(_, fields)| fields.iter());
        let mut all: Vec<&str> = harmless.copied().chain(TRAINING).collect();
        all.extend(CHANGES.iter().map(|(field, _, _)| field));
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
