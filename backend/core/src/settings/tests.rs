//! What others' users ask for: honoured, harmless or refused, never dropped.

use serde_json::json;

use super::*;
use crate::job::Optimizer;

fn asked(body: Value) -> Result<Settings, Refused> {
    let Value::Object(body) = body else {
        panic!("cases are objects")
    };
    read([("", body)], true)
}

/// Beside others, where it needs them.
fn one(name: &str, value: Value) -> Result<Settings, Refused> {
    let canonical = setting(name).map_or(name, |setting| setting.name);
    let mut read = asked(json!({name: value}));
    // Some metrics are reported by preferences alone.
    let of_metrics = (canonical == "metric_for_best_model").then_some("dpo");
    let objectives = readers(canonical).chain(of_metrics);
    let mut companions: Vec<Value> = objectives.map(|reader| json!({"objective": reader})).collect();
    companions.extend(match canonical {
        "optim" => Some(json!({"learning_rate": 0.1})),
        "momentum" => Some(json!({"learning_rate": 0.1, "optim": "sgd"})),
        "nesterov" => Some(json!({"learning_rate": 0.1, "optim": "sgd", "momentum": 0.5})),
        "scale_parameter" => Some(json!({"learning_rate": 0.1, "optim": "adafactor"})),
        _ => None,
    });
    for companion in companions {
        read = read.or_else(|_| {
            let mut body = companion.clone();
            body[name] = value.clone();
            let mut settings = serde_json::to_value(asked(body)?).expect("settings are plain data");
            for (other, _) in companion.as_object().expect("an object") {
                settings[other] = Value::Null;
            }
            Ok(serde_json::from_value(settings).expect("settings"))
        });
    }
    read
}

/// A value in range for each kind.
fn example(kind: Kind) -> Value {
    match kind {
        Kind::Integer { low, .. } => json!(low + 1),
        Kind::Real(_) => json!(0.25),
        Kind::Flag => json!(true),
        Kind::Word(words) => json!(words[words.len() - 1]),
        Kind::Modules => json!(["q_proj", "v_proj"]),
        Kind::Map => json!({"output": "summary"}),
        Kind::Text => json!("x"),
    }
}

#[test]
fn every_spelling_of_every_setting_is_honoured() {
    let mut seen = Vec::new();
    for setting in TABLE {
        for name in setting.aliases.iter().chain([&setting.name]) {
            assert!(!seen.contains(name), "{name} is there twice");
            seen.push(*name);
            let value = example(setting.kind);
            let settings = one(name, value.clone()).unwrap();
            assert_eq!(
                serde_json::to_value(settings).unwrap()[setting.name],
                value,
                "{name}"
            );
            for nothing in [json!(null), json!("auto")] {
                assert_eq!(one(name, nothing).unwrap(), Settings::default(), "{name}");
            }
        }
    }
    let foreign: Vec<&str> = foreign::names().collect();
    for (i, name) in foreign.iter().enumerate() {
        assert!(
            !seen.contains(name) && !foreign[..i].contains(name),
            "{name} is there twice"
        );
    }
}

#[test]
fn the_ends_of_every_range_fit_the_field_and_what_lies_beyond_is_named() {
    for setting in TABLE {
        let name = setting.name;
        let (good, bad) = match setting.kind {
            Kind::Integer { low, high, .. } => (
                vec![json!(low), json!(high), json!(low as f64)],
                vec![
                    json!(low - 3),
                    json!(high + 1),
                    json!(1.5),
                    json!("many"),
                    json!([1]),
                    json!(1e300),
                ],
            ),
            Kind::Real(range) => {
                let (Range::Closed(low, high) | Range::Above(low, high) | Range::Below(low, high)) = range;
                let (mut good, mut bad) = (
                    vec![json!(0.25)],
                    vec![json!(low - 1.0), json!(high * 2.0), json!("x")],
                );
                match range {
                    Range::Closed(..) => good.extend([json!(low), json!(high)]),
                    Range::Above(..) => (good.push(json!(high)), bad.push(json!(low))).1,
                    Range::Below(..) => (good.push(json!(low)), bad.push(json!(high))).1,
                }
                (good, bad)
            }
            Kind::Flag => (vec![json!(true), json!(false)], vec![json!(1), json!("true")]),
            Kind::Word(words) => (
                words.iter().map(|word| json!(word)).collect(),
                vec![json!("wave"), json!(1)],
            ),
            Kind::Map => (
                vec![json!({}), json!({"output": "summary"}), json!({"system": ""})],
                vec![json!("output"), json!({"output": 1}), json!({"": "x"})],
            ),
            Kind::Text => (vec![json!("x"), json!(false)], vec![json!(1), json!(true)]),
            Kind::Modules => (
                vec![json!("all-linear"), json!("q_proj, v_proj"), json!(["q_proj"])],
                vec![
                    json!([]),
                    json!(""),
                    json!(["q_proj", ""]),
                    json!(["all-linear", "q_proj"]),
                    json!([1]),
                ],
            ),
        };
        for value in good {
            assert!(one(name, value.clone()).is_ok(), "{name}: {value}");
        }
        for value in bad {
            let error = one(name, value.clone()).map(|_| ()).unwrap_err();
            assert_eq!(error.path, name, "{value}");
            assert!(error.message.contains(name), "{}", error.message);
        }
    }
    let message = one("num_train_epochs", json!(0)).unwrap_err().message;
    assert_eq!(
        message,
        "num_train_epochs must be a number above 0 and at most 10000, got 0"
    );
    assert_eq!(one("max_steps", json!(-1)).unwrap(), Settings::default());
}

