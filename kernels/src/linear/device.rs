//! A linear where weights lie as plain tensors on a device with kernels of ours: one launch a product, with bias and
//! residual in it, and two for all adapters.

use tch::{Kind, Tensor};

use super::{BranchBack, LoraRows, WeightRows, reference_expand};
use crate::gpu::{Gpu, lora};
use crate::weight::Weight;

/// `y [T, N]` = x Wt + bias + around, and the branches' part, reading `lora_x`. `around` may be y itself. Their shrunk rows
/// go into `shrunk [T, R]`, if it is given.
pub(super) fn forward(
    gpu: Gpu,
    x: &Tensor,
    groups: &[WeightRows],
    (lora, lora_x): (&[LoraRows], &Tensor),
    around: Option<&Tensor>,
    y: &Tensor,
    shrunk: Option<&Tensor>,
) {
    for WeightRows { rows, weight, bias } in groups {
        let part = |of: &Tensor| of.narrow(0, rows.start, rows.end - rows.start);
        product(gpu, &part(x), weight, *bias, around.map(part).as_ref(), &part(y));
    }
    let (mut y, mut shrunk) = (y.shallow_clone(), shrunk.map(Tensor::shallow_clone));
    if lora.is_empty() || lora::add(gpu, lora_x, lora, &mut y, shrunk.as_mut()) {
        return;
    }
    for LoraRows { rows, module } in lora {
        let part = |of: &Tensor| of.narrow(0, rows.start, rows.end - rows.start);
        let own = module.a.reference_forward(&part(lora_x));
        reference_expand(&mut part(&y), &own, module);
        if let Some(shrunk) = &shrunk {
            part(shrunk).narrow(1, 0, module.a.n()).copy_(&own);
        }
    }
}

/// `dx [T, K]` = dy W, and what comes back through the branches.
pub(super) fn backward(gpu: Gpu, dy: &Tensor, groups: &[WeightRows], branches: &[BranchBack]) -> Tensor {
    let dx = new(dy.size()[0], groups[0].weight.k(), dy);
    for WeightRows { rows, weight, .. } in groups {
        let part = |of: &Tensor| of.narrow(0, rows.start, rows.end - rows.start);
        product_back(gpu, &part(dy), weight, None, &part(&dx));
    }
    for BranchBack { rows, dshrunk, a } in branches {
        let dx = dx.narrow(0, rows.start, rows.end - rows.start);
        product_back(gpu, dshrunk, a, Some(&dx), &dx);
    }
    dx
}

/// Of undefined content.
pub(super) fn new(rows: i64, columns: i64, beside: &Tensor) -> Tensor {
    Tensor::empty([rows, columns], (Kind::Float, beside.device()))
}

fn product(gpu: Gpu, x: &Tensor, w: &Weight, bias: Option<&Tensor>, around: Option<&Tensor>, y: &Tensor) {
    if !w.forward_on(gpu, x, bias, around, y) {
        let product = w.reference_forward(x);
        let product = bias.map_or_else(|| product.shallow_clone(), |bias| &product + bias);
        put(y, product, around);
    }
}

fn product_back(gpu: Gpu, dy: &Tensor, w: &Weight, around: Option<&Tensor>, dx: &Tensor) {
    if !w.backward_on(gpu, dy, around, dx) {
        put(dx, w.reference_backward(dy), around);
    }
}

fn put(to: &Tensor, product: Tensor, around: Option<&Tensor>) {
    let sum = around.map_or_else(|| product.shallow_clone(), |around| around + &product);
    to.shallow_clone().copy_(&sum);
}
