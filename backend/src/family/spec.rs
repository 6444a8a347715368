//! A decoder as data: sublayers that each add to the residual stream, the linears in them, and every parameter by its
//! name in the checkpoint, listed once ([`DecoderSpec::params`]). Families write a spec; loading, training, sharding,
//! adapters and PEFT's names are derived from it. Not here: what a config.json means (one file per family).

use std::ops::Range;

use tandem_kernels::activation::Activation;
use tandem_kernels::rope::RopeSpec;

use crate::weights::{EMBED, HEAD};

#[derive(Clone, Debug)]
pub struct DecoderSpec {
    pub vocab: i64,
    pub hidden: i64,
    /// In the order in which they run.
    pub sublayers: Vec<Sublayer>,
    /// What attentions name by index.
    pub ropes: Vec<RopeSpec>,
    pub final_norm: NormSpec,
    pub head: Head,
    /// Positions the checkpoint was made for.
    pub max_positions: i64,
    /// End-of-sequence tokens: generation_config.json's, else config.json's.
    pub eos_tokens: Vec<u32>,
    /// For the log: what of the config.json is not honoured, or not as its writer may think.
    pub notes: Vec<String>,
}

/// `x + body(norm(x))`. A layer of Llama is two of them: attention, then MLP.
#[derive(Clone, Debug)]
pub struct Sublayer {
    pub norm: NormSpec,
    pub body: Body,
}

/// A root-mean-square norm.
#[derive(Clone, Debug)]
pub struct NormSpec {
    /// `model.layers.0.input_layernorm`
    pub path: String,
    pub eps: f64,
}

#[derive(Clone, Debug)]
pub enum Body {
    Attention(AttnSpec),
    Mlp(MlpSpec),
}

#[derive(Clone, Debug)]
pub struct AttnSpec {
    pub heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
    /// Factor on q k before the softmax.
    pub scale: f64,
    /// Of [`DecoderSpec::ropes`].
    pub rope: usize,
    /// q, k and v in one product.
    pub qkv: LinearSpec,
    pub output: LinearSpec,
}

/// `down(act(gate(x)) * up(x))`.
#[derive(Clone, Debug)]
pub struct MlpSpec {
    pub inner: i64,
    pub activation: Activation,
    /// gate and up in one product.
    pub gate_up: LinearSpec,
    pub down: LinearSpec,
}

/// `y [T, columns] = x [T, inputs] Wt`: one product, often of several checkpoint tensors whose outputs stand side by
/// side.
#[derive(Clone, Debug)]
pub struct LinearSpec {
    pub inputs: i64,
    pub bias: Bias,
    pub cut: Cut,
    pub parts: Vec<Part>,
}

/// What a PEFT adapter calls a target module.
#[derive(Clone, Debug)]
pub struct Part {
    /// `q_proj`
    pub name: &'static str,
    /// `model.layers.0.self_attn.q_proj`
    pub path: String,
    pub columns: Range<i64>,
    /// Where these are KV heads: how many. Ranks may share one.
    pub kv_heads: Option<i64>,
}

/// How ranks divide a linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Each computes some outputs of the whole input.
    Outputs,
    /// Each computes its share of every output from some inputs; the shares are summed.
    Inputs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    Without,
    With,
}

/// Where logits come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// The embedding table.
    Tied,
    /// `lm_head.weight`.
    Own,
}

/// Number of a linear in its model, in the order in which they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LinearId(pub usize);

/// One parameter as the decoder uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamId {
    Embed,
    /// Of a sublayer.
    Norm(usize),
    Linear(LinearId),
    Bias(LinearId),
    FinalNorm,
    Head,
}

/// A parameter and the checkpoint's tensors that it is made of, one under the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    pub id: ParamId,
    pub shape: Vec<i64>,
    /// Name and rows of each.
    pub tensors: Vec<(String, i64)>,
}

