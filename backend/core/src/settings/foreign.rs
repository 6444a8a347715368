//! Settings of other trainers that have no counterpart here. A value that asks for what is done anyway is taken; any
//! other is refused with what to do instead. A name in neither table is unknown.

use serde_json::Value;

use super::{Beside, Refused, Why, refused, shown, unknown};

struct Foreign {
    /// Separated by white space.
    names: &'static str,
    /// Values that ask for what is done anyway.
    same: fn(&Value, &Beside) -> bool,
    /// Why every value is harmless, or what to do instead.
    says: &'static str,
}

pub(super) fn names() -> impl Iterator<Item = &'static str> {
    FOREIGN
        .iter()
        .flat_map(|foreign| foreign.names.split_whitespace())
}

pub(super) fn check(path: String, name: &str, value: &Value, beside: &Beside) -> Result<(), Refused> {
    let mut rows = FOREIGN.iter();
    let Some(foreign) = rows.find(|foreign| foreign.names.split_whitespace().any(|known| known == name))
    else {
        return Err(unknown(path, name));
    };
    match (foreign.same)(value, beside) {
        true => Ok(()),
        false => {
            let message = format!("{path}: {} is not supported: {}", shown(value), foreign.says);
            Err(refused(path, Why::NotBuilt, message))
        }
    }
}

const fn row(names: &'static str, same: fn(&Value, &Beside) -> bool, says: &'static str) -> Foreign {
    Foreign { names, same, says }
}

fn any(_: &Value, _: &Beside) -> bool {
    true
}

fn never(_: &Value, _: &Beside) -> bool {
    false
}

/// It is switched off: false, 0, `""`, `"none"`, `"no"`, `[]` or `{}`.
fn off(value: &Value, _: &Beside) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => ["", "none", "no", "false"].contains(&text.to_ascii_lowercase().as_str()),
        Value::Array(items) => items.iter().all(|item| item == "none"),
        Value::Object(fields) => fields.is_empty(),
    }
}

fn on(value: &Value, _: &Beside) -> bool {
    value == true || value == "true"
}

fn word(value: &Value, words: &[&str]) -> bool {
    value
        .as_str()
        .is_some_and(|text| words.contains(&text.to_ascii_lowercase().as_str()))
}

const SPEED: &str = "it changes time and memory, not what is learned";
const LOGS: &str = "every step is reported, and there is no other log to shape";
const EVENTS: &str = "the metrics of every step are in a job's events and its result files: step_metrics.csv, and TensorBoard's events";
const PRECISION: &str =
    "the base keeps the dtype it is served in, everything else is float32: at least as precise";
const HALF: &str = "nothing is computed in float16: the base keeps the dtype it is served in, everything else is float32; \
                    leave it out";
const HUB: &str = "nothing is pushed: take the adapter's folder from the server or from output_dir";
const QUANTISED: &str = "a job trains on the base as it is served: tandem serve --quantization nf4 (QLoRA), or tandem train quantization=nf4";
const RANKS: &str = "ranks are the server's (tandem serve --tensor-parallel-size N); `tandem train` has data_parallel_size and \
                     sharding_strategy";
const LORA_ONLY: &str =
    "a job trains LoRA (lora_r, lora_alpha, ...); `tandem train method=full` trains every parameter";
const PLAIN_LORA: &str =
    "plain LoRA is what is trained: choose lora_r, lora_alpha, lora_dropout, lora_target_modules, use_rslora";
const FILES: &str = "give training_file and validation_file";
const CLASSIFICATION: &str = "classification metrics are not computed; ask the tuned model";
const JOBS_ONLY: &str = "it is a field of POST /v1/fine_tuning/jobs";

