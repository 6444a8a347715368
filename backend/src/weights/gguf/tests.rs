//! The types against gguf's own dequantisers, models against the folders that they were converted from, and wrong files
//! with the message that each gives. tests/numerics/make_gguf.py makes the files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use super::names::Undo;
use super::{Model, Stored};
use crate::family::{self, DecoderSpec, Source};
use crate::weights::{Checkpoint, LoadError};

fn fixture(name: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/numerics/fixtures");
    fixtures.join(name)
}

#[test]
fn every_type_is_what_gguf_makes_of_its_bits() {
    let model = Model::open(&fixture("gguf/types.gguf")).unwrap();
    let part = &model.parts[0];
    let expected: BTreeMap<String, Tensor> = Tensor::read_safetensors(fixture("gguf/types.safetensors"))
        .unwrap()
        .into_iter()
        .collect();
    assert_eq!(part.head.tensors.len(), expected.len());
    for tensor in &part.head.tensors {
        let (kind, bytes) = part.place(tensor).unwrap();
        let mut found = vec![0.0; tensor.shape.iter().product::<i64>() as usize];
        let bytes_of = &part.mapped.bytes()[bytes];
        kind.dequantise(bytes_of, &mut found);
        let found = Tensor::from_slice(&found).view(&tensor.shape[..]);
        assert_eq!(kind.name(), tensor.name);
        // Bit by bit.
        assert!(found.equal(&expected[&tensor.name]), "{}", tensor.name);
        // In its bits, as the kernels have it: an offset that takes a shift in rounds once more.
        let stored = Stored {
            kind,
            undo: Undo::Nothing,
        };
        let rows = 0..tensor.shape[0] as usize;
        if let Some(held) = stored.quantised(bytes_of, rows, tensor.shape[1] as usize) {
            held.check().unwrap();
            let far = (held.dense() - &found).abs().max().double_value(&[]);
            let largest = found.abs().max().double_value(&[]);
            assert!(far <= largest * 1e-6, "{}: {far} of {largest}", tensor.name);
        }
    }
}

/// Fixtures of other tests that have a GGUF of the same weights.
const MODELS: [&str; 9] = [
    "gqa_tied", "head_dim", "bf16", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "longrope",
];

#[test]
fn a_gguf_is_the_folder_it_was_made_from() {
    for name in MODELS {
        let file = fixture(&format!("gguf/{name}.gguf"));
        let folder = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(fixture(name).join(file), folder.path().join(file)).unwrap();
        }
        // What a GGUF can say of it.
        let said = fixture(&format!("gguf/{name}.json"));
        if said.exists() {
            std::fs::copy(said, folder.path().join("config.json")).unwrap();
        }
        let (wanted, folder) = family::open(folder.path()).unwrap();
        let (spec, gguf) = family::open(&file).unwrap_or_else(|error| panic!("{name}: {error}"));
        let plain = |spec: &DecoderSpec| {
            let spec = DecoderSpec {
                notes: vec![],
                eos_tokens: spec.eos_tokens[..1].to_vec(),
                ..spec.clone()
            };
            format!("{spec:#?}")
                .lines()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        for (found, wanted) in plain(&spec).iter().zip(plain(&wanted)) {
            assert_eq!(*found, wanted, "{name}");
        }
        for param in spec.params() {
            for Source {
                name: tensor, rows, ..
            } in &param.tensors
            {
                let shape = [&[*rows], &param.shape[1..]].concat();
                let read = |checkpoint: &Checkpoint| {
                    let stored = checkpoint.stored_name(tensor, spec.head);
                    checkpoint.tensor(stored, &shape).unwrap().to_kind(Kind::Float)
                };
                let (found, wanted) = (read(&gguf), read(&folder));
                // One is added to Gemma's norms and taken away again, which rounds.
                let far = (&found - &wanted).abs().max().double_value(&[]);
                assert!(far <= 2e-7, "{name} {tensor}: {far}");
                // A rank reads some rows and columns.
                if shape.len() == 2 {
                    let part = gguf
                        .part(gguf.stored_name(tensor, spec.head), &shape, 1..rows - 1, 3..9)
                        .unwrap();
                    assert!(
                        part.equal(&found.narrow(0, 1, rows - 2).narrow(1, 3, 6)),
                        "{name} {tensor}"
                    );
                }
            }
        }
    }
}

