//! What adapter_config.json means, against what peft 0.21.2 and transformers 5.23.0 made of the same files.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Value, json};
use tandem_core::job::Lora;
use tempfile::TempDir;

use super::config::Config;
use super::{CONFIG, Loaded, PeftConfig, TENSORS, read, write_own};
use crate::family::read_spec;
use crate::lora::params::{AdapterParams, AdapterShape};

/// As peft 0.21.2 writes it.
fn config(patch: &Value) -> Value {
    let mut config = json!({
        "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
        "base_model_name_or_path": null, "bias": "none", "corda_config": null, "ensure_weight_tying": false,
        "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
        "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
        "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 8, "lora_bias": false, "lora_dropout": 0.1,
        "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
        "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4,
        "rank_pattern": {}, "revision": null, "target_modules": ["q_proj", "v_proj"], "target_parameters": null,
        "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null, "use_dora": false,
        "use_qalora": false, "use_rslora": false, "velora_config": null
    });
    let fields = config.as_object_mut().unwrap();
    for (field, value) in patch.as_object().unwrap() {
        match value.as_str() {
            Some("absent") => fields.remove(field),
            _ => fields.insert(field.clone(), value.clone()),
        };
    }
    config
}

fn parse(patch: &Value) -> Result<Config, String> {
    Config::parse(config(patch).as_object().unwrap()).map_err(|error| error.to_string())
}

#[test]
fn a_field_is_honoured_harmless_or_refused() {
    #[rustfmt::skip] // one case, one line
    let refused = [
        (json!({"peft_type": "ADALORA"}), "`peft_type` is \"ADALORA\""),
        (json!({"peft_type": "absent"}), "`peft_type` is missing"),
        (json!({"target_modules": null}), "`target_modules` is missing"),
        (json!({"target_modules": []}), "module names are needed"),
        (json!({"task_type": "SEQ_CLS"}), "another kind of model"),
        (json!({"r": 0}), "`r` is 0"),
        (json!({"lora_alpha": "8"}), "a number that float32 holds is needed"),
        (json!({"lora_alpha": 1e39}), "`lora_alpha` is 1e+39: a number that float32 holds"),
        (json!({"alpha_pattern": {"q_proj": -1e39}}), "a number that float32 holds is needed"),
        (json!({"bias": "all"}), "trained biases are not supported"),
        (json!({"use_qalora": true}), "`use_qalora` is true: not supported"),
        (json!({"lora_bias": true}), "`lora_bias`"),
        (json!({"modules_to_save": ["lm_head"]}), "`modules_to_save`"),
        (json!({"trainable_token_indices": [1]}), "`trainable_token_indices`"),
        (json!({"target_parameters": ["x"]}), "`target_parameters`"),
        (json!({"layer_replication": [[0, 2]]}), "`layer_replication`"),
        (json!({"alora_invocation_tokens": [1]}), "`alora_invocation_tokens`"),
        (json!({"arrow_config": {"top_k": 3}}), "`arrow_config`"),
        (json!({"kasa_config": {"beta": 1}}), "`kasa_config`"),
        (json!({"monteclora_config": {"num_samples": 4}}), "`monteclora_config`"),
        (json!({"use_bdlora": {"nblocks": 2}}), "`use_bdlora`"),
        (json!({"use_qalora": true}), "`use_qalora`"),
        (json!({"init_lora_weights": "pissa"}), "path_initial_model_for_weight_conversion"),
        (json!({"init_lora_weights": "olora"}), "changes the base's weights"),
        (json!({"something_new": 3}), "`something_new` is 3: not supported"),
        (json!({"rank_pattern": {"q_proj": 1.5}}), "a positive whole number is needed"),
        (json!({"alpha_pattern": {"q_proj": "x"}}), "a number that float32 holds is needed"),
        (json!({"alpha_pattern": {"(?=q)q_proj": 1}}), "the regular expression \"(?=q)q_proj\" is not supported: error: look-around"),
        (json!({"rank_pattern": {"q_proj++": 1}}), "has \"++\", which is not supported"),
        (json!({"target_modules": "model.(q_proj"}), "`target_modules`: the regular expression"),
        (json!({"target_modules": ".*q_proj", "layers_to_transform": [0]}), "only a list of target_modules goes with it"),
        (json!({"layers_pattern": "layers"}), "`layers_to_transform` is needed beside it"),
        (json!({"layers_to_transform": ["0"]}), "layer numbers are needed"),
    ];
    for (patch, expected) in refused {
        let error = parse(&patch).err().unwrap_or_else(|| panic!("{patch} is taken"));
        assert!(error.contains(expected), "{patch}: {error}");
    }
    #[rustfmt::skip] // one case, one line
    let taken: [(Value, &[&str]); 8] = [
        (json!({}), &[]),
        (json!({"task_type": null, "bias": null, "rank_pattern": null}), &[]),
        (json!({"runtime_config": {"ephemeral_gpu_offload": false}, "base_model_name_or_path": "x", "revision": "main"}), &[]),
        (json!({"init_lora_weights": "gaussian"}), &[]),
        (json!({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}), &[]),
        (json!({"velora_config": {"num_groups": 64}}), &[]),
        (json!({"something_new": null, "another": false, "third": {}}), &[]),
        (json!({"fan_in_fan_out": true}), &["no effect on this model's linears"]),
    ];
    for (patch, notes) in taken {
        let config = parse(&patch).unwrap_or_else(|error| panic!("{patch}: {error}"));
        assert_eq!(config.notes.len(), notes.len(), "{patch}: {:?}", config.notes);
        assert!(
            config
                .notes
                .iter()
                .zip(notes)
                .all(|(note, part)| note.contains(part)),
            "{:?}",
            config.notes
        );
    }
    // peft's defaults.
    let sparse = parse(&json!({"r": "absent", "lora_alpha": "absent"})).unwrap();
    assert_eq!((sparse.rank("x"), sparse.scale("x")), (8, 1.0));
}

