//! Builds a decoder, or one rank's part of it: from a checkpoint folder, or from parameters in training.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use tandem_kernels::comm::Comm;
use tandem_kernels::rope::Rope;
use tandem_kernels::weight::{Format, Precision, Recipe, Shard as WeightShard, Weight};
use tch::{Device, Kind, Tensor};

use super::Decoder;
use super::attention::{Attention, QkNorm};
use super::expert_tensors::ExpertTensors;
use super::experts::{Experts, Shared};
use super::full::FullParams;
use super::linear::Linear;
use super::mlp::Mlp;
use super::norm::{Norm, Spread};
use super::stored::{Stored, TrainedShare};
use super::sublayer::{Body, Sublayer};
use crate::family::shard::{Layout, Shard};
use crate::family::{
    self, Among, Bias, DecoderSpec, Head, LayerGroups, LinearId, MlpSpec, NormId, NormSpec, Param, ParamId,
    Source,
};
use crate::weights::{Checkpoint, LoadError, Matrix};

/// Rows and columns that are wanted of a checkpoint's tensor. (A vector has one column.)
struct Piece {
    name: String,
    /// Of the whole tensor.
    shape: Vec<i64>,
    rows: Range<i64>,
    columns: Range<i64>,
    among: Option<Among>,
}

impl Piece {
    /// The same rows, all of their columns.
    fn whole_rows(&self) -> Piece {
        Piece {
            name: self.name.clone(),
            shape: self.shape.clone(),
            rows: self.rows.clone(),
            columns: 0..self.shape[1],
            among: self.among.clone(),
        }
    }
}

/// How weights are stored and multiplied.
#[derive(Clone, Copy, Debug)]
pub struct WeightOptions {
    pub precision: Precision,
    /// What dense linears become. Embedding and head stay in the precision, norms and biases in float32.
    pub recipe: Option<Recipe>,
    pub device: Device,
}

impl WeightOptions {
    /// As the checkpoint has them.
    pub fn new(precision: Precision, device: Device) -> WeightOptions {
        WeightOptions {
            precision,
            recipe: None,
            device,
        }
    }
}

impl Decoder {
    /// The whole model, its weights as the checkpoint has them.
    pub fn load(folder: &Path, precision: Precision, device: Device) -> Result<Decoder, LoadError> {
        Decoder::open(folder, WeightOptions::new(precision, device))
    }

    /// The whole model.
    pub fn open(folder: &Path, options: WeightOptions) -> Result<Decoder, LoadError> {
        Decoder::open_part(folder, options, Comm::solo())
    }

    /// The part of the model that is this rank's.
    pub fn open_part(folder: &Path, options: WeightOptions, comm: Comm) -> Result<Decoder, LoadError> {
        let (spec, checkpoint) = family::open(folder)?;
        Decoder::from_checkpoint(spec, &checkpoint, options, comm)
    }

    /// The part of the model that is this rank's of `comm`, each matrix shared by the ranks of `shared` ([`super::stored`]): no more
    /// than one of them is whole at a time.
    pub fn open_shared(
        folder: &Path,
        options: WeightOptions,
        comm: Comm,
        shared: Comm,
    ) -> Result<Decoder, LoadError> {
        let (spec, checkpoint) = family::open(folder)?;
        let share = |_, weight| Stored::Shared(WeightShard::new(weight, shared.clone()));
        let mut decoder = Decoder::of_checkpoint(spec, &checkpoint, options, comm, &share)?;
        decoder.sublayers.iter_mut().for_each(Sublayer::keep_in_step);
        Ok(decoder)
    }

    /// This rank's part of the model; nothing else of the checkpoint is read, but for scales that a recipe makes of whole
    /// rows.
    pub fn from_checkpoint(
        spec: DecoderSpec,
        checkpoint: &Checkpoint,
        options: WeightOptions,
        comm: Comm,
    ) -> Result<Decoder, LoadError> {
        Decoder::of_checkpoint(spec, checkpoint, options, comm, &here)
    }

    fn of_checkpoint(
        spec: DecoderSpec,
        checkpoint: &Checkpoint,
        options: WeightOptions,
        comm: Comm,
        store: &dyn Fn(ParamId, Weight) -> Stored,
    ) -> Result<Decoder, LoadError> {
        let head = spec.head;
        let experts = ExpertTensors::new(checkpoint);
        Decoder::build(spec, options, comm, store, |piece| {
            let Piece {
                name,
                shape,
                rows,
                columns,
                among,
            } = piece;
            if let Some(among) = among {
                return experts.matrix(name, shape, among, rows.clone(), columns.clone());
            }
            let stored = checkpoint.stored_name(name, head);
            checkpoint.matrix(stored, shape, rows.clone(), columns.clone())
        })
    }

