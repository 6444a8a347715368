//! A decoder as data: sublayers that each add to the residual stream, the linears in them, and every parameter by its
//! name in the checkpoint, listed once ([`DecoderSpec::params`]). Families write a spec; loading, training, sharding,
//! adapters and PEFT's names are derived from it. Not here: what a config.json means (one file per family).

use tandem_core::job::{EMBED_TOKENS, LM_HEAD};
use tandem_kernels::activation::{Activation, Gate};
use tandem_kernels::experts::RoutingWeights;
use tandem_kernels::rope::RopeSpec;

use crate::weights::{EMBED, EMBED_PATH, HEAD};

#[derive(Clone, Debug)]
pub struct DecoderSpec {
    pub vocab: i64,
    pub hidden: i64,
    /// Factor on embedded tokens.
    pub embed_scale: f64,
    /// In the order in which they run.
    pub sublayers: Vec<Sublayer>,
    /// What attentions name by index.
    pub ropes: Vec<RopeSpec>,
    pub final_norm: NormSpec,
    pub head: Head,
    pub logits: Logits,
    /// Positions the checkpoint was made for.
    pub max_positions: i64,
    /// End-of-sequence tokens: generation_config.json's, else config.json's.
    pub eos_tokens: Vec<u32>,
    /// For the log: what of the config.json is not honoured, or not as its writer may think.
    pub notes: Vec<String>,
}

/// `x + scale * post(body(pre(x)))`. A layer of Llama is two of them: attention, then MLP.
#[derive(Clone, Debug)]
pub struct Sublayer {
    pub pre: Option<NormSpec>,
    /// What reads the same rows, its outputs summed: mostly one; attention and MLP in Cohere's layers.
    pub bodies: Vec<Body>,
    pub post: Option<NormSpec>,
    pub scale: f64,
}

#[derive(Clone, Debug)]
pub struct NormSpec {
    pub kind: NormKind,
    /// `model.layers.0.input_layernorm`
    pub path: String,
    /// Numbers of its weight.
    pub width: i64,
    pub eps: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// By the root mean square.
    Rms,
    /// The same, whose checkpoint holds the weight less one.
    RmsPlusOne,
    /// By mean and deviation.
    Layer { bias: Bias },
}

#[derive(Clone, Debug)]
pub enum Body {
    Attention(AttnSpec),
    Mlp(MlpSpec),
    Experts(ExpertsSpec),
}

#[derive(Clone, Debug)]
pub struct AttnSpec {
    pub heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
    /// Factor on q k before the softmax.
    pub scale: f64,
    /// Of [`DecoderSpec::ropes`]; `None`: positions are not encoded.
    pub rope: Option<usize>,
    /// A query at position p sees the keys in (p - window, p].
    pub window: Option<i64>,
    /// Scores become cap * tanh(score / cap).
    pub cap: Option<f64>,
    pub qk_norm: Option<QkNorm>,
    /// A learned logit of each head that joins the softmax without a value: the tensor's name.
    pub sinks: Option<String>,
    /// q, k and v in one product.
    pub qkv: LinearSpec,
    pub output: LinearSpec,
}

/// Norms of queries and of keys before their rotation: of each head (their width is a head's), or of all heads together.
#[derive(Clone, Debug)]
pub struct QkNorm {
    pub query: NormSpec,
    pub key: NormSpec,
}

/// `down(act(up(x)))`.
#[derive(Clone, Debug)]
pub struct MlpSpec {
    pub inner: i64,
    pub activation: MlpActivation,
    /// Gate and up in one product where it is gated.
    pub up: LinearSpec,
    pub down: LinearSpec,
}

/// `sum over the chosen experts of weight * expert(x)`, and what every token goes through beside them.
#[derive(Clone, Debug)]
pub struct ExpertsSpec {
    /// Experts of a token.
    pub top_k: i64,
    pub weights: RoutingWeights,
    /// Gives a logit for each expert.
    pub router: LinearSpec,
    /// Of one shape.
    pub experts: Vec<MlpSpec>,
    pub shared: Option<SharedExpert>,
}

