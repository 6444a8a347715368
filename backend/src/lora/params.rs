//! An adapter's numbers: one flat float32 buffer and its shape. What training steps over and PEFT files hold.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde::{Deserialize, Serialize};
use tandem_core::job::Lora;
use tandem_core::rng;
use tch::{Device, Kind, Tensor};

use crate::family::{DecoderSpec, LinearId, LinearSpec};
use crate::weights::EMBED_PATH;

/// Which parts of which linears are adapted, with what rank and scale. Layers and ranks may be ragged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterShape {
    /// By [`LinearId`].
    linears: Vec<Option<LinearShape>>,
    len: i64,
}

/// The adapted parts of one fused linear. In the flat buffer: the A of all parts (each `[r, inputs]`, so they are also
/// one `[R, inputs]` matrix), then the B of all parts (each `[width, r]`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinearShape {
    pub inputs: i64,
    pub parts: Vec<PartShape>,
    offset: i64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartShape {
    /// `model.layers.0.self_attn.q_proj`
    pub path: String,
    /// Of the fused linear's output.
    pub columns: Range<i64>,
    /// Rows of this part in the stacked A.
    pub ranks: Range<i64>,
    /// alpha / r, or alpha / sqrt(r).
    pub scale: f64,
    b_offset: i64,
    /// Of DoRA's magnitudes `[width]`, which stand behind all A and B.
    magnitude_offset: Option<i64>,
}

impl PartShape {
    pub fn rank(&self) -> i64 {
        self.ranks.end - self.ranks.start
    }
    pub fn width(&self) -> i64 {
        self.columns.end - self.columns.start
    }
}

impl LinearShape {
    /// Rows of the stacked A.
    pub fn rank(&self) -> i64 {
        self.parts.iter().map(PartShape::rank).sum()
    }
}

impl LinearShape {
    pub fn is_embedding(&self) -> bool {
        self.parts[0].path == EMBED_PATH
    }
}

impl AdapterShape {
    /// `choose(path, name)` gives the rank and scale of a module, or `None` when it is not adapted.
    pub fn build(
        spec: &DecoderSpec,
        mut choose: impl FnMut(&str, &str) -> Option<(i64, f64)>,
    ) -> AdapterShape {
        let mut len = 0;
        let linear_shape = |linear: &LinearSpec| {
            let offset = len;
            let mut ranks = 0;
            let mut parts: Vec<PartShape> = vec![];
            for part in &linear.parts {
                let Some((r, scale)) = choose(&part.path, part.name) else {
                    continue;
                };
                let first = ranks;
                ranks += r;
                let ranks = first..ranks;
                parts.push(PartShape {
                    path: part.path.clone(),
                    columns: part.start..part.start + part.width(),
                    ranks,
                    scale,
                    b_offset: 0,
                    magnitude_offset: None,
                });
            }
            len += ranks * linear.inputs;
            for part in &mut parts {
                part.b_offset = len;
                len += part.width() * part.rank();
            }
            (!parts.is_empty()).then_some(LinearShape {
                inputs: linear.inputs,
                parts,
                offset,
            })
        };
        let linears = spec.adaptable().iter().map(linear_shape).collect();
        AdapterShape { linears, len }
    }

    /// One rank and scale for the named modules of every layer.
    pub fn new(spec: &DecoderSpec, lora: &Lora) -> AdapterShape {
        let targets = |name: &str| lora.target_modules.iter().any(|target| target == name);
        let shape = AdapterShape::build(spec, |_, name| {
            targets(name).then(|| (i64::from(lora.r), lora.scale()))
        });
        match lora.use_dora {
            true => shape.with_magnitudes(),
            false => shape,
        }
    }

    /// Does it adapt nothing that `bounds` does not, and nothing of a higher rank? Scales may differ.
    pub fn is_within(&self, bounds: &AdapterShape) -> bool {
        let parts = |shape: &AdapterShape| {
            let parts = shape.iter().flat_map(|(_, linear)| linear.parts.clone());
            parts
                .map(|part| (part.path.clone(), part))
                .collect::<BTreeMap<_, _>>()
        };
        let (own, bounds) = (parts(self), parts(bounds));
        own.iter().all(|(path, part)| {
            let bound = bounds.get(path);
            bound.is_some_and(|bound| {
                part.rank() <= bound.rank()
                    && part.magnitude_offset.is_some() == bound.magnitude_offset.is_some()
            })
        })
    }

    /// The numbers at rank 1 of all modules of a name, for every name.
    pub fn sizes(spec: &DecoderSpec) -> BTreeMap<String, u64> {
        let linears = spec.adaptable();
        let names: BTreeSet<&str> = linears
            .iter()
            .flat_map(|linear| &linear.parts)
            .map(|part| part.name)
            .collect();
        let size = |name: &str| AdapterShape::build(spec, |_, of| (of == name).then_some((1, 1.0))).len;
        names
            .into_iter()
            .map(|name| (name.to_owned(), size(name) as u64))
            .collect()
    }

    /// DoRA's, of every part.
    pub fn with_magnitudes(mut self) -> AdapterShape {
        for part in self
            .linears
            .iter_mut()
            .flatten()
            .flat_map(|linear| &mut linear.parts)
        {
            part.magnitude_offset = Some(self.len);
            self.len += part.width();
        }
        self
    }

