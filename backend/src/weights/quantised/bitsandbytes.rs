//! bitsandbytes' 4 bits (`weight` holds two codes a byte, the first in the high half, in blocks along the flattened matrix,
//! with `weight.absmax`, which double quantisation stores in 8 bits) and 8 bits (`weight` int8, `SCB` the largest magnitude
//! of each row). Source: bitsandbytes 0.49 functional.py (QuantState), transformers 5 integrations/bitsandbytes.py.

use serde_json::Value;
use tandem_kernels::weight::{Grid, Quantised};
use tch::{Kind, Tensor};

use super::{Matrix, Module, Scheme, bits};
use crate::weights::LoadError;

pub(super) const SCHEME: Scheme = Scheme {
    parts: &[
        ".weight",
        ".weight.absmax",
        ".weight.quant_map",
        ".weight.nested_absmax",
        ".weight.nested_quant_map",
        NF4_STATE,
        FP4_STATE,
        ".SCB",
        ".weight_format",
    ],
    parameter: ".weight",
    read,
};

const NF4_STATE: &str = ".weight.quant_state.bitsandbytes__nf4";
const FP4_STATE: &str = ".weight.quant_state.bitsandbytes__fp4";

fn read(module: &Module) -> Result<Matrix, LoadError> {
    match module.has(".SCB") {
        true => eight_bits(module),
        false => four_bits(module),
    }
}

fn eight_bits(module: &Module) -> Result<Matrix, LoadError> {
    let (n, k) = (module.n, module.k);
    let codes = module.bytes(".weight")?.squeeze_dim(-1);
    module.expect(".weight", &codes, &[n, k])?;
    let largest = module.floats(".SCB")?;
    module.expect(".SCB", &largest, &[n])?;
    Ok(Matrix::Quantised(Quantised {
        grid: Grid::Int8,
        codes,
        group: k,
        scales: (largest / 127.0).unsqueeze(1),
        offsets: None,
    }))
}

fn four_bits(module: &Module) -> Result<Matrix, LoadError> {
    let (n, k) = (module.n, module.k);
    let state = if module.has(NF4_STATE) {
        NF4_STATE
    } else {
        FP4_STATE
    };
    let text: Vec<u8> = Vec::try_from(module.tensor(state)?.view([-1])).map_err(super::kernel)?;
    let fields: Value = serde_json::from_slice(&text)
        .map_err(|error| module.wrong(state, &format!("is not JSON: {error}")))?;
    let number = |name: &str| {
        let number = fields.get(name).and_then(Value::as_f64);
        number.ok_or_else(|| module.wrong(state, &format!("has no `{name}`")))
    };
    let block = number("blocksize")? as i64;
    let bytes = module.tensor(".weight")?.view([-1]);
    if bytes.kind() != Kind::Uint8 || bytes.numel() as i64 * 2 != n * k || block < 1 || n * k % block != 0 {
        let what = format!(
            "holds {} codes in blocks of {block}, config.json makes it a matrix of [{n}, {k}]",
            bytes.numel() * 2
        );
        return Err(module.wrong(".weight", &what));
    }
    // The first of two codes is in the high half.
    let codes = bits::unpack(&bytes, 4).view([-1, 2]).flip([1]).view([n, k]);
    let scales = match module.has(".weight.nested_absmax") {
        false => module.floats(".weight.absmax")?,
        true => {
            let inner = number("nested_blocksize")? as i64;
            let (map, largest) = (
                module.floats(".weight.nested_quant_map")?,
                module.floats(".weight.nested_absmax")?,
            );
            let index = module.tensor(".weight.absmax")?.view([-1]).to_kind(Kind::Int64);
            let spread = largest.repeat_interleave_self_int(inner, 0, None);
            if spread.numel() < index.numel() || map.size() != [256] {
                return Err(module.wrong(".weight.nested_absmax", "has fewer numbers than blocks"));
            }
            let spread = spread.narrow(0, 0, index.numel() as i64);
            map.index_select(0, &index) * spread + number("nested_offset")?
        }
    };
    let scales = scales.view([-1]);
    module.expect(".weight.absmax", &scales, &[n * k / block])?;
    let map = module.floats(".weight.quant_map")?;
    let levels = Tensor::from_slice(Grid::Nf4.levels());
    if map.equal(&levels) && k % block == 0 && block % 4 == 0 {
        return Ok(Matrix::Quantised(Quantised {
            grid: Grid::Nf4,
            codes: codes.contiguous(),
            group: block,
            scales: scales.view([n, k / block]),
            offsets: None,
        }));
    }
    // Other levels, or blocks that go on in the next row.
    module.expect(".weight.quant_map", &map, &[16])?;
    let numbers = map.index_select(0, &codes.reshape([-1]).to_kind(Kind::Int64));
    Ok(Matrix::Dense(
        (numbers.view([-1, block]) * scales.unsqueeze(1)).view([n, k]),
    ))
}
