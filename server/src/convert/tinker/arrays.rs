//! Arrays of numbers as bytes, dense or as rows of what is not zero (CSR).

use tandem_core::TokenId;
use tandem_openapi::tinker::proto::{self, Encoding};

/// A tensor of one or two dimensions, dense.
pub struct Array {
    pub shape: Vec<usize>,
    numbers: Numbers,
}

enum Numbers {
    Floats(Vec<f32>),
    Integers(Vec<i64>),
}

/// Numbers that the sparse tensors of one call become at most: a few bytes ask for any amount.
pub const MAX_NUMBERS: usize = 16 << 20;

impl Array {
    /// A sparse one takes what it becomes from `room`.
    pub fn read(tensor: proto::Tensor, room: &mut usize) -> Result<Array, String> {
        let proto::Tensor {
            encoding,
            dtype,
            shape,
        } = tensor;
        let size = |&n: &i64| usize::try_from(n).map_err(|_| format!("its shape has {n}"));
        let mut shape = shape.iter().map(size).collect::<Result<Vec<usize>, _>>()?;
        let numbers = |bytes: &[u8]| match dtype {
            proto::FLOAT32 => f32s(bytes).map(Numbers::Floats),
            proto::INT64 => i64s(bytes).map(Numbers::Integers),
            other => Err(format!("dtype {other} is neither float32 (1) nor int64 (2)")),
        };
        let numbers = match encoding {
            None => numbers(&[])?,
            Some(Encoding::Dense(bytes)) => numbers(&bytes)?,
            Some(Encoding::Csr(csr)) => {
                let [rows, columns] = shape[..] else {
                    return Err(format!("a sparse tensor has two dimensions, not {shape:?}"));
                };
                let becomes = rows.saturating_mul(columns);
                *room = room.checked_sub(becomes).ok_or_else(|| {
                    format!("a sparse tensor of {rows} x {columns}: those of a call become {MAX_NUMBERS} numbers at most")
                })?;
                let (crow, col) = (i64s(&csr.crow_indices)?, i64s(&csr.col_indices)?);
                let places = places(rows, columns, &crow, &col)?;
                match numbers(&csr.values)? {
                    Numbers::Floats(values) => Numbers::Floats(filled(rows * columns, &places, &values)?),
                    Numbers::Integers(values) => Numbers::Integers(filled(rows * columns, &places, &values)?),
                }
            }
        };
        let len = match &numbers {
            Numbers::Floats(numbers) => numbers.len(),
            Numbers::Integers(numbers) => numbers.len(),
        };
        if shape.is_empty() {
            shape = vec![len];
        }
        match shape
            .iter()
            .try_fold(1usize, |product, &n| product.checked_mul(n))
        {
            Some(product) if product == len => Ok(Array { shape, numbers }),
            _ => Err(format!("{len} numbers do not make the shape {shape:?}")),
        }
    }

    pub fn floats(self) -> Vec<f32> {
        match self.numbers {
            Numbers::Floats(numbers) => numbers,
            Numbers::Integers(numbers) => numbers.into_iter().map(|number| number as f32).collect(),
        }
    }

    pub fn integers(self) -> Result<Vec<i64>, String> {
        match self.numbers {
            Numbers::Integers(numbers) => Ok(numbers),
            Numbers::Floats(_) => Err("target_tokens must be int64, not float32".to_owned()),
        }
    }
}

/// Of each value its place in the dense tensor.
fn places(rows: usize, columns: usize, crow: &[i64], col: &[i64]) -> Result<Vec<usize>, String> {
    let wrong = || format!("its crow and col indices do not make a {rows} x {columns} matrix");
    if crow.len() != rows + 1 {
        return Err(wrong());
    }
    let mut places = Vec::with_capacity(col.len());
    for row in 0..rows {
        let (start, end) = (crow[row], crow[row + 1]);
        let range = usize::try_from(start).ok().zip(usize::try_from(end).ok());
        let (start, end) = range.ok_or_else(wrong)?;
        for &column in col.get(start..end).ok_or_else(wrong)? {
            let column = usize::try_from(column).ok().filter(|&column| column < columns);
            places.push(row * columns + column.ok_or_else(wrong)?);
        }
    }
    match places.len() == col.len() {
        true => Ok(places),
        false => Err(wrong()),
    }
}

fn filled<T: Copy + Default>(len: usize, places: &[usize], values: &[T]) -> Result<Vec<T>, String> {
    if places.len() != values.len() {
        return Err(format!("{} values for {} indices", values.len(), places.len()));
    }
    let mut dense = vec![T::default(); len];
    for (&place, &value) in places.iter().zip(values) {
        dense[place] = value;
    }
    Ok(dense)
}

/// Ids that can be tokens of some model.
pub fn tokens<T: Copy + Into<i64>>(name: &str, ids: &[T]) -> Result<Vec<TokenId>, String> {
    let token = |&id: &T| {
        let id: i64 = id.into();
        TokenId::try_from(id).map_err(|_| format!("{name} has {id}, which is no token"))
    };
    ids.iter().map(token).collect()
}

macro_rules! numbers {
    ($($read:ident $write:ident $kind:ty)*) => {
        $(
            pub fn $read(bytes: &[u8]) -> Result<Vec<$kind>, String> {
                const SIZE: usize = size_of::<$kind>();
                match bytes.len().is_multiple_of(SIZE) {
                    true => Ok(bytes.as_chunks::<SIZE>().0.iter().map(|bytes| <$kind>::from_le_bytes(*bytes)).collect()),
                    false => Err(format!("{} bytes are no array of {}", bytes.len(), stringify!($kind))),
                }
            }

            pub fn $write(numbers: &[$kind]) -> Vec<u8> {
                numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
            }
        )*
    };
}

numbers! { f32s f32_bytes f32  i32s i32_bytes i32  i64s i64_bytes i64 }

#[cfg(test)]
mod tests {
    use super::*;

    fn csr(values: &[f32], crow: &[i64], col: &[i64], shape: &[i64]) -> Result<Vec<f32>, String> {
        let csr = proto::SparseCsr {
            values: f32_bytes(values),
            crow_indices: i64_bytes(crow),
            col_indices: i64_bytes(col),
        };
        let tensor = proto::Tensor {
            encoding: Some(Encoding::Csr(csr)),
            dtype: proto::FLOAT32,
            shape: shape.to_vec(),
        };
        Array::read(tensor, &mut 9).map(Array::floats)
    }

    #[test]
    fn sparse_rows_are_filled_with_zeros_and_wrong_ones_are_refused() {
        let dense = csr(&[1.0, 2.0, 3.0], &[0, 2, 2, 3], &[0, 2, 1], &[3, 3]);
        assert_eq!(dense, Ok(vec![1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0]));
        for (crow, col, shape) in [
            (&[0i64, 2][..], &[0i64, 3][..], &[1i64, 3][..]), // a column that is not there
            (&[0, 3], &[0, 1], &[1, 3]),
            (&[0, -1], &[0, 1], &[1, 3]),
            (&[0, 1], &[0, 1], &[1, 3]),
            (&[0, 2, 2], &[0, 1], &[1, 3]),
            (&[0, 2], &[0, 1], &[3]),
            (&[0, 2], &[0, 1], &[1, 1 << 40]),
            (&[0, 2], &[0, 1], &[1, 10]), // more than there is room for
        ] {
            assert!(
                csr(&[1.0, 2.0], crow, col, shape).is_err(),
                "{crow:?} {col:?} {shape:?}"
            );
        }
    }
}
