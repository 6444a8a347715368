//! What the rows of a Parquet file take when they are made, before one is: an entry of a dictionary may stand in a list, or in
//! rows, a million times, and the crate that reads rows makes all of them anew. Here values are looked at where they lie, without
//! a copy. Not here: pages (`pages`).

use parquet::basic::Type;
use parquet::column::reader::get_typed_column_reader;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::{ParquetError, Result};
use parquet::file::reader::{FileReader, RowGroupReader};

/// Values of one column in one group of rows: as many are looked at, at most, if all are one row's.
const MAX_VALUES: i64 = 16 << 20;
const MAX_COLUMNS: usize = 10_000;
/// Rows that are looked at together.
const ROWS: usize = 64;

/// `max_row` and `max_all`: bytes of text of a row in one column, and of all rows and columns.
pub fn check(reader: &dyn FileReader, max_row: usize, max_all: u64) -> Result<()> {
    let columns = reader.metadata().file_metadata().schema_descr().num_columns();
    if columns > MAX_COLUMNS {
        return refuse(format!(
            "it has {columns} columns, at most {MAX_COLUMNS} are read"
        ));
    }
    let mut left = max_all;
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group)?;
        for column in 0..group.num_columns() {
            let taken = texts(&*group, column, max_row, left)?;
            left -= taken;
        }
    }
    Ok(())
}

/// Bytes of a column's texts.
fn texts(group: &dyn RowGroupReader, column: usize, max_row: usize, left: u64) -> Result<u64> {
    let chunk = group.metadata().column(column);
    let name = chunk.column_path().string();
    if chunk.num_values() > MAX_VALUES {
        let n = chunk.num_values();
        return refuse(format!(
            "the column {name} has {n} values in one group of rows, at most {MAX_VALUES} are read"
        ));
    }
    if chunk.column_type() != Type::BYTE_ARRAY {
        return Ok(0);
    }
    let max_level = chunk.column_descr().max_def_level();
    let mut reader = get_typed_column_reader::<ByteArrayType>(group.get_column_reader(column)?);
    let (mut taken, mut of_row, mut row) = (0, 0, 0_u64);
    let (mut defined, mut repeated, mut values) = (vec![], vec![], Vec::<ByteArray>::new());
    loop {
        defined.clear();
        repeated.clear();
        values.clear();
        let (_, n_values, n_levels) =
            reader.read_records(ROWS, Some(&mut defined), Some(&mut repeated), &mut values)?;
        if n_levels.max(n_values) == 0 {
            return Ok(taken);
        }
        let mut texts = values.iter().map(ByteArray::len);
        for level in 0..n_levels.max(n_values) {
            if repeated.get(level).is_none_or(|&level| level == 0) {
                (of_row, row) = (0, row + 1);
            }
            if defined.get(level).is_none_or(|&level| level == max_level) {
                of_row += texts.next().unwrap_or(0);
            }
            if of_row > max_row {
                return refuse(format!(
                    "the column {name} unpacks to more than {max_row} bytes in row {row} of its group"
                ));
            }
        }
        taken += values.iter().map(|text| text.len() as u64).sum::<u64>();
        if taken > left {
            return refuse("its texts unpack to more bytes than are read of one file: cut it".to_owned());
        }
    }
}

fn refuse<T>(why: String) -> Result<T> {
    Err(ParquetError::General(why))
}
