//! Every parameter of a decoder in one flat float32 buffer, for training all of them. Only `tandem train` does: a
//! served base never changes.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use tandem_core::rng;
use tch::{Device, Kind, Tensor};

use crate::family::site::Site;
use crate::family::{Bias, DecoderSpec, Head};
use crate::weights::{Checkpoint, LoadError, has_weights};

/// One parameter as the decoder uses it (fused linears are one).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    Embed,
    AttnNorm(usize),
    MlpNorm(usize),
    Linear(usize, Site),
    Bias(usize, Site),
    FinalNorm,
    Head,
}

impl Slot {
    /// Matrices decay, norms and biases do not (as torchtune, nanoGPT and transformers' Trainer have it).
    pub fn decays(self) -> bool {
        matches!(self, Slot::Embed | Slot::Linear(..) | Slot::Head)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct FullShape {
    /// In buffer order.
    entries: Vec<Entry>,
    index: HashMap<Slot, usize>,
    len: i64,
}

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    slot: Slot,
    offset: i64,
    shape: Vec<i64>,
    /// Hugging Face names of its row ranges, in order.
    names: Vec<(String, i64)>,
}

impl FullShape {
    pub fn new(spec: &DecoderSpec) -> FullShape {
        let mut shape = FullShape {
            entries: vec![],
            index: HashMap::new(),
            len: 0,
        };
        let name = |name: &str, rows| vec![(name.to_owned(), rows)];
        shape.push(
            Slot::Embed,
            &[spec.vocab, spec.hidden],
            name("model.embed_tokens.weight", spec.vocab),
        );
        for i in 0..spec.layers.len() {
            for (slot, norm) in [
                (Slot::AttnNorm(i), "input_layernorm"),
                (Slot::MlpNorm(i), "post_attention_layernorm"),
            ] {
                shape.push(
                    slot,
                    &[spec.hidden],
                    name(&format!("model.layers.{i}.{norm}.weight"), spec.hidden),
                );
            }
            for site in Site::ALL {
                let linear = spec.site(i, site);
                let rows = linear.parts.iter().map(|part| part.width()).sum();
                let named = |what| {
                    linear
                        .parts
                        .iter()
                        .map(|p| (format!("{}.{what}", p.path), p.width()))
                        .collect()
                };
                shape.push(Slot::Linear(i, site), &[rows, linear.inputs], named("weight"));
                if linear.bias == Bias::With {
                    shape.push(Slot::Bias(i, site), &[rows], named("bias"));
                }
            }
        }
        shape.push(
            Slot::FinalNorm,
            &[spec.hidden],
            name("model.norm.weight", spec.hidden),
        );
        if spec.head == Head::Own {
            shape.push(
                Slot::Head,
                &[spec.vocab, spec.hidden],
                name("lm_head.weight", spec.vocab),
            );
        }
        shape
    }

    fn push(&mut self, slot: Slot, shape: &[i64], names: Vec<(String, i64)>) {
        self.index.insert(slot, self.entries.len());
        self.entries.push(Entry {
            slot,
            offset: self.len,
            shape: shape.to_vec(),
            names,
        });
        self.len += shape.iter().product::<i64>();
    }

    pub fn len(&self) -> i64 {
        self.len
    }
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn has(&self, slot: Slot) -> bool {
        self.index.contains_key(&slot)
    }

    /// Every slot and its range in the flat buffer, in order.
    pub fn slots(&self) -> impl Iterator<Item = (Slot, std::ops::Range<i64>)> {
        self.entries.iter().map(|entry| {
            (
                entry.slot,
                entry.offset..entry.offset + entry.shape.iter().product::<i64>(),
            )
        })
    }
}

/// Numbers of every parameter, or anything shaped like them.
pub struct FullParams {
    /// `[P]` float32
    pub flat: Tensor,
    pub shape: FullShape,
}

impl FullParams {
    pub fn zeros(shape: FullShape) -> FullParams {
        FullParams {
            flat: Tensor::zeros([shape.len()], (Kind::Float, Device::Cpu)),
            shape,
        }
    }

