//! LoRA of many adapters on a GPU by the kernels of `gpu/lora.cu`: two launches for all of them, whatever their ranks.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::rows::{Matrix, THREADS};
use super::told::told;
use super::{Gpu, int};
use crate::linear::{LoraModule, LoraPart, LoraRows};
use crate::weight::{Precision, Store, Weight};

/// Rows of a tile, ranks and columns of a block (`gpu/lora.cu`).
const TILE: i64 = 16;
const RANKS: usize = 32;
const COLUMNS: usize = 256;

/// `y [T, N] += scale (x At) Bt` of each group's module on its rows. `shrunk [T, R]` gets the groups' `x At` before scaling, R
/// the ranks of the largest module; what belongs to none is left alone. False, and nothing done, where kernels cannot read
/// the modules.
pub(crate) fn add(
    gpu: Gpu,
    x: &Tensor,
    groups: &[LoraRows],
    y: &mut Tensor,
    shrunk: Option<&mut Tensor>,
) -> bool {
    let modules: Vec<Option<&LoraModule>> = groups.iter().map(|group| Some(group.module)).collect();
    let Some(modules) = Modules::new(&modules, x.device()) else {
        return false;
    };
    let rows = groups
        .iter()
        .enumerate()
        .map(|(slot, group)| (group.rows.clone(), slot as i32));
    modules.add(gpu, x, &Tiles::new(rows, x.device()), y, shrunk);
    true
}

/// Which rows of a step have which slot's adapter, as the kernels read it.
pub(crate) struct Tiles {
    /// `[n, 3]` int32: first row, rows, slot.
    tiles: Tensor,
}

impl Tiles {
    /// Rows of no slot need not be named; a slot below 0 is none.
    pub fn new(segments: impl IntoIterator<Item = (Range<i64>, i32)>, device: Device) -> Tiles {
        let mut tiles = vec![];
        for (rows, slot) in segments {
            for first in rows.clone().step_by(TILE as usize) {
                tiles.extend([first, (rows.end - first).min(TILE), i64::from(slot)]);
            }
        }
        Tiles {
            tiles: told(tiles, Kind::Int, device).view([-1, 3]),
        }
    }
}

/// What each slot's adapter has for one linear, as the kernels read it.
pub(crate) struct Modules {
    /// A record of 16 + 32 `most` bytes a slot.
    records: Tensor,
    /// Parts that a record has room for.
    most: usize,
    /// Of the module with the most.
    ranks: usize,
    precision: Precision,
    inputs: i64,
    /// Columns up to the last that a part changes.
    columns: i64,
    /// The records point into them.
    _held: Vec<Tensor>,
}

impl Modules {
    /// None where there is no module, where one is not dense, and where precisions differ.
    pub fn new(slots: &[Option<&LoraModule>], device: Device) -> Option<Modules> {
        let first = slots.iter().flatten().next()?;
        let (precision, inputs) = (first.a.precision(), first.a.k());
        let most = slots.iter().flatten().map(|module| module.parts.len()).max()?;
        let mut held = vec![];
        let mut dense = |weight: &Weight| match weight.store() {
            Store::Plain(tensor) if weight.precision() == precision && tensor.device() == device => {
                held.push(tensor.shallow_clone());
                Some(tensor.data_ptr() as i64)
            }
            _ => None,
        };
        let mut records = Vec::with_capacity(slots.len() * (2 + 4 * most));
        let (mut ranks, mut columns) = (0, 0);
        for slot in slots {
            let begin = records.len();
            if let Some(module) = slot {
                let a = &module.a;
                assert_eq!(
                    a.k(),
                    inputs,
                    "A {:?} of a linear of {inputs} inputs",
                    [a.n(), a.k()]
                );
                records.extend([dense(a)?, pair(a.n(), module.parts.len() as i64)]);
                ranks = ranks.max(a.n());
                for part in &module.parts {
                    check(part, module);
                    columns = columns.max(part.columns.end);
                    records.extend([
                        dense(&part.b)?,
                        pair(part.columns.start, part.b.n()),
                        pair(part.ranks.start, part.b.k()),
                        i64::from((part.scale as f32).to_bits()),
                    ]);
                }
            }
            records.resize(begin + 2 + 4 * most, 0);
        }
        Some(Modules {
            records: told(records, Kind::Int64, device),
            most,
            ranks: ranks as usize,
            precision,
            inputs,
            columns,
            _held: held,
        })
    }

    /// As [`add`].
    pub fn add(&self, gpu: Gpu, x: &Tensor, tiles: &Tiles, y: &mut Tensor, shrunk: Option<&mut Tensor>) {
        let x = Matrix::of(x);
        let (rows, n_tiles) = (x.rows, tiles.tiles.size()[0] as usize);
        assert_eq!(x.width as i64, self.inputs, "x {rows} x {}", x.width);
        let size = y.size();
        assert!(
            size[0] == rows as i64 && size[1] >= self.columns && y.stride()[1] == 1,
            "y {size:?} of {rows} rows, whose columns change up to {}",
            self.columns
        );
        if let Some(shrunk) = &shrunk {
            let want = [rows as i64, self.ranks as i64];
            assert!(
                shrunk.size() == want && shrunk.is_contiguous(),
                "shrunk {:?}",
                shrunk.size()
            );
        }
        let (shrink, expand) = match self.precision {
            Precision::Bf16 => ("lora_shrink", "lora_expand"),
            Precision::F32 => ("lora_shrink_f32", "lora_expand_f32"),
        };
        // Of k alone, so that a row's bits are.
        let k_each = x.width.div_ceil(8).max(512).next_multiple_of(32);
        let splits = x.width.div_ceil(k_each);
        let partial = Tensor::empty(
            [splits as i64, rows as i64, self.ranks as i64],
            (Kind::Float, y.device()),
        );
        let args = [
            (&x).into(),
            x.stride(),
            (&self.records).into(),
            int(self.most),
            (&tiles.tiles).into(),
            (&partial).into(),
            int(rows),
            int(self.ranks),
            int(x.width),
            int(k_each),
        ];
        let grid = [n_tiles, self.ranks.div_ceil(RANKS), splits];
        gpu.launch(shrink, grid, THREADS, &args);
        let args = [
            (&partial).into(),
            (&self.records).into(),
            int(self.most),
            (&tiles.tiles).into(),
            (&*y).into(),
            int(y.stride()[0]),
            shrunk.as_deref().into(),
            int(rows),
            int(self.ranks),
            int(splits),
        ];
        let grid = [n_tiles, (self.columns as usize).div_ceil(COLUMNS), 1];
        gpu.launch(expand, grid, THREADS, &args);
    }
}

