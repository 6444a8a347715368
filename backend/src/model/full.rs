//! Every parameter of a decoder in one flat float32 buffer, for training all of them. Only `tandem train` does: a
//! served base never changes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use safetensors::tensor::TensorView;
use tandem_core::rng;
use tandem_kernels::comm::Comm;
use tch::{Device, Kind, Tensor};

use super::gradient::add;
use crate::family::{self, DecoderSpec, Head, NormId, NormKind, Param, ParamId, Source, layer_of};
use crate::weights::{Checkpoint, LoadError, Matrix, has_weights};

/// Matrices decay, norms and biases do not (as torchtune, nanoGPT and transformers' Trainer have it).
pub fn decays(id: ParamId) -> bool {
    matches!(id, ParamId::Embed | ParamId::Linear(_) | ParamId::Head)
}

/// Where the numbers of each parameter lie in a flat buffer. Ranks may share every parameter: each holds an equal part of its
/// numbers, in row order, the last padded with zeroes (ZeRO, arXiv 1910.02054).
#[derive(Clone)]
pub struct FullShape {
    /// In buffer order, each with its offset.
    params: Vec<(i64, Param)>,
    index: HashMap<ParamId, usize>,
    /// Of this rank's buffer.
    len: i64,
    /// Of all parameters that are trained.
    total: i64,
    /// What is not trained: it has no gradient, no moments, and no place in a buffer.
    frozen: Vec<Param>,
    /// Who shares.
    comm: Comm,
}

impl FullShape {
    /// All of every parameter.
    pub fn new(spec: &DecoderSpec) -> FullShape {
        FullShape::shared(spec, 0, Comm::solo())
    }

    /// All but those of the first layers.
    pub fn shared(spec: &DecoderSpec, frozen_layers: usize, comm: Comm) -> FullShape {
        let (mut len, mut total) = (0, 0);
        let is_frozen = |param: &Param| layer(param).is_some_and(|layer| layer < frozen_layers);
        let (frozen, trained): (Vec<Param>, Vec<Param>) = spec.params().into_iter().partition(is_frozen);
        let world = comm.world();
        let place = |param: Param| {
            let offset = len;
            len += share(&param, world);
            total += numbers(&param);
            (offset, param)
        };
        let params: Vec<(i64, Param)> = trained.into_iter().map(place).collect();
        let index = params
            .iter()
            .enumerate()
            .map(|(i, (_, param))| (param.id, i))
            .collect();
        FullShape {
            params,
            index,
            len,
            total,
            frozen,
            comm,
        }
    }

    /// Numbers of this rank's buffer.
    pub fn len(&self) -> i64 {
        self.len
    }
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Numbers of all parameters that are trained.
    pub fn total(&self) -> i64 {
        self.total
    }

    /// Numbers of those that are not.
    pub fn frozen(&self) -> i64 {
        self.frozen.iter().map(numbers).sum()
    }

    pub fn comm(&self) -> &Comm {
        &self.comm
    }

    pub fn is_shared(&self) -> bool {
        self.comm.world() > 1
    }

    /// Is it trained?
    pub fn has(&self, id: ParamId) -> bool {
        self.index.contains_key(&id)
    }

    /// Every checkpoint tensor by its Hugging Face name: the parameter that it is of, and its first row in it.
    pub fn tensors(&self) -> impl Iterator<Item = (String, (ParamId, i64))> {
        self.params.iter().flat_map(|(_, param)| {
            let place = |(source, first): (&Source, i64)| (source.name.clone(), (param.id, first));
            sources(param).map(place)
        })
    }

    /// Every parameter and its range in this rank's buffer, in order.
    pub fn ranges(&self) -> impl Iterator<Item = (ParamId, Range<i64>)> {
        let ranges = self.params.iter();
        ranges.map(|(offset, param)| (param.id, *offset..offset + self.share(param)))
    }

    /// Numbers of a parameter that are this rank's, padding included.
    fn share(&self, param: &Param) -> i64 {
        share(param, self.comm.world())
    }

    /// The number in its parameter of the first that is this rank's, and how many of them there are.
    fn own(&self, param: &Param) -> (i64, i64) {
        let (all, share) = (numbers(param), self.share(param));
        let first = (share * self.comm.rank() as i64).min(all);
        (first, share.min(all - first))
    }

    /// Of `flat`, all parameters' numbers without padding, what is this rank's.
    pub fn share_of(&self, flat: &Tensor) -> Tensor {
        if !self.is_shared() {
            return flat.shallow_clone();
        }
        let own = Tensor::zeros([self.len], (Kind::Float, Device::Cpu));
        let mut before = 0;
        for (offset, param) in &self.params {
            let (first, n) = self.own(param);
            own.narrow(0, *offset, n)
                .copy_(&flat.narrow(0, before + first, n));
            before += numbers(param);
        }
        own
    }

