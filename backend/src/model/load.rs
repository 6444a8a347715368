//! Builds a decoder: from a checkpoint folder, or from parameters in training.

use std::path::Path;

use tandem_kernels::rope::Rope;
use tandem_kernels::weight::{Precision, Weight};
use tch::{Device, Kind, Tensor};

use super::full::{FullParams, Slot};
use super::{Decoder, Layer, Linear};
use crate::family::site::Site;
use crate::family::{Bias, DecoderSpec, Head, read_spec};
use crate::weights::{Checkpoint, EMBED, HEAD, LoadError};

impl Decoder {
    pub fn load(folder: &Path, precision: Precision, device: Device) -> Result<Decoder, LoadError> {
        Decoder::from_checkpoint(read_spec(folder)?, &Checkpoint::open(folder)?, precision, device)
    }

    pub fn from_checkpoint(
        spec: DecoderSpec,
        checkpoint: &Checkpoint,
        precision: Precision,
        device: Device,
    ) -> Result<Decoder, LoadError> {
        let head = spec.head;
        Decoder::build(spec, precision, device, |names, shape| {
            let rows = |rows| [&[rows][..], &shape[1..]].concat();
            let parts = names
                .iter()
                .map(|(name, width)| checkpoint.tensor(checkpoint.stored_name(name, head), &rows(*width)));
            let parts = parts.collect::<Result<Vec<Tensor>, LoadError>>()?;
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
        Decoder::build(spec, precision, Device::Cpu, |names, _| {
            Ok(Tensor::cat(
                &names.iter().map(|(name, _)| &views[name]).collect::<Vec<_>>(),
                0,
            ))
        })
    }

    /// `read(names and widths of the parts, fused shape)` gives a parameter.
    fn build(
        spec: DecoderSpec,
        precision: Precision,
        device: Device,
        read: impl Fn(&[(String, i64)], &[i64]) -> Result<Tensor, LoadError>,
    ) -> Result<Decoder, LoadError> {
        let vector = |name: String, n: i64| -> Result<Tensor, LoadError> {
            Ok(read(&[(name, n)], &[n])?.to_device(device).to_kind(Kind::Float))
        };
        let table = |name: &str| -> Result<Weight, LoadError> {
            let dense = read(&[(name.to_owned(), spec.vocab)], &[spec.vocab, spec.hidden])?;
            Ok(Weight::new(&dense, precision, device)?)
        };
        let linear = |layer: usize, site: Site| -> Result<Linear, LoadError> {
            let linear = spec.site(layer, site);
            let named = |what: &str| -> Vec<(String, i64)> {
                linear
                    .parts
                    .iter()
                    .map(|part| (format!("{}.{what}", part.path), part.width()))
                    .collect()
            };
            let rows: i64 = linear.parts.iter().map(|part| part.width()).sum();
            let weight = Weight::new(
                &read(&named("weight"), &[rows, linear.inputs])?,
                precision,
                device,
            )?;
            let bias = match linear.bias {
                Bias::With => Some(
                    read(&named("bias"), &[rows])?
                        .to_device(device)
                        .to_kind(Kind::Float),
                ),
                Bias::Without => None,
            };
            Ok(Linear { weight, bias })
        };
        let layer = |i: usize| -> Result<Layer, LoadError> {
            Ok(Layer {
                attn_norm: vector(format!("model.layers.{i}.input_layernorm.weight"), spec.hidden)?,
                mlp_norm: vector(
                    format!("model.layers.{i}.post_attention_layernorm.weight"),
                    spec.hidden,
                )?,
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
        let norm = vector("model.norm.weight".to_owned(), spec.hidden)?;
        let attn = &spec.layers[0].attn;
        let rope = Rope::new(&attn.rope, attn.head_dim, spec.max_positions, device)?;
        Ok(Decoder {
            spec,
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

    /// Bytes the weights take in memory (padding included; norms and biases are left out as nothing).
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