/// `sigmoid(gate(x)) * mlp(x)`.
#[derive(Clone, Debug)]
pub struct SharedExpert {
    /// One output.
    pub gate: LinearSpec,
    pub mlp: MlpSpec,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MlpActivation {
    /// `act(gate) * up`
    Gated(Gate),
    /// `act(up)`
    Plain(Activation),
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
    /// Where its outputs stand in the linear's.
    pub start: i64,
    /// What its outputs are, one behind the other: several in a checkpoint's fused tensor.
    pub sections: Vec<Section>,
    /// Where a checkpoint has its weight and bias, if not under its path.
    pub among: Option<Among>,
}

/// Rows of one expert in tensors that hold all of them: `name`, `[experts, outputs, inputs]` or `[experts, inputs, outputs]`,
/// and `name_bias`, `[experts, outputs]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Among {
    /// `model.layers.0.mlp.experts.gate_up_proj`
    pub name: String,
    pub expert: i64,
    pub experts: i64,
    /// Outputs of an expert in it.
    pub outputs: i64,
    /// This part's are every `step`-th from `first` on.
    pub first: i64,
    pub step: i64,
}

/// Outputs that ranks divide evenly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    pub width: i64,
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
    /// Each computes all of it: it is small, and says what the others are multiplied with.
    Whole,
    /// Each computes the outputs of its rows of the vocabulary, of which the last rank may have fewer.
    Vocabulary,
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

/// `cap * tanh(logits * scale / cap)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Logits {
    pub scale: f64,
    pub cap: Option<f64>,
}

/// As the head gives them.
impl Default for Logits {
    fn default() -> Logits {
        Logits {
            scale: 1.0,
            cap: None,
        }
    }
}

/// Which norm of the decoder; a number is a sublayer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormId {
    Pre(usize),
    Post(usize),
    Query(usize),
    Key(usize),
    Final,
}

/// Number of a linear in its model, in the order in which they run: behind them the head's, then the embedding's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LinearId(pub usize);

/// One parameter as the decoder uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamId {
    Embed,
    Norm(NormId),
    NormBias(NormId),
    Linear(LinearId),
    Bias(LinearId),
    /// Of a sublayer's attention.
    Sinks(usize),
    Head,
}

/// A parameter and the checkpoint's tensors that it is made of, one under the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    pub id: ParamId,
    pub shape: Vec<i64>,
    pub tensors: Vec<Source>,
}

/// A tensor of a checkpoint, or what of it belongs to one expert.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    pub name: String,
    /// Rows that are taken.
    pub rows: i64,
    pub among: Option<Among>,
}

impl Source {
    fn own(name: String, rows: i64) -> Source {
        Source {
            name,
            rows,
            among: None,
        }
    }
}

impl DecoderSpec {
    /// Every parameter of the model.
    pub fn params(&self) -> Vec<Param> {
        let table = |id, name: &str| Param {
            id,
            shape: vec![self.vocab, self.hidden],
            tensors: vec![Source::own(name.to_owned(), self.vocab)],
        };
        let mut params = vec![table(ParamId::Embed, EMBED)];
        let mut linears = self.linears();
        for (i, sublayer) in self.sublayers.iter().enumerate() {
            for (id, norm) in sublayer.norms(i) {
                norm.params(id, &mut params);
            }
            if let Some(attn) = sublayer.attention()
                && let Some(name) = &attn.sinks
            {
                params.push(Param {
                    id: ParamId::Sinks(i),
                    shape: vec![attn.heads],
                    tensors: vec![Source::own(name.clone(), attn.heads)],
                });
            }
            for (id, linear) in linears.by_ref().take(sublayer.linears().count()) {
                linear.params(id, &mut params);
            }
        }
        self.final_norm.params(NormId::Final, &mut params);
        if self.head == Head::Own {
            params.push(table(ParamId::Head, HEAD));
        }
        params
    }

    pub fn linears(&self) -> impl Iterator<Item = (LinearId, &LinearSpec)> {
        let linears = self.sublayers.iter().flat_map(Sublayer::linears);
        linears.enumerate().map(|(i, linear)| (LinearId(i), linear))
    }

    /// The head as what an adapter may change, tied or not. (Its weight is [`ParamId::Head`] or [`ParamId::Embed`].)
    pub fn head_linear(&self) -> LinearSpec {
        LinearSpec {
            inputs: self.hidden,
            bias: Bias::Without,
            cut: Cut::Vocabulary,
            parts: vec![Part {
                name: LM_HEAD,
                path: LM_HEAD.to_owned(),
                start: 0,
                sections: vec![Section::of(self.vocab)],
                among: None,
            }],
        }
    }

