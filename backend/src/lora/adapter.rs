//! The form of an adapter that kernels read: A and B packed like any weight, per layer and fused linear.

use std::ops::Range;

use tandem_kernels::KernelError;
use tandem_kernels::linear::{LoraModule, LoraPart};
use tandem_kernels::weight::{Precision, Weight};
use tch::Device;

use super::params::{AdapterParams, SiteShape};
use crate::family::site::Site;

pub struct Adapter {
    /// `[layer][site]`
    modules: Vec<[Option<LoraModule>; 4]>,
    max_rank: i64,
}

/// Rows of a batch that one adapter answers.
pub struct AdapterRows<'a> {
    pub rows: Range<usize>,
    pub adapter: &'a Adapter,
}

impl Adapter {
    pub fn new(params: &AdapterParams, precision: Precision, device: Device) -> Result<Adapter, KernelError> {
        let module = |site: &SiteShape| -> Result<LoraModule, KernelError> {
            let part = |part: &super::params::PartShape| {
                Ok(LoraPart {
                    columns: part.columns.clone(),
                    ranks: part.ranks.clone(),
                    b: Weight::new(&params.b(part), precision, device)?,
                    scale: part.scale,
                })
            };
            let parts = site.parts.iter().map(part).collect::<Result<_, KernelError>>()?;
            Ok(LoraModule {
                a: Weight::new(&params.a(site), precision, device)?,
                parts,
            })
        };
        let mut modules: Vec<[Option<LoraModule>; 4]> =
            (0..params.shape.layers()).map(|_| [const { None }; 4]).collect();
        for (layer, site, shape) in params.shape.iter() {
            modules[layer][site.index()] = Some(module(shape)?);
        }
        Ok(Adapter {
            modules,
            max_rank: params.shape.max_rank(),
        })
    }

    /// Takes over the numbers of `params` (same shape), after an optimizer step.
    pub fn update(&mut self, params: &AdapterParams) {
        for (layer, site, shape) in params.shape.iter() {
            let module = self.modules[layer][site.index()]
                .as_mut()
                .expect("update keeps the shape");
            module.a.overwrite(&params.a(shape)).expect(SAME_SHAPE);
            for (part, shape) in module.parts.iter_mut().zip(&shape.parts) {
                part.b.overwrite(&params.b(shape)).expect(SAME_SHAPE);
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

    pub fn bytes(&self) -> u64 {
        let modules = self.modules.iter().flatten().flatten();
        modules
            .map(|module| module.a.bytes() + module.parts.iter().map(|part| part.b.bytes()).sum::<u64>())
            .sum()
    }
}

/// Why taking new numbers over cannot fail.
const SAME_SHAPE: &str = "the numbers have the shape that the weight was packed from";
