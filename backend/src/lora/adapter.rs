//! The form of an adapter that kernels read: A and B packed like any weight, per linear; of each what
//! belongs to the rows and columns that this rank holds of the linear.

use std::ops::Range;
use std::sync::Arc;

use tandem_kernels::KernelError;
use tandem_kernels::linear::{LoraModule, LoraPart};
use tandem_kernels::weight::{Precision, Weight};
use tch::{Device, Tensor};

use super::dora::Magnitudes;
use super::params::{AdapterParams, LinearShape, PartShape};
use crate::family::LinearId;
use crate::family::shard::{Layout, LinearShard};

pub struct Adapter {
    /// By [`LinearId`].
    modules: Vec<Option<LoraModule>>,
    /// The same; empty where the adapter has none.
    magnitudes: Vec<Option<Magnitudes>>,
    embedding: Option<Box<EmbeddingBranch>>,
    max_rank: i64,
    layout: Arc<Layout>,
}

/// What is added to a token's row of the embedding.
pub struct EmbeddingBranch {
    /// A row for each token `[V, r]`.
    pub a: Weight,
    /// `[H, r]`
    pub b: Weight,
    pub scale: f64,
}

/// Rows of a batch that one adapter answers.
pub struct AdapterRows<'a> {
    pub rows: Range<usize>,
    pub adapter: &'a Adapter,
}

impl Adapter {
    /// `params` are the whole adapter's numbers.
    pub fn new(
        params: &AdapterParams,
        layout: &Arc<Layout>,
        precision: Precision,
        device: Device,
    ) -> Result<Adapter, KernelError> {
        let module = |shape: &LinearShape, held: &LinearShard| -> Result<LoraModule, KernelError> {
            let part = |part: &PartShape| {
                Ok(LoraPart {
                    columns: held.part(&part.path).columns.clone(),
                    ranks: part.ranks.clone(),
                    b: Weight::passing(&held_b(params, part, held), precision, device)?,
                    scale: part.scale,
                })
            };
            let parts = shape.parts.iter().map(part).collect::<Result<_, KernelError>>()?;
            Ok(LoraModule {
                a: Weight::passing(&held_a(params, shape, held), precision, device)?,
                parts,
            })
        };
        let module = |id: LinearId| {
            let shape = params.shape.linear(id).filter(|shape| !shape.is_embedding());
            shape.map(|shape| module(shape, layout.linear(id))).transpose()
        };
        let embedding = params.shape.linear(layout.embed_id()).map(|shape| {
            let [a, b] = tables(params, shape);
            Ok::<_, KernelError>(Box::new(EmbeddingBranch {
                a: Weight::passing(&a, precision, device)?,
                b: Weight::passing(&b, precision, device)?,
                scale: shape.parts[0].scale,
            }))
        });
        Ok(Adapter {
            embedding: embedding.transpose()?,
            modules: params.shape.ids().map(module).collect::<Result<_, _>>()?,
            magnitudes: magnitudes(params),
            max_rank: params.shape.max_rank(),
            layout: Arc::clone(layout),
        })
    }

    /// Takes over the numbers of `params` (same shape), after an optimizer step.
    pub fn update(&mut self, params: &AdapterParams) {
        for (id, shape) in params.shape.iter() {
            if let (true, Some(embedding)) = (shape.is_embedding(), &mut self.embedding) {
                let [a, b] = tables(params, shape);
                embedding.a.overwrite(&a).expect(SAME_SHAPE);
                embedding.b.overwrite(&b).expect(SAME_SHAPE);
                continue;
            }
            let module = self.modules[id.0].as_mut().expect("update keeps the shape");
            let held = self.layout.linear(id);
            module
                .a
                .overwrite(&held_a(params, shape, held))
                .expect(SAME_SHAPE);
            for (part, shape) in module.parts.iter_mut().zip(&shape.parts) {
                part.b.overwrite(&held_b(params, shape, held)).expect(SAME_SHAPE);
            }
        }
        self.magnitudes = magnitudes(params);
    }

    /// DoRA's, of a linear.
    pub fn magnitudes(&self, id: LinearId) -> Option<&Magnitudes> {
        self.magnitudes.get(id.0)?.as_ref()
    }

    pub fn module(&self, id: LinearId) -> Option<&LoraModule> {
        self.modules[id.0].as_ref()
    }

    pub fn embedding(&self) -> Option<&EmbeddingBranch> {
        self.embedding.as_deref()
    }

    /// Largest rank of a module.
    pub fn rank(&self) -> i64 {
        self.max_rank
    }

    /// Of what this rank holds.
    pub fn bytes(&self) -> u64 {
        let modules = self.modules.iter().flatten();
        let modules: u64 = modules
            .map(|module| module.a.bytes() + module.parts.iter().map(|part| part.b.bytes()).sum::<u64>())
            .sum();
        let embedding = self.embedding.as_ref();
        modules + embedding.map_or(0, |branch| branch.a.bytes() + branch.b.bytes())
    }
}

fn magnitudes(params: &AdapterParams) -> Vec<Option<Magnitudes>> {
    if params.shape.magnitudes().is_none() {
        return vec![];
    }
    let of_linear = |id| {
        let parts = params.shape.linear(id)?.parts.iter();
        let of_part = |part| Vec::try_from(params.magnitude(part)?).ok();
        Some(Magnitudes::new(parts.map(of_part).collect::<Option<_>>()?))
    };
    params.shape.ids().map(of_linear).collect()
}

/// A with a row for each token, and B.
fn tables(params: &AdapterParams, shape: &LinearShape) -> [Tensor; 2] {
    [params.a(shape).tr().contiguous(), params.b(&shape.parts[0])]
}

/// `[R, inputs held]`
fn held_a(params: &AdapterParams, shape: &LinearShape, held: &LinearShard) -> Tensor {
    params.a(shape).narrow(1, held.inputs.start, held.n_inputs())
}

/// `[rows held, r]`
fn held_b(params: &AdapterParams, part: &PartShape, held: &LinearShard) -> Tensor {
    held.part(&part.path).held(&params.b(part))
}

/// Why taking new numbers over cannot fail.
const SAME_SHAPE: &str = "the numbers have the shape that the weight was packed from";