    /// The embedding as what an adapter may change: of a token's row alone one input is not zero. Its weight is the other way
    /// round.
    pub fn embed_linear(&self) -> LinearSpec {
        LinearSpec {
            inputs: self.vocab,
            bias: Bias::Without,
            cut: Cut::Whole,
            parts: vec![Part {
                name: EMBED_TOKENS,
                path: EMBED_PATH.to_owned(),
                start: 0,
                sections: vec![Section::of(self.hidden)],
                among: None,
            }],
        }
    }

    /// All that an adapter may change, by its number.
    pub fn adaptable(&self) -> Vec<LinearSpec> {
        let linears = self.linears().map(|(_, linear)| linear.clone());
        linears.chain([self.head_linear(), self.embed_linear()]).collect()
    }

    /// The number of [`DecoderSpec::head_linear`].
    pub fn head_id(&self) -> LinearId {
        LinearId(self.linears().count())
    }

    pub fn attentions(&self) -> impl Iterator<Item = &AttnSpec> {
        self.sublayers.iter().filter_map(Sublayer::attention)
    }

    /// Every norm.
    pub fn norms(&self) -> impl Iterator<Item = (NormId, &NormSpec)> {
        let within = (0..)
            .zip(&self.sublayers)
            .flat_map(|(i, sublayer)| sublayer.norms(i));
        within.chain([(NormId::Final, &self.final_norm)])
    }

    /// Of every attention.
    pub fn head_dim(&self) -> i64 {
        let attn = self.attentions().next();
        attn.expect("a decoder attends").head_dim
    }

    /// Every name in the sublayers that an adapter may target, in order: what `all-linear` means. (Routers and the head stay as
    /// they are unless they are named.)
    pub fn lora_targets(&self) -> Vec<String> {
        let mut names: Vec<String> = vec![];
        let linears = self.linears().filter(|(_, linear)| !linear.routes());
        for part in linears.flat_map(|(_, linear)| &linear.parts) {
            if !names.iter().any(|name| name == part.name) {
                names.push(part.name.to_owned());
            }
        }
        names
    }
}

impl Sublayer {
    /// `x + body(norm(x))`.
    pub(super) fn new(pre: NormSpec, body: Body) -> Sublayer {
        Sublayer {
            pre: Some(pre),
            bodies: vec![body],
            post: None,
            scale: 1.0,
        }
    }

    /// The attention among its bodies: there is at most one.
    pub fn attention(&self) -> Option<&AttnSpec> {
        self.bodies.iter().find_map(|body| match body {
            Body::Attention(attn) => Some(attn),
            Body::Mlp(_) | Body::Experts(_) => None,
        })
    }

    /// In the order in which they run.
    pub fn linears(&self) -> impl Iterator<Item = &LinearSpec> {
        self.bodies.iter().flat_map(Body::linears)
    }

    /// As sublayer `i`.
    fn norms(&self, i: usize) -> impl Iterator<Item = (NormId, &NormSpec)> {
        let outer = [
            (NormId::Pre(i), self.pre.as_ref()),
            (NormId::Post(i), self.post.as_ref()),
        ];
        let qk = self.attention().and_then(|attn| attn.qk_norm.as_ref());
        let inner = [
            (NormId::Query(i), qk.map(|qk| &qk.query)),
            (NormId::Key(i), qk.map(|qk| &qk.key)),
        ];
        outer
            .into_iter()
            .chain(inner)
            .filter_map(|(id, norm)| Some((id, norm?)))
    }
}

impl NormSpec {
    pub fn bias(&self) -> Bias {
        match self.kind {
            NormKind::Layer { bias } => bias,
            NormKind::Rms | NormKind::RmsPlusOne => Bias::Without,
        }
    }

    fn params(&self, id: NormId, params: &mut Vec<Param>) {
        let param = |id, what: &str| Param {
            id,
            shape: vec![self.width],
            tensors: vec![Source::own(format!("{}.{what}", self.path), self.width)],
        };
        params.push(param(ParamId::Norm(id), "weight"));
        if self.bias() == Bias::With {
            params.push(param(ParamId::NormBias(id), "bias"));
        }
    }
}

impl Body {
    /// In the order in which they run.
    pub fn linears(&self) -> Vec<&LinearSpec> {
        match self {
            Body::Attention(attn) => vec![&attn.qkv, &attn.output],
            Body::Mlp(mlp) => vec![&mlp.up, &mlp.down],
            Body::Experts(experts) => experts.linears(),
        }
    }

