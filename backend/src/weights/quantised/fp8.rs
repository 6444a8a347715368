//! Weights in E4M3 with a scale for all, for each row, or for each block of (usually 128 x 128): what DeepSeek and Qwen
//! publish (`weight_scale_inv`), AutoFP8 and FBGEMM (`weight_scale`). Scales multiply. Source: transformers 5
//! integrations/finegrained_fp8.py, vLLM quantization/fp8.py.

use serde_json::Value;
use tandem_kernels::weight::{Grid, Quantised};
use tch::{Kind, Tensor};

use super::{Matrix, Module, Scheme};
use crate::weights::LoadError;

pub(super) const SCHEME: Scheme = Scheme {
    parts: &[".weight", ".weight_scale_inv", ".weight_scale"],
    parameter: ".weight",
    read,
};

fn read(module: &Module) -> Result<Matrix, LoadError> {
    let suffix = match module.has(".weight_scale_inv") {
        true => ".weight_scale_inv",
        false => ".weight_scale",
    };
    let block = module.config.get("weight_block_size").and_then(Value::as_array);
    let block = block.and_then(|block| Some([block.first()?.as_i64()?, block.get(1)?.as_i64()?]));
    scaled(module, suffix, block)
}

/// `weight` with the scales of a tensor of either of those shapes.
pub(super) fn scaled(module: &Module, suffix: &str, block: Option<[i64; 2]>) -> Result<Matrix, LoadError> {
    let (n, k) = (module.n, module.k);
    let codes = module.tensor(".weight")?;
    if codes.kind() != Kind::Uint8 {
        return Err(module.wrong(".weight", "is to be F8_E4M3"));
    }
    module.expect(".weight", &codes, &[n, k])?;
    if bool::try_from(codes.bitwise_and(0x7f).eq(0x7f).any()).unwrap_or(true) {
        return Err(module.wrong(
            ".weight",
            "holds numbers that are none (NaN): the file is damaged",
        ));
    }
    let (scales, group) = scales(module, suffix, block)?;
    Ok(Matrix::Quantised(Quantised {
        grid: Grid::Fp8,
        codes,
        group,
        scales,
        offsets: None,
    }))
}

/// Scales of a whole tensor, of rows, of groups of a row, or of blocks: `[N, groups]`, and the values of K that share one.
pub(super) fn scales(
    module: &Module,
    suffix: &str,
    block: Option<[i64; 2]>,
) -> Result<(Tensor, i64), LoadError> {
    let (n, k) = (module.n, module.k);
    let scales = module.floats(suffix)?;
    if scales.numel() == 1 {
        return Ok((scales.view([1, 1]).expand([n, 1], false).contiguous(), k));
    }
    let scales = match scales.dim() {
        1 => scales.unsqueeze(1),
        _ => scales,
    };
    let &[rows, groups] = scales.size().as_slice() else {
        return Err(module.wrong(
            suffix,
            &format!("has shape {:?}: at most two dimensions are read", scales.size()),
        ));
    };
    if let Some([height, width]) = block
        && (rows, groups) == ((n + height - 1) / height, (k + width - 1) / width)
    {
        let spread = scales.repeat_interleave_self_int(height, 0, None).narrow(0, 0, n);
        return Ok((spread.contiguous(), width.min(k)));
    }
    module.expect(suffix, &scales, &[n, groups])?;
    let group = super::group(module, suffix, groups)?;
    Ok((scales.contiguous(), group))
}