/// Rank and scale of q_proj and v_proj in two layers, 0 where peft makes no LoRA: what get_peft_model made of each patch.
#[test]
fn modules_are_found_as_peft_finds_them() {
    let paths = [(0, "q"), (0, "v"), (1, "q"), (1, "v")];
    let plain = (4, 2.0);
    let none = (0, 0.0);
    #[rustfmt::skip] // one case, one line
    let cases = [
        (json!({"alpha_pattern": {"q_proj": 64, "layers.0.self_attn.q_proj": 1}}), [(4, 16.0), plain, (4, 16.0), plain]),
        (json!({"alpha_pattern": {"layers.0.self_attn.q_proj": 1, "q_proj": 64}}), [(4, 0.25), plain, (4, 16.0), plain]),
        (json!({"rank_pattern": {"q_proj": 2, "model.layers.1.self_attn.q_proj": 3}}), [(2, 4.0), plain, (2, 4.0), plain]),
        (json!({"rank_pattern": {"model.layers.1.self_attn.q_proj": 3, "q_proj": 2}}), [(2, 4.0), plain, (3, 8.0 / 3.0), plain]),
        (json!({"rank_pattern": {"^model.layers.0.self_attn.q_proj": 3}}), [(3, 8.0 / 3.0), plain, plain, plain]),
        (json!({"rank_pattern": {r"layers\.[01]\.self_attn\.(q|v)_proj": 3}}), [(3, 8.0 / 3.0); 4]),
        (json!({"alpha_pattern": {r".*\.1\..*v_proj": 2}}), [plain, plain, plain, (4, 0.5)]),
        (json!({"alpha_pattern": {"proj": 2}}), [plain; 4]),
        (json!({"alpha_pattern": {"._proj": 2}}), [(4, 0.5); 4]),
        (json!({"alpha_pattern": {"q_proj|v_proj": 2}}), [(4, 0.5); 4]),
        (json!({"alpha_pattern": {"Q_PROJ": 2, "(?i:V_PROJ)": 4}}), [plain, (4, 1.0), plain, (4, 1.0)]),
        (json!({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}, "use_rslora": true}), [(2, 4.242640687119285), (4, 4.0), (2, 4.242640687119285), (4, 4.0)]),
        (json!({"alpha_pattern": {"q_proj": -2}}), [(4, -0.5), plain, (4, -0.5), plain]),
        (json!({"target_modules": ["layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]}), [plain, none, none, plain]),
        (json!({"target_modules": ["q_proj", "nonsense"]}), [plain, none, plain, none]),
        (json!({"target_modules": ["j", "_proj"]}), [none; 4]),
        (json!({"target_modules": r"model\.layers\.1\..*(q|k)_proj"}), [none, none, plain, none]),
        (json!({"target_modules": "q_proj|.*0.self_attn.v_proj"}), [none, plain, none, none]),
        (json!({"target_modules": "all-linear"}), [plain; 4]),
        (json!({"exclude_modules": ["layers.0.self_attn.q_proj"]}), [none, plain, plain, plain]),
        (json!({"exclude_modules": r".*0\.self_attn.*"}), [none, none, plain, plain]),
        (json!({"layers_to_transform": [1]}), [none, none, plain, plain]),
        (json!({"layers_to_transform": 0}), [plain, plain, none, none]),
        (json!({"layers_to_transform": [0], "layers_pattern": "layers"}), [plain, plain, none, none]),
        (json!({"layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]}), [plain, plain, none, none]),
        (json!({"layers_to_transform": []}), [plain; 4]),
    ];
    for (patch, expected) in cases {
        let config = parse(&patch).unwrap_or_else(|error| panic!("{patch}: {error}"));
        let found = paths.map(|(layer, name)| {
            let path = format!("model.layers.{layer}.self_attn.{name}_proj");
            match config.targets.hit(&path) {
                true => (config.rank(&path), config.scale(&path)),
                false => none,
            }
        });
        assert_eq!(found, expected, "{patch}");
    }
}

/// Two layers, all seven linears adapted with rank 4, as peft saved it.
fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/numerics/fixtures/head_dim")
}

/// The fixture's adapter with other fields and other names of tensors (`None`: left out).
fn folder(patch: &Value, rename: impl Fn(&str) -> Option<String>) -> TempDir {
    let (from, to) = (fixture().join("adapter-all"), tempfile::tempdir().unwrap());
    let mut config: Value = serde_json::from_slice(&std::fs::read(from.join(CONFIG)).unwrap()).unwrap();
    let patch = patch.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(patch);
    std::fs::write(to.path().join(CONFIG), config.to_string()).unwrap();
    let bytes = std::fs::read(from.join(TENSORS)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let renamed = tensors
        .iter()
        .filter_map(|(name, view)| Some((rename(name)?, view)));
    std::fs::write(
        to.path().join(TENSORS),
        safetensors::serialize(renamed, None).unwrap(),
    )
    .unwrap();
    to
}

#[test]
fn config_and_file_are_of_one_adapter() {
    let spec = read_spec(&fixture()).unwrap();
    let expected = read(&fixture().join("adapter-all"), &spec, 64).unwrap();
    assert!(expected.notes.is_empty(), "{:?}", expected.notes);
    /// Parts of the notes, or of the error.
    type Outcome = Result<&'static [&'static str], &'static str>;
    type Rename = fn(&str) -> Option<String>;
    let same: Rename = |name| Some(name.to_owned());
    let called: Rename = |name| Some(name.replace(".weight", ".default.weight"));
    let without_q: Rename = |name| (!name.contains("q_proj")).then(|| name.to_owned());
    let without_one: Rename = |name| (!name.contains("1.self_attn.q_proj")).then(|| name.to_owned());
    let two: Rename = |name| {
        let adapter = if name.contains("layers.1") {
            ".other.weight"
        } else {
            ".default.weight"
        };
        Some(name.replace(".weight", adapter))
    };
    let with_nonsense = json!([
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "qkv_proj"
    ]);
    #[rustfmt::skip] // one case, one line
    let cases: [(&str, Value, Rename, Outcome); 11] = [
        ("as saved", json!({}), same, Ok(&[])),
        ("saved with the adapter's name", json!({}), called, Ok(&[])),
        ("two adapters", json!({}), two, Err("the tensors of several adapters")),
        ("a target that the model lacks", json!({"target_modules": with_nonsense}), same, Ok(&["is called `qkv_proj`"])),
        ("no target of the model", json!({"target_modules": ["qkv_proj"]}), same, Err("which adapter_config.json does not target")),
        ("a module that is not targeted", json!({"target_modules": ["k_proj"]}), same, Err("has tensors of model.layers.0.self_attn.q_proj, which")),
        ("a layer that is not targeted", json!({"layers_to_transform": [0]}), same, Err("has tensors of model.layers.1.self_attn.q_proj")),
        ("a target without tensors", json!({}), without_q, Err("target module `q_proj` has no tensors")),
        ("a target that is excluded", json!({"exclude_modules": ["q_proj"]}), without_q, Ok(&[])),
        ("a module without tensors", json!({}), without_one, Ok(&["1 targeted modules have no tensors in adapter_model.safetensors and stay as the base has them, model.layers.1.self_attn.q_proj"])),
        ("another rank", json!({"r": 5}), same, Err("has shape [4, 32]; the config and the base model make it [5, 32]")),
    ];
    for (name, patch, rename, outcome) in cases {
        let folder = folder(&patch, rename);
        match (read(folder.path(), &spec, 64), outcome) {
            (Ok(Loaded { params, notes }), Ok(parts)) => {
                assert_eq!(notes.len(), parts.len(), "{name}: {notes:?}");
                assert!(
                    notes.iter().zip(parts).all(|(note, part)| note.contains(part)),
                    "{name}: {notes:?}"
                );
                let same = params.shape == expected.params.shape;
                let has_all = !["a module without tensors", "a target that is excluded"].contains(&name);
                assert!(same == has_all, "{name}");
                assert!(!same || params.flat == expected.params.flat, "{name}");
            }
            (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{name}: {error}"),
            (read, _) => panic!("{name}: {:?}", read.map(|loaded| loaded.notes)),
        }
    }
}

/// An adapter that goes on with ranks, scales and layers of its own is written as what it is, each module by its path.
#[test]
fn an_adapter_of_its_own_shape_is_written_and_read_again() {
    let spec = read_spec(&fixture()).unwrap();
    for use_rslora in [false, true] {
        let lora = Lora {
            r: 5,
            alpha: 7.0,
            dropout: 0.0,
            target_modules: vec!["q_proj".to_owned(), "up_proj".to_owned()],
            use_rslora,
            use_dora: false,
        };
        let scale = |alpha: f64, r: i64| match use_rslora {
            true => alpha / (r as f64).sqrt(),
            false => alpha / r as f64,
        };
        let shape = AdapterShape::build(&spec, |path, _| match path {
            "model.layers.0.self_attn.q_proj" => Some((5, scale(7.0, 5))),
            "model.layers.1.self_attn.q_proj" => Some((3, scale(7.0, 3))),
            "model.layers.1.mlp.up_proj" => Some((2, scale(0.3, 2))),
            _ => None,
        });
        assert!(
            shape.is_within(&AdapterShape::new(&spec, &lora)) && shape != AdapterShape::new(&spec, &lora)
        );
        let params = AdapterParams::init(shape, 7);
        let folder = tempfile::tempdir().unwrap();
        let config = PeftConfig {
            base_model: "base",
            lora: &lora,
        };
        write_own(folder.path(), &params, &config).unwrap();
        let read = read(folder.path(), &spec, 5).unwrap();
        assert!(read.notes.is_empty(), "{:?}", read.notes);
        assert!(read.params.shape == params.shape && read.params.flat == params.flat);
        let config: Value =
            serde_json::from_slice(&std::fs::read(folder.path().join(CONFIG)).unwrap()).unwrap();
        let ranks = json!({"model.layers.1.self_attn.q_proj": 3, "model.layers.1.mlp.up_proj": 2});
        assert_eq!(config["rank_pattern"], ranks);
        assert_eq!(config["alpha_pattern"].as_object().unwrap().len(), 1);
        // And what a run takes over from it.
        let Value::Object(config) = config else {
            panic!("it is an object")
        };
        let tensors = std::fs::read(folder.path().join(TENSORS)).unwrap();
        let start = Lora::of_start(&config, &tensors, &spec.lora_targets()).unwrap();
        assert_eq!(
            (start.r, &start.target_modules, start.use_rslora),
            (5, &lora.target_modules, use_rslora)
        );
    }
}