    /// The ranks' shares together, `[total]`: on rank 0 alone, for whom it is made parameter by parameter.
    pub fn together(&self, own: Tensor) -> Option<Tensor> {
        if !self.is_shared() {
            return Some(own);
        }
        let all = (self.comm.rank() == 0).then(|| Tensor::empty([self.total], (Kind::Float, Device::Cpu)));
        let mut before = 0;
        for placed in &self.params {
            let whole = self.gathered(&own, placed);
            if let Some(all) = &all {
                all.narrow(0, before, numbers(&placed.1)).copy_(&whole.view([-1]));
            }
            before += numbers(&placed.1);
        }
        all
    }

    /// A parameter in its own shape, of the ranks' shares in `flat`.
    fn gathered(&self, flat: &Tensor, (offset, param): &(i64, Param)) -> Tensor {
        let all = self.comm.all_gather(&flat.narrow(0, *offset, self.share(param)));
        all.view([-1])
            .narrow(0, 0, numbers(param))
            .view(param.shape.as_slice())
    }

    /// The norm of all ranks' numbers, of which this rank's have the norm `own`: squares are added up in rank order.
    pub fn norm_over_ranks(&self, own: f64) -> f64 {
        if !self.is_shared() {
            return own;
        }
        let squares = self.comm.all_gather(&Tensor::from_slice(&[own * own]));
        let squares = Vec::<f64>::try_from(squares.view([-1])).expect("a number of each rank");
        squares.into_iter().sum::<f64>().sqrt()
    }

    /// Whether it holds on every rank.
    pub fn on_all_ranks(&self, is: bool) -> bool {
        !self.comm.any(!is, Device::Cpu)
    }

    /// This rank's buffer in order, as the tensors of the checkpoint: where each lies, and the numbers of a row of a matrix. Where
    /// ranks share, as parts of parameters.
    pub fn parameters(&self) -> Vec<(ParamId, Range<i64>, Option<i64>)> {
        let parts = self.ranges().map(|(id, range)| (id, range, None));
        let tensors = self.params.iter().flat_map(|(offset, param)| {
            let row: i64 = param.shape[1..].iter().product();
            let columns = (param.shape.len() > 1).then_some(row);
            sources(param).map(move |(source, first)| {
                let start = offset + first * row;
                (param.id, start..start + source.rows * row, columns)
            })
        });
        match self.is_shared() {
            true => parts.collect(),
            false => tensors.collect(),
        }
    }
}

/// `None`: it stands outside the layers.
fn layer(param: &Param) -> Option<usize> {
    layer_of(&param.tensors[0].name)
}

fn numbers(param: &Param) -> i64 {
    param.shape.iter().product()
}

/// Numbers of a parameter on each of `world` ranks.
fn share(param: &Param, world: usize) -> i64 {
    (numbers(param) as u64).div_ceil(world as u64) as i64
}

/// Numbers of every parameter, or anything shaped like them.
pub struct FullParams {
    /// `[P]` float32: this rank's.
    pub flat: Tensor,
    pub shape: FullShape,
    /// Gradients of what stands outside the sublayers, where ranks share them: ranks have unlike numbers of labels, so these are
    /// summed when a pass is through.
    waiting: RefCell<HashMap<ParamId, Tensor>>,
    /// Where what is not trained is read, whenever it is wanted.
    rest: Option<Box<(Checkpoint, Head)>>,
}

impl FullParams {
    pub fn zeros(shape: FullShape) -> FullParams {
        FullParams::of(Tensor::zeros([shape.len()], (Kind::Float, Device::Cpu)), shape)
    }

    fn of(flat: Tensor, shape: FullShape) -> FullParams {
        FullParams {
            flat,
            shape,
            waiting: RefCell::default(),
            rest: None,
        }
    }

    /// Matrices normal with deviation 0.02 (transformers' `initializer_range`), norms one, biases zero.
    pub fn init(shape: FullShape, spec: &DecoderSpec, seed: u64) -> FullParams {
        let mut drawn = vec![0f32; shape.len() as usize];
        let kinds: HashMap<NormId, NormKind> = spec.norms().map(|(id, norm)| (id, norm.kind)).collect();
        let mut before = 0;
        for (offset, param) in &shape.params {
            let (first, n) = shape.own(param);
            for i in 0..n {
                drawn[(offset + i) as usize] = match param.id {
                    ParamId::Norm(id) => match kinds[&id] {
                        NormKind::Rms | NormKind::Layer { .. } => 1.0,
                        NormKind::RmsPlusOne => 0.0,
                    },
                    ParamId::Bias(_) | ParamId::NormBias(_) | ParamId::Sinks(_) => 0.0,
                    ParamId::Embed | ParamId::Linear(_) | ParamId::Head => {
                        let number = (before + first + i) as u64;
                        (0.02 * rng::normal(seed, INIT_STREAM, number)) as f32
                    }
                };
            }
            before += numbers(param);
        }
        FullParams::of(Tensor::from_slice(&drawn), shape)
    }