#[test]
fn settings_that_contradict_each_other_are_refused() {
    for (body, path, text) in [
        (
            json!({"lora_r": 8, "r": 8}),
            "r",
            "lora_r and r are the same setting",
        ),
        (
            json!({"learning_rate": 1e-3, "learning_rate_multiplier": 2}),
            "learning_rate_multiplier",
            "exclude each other",
        ),
        (
            json!({"warmup_steps": 3, "warmup_ratio": 0.1}),
            "warmup_ratio",
            "exclude each other",
        ),
        (
            json!({"learning_rate": 0.1, "momentum": 0.9}),
            "momentum",
            "belongs to optim sgd, not to adamw_torch",
        ),
        (
            json!({"optim": "sgd", "learning_rate": 0.1, "nesterov": true}),
            "nesterov",
            "give momentum",
        ),
        (
            json!({"optim": "adafactor", "learning_rate": 0.1, "adam_beta1": 0.8}),
            "adam_beta1",
            "adamw_torch and lion_32bit",
        ),
        (
            json!({"optim": "lion"}),
            "optim",
            "lion_32bit wants a learning_rate",
        ),
        (json!({"beta": 0.1}), "beta", "read by objective dpo, kto"),
        (
            json!({"lr_scheduler_type": "cosine", "power": 2}),
            "power",
            "belongs to lr_scheduler_type polynomial, not to cosine",
        ),
        (
            json!({"gamma": 0.9, "num_cycles": 2}),
            "gamma",
            "not to cosine_with_restarts",
        ),
        (
            json!({"objective": "sft", "label_smoothing": 0.1}),
            "label_smoothing",
            "not by sft",
        ),
        (
            json!({"objective": "dpo", "loss_type": "simpo"}),
            "loss_type",
            "of dpo must be one of sigmoid",
        ),
        (
            json!({"objective": "dpo", "loss_type": "ipo", "label_smoothing": 0.1}),
            "label_smoothing",
            "leave it out",
        ),
        (
            json!({"objective": "dpo", "loss_type": "exo_pair", "label_smoothing": 0}),
            "label_smoothing",
            "above 0",
        ),
        (
            json!({"objective": "cpo", "simpo_gamma": 0.5}),
            "simpo_gamma",
            "loss_type simpo",
        ),
        (
            json!({"objective": "orpo", "packing": true}),
            "packing",
            "leave it out",
        ),
        (
            json!({"packing_strategy": "wrapped", "packing": false}),
            "packing_strategy",
            "leave one of them out",
        ),
        (
            json!({"objective": "dpo", "train_on_input": true}),
            "train_on_input",
            "leave it out",
        ),
        (
            json!({"objective": "kto", "batch_size": 1}),
            "batch_size",
            "at least 2",
        ),
    ] {
        let error = asked(body).unwrap_err();
        assert_eq!(error.path, path);
        assert!(error.message.contains(text), "{}", error.message);
    }
    // The pair of a tutorial that many follow.
    let constant = asked(json!({"lr_scheduler_type": "constant", "warmup_ratio": 0.03})).unwrap();
    assert!(constant.notes()[0].contains("warmup_ratio changes nothing"));
    let without = asked(json!({"lr_scheduler_type": "constant", "warmup_steps": 0})).unwrap();
    assert_eq!(without.notes(), [""; 0]);
    let clips = |clips: Value| asked(json!({"gradient_clipping": clips, "gradient_clipping_threshold": 0.5}));
    assert_eq!(clips(true.into()).unwrap().max_grad_norm, Some(0.5));
    assert_eq!(clips(false.into()).unwrap().max_grad_norm, Some(0.0));
    assert!(asked(json!({"gradient_clipping": false, "max_grad_norm": 1})).is_err());
    let places = [
        ("", json!({"epochs": 2})),
        ("hyperparameters.", json!({"n_epochs": 2})),
    ];
    let places = places.map(|(place, values)| (place, values.as_object().unwrap().clone()));
    let error = read(places, false).unwrap_err();
    assert_eq!(
        error.message,
        "epochs and hyperparameters.n_epochs are the same setting: give one of them"
    );
}