    /// Matrices normal with deviation 0.02 (transformers' `initializer_range`), norms one, biases zero.
    pub fn init(shape: FullShape, seed: u64) -> FullParams {
        let mut numbers = vec![0f32; shape.len() as usize];
        for (slot, range) in shape.slots() {
            for i in range {
                numbers[i as usize] = match slot {
                    Slot::AttnNorm(_) | Slot::MlpNorm(_) | Slot::FinalNorm => 1.0,
                    Slot::Bias(..) => 0.0,
                    Slot::Embed | Slot::Linear(..) | Slot::Head => {
                        (0.02 * rng::normal(seed, INIT_STREAM, i as u64)) as f32
                    }
                };
            }
        }
        FullParams {
            flat: Tensor::from_slice(&numbers),
            shape,
        }
    }

    pub fn read(shape: FullShape, checkpoint: &Checkpoint) -> Result<FullParams, LoadError> {
        let params = FullParams::zeros(shape);
        let head = if params.shape.has(Slot::Head) {
            Head::Own
        } else {
            Head::Tied
        };
        for (name, mut view) in params.named() {
            view.copy_(&checkpoint.tensor(checkpoint.stored_name(&name, head), &view.size())?);
        }
        Ok(params)
    }

    /// The slot's parameter, a view in its own shape.
    pub fn view(&self, slot: Slot) -> Tensor {
        let Entry { offset, shape, .. } = &self.shape.entries[self.shape.index[&slot]];
        self.flat
            .narrow(0, *offset, shape.iter().product())
            .view(shape.as_slice())
    }

    /// Every checkpoint tensor by its Hugging Face name, views.
    pub fn named(&self) -> Vec<(String, Tensor)> {
        let parts = |entry: &Entry| {
            let view = self.view(entry.slot);
            let mut start = 0;
            let part = |(name, rows): &(String, i64)| {
                let first = start;
                start += rows;
                (name.clone(), view.narrow(0, first, *rows))
            };
            entry.names.iter().map(part).collect::<Vec<_>>()
        };
        self.shape.entries.iter().flat_map(parts).collect()
    }

    /// The bytes of a model.safetensors, numbers stored as `kind` (float32 or bfloat16).
    pub fn serialise(&self, kind: Kind) -> Vec<u8> {
        let dtype = match kind {
            Kind::BFloat16 => safetensors::Dtype::BF16,
            Kind::Half => safetensors::Dtype::F16,
            _ => safetensors::Dtype::F32,
        };
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = self
            .named()
            .into_iter()
            .map(|(name, view)| {
                let shape = view.size().iter().map(|&n| n as usize).collect();
                let stored = view.to_kind(kind).contiguous();
                let mut bytes = vec![0; stored.numel() * kind.elt_size_in_bytes()];
                stored.copy_data_u8(&mut bytes, stored.numel());
                (name, shape, bytes)
            })
            .collect();
        let views = tensors.iter().map(|(name, shape, bytes)| {
            (
                name,
                TensorView::new(dtype, shape.clone(), bytes).expect("bytes are the shape's"),
            )
        });
        let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
        safetensors::serialize(views, metadata).expect("plain views serialise")
    }
}

/// Opens the folder's weights, or draws them when it has none (a model to be made from its config.json).
pub fn read_or_init(folder: &Path, spec: &DecoderSpec, seed: u64) -> Result<FullParams, LoadError> {
    let shape = FullShape::new(spec);
    match has_weights(folder) {
        true => FullParams::read(shape, &Checkpoint::open(folder)?),
        false => Ok(FullParams::init(shape, seed)),
    }
}

/// Keeps the draws of initialisation apart from those of shuffling.
const INIT_STREAM: u64 = 0xf011;