    /// Each tensor of the checkpoint is read whole, one after the other.
    pub fn read(shape: FullShape, checkpoint: &Checkpoint) -> Result<FullParams, LoadError> {
        let params = FullParams::zeros(shape);
        let head = if params.shape.has(ParamId::Head) {
            Head::Own
        } else {
            Head::Tied
        };
        for placed in &params.shape.params {
            let (offset, param) = placed;
            let whole = match params.shape.is_shared() {
                false => params.view_of(placed),
                true => Tensor::zeros(param.shape.as_slice(), (Kind::Float, Device::Cpu)),
            };
            for (name, mut part) in tensors(param, &whole) {
                part.copy_(&checkpoint.tensor(checkpoint.stored_name(&name, head), &part.size())?);
            }
            if params.shape.is_shared() {
                let (first, n) = params.shape.own(param);
                let own = whole.view([-1]).narrow(0, first, n);
                params.flat.narrow(0, *offset, n).copy_(&own);
            }
        }
        Ok(params)
    }

    /// Of a tensor that is not trained, whose whole shape is `shape`.
    pub fn frozen(
        &self,
        name: &str,
        shape: &[i64],
        rows: Range<i64>,
        columns: Range<i64>,
    ) -> Result<Matrix, LoadError> {
        let (checkpoint, head) = self.rest.as_deref().expect(READ_BEFORE);
        checkpoint.matrix(checkpoint.stored_name(name, *head), shape, rows, columns)
    }

    /// A parameter in its own shape: a view, or brought together of all ranks' shares.
    pub fn whole(&self, id: ParamId) -> Tensor {
        let placed = self.placed(id);
        match self.shape.is_shared() {
            false => self.view_of(placed),
            true => self.shape.gathered(&self.flat, placed),
        }
    }

    /// This rank's numbers of a parameter, padding included: a view.
    pub fn share(&self, id: ParamId) -> Tensor {
        let (offset, param) = self.placed(id);
        self.flat.narrow(0, *offset, self.shape.share(param))
    }

    fn placed(&self, id: ParamId) -> &(i64, Param) {
        &self.shape.params[self.shape.index[&id]]
    }

    /// Where nothing is shared.
    fn view_of(&self, (offset, param): &(i64, Param)) -> Tensor {
        self.flat
            .narrow(0, *offset, numbers(param))
            .view(param.shape.as_slice())
    }

    /// Adds the gradient of a parameter, in its own shape; where ranks share it, all ranks' gradients, which all bring here.
    pub fn add(&self, id: ParamId, gradient: Tensor) {
        if !self.shape.is_shared() {
            return add(&self.view_of(self.placed(id)), gradient);
        }
        if !is_outside(id) {
            return self.sum(id, gradient);
        }
        let mut waiting = self.waiting.borrow_mut();
        match waiting.get(&id) {
            Some(sum) => add(sum, gradient),
            None => {
                waiting.insert(id, gradient.to_device(Device::Cpu));
            }
        }
    }

    /// Adds to rows of the embedding's gradient.
    pub fn add_rows(&self, id: ParamId, rows: &Tensor, gradient: &Tensor) {
        let to = match self.shape.is_shared() {
            false => self.view_of(self.placed(id)),
            true => {
                let shape = self.placed(id).1.shape.as_slice();
                let mut waiting = self.waiting.borrow_mut();
                let zeros = || Tensor::zeros(shape, (Kind::Float, Device::Cpu));
                waiting.entry(id).or_insert_with(zeros).shallow_clone()
            }
        };
        let device = to.device();
        let _ = to
            .shallow_clone()
            .index_add_(0, &rows.to_device(device), &gradient.to_device(device));
    }

    /// A pass is through.
    pub fn settle(&self) {
        if !self.shape.is_shared() {
            return;
        }
        let mut waiting = self.waiting.borrow_mut();
        for (_, param) in self.shape.params.iter().filter(|(_, param)| is_outside(param.id)) {
            let none = || Tensor::zeros(param.shape.as_slice(), (Kind::Float, Device::Cpu));
            let gradient = waiting.remove(&param.id).unwrap_or_else(none);
            self.sum(param.id, gradient);
        }
    }