    /// A decoder over parameters in training, to be refreshed by [`Decoder::update_full`] after each step. Where ranks share
    /// them, `keeps_whole` says whether it keeps its matrices whole, or brings one together when it is multiplied with.
    pub fn from_params(
        spec: DecoderSpec,
        params: &FullParams,
        precision: Precision,
        keeps_whole: bool,
    ) -> Result<Decoder, LoadError> {
        let options = WeightOptions::new(precision, Device::Cpu);
        let is_shared = params.shape.is_shared();
        let ids: HashMap<String, (ParamId, i64)> = params.shape.tensors().collect();
        let store = |id, weight: Weight| match is_shared && !keeps_whole && params.shape.has(id) {
            false => Stored::Here(weight),
            true => Stored::Trained(TrainedShare {
                n: weight.n(),
                k: weight.k(),
                precision,
                share: params.share(id),
                comm: params.shape.comm().clone(),
            }),
        };
        let mut decoder = Decoder::build(spec, options, Comm::solo(), &store, |piece| {
            let Piece {
                name,
                shape,
                rows,
                columns,
                among: _,
            } = piece;
            let Some(&(id, first)) = ids.get(name) else {
                return params.frozen(name, shape, rows.clone(), columns.clone());
            };
            let n = rows.end - rows.start;
            Ok(Matrix::Dense(params.whole(id).narrow(0, first + rows.start, n)))
        })?;
        if is_shared {
            decoder.sublayers.iter_mut().for_each(Sublayer::keep_in_step);
        }
        Ok(decoder)
    }

