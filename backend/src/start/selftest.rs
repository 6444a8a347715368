//! Before a replica on a GPU reads its weights: does the GPU compute what the CPU computes? The ops a step is made of,
//! small, one after the other, so that a broken driver, kernel library or interconnect is named at start and not found
//! in the answers. Not here: speed, goldens of models (scripts/gpu-check).

use tandem_kernels::attention::{self, BLOCK_SIZE, CacheShape, Heads, KvCache, PagedSeq};
use tandem_kernels::comm::Comm;
use tandem_kernels::linear::linear;
use tandem_kernels::matmul;
use tandem_kernels::places::PagedGroup;
use tandem_kernels::weight::{Precision, Weight};
use tch::{Device, Kind, Tensor};
use tracing::info;

use crate::guard;
use crate::weights::LoadError;

/// Largest difference, relative to the largest number of the CPU's result. float32 sums in another order; a bfloat16
/// product rounds its inputs alike on both sides, so only the order differs there too. TF32 (3e-4 and more) fails.
const TOLERANCE: f64 = 1e-4;
/// Rows and columns of the products: several tiles of any kernel, and no multiple of one.
const ROWS: i64 = 70;
const INNER: i64 = 520;
const COLUMNS: i64 = 330;
const HEADS: Heads = Heads {
    heads: 8,
    kv_heads: 2,
    head_dim: 64,
};
/// Positions of the attended sequence, over three blocks.
const POSITIONS: usize = 2 * BLOCK_SIZE + 5;
/// Numbers a sum over ranks is tried with: the activations of 16 tokens of a middling model.
const REDUCED: i64 = 16 * 4096;

/// Every part on `device` against the CPU; with more ranks than one, all of them at the same time.
pub fn run(device: Device, comm: &Comm) -> Result<(), LoadError> {
    let parts: [(&str, Part); 5] = [
        ("copy to the device and back", copy),
        ("matmul in float32", |device| linear_in(Precision::F32, device)),
        ("matmul in bfloat16", |device| linear_in(Precision::Bf16, device)),
        ("matmul of a gradient", gradient),
        ("attention over a paged cache", attend),
    ];
    for (name, part) in parts {
        judge(name, device, || part(device), || part(Device::Cpu))?;
    }
    if comm.world() > 1 {
        let ranks = format!("all_reduce over {} ranks", comm.world());
        judge(
            &ranks,
            device,
            || reduced(device, comm),
            || sum_of_all(comm.world()),
        )?;
    }
    info!(?device, ranks = comm.world(), "self-test passed");
    Ok(())
}

/// Computes on a device; the result may stay there.
type Part = fn(Device) -> Tensor;

fn judge(
    name: &str,
    device: Device,
    ours: impl FnOnce() -> Tensor,
    expected: impl FnOnce() -> Tensor,
) -> Result<(), LoadError> {
    let failed = |why: String| {
        LoadError::Option(format!(
            "the self-test of {device:?} failed in {name:?}: {why}; the device, its driver or its libraries are not \
             fit to serve (--device cpu serves without it)"
        ))
    };
    let on_cpu = || ours().to_device(Device::Cpu).to_kind(Kind::Double);
    let ours = guard::torch(on_cpu).map_err(|fault| failed(fault.message))?;
    let expected = guard::torch(expected).map_err(|fault| failed(fault.message))?;
    let expected = expected.to_kind(Kind::Double);
    let difference =
        (&ours - &expected).abs().max().double_value(&[]) / expected.abs().max().double_value(&[]);
    // A NaN is no number below the limit.
    match difference <= TOLERANCE {
        true => Ok(()),
        false => Err(failed(format!(
            "it differs from the CPU's result by {difference:.1e} of its largest number, the limit is {TOLERANCE:.0e}"
        ))),
    }
}

/// Numbers of both signs and any size below one, the same on every device: made on the CPU. `[rows, columns]` float32.
fn numbers(rows: i64, columns: i64, seed: f64) -> Tensor {
    let index = Tensor::arange(rows * columns, (Kind::Double, Device::Cpu));
    // The irrational steps of a sine never repeat.
    (index * 12.9898 + seed)
        .sin()
        .to_kind(Kind::Float)
        .view([rows, columns])
}

fn copy(device: Device) -> Tensor {
    numbers(ROWS, INNER, 0.0).to_device(device)
}

fn linear_in(precision: Precision, device: Device) -> Tensor {
    let weight = Weight::new(&numbers(COLUMNS, INNER, 1.0), precision, device).expect("a matrix of float32");
    linear(&numbers(ROWS, INNER, 2.0).to_device(device), &weight, None, &[])
}