enum Is {
    /// It comes out as this setting.
    Honoured(&'static str),
    Harmless,
    /// The message says this.
    Refused(&'static str),
    /// The message suggests this.
    Unknown(&'static str),
}
use Is::{Harmless, Honoured, Unknown};

/// What the field's users write. The defaults of transformers' TrainingArguments, TRL's SFTConfig and ModelConfig and
/// PEFT's LoraConfig stand beside values that ask for something else.
/// transformers' optim_args, and its defaults of AdamW beside another optimizer.
#[test]
fn an_optimizer_is_what_was_asked() {
    let read = |body| asked(body).map(|settings| settings.optimizer());
    let sgd = json!({"optim": "SGD", "learning_rate": 0.1, "adam_beta1": 0.9, "optim_args": "momentum=0.9, nesterov=True"});
    let expected = Optimizer::Sgd {
        momentum: 0.9,
        nesterov: true,
    };
    assert_eq!(read(sgd), Ok(expected));
    for (name, expected) in [
        ("adamw_torch_fused", Optimizer::AdamW),
        ("paged_adamw_32bit", Optimizer::AdamW),
        ("paged_adamw_8bit", Optimizer::AdamW8bit),
        ("adamw_bnb_8bit", Optimizer::AdamW8bit),
        ("paged_lion_32bit", Optimizer::Lion),
    ] {
        assert_eq!(read(json!({"optim": name, "learning_rate": 0.1})), Ok(expected));
    }
    let refused = read(json!({"optim": "adamw_torch", "optim_args": "rank=8"})).unwrap_err();
    assert_eq!(refused.path, "optim_args");
}

#[test]
fn what_the_field_asks_is_honoured_harmless_or_refused() {
    #[rustfmt::skip] // one case, one line
    let cases = [
        // transformers.TrainingArguments, in the order of its fields.
        ("output_dir", json!("out"), Is::Refused("model name")),
        ("per_device_train_batch_size", json!(8), Honoured("batch_size")),
        ("num_train_epochs", json!(3.0), Honoured("n_epochs")),
        ("num_train_epochs", json!(1.5), Honoured("n_epochs")),
        ("max_steps", json!(-1), Harmless),
        ("max_steps", json!(100), Honoured("max_steps")),
        ("learning_rate", json!(5e-5), Honoured("learning_rate")),
        ("lr_scheduler_type", json!("linear"), Honoured("lr_scheduler_type")),
        ("lr_scheduler_type", json!("polynomial"), Honoured("lr_scheduler_type")),
        ("lr_scheduler_type", json!("reduce_lr_on_plateau"), Is::Refused("one of constant, constant_with_warmup, linear, cosine")),
        ("lr_scheduler_kwargs", json!({}), Harmless),
        ("lr_scheduler_kwargs", json!({"num_cycles": 2}), Honoured("num_cycles")),
        ("lr_scheduler_kwargs", json!({"min_lr_rate": 0.1}), Is::Refused("named settings")),
        ("warmup_steps", json!(0), Honoured("warmup_steps")),
        ("warmup_steps", json!(0.1), Honoured("warmup_ratio")),
        ("warmup_steps", json!(1.5), Is::Refused("an integer")),
        ("warmup_ratio", json!(0.1), Honoured("warmup_ratio")),
        ("optim", json!("adamw_torch_fused"), Honoured("optim")),
        ("optim", json!("muon"), Is::Refused("adamw_torch")),
        ("optim", json!("paged_adamw_8bit"), Honoured("optim")),
        ("relative_step", json!(true), Is::Refused("learning_rate")),
        ("dampening", json!(0.1), Is::Refused("without dampening")),
        ("optim_args", json!("rank=8"), Is::Refused("")),
        ("optim_target_modules", json!(["attn"]), Is::Refused("")),
        ("weight_decay", json!(0.01), Honoured("weight_decay")),
        ("adam_beta1", json!(0.8), Honoured("adam_beta1")),
        ("adam_beta2", json!(0.95), Honoured("adam_beta2")),
        ("adam_epsilon", json!(1e-6), Honoured("adam_epsilon")),
        ("gradient_accumulation_steps", json!(4), Honoured("gradient_accumulation_steps")),
        ("average_tokens_across_devices", json!(true), Harmless),
        ("max_grad_norm", json!(1.0), Honoured("max_grad_norm")),
        ("label_smoothing_factor", json!(0.0), Harmless),
        ("label_smoothing_factor", json!(0.1), Is::Refused("cross-entropy")),
        ("bf16", json!(true), Harmless),
        ("fp16", json!(false), Harmless),
        ("fp16", json!(true), Is::Refused("nothing is computed in float16")),
        ("mixed_precision", json!("bf16"), Harmless),
        ("mixed_precision", json!(true), Harmless),
        ("mixed_precision", json!("fp16"), Is::Refused("leave it out")),
        ("tf32", json!(true), Harmless),
        ("activation_checkpointing", json!(true), Harmless),
        ("gradient_checkpointing", json!(true), Harmless),
        ("gradient_checkpointing_kwargs", json!({"use_reentrant": false}), Harmless),
        ("torch_compile", json!(true), Harmless),
        ("use_liger_kernel", json!(true), Harmless),
        ("use_cache", json!(false), Harmless),
        ("neftune_noise_alpha", json!(5), Honoured("neftune_noise_alpha")),
        ("loraplus_lr_ratio", json!(16), Honoured("loraplus_lr_ratio")),
        ("torch_empty_cache_steps", json!(1), Harmless),
        ("auto_find_batch_size", json!(false), Harmless),
        ("auto_find_batch_size", json!(true), Is::Refused("batch_size")),
        ("logging_strategy", json!("steps"), Harmless),
        ("logging_steps", json!(500), Harmless),
        ("logging_first_step", json!(false), Harmless),
        ("log_level", json!("passive"), Harmless),
        ("disable_tqdm", json!(true), Harmless),
        ("report_to", json!("none"), Harmless),
        ("report_to", json!([]), Harmless),
        ("report_to", json!(["tensorboard"]), Harmless),
        ("report_to", json!(["wandb"]), Is::Refused("events")),
        ("run_name", json!("mine"), Harmless),
        ("project", json!("huggingface"), Harmless),
        ("trackio_space_id", json!("me/space"), Is::Refused("events")),
        ("eval_strategy", json!("no"), Is::Refused("leave it out")),
        ("eval_strategy", json!("epoch"), Harmless),
        ("eval_strategy", json!("steps"), Is::Refused("eval_steps")),
        ("eval_steps", json!(50), Honoured("eval_steps")),
        ("eval_steps", json!(0.1), Is::Refused("an integer")),
        ("eval_delay", json!(0), Harmless),
        ("eval_delay", json!(10), Is::Refused("first")),
        ("per_device_eval_batch_size", json!(8), Harmless),
        ("eval_on_start", json!(true), Is::Refused("first")),
        ("eval_accumulation_steps", json!(2), Harmless),
        ("include_for_metrics", json!(["inputs"]), Is::Refused("")),
        ("save_only_model", json!(false), Harmless),
        ("save_strategy", json!("steps"), Honoured("save_strategy")),
        ("save_strategy", json!("epoch"), Honoured("save_strategy")),
        ("save_strategy", json!("best"), Honoured("save_strategy")),
        ("save_strategy", json!("no"), Honoured("save_strategy")),
        ("save_steps", json!(500), Honoured("save_steps")),
        ("save_total_limit", json!(2), Honoured("save_total_limit")),
        ("save_total_limit", json!(0), Harmless),
        ("push_to_hub", json!(false), Harmless),
        ("push_to_hub", json!(true), Is::Refused("nothing is pushed")),
        ("hub_strategy", json!("every_save"), Harmless),
        ("load_best_model_at_end", json!(false), Honoured("load_best_model_at_end")),
        ("load_best_model_at_end", json!(true), Honoured("load_best_model_at_end")),
        ("metric_for_best_model", json!("loss"), Honoured("metric_for_best_model")),
        ("metric_for_best_model", json!("eval_bleu"), Is::Refused("one of loss")),
        ("greater_is_better", json!(true), Honoured("greater_is_better")),
        ("ignore_data_skip", json!(false), Harmless),
        ("full_determinism", json!(true), Harmless),
        ("seed", json!(42), Honoured("seed")),
        ("data_seed", json!(42), Honoured("seed")),
        ("use_cpu", json!(false), Harmless),
        ("use_cpu", json!(true), Is::Refused("--device")),
        ("accelerator_config", json!({"split_batches": true}), Is::Refused("--tensor-parallel-size")),
        ("dataloader_drop_last", json!(true), Is::Refused("every row")),
        ("dataloader_num_workers", json!(4), Harmless),
        ("remove_unused_columns", json!(false), Harmless),
        ("label_names", json!(["labels"]), Is::Refused("rows")),
        ("train_sampling_strategy", json!("random"), Harmless),
        ("train_sampling_strategy", json!("sequential"), Honoured("shuffle")),
        ("train_sampling_strategy", json!("group_by_length"), Is::Refused("order")),
        ("shuffle", json!(false), Honoured("shuffle")),
        ("disable_shuffling", json!(true), Honoured("shuffle")),
        ("group_by_length", json!(true), Harmless),
        ("ddp_find_unused_parameters", json!(false), Harmless),
        ("fsdp", json!(""), Harmless),
        ("fsdp", json!("full_shard"), Is::Refused("--tensor-parallel-size")),
        ("deepspeed", json!("ds.json"), Is::Refused("FULL_SHARD")),
        ("debug", json!(""), Harmless),
        ("do_train", json!(true), Harmless),
        ("do_predict", json!(true), Is::Refused("ask")),
        ("resume_from_checkpoint", json!("out/checkpoint-10"), Honoured("from_peft_checkpoint")),
        ("local_rank", json!(-1), Harmless),
        ("overwrite_output_dir", json!(true), Is::Refused("output_dir")),
        // trl.SFTConfig and trl.ModelConfig.
        ("model_init_kwargs", json!({"dtype": "bfloat16"}), Is::Refused("model")),
        ("trust_remote_code", json!(true), Harmless),
        ("chat_template_path", json!("t.jinja"), Is::Refused("tandem serve --chat-template")),
        ("dataset_text_field", json!("content"), Honoured("dataset_text_field")),
        ("dataset_kwargs", json!({"skip_prepare_dataset": true}), Is::Refused("training_file")),
        ("dataset_num_proc", json!(4), Harmless),
        ("eos_token", json!("<|im_end|>"), Is::Refused("tokenizer.json")),
        ("max_length", json!(1024), Honoured("max_seq_length")),
        ("max_seq_length", json!(1024), Honoured("max_seq_length")),
        ("truncation_mode", json!("keep_end"), Is::Refused("start")),
        ("shuffle_dataset", json!(true), Harmless),
        ("shuffle_dataset", json!(false), Harmless),
        ("packing", json!(false), Honoured("packing")),
        ("packing", json!(true), Honoured("packing")),
        ("packing_strategy", json!("bfd"), Honoured("packing_strategy")),
        ("packing_strategy", json!("wrapped"), Honoured("packing_strategy")),
        ("padding_free", json!(true), Harmless),
        ("eval_packing", json!(true), Harmless),
        ("completion_only_loss", json!(true), Harmless),
        ("completion_only_loss", json!(false), Is::Refused("prompt_loss_weight")),
        ("assistant_only_loss", json!(true), Harmless),
        ("assistant_only_loss", json!(false), Is::Refused("assistant")),
        ("loss_type", json!("nll"), Honoured("loss_type")),
        ("loss_type", json!("dft"), Is::Refused("one of sigmoid")),
        ("activation_offloading", json!(true), Harmless),
        ("model_name_or_path", json!("m"), Is::Refused("model names the base")),
        ("dtype", json!("float32"), Is::Refused("--dtype")),
        ("attn_implementation", json!("flash_attention_2"), Harmless),
        ("use_peft", json!(true), Harmless),
        ("use_peft", json!(false), Is::Refused("method=full")),
        ("lora_target_parameters", json!(["x"]), Is::Refused("lora_target_modules")),
        ("lora_modules_to_save", json!(["lm_head"]), Is::Refused("LoRA matrices")),
        ("lora_task_type", json!("CAUSAL_LM"), Harmless),
        ("lora_task_type", json!("SEQ_CLS"), Is::Refused("causal")),
        ("load_in_8bit", json!(false), Harmless),
        ("load_in_4bit", json!(true), Is::Refused("--quantization nf4")),
        ("bnb_4bit_quant_type", json!("nf4"), Harmless),
        // peft.LoraConfig.
        ("peft_type", json!("LORA"), Harmless),
        ("peft_type", json!("IA3"), Is::Refused("LoRA")),
        ("r", json!(8), Honoured("lora_r")),
        ("target_modules", json!("all-linear"), Honoured("lora_target_modules")),
        ("target_modules", json!([]), Is::Refused("a list of module names")),
        ("exclude_modules", json!(["lm_head"]), Is::Refused("lora_target_modules")),
        ("lora_alpha", json!(16), Honoured("lora_alpha")),
        ("lora_dropout", json!(0.05), Honoured("lora_dropout")),
        ("lora_dropout", json!(1.0), Is::Refused("below 1")),
        ("fan_in_fan_out", json!(false), Harmless),
        ("bias", json!("none"), Harmless),
        ("bias", json!("all"), Is::Refused("none")),
        ("use_rslora", json!(true), Honoured("use_rslora")),
        ("modules_to_save", json!(["embed_tokens"]), Is::Refused("leave it out")),
        ("init_lora_weights", json!(true), Harmless),
        ("init_lora_weights", json!("pissa"), Is::Refused("zero")),
        ("layers_to_transform", json!([0, 1]), Is::Refused("every layer")),
        ("rank_pattern", json!({}), Harmless),
        ("rank_pattern", json!({"q_proj": 4}), Is::Refused("plain LoRA")),
        ("loftq_config", json!({}), Harmless),
        ("use_dora", json!(true), Honoured("use_dora")),
        ("use_qalora", json!(true), Is::Refused("plain LoRA")),
        ("layer_replication", json!([[0, 4]]), Is::Refused("plain LoRA")),
        ("task_type", json!("CAUSAL_LM"), Harmless),
        ("inference_mode", json!(false), Harmless),
        // torchtune, llama-recipes, axolotl, LLaMA-Factory, Together, OpenAI.
        ("epochs", json!(1), Honoured("n_epochs")),
        ("num_epochs", json!(1), Honoured("n_epochs")),
        ("lr", json!(1e-4), Honoured("learning_rate")),
        ("clip_grad_norm", json!(1.0), Honoured("max_grad_norm")),
        ("packed", json!(true), Honoured("packing")),
        ("lora_rank", json!(8), Honoured("lora_r")),
        ("optimizer", json!({"_component_": "torch.optim.AdamW", "lr": 1e-4}), Is::Refused("adamw_torch")),
        ("batch_size_training", json!(4), Honoured("batch_size")),
        ("freeze_layers", json!(true), Is::Refused("every layer")),
        ("batching_strategy", json!("padding"), Harmless),
        ("batching_strategy", json!("packing"), Is::Refused("packing_strategy: wrapped")),
        ("gamma", json!(0.85), Honoured("gamma")),
        ("micro_batch_size", json!(2), Honoured("batch_size")),
        ("sample_packing", json!(true), Honoured("packing")),
        ("adapter", json!("qlora"), Is::Refused("LoRA")),
        ("val_set_size", json!(0.1), Is::Refused("validation_file")),
        ("cutoff_len", json!(512), Honoured("max_seq_length")),
        ("lora_target", json!("q_proj,v_proj"), Honoured("lora_target_modules")),
        ("lora_trainable_modules", json!("all-linear"), Honoured("lora_target_modules")),
        ("train_on_inputs", json!(false), Honoured("train_on_input")),
        ("train_on_inputs", json!(true), Honoured("train_on_input")),
        ("column_map", json!({"dialogue": "document", "output": "summary"}), Honoured("column_map")),
        ("template", json!("torchtune.data.SummarizeTemplate"), Honoured("template")),
        ("conversation_style", json!("sharegpt"), Harmless),
        ("split", json!("train[:1%]"), Honoured("split")),
        ("from_checkpoint", json!("ft-1"), Honoured("from_peft_checkpoint")),
        ("from_peft_checkpoint", json!(true), Is::Refused("a name")),
        ("n_checkpoints", json!(3), Is::Refused("save_steps")),
        ("early_stopping_patience", json!(3), Honoured("early_stopping_patience")),
        ("early_stopping_patience", json!(0), Harmless),
        ("early_stopping", json!(true), Is::Refused("early_stopping_patience")),
        ("training_type", json!({"type": "Lora"}), Is::Refused("lora_r")),
        ("wandb_api_key", json!("x"), Is::Refused("events")),
        ("beta", json!(0.1), Honoured("beta")),
        ("integrations", json!([]), Harmless),
        ("integrations", json!([{"type": "wandb"}]), Is::Refused("events")),
        ("compute_classification_metrics", json!(false), Harmless),
        ("compute_classification_metrics", json!(true), Is::Refused("classification")),
        ("learning_rate_multiplier", json!(0.1), Honoured("learning_rate_multiplier")),
        ("prompt_loss_weight", json!(0.01), Honoured("prompt_loss_weight")),
        // Nobody's.
        ("n_epoch", json!(1), Unknown("n_epochs")),
        ("learning-rate", json!(1), Unknown("learning_rate")),
        ("lora_ranks", json!(1), Unknown("lora_rank")),
        ("zzz", json!(1), Unknown("Unknown parameter: 'zzz'")),
    ];
    for (name, value, is) in cases {
        let got = one(name, value.clone());
        let case = format!("{name}: {value} gives {got:?}");
        match (is, got) {
            (Honoured(setting), Ok(settings)) => {
                assert!(
                    !serde_json::to_value(settings).unwrap()[setting].is_null(),
                    "{case}"
                );
            }
            (Harmless, Ok(settings)) => assert_eq!(settings, Settings::default(), "{case}"),
            (Is::Refused(text), Err(Refused { path, why, message })) => {
                assert!(
                    why != Why::Unknown && path == name && message.contains(text),
                    "{case}"
                );
            }
            (Unknown(text), Err(Refused { why, message, .. })) => {
                assert!(why == Why::Unknown && message.contains(text), "{case}");
            }
            _ => panic!("{case}"),
        }
    }
    for (body, is_fine) in [
        (json!({"eval_strategy": "steps", "eval_steps": 5}), true),
        (json!({"eval_strategy": "epoch", "eval_steps": 5}), false),
        (json!({"save_strategy": "no", "save_steps": 0}), true),
        (json!({"save_strategy": "epoch", "save_steps": 5}), false),
        (json!({"save_strategy": "steps", "save_steps": 5}), true),
        (json!({"metric_for_best_model": "rewards/margins"}), false),
        (
            json!({"metric_for_best_model": "rewards/margins", "objective": "kto"}),
            true,
        ),
        (
            json!({"metric_for_best_model": "rewards/accuracies", "objective": "kto"}),
            false,
        ),
        (json!({"warmup_steps": 0.1, "warmup_ratio": 0.1}), false),
        (
            json!({"shuffle": true, "train_sampling_strategy": "sequential"}),
            false,
        ),
        (json!({"batching_strategy": "packing", "packing": true}), false),
        (
            json!({"batching_strategy": "packing", "packing_strategy": "wrapped"}),
            true,
        ),
        (
            json!({"train_on_input": true, "assistant_only_loss": false}),
            true,
        ),
        (
            json!({"train_on_input": true, "completion_only_loss": true}),
            false,
        ),
        (
            json!({"completion_only_loss": true, "prompt_loss_weight": 0.5}),
            false,
        ),
    ] {
        assert_eq!(asked(body.clone()).is_ok(), is_fine, "{body}");
    }
    for (body, is_fine) in [
        (json!({"eval_strategy": "no"}), true),
        (
            json!({"metric_for_best_model": "eval_loss", "greater_is_better": false}),
            true,
        ),
        (json!({"load_best_model_at_end": false}), true),
        (json!({"load_best_model_at_end": true}), false),
        (json!({"early_stopping_patience": 2}), false),
        (json!({"save_strategy": "best"}), false),
    ] {
        let read = read([("", body.as_object().unwrap().clone())], false);
        assert_eq!(read.is_ok(), is_fine, "{body}");
        assert!(
            read.map_or_else(|error| error.message.contains("validation_file"), |_| true),
            "{body}"
        );
    }
}
