//! Which part of the model one rank holds: said here once, for loading, for adapters and for gradients. Not here: sums
//! over ranks (model), messages (ranks).
//!
//! Megatron's cut: heads and the inner width of the MLP are divided, so a layer needs two sums over ranks, one behind
//! the output projection and one behind the down projection. Where there are fewer KV heads than ranks, neighbours hold
//! the same one; each computes a gradient of its own query heads' share, so sums over ranks stay right. The vocabulary
//! is divided by rows, the last rank's share may be smaller.

use std::collections::HashMap;
use std::ops::Range;

use tandem_kernels::attention::{CacheShape, Heads};

use tch::Tensor;

use super::{
    AttnSpec, Bias, Body, Cut, DecoderSpec, LayerGroups, LinearId, LinearSpec, MlpSpec, NormId, NormSpec,
    Part, QkNorm, Section,
};
use crate::weights::LoadError;

/// One of the ranks that compute one model together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    pub rank: usize,
    pub world: usize,
}

impl Shard {
    /// The whole model.
    pub const WHOLE: Shard = Shard { rank: 0, world: 1 };
}

#[derive(Debug)]
pub struct Layout {
    shard: Shard,
    /// Rows of embedding and head.
    pub vocabulary: Range<i64>,
    /// Rows of the largest share of the vocabulary.
    pub widest: i64,
    /// By [`LinearId`].
    linears: Vec<LinearShard>,
    /// Norms that ranks hold pieces of, and this rank's.
    norms: HashMap<NormId, Range<i64>>,
}

/// What is held of a (fused) linear.
#[derive(Debug)]
pub struct LinearShard {
    /// Columns of its weights.
    pub inputs: Range<i64>,
    /// A bias behind a sum over ranks is added once, by rank 0.
    pub bias: Bias,
    pub parts: Vec<PartShard>,
}

#[derive(Debug)]
pub struct PartShard {
    /// `model.layers.0.self_attn.q_proj`
    pub path: String,
    /// Output features of the whole part.
    pub width: i64,
    /// Of those, what is held, by section: rows of its weight, and of an adapter's B.
    pub rows: Vec<Range<i64>>,
    /// Where they stand in this rank's fused output.
    pub columns: Range<i64>,
}

impl PartShard {
    pub fn n_rows(&self) -> i64 {
        self.columns.end - self.columns.start
    }

    /// The rows held here `[n_rows, ..]` of `whole [width, ..]`; a view where they stand together.
    pub fn held(&self, whole: &Tensor) -> Tensor {
        let pieces: Vec<Tensor> = self.views(whole).collect();
        match &pieces[..] {
            [one] => one.shallow_clone(),
            _ => Tensor::cat(&pieces, 0),
        }
    }

    /// Adds `of_held [n_rows, ..]` to those rows of `whole`.
    pub fn add(&self, whole: &Tensor, of_held: &Tensor) {
        let mut start = 0;
        for mut view in self.views(whole) {
            let rows = view.size()[0];
            let _ = view.g_add_(&of_held.narrow(0, start, rows));
            start += rows;
        }
    }

    fn views(&self, whole: &Tensor) -> impl Iterator<Item = Tensor> {
        self.rows
            .iter()
            .map(|rows| whole.narrow(0, rows.start, rows.end - rows.start))
    }
}

impl LinearShard {
    pub fn n_inputs(&self) -> i64 {
        self.inputs.end - self.inputs.start
    }

    /// Rows of the fused weight.
    pub fn n_rows(&self) -> i64 {
        self.parts.iter().map(PartShard::n_rows).sum()
    }

    pub fn part(&self, path: &str) -> &PartShard {
        let found = self.parts.iter().find(|part| part.path == path);
        found.unwrap_or_else(|| panic!("{path} is no part of this linear"))
    }
}

impl Layout {
    /// An error that says the numbers where the model cannot be divided so.
    pub fn new(spec: &DecoderSpec, shard: Shard) -> Result<Layout, LoadError> {
        check(spec, shard.world as i64)?;
        Ok(Layout {
            shard,
            vocabulary: shard.vocabulary(spec.vocab),
            widest: shard.widest(spec.vocab),
            linears: spec
                .adaptable()
                .iter()
                .map(|linear| shard.linear(linear))
                .collect(),
            norms: spread_norms(spec)
                .filter(|_| shard.world > 1)
                .map(|(id, norm)| (id, shard.equal(norm.width)))
                .collect(),
        })
    }

    pub fn whole(spec: &DecoderSpec) -> Layout {
        Layout::new(spec, Shard::WHOLE).expect("one rank holds any model")
    }

    pub fn linear(&self, id: LinearId) -> &LinearShard {
        &self.linears[id.0]
    }

    /// Of the output layer.
    pub fn head_id(&self) -> LinearId {
        LinearId(self.linears.len() - 2)
    }

    /// Of the embedding.
    pub fn embed_id(&self) -> LinearId {
        LinearId(self.linears.len() - 1)
    }

    pub fn is_first(&self) -> bool {
        self.shard.rank == 0
    }

    /// This rank's piece of a norm that stands on several.
    pub fn spread(&self, id: NormId) -> Option<Range<i64>> {
        self.norms.get(&id).cloned()
    }

