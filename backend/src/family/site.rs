//! The four linear layers of a decoder layer as they are computed: some are several checkpoint tensors fused into one
//! matmul. What a PEFT adapter calls a target module is a [`Part`].

use std::ops::Range;

use super::{Bias, DecoderSpec};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Site {
    /// q_proj, k_proj, v_proj
    Qkv,
    /// o_proj
    Output,
    /// gate_proj, up_proj
    GateUp,
    /// down_proj
    Down,
}

impl Site {
    pub const ALL: [Site; 4] = [Site::Qkv, Site::Output, Site::GateUp, Site::Down];

    pub fn index(self) -> usize {
        self as usize
    }
}

/// `y [T, columns] = x [T, inputs] Wt`, its parts side by side in the columns.
#[derive(Clone, Debug)]
pub struct SiteSpec {
    pub inputs: i64,
    pub bias: Bias,
    pub parts: Vec<Part>,
}

#[derive(Clone, Debug)]
pub struct Part {
    /// `q_proj`
    pub name: &'static str,
    /// `model.layers.0.self_attn.q_proj`
    pub path: String,
    pub columns: Range<i64>,
}

impl Part {
    /// Output features.
    pub fn width(&self) -> i64 {
        self.columns.end - self.columns.start
    }
}

impl DecoderSpec {
    /// Every name an adapter may target, in order: what `all-linear` means.
    pub fn lora_targets(&self) -> Vec<String> {
        let parts = Site::ALL.into_iter().flat_map(|site| self.site(0, site).parts);
        parts.map(|part| part.name.to_owned()).collect()
    }

    pub fn site(&self, layer: usize, site: Site) -> SiteSpec {
        let (attn, mlp) = (&self.layers[layer].attn, &self.layers[layer].mlp);
        let (q, kv) = (attn.heads * attn.head_dim, attn.kv_heads * attn.head_dim);
        let (module, inputs, bias, parts): (_, _, _, &[(&'static str, i64)]) = match site {
            Site::Qkv => (
                "self_attn",
                self.hidden,
                attn.qkv_bias,
                &[("q_proj", q), ("k_proj", kv), ("v_proj", kv)],
            ),
            Site::Output => ("self_attn", q, attn.o_bias, &[("o_proj", self.hidden)]),
            Site::GateUp => (
                "mlp",
                self.hidden,
                mlp.bias,
                &[("gate_proj", mlp.inner), ("up_proj", mlp.inner)],
            ),
            Site::Down => ("mlp", mlp.inner, mlp.bias, &[("down_proj", self.hidden)]),
        };
        let mut end = 0;
        let part = |&(name, width): &(&'static str, i64)| {
            let start = end;
            end += width;
            Part {
                name,
                path: format!("model.layers.{layer}.{module}.{name}"),
                columns: start..end,
            }
        };
        SiteSpec {
            inputs,
            bias,
            parts: parts.iter().map(part).collect(),
        }
    }
}