fn gradient(device: Device) -> Tensor {
    let on = |x: Tensor| x.to_device(device);
    matmul::tn(&on(numbers(ROWS, COLUMNS, 3.0)), &on(numbers(ROWS, INNER, 4.0)))
}

fn attend(device: Device) -> Tensor {
    let shape = CacheShape {
        layers: 1,
        blocks: POSITIONS.div_ceil(BLOCK_SIZE) + 1,
        kv_heads: HEADS.kv_heads,
        head_dim: HEADS.head_dim,
    };
    let cache = KvCache::new(shape, Precision::F32, device).expect("a small cache fits");
    // Not in order, and not from the first block.
    let table: Vec<u32> = (1..shape.blocks as u32).rev().collect();
    let slots: Vec<i64> = (0..POSITIONS)
        .map(|position| (table[position / BLOCK_SIZE] as usize * BLOCK_SIZE + position % BLOCK_SIZE) as i64)
        .collect();
    let wide = |heads: usize, seed| {
        numbers(POSITIONS as i64, (heads * HEADS.head_dim) as i64, seed).to_device(device)
    };
    attention::write(
        &cache,
        0,
        &wide(HEADS.kv_heads, 5.0),
        &wide(HEADS.kv_heads, 6.0),
        &(&slots).into(),
    );
    let whole = PagedSeq {
        rows: 0..POSITIONS,
        table: &table,
        first_block: 0,
        kv_len: POSITIONS,
    };
    let options = attention::Options {
        scale: (HEADS.head_dim as f64).powf(-0.5),
        window: None,
        cap: None,
        sinks: None,
    };
    let group = PagedGroup::new(&slots, vec![whole]);
    attention::paged(&wide(HEADS.heads, 7.0), &cache, 0, &group, HEADS, options)
}

/// A rank's own share of the sum.
fn share(rank: usize) -> Tensor {
    numbers(1, REDUCED, 8.0 + rank as f64)
}

fn reduced(device: Device, comm: &Comm) -> Tensor {
    let mut x = share(comm.rank()).to_device(device);
    comm.all_reduce(&mut x);
    let x = x.to_device(Device::Cpu);
    comm.check();
    // A rank that ends now would be lost to one that still looks.
    comm.meet();
    x
}

fn sum_of_all(world: usize) -> Tensor {
    (0..world)
        .map(share)
        .reduce(|sum, x| sum + x)
        .expect("a group has a rank")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The CPU against itself, as three ranks: every part runs, and the sum over ranks is checked.
    #[test]
    fn a_sound_device_passes() {
        let ranks = Comm::threads(3)
            .into_iter()
            .map(|comm| std::thread::spawn(move || run(Device::Cpu, &comm)));
        for rank in ranks.collect::<Vec<_>>() {
            rank.join()
                .expect("no panic escapes")
                .expect("the CPU equals itself");
        }
        run(Device::Cpu, &Comm::solo()).expect("the CPU equals itself");
    }

    #[test]
    fn a_failing_part_is_named() {
        let right = || Tensor::from_slice(&[1.0f32, -2.0]);
        type Part = Box<dyn FnOnce() -> Tensor>;
        let cases: [(Part, &str); 3] = [
            (Box::new(|| Tensor::from_slice(&[1.0f32, -2.001])), "by 5.0e-4"),
            (Box::new(|| Tensor::from_slice(&[f32::NAN, -2.0])), "by NaN"),
            (
                Box::new(|| panic!("HIP error: no kernel image")),
                "HIP error: no kernel image",
            ),
        ];
        for (wrong, says) in cases {
            let error = judge("a part", Device::Cuda(1), wrong, right)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("\"a part\"") && error.contains("Cuda(1)") && error.contains(says),
                "{error}"
            );
        }
    }

    /// What a device that multiplies in TF32 would give: the limit is below it.
    #[test]
    fn tf32_is_not_float32() {
        let cut = |x: Tensor| {
            Tensor::from_slice(
                &Vec::<f32>::try_from(x.view([-1]))
                    .expect("floats")
                    .into_iter()
                    .map(|x| f32::from_bits(x.to_bits() & !0x1fff))
                    .collect::<Vec<_>>(),
            )
        };
        let (a, b) = (numbers(ROWS, INNER, 2.0), numbers(COLUMNS, INNER, 1.0));
        let tf32 = || {
            cut(a.shallow_clone())
                .view([ROWS, INNER])
                .mm(&cut(b.shallow_clone()).view([COLUMNS, INNER]).tr())
        };
        assert!(
            judge("matmul", Device::Cpu, tf32, || linear_in(
                Precision::F32,
                Device::Cpu
            ))
            .is_err()
        );
    }
}
