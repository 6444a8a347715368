//! Which part of the model one rank holds: said here once, for loading, for adapters and for gradients. Not here: sums
//! over ranks (model), messages (ranks).
//!
//! Megatron's cut: heads and the inner width of the MLP are divided, so a layer needs two sums over ranks, one behind
//! the output projection and one behind the down projection. Where there are fewer KV heads than ranks, neighbours hold
//! the same one; each computes a gradient of its own query heads' share, so sums over ranks stay right. The vocabulary
//! is divided by rows, the last rank's share may be smaller.

use std::ops::Range;

use super::site::{Part, Site, SiteSpec};
use super::{AttnSpec, Bias, DecoderSpec};
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
    /// The spec this rank computes by: its own heads, KV heads and inner width; hidden size and vocabulary are whole.
    pub local: DecoderSpec,
    /// Rows of embedding and head.
    pub vocabulary: Range<i64>,
    /// Rows of the largest share of the vocabulary.
    pub widest: i64,
    /// `[layer][site]`
    sites: Vec<[SiteShard; 4]>,
}

/// What is held of a (fused) linear.
#[derive(Debug)]
pub struct SiteShard {
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
    /// Of those, what is held: rows of its weight, and of an adapter's B.
    pub rows: Range<i64>,
    /// Where they stand in this rank's fused output.
    pub columns: Range<i64>,
}

impl PartShard {
    pub fn n_rows(&self) -> i64 {
        self.rows.end - self.rows.start
    }
}

impl SiteShard {
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
        let (rank, world) = (shard.rank as i64, shard.world as i64);
        let mut local = spec.clone();
        for layer in &mut local.layers {
            layer.attn.heads /= world;
            layer.attn.kv_heads = (layer.attn.kv_heads / world).max(1);
            layer.mlp.inner /= world;
        }
        let widest = (spec.vocab + world - 1) / world;
        let sites = (0..spec.layers.len())
            .map(|layer| Site::ALL.map(|site| shard.site(spec, layer, site)))
            .collect();
        Ok(Layout {
            shard,
            local,
            vocabulary: rank * widest..spec.vocab.min((rank + 1) * widest),
            widest,
            sites,
        })
    }

    pub fn whole(spec: &DecoderSpec) -> Layout {
        Layout::new(spec, Shard::WHOLE).expect("one rank holds any model")
    }

    pub fn site(&self, layer: usize, site: Site) -> &SiteShard {
        &self.sites[layer][site.index()]
    }

    pub fn world(&self) -> usize {
        self.shard.world
    }
}

/// How a linear is divided.
enum Cut {
    /// Each rank computes some outputs of the whole input.
    Outputs,
    /// Each rank computes its share of every output from some inputs; the shares are summed.
    Inputs,
}

impl Shard {
    fn site(self, spec: &DecoderSpec, layer: usize, site: Site) -> SiteShard {
        let SiteSpec { inputs, bias, parts } = spec.site(layer, site);
        let cut = match site {
            Site::Qkv | Site::GateUp => Cut::Outputs,
            Site::Output | Site::Down => Cut::Inputs,
        };
        let mut end = 0;
        let part = |part: Part| {
            let rows = match cut {
                Cut::Outputs => self.rows(&spec.layers[layer].attn, &part),
                Cut::Inputs => 0..part.width(),
            };
            let start = end;
            end += rows.end - rows.start;
            PartShard {
                width: part.width(),
                path: part.path,
                rows,
                columns: start..end,
            }
        };
        SiteShard {
            parts: parts.into_iter().map(part).collect(),
            inputs: match cut {
                Cut::Outputs => 0..inputs,
                Cut::Inputs => self.equal(inputs),
            },
            bias: match cut {
                Cut::Inputs if self.rank > 0 => Bias::Without,
                _ => bias,
            },
        }
    }

    fn rows(self, attn: &AttnSpec, part: &Part) -> Range<i64> {
        match part.name {
            "k_proj" | "v_proj" if attn.kv_heads < self.world as i64 => {
                let head = self.rank as i64 * attn.kv_heads / self.world as i64;
                head * attn.head_dim..(head + 1) * attn.head_dim
            }
            _ => self.equal(part.width()),
        }
    }

    fn equal(self, n: i64) -> Range<i64> {
        let (rank, share) = (self.rank as i64, n / self.world as i64);
        rank * share..(rank + 1) * share
    }
}