/// Two ints as they lie in a record.
fn pair(first: i64, second: i64) -> i64 {
    first | second << 32
}

fn check(part: &LoraPart, module: &LoraModule) {
    let LoraPart {
        columns, ranks, b, ..
    } = part;
    assert_eq!(
        [b.n(), b.k()],
        [columns.end - columns.start, ranks.end - ranks.start],
        "B of columns {columns:?} and ranks {ranks:?}"
    );
    assert!(ranks.end <= module.a.n(), "{ranks:?} of {} ranks", module.a.n());
    let overlaps = |other: &LoraPart| {
        !std::ptr::eq(other, part) && other.columns.start < columns.end && columns.start < other.columns.end
    };
    assert!(
        !module.parts.iter().any(overlaps),
        "parts share columns of {columns:?}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{self, Lanes, emulated};

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn module(k: i64, precision: Precision, parts: &[(Range<i64>, i64, f64)]) -> LoraModule {
        let weight = |n, k| Weight::new(&Tensor::randn([n, k], FLOAT), precision, Device::Cpu).unwrap();
        let mut rank = 0;
        let parts: Vec<LoraPart> = parts
            .iter()
            .map(|(columns, ranks, scale)| {
                rank += ranks;
                LoraPart {
                    columns: columns.clone(),
                    ranks: rank - ranks..rank,
                    b: weight(columns.end - columns.start, *ranks),
                    scale: *scale,
                }
            })
            .collect();
        LoraModule {
            a: weight(rank, k),
            parts,
        }
    }

    /// Adapters of several ranks and parts in one call, rows of none between them.
    #[test]
    fn many_adapters_are_each_of_them() {
        for lanes in Lanes::ALL {
            for (precision, k) in [(Precision::Bf16, 1100), (Precision::F32, 75)] {
                emulated(lanes, || judge(precision, k));
            }
        }
    }

    fn judge(precision: Precision, k: i64) {
        let modules = [
            module(k, precision, &[(0..40, 8, 2.0), (40..300, 8, 0.5)]),
            module(k, precision, &[(40..300, 1, 1.5)]),
            module(k, precision, &[(0..40, 17, 1.0), (40..300, 64, 1.0)]),
        ];
        let groups = [(0..1, 1), (1..22, 0), (24..27, 2), (27..30, 1)].map(|(rows, module)| LoraRows {
            rows,
            module: &modules[module],
        });
        let x = Tensor::randn([31, k + 5], FLOAT).narrow(1, 2, k) / (k as f64).sqrt();
        let before = Tensor::randn([31, 310], FLOAT);
        let (mut y, mut shrunk) = (before.copy(), Tensor::zeros([31, 81], FLOAT));
        let gpu = gpu::of(&x).expect("emulated");
        assert!(add(gpu, &x, &groups, &mut y, Some(&mut shrunk)));
        let (want, want_shrunk) = (before.copy(), Tensor::zeros([31, 81], FLOAT));
        for LoraRows { rows, module } in &groups {
            let of = |x: &Tensor| x.narrow(0, rows.start, rows.end - rows.start);
            let own = module.a.reference_forward(&of(&x));
            of(&want_shrunk).narrow(1, 0, module.a.n()).copy_(&own);
            for part in &module.parts {
                // The kernel's own rows: what lies between two bfloat16 may be rounded either way.
                let width = part.ranks.end - part.ranks.start;
                let scaled = of(&shrunk).narrow(1, part.ranks.start, width) * part.scale;
                let mut to = of(&want).narrow(1, part.columns.start, part.b.n());
                to += part.b.reference_forward(&scaled);
            }
        }
        for (got, want) in [(&shrunk, &want_shrunk), (&y, &want)] {
            let worst = (got - want).abs().max().double_value(&[]);
            let scale = want.abs().max().double_value(&[]);
            assert!(worst <= 1e-6 * scale, "{precision:?}: {worst} of {scale}");
        }
        let mut without = before.copy();
        assert!(add(gpu, &x, &groups, &mut without, None));
        assert!(without.equal(&y), "the same without shrunk rows");
    }

    #[test]
    fn what_kernels_cannot_read_is_left_to_others() {
        emulated(Lanes::Cdna, || {
            let mixed = LoraModule {
                a: module(8, Precision::F32, &[(0..4, 2, 1.0)]).a,
                parts: module(8, Precision::Bf16, &[(0..4, 2, 1.0)]).parts,
            };
            let groups = [LoraRows {
                rows: 0..2,
                module: &mixed,
            }];
            let mut y = Tensor::zeros([2, 4], FLOAT);
            let x = Tensor::ones([2, 8], FLOAT);
            assert!(!add(gpu::of(&x).expect("emulated"), &x, &groups, &mut y, None));
            assert!(y.equal(&y.zeros_like()));
        });
    }
}
