//! What llm-compressor writes: integers of 8 bits or E4M3 in `weight`, or integers of 4 or 8 bits in `weight_packed` (32-bit
//! numbers along K, shifted to be positive), with `weight_scale` of a tensor, rows, groups or blocks, `weight_zero_point`
//! where they are not symmetric, and `weight_g_idx` where inputs are in groups by an index. Activations are not quantised
//! here, whatever the file says: products are at least as precise. Source: compressed-tensors 0.13
//! compressors/quantized_compressors/.

use serde_json::Value;
use tandem_kernels::weight::{Grid, Quantised};
use tch::Kind;

use super::{Matrix, Module, Scheme, bits, by_index, fp8, with_zeros, wrong};
use crate::weights::LoadError;

pub(super) const SCHEME: Scheme = Scheme {
    parts: &[
        ".weight_scale",
        ".weight",
        ".weight_packed",
        ".weight_shape",
        ".weight_zero_point",
        ".weight_g_idx",
        ".weight_global_scale",
    ],
    parameter: ".weight",
    read,
};

const FORMATS: [&str; 6] = [
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
];

fn read(module: &Module) -> Result<Matrix, LoadError> {
    check(module)?;
    if module.has(".weight_global_scale") {
        return Err(module.wrong(".weight_global_scale", "belongs to NVFP4, which is not read"));
    }
    let block = block(module);
    let (quantised, middle) = match module.has(".weight_packed") {
        true => packed(module, block)?,
        false => match module.tensor(".weight")?.kind() {
            Kind::Int8 => {
                let (scales, group) = fp8::scales(module, ".weight_scale", block)?;
                let quantised = Quantised {
                    grid: Grid::Int8,
                    codes: module.bytes(".weight")?.squeeze_dim(-1),
                    group,
                    scales,
                    offsets: None,
                };
                (quantised, 0)
            }
            _ => return fp8::scaled(module, ".weight_scale", block),
        },
    };
    let (n, groups) = (module.n, quantised.groups());
    let quantised = match module.has(".weight_zero_point") {
        false => quantised,
        true => {
            let stored = module.tensor(".weight_zero_point")?;
            let zeros = match stored.kind() {
                // Packed as the codes are, but along N.
                Kind::Int => {
                    let width = quantised.grid.bits() as i64;
                    let bytes = module.bytes(".weight_zero_point")?;
                    let codes = bits::unpack(&bytes, width).permute([0, 2, 1]).flatten(0, 1);
                    codes.narrow(0, 0, n.min(codes.size()[0]))
                }
                _ => stored.to_kind(Kind::Float) + middle,
            };
            let zeros = match zeros.numel() {
                1 => zeros.view([1, 1]).expand([n, groups], false),
                _ => zeros.view([-1, groups]),
            };
            module.expect(".weight_zero_point", &zeros, &[n, groups])?;
            with_zeros(quantised, &zeros, middle)
        }
    };
    match module.has(".weight_g_idx") {
        // Minus one everywhere: there is none.
        true => match module.tensor(".weight_g_idx")? {
            index if bool::try_from(index.lt(0).all()).unwrap_or(false) => Ok(Matrix::Quantised(quantised)),
            index => by_index(quantised, &index),
        },
        false => Ok(Matrix::Quantised(quantised)),
    }
}

/// `weight_packed`, and the code of zero among the unsigned codes.
fn packed(module: &Module, block: Option<[i64; 2]>) -> Result<(Quantised, i64), LoadError> {
    let (n, k) = (module.n, module.k);
    let shape = module.tensor(".weight_packed")?.size();
    let bits = [4, 8].into_iter().find(|bits| shape == [n, (k * bits + 31) / 32]);
    let Some(bits) = bits else {
        let what = format!("has shape {shape:?}: codes of 4 or 8 bits of a matrix of [{n}, {k}] are read");
        return Err(module.wrong(".weight_packed", &what));
    };
    let codes = module
        .codes(".weight_packed", bits)?
        .flatten(1, 2)
        .narrow(1, 0, k);
    let (scales, group) = fp8::scales(module, ".weight_scale", block)?;
    let (grid, codes, middle) = match bits {
        4 => (Grid::Int4, codes, 8),
        _ => (Grid::Int8, codes.bitwise_xor(0x80), 128),
    };
    let quantised = Quantised {
        grid,
        codes: codes.contiguous(),
        group,
        scales,
        offsets: None,
    };
    Ok((quantised, middle))
}

/// What of the configuration would change numbers and is not read.
fn check(module: &Module) -> Result<(), LoadError> {
    let field = |name: &str| module.config.get(name).filter(|value| !value.is_null());
    match field("format").and_then(Value::as_str) {
        Some(format) if !FORMATS.contains(&format) => {
            return Err(wrong(&format!(
                "compressed-tensors' `format` {format} is not read; {} are",
                FORMATS.join(", ")
            )));
        }
        _ => (),
    }
    let sparse = field("sparsity_config").and_then(|config| config.get("format")?.as_str());
    if sparse.is_some_and(|format| format != "dense") {
        return Err(wrong("sparse weights (`sparsity_config`) are not read"));
    }
    let transforms = field("transform_config").and_then(|config| config.get("config_groups")?.as_object());
    if transforms.is_some_and(|groups| !groups.is_empty()) {
        return Err(wrong("transformed weights (`transform_config`) are not read"));
    }
    Ok(())
}

/// The first group's `block_structure`, else 128 x 128.
fn block(module: &Module) -> Option<[i64; 2]> {
    let groups = module.config.get("config_groups")?.as_object()?;
    let weights = groups.values().find_map(|group| group.get("weights"))?;
    if weights.get("strategy").and_then(Value::as_str) != Some("block") {
        return None;
    }
    let sizes = weights.get("block_structure").and_then(Value::as_array);
    let sizes = sizes.and_then(|sizes| Some([sizes.first()?.as_i64()?, sizes.get(1)?.as_i64()?]));
    Some(sizes.unwrap_or([128, 128]))
}