fn check(spec: &DecoderSpec, world: i64) -> Result<(), LoadError> {
    let cannot = |why: String| Err(LoadError::Option(format!("tensor-parallel size {world}: {why}")));
    for (i, layer) in spec.layers.iter().enumerate() {
        let AttnSpec { heads, kv_heads, .. } = layer.attn;
        if heads % world != 0 {
            return cannot(format!(
                "the {heads} attention heads of layer {i} are no multiple of it"
            ));
        }
        if kv_heads % world != 0 && world % kv_heads != 0 {
            return cannot(format!(
                "the {kv_heads} KV heads of layer {i} are neither a multiple nor a divisor of it"
            ));
        }
        if layer.mlp.inner % world != 0 {
            let inner = layer.mlp.inner;
            return cannot(format!(
                "the MLP's {inner} inner features of layer {i} are no multiple of it"
            ));
        }
    }
    let widest = (spec.vocab + world - 1) / world;
    if (world - 1) * widest >= spec.vocab {
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
    use crate::family::{Head, LayerSpec, MlpSpec};
    use tandem_kernels::activation::Activation;
    use tandem_kernels::rope::{RopeScaling, RopeSpec};

    fn spec(heads: i64, kv_heads: i64, inner: i64, vocab: i64) -> DecoderSpec {
        let attn = AttnSpec {
            heads,
            kv_heads,
            head_dim: 16,
            qkv_bias: Bias::With,
            o_bias: Bias::With,
            rope: RopeSpec {
                theta: 10_000.0,
                rotary_dim: 16,
                scaling: RopeScaling::None,
            },
            scale: 0.25,
        };
        let mlp = MlpSpec {
            inner,
            activation: Activation::Silu,
            bias: Bias::Without,
        };
        DecoderSpec {
            vocab,
            hidden: 64,
            layers: vec![LayerSpec { attn, mlp }],
            norm_eps: 1e-5,
            head: Head::Tied,
            max_positions: 64,
            eos_tokens: vec![],
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
            for site in Site::ALL {
                let whole = spec.site(0, site);
                let inputs: i64 = ranks.iter().map(|rank| rank.site(0, site).n_inputs()).sum();
                let by_inputs = matches!(site, Site::Output | Site::Down);
                assert_eq!(inputs, whole.inputs * if by_inputs { 1 } else { world as i64 });
                for (i, part) in whole.parts.iter().enumerate() {
                    let rows: i64 = ranks
                        .iter()
                        .map(|rank| rank.site(0, site).parts[i].n_rows())
                        .sum();
                    let copies = match part.name {
                        "k_proj" | "v_proj" => copies,
                        _ if by_inputs => world as i64,
                        _ => 1,
                    };
                    assert_eq!(rows, part.width() * copies, "{} of {world} ranks", part.name);
                }
                for (rank, layout) in ranks.iter().enumerate() {
                    assert_eq!(
                        layout.site(0, site).n_rows(),
                        layout
                            .local
                            .site(0, site)
                            .parts
                            .iter()
                            .map(Part::width)
                            .sum::<i64>()
                    );
                    let once = site == Site::Output && rank > 0;
                    assert_eq!(
                        layout.site(0, site).bias == Bias::Without,
                        once || whole.bias == Bias::Without
                    );
                }
            }
            // Query heads stand beside the KV head they read.
            for (rank, layout) in ranks.iter().enumerate() {
                let attn = &layout.local.layers[0].attn;
                let first_head = rank as i64 * attn.heads;
                let kv_row = layout.site(0, Site::Qkv).parts[1].rows.start;
                assert_eq!(first_head / (heads / kv_heads), kv_row / attn.head_dim);
            }
        }
    }

    #[test]
    fn what_cannot_be_divided_is_said_with_its_numbers() {
        for (spec, world, expected) in [
            (spec(9, 3, 48, 100), 2, "the 9 attention heads of layer 0"),
            (spec(12, 6, 48, 100), 4, "the 6 KV heads of layer 0"),
            (spec(8, 4, 50, 100), 4, "the MLP's 50 inner features"),
            (spec(8, 4, 48, 5), 4, "a vocabulary of 5 leaves"),
        ] {
            let error = Layout::new(&spec, Shard { rank: 0, world })
                .unwrap_err()
                .to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