    /// The MLPs that ranks divide.
    pub fn mlps(&self) -> Vec<&MlpSpec> {
        match self {
            Body::Attention(_) => vec![],
            Body::Mlp(mlp) => vec![mlp],
            Body::Experts(ExpertsSpec { experts, shared, .. }) => experts
                .iter()
                .chain(shared.iter().map(|shared| &shared.mlp))
                .collect(),
        }
    }
}

impl ExpertsSpec {
    fn linears(&self) -> Vec<&LinearSpec> {
        let ExpertsSpec {
            router,
            experts,
            shared,
            ..
        } = self;
        let mut linears = vec![router];
        linears.extend(experts.iter().flat_map(|expert| [&expert.up, &expert.down]));
        if let Some(SharedExpert { gate, mlp }) = shared {
            linears.extend([gate, &mlp.up, &mlp.down]);
        }
        linears
    }
}

impl LinearSpec {
    /// Parts that all read the same `inputs`, each with its name under `module` and its sections.
    pub(super) fn new<const N: usize>(
        module: &str,
        inputs: i64,
        bias: Bias,
        cut: Cut,
        parts: [(&'static str, Vec<Section>); N],
    ) -> LinearSpec {
        let mut end = 0;
        let part = |(name, sections): (&'static str, Vec<Section>)| {
            let part = Part {
                name,
                path: format!("{module}.{name}"),
                start: end,
                sections,
                among: None,
            };
            end += part.width();
            part
        };
        LinearSpec {
            inputs,
            bias,
            cut,
            parts: parts.into_iter().map(part).collect(),
        }
    }

    /// Whether it says what others are multiplied with: too little to save bits on, and too much to round.
    pub fn routes(&self) -> bool {
        self.cut == Cut::Whole
    }

    /// Outputs.
    pub fn columns(&self) -> i64 {
        self.parts.iter().map(Part::width).sum()
    }

    fn params(&self, id: LinearId, params: &mut Vec<Param>) {
        let rows = self.columns();
        let param = |id, what: &str, shape| Param {
            id,
            shape,
            tensors: self.parts.iter().map(|part| part.source(what)).collect(),
        };
        params.push(param(ParamId::Linear(id), "weight", vec![rows, self.inputs]));
        if self.bias == Bias::With {
            params.push(param(ParamId::Bias(id), "bias", vec![rows]));
        }
    }
}

impl Part {
    /// Of its "weight" or its "bias".
    fn source(&self, what: &str) -> Source {
        let Some(among) = &self.among else {
            return Source::own(format!("{}.{what}", self.path), self.width());
        };
        Source {
            name: match what {
                "bias" => format!("{}_bias", among.name),
                _ => among.name.clone(),
            },
            rows: self.width(),
            among: Some(among.clone()),
        }
    }

    /// Output features.
    pub fn width(&self) -> i64 {
        self.sections.iter().map(|section| section.width).sum()
    }
}

impl Section {
    pub(super) fn of(width: i64) -> Section {
        Section {
            width,
            kv_heads: None,
        }
    }
}

/// What most families call the linears of a gated MLP.
pub(super) const GATED: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

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
        let kv = Section {
            width: kv,
            kv_heads: Some(self.kv_heads),
        };
        let parts = [
            ("q_proj", vec![Section::of(q)]),
            ("k_proj", vec![kv]),
            ("v_proj", vec![kv]),
        ];
        let output = [("o_proj", vec![Section::of(self.hidden)])];
        (
            LinearSpec::new(self.module, self.hidden, self.qkv_bias, Cut::Outputs, parts),
            LinearSpec::new(self.module, q, self.o_bias, Cut::Inputs, output),
        )
    }
}

impl MlpSpec {
    /// Gate, up and down by these names under `module`.
    pub(super) fn gated(
        module: &str,
        [gate, up, down]: [&'static str; 3],
        [hidden, inner]: [i64; 2],
        activation: Activation,
        bias: Bias,
    ) -> MlpSpec {
        let inner_features = || vec![Section::of(inner)];
        let parts = [(gate, inner_features()), (up, inner_features())];
        let down = [(down, vec![Section::of(hidden)])];
        MlpSpec {
            inner,
            activation: MlpActivation::Gated(Gate::Act(activation)),
            up: LinearSpec::new(module, hidden, bias, Cut::Outputs, parts),
            down: LinearSpec::new(module, inner, bias, Cut::Inputs, down),
        }
    }
}