    fn sum(&self, id: ParamId, gradient: Tensor) {
        let share = self.share(id);
        let world = self.shape.comm.world() as i64;
        let flat = gradient.to_device(Device::Cpu).contiguous().view([-1]);
        let padding = share.size()[0] * world - flat.size()[0];
        let padded = match padding {
            0 => flat,
            _ => flat.constant_pad_nd([0, padding]),
        };
        add(&share, self.shape.comm.reduce_scatter(&padded));
    }

    /// Every checkpoint tensor by its Hugging Face name: a view, or brought together when it is its turn.
    pub fn named(&self) -> impl Iterator<Item = (String, Tensor)> {
        let whole = |placed: &(i64, Param)| tensors(&placed.1, &self.whole(placed.1.id));
        self.shape.params.iter().flat_map(whole)
    }

    /// What is not trained, as [`FullParams::named`].
    fn named_frozen(&self) -> impl Iterator<Item = (String, Tensor)> {
        let sources = self.shape.frozen.iter().flat_map(|param| {
            let shape = |source: &Source| [&[source.rows], &param.shape[1..]].concat();
            sources(param).map(move |(source, _)| (source.name.clone(), shape(source)))
        });
        sources.map(|(name, shape)| {
            let (checkpoint, head) = self.rest.as_deref().expect(READ_BEFORE);
            let tensor = checkpoint.tensor(checkpoint.stored_name(&name, *head), &shape);
            (name, tensor.expect(READ_BEFORE))
        })
    }

    /// The bytes of a model.safetensors, numbers stored as `kind` (float32 or bfloat16). `None` on a rank other than 0, which
    /// only brings its share.
    pub fn serialise(&self, kind: Kind) -> Option<Vec<u8>> {
        if self.shape.comm.rank() > 0 {
            self.named().for_each(drop);
            return None;
        }
        let dtype = match kind {
            Kind::BFloat16 => safetensors::Dtype::BF16,
            Kind::Half => safetensors::Dtype::F16,
            _ => safetensors::Dtype::F32,
        };
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = self
            .named()
            .chain(self.named_frozen())
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
        Some(safetensors::serialize(views, metadata).expect("plain views serialise"))
    }
}

/// Why what is not trained can be read.
const READ_BEFORE: &str = "a decoder was made of it";

/// What a pass reads and differentiates outside its sublayers.
fn is_outside(id: ParamId) -> bool {
    use NormId::Final;
    matches!(
        id,
        ParamId::Embed | ParamId::Head | ParamId::Norm(Final) | ParamId::NormBias(Final)
    )
}

/// The checkpoint's tensors of a parameter, views of `whole`.
fn tensors(param: &Param, whole: &Tensor) -> Vec<(String, Tensor)> {
    let tensor = |(source, first): (&Source, i64)| (source.name.clone(), whole.narrow(0, first, source.rows));
    sources(param).map(tensor).collect()
}

/// The checkpoint's tensors of a parameter, one under the other, each with its first row in it.
fn sources(param: &Param) -> impl Iterator<Item = (&Source, i64)> {
    param.tensors.iter().scan(0, |end, source| {
        let first = *end;
        *end += source.rows;
        Some((source, first))
    })
}

/// The model of a folder and its parameters, each shared by `shared`, drawn when it has no weights (a model to be made from its config.json).
/// Its first layers may be frozen.
pub fn read_or_init(
    folder: &Path,
    seed: u64,
    frozen_layers: usize,
    shared: Comm,
) -> Result<(DecoderSpec, FullParams), LoadError> {
    let can_freeze = |spec: &DecoderSpec| {
        let layers = spec
            .params()
            .iter()
            .filter_map(layer)
            .max()
            .map_or(0, |last| last + 1);
        match frozen_layers <= layers {
            true => Ok(()),
            false => Err(LoadError::Option(format!(
                "num_freeze_layers must be at most {layers}, the layers of the model, got {frozen_layers}"
            ))),
        }
    };
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
        can_freeze(&spec)?;
        let shape = FullShape::shared(&spec, frozen_layers, shared);
        let mut params = FullParams::read(shape, &checkpoint)?;
        params.rest = (frozen_layers > 0).then(|| Box::new((checkpoint, spec.head)));
        return Ok((spec, params));
    }
    let spec = family::read_spec(folder)?;
    trainable(&spec)?;
    if frozen_layers > 0 {
        return Err(LoadError::Option(
            "freeze_layers: the model has no weights yet, so no layer has anything to keep".to_owned(),
        ));
    }
    let params = FullParams::init(FullShape::shared(&spec, 0, shared), &spec, seed);
    Ok((spec, params))
}

/// Keeps the draws of initialisation apart from those of shuffling.
const INIT_STREAM: u64 = 0xf011;
