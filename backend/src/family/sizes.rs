//! What nearly every config.json says in the same words, and the spec that most families start from: they change in it
//! what is theirs.

use tandem_kernels::activation::Activation;
use tandem_kernels::rope::RopeSpec;

use super::config::Config;
use super::spec::{GATED, Projections, Section};
use super::{
    AttnSpec, Bias, Body, Cut, DecoderSpec, Head, LinearSpec, Logits, MlpActivation, MlpSpec, NormKind,
    NormSpec, QkNorm, Sublayer,
};
use crate::weights::LoadError;

#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub vocab: i64,
    pub hidden: i64,
    /// Of an MLP.
    pub inner: i64,
    pub layers: i64,
    pub heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
    /// As config.json says.
    pub max_positions: i64,
    /// What a rope that is stretched beyond it makes of them.
    pub reach: i64,
}

/// What a family's configuration in transformers puts in the place of absent fields.
pub(super) struct Defaults {
    pub vocab: i64,
    pub hidden: i64,
    pub inner: i64,
    pub layers: i64,
    pub heads: i64,
    /// `None`: as many as heads.
    pub kv_heads: Option<i64>,
    /// `None`: hidden size / heads.
    pub head_dim: Option<i64>,
    pub max_positions: i64,
}

impl Sizes {
    pub fn read(config: &Config, defaults: Defaults) -> Result<Sizes, LoadError> {
        let hidden = config.size("hidden_size", defaults.hidden)?;
        let heads = config.size("num_attention_heads", defaults.heads)?;
        // An explicit null has always meant "as many as heads".
        let kv_heads = match (config.size_or_none("num_key_value_heads")?, defaults.kv_heads) {
            (Some(kv_heads), _) => kv_heads,
            (None, Some(default)) if !config.has("num_key_value_heads") => default,
            (None, _) => heads,
        };
        if heads % kv_heads != 0 {
            let why = format!("{heads} attention heads are not a multiple of it");
            return Err(config.wrong("num_key_value_heads", &why));
        }
        let head_dim = match config.size_or_none("head_dim")?.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                let why = format!("is not a multiple of {heads} attention heads");
                return Err(config.wrong("hidden_size", &why));
            }
        };
        if head_dim % 2 != 0 {
            let why = format!("{head_dim} is odd; rotary embedding needs pairs");
            return Err(config.wrong("head_dim", &why));
        }
        let max_positions = config.size("max_position_embeddings", defaults.max_positions)?;
        Ok(Sizes {
            vocab: config.size("vocab_size", defaults.vocab)?,
            hidden,
            inner: config.size("intermediate_size", defaults.inner)?,
            layers: config.layers(defaults.layers)?,
            heads,
            kv_heads,
            head_dim,
            max_positions,
            reach: config.reach(max_positions),
        })
    }

    /// Four projections named as in Llama; every position is seen, rotated by the first rope.
    pub fn attention(&self, module: &str, qkv_bias: Bias, o_bias: Bias) -> AttnSpec {
        let (qkv, output) = Projections {
            module,
            hidden: self.hidden,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            qkv_bias,
            o_bias,
        }
        .linears();
        AttnSpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: (self.head_dim as f64).powf(-0.5),
            rope: Some(0),
            window: None,
            cap: None,
            qk_norm: None,
            sinks: None,
            qkv,
            output,
        }
    }

    /// The same with queries, keys and values in one tensor, `qkv_proj`.
    pub fn fused_attention(&self, module: &str) -> AttnSpec {
        let mut attn = self.attention(module, Bias::Without, Bias::Without);
        let sections = attn
            .qkv
            .parts
            .into_iter()
            .flat_map(|part| part.sections)
            .collect();
        let parts = [("qkv_proj", sections)];
        attn.qkv = LinearSpec::new(module, self.hidden, Bias::Without, Cut::Outputs, parts);
        attn
    }

    /// gate_proj, up_proj and down_proj.
    pub fn gated_mlp(&self, module: &str, activation: Activation, bias: Bias) -> MlpSpec {
        MlpSpec::gated(module, GATED, [self.hidden, self.inner], activation, bias)
    }

    /// The same with gate and up in one tensor, `gate_up_proj`.
    pub fn fused_mlp(&self, module: &str, activation: Activation) -> MlpSpec {
        let parts = [("gate_up_proj", vec![Section::of(self.inner); 2])];
        MlpSpec {
            up: LinearSpec::new(module, self.hidden, Bias::Without, Cut::Outputs, parts),
            ..self.gated_mlp(module, activation, Bias::Without)
        }
    }

    /// A linear without bias that every rank computes: a router's logits.
    pub fn router(&self, module: &str, name: &'static str, outputs: i64) -> LinearSpec {
        let parts = [(name, vec![Section::of(outputs)])];
        LinearSpec::new(module, self.hidden, Bias::Without, Cut::Whole, parts)
    }

    /// up and down by these names.
    pub fn plain_mlp(
        &self,
        module: &str,
        [up, down]: [&'static str; 2],
        activation: Activation,
        bias: Bias,
    ) -> MlpSpec {
        let up = [(up, vec![Section::of(self.inner)])];
        let down = [(down, vec![Section::of(self.hidden)])];
        MlpSpec {
            inner: self.inner,
            activation: MlpActivation::Plain(activation),
            up: LinearSpec::new(module, self.hidden, bias, Cut::Outputs, up),
            down: LinearSpec::new(module, self.inner, bias, Cut::Inputs, down),
        }
    }

    /// A decoder of these sublayers under `model.`.
    pub fn decoder(
        &self,
        sublayers: Vec<Sublayer>,
        ropes: Vec<RopeSpec>,
        final_norm: NormSpec,
        head: Head,
    ) -> DecoderSpec {
        DecoderSpec {
            vocab: self.vocab,
            hidden: self.hidden,
            embed_scale: 1.0,
            sublayers,
            ropes,
            final_norm,
            head,
            logits: Logits::default(),
            max_positions: self.reach,
            eos_tokens: vec![],
            notes: vec![],
        }
    }
}

