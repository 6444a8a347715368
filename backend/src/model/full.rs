//! Every parameter of a decoder in one flat float32 buffer, for training all of them. Only `tandem train` does: a
//! served base never changes.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use safetensors::tensor::TensorView;
use tandem_core::rng;
use tch::{Device, Kind, Tensor};

use crate::family::{self, DecoderSpec, Head, NormId, NormKind, Param, ParamId, Source};
use crate::weights::{Checkpoint, LoadError, has_weights};

/// Matrices decay, norms and biases do not (as torchtune, nanoGPT and transformers' Trainer have it).
pub fn decays(id: ParamId) -> bool {
    matches!(id, ParamId::Embed | ParamId::Linear(_) | ParamId::Head)
}

#[derive(Clone, Debug, PartialEq)]
pub struct FullShape {
    /// In buffer order, each with its offset.
    params: Vec<(i64, Param)>,
    index: HashMap<ParamId, usize>,
    len: i64,
}

impl FullShape {
    pub fn new(spec: &DecoderSpec) -> FullShape {
        let mut len = 0;
        let place = |param: Param| {
            let offset = len;
            len += numbers(&param);
            (offset, param)
        };
        let params: Vec<(i64, Param)> = spec.params().into_iter().map(place).collect();
        let index = params
            .iter()
            .enumerate()
            .map(|(i, (_, param))| (param.id, i))
            .collect();
        FullShape { params, index, len }
    }

    pub fn len(&self) -> i64 {
        self.len
    }
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn has(&self, id: ParamId) -> bool {
        self.index.contains_key(&id)
    }

    /// Every parameter and its range in the flat buffer, in order.
    pub fn ranges(&self) -> impl Iterator<Item = (ParamId, Range<i64>)> {
        let ranges = self.params.iter();
        ranges.map(|(offset, param)| (param.id, *offset..offset + numbers(param)))
    }
}

fn numbers(param: &Param) -> i64 {
    param.shape.iter().product()
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
    pub fn init(spec: &DecoderSpec, seed: u64) -> FullParams {
        let shape = FullShape::new(spec);
        let mut numbers = vec![0f32; shape.len() as usize];
        let kinds: HashMap<NormId, NormKind> = spec.norms().map(|(id, norm)| (id, norm.kind)).collect();
        for (id, range) in shape.ranges() {
            for i in range {
                numbers[i as usize] = match id {
                    ParamId::Norm(id) => match kinds[&id] {
                        NormKind::Rms | NormKind::Layer { .. } => 1.0,
                        NormKind::RmsPlusOne => 0.0,
                    },
                    ParamId::Bias(_) | ParamId::NormBias(_) | ParamId::Sinks(_) => 0.0,
                    ParamId::Embed | ParamId::Linear(_) | ParamId::Head => {
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
        let head = if params.shape.has(ParamId::Head) {
            Head::Own
        } else {
            Head::Tied
        };
        for (name, mut view) in params.named() {
            view.copy_(&checkpoint.tensor(checkpoint.stored_name(&name, head), &view.size())?);
        }
        Ok(params)
    }

    /// A parameter in its own shape, a view.
    pub fn view(&self, id: ParamId) -> Tensor {
        self.view_of(&self.shape.params[self.shape.index[&id]])
    }

    fn view_of(&self, (offset, param): &(i64, Param)) -> Tensor {
        self.flat
            .narrow(0, *offset, numbers(param))
            .view(param.shape.as_slice())
    }

    /// Every checkpoint tensor by its Hugging Face name, views.
    pub fn named(&self) -> Vec<(String, Tensor)> {
        let tensors = |placed: &(i64, Param)| {
            let view = self.view_of(placed);
            let mut start = 0;
            let tensor = |Source { name, rows, .. }: &Source| {
                let first = start;
                start += rows;
                (name.clone(), view.narrow(0, first, *rows))
            };
            placed.1.tensors.iter().map(tensor).collect::<Vec<_>>()
        };
        self.shape.params.iter().flat_map(tensors).collect()
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

/// The model of a folder and its parameters, drawn when it has no weights (a model to be made from its config.json).
pub fn read_or_init(folder: &Path, seed: u64) -> Result<(DecoderSpec, FullParams), LoadError> {
    let trainable = |spec: &DecoderSpec| match spec
        .params()
        .iter()
        .flat_map(|param| &param.tensors)
        .find(|source| source.among.is_some())
    {
        None => Ok(()),
        Some(source) => Err(LoadError::Option(format!(
            "method full: all experts stand in one tensor, `{}`, which is not trained; method lora is",
            source.name
        ))),
    };
    if has_weights(folder) {
        let (spec, checkpoint) = family::open(folder)?;
        trainable(&spec)?;
        let params = FullParams::read(FullShape::new(&spec), &checkpoint)?;
        return Ok((spec, params));
    }
    let spec = family::read_spec(folder)?;
    trainable(&spec)?;
    let params = FullParams::init(&spec, seed);
    Ok((spec, params))
}

/// Keeps the draws of initialisation apart from those of shuffling.
const INIT_STREAM: u64 = 0xf011;
