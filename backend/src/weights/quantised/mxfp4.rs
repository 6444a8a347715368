//! The experts of gpt-oss: `_blocks [.., rows, groups, 16]` hold two codes E2M1 a byte, the first in the low half, in groups of
//! 32, and `_scales [.., rows, groups]` the exponent of each, from -127 on. Source: transformers 5 integrations/mxfp4.py, OCP
//! Microscaling Formats 1.0.

use tandem_kernels::weight::{Grid, Quantised};
use tch::{Kind, Tensor};

use super::{Matrix, Module, Scheme, bits};
use crate::weights::LoadError;

pub(super) const SCHEME: Scheme = Scheme {
    parts: &["_blocks", "_scales"],
    parameter: "",
    read,
};

/// Values that share a scale.
const GROUP: i64 = 32;

fn read(module: &Module) -> Result<Matrix, LoadError> {
    let (n, k) = (module.n, module.k);
    let blocks = module.tensor("_blocks")?;
    if blocks.kind() != Kind::Uint8 || blocks.numel() as i64 * 2 != n * k || k % GROUP != 0 {
        let what = format!(
            "has shape {:?}, config.json makes it a matrix of [{n}, {k}]",
            blocks.size()
        );
        return Err(module.wrong("_blocks", &what));
    }
    let exponents = module.tensor("_scales")?.view([-1]).to_kind(Kind::Int64);
    module.expect("_scales", &exponents, &[n * k / GROUP])?;
    if bool::try_from(exponents.ge(255).any()).unwrap_or(true) {
        return Err(module.wrong("_scales", "holds scales that are no numbers: the file is damaged"));
    }
    // 2^-127 is subnormal.
    let powers: Vec<f32> = (0..255_u32)
        .map(|exponent| match exponent {
            0 => f32::from_bits(1 << 22),
            _ => f32::from_bits(exponent << 23),
        })
        .collect();
    Ok(Matrix::Quantised(Quantised {
        grid: Grid::Fp4,
        codes: bits::unpack(&blocks.view([n, -1]), 4),
        group: GROUP,
        scales: Tensor::from_slice(&powers)
            .index_select(0, &exponents)
            .view([n, k / GROUP]),
        offsets: None,
    }))
}
