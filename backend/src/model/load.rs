//! Builds a decoder, or one rank's part of it: from a checkpoint folder, or from parameters in training.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use tandem_kernels::comm::Comm;
use tandem_kernels::rope::Rope;
use tandem_kernels::weight::{Precision, Weight};
use tch::{Device, Kind, Tensor};

use super::attention::Attention;
use super::full::FullParams;
use super::linear::Linear;
use super::mlp::Mlp;
use super::sublayer::{Body, Sublayer};
use super::{Decoder, Norm};
use crate::family::shard::{Layout, Shard};
use crate::family::{self, Bias, DecoderSpec, Head, LinearId, NormSpec, Param, ParamId};
use crate::weights::{Checkpoint, LoadError};

/// Rows and columns that are wanted of a checkpoint's tensor. (A vector has one column.)
struct Piece {
    name: String,
    /// Of the whole tensor.
    shape: Vec<i64>,
    rows: Range<i64>,
    columns: Range<i64>,
}

impl Decoder {
    /// The whole model.
    pub fn load(folder: &Path, precision: Precision, device: Device) -> Result<Decoder, LoadError> {
        let (spec, checkpoint) = family::open(folder)?;
        Decoder::from_checkpoint(spec, &checkpoint, precision, device, Comm::solo())
    }

    /// This rank's part of the model, on `device`; nothing else of the checkpoint is read.
    pub fn from_checkpoint(
        spec: DecoderSpec,
        checkpoint: &Checkpoint,
        precision: Precision,
        device: Device,
        comm: Comm,
    ) -> Result<Decoder, LoadError> {
        let head = spec.head;
        Decoder::build(spec, precision, device, comm, |pieces| {
            let part = |piece: &Piece| {
                let Piece {
                    name,
                    shape,
                    rows,
                    columns,
                } = piece;
                checkpoint.part(
                    checkpoint.stored_name(name, head),
                    shape,
                    rows.clone(),
                    columns.clone(),
                )
            };
            let parts = pieces
                .iter()
                .map(part)
                .collect::<Result<Vec<Tensor>, LoadError>>()?;
            Ok(if parts.len() == 1 {
                parts.into_iter().next().expect("one part")
            } else {
                Tensor::cat(&parts, 0)
            })
        })
    }

    /// A decoder over parameters in training, to be refreshed by [`Decoder::update_full`] after each step.
    pub fn from_params(
        spec: DecoderSpec,
        params: &FullParams,
        precision: Precision,
    ) -> Result<Decoder, LoadError> {
        let views: std::collections::HashMap<String, Tensor> = params.named().into_iter().collect();
        Decoder::build(spec, precision, Device::Cpu, Comm::solo(), |pieces| {
            Ok(Tensor::cat(
                &pieces.iter().map(|piece| &views[&piece.name]).collect::<Vec<_>>(),
                0,
            ))
        })
    }

    /// `read` gives the rows of some pieces, one under the other.
    fn build(
        spec: DecoderSpec,
        precision: Precision,
        device: Device,
        comm: Comm,
        read: impl Fn(&[Piece]) -> Result<Tensor, LoadError>,
    ) -> Result<Decoder, LoadError> {
        let shard = Shard {
            rank: comm.rank(),
            world: comm.world(),
        };
        let layout = Layout::new(&spec, shard)?;
        let params: HashMap<ParamId, Param> =
            spec.params().into_iter().map(|param| (param.id, param)).collect();
        let dense = |id: ParamId| read(&layout.pieces(&params[&id]));
        let float = |id: ParamId| -> Result<Tensor, LoadError> {
            Ok(dense(id)?.to_device(device).to_kind(Kind::Float))
        };
        let packed =
            |id: ParamId| -> Result<Weight, LoadError> { Ok(Weight::new(&dense(id)?, precision, device)?) };
        let norm = |id: ParamId, norm: &NormSpec| -> Result<Norm, LoadError> {
            Ok(Norm {
                weight: float(id)?,
                eps: norm.eps,
            })
        };
        let mut ids = (0..).map(LinearId);
        let mut linear = || -> Result<Linear, LoadError> {
            let id = ids.next().expect("it has no end");
            Ok(Linear {
                id,
                weight: packed(ParamId::Linear(id))?,
                bias: match layout.linear(id).bias {
                    Bias::With => Some(float(ParamId::Bias(id))?),
                    Bias::Without => None,
                },
            })
        };
        let mut cache_layers = 0..;
        let mut body = |body: &family::Body| -> Result<Body, LoadError> {
            Ok(match body {
                family::Body::Attention(attn) => Body::Attention(Attention {
                    heads: layout.heads(attn),
                    scale: attn.scale,
                    rope: attn.rope,
                    cache_layer: cache_layers.next().expect("it has no end"),
                    qkv: linear()?,
                    output: linear()?,
                }),
                family::Body::Mlp(mlp) => Body::Mlp(Mlp {
                    activation: mlp.activation,
                    inner: mlp.inner as usize / layout.world(),
                    gate_up: linear()?,
                    down: linear()?,
                }),
            })
        };
        let embed = packed(ParamId::Embed)?;
        let head = match spec.head {
            Head::Tied => None,
            Head::Own => Some(packed(ParamId::Head)?),
        };
        let sublayers = spec
            .sublayers
            .iter()
            .enumerate()
            .map(|(i, sublayer)| {
                Ok(Sublayer {
                    norm: norm(ParamId::Norm(i), &sublayer.norm)?,
                    body: body(&sublayer.body)?,
                })
            })
            .collect::<Result<_, LoadError>>()?;
        let norm = norm(ParamId::FinalNorm, &spec.final_norm)?;
        let ropes = spec
            .ropes
            .iter()
            .map(|rope| Ok(Rope::new(rope, spec.head_dim(), spec.max_positions, device)?))
            .collect::<Result<_, LoadError>>()?;
        Ok(Decoder {
            spec,
            layout: Arc::new(layout),
            comm,
            precision,
            device,
            embed,
            sublayers,
            norm,
            head,
            ropes,
        })
    }

