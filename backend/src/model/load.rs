//! Builds a decoder, or one rank's part of it: from a checkpoint folder, or from parameters in training.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use tandem_kernels::comm::Comm;
use tandem_kernels::rope::Rope;
use tandem_kernels::weight::{Precision, Weight};
use tch::{Device, Kind, Tensor};

use super::Decoder;
use super::attention::{Attention, QkNorm};
use super::full::FullParams;
use super::linear::Linear;
use super::mlp::Mlp;
use super::norm::{Norm, Spread};
use super::sublayer::{Body, Sublayer};
use crate::family::shard::{Layout, Shard};
use crate::family::{self, Bias, DecoderSpec, Head, LinearId, NormId, NormSpec, Param, ParamId};
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
        let rows =
            |Piece { name, rows, .. }: &Piece| views[name].narrow(0, rows.start, rows.end - rows.start);
        Decoder::build(spec, precision, Device::Cpu, Comm::solo(), |pieces| {
            Ok(Tensor::cat(&pieces.iter().map(rows).collect::<Vec<_>>(), 0))
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
        let norm = |id: NormId, norm: &NormSpec| -> Result<Norm, LoadError> {
            let width = norm.width;
            let spread = layout.spread(id).map(|_| Spread {
                comm: comm.clone(),
                width,
            });
            Ok(Norm {
                id,
                kind: norm.kind,
                weight: Norm::weight_of(norm.kind, &float(ParamId::Norm(id))?),
                bias: match norm.bias() {
                    Bias::With => Some(float(ParamId::NormBias(id))?),
                    Bias::Without => None,
                },
                eps: norm.eps,
                spread,
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
        let mut body = |i: usize, body: &family::Body| -> Result<Body, LoadError> {
            Ok(match body {
                family::Body::Attention(attn) => Body::Attention(Box::new(Attention {
                    heads: layout.heads(attn),
                    scale: attn.scale,
                    window: attn.window,
                    cap: attn.cap,
                    sinks: None,
                    rope: attn.rope,
                    qk_norm: match &attn.qk_norm {
                        None => None,
                        Some(family::QkNorm { query, key }) => Some(QkNorm {
                            query: norm(NormId::Query(i), query)?,
                            key: norm(NormId::Key(i), key)?,
                        }),
                    },
                    cache_layer: cache_layers.next().expect("it has no end"),
                    qkv: linear()?,
                    output: linear()?,
                })),
                family::Body::Mlp(mlp) => Body::Mlp(Box::new(Mlp {
                    activation: mlp.activation,
                    up: linear()?,
                    down: linear()?,
                })),
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
                let outer =
                    |id, spec: &Option<NormSpec>| spec.as_ref().map(|spec| norm(id, spec)).transpose();
                Ok(Sublayer {
                    pre: outer(NormId::Pre(i), &sublayer.pre)?,
                    bodies: sublayer
                        .bodies
                        .iter()
                        .map(|spec| body(i, spec))
                        .collect::<Result<_, _>>()?,
                    post: outer(NormId::Post(i), &sublayer.post)?,
                    scale: sublayer.scale,
                })
            })
            .collect::<Result<_, LoadError>>()?;
        let norm = norm(NormId::Final, &spec.final_norm)?;
        let ropes = spec
            .ropes
            .iter()
            .map(|rope| Ok(Rope::new(rope, spec.head_dim(), spec.max_positions, device)?))
            .collect::<Result<_, LoadError>>()?;
        let embed_scale = Tensor::from(spec.embed_scale)
            .to_kind(precision.kind())
            .double_value(&[]);
        Ok(Decoder {
            spec,
            layout: Arc::new(layout),
            comm,
            precision,
            device,
            embed,
            embed_scale,
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
        self.norm.update(params);
        for sublayer in &mut self.sublayers {
            sublayer.norms_mut().for_each(|norm| norm.update(params));
            for Linear { id, weight, bias } in sublayer.linears_mut() {
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
            .flat_map(Sublayer::linears)
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
            ParamId::Norm(id) | ParamId::NormBias(id) => {
                let rows = self.spread(*id).unwrap_or(0..shape[0]);
                vec![piece(&tensors[0], rows, 0..1)]
            }
            ParamId::Linear(id) | ParamId::Bias(id) => {
                let held = self.linear(*id);
                let rows = tensors
                    .iter()
                    .zip(&held.parts)
                    .flat_map(|(tensor, part)| part.rows.iter().map(move |rows| (tensor, rows)));
                rows.map(|(tensor, rows)| piece(tensor, rows.clone(), held.inputs.clone()))
                    .collect()
            }
        }
    }
}

impl Sublayer {
    fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.bodies.iter().flat_map(|body| match body {
            Body::Attention(attn) => [&attn.qkv, &attn.output],
            Body::Mlp(mlp) => [&mlp.up, &mlp.down],
        })
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.bodies.iter_mut().flat_map(|body| match body {
            Body::Attention(attn) => [&mut attn.qkv, &mut attn.output],
            Body::Mlp(mlp) => [&mut mlp.up, &mut mlp.down],
        })
    }

    fn norms_mut(&mut self) -> impl Iterator<Item = &mut Norm> {
        let inner = self.bodies.iter_mut().filter_map(|body| match body {
            Body::Attention(attn) => attn.qk_norm.as_mut(),
            Body::Mlp(_) => None,
        });
        let inner = inner.flat_map(|QkNorm { query, key }| [query, key]);
        self.pre.iter_mut().chain(&mut self.post).chain(inner)
    }
}

impl Norm {
    fn update(&mut self, params: &FullParams) {
        self.weight = Norm::weight_of(self.kind, &params.view(ParamId::Norm(self.id)));
        if let Some(bias) = &mut self.bias {
            *bias = params.view(ParamId::NormBias(self.id)).copy();
        }
    }
}

/// Why taking new numbers over cannot fail.
const SAME_SHAPE: &str = "the numbers have the shape that the weight was packed from";