impl DecoderSpec {
    /// Every parameter of the model.
    pub fn params(&self) -> Vec<Param> {
        let table = |id, name: &str| Param {
            id,
            shape: vec![self.vocab, self.hidden],
            tensors: vec![(name.to_owned(), self.vocab)],
        };
        let norm = |id, norm: &NormSpec| Param {
            id,
            shape: vec![self.hidden],
            tensors: vec![(format!("{}.weight", norm.path), self.hidden)],
        };
        let mut params = vec![table(ParamId::Embed, EMBED)];
        let mut linears = self.linears();
        for (i, sublayer) in self.sublayers.iter().enumerate() {
            params.push(norm(ParamId::Norm(i), &sublayer.norm));
            for (id, linear) in linears.by_ref().take(sublayer.body.linears().len()) {
                let rows = linear.columns();
                let tensors = |what: &str| {
                    let parts = linear.parts.iter();
                    parts
                        .map(|part| (format!("{}.{what}", part.path), part.width()))
                        .collect()
                };
                params.push(Param {
                    id: ParamId::Linear(id),
                    shape: vec![rows, linear.inputs],
                    tensors: tensors("weight"),
                });
                if linear.bias == Bias::With {
                    params.push(Param {
                        id: ParamId::Bias(id),
                        shape: vec![rows],
                        tensors: tensors("bias"),
                    });
                }
            }
        }
        params.push(norm(ParamId::FinalNorm, &self.final_norm));
        if self.head == Head::Own {
            params.push(table(ParamId::Head, HEAD));
        }
        params
    }

    pub fn linears(&self) -> impl Iterator<Item = (LinearId, &LinearSpec)> {
        let linears = self.sublayers.iter().flat_map(|sublayer| sublayer.body.linears());
        linears.enumerate().map(|(i, linear)| (LinearId(i), linear))
    }

    pub fn attentions(&self) -> impl Iterator<Item = &AttnSpec> {
        self.sublayers.iter().filter_map(|sublayer| match &sublayer.body {
            Body::Attention(attn) => Some(attn),
            Body::Mlp(_) => None,
        })
    }

    /// Of every attention.
    pub fn head_dim(&self) -> i64 {
        let attn = self.attentions().next();
        attn.expect("a decoder attends").head_dim
    }

    /// Every name an adapter may target, in order: what `all-linear` means.
    pub fn lora_targets(&self) -> Vec<String> {
        let mut names: Vec<String> = vec![];
        for part in self.linears().flat_map(|(_, linear)| &linear.parts) {
            if !names.iter().any(|name| name == part.name) {
                names.push(part.name.to_owned());
            }
        }
        names
    }
}

impl Body {
    /// In the order in which they run.
    pub fn linears(&self) -> Vec<&LinearSpec> {
        match self {
            Body::Attention(attn) => vec![&attn.qkv, &attn.output],
            Body::Mlp(mlp) => vec![&mlp.gate_up, &mlp.down],
        }
    }
}

impl LinearSpec {
    /// Parts that all read the same `inputs`, each with its name under `module` and its width.
    pub fn new(module: &str, inputs: i64, bias: Bias, cut: Cut, parts: &[(&'static str, i64)]) -> LinearSpec {
        let mut end = 0;
        let part = |&(name, width): &(&'static str, i64)| {
            let start = end;
            end += width;
            Part {
                name,
                path: format!("{module}.{name}"),
                columns: start..end,
                kv_heads: None,
            }
        };
        LinearSpec {
            inputs,
            bias,
            cut,
            parts: parts.iter().map(part).collect(),
        }
    }

    /// Outputs.
    pub fn columns(&self) -> i64 {
        self.parts.iter().map(Part::width).sum()
    }
}

impl Part {
    /// Output features.
    pub fn width(&self) -> i64 {
        self.columns.end - self.columns.start
    }
}

/// How an attention is shaped, where its four projections are named as in Llama.
pub(super) struct Projections<'a> {
    /// `model.layers.0.self_attn`
    pub module: &'a str,
    pub hidden: i64,
    pub heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
    pub qkv_bias: Bias,
    pub o_bias: Bias,
}

impl Projections<'_> {
    /// q, k and v in one product, and the output projection.
    pub fn linears(&self) -> (LinearSpec, LinearSpec) {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let parts = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
        let mut qkv = LinearSpec::new(self.module, self.hidden, self.qkv_bias, Cut::Outputs, &parts);
        for part in &mut qkv.parts[1..] {
            part.kv_heads = Some(self.kv_heads);
        }
        let output = [("o_proj", self.hidden)];
        (
            qkv,
            LinearSpec::new(self.module, q, self.o_bias, Cut::Inputs, &output),
        )
    }
}

impl MlpSpec {
    /// gate_proj, up_proj and down_proj under `module`.
    pub(super) fn gated(
        module: &str,
        hidden: i64,
        inner: i64,
        activation: Activation,
        bias: Bias,
    ) -> MlpSpec {
        let parts = [("gate_proj", inner), ("up_proj", inner)];
        MlpSpec {
            inner,
            activation,
            gate_up: LinearSpec::new(module, hidden, bias, Cut::Outputs, &parts),
            down: LinearSpec::new(module, inner, bias, Cut::Inputs, &[("down_proj", hidden)]),
        }
    }
}
