//! GPTQ as AutoGPTQ and GPTQModel store it: `qweight [K / p, N]` packs p codes of 32 bits along K, `qzeros [groups, N / p]`
//! packs zero points along N, `scales [groups, N]`, `g_idx [K]` names each input's group. In the first version of the format
//! (`checkpoint_format: gptq`, which transformers 5 calls `format`, also where nothing is said) zero points are stored less one. Source: GPTQModel 5
//! nn_modules/qlinear/__init__.py and utils/model.py (convert_gptq_v1_to_v2_format).

use serde_json::Value;
use tandem_kernels::weight::{Grid, Quantised};
use tch::Kind;

use super::{Matrix, Module, Scheme, by_index, with_zeros, wrong};
use crate::weights::LoadError;

pub(super) const SCHEME: Scheme = Scheme {
    parts: &[".qweight", ".qzeros", ".scales", ".g_idx"],
    parameter: ".weight",
    read,
};

fn read(module: &Module) -> Result<Matrix, LoadError> {
    let field = |name: &str| module.config.get(name).and_then(Value::as_str);
    let format = field("checkpoint_format").or_else(|| field("format"));
    let stored_less = match format {
        None | Some("gptq") => 1,
        Some("gptq_v2") => 0,
        Some(other) => {
            return Err(wrong(&format!(
                "GPTQ's format {other} is not read; gptq and gptq_v2 are"
            )));
        }
    };
    let (n, k) = (module.n, module.k);
    let packed = module.tensor(".qweight")?.size();
    let bits = [4, 8, 2].into_iter().find(|bits| packed == [k * bits / 32, n]);
    let Some(bits) = bits else {
        return Err(module.wrong(
            ".qweight",
            &format!("has shape {packed:?}: codes of 2, 4 or 8 bits of a matrix of [{n}, {k}] are read"),
        ));
    };
    let scales = module.floats(".scales")?.tr().contiguous();
    let groups = scales.size()[1];
    module.expect(".scales", &scales, &[n, groups])?;
    let codes = module.codes(".qweight", bits)?.permute([1, 0, 2]).reshape([n, k]);
    let zeros = module.codes(".qzeros", bits)?.view([groups, -1]);
    module.expect(".qzeros", &zeros, &[groups, n])?;
    let zeros = zeros.tr().to_kind(Kind::Float) + stored_less;
    let group = super::group(module, ".scales", groups)?;
    let quantised = match bits {
        8 => Quantised {
            grid: Grid::Int8,
            // Two's complement of what lies 128 below.
            codes: codes.bitwise_xor(0x80),
            group,
            scales,
            offsets: None,
        },
        _ => Quantised {
            grid: Grid::Int4,
            codes,
            group,
            scales,
            offsets: None,
        },
    };
    let middle = if bits == 8 { 128 } else { 8 };
    let quantised = with_zeros(quantised, &zeros, middle);
    match module.has(".g_idx") {
        true => by_index(quantised, &module.tensor(".g_idx")?),
        false => Ok(Matrix::Quantised(quantised)),
    }
}