const FOREIGN: &[Foreign] = &[
    // What cannot change what is learned.
    row(
        "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
         activation_checkpointing_kwargs activation_offloading enable_activation_checkpointing
         enable_activation_offloading torch_compile torch_compile_backend torch_compile_mode compile
         use_liger_kernel liger_kernel_config use_cache use_reentrant torch_empty_cache_steps
         dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
         dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order dataset_num_proc
         preprocessing_num_workers num_workers_dataloader ddp_find_unused_parameters ddp_bucket_cap_mb
         ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank attn_implementation
         flash_attention flash_attn use_flash_attention_2 use_fast_kernels low_cpu_mem_usage padding_free
         pad_to_multiple_of pad_token average_tokens_across_devices enable_jit_checkpoint
         per_device_eval_batch_size eval_batch_size val_batch_size eval_accumulation_steps
         eval_do_concat_batches eval_use_gather_object batch_eval_metrics prediction_loss_only eval_packing
         skip_memory_metrics full_determinism save_only_model save_safetensors
         restore_callback_states_from_checkpoint length_column_name remove_unused_columns
         optimizer_in_bwd memory_efficient_fsdp_wrap fsdp_cpu_offload fsdp_reshard_after_forward
         custom_sharded_layers cudnn_deterministic_mode fsdp_activation_checkpointing checkpoint_type one_gpu
         batch_size_val save_adapter_weights_only save_optimizer save_model dist_checkpoint_root_folder
         dist_checkpoint_folder num_freeze_layers flop_counter_start profiler_dir use_orig_params",
        any,
        SPEED,
    ),
    row(
        "bf16 tf32 pure_bf16 bf16_full_eval fp16_opt_level half_precision_backend",
        any,
        PRECISION,
    ),
    row("fp16 use_fp16 fp16_full_eval pure_fp16", off, HALF),
    row(
        "mixed_precision",
        // llama-recipes' `true` is bfloat16; its `use_fp16` would be the other.
        |value, beside| off(value, beside) || *value == true || word(value, &["bf16"]),
        HALF,
    ),
    row(
        "logging_steps logging_strategy logging_first_step logging_nan_inf_filter logging_dir
         log_on_each_node log_level log_level_replica log_every_n_steps log_peak_memory_stats disable_tqdm
         include_num_input_tokens_seen include_tokens_per_second run_name project",
        any,
        LOGS,
    ),
    row("do_train", on, "a job trains; `tandem eval` only looks"),
    row(
        "do_eval",
        |value, beside| off(value, beside) != beside.has_validation_file,
        "a validation_file is looked at, and nothing else is: give one, or leave it out",
    ),
    row(
        "trust_remote_code",
        any,
        "no code of a model's folder is ever run",
    ),
    row(
        "bnb_4bit_compute_dtype bnb_4bit_quant_storage qalora_group_size megatron_core runtime_config inference_mode
         peft_version",
        any,
        "it says how to do what is refused by its own name",
    ),
    row(
        "bnb_4bit_quant_type",
        |value, _| word(value, &["nf4"]),
        "four bits of bitsandbytes are nf4 here (quantization=nf4), with a scale for 64 numbers",
    ),
    row(
        "bnb_4bit_use_double_quant use_bnb_nested_quant",
        any,
        "scales are float32 and never quantised again: a tenth more memory, and nearer to the numbers",
    ),
    row(
        "ensure_weight_tying",
        off,
        "an adapter of a tied table changes that table alone: leave it out",
    ),
    row(
        "hub_model_id hub_token hub_strategy hub_private_repo hub_always_push hub_revision
         push_to_hub_model_id push_to_hub_token",
        any,
        "only push_to_hub pushes",
    ),
    // Trackers and the hub.
    row(
        "report_to",
        |value, beside| {
            let one = value.as_array().filter(|list| list.len() == 1).map_or(value, |list| &list[0]);
            off(value, beside) || word(one, &["tensorboard"])
        },
        EVENTS,
    ),
    row("save_metrics", off, EVENTS),
    row(
        "integrations use_wandb wandb_project wandb_api_key wandb_name wandb_base_url wandb_project_name
         trackio_space_id trackio_bucket_id trackio_static_space_id",
        off,
        EVENTS,
    ),
    row("push_to_hub hf_output_repo_name hf_api_token", off, HUB),
    row(
        "debug flop_counter",
        off,
        "nothing counts them: metrics.jsonl has tokens a second",
    ),
    row(
        "use_profiler profiler profile",
        off,
        "`tandem train profile=5` writes a trace; a server's jobs are spans of --otlp-traces-endpoint",
    ),
    // When to look and to save.
    row(
        "eval_strategy evaluation_strategy",
        |value, beside| {
            let by_steps = beside.settings.eval_steps.is_some_and(|steps| steps > 0);
            match value.as_str() {
                _ if off(value, beside) => !beside.has_validation_file,
                Some("steps") => by_steps && beside.has_validation_file,
                Some("epoch") => !by_steps && beside.has_validation_file,
                _ => false,
            }
        },
        "a validation_file is looked at every eval_steps steps, or at each epoch's end without eval_steps; leave it out \
         for no validation",
    ),
    row(
        "n_checkpoints",
        never,
        "give save_steps: the steps between checkpoints",
    ),
    row("n_evals", never, "give eval_steps: the steps between validations"),
    row(
        "eval_on_start eval_delay",
        off,
        "the first validation is at eval_steps, or at the first epoch's end",
    ),
    row(
        "include_for_metrics",
        off,
        "validation reports loss and token accuracy",
    ),
    row(
        "run_validation",
        on,
        "leave validation_file out for no validation",
    ),
    row(
        "early_stopping",
        off,
        "give early_stopping_patience: so many validations in a row without a better one end the run",
    ),
    row("save_on_each_node", off, "one place holds the checkpoints"),
    row(
        "ignore_data_skip",
        off,
        "a run that stopped goes on by itself from the state it wrote",
    ),
    row(
        "overwrite_output_dir",
        off,
        "give an output_dir that does not exist",
    ),
    row(
        "output_dir",
        never,
        "a job's result is a model name; `tandem train` writes folders",
    ),
    // How the rows are read.
    row(
        "shuffle_dataset",
        any,
        "every epoch has a drawn order, in TRL too; shuffle: false keeps that of the files",
    ),
    row(
        "disable_shuffling",
        off,
        "shuffle says whether every epoch has a drawn order",
    ),
    row(
        "group_by_length",
        any,
        "rows are never padded, so there is nothing to save by batches of like lengths",
    ),
    row(
        "dataloader_drop_last auto_find_batch_size drop_last",
        off,
        "every epoch visits every row once in a drawn order, batch_size rows at a time",
    ),
    row(
        "train_sampling_strategy",
        |value, _| word(value, &["random"]),
        "every epoch has a drawn order (random), or with shuffle: false that of the files",
    ),
    row(
        "batching_strategy",
        |value, beside| {
            word(
                value,
                &[if beside.settings.wraps() {
                    "packing"
                } else {
                    "padding"
                }],
            )
        },
        "llama-recipes' packing is packing_strategy: wrapped; without it rows are never padded",
    ),
    row(
        "truncation_mode",
        |value, _| word(value, &["keep_start"]),
        "the start of a long row is kept",
    ),
    row(
        "completion_only_loss",
        |value, beside| match beside.settings.train_on_input {
            Some(true) => off(value, beside),
            _ => {
                on(value, beside)
                    && beside
                        .settings
                        .prompt_loss_weight
                        .is_none_or(|weight| weight == 0.0)
            }
        },
        "give prompt_loss_weight: 0 (the default) for the completion only, 1 for the prompt alike, or train_on_input: true",
    ),
    row(
        "assistant_only_loss mask_inputs",
        |value, beside| match beside.settings.train_on_input {
            Some(true) => off(value, beside),
            _ => on(value, beside),
        },
        "of messages, the assistant's turns are learned; train_on_input: true learns every token",
    ),
    row(
        "conversation_style",
        |value, _| word(value, &["openai", "sharegpt"]),
        "messages have role and content (openai) or from and value (sharegpt), each is known by its keys",
    ),
    row(
        "add_eos",
        on,
        "the end of every row is learned, so that an answer ends",
    ),
    row(
        "new_system_prompt",
        off,
        "write it as the first message of each row, of role system",
    ),
    row(
        "mask_history",
        off,
        "every assistant turn is learned; \"weight\": 0 on a message leaves it out",
    ),
    row(
        "val_set_size val_size validation_split train_ratio max_samples",
        off,
        "every row of training_file is trained; give a smaller file, or a validation_file",
    ),
    row(
        "dataset datasets dataset_name dataset_config dataset_test_split dataset_path
         data_path train_file eval_file validation_split_percentage dataset_kwargs",
        off,
        FILES,
    ),
    row(
        "chat_template chat_template_path",
        off,
        "a job renders chat as its server does: tandem serve --chat-template",
    ),
    row(
        "eos_token tokenizer_name",
        off,
        "the model's folder says it, in its tokenizer.json and tokenizer_config.json",
    ),
    row(
        "label_names",
        off,
        "rows say what is learned: messages, prompt and completion, or text",
    ),
    row(
        "global_batch_size total_batch_size effective_batch_size",
        never,
        "rows of an optimizer step are batch_size times gradient_accumulation_steps",
    ),
    // The optimizer.
    row(
        "optim_args optim_target_modules lr_scheduler_kwargs",
        off,
        "the optimizer and its schedule have named settings: momentum, nesterov, adam_beta1, weight_decay, ...",
    ),
    row("dampening", off, "sgd's momentum is torch's without dampening"),
    row(
        "relative_step warmup_init",
        off,
        "adafactor takes its rate from learning_rate and lr_scheduler_type, as transformers' Trainer has it",
    ),
    row("betas", never, "give adam_beta1 and adam_beta2"),
    row(
        "gradient_clipping",
        |value, beside| match beside.settings.max_grad_norm {
            Some(norm) if norm > 0.0 => on(value, beside),
            Some(_) => off(value, beside),
            None => on(value, beside),
        },
        "gradients are clipped to max_grad_norm, 1 unless it is given; 0 clips nothing",
    ),
    row(
        "label_smoothing_factor router_aux_loss_coef z_loss",
        off,
        "the loss is the cross-entropy of the next token",
    ),
    row(
        "grader reward_model reasoning_effort compute_multiplier eval_interval eval_samples",
        never,
        "a job learns from rows (sft, dpo, kto, orpo, cpo, simpo, reward_weighted), not from a grader",
    ),
    row(
        "ref_model ref_model_init_kwargs reference_free sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
         ref_adapter_name model_adapter_name force_use_ref_model",
        off,
        "the reference is what the job starts from, the base or an adapter, and stays so",
    ),
    row(
        "precompute_ref_log_probs precompute_ref_batch_size ref_model_mixup padding_value label_pad_token_id
         generate_during_eval is_encoder_decoder disable_dropout",
        any,
        "it changes time and memory, not what is learned: dropout is lora_dropout, which is 0 unless it is given",
    ),
    row(
        "f_divergence_type",
        |value, _| word(value, &["reverse_kl"]),
        "the divergence is reverse_kl",
    ),
    row("f_alpha_divergence_coef discopop_tau", any, "it belongs to what is refused by its own name"),
    row(
        "loss_weights ld_alpha use_weighting rpo_alpha alphapo_alpha mpo_config",
        off,
        "one loss_type is minimised, every label of an answer counts alike",
    ),
    row(
        "max_prompt_length max_completion_length",
        off,
        "max_seq_length bounds a row; the start of a long one is kept",
    ),
    // What is trained.
    row("use_peft use_lora lora", on, LORA_ONLY),
    row(
        "peft_type peft_method finetuning_type adapter tuner_type train_type",
        |value, _| word(value, &["lora"]),
        LORA_ONLY,
    ),
    row(
        "training_type",
        never,
        "lora_r, lora_alpha, lora_dropout and lora_trainable_modules are settings of their own",
    ),
    row(
        "task_type lora_task_type",
        |value, _| word(value, &["causal_lm"]),
        "causal language models are trained",
    ),
    row(
        "freeze_layers",
        off,
        "an adapter leaves every layer as it is; `tandem train method=full` freezes layers",
    ),
    row(
        "freeze_trainable_layers unfrozen_parameters layers_to_transform layers_pattern",
        off,
        "every layer is adapted; lora_target_modules chooses the modules in them",
    ),
    row(
        "modules_to_save lora_modules_to_save trainable_token_indices additional_target",
        off,
        "only LoRA matrices are trained; leave it out",
    ),
    row("bias lora_bias", off, "biases are not trained: bias \"none\""),
    row(
        "exclude_modules lora_target_parameters target_parameters",
        off,
        "name the modules that are adapted in lora_target_modules",
    ),
    row(
        "lora_target_linear",
        on,
        "name the modules in lora_target_modules, or all-linear",
    ),
    row(
        "init_lora_weights",
        on,
        "A is drawn and B is zero, as PEFT's init_lora_weights true",
    ),
    row(
        "use_qalora use_bdlora fan_in_fan_out rank_pattern alpha_pattern megatron_config
         loftq_config eva_config corda_config lora_ga_config velora_config monteclora_config arrow_config
         kasa_config alora_invocation_tokens layer_replication",
        off,
        PLAIN_LORA,
    ),
    row(
        "load_in_4bit load_in_8bit quantization quantization_config quantization_bit qlora",
        off,
        QUANTISED,
    ),
    row(
        "dtype torch_dtype",
        |value, _| word(value, &["auto"]),
        "a job trains beside the served base, in its dtype: tandem serve --dtype",
    ),
    row(
        "device use_cpu no_cuda",
        off,
        "a job trains where the base is served: tandem serve --device",
    ),
    row(
        "model_revision revision",
        |value, _| word(value, &["main"]),
        "the base is the folder that is served",
    ),
    row(
        "model_name_or_path base_model base_model_name_or_path auto_mapping model_init_kwargs model_kwargs",
        off,
        "model names the base",
    ),
    // Several devices.
    row(
        "accelerator_config parallelism_config fsdp fsdp_config enable_fsdp low_cpu_fsdp enable_ddp tp_size hsdp
         tensor_parallel_dim",
        off,
        RANKS,
    ),
    row(
        "deepspeed",
        off,
        "its stages 1 and 2 are `tandem train`'s sharding_strategy SHARD_GRAD_OP, its stage 3 FULL_SHARD",
    ),
    row(
        "nproc_per_node num_processes data_parallel_size",
        |value, _| value.as_i64() == Some(1),
        "a server's job has the server's devices, and the batch of N others is gradient_accumulation_steps x N; `tandem train` \
         trains on several ranks",
    ),
    row(
        "nnodes num_machines",
        |value, _| value.as_i64() == Some(1),
        "torchrun, Slurm or Kubernetes start `tandem train` on each machine, with MASTER_ADDR, WORLD_SIZE and RANK",
    ),
    row(
        "sharding_strategy",
        |value, _| word(value, &["no_shard"]),
        "a server's job shares nothing; `tandem train` does, on the ranks of data_parallel_size",
    ),
    row(
        "max_train_step max_eval_step",
        off,
        "give max_steps; validation reads the whole validation_file",
    ),
    // OpenAI's and others' fields.
    row(
        "compute_classification_metrics classification_n_classes classification_positive_class
         classification_betas",
        off,
        CLASSIFICATION,
    ),
    row("metadata hyperparameters method suffix", off, JOBS_ONLY),
    row("do_predict", off, "ask the tuned model for predictions"),
];
