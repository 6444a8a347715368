//! Builds a decoder, or one rank's part of it: from a checkpoint folder, or from parameters in training.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use tandem_kernels::comm::Comm;
use tandem_kernels::rope::Rope;
use tandem_kernels::weight::{Precision, Weight};
use tch::{Device, Kind, Tensor};

use super::full::{FullParams, Slot};
use super::{Decoder, Layer, Linear};
use crate::family::shard::{Layout, Shard};
use crate::family::site::Site;
use crate::family::{Bias, DecoderSpec, Head, read_spec};
use crate::weights::{Checkpoint, EMBED, HEAD, LoadError};

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
        let checkpoint = Checkpoint::open(folder)?;
        Decoder::from_checkpoint(read_spec(folder)?, &checkpoint, precision, device, Comm::solo())
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
        let float = |pieces: &[Piece]| -> Result<Tensor, LoadError> {
            Ok(read(pieces)?.to_device(device).to_kind(Kind::Float))
        };
        let norm = |name: String| {
            float(&[Piece {
                name,
                shape: vec![spec.hidden],
                rows: 0..spec.hidden,
                columns: 0..1,
            }])
        };
        let table = |name: &str| -> Result<Weight, LoadError> {
            let dense = read(&[Piece {
                name: name.to_owned(),
                shape: vec![spec.vocab, spec.hidden],
                rows: layout.vocabulary.clone(),
                columns: 0..spec.hidden,
            }])?;
            Ok(Weight::new(&dense, precision, device)?)
        };
        let linear = |layer: usize, site: Site| -> Result<Linear, LoadError> {
            let inputs = spec.site(layer, site).inputs;
            let held = layout.site(layer, site);
            let weights = held.parts.iter().map(|part| Piece {
                name: format!("{}.weight", part.path),
                shape: vec![part.width, inputs],
                rows: part.rows.clone(),
                columns: held.inputs.clone(),
            });
            let weight = Weight::new(&read(&weights.collect::<Vec<_>>())?, precision, device)?;
            let biases = held.parts.iter().map(|part| Piece {
                name: format!("{}.bias", part.path),
                shape: vec![part.width],
                rows: part.rows.clone(),
                columns: 0..1,
            });
            let bias = match held.bias {
                Bias::With => Some(float(&biases.collect::<Vec<_>>())?),
                Bias::Without => None,
            };
            Ok(Linear { weight, bias })
        };
        let layer = |i: usize| -> Result<Layer, LoadError> {
            Ok(Layer {
                attn_norm: norm(format!("model.layers.{i}.input_layernorm.weight"))?,
                mlp_norm: norm(format!("model.layers.{i}.post_attention_layernorm.weight"))?,
                linears: [
                    linear(i, Site::Qkv)?,
                    linear(i, Site::Output)?,
                    linear(i, Site::GateUp)?,
                    linear(i, Site::Down)?,
                ],
            })
        };
        let embed = table(EMBED)?;
        let head = match spec.head {
            Head::Tied => None,
            Head::Own => Some(table(HEAD)?),
        };
        let layers = (0..spec.layers.len())
            .map(layer)
            .collect::<Result<_, LoadError>>()?;
        let norm = norm("model.norm.weight".to_owned())?;
        let attn = &spec.layers[0].attn;
        let rope = Rope::new(&attn.rope, attn.head_dim, spec.max_positions, device)?;
        Ok(Decoder {
            spec,
            layout: Arc::new(layout),
            comm,
            precision,
            device,
            embed,
            layers,
            norm,
            head,
            rope,
        })
    }

    /// Takes over `params` after an optimizer step of full training.
    pub fn update_full(&mut self, params: &FullParams) {
        self.embed.overwrite(&params.view(Slot::Embed)).expect(SAME_SHAPE);
        if let Some(head) = &mut self.head {
            head.overwrite(&params.view(Slot::Head)).expect(SAME_SHAPE);
        }
        self.norm = params.view(Slot::FinalNorm).copy();
        for (i, layer) in self.layers.iter_mut().enumerate() {
            layer.attn_norm = params.view(Slot::AttnNorm(i)).copy();
            layer.mlp_norm = params.view(Slot::MlpNorm(i)).copy();
            for site in Site::ALL {
                let linear = &mut layer.linears[site.index()];
                linear
                    .weight
                    .overwrite(&params.view(Slot::Linear(i, site)))
                    .expect(SAME_SHAPE);
                if let Some(bias) = &mut linear.bias {
                    *bias = params.view(Slot::Bias(i, site)).copy();
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
            .layers
            .iter()
            .flat_map(|layer| &layer.linears)
            .map(|linear| linear.weight.bytes());
        let head = self.head.as_ref().map_or(0, Weight::bytes);
        self.embed.bytes() + head + linears.sum::<u64>()
    }
}

/// Why taking new numbers over cannot fail.
const SAME_SHAPE: &str = "the numbers have the shape that the weight was packed from";