    /// This rank's share of `n` equal things.
    pub fn equal(&self, n: i64) -> Range<i64> {
        self.shard.equal(n)
    }

    /// The heads that this rank computes.
    pub fn heads(&self, attn: &AttnSpec) -> Heads {
        let world = self.shard.world as i64;
        Heads {
            heads: (attn.heads / world) as usize,
            kv_heads: (attn.kv_heads / world).max(1) as usize,
            head_dim: attn.head_dim as usize,
        }
    }

    /// A KV cache of `blocks` blocks of [`LayerGroups`] for this rank's heads. (Every attention of the supported families is shaped alike.)
    pub fn cache_shape(&self, spec: &DecoderSpec, blocks: usize) -> CacheShape {
        let attn = spec.attentions().next().expect("a decoder attends");
        let Heads {
            kv_heads, head_dim, ..
        } = self.heads(attn);
        CacheShape {
            layers: LayerGroups::of(spec).layers,
            blocks,
            kv_heads,
            head_dim,
        }
    }

    pub fn world(&self) -> usize {
        self.shard.world
    }
}

impl Shard {
    fn linear(self, spec: &LinearSpec) -> LinearShard {
        let mut end = 0;
        let part = |part: &Part| {
            let rows = match spec.cut {
                Cut::Outputs => self.rows(part),
                Cut::Inputs | Cut::Whole => std::iter::once(0..part.width()).collect(),
                Cut::Vocabulary => vec![self.vocabulary(part.width())],
            };
            let start = end;
            end += rows.iter().map(|rows| rows.end - rows.start).sum::<i64>();
            PartShard {
                width: part.width(),
                path: part.path.clone(),
                rows,
                columns: start..end,
            }
        };
        LinearShard {
            parts: spec.parts.iter().map(part).collect(),
            inputs: match spec.cut {
                Cut::Outputs | Cut::Whole | Cut::Vocabulary => 0..spec.inputs,
                Cut::Inputs => self.equal(spec.inputs),
            },
            bias: match spec.cut {
                Cut::Inputs if self.rank > 0 => Bias::Without,
                _ => spec.bias,
            },
        }
    }

    fn rows(self, part: &Part) -> Vec<Range<i64>> {
        let mut start = 0;
        let section = |&Section { width, kv_heads }: &Section| {
            let rows = match kv_heads {
                Some(kv_heads) if kv_heads < self.world as i64 => {
                    let head = self.rank as i64 * kv_heads / self.world as i64;
                    let head_dim = width / kv_heads;
                    head * head_dim..(head + 1) * head_dim
                }
                _ => self.equal(width),
            };
            let first = start;
            start += width;
            first + rows.start..first + rows.end
        };
        part.sections.iter().map(section).collect()
    }

    /// Rows of the largest share of a vocabulary.
    fn widest(self, vocab: i64) -> i64 {
        let world = self.world as i64;
        (vocab + world - 1) / world
    }

    fn vocabulary(self, vocab: i64) -> Range<i64> {
        let (rank, widest) = (self.rank as i64, self.widest(vocab));
        rank * widest..vocab.min((rank + 1) * widest)
    }

    fn equal(self, n: i64) -> Range<i64> {
        let (rank, share) = (self.rank as i64, n / self.world as i64);
        rank * share..(rank + 1) * share
    }
}

/// Norms of all heads together, whose heads ranks divide.
fn spread_norms(spec: &DecoderSpec) -> impl Iterator<Item = (NormId, &NormSpec)> {
    let head_dim = spec.head_dim();
    spec.norms()
        .filter(move |(id, norm)| matches!(id, NormId::Query(_) | NormId::Key(_)) && norm.width != head_dim)
}