#[test]
fn parts_are_one_model() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let bytes = std::fs::read(fixture("gguf/gqa_tied.gguf")).unwrap();
    std::fs::write(at("m-00001-of-00002.gguf"), &bytes).unwrap();
    let error = |name: &str| Model::open(&at(name)).err().expect("must not open").to_string();
    assert!(error("m-00001-of-00002.gguf").contains("m-00002-of-00002.gguf"));
    std::fs::write(at("m-00002-of-00002.gguf"), &bytes).unwrap();
    assert!(
        error("m-00002-of-00002.gguf").contains("it is part 2 of 2: name the first, m-00001-of-00002.gguf")
    );
    let error = error("m-00001-of-00002.gguf");
    assert!(
        error.contains("`split.count`: the file's name makes 2 parts of it"),
        "{error}"
    );
}

/// Same number of bytes, everywhere.
fn replaced(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = bytes.to_vec();
    let mut found = 0;
    for at in 0..bytes.len() - from.len() {
        if bytes[at..].starts_with(from.as_bytes()) {
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            found += 1;
        }
    }
    assert!(found > 0, "{from}");
    bytes
}

/// Of a tensor's entry: where its dimensions, its type and its offset stand.
fn entry(bytes: &[u8], tensor: &str, field: usize) -> usize {
    let at = bytes
        .windows(tensor.len())
        .position(|name| name == tensor.as_bytes())
        .expect(tensor);
    let dimensions = at + tensor.len() + 4;
    let count = bytes[at + tensor.len()] as usize;
    [dimensions, dimensions + 8 * count, dimensions + 8 * count + 4][field]
}

fn patched(bytes: &[u8], at: usize, with: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + with.len()].copy_from_slice(with);
    bytes
}

/// Where the value of a key begins, its type first.
fn value(bytes: &[u8], key: &str) -> usize {
    let at = bytes.windows(key.len()).position(|name| name == key.as_bytes());
    at.expect(key) + key.len()
}

