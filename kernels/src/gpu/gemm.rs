//! Products with a plain weight on a device with kernels of ours (`kernels/gpu/gemm.cu`).
//!
//! Up to [`FEW_ROWS`] rows ours read the weight at the pace of memory. Beyond, libtorch's are faster and a row's bits depend
//! on the rows beside it; under [`super::deterministic`] ours take any number.

use tch::{Kind, Tensor};

use super::{Arg, Gpu, deterministic, int};

/// Rows that one reading of the weight serves.
const FEW_ROWS: i64 = 16;
/// Of the reduction, which a warp sums alone (`gpu/gemm.cu`).
const SEGMENT: u32 = 512;

/// `y [T, N] = x Wt + bias + around`, `x [T, K]` float32, `w [N, K]` bfloat16 or float32 in one piece; `around [T, N]`, which
/// may be y, lies as y does. False where it is not for these kernels: nothing was computed.
pub(crate) fn forward(
    gpu: Gpu,
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    around: Option<&Tensor>,
    y: &Tensor,
) -> bool {
    let rows = x.size()[0];
    if !takes(x, w, around, y) {
        return false;
    }
    let (n, k) = (w.size()[0], w.size()[1]);
    assert_eq!(
        (x.size(), y.size()),
        (vec![rows, k], vec![rows, n]),
        "x and y of a product"
    );
    let mut args = vec![
        x.into(),
        stride(x),
        w.into(),
        bias.into(),
        around.into(),
        y.into(),
        stride(y),
        int(rows),
        int(n),
        int(k),
    ];
    let (name, tile, threads) = match (w.kind(), rows <= FEW_ROWS) {
        (Kind::Float, _) => ("gemm_f32", 16, 256),
        (_, true) => {
            let warps = (k as u32).div_ceil(SEGMENT).min(8);
            args.push(int(warps));
            ("gemm_few", 16, warps * gpu.warp())
        }
        (_, false) => ("gemm_many", 64, 4 * gpu.warp()),
    };
    launch(gpu, name, [n, rows], tile, threads, &args);
    true
}

/// `dx [T, K] = dy W + around`, `dy [T, N]` float32, as [`forward`].
pub(crate) fn backward(gpu: Gpu, dy: &Tensor, w: &Tensor, around: Option<&Tensor>, dx: &Tensor) -> bool {
    let rows = dy.size()[0];
    if !takes(dy, w, around, dx) {
        return false;
    }
    let (n, k) = (w.size()[0], w.size()[1]);
    assert_eq!(
        (dy.size(), dx.size()),
        (vec![rows, n], vec![rows, k]),
        "dy and dx of a product"
    );
    let args = [
        dy.into(),
        stride(dy),
        w.into(),
        around.into(),
        dx.into(),
        stride(dx),
        int(rows),
        int(n),
        int(k),
    ];
    let (name, tile, threads) = match w.kind() {
        Kind::Float => ("gemm_back_f32", 16, 256),
        _ => ("gemm_back", 64, 4 * gpu.warp()),
    };
    launch(gpu, name, [k, rows], tile, threads, &args);
    true
}

fn takes(left: &Tensor, w: &Tensor, around: Option<&Tensor>, out: &Tensor) -> bool {
    let in_rows = |x: &Tensor| x.kind() == Kind::Float && (x.stride()[1] == 1 || x.size()[1] == 1);
    let known = matches!(w.kind(), Kind::Float | Kind::BFloat16) && w.is_contiguous();
    let alike = around.is_none_or(|around| in_rows(around) && around.stride()[0] == out.stride()[0]);
    let few = left.size()[0] <= FEW_ROWS;
    (few || deterministic()) && known && in_rows(left) && in_rows(out) && alike
}

fn stride(x: &Tensor) -> Arg<'static> {
    Arg::Long(x.stride()[0])
}

fn launch(gpu: Gpu, name: &str, [columns, rows]: [i64; 2], tile: i64, threads: u32, args: &[Arg]) {
    let tiles = |n: i64| (n as usize).div_ceil(tile as usize);
    gpu.launch(name, [tiles(columns), tiles(rows), 1], threads, args);
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::gpu::{Lanes, emulated, on};

    /// Rows of a wider tensor, into columns of a wider one, both ways.
    #[test]
    fn products_are_those_of_float32() {
        let float = (Kind::Float, Device::Cpu);
        for lanes in Lanes::ALL {
            for (rows, n, k) in [(1, 40, 64), (20, 7, 600)] {
                for kind in [Kind::BFloat16, Kind::Float] {
                    let w = Tensor::randn([n, k], float).to_kind(kind);
                    let whole = w.to_kind(Kind::Double);
                    let x = Tensor::randn([rows, k + 3], float).narrow(1, 2, k);
                    let bias = Tensor::randn([n], float);
                    let wide = Tensor::randn([rows, n + 5], float);
                    let y = wide.narrow(1, 1, n);
                    let rounded = |x: &Tensor| x.to_kind(kind).to_kind(Kind::Double);
                    let want = rounded(&x).mm(&whole.tr()) + &bias + &y;
                    let back = Tensor::randn([rows, k], float);
                    let dy = y.copy();
                    let want_back = rounded(&dy).mm(&whole) + &back;
                    emulated(lanes, || {
                        let gpu = on(Device::Cpu).expect("it is emulated");
                        assert!(forward(gpu, &x, &w, Some(&bias), Some(&y), &y));
                        assert!(backward(gpu, &dy, &w, Some(&back), &back));
                    });
                    for (got, want) in [(y, want), (back, want_back)] {
                        let off = (got - want).abs().max().double_value(&[]);
                        assert!(off < 1e-4, "{rows} x {n} x {k} in {kind:?}: {off}");
                    }
                }
            }
        }
    }
}
