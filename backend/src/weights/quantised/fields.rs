//! Which fields of a `quantization_config` change nothing that is not read from the tensors or by a scheme. Source:
//! transformers 5.23 utils/quantization_config.py, AutoAWQ 0.2, GPTQModel 5, compressed-tensors 0.13 quant_config.py.

use serde_json::{Map, Value};

/// The fields that are in none of the lists, for the log.
pub(super) fn unknown(config: &Map<String, Value>) -> Vec<&str> {
    let known = |field: &&str| KNOWN.iter().any(|(_, fields)| fields.contains(field));
    let given = config.iter().filter(|(_, value)| !value.is_null());
    given
        .map(|(field, _)| field.as_str())
        .filter(|field| !known(field))
        .collect()
}

/// By why nothing is lost.
const KNOWN: [(&str, &[&str]); 6] = [
    (
        "a scheme reads it",
        &[
            "quant_method",
            "checkpoint_format",
            "format",
            "bits",
            "w_bit",
            "group_size",
            "version",
            "weight_block_size",
            "config_groups",
            "sparsity_config",
            "transform_config",
        ],
    ),
    (
        "the tensors' names, dtypes and shapes say it",
        &[
            "q_group_size",
            "zero_point",
            "sym",
            "desc_act",
            "static_groups",
            "lm_head",
            "load_in_4bit",
            "_load_in_4bit",
            "load_in_8bit",
            "_load_in_8bit",
            "bnb_4bit_quant_type",
            "bnb_4bit_use_double_quant",
            "bnb_4bit_quant_storage",
            "quantization_status",
            "global_compression_ratio",
            "scale_fmt",
            "fmt",
            "expert_dtype",
            "pack_dtype",
            "is_marlin_format",
        ],
    ),
    (
        "a module is quantised if its tensors are",
        &[
            "ignore",
            "modules_to_not_convert",
            "modules_to_convert",
            "llm_int8_skip_modules",
            "modules_in_block_to_quantize",
            "block_name_to_quantize",
            "module_name_preceding_first_block",
            "dynamic",
            "ignored_layers",
        ],
    ),
    (
        "activations are not quantised here, nor is the cache by a model's wish: products are at least as precise",
        &[
            "activation_scheme",
            "activation_scale_ub",
            "kv_cache_scheme",
            "llm_int8_threshold",
            "bnb_4bit_compute_dtype",
        ],
    ),
    (
        "how weights were found",
        &[
            "dataset",
            "tokenizer",
            "damp_percent",
            "damp_auto_increment",
            "true_sequential",
            "act_group_aware",
            "model_seqlen",
            "batch_size",
            "pad_token_id",
            "max_input_length",
            "cache_block_outputs",
            "quantizer",
            "meta",
            "model_name_or_path",
            "model_file_base_name",
        ],
    ),
    (
        "how another program runs it",
        &[
            "backend",
            "dequantize",
            "run_compressed",
            "use_optimized_inference",
            "llm_int8_enable_fp32_cpu_offload",
            "llm_int8_has_fp16_weight",
            "exllama_config",
            "use_exllama",
            "do_fuse",
            "fuse_max_seq_len",
            "modules_to_fuse",
        ],
    ),
];