fn check(spec: &DecoderSpec, world: i64) -> Result<(), LoadError> {
    let cannot = |why: String| Err(LoadError::Option(format!("tensor-parallel size {world}: {why}")));
    for attn in spec.attentions() {
        let (AttnSpec { heads, kv_heads, .. }, path) = (attn, &attn.output.parts[0].path);
        if heads % world != 0 {
            return cannot(format!(
                "the {heads} attention heads before {path} are no multiple of it"
            ));
        }
        if kv_heads % world != 0 && world % kv_heads != 0 {
            return cannot(format!(
                "the {kv_heads} KV heads before {path} are neither a multiple nor a divisor of it"
            ));
        }
        let together = |norm: &QkNorm| norm.key.width != attn.head_dim;
        if *kv_heads < world && attn.qk_norm.as_ref().is_some_and(together) {
            return cannot(format!(
                "the {kv_heads} KV heads before {path} have one norm together, so no two ranks can share one"
            ));
        }
    }
    let bodies = spec.sublayers.iter().flat_map(|sublayer| &sublayer.bodies);
    for MlpSpec { inner, down, .. } in bodies.flat_map(Body::mlps) {
        if inner % world != 0 {
            let path = &down.parts[0].path;
            return cannot(format!(
                "the {inner} inner features before {path} are no multiple of it"
            ));
        }
    }
    if (world - 1) * ((spec.vocab + world - 1) / world) >= spec.vocab {
        return cannot(format!(
            "a vocabulary of {} leaves a rank without rows",
            spec.vocab
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::spec::{GATED, Projections};
    use crate::family::{Head, Logits, NormKind, NormSpec, Sublayer};
    use tandem_kernels::activation::Activation;
    use tandem_kernels::rope::{RopeLayout, RopeScaling, RopeSpec};

    fn spec(heads: i64, kv_heads: i64, inner: i64, vocab: i64) -> DecoderSpec {
        let (hidden, head_dim) = (64, 16);
        let (qkv, output) = Projections {
            module: "a",
            hidden,
            heads,
            kv_heads,
            head_dim,
            qkv_bias: Bias::With,
            o_bias: Bias::With,
        }
        .linears();
        let attn = AttnSpec {
            heads,
            kv_heads,
            head_dim,
            scale: 0.25,
            rope: Some(0),
            window: None,
            cap: None,
            qk_norm: None,
            sinks: None,
            qkv,
            output,
        };
        let norm = || NormSpec {
            kind: NormKind::Rms,
            path: "n".to_owned(),
            width: hidden,
            eps: 1e-5,
        };
        let sublayer = |body| Sublayer::new(norm(), body);
        let rope = RopeSpec {
            theta: 10_000.0,
            rotary_dim: head_dim,
            layout: RopeLayout::Half,
            scaling: RopeScaling::None,
        };
        DecoderSpec {
            vocab,
            hidden,
            embed_scale: 1.0,
            sublayers: vec![
                sublayer(Body::Attention(attn)),
                sublayer(Body::Mlp(MlpSpec::gated(
                    "m",
                    GATED,
                    [hidden, inner],
                    Activation::Silu,
                    Bias::Without,
                ))),
            ],
            ropes: vec![rope],
            final_norm: norm(),
            head: Head::Tied,
            logits: Logits::default(),
            max_positions: 64,
            eos_tokens: vec![],
            notes: vec![],
        }
    }

    /// Every row and column stands on some rank, KV rows on as many as share them.
    #[test]
    fn ranks_together_hold_everything() {
        for (heads, kv_heads, inner, vocab, world) in [
            (8, 4, 48, 101, 2),
            (8, 4, 48, 101, 4),
            (8, 2, 48, 101, 4),
            (8, 1, 48, 101, 8),
            (9, 3, 48, 100, 3),
        ] {
            let spec = spec(heads, kv_heads, inner, vocab);
            let ranks: Vec<Layout> = (0..world)
                .map(|rank| Layout::new(&spec, Shard { rank, world }).unwrap())
                .collect();
            assert_eq!(
                ranks.iter().map(|rank| rank.vocabulary.clone()).reduce(|a, b| {
                    assert_eq!(a.end, b.start);
                    a.start..b.end
                }),
                Some(0..vocab)
            );
            let copies = (world as i64 / kv_heads).max(1);
            for (id, whole) in spec.linears() {
                let inputs: i64 = ranks.iter().map(|rank| rank.linear(id).n_inputs()).sum();
                let by_inputs = whole.cut == Cut::Inputs;
                assert_eq!(inputs, whole.inputs * if by_inputs { 1 } else { world as i64 });
                for (i, part) in whole.parts.iter().enumerate() {
                    let rows: i64 = ranks.iter().map(|rank| rank.linear(id).parts[i].n_rows()).sum();
                    let copies = match part.sections[0].kv_heads {
                        Some(_) => copies,
                        None if by_inputs => world as i64,
                        None => 1,
                    };
                    assert_eq!(rows, part.width() * copies, "{} of {world} ranks", part.name);
                }
                for (rank, layout) in ranks.iter().enumerate() {
                    let once = by_inputs && rank > 0;
                    assert_eq!(
                        layout.linear(id).bias == Bias::Without,
                        once || whole.bias == Bias::Without
                    );
                }
            }
            // Query heads stand beside the KV head they read, and fill the products' rows together with it.
            let attn = spec.attentions().next().unwrap();
            for (rank, layout) in ranks.iter().enumerate() {
                let held = layout.heads(attn);
                let qkv = layout.linear(LinearId(0));
                let (first_head, kv_row) = (rank * held.heads, qkv.parts[1].rows[0].start as usize);
                assert_eq!(first_head / (heads / kv_heads) as usize, kv_row / held.head_dim);
                assert_eq!(
                    qkv.n_rows() as usize,
                    (held.heads + 2 * held.kv_heads) * held.head_dim
                );
            }
        }
    }

    #[test]
    fn what_cannot_be_divided_is_said_with_its_numbers() {
        for (spec, world, expected) in [
            (spec(9, 3, 48, 100), 2, "the 9 attention heads before a.o_proj"),
            (spec(12, 6, 48, 100), 4, "the 6 KV heads before a.o_proj"),
            (spec(8, 4, 50, 100), 4, "the 50 inner features before m.down_proj"),
            (spec(8, 4, 48, 5), 4, "a vocabulary of 5 leaves"),
        ] {
            let error = Layout::new(&spec, Shard { rank: 0, world })
                .unwrap_err()
                .to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