/// The norms of a model: of one kind, with one epsilon.
#[derive(Clone, Copy)]
pub(super) struct Norms {
    pub kind: NormKind,
    pub eps: f64,
}

impl Norms {
    pub fn of(&self, path: String, width: i64) -> NormSpec {
        NormSpec {
            kind: self.kind,
            path,
            width,
            eps: self.eps,
        }
    }
}

impl Sizes {
    /// A norm over hidden features.
    pub fn norm(&self, norms: Norms, path: String) -> NormSpec {
        norms.of(path, self.hidden)
    }

    /// Layer `at` of Llama's kind: a norm before each body.
    pub fn pre_norm_layer(&self, norms: Norms, at: &str, attn: AttnSpec, mlp: MlpSpec) -> [Sublayer; 2] {
        self.pre_norm_bodies(norms, at, attn, Body::Mlp(mlp))
    }

    /// The same with any second body.
    pub fn pre_norm_bodies(&self, norms: Norms, at: &str, attn: AttnSpec, second: Body) -> [Sublayer; 2] {
        let norm = |name: &str| self.norm(norms, format!("{at}.{name}"));
        [
            Sublayer::new(norm("input_layernorm"), Body::Attention(attn)),
            Sublayer::new(norm("post_attention_layernorm"), second),
        ]
    }

    /// q_norm and k_norm of each head.
    pub fn head_norms(&self, norms: Norms, module: &str) -> QkNorm {
        QkNorm {
            query: norms.of(format!("{module}.q_norm"), self.head_dim),
            key: norms.of(format!("{module}.k_norm"), self.head_dim),
        }
    }

    /// A window that no position reaches the end of is none.
    pub fn seen(&self, window: Option<i64>) -> Option<i64> {
        window.filter(|&window| window < self.reach)
    }
}