    /// Takes over `params` after an optimizer step of full training.
    pub fn update_full(&mut self, params: &FullParams) {
        self.embed
            .overwrite(&params.view(ParamId::Embed))
            .expect(SAME_SHAPE);
        if let Some(head) = &mut self.head {
            head.overwrite(&params.view(ParamId::Head)).expect(SAME_SHAPE);
        }
        self.norm.weight = params.view(ParamId::FinalNorm).copy();
        for (i, Sublayer { norm, body }) in self.sublayers.iter_mut().enumerate() {
            norm.weight = params.view(ParamId::Norm(i)).copy();
            for Linear { id, weight, bias } in body.linears_mut() {
                weight
                    .overwrite(&params.view(ParamId::Linear(*id)))
                    .expect(SAME_SHAPE);
                if let Some(bias) = bias {
                    *bias = params.view(ParamId::Bias(*id)).copy();
                }
            }
        }
    }

    /// Numbers in the checkpoint.
    pub fn parameters(&self) -> u64 {
        super::full::FullShape::new(&self.spec).len() as u64
    }

    /// Bytes this rank's weights take in memory (padding included; norms and biases are left out as nothing).
    pub fn weight_bytes(&self) -> u64 {
        let linears = self
            .sublayers
            .iter()
            .flat_map(|sublayer| sublayer.body.linears())
            .map(|linear| linear.weight.bytes());
        let head = self.head.as_ref().map_or(0, Weight::bytes);
        self.embed.bytes() + head + linears.sum::<u64>()
    }
}

impl Layout {
    /// What this rank holds of a parameter, tensor by tensor.
    fn pieces(&self, param: &Param) -> Vec<Piece> {
        let Param { id, shape, tensors } = param;
        let piece = |(name, rows): &(String, i64), held: Range<i64>, columns: Range<i64>| Piece {
            name: name.clone(),
            shape: [&[*rows], &shape[1..]].concat(),
            rows: held,
            columns,
        };
        match id {
            ParamId::Embed | ParamId::Head => {
                vec![piece(&tensors[0], self.vocabulary.clone(), 0..shape[1])]
            }
            ParamId::Norm(_) | ParamId::FinalNorm => vec![piece(&tensors[0], 0..shape[0], 0..1)],
            ParamId::Linear(id) | ParamId::Bias(id) => {
                let held = self.linear(*id);
                let parts = tensors.iter().zip(&held.parts);
                parts
                    .map(|(tensor, part)| piece(tensor, part.rows.clone(), held.inputs.clone()))
                    .collect()
            }
        }
    }
}

impl Body {
    fn linears(&self) -> [&Linear; 2] {
        match self {
            Body::Attention(Attention { qkv, output, .. }) => [qkv, output],
            Body::Mlp(Mlp { gate_up, down, .. }) => [gate_up, down],
        }
    }

    fn linears_mut(&mut self) -> [&mut Linear; 2] {
        match self {
            Body::Attention(Attention { qkv, output, .. }) => [qkv, output],
            Body::Mlp(Mlp { gate_up, down, .. }) => [gate_up, down],
        }
    }
}

/// Why taking new numbers over cannot fail.
const SAME_SHAPE: &str = "the numbers have the shape that the weight was packed from";