    fn build(
        spec: DecoderSpec,
        options: WeightOptions,
        comm: Comm,
        store: &dyn Fn(ParamId, Weight) -> Stored,
        read: impl Fn(&Piece) -> Result<Matrix, LoadError>,
    ) -> Result<Decoder, LoadError> {
        let WeightOptions {
            precision,
            recipe,
            device,
        } = options;
        let shard = Shard {
            rank: comm.rank(),
            world: comm.world(),
        };
        let layout = Layout::new(&spec, shard)?;
        let params: HashMap<ParamId, Param> =
            spec.params().into_iter().map(|param| (param.id, param)).collect();
        // The pieces of a parameter one under the other.
        let stacked = |id: ParamId, read: &dyn Fn(&Piece) -> Result<Matrix, LoadError>| {
            let pieces = layout.pieces(&params[&id]);
            let parts: Result<Vec<Matrix>, LoadError> = pieces.iter().map(read).collect();
            Ok::<_, LoadError>(Matrix::stack(parts?))
        };
        let float = |id: ParamId| -> Result<Tensor, LoadError> {
            let numbers = stacked(id, &read)?.dense();
            Ok(numbers.to_device(device).to_kind(Kind::Float))
        };
        let routers = routers(&spec);
        let packed = |id: ParamId| -> Result<Stored, LoadError> {
            let matrix = match (id, recipe) {
                // A row is quantised as a whole, so that it is the same on any number of ranks.
                (ParamId::Linear(linear), Some(recipe)) if !routers.contains(&linear) => {
                    stacked(id, &|piece| {
                        Ok(read(&piece.whole_rows())?
                            .quantise(recipe)?
                            .columns(piece.columns.clone()))
                    })
                }
                _ => stacked(id, &read),
            };
            Ok(store(id, matrix?.weight(precision, device)?))
        };
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
                squares: OnceLock::new(),
            })
        };
        let mlp = |spec: &MlpSpec,
                   linear: &mut dyn FnMut() -> Result<Linear, LoadError>|
         -> Result<Mlp, LoadError> {
            Ok(Mlp {
                activation: spec.activation,
                up: linear()?,
                down: linear()?,
            })
        };
        let mut places = LayerGroups::of(&spec).places.into_iter();
        let mut body = |i: usize, body: &family::Body| -> Result<Body, LoadError> {
            Ok(match body {
                family::Body::Attention(attn) => Body::Attention(Box::new(Attention {
                    heads: layout.heads(attn),
                    scale: attn.scale,
                    window: attn.window,
                    cap: attn.cap,
                    sinks: attn
                        .sinks
                        .as_ref()
                        .map(|_| float(ParamId::Sinks(i)))
                        .transpose()?,
                    sublayer: i,
                    rope: attn.rope,
                    qk_norm: match &attn.qk_norm {
                        None => None,
                        Some(family::QkNorm { query, key }) => Some(QkNorm {
                            query: norm(NormId::Query(i), query)?,
                            key: norm(NormId::Key(i), key)?,
                        }),
                    },
                    place: places.next().expect("one for each attention"),
                    qkv: linear()?,
                    output: linear()?,
                })),
                family::Body::Mlp(spec) => Body::Mlp(Box::new(mlp(spec, &mut linear)?)),
                family::Body::Experts(spec) => Body::Experts(Box::new(Experts {
                    top_k: spec.top_k as usize,
                    weights: spec.weights,
                    router: linear()?,
                    experts: spec
                        .experts
                        .iter()
                        .map(|expert| mlp(expert, &mut linear))
                        .collect::<Result<_, _>>()?,
                    shared: match &spec.shared {
                        None => None,
                        Some(shared) => Some(Shared {
                            gate: linear()?,
                            mlp: mlp(&shared.mlp, &mut linear)?,
                        }),
                    },
                    all_in_step: false,
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
        self.embed.update(params, ParamId::Embed);
        if let Some(head) = &mut self.head {
            head.update(params, ParamId::Head);
        }
        self.norm.update(params);
        for sublayer in &mut self.sublayers {
            for attn in sublayer.attentions_mut() {
                take(&mut attn.sinks, params, ParamId::Sinks(attn.sublayer));
            }
            sublayer.norms_mut().for_each(|norm| norm.update(params));
            for Linear { id, weight, bias, .. } in sublayer.linears_mut() {
                weight.update(params, ParamId::Linear(*id));
                take(bias, params, ParamId::Bias(*id));
            }
        }
    }

    /// Numbers in the checkpoint.
    pub fn parameters(&self) -> u64 {
        super::full::FullShape::new(&self.spec).total() as u64
    }

    /// Bytes this rank's weights take in memory (padding included; norms and biases are left out as nothing).
    pub fn weight_bytes(&self) -> u64 {
        self.weights().map(Stored::bytes).sum()
    }

    /// Bytes of this rank's weights by how they are stored, most first.
    pub fn formats(&self) -> Vec<(Format, u64)> {
        let mut formats: Vec<(Format, u64)> = vec![];
        for weight in self.weights() {
            match formats.iter_mut().find(|(format, _)| *format == weight.format()) {
                Some((_, bytes)) => *bytes += weight.bytes(),
                None => formats.push((weight.format(), weight.bytes())),
            }
        }
        formats.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        formats
    }

    /// How each linear is stored.
    pub fn linear_formats(&self) -> HashMap<LinearId, Format> {
        let linears = self.sublayers.iter().flat_map(Sublayer::linears);
        linears
            .map(|linear| (linear.id, linear.weight.format()))
            .collect()
    }

    fn weights(&self) -> impl Iterator<Item = &Stored> {
        let linears = self.sublayers.iter().flat_map(Sublayer::linears);
        let linears = linears.map(|linear| &linear.weight);
        std::iter::once(&self.embed).chain(&self.head).chain(linears)
    }
}

/// All of every matrix.
fn here(_: ParamId, weight: Weight) -> Stored {
    Stored::Here(weight)
}

/// What no recipe rounds.
fn routers(spec: &DecoderSpec) -> HashSet<LinearId> {
    let routers = spec.linears().filter(|(_, linear)| linear.routes());
    routers.map(|(id, _)| id).collect()
}

/// Bytes of a rank's matrices before they are read. `quantised_bytes`: of the checkpoint's whole parameter of this name.
pub fn planned_bytes(
    spec: &DecoderSpec,
    layout: &Layout,
    options: WeightOptions,
    quantised_bytes: impl Fn(&str) -> Option<u64>,
) -> u64 {
    let routers = routers(spec);
    let of = |param: Param| -> f64 {
        if param.shape.len() == 1 {
            return 0.0;
        }
        let bytes = |piece: &Piece| {
            let (n, k) = (
                piece.rows.end - piece.rows.start,
                piece.columns.end - piece.columns.start,
            );
            // Of the tensor, which may hold other experts too.
            let whole = match &piece.among {
                None => piece.shape.iter().product(),
                Some(among) => among.experts * among.outputs * piece.shape[1],
            };
            match (quantised_bytes(&piece.name), options.recipe, param.id) {
                (Some(bytes), ..) => bytes as f64 * (n * k) as f64 / whole as f64,
                (None, Some(recipe), ParamId::Linear(id)) if !routers.contains(&id) => {
                    recipe.bytes(n as u64, k as u64) as f64
                }
                _ => (n * k) as f64 * options.precision.value_bytes() as f64,
            }
        };
        layout.pieces(&param).iter().map(bytes).sum()
    };
    spec.params().into_iter().map(of).sum::<f64>() as u64
}

impl Layout {
    /// What this rank holds of a parameter, tensor by tensor.
    fn pieces(&self, param: &Param) -> Vec<Piece> {
        let Param { id, shape, tensors } = param;
        let piece = |source: &Source, held: Range<i64>, columns: Range<i64>| Piece {
            name: source.name.clone(),
            shape: [&[source.rows], &shape[1..]].concat(),
            rows: held,
            columns,
            among: source.among.clone(),
        };
        match id {
            ParamId::Embed | ParamId::Head => {
                vec![piece(&tensors[0], self.vocabulary.clone(), 0..shape[1])]
            }
            ParamId::Norm(id) | ParamId::NormBias(id) => {
                let rows = self.spread(*id).unwrap_or(0..shape[0]);
                vec![piece(&tensors[0], rows, 0..1)]
            }
            ParamId::Sinks(_) => vec![piece(&tensors[0], self.equal(shape[0]), 0..1)],
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

impl Decoder {
    /// `||w||` of each output of a linear.
    pub fn row_norms(&self, id: LinearId) -> Vec<f32> {
        let mut linears = self.sublayers.iter().flat_map(Sublayer::linears);
        let linear = linears
            .find(|linear| linear.id == id)
            .expect("a linear of this model");
        let squares = linear.row_squares(&linear.weight.whole());
        squares.iter().map(|square| square.sqrt()).collect()
    }
}

impl Sublayer {
    fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.bodies.iter().flat_map(|body| match body {
            Body::Attention(attn) => vec![&attn.qkv, &attn.output],
            Body::Mlp(mlp) => vec![&mlp.up, &mlp.down],
            Body::Experts(experts) => {
                let Experts {
                    router,
                    experts,
                    shared,
                    ..
                } = &**experts;
                let mut linears = vec![router];
                linears.extend(experts.iter().flat_map(|mlp| [&mlp.up, &mlp.down]));
                if let Some(Shared { gate, mlp }) = shared {
                    linears.extend([gate, &mlp.up, &mlp.down]);
                }
                linears
            }
        })
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.bodies.iter_mut().flat_map(|body| match body {
            Body::Attention(attn) => vec![&mut attn.qkv, &mut attn.output],
            Body::Mlp(mlp) => vec![&mut mlp.up, &mut mlp.down],
            Body::Experts(experts) => {
                let Experts {
                    router,
                    experts,
                    shared,
                    ..
                } = &mut **experts;
                let mut linears = vec![router];
                linears.extend(experts.iter_mut().flat_map(|mlp| [&mut mlp.up, &mut mlp.down]));
                if let Some(Shared { gate, mlp }) = shared {
                    linears.extend([gate, &mut mlp.up, &mut mlp.down]);
                }
                linears
            }
        })
    }

    /// See [`Experts::all_in_step`].
    fn keep_in_step(&mut self) {
        for body in &mut self.bodies {
            if let Body::Experts(experts) = body {
                experts.all_in_step = true;
            }
        }
    }

    fn attentions_mut(&mut self) -> impl Iterator<Item = &mut Attention> {
        self.bodies.iter_mut().filter_map(|body| match body {
            Body::Attention(attn) => Some(&mut **attn),
            Body::Mlp(_) | Body::Experts(_) => None,
        })
    }

    fn norms_mut(&mut self) -> impl Iterator<Item = &mut Norm> {
        let inner = self.bodies.iter_mut().filter_map(|body| match body {
            Body::Attention(attn) => attn.qk_norm.as_mut(),
            Body::Mlp(_) | Body::Experts(_) => None,
        });
        let inner = inner.flat_map(|QkNorm { query, key }| [query, key]);
        self.pre.iter_mut().chain(&mut self.post).chain(inner)
    }
}

impl Stored {
    /// After an optimizer step. What lies in shares reads the new numbers by itself.
    fn update(&mut self, params: &FullParams, id: ParamId) {
        if let (Stored::Here(weight), true) = (self, params.shape.has(id)) {
            weight.overwrite(&params.whole(id)).expect(SAME_SHAPE);
        }
    }
}

impl Norm {
    fn update(&mut self, params: &FullParams) {
        if params.shape.has(ParamId::Norm(self.id)) {
            self.weight = Norm::weight_of(self.kind, &params.whole(ParamId::Norm(self.id)));
        }
        take(&mut self.bias, params, ParamId::NormBias(self.id));
    }
}

/// The new numbers of a vector that is there and trained.
fn take(vector: &mut Option<Tensor>, params: &FullParams, id: ParamId) {
    if let (Some(vector), true) = (vector, params.shape.has(id)) {
        *vector = params.whole(id).copy();
    }
}

/// Why taking new numbers over cannot fail.
const SAME_SHAPE: &str = "the numbers have the shape that the weight was packed from";
