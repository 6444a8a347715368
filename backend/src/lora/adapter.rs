//! The form of an adapter that kernels read: A and B packed like any weight, per layer and fused linear; of each what
//! belongs to the rows and columns that this rank holds of the linear.

use std::ops::Range;
use std::sync::Arc;

use tandem_kernels::KernelError;
use tandem_kernels::linear::{LoraModule, LoraPart};
use tandem_kernels::weight::{Precision, Weight};
use tch::{Device, Tensor};

use super::params::{AdapterParams, PartShape, SiteShape};
use crate::family::shard::{Layout, SiteShard};
use crate::family::site::Site;

pub struct Adapter {
    /// `[layer][site]`
    modules: Vec<[Option<LoraModule>; 4]>,
    max_rank: i64,
    layout: Arc<Layout>,
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
        let module = |site: &SiteShape, held: &SiteShard| -> Result<LoraModule, KernelError> {
            let part = |part: &PartShape| {
                Ok(LoraPart {
                    columns: held.part(&part.path).columns.clone(),
                    ranks: part.ranks.clone(),
                    b: Weight::new(&held_b(params, part, held), precision, device)?,
                    scale: part.scale,
                })
            };
            let parts = site.parts.iter().map(part).collect::<Result<_, KernelError>>()?;
            Ok(LoraModule {
                a: Weight::new(&held_a(params, site, held), precision, device)?,
                parts,
            })
        };
        let mut modules: Vec<[Option<LoraModule>; 4]> =
            (0..params.shape.layers()).map(|_| [const { None }; 4]).collect();
        for (layer, site, shape) in params.shape.iter() {
            modules[layer][site.index()] = Some(module(shape, layout.site(layer, site))?);
        }
        Ok(Adapter {
            modules,
            max_rank: params.shape.max_rank(),
            layout: Arc::clone(layout),
        })
    }

    /// Takes over the numbers of `params` (same shape), after an optimizer step.
    pub fn update(&mut self, params: &AdapterParams) {
        for (layer, site, shape) in params.shape.iter() {
            let module = self.modules[layer][site.index()]
                .as_mut()
                .expect("update keeps the shape");
            let held = self.layout.site(layer, site);
            module
                .a
                .overwrite(&held_a(params, shape, held))
                .expect(SAME_SHAPE);
            for (part, shape) in module.parts.iter_mut().zip(&shape.parts) {
                part.b.overwrite(&held_b(params, shape, held)).expect(SAME_SHAPE);
            }
        }
    }

    pub fn module(&self, layer: usize, site: Site) -> Option<&LoraModule> {
        self.modules[layer][site.index()].as_ref()
    }

    /// Largest rank of a module.
    pub fn rank(&self) -> i64 {
        self.max_rank
    }

    /// Of what this rank holds.
    pub fn bytes(&self) -> u64 {
        let modules = self.modules.iter().flatten().flatten();
        modules
            .map(|module| module.a.bytes() + module.parts.iter().map(|part| part.b.bytes()).sum::<u64>())
            .sum()
    }
}

/// `[R, inputs held]`
fn held_a(params: &AdapterParams, site: &SiteShape, held: &SiteShard) -> Tensor {
    params.a(site).narrow(1, held.inputs.start, held.n_inputs())
}

/// `[rows held, r]`
fn held_b(params: &AdapterParams, part: &PartShape, held: &SiteShard) -> Tensor {
    let rows = held.part(&part.path);
    params.b(part).narrow(0, rows.rows.start, rows.n_rows())
}

/// Why taking new numbers over cannot fail.
const SAME_SHAPE: &str = "the numbers have the shape that the weight was packed from";