#[test]
fn wrong_models_say_what_is_wrong() {
    let good = std::fs::read(fixture("gguf/gqa_tied.gguf")).unwrap();
    let renamed = |from: &str, to: &str| replaced(&good, from, to);
    let typed = |tensor: &str, id: u32| patched(&good, entry(&good, tensor, 1), &id.to_le_bytes());
    let whole = |key: &str, n: u32| patched(&good, value(&good, key) + 4, &n.to_le_bytes());
    let q = "blk.0.attn_q.weight";
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (
            renamed("llama", "lhama"),
            "`general.architecture`: llama, qwen2, qwen3, gemma2, gemma3, phi3 are supported (it is \"lhama\")",
        ),
        (
            renamed("general.architecture", "general.Architecture"),
            "the key `general.architecture` is missing: llama, qwen2",
        ),
        (
            renamed("llama.context_length", "llama.context_lenGth"),
            "the key `llama.context_length` is missing",
        ),
        (
            renamed("llama.rope.freq_base", "llama.rope.freq_bass"),
            "`llama.rope.freq_bass`: this key is not supported: answers would differ",
        ),
        (
            renamed("llama.attention.key_length", "llama.attention.key_tength"),
            "`llama.attention.key_tength`: this key is not supported",
        ),
        (
            whole("llama.attention.value_length", 8),
            "`llama.attention.value_length`: other lengths than those of keys (16) are not supported (it is 8)",
        ),
        (
            whole("llama.attention.head_count", 0),
            "`llama.attention.head_count`: a number above 0 is needed (it is 0)",
        ),
        (
            whole("llama.block_count", 1),
            "no part of this model: `model.layers.1.",
        ),
        (
            whole("llama.block_count", 3),
            "tensor `model.layers.2.input_layernorm.weight` of shape [48] is missing",
        ),
        (
            whole("llama.feed_forward_length", 81),
            "tensor `model.layers.0.mlp.gate_proj.weight` has shape [80, 48], the metadata makes it [81, 48]",
        ),
        (whole("llama.attention.head_count_kv", 2), "`num_key_value_heads`"),
        (
            patched(&good, value(&good, "llama.block_count"), &6u32.to_le_bytes()),
            "`llama.block_count`: a whole number from 0 to 2147483647 is needed",
        ),
        (
            renamed("blk.0.attn_norm.weight", "blk.0.attn_morm.weight"),
            "no part of this model: `blk.0.attn_morm.weight`",
        ),
        (
            renamed("token_embd.weight", "token_enbd.weight"),
            "the tensor `token_embd.weight` is missing",
        ),
        (
            typed(q, 23),
            "tensor `blk.0.attn_q.weight`: its numbers are stored as IQ4_XS; F32, F16, BF16, Q4_0,",
        ),
        (typed(q, 99), "its numbers are stored as type 99"),
        (
            typed(q, 12),
            "tensor `blk.0.attn_q.weight`: rows of 48 numbers are not whole groups of 256, as Q4_K has",
        ),
        (
            patched(&good, entry(&good, q, 2), &(1u64 << 40).to_le_bytes()),
            "tensor `blk.0.attn_q.weight`: its 9216 bytes begin at byte 10995116",
        ),
        (
            patched(&good, entry(&good, q, 2), &(u64::MAX - 31).to_le_bytes()),
            "it is cut off, or not yet downloaded whole",
        ),
        (
            good[..good.len() - 64].to_vec(),
            "it is cut off, or not yet downloaded whole",
        ),
        (
            patched(&good, good.len() - 4, &f32::NAN.to_le_bytes()),
            "holds 1 numbers that are infinite or not a number",
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("m.gguf");
    let load = |bytes: &[u8]| -> Result<(), LoadError> {
        std::fs::write(&file, bytes).unwrap();
        let (spec, checkpoint) = family::open(&file)?;
        for param in spec.params() {
            for Source {
                name: tensor, rows, ..
            } in &param.tensors
            {
                let shape = [&[*rows], &param.shape[1..]].concat();
                drop(checkpoint.tensor(checkpoint.stored_name(tensor, spec.head), &shape)?);
            }
        }
        Ok(())
    };
    load(&good).unwrap();
    for (bytes, expected) in cases {
        let error = load(&bytes).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}\n{expected}");
    }
}

#[test]
fn llama_3s_rope_is_known_by_its_factors() {
    let config = |factors: Option<Vec<f32>>| {
        let model = Model::open(&fixture("gguf/head_dim.gguf")).unwrap();
        let read = |name: &str| Ok(factors.clone().filter(|_| name == super::ROPE_FACTORS));
        super::config::config(&super::Facts {
            metadata: model.metadata(),
            vocab: 101,
            has_head: true,
            has_biases: [false; 2],
            rope_tensor: &read,
        })
    };
    // transformers 5.23, ROPE_INIT_FUNCTIONS: the default frequencies over those of llama3 with 32 dimensions, theta 10000,
    // factor 8 and the three numbers that all checkpoints share.
    let known = [&[1.0; 11][..], &[1.96245, 4.68148, 8.0, 8.0, 8.0]].concat();
    let rope = config(Some(known.clone())).unwrap()["rope_scaling"].to_string();
    assert!(
        rope.contains("\"llama3\"") && rope.contains("\"factor\":8.0"),
        "{rope}"
    );
    let shifted = [&known[1..], &[8.0]].concat();
    for wrong in [vec![1.0; 5], shifted] {
        let error = config(Some(wrong)).unwrap_err().to_string();
        assert!(
            error.contains("factors are not those of Llama 3's rope (low 1, high 4"),
            "{error}"
        );
    }
    assert!(config(None).unwrap().get("rope_scaling").is_none());
}
