//! The names of a GGUF's tensors in the Hugging Face layout, and what llama.cpp's conversion did to their numbers, to be
//! undone. Reference: gguf-py/gguf/tensor_mapping.py and convert_hf_to_gguf.py (modify_tensors of each model).

/// What a tensor is called in a checkpoint, and how its numbers are to be read.
#[derive(Clone, Debug, PartialEq)]
pub struct Named {
    pub name: String,
    pub undo: Undo,
}

/// What conversion did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Undo {
    Nothing,
    /// Rows of each head of so many were put in pairs: rotary embedding there turns neighbours, here row i and i + half.
    PairedRows {
        heads: i64,
    },
    /// One was added: Gemma's norms multiply by 1 + weight.
    AddedOne,
}

/// How an architecture differs from the others.
#[derive(Clone, Copy, Debug)]
pub struct Wiring {
    /// Rows of q and k are paired.
    pub pairs_rows: bool,
    /// Norms before and after each body, with one added.
    pub is_gemma: bool,
    /// `ffn_up` is gate and up, one under the other.
    pub fuses_gate: bool,
}

/// Heads of q and of k.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub q: i64,
    pub k: i64,
}

/// Parts of a layer: `blk.3.NAME.weight` is `model.layers.3.NAME.weight`.
const LAYER: [(&str, &str); 14] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// `None`: no tensor of a checkpoint.
pub fn checkpoint_name(tensor: &str, wiring: Wiring, heads: Heads) -> Option<Named> {
    let (module, what) = tensor.rsplit_once('.')?;
    if what != "weight" && what != "bias" {
        return None;
    }
    let (name, part) = match module {
        "token_embd" => ("model.embed_tokens".to_owned(), "embed"),
        "output" => ("lm_head".to_owned(), "head"),
        "output_norm" => ("model.norm".to_owned(), "norm"),
        _ => {
            let (layer, part) = module.strip_prefix("blk.")?.split_once('.')?;
            layer.parse::<u32>().ok()?;
            let name = match part {
                // The norm before the MLP, while the one behind attention has a tensor of its own.
                "ffn_norm" if wiring.is_gemma => "pre_feedforward_layernorm",
                "ffn_up" if wiring.fuses_gate => "mlp.gate_up_proj",
                _ => LAYER.iter().find(|(known, _)| *known == part)?.1,
            };
            (format!("model.layers.{layer}.{name}"), part)
        }
    };
    let undo = match part {
        "attn_q" if wiring.pairs_rows => Undo::PairedRows { heads: heads.q },
        "attn_k" if wiring.pairs_rows => Undo::PairedRows { heads: heads.k },
        _ if wiring.is_gemma && part.ends_with("norm") => Undo::AddedOne,
        _ => Undo::Nothing,
    };
    Some(Named {
        name: format!("{name}.{what}"),
        undo,
    })
}

/// What a checkpoint's tensor is called here; [`checkpoint_name`], the other way.
pub fn tensor_name(name: &str, wiring: Wiring, heads: Heads) -> Option<(String, Undo)> {
    let (module, what) = name.rsplit_once('.')?;
    let layer = module
        .strip_prefix("model.layers.")
        .and_then(|rest| rest.split_once('.'));
    let candidates: Vec<String> = match layer {
        Some((layer, _)) => (LAYER.iter())
            .map(|(part, _)| format!("blk.{layer}.{part}.{what}"))
            .collect(),
        None => ["token_embd", "output", "output_norm"]
            .map(|module| format!("{module}.{what}"))
            .into(),
    };
    candidates.into_iter().find_map(|tensor| {
        let named = checkpoint_name(&tensor, wiring, heads)?;
        (named.name == name).then_some((tensor, named.undo))
    })
}