    /// The whole buffer in order, as the tensors that peft has: where each lies, the numbers of a row of a matrix, and whether
    /// it is an A.
    pub fn parameters(&self) -> impl Iterator<Item = (Range<i64>, Option<i64>, bool)> {
        let matrices = self.iter().flat_map(|(_, linear)| {
            let a = linear.parts.iter().map(|part| {
                let rows = linear.offset + part.ranks.start * linear.inputs;
                (
                    rows..rows + part.rank() * linear.inputs,
                    Some(linear.inputs),
                    true,
                )
            });
            let b = linear.parts.iter().map(|part| {
                let numbers = part.width() * part.rank();
                (part.b_offset..part.b_offset + numbers, Some(part.rank()), false)
            });
            a.chain(b)
        });
        let parts = self.iter().flat_map(|(_, linear)| &linear.parts);
        let magnitudes = parts.filter_map(|part| {
            let start = part.magnitude_offset?;
            Some((start..start + part.width(), None, false))
        });
        matrices.chain(magnitudes)
    }

    /// Where the magnitudes lie in the flat buffer, where there are some.
    pub fn magnitudes(&self) -> Option<Range<i64>> {
        let mut parts = self.iter().flat_map(|(_, linear)| &linear.parts);
        let first = parts.find_map(|part| part.magnitude_offset)?;
        Some(first..self.len)
    }

    /// Numbers in the flat buffer.
    pub fn len(&self) -> i64 {
        self.len
    }
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    pub fn linear(&self, id: LinearId) -> Option<&LinearShape> {
        self.linears[id.0].as_ref()
    }
    /// Every linear of the model, adapted or not.
    pub fn ids(&self) -> impl Iterator<Item = LinearId> {
        (0..self.linears.len()).map(LinearId)
    }
    /// Every adapted linear, in buffer order.
    pub fn iter(&self) -> impl Iterator<Item = (LinearId, &LinearShape)> {
        self.ids().filter_map(|id| Some((id, self.linear(id)?)))
    }
    /// Largest rank of a part.
    pub fn max_rank(&self) -> i64 {
        self.iter()
            .flat_map(|(_, linear)| &linear.parts)
            .map(PartShape::rank)
            .max()
            .unwrap_or(0)
    }
}

/// Numbers of an adapter, or anything shaped like them (gradients).
pub struct AdapterParams {
    /// `[P]` float32 on the CPU.
    pub flat: Tensor,
    pub shape: AdapterShape,
}

impl AdapterParams {
    pub fn zeros(shape: AdapterShape) -> AdapterParams {
        AdapterParams {
            flat: Tensor::zeros([shape.len()], (Kind::Float, Device::Cpu)),
            shape,
        }
    }

    /// A uniform in +-1/sqrt(inputs), B zero: PEFT's default (kaiming_uniform with a = sqrt 5). Of the embedding A is zero and B
    /// normal, as there.
    pub fn init(shape: AdapterShape, seed: u64) -> AdapterParams {
        let mut numbers = vec![0f32; shape.len() as usize];
        for (_, linear) in shape.iter() {
            if linear.is_embedding() {
                let part = &linear.parts[0];
                let b = part.b_offset..part.b_offset + part.width() * part.rank();
                let numbers = &mut numbers[b.start as usize..b.end as usize];
                for (i, number) in (b.start..).zip(numbers) {
                    *number = rng::normal(seed, EMBED_STREAM, i as u64) as f32;
                }
                continue;
            }
            let bound = 1.0 / (linear.inputs as f64).sqrt();
            let a = linear.offset as usize..(linear.offset + linear.rank() * linear.inputs) as usize;
            for i in a {
                numbers[i] = ((2.0 * rng::uniform(seed, INIT_STREAM, i as u64) - 1.0) * bound) as f32;
            }
        }
        AdapterParams {
            flat: Tensor::from_slice(&numbers),
            shape,
        }
    }

    /// The stacked A `[R, inputs]`, a view.
    pub fn a(&self, linear: &LinearShape) -> Tensor {
        self.flat
            .narrow(0, linear.offset, linear.rank() * linear.inputs)
            .view([linear.rank(), linear.inputs])
    }

    /// One part's A `[r, inputs]`, a view.
    pub fn part_a(&self, linear: &LinearShape, part: &PartShape) -> Tensor {
        self.a(linear).narrow(0, part.ranks.start, part.rank())
    }

    /// One part's magnitudes `[width]`, a view; of DoRA alone.
    pub fn magnitude(&self, part: &PartShape) -> Option<Tensor> {
        Some(self.flat.narrow(0, part.magnitude_offset?, part.width()))
    }

    /// One part's B `[width, r]`, a view.
    pub fn b(&self, part: &PartShape) -> Tensor {
        self.flat
            .narrow(0, part.b_offset, part.width() * part.rank())
            .view([part.width(), part.rank()])
    }
}

/// Keeps the draws of initialisation apart from those of shuffling and dropout.
const INIT_STREAM: u64 = 0x1417;
const EMBED_STREAM: u64 = 0x1418;
