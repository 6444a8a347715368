//! AWQ as AutoAWQ stores it (`version: gemm`): `qweight [K, N / 8]` packs 8 codes of 4 bits along N in the order 0, 2, 4, 6,
//! 1, 3, 5, 7, `qzeros [groups, N / 8]` likewise, `scales [groups, N]`. Source: AutoAWQ 0.2 awq/modules/linear/gemm.py.

use serde_json::Value;
use tandem_kernels::weight::{Grid, Quantised};
use tch::Tensor;

use super::{Matrix, Module, Scheme, with_zeros, wrong};
use crate::weights::LoadError;

pub(super) const SCHEME: Scheme = Scheme {
    parts: &[".qweight", ".qzeros", ".scales"],
    parameter: ".weight",
    read,
};

/// Where column i of eight stands among the codes of a 32-bit number.
const ORDER: [i64; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

fn read(module: &Module) -> Result<Matrix, LoadError> {
    let field = |name: &str| module.config.get(name).filter(|value| !value.is_null());
    match field("version").and_then(Value::as_str) {
        None => (),
        Some(version) if version.eq_ignore_ascii_case("gemm") => (),
        Some(other) => return Err(wrong(&format!("AWQ's `version` {other} is not read; gemm is"))),
    }
    match field("bits").or(field("w_bit")).and_then(Value::as_i64) {
        None | Some(4) => (),
        Some(other) => return Err(wrong(&format!("AWQ's `bits` {other} are not read; 4 are"))),
    }
    let (n, k) = (module.n, module.k);
    let columns = |suffix: &str| -> Result<Tensor, LoadError> {
        let codes = module
            .codes(suffix, 4)?
            .index_select(2, &Tensor::from_slice(&ORDER));
        Ok(codes.flatten(1, 2).tr().contiguous())
    };
    let codes = columns(".qweight")?;
    module.expect(".qweight", &codes, &[n, k])?;
    let scales = module.floats(".scales")?.tr().contiguous();
    let groups = scales.size()[1];
    module.expect(".scales", &scales, &[n, groups])?;
    let zeros = columns(".qzeros")?;
    module.expect(".qzeros", &zeros, &[n, groups])?;
    let quantised = Quantised {
        grid: Grid::Int4,
        codes,
        group: super::group(module, ".scales", groups)?,
        scales,
        offsets: None,
    };
    Ok(Matrix::Quantised(with_zeros(quantised, &zeros, 8)))
}
