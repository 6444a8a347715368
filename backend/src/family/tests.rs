//! Folders as users have them: which config.json and which tensors are taken, and what is said of the others.

use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use tandem_kernels::rope::RopeScaling;
use tempfile::TempDir;

use super::{DecoderSpec, Head, open, read_spec};
use crate::weights::{Checkpoint, HEAD};

/// As transformers 5.23 saves a LlamaConfig, tiny.
fn saved() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1,
        "dtype": "float32", "eos_token_id": 2, "head_dim": 8, "hidden_act": "silu", "hidden_size": 16,
        "initializer_range": 0.02, "intermediate_size": 24, "max_position_embeddings": 128, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1,
        "pad_token_id": null, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": false,
        "transformers_version": "5.23.0", "use_cache": true, "vocab_size": 40
    })
}

/// `saved` with some fields set and those that are `"absent"` left out.
fn patched(patch: &Value) -> Value {
    let mut config = saved();
    let fields = config.as_object_mut().unwrap();
    for (field, value) in patch.as_object().unwrap() {
        match value.as_str() {
            Some("absent") => fields.remove(field),
            _ => fields.insert(field.clone(), value.clone()),
        };
    }
    config
}

fn folder(config: &Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

#[test]
fn a_field_is_honoured_or_refused_with_what_it_is() {
    let llama3 = |extra: Value| {
        let mut rope =
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
        rope.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        rope
    };
    let linear = json!({"rope_type": "linear", "factor": 2.0});
    // The patch, and a part of the error.
    #[rustfmt::skip] // one case, one line
    let cases = [
        (json!({"architectures": ["BloomForCausalLM"]}), "`architectures`: only LlamaForCausalLM, MistralForCausalLM,"),
        (json!({"architectures": ["BloomForCausalLM"]}), "are supported (it is [\"BloomForCausalLM\"])"),
        (json!({"architectures": ["LlamaForCausalLM", "Other"]}), "a list of one architecture"),
        (json!({"model_type": "mistral"}), "`model_type`: transformers would make another model of it than the LlamaForCausalLM"),
        (json!({"architectures": "absent", "model_type": "bloom"}), "are supported (it is \"bloom\")"),
        (json!({"architectures": "absent", "model_type": "absent"}), "`model_type`: llama, mistral, "),
        (json!({"sliding_window": 64}), "`max_position_embeddings` 64 or less (of 128)"),
        (json!({"sliding_window": 64, "use_sliding_window": true}), "`sliding_window`"),
        (json!({"final_logit_softcapping": 30.0}), "a cap on logits; this family has none here (it is 30.0)"),
        (json!({"logits_scaling": 8.0}), "a factor on logits"),
        (json!({"num_local_experts": 8}), "experts"),
        (json!({"layer_types": ["full_attention", "sliding_attention"]}), "layers of different kinds"),
        (json!({"per_layer_config": {"0": {"intermediate_size": 8}}}), "layers that differ"),
        (json!({"is_causal": false}), "both directions"),
        (json!({"partial_rotary_factor": 0.5}), "a head rotated in part"),
        (json!({"hidden_act": "mish"}), "relu and relu2 are supported (it is \"mish\")"),
        (json!({"num_key_value_heads": 3}), "2 attention heads are not a multiple of it"),
        (json!({"head_dim": 7}), "7 is odd"),
        (json!({"hidden_size": 16.5}), "a whole number"),
        (json!({"tie_word_embeddings": "yes"}), "true or false"),
        (json!({"rms_norm_eps": -1e-5}), "a number from 0"),
        (json!({"rope_parameters": {"rope_type": "ntk", "factor": 4.0}}), "`rope_parameters.rope_type`: ntk is not supported; default, linear, dynamic, llama3, yarn, longrope are"),
        (json!({"rope_scaling": {"type": "dynamic"}}), "`rope_scaling`: `factor` is missing"),
        (json!({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}), "`rope_scaling.short_factor`: a list of 4 numbers above 0"),
        (json!({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "layer_types": ["full_attention"]}), "`layer_types`: 1 words for 2 layers"),
        (json!({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]}), "not \"chunked_attention\""),
        (json!({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_window_layers": -1}), "`max_window_layers`: a whole number from 0"),
        (json!({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}), "an object for each of `full_attention` and `sliding_attention` is needed"),
        (json!({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "rope_parameters": "absent", "attn_logit_softcapping": 50.0}), "a cap on attention"),
        (json!({"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "use_bidirectional_attention": true}), "both directions"),
        (json!({"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "partial_rotary_factor": 0.4}), "makes 3 of 8 dimensions turn"),
        (json!({"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "no_rope_layers": [1]}), "a number for each of 2 layers"),
        (json!({"architectures": ["GraniteForCausalLM"], "model_type": "granite", "logits_scaling": 0}), "`logits_scaling`: a number above 0"),
        (json!({"rope_scaling": {"factor": 2.0}}), "`rope_scaling`: `rope_type` is missing"),
        (json!({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}), "`rope_scaling.type`: contradicts `rope_type` llama3"),
        (json!({"rope_scaling": {"type": "linear"}}), "`factor` is missing"),
        (json!({"rope_scaling": {"type": "linear", "factor": 0}}), "`rope_scaling.factor`: a number above 0"),
        (json!({"rope_scaling": "linear"}), "an object is needed"),
        (json!({"rope_theta": -1, "rope_parameters": "absent"}), "`rope_theta`: a number above 0"),
        (json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}), "`rope_type` is missing: one of default"),
        (json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}), "only whole heads"),
        (json!({"rope_scaling": llama3(json!({"high_freq_factor": 1.0}))}), "must be above low_freq_factor 1"),
        (json!({"eos_token_id": -1}), "a token id"),
    ];
    for (patch, expected) in cases {
        let folder = folder(&patched(&patch));
        let error = read_spec(folder.path())
            .expect_err(&patch.to_string())
            .to_string();
        assert!(
            error.contains(expected) && error.starts_with("config.json"),
            "{patch}: {error}"
        );
    }

    // The patch, what is to be seen, and a part of each note.
    type Seen = fn(&DecoderSpec) -> bool;
    let original = |spec: &DecoderSpec| match spec.ropes[0].scaling {
        RopeScaling::Llama3 {
            original_max_position_embeddings,
            ..
        } => original_max_position_embeddings,
        _ => 0,
    };
    assert_eq!(
        original(&read_spec(folder(&patched(&json!({"rope_scaling": llama3(json!({}))}))).path()).unwrap()),
        128
    );
    let fine: Seen =
        |spec| spec.max_positions == 128 && spec.attentions().count() == 2 && spec.head == Head::Own;
    #[rustfmt::skip] // one case, one line
    let cases: [(Value, Seen, &[&str]); 23] = [
        (json!({}), fine, &[]),
        (json!({"architectures": "absent", "hidden_act": "absent"}), fine, &[]),
        (json!({"architectures": null, "model_type": "llama"}), fine, &[]),
        (json!({"model_type": "absent"}), fine, &[]),
        (json!({"max_position_embeddings": "absent", "rms_norm_eps": "absent"}), |spec| spec.max_positions == 2048 && spec.final_norm.eps == 1e-6, &[]),
        (json!({"sliding_window": 128}), fine, &[]),
        (json!({"rope_parameters": "absent", "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}), |spec| spec.max_positions == 512, &[]),
        (json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}), |spec| spec.max_positions == 128, &[]),
        (json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, "original_max_position_embeddings": 64}), |spec| spec.max_positions == 256, &[]),
        (json!({"sliding_window": 64, "use_sliding_window": false}), fine, &[]),
        (json!({"sliding_window": 0, "use_sliding_window": false}), fine, &[]),
        (json!({"sliding_window": null, "layer_types": ["full_attention", "full_attention"], "num_local_experts": 0, "logits_scaling": 1.0}), fine, &[]),
        (json!({"temperature": 0.6, "_name_or_path": "x", "id2label": {"0": "A"}}), fine, &[]),
        (json!({"attention_dropout": 0.1}), fine, &["`attention_dropout` is 0.1"]),
        (json!({"mystery": 3, "other": true, "quiet": false}), fine, &["not known here and not honoured: `mystery`, `other`"]),
        (json!({"rope_scaling": linear}), |spec| matches!(spec.ropes[0].scaling, RopeScaling::Linear { factor: 2.0 }), &["`rope_scaling` is taken"]),
        (json!({"rope_scaling": {}, "rope_theta": 5e5}), |spec| spec.ropes[0].theta == 1e4, &["`rope_theta` 500000 is not taken: `rope_parameters.rope_theta` 10000 is"]),
        (json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_scaling": linear}), |spec| spec.ropes[0].theta == 1e4, &["rope_theta included"]),
        (json!({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}), |spec| spec.ropes[0].theta == 5e5, &[]),
        (json!({"rope_parameters": "absent"}), |spec| spec.ropes[0].theta == 1e4, &[]),
        (json!({"rope_parameters": {"rope_type": "default", "factor": 2.0}}), fine, &["`rope_parameters.factor`"]),
        (json!({"rope_scaling": llama3(json!({"original_max_position_embeddings": 64}))}), |spec| matches!(spec.ropes[0].scaling, RopeScaling::Llama3 { original_max_position_embeddings: 64, .. }), &["`rope_scaling` is taken"]),
        (json!({"rope_parameters": llama3(json!({"original_max_position_embeddings": 64})), "original_max_position_embeddings": 32}), |spec| matches!(spec.ropes[0].scaling, RopeScaling::Llama3 { original_max_position_embeddings: 32, .. }), &[]),
    ];
    for (patch, seen, notes) in cases {
        let folder = folder(&patched(&patch));
        let spec = read_spec(folder.path()).unwrap_or_else(|error| panic!("{patch}: {error}"));
        assert!(seen(&spec), "{patch}: {spec:?}");
        assert_eq!(spec.notes.len(), notes.len(), "{patch}: {:?}", spec.notes);
        for (note, part) in spec.notes.iter().zip(notes) {
            assert!(note.contains(part), "{patch}: {note}");
        }
    }
}

/// Each with the keys and numbers of a published checkpoint of the family.
#[test]
fn configs_are_read_as_they_are_published() {
    let published: Map<String, Value> = serde_json::from_str(include_str!("published.json")).unwrap();
    let mut refused = vec![];
    for (name, config) in &published {
        match read_spec(folder(config).path()) {
            Ok(spec) => refused.extend(
                spec.notes
                    .into_iter()
                    .filter(|note| note.contains("not known here")),
            ),
            Err(error) => refused.push(format!("{name}: {error}")),
        }
    }
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

/// Parts of the notes, or of the error.
type Outcome = Result<&'static [&'static str], &'static str>;

/// A tensor to write: name, shape, numbers (one for all).
type Stored = (String, Vec<i64>, f32);

fn model(spec: &DecoderSpec) -> Vec<Stored> {
    tensors(spec)
        .into_iter()
        .map(|(name, shape)| (name, shape, 0.5))
        .collect()
}

/// Name and shape of every tensor.
fn tensors(spec: &DecoderSpec) -> Vec<(String, Vec<i64>)> {
    let params = spec.params().into_iter();
    let each = params.flat_map(|param| {
        let row = param.shape[1..].to_vec();
        let tensors = param.tensors.into_iter();
        tensors.map(move |source| (source.name, [&[source.rows], row.as_slice()].concat()))
    });
    each.collect()
}

fn write(folder: &Path, file: &str, tensors: &[Stored]) {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape, number)| {
            number
                .to_le_bytes()
                .repeat(shape.iter().product::<i64>() as usize)
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        let shape = shape.iter().map(|&n| n as usize).collect();
        (name, TensorView::new(Dtype::F32, shape, bytes).unwrap())
    });
    std::fs::write(folder.join(file), safetensors::serialize(views, None).unwrap()).unwrap();
}

fn write_index(folder: &Path, files: &[&str]) {
    let map: Map<String, Value> = files
        .iter()
        .map(|file| (format!("in {file}"), json!(file)))
        .collect();
    let index = json!({"weight_map": map}).to_string();
    std::fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
}

#[test]
fn every_tensor_has_a_reader_and_every_number_is_one() {
    let extra = |name: &str| (name.to_owned(), vec![16], 0.5);
    let layer = "model.layers.0.self_attn";
    #[rustfmt::skip] // one case, one line
    let cases: [(Value, Vec<Stored>, Outcome); 11] = [
        (json!({}), vec![], Ok(&[])),
        (json!({}), vec![extra(&format!("{layer}.rotary_emb.inv_freq"))], Ok(&[])),
        (json!({}), vec![extra(&format!("{layer}.q_norm.weight")), extra(&format!("{layer}.k_norm.weight"))], Err("no part of this model: `model.layers.0.self_attn.k_norm.weight`, `model.layers.0.self_attn.q_norm.weight` (config.json describes")),
        (json!({}), vec![extra(&format!("{layer}.q_proj.bias"))], Err("`attention_bias` and `mlp_bias`")),
        (json!({}), vec![extra("model.layers.2.input_layernorm.weight")], Err("`num_hidden_layers` in config.json is 2")),
        (json!({"num_hidden_layers": 3}), vec![], Err("`model.layers.2.input_layernorm.weight` of shape [16] is missing")),
        (json!({}), vec![("model.norm.weight".to_owned(), vec![16], f32::NAN)], Err("`model.norm.weight` holds 16 numbers that are infinite or not a number")),
        (json!({}), vec![(format!("{layer}.v_proj.weight"), vec![8, 16], f32::INFINITY)], Err("v_proj.weight` holds 128 numbers")),
        (json!({}), vec![(HEAD.to_owned(), vec![40, 8], 0.5)], Err("`lm_head.weight` has shape [40, 8], config.json makes it [40, 16]")),
        // A tied table may be stored twice; what differs is taken as it is stored.
        (json!({"tie_word_embeddings": true}), vec![(HEAD.to_owned(), vec![40, 16], 0.5)], Ok(&[])),
        (json!({"tie_word_embeddings": true}), vec![(HEAD.to_owned(), vec![40, 16], 0.25)], Ok(&["the stored head is taken"])),
    ];
    let whole = read_spec(folder(&saved()).path()).unwrap();
    for (patch, stored, expected) in cases {
        let folder = folder(&patched(&patch));
        let mut all = model(&whole);
        all.retain(|(name, ..)| !stored.iter().any(|(other, ..)| other == name));
        all.extend(stored.clone());
        write(folder.path(), "model.safetensors", &all);
        let opened = open(folder.path()).and_then(|(spec, checkpoint)| {
            for (name, shape) in tensors(&spec) {
                let _ = checkpoint.tensor(checkpoint.stored_name(&name, spec.head), &shape)?;
            }
            Ok(spec)
        });
        match (opened, expected) {
            (Ok(spec), Ok(notes)) => {
                let found: Vec<&String> = spec.notes.iter().collect();
                assert_eq!(found.len(), notes.len(), "{patch} {stored:?}: {found:?}");
                assert!(
                    found.iter().zip(notes).all(|(note, part)| note.contains(part)),
                    "{found:?}"
                );
                let differs = stored.iter().any(|(_, _, number)| *number == 0.25);
                assert_eq!(
                    spec.head == Head::Tied,
                    patch["tie_word_embeddings"] == true && !differs
                );
            }
            (Err(error), Err(part)) => {
                let error = error.to_string();
                assert!(
                    error.contains(part) && error.starts_with("model.safetensors"),
                    "{patch} {stored:?}: {error}"
                );
            }
            (opened, expected) => panic!(
                "{patch} {stored:?}: {:?} instead of {expected:?}",
                opened.map(|_| ())
            ),
        }
    }
}

#[test]
fn one_file_goes_before_shards_and_the_last_shard_before_others() {
    let tensor = |number: f32| vec![("a".to_owned(), vec![4], number)];
    let folder = tempfile::tempdir().unwrap();
    let read = || {
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        (
            checkpoint.tensor("a", &[4]).unwrap().double_value(&[0]),
            checkpoint.notes().to_vec(),
        )
    };
    let shards = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    write_index(folder.path(), &shards);
    let error = Checkpoint::open(folder.path())
        .err()
        .expect("no shard is there")
        .to_string();
    assert!(
        error.contains(&format!(
            "cannot read {}",
            folder.path().join(shards[0]).display()
        )),
        "{error}"
    );
    write(folder.path(), shards[0], &tensor(1.0));
    write(folder.path(), shards[1], &tensor(1.0));
    assert_eq!(read(), (1.0, vec![]));
    write(folder.path(), shards[1], &tensor(2.0));
    let (number, notes) = read();
    assert!(
        number == 2.0 && notes[0].contains("`a` is in model-00001") && notes.len() == 1,
        "{notes:?}"
    );
    write(folder.path(), "model.safetensors", &tensor(3.0));
    let (number, notes) = read();
    assert!(
        number == 3.0 && notes[0].starts_with("model.safetensors is taken") && notes.len() == 1,
        "{notes:?}"
    );
    std::fs::write(folder.path().join("model.safetensors.index.json"), "{").unwrap();
    assert_eq!(read().0, 3.0);
    write_index(folder.path(), &["model.safetensors"]);
    assert_eq!(read(), (3.0, vec![]));
}

#[test]
fn what_is_no_model_is_named() {
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name);
    for folder in ["adapter", "gguf", "meta", "empty", "pickled"] {
        std::fs::create_dir(path(folder)).unwrap();
    }
    for file in [
        "file.txt",
        "adapter/adapter_config.json",
        "gguf/x-Q4_K_M.gguf",
        "meta/params.json",
    ] {
        std::fs::write(path(file), "{}").unwrap();
    }
    std::fs::write(path("pickled/config.json"), saved().to_string()).unwrap();
    std::fs::write(path("pickled/pytorch_model.bin"), "").unwrap();
    for (folder, expected) in [
        (path("gguf"), "it holds GGUF files: name the one that is wanted"),
        (path("file.txt"), "it is a file"),
        (path("adapter"), "--lora-modules NAME=FOLDER"),
        (path("meta"), "convert_llama_weights_to_hf.py"),
        (path("empty"), "it has no config.json; transformers writes"),
        (path("nothing"), "there is no such folder"),
        (path("pickled"), "a pickle may run any code"),
    ] {
        let error = open(&folder).err().expect("no model").to_string();
        let shown = folder.display().to_string();
        assert!(error.contains(expected) && error.starts_with(&shown), "{error}");
    }
    std::fs::write(
        path("pickled/model.safetensors"),
        "version https://git-lfs.github.com/spec/v1\noid",
    )
    .unwrap();
    let error = open(&path("pickled")).err().expect("a pointer").to_string();
    assert!(error.contains("git lfs pull"), "{error}");
}
