//! Parquet, as pandas, `datasets` and the hub store rows, through the crate of Apache Arrow without Arrow itself. A struct has all
//! keys that any row has: what a row does not have is null there, and left out here.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Map, Value, json};

use super::{BadLine, MAX_ROW_BYTES, Place, Record, pages, unpacked, whole};

pub const MAGIC: &[u8] = b"PAR1";
/// Of all rows of a file: thirty times the largest upload.
const MAX_TEXT_BYTES: u64 = 16 << 30;

pub fn rows(file: File) -> Result<impl Iterator<Item = Result<Record, BadLine>>, BadLine> {
    let opened = guarded(|| {
        let pages = file.try_clone()?;
        let reader: Box<dyn FileReader> = Box::new(SerializedFileReader::new(file)?);
        pages::check(
            &pages,
            reader.metadata(),
            pages::MAX_PAGE_BYTES,
            pages::MAX_PAGES_BYTES,
        )
        .map_err(ParquetError::General)?;
        unpacked::check(&*reader, MAX_ROW_BYTES, MAX_TEXT_BYTES)?;
        Ok(RowIter::from_file_into(reader))
    });
    let mut rows = opened.map_err(|why| whole(damaged(&why)))?;
    let mut number = 0;
    Ok(std::iter::from_fn(move || {
        let place = Place::row(number + 1);
        let row = match guarded(|| rows.next().transpose()) {
            Ok(row) => row?,
            Err(why) => return Some(Err(place.bad(format!("{place}: {}", damaged(&why))))),
        };
        number += 1;
        let row = object(row).map_err(|why| place.bad(format!("{place}: {why}.")));
        Some(row.map(|row| (place, row)))
    }))
}

/// What the crate says of a damaged file, or that it panics over one.
fn guarded<T>(read: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(read) => read.map_err(|error| error.to_string()),
        Err(_) => Err("it is damaged".to_owned()),
    }
}

fn damaged(why: &str) -> String {
    format!("The Parquet file cannot be read: {why}.")
}

fn object(row: Row) -> Result<Map<String, Value>, String> {
    let mut object = Map::new();
    for (name, field) in row.into_columns() {
        match value(field) {
            Ok(Value::Null) => {}
            Ok(value) => drop(object.insert(name, value)),
            Err(why) => return Err(format!("the column {name} holds {why}")),
        }
    }
    Ok(object)
}

fn value(field: Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => value.into(),
        Field::Byte(value) => value.into(),
        Field::Short(value) => value.into(),
        Field::Int(value) => value.into(),
        Field::Long(value) => value.into(),
        Field::UByte(value) => value.into(),
        Field::UShort(value) => value.into(),
        Field::UInt(value) => value.into(),
        Field::ULong(value) => value.into(),
        Field::Float16(value) => json!(value.to_f32()),
        Field::Float(value) => json!(value),
        Field::Double(value) => json!(value),
        Field::Str(text) => text.into(),
        Field::Group(row) => object(row)?.into(),
        Field::ListInternal(list) => {
            let values = list.elements().iter().cloned().map(value);
            values.collect::<Result<Vec<Value>, String>>()?.into()
        }
        // Dates and numbers of other kinds stand beside what is learned.
        other @ (Field::Decimal(_)
        | Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_)) => other.to_string().into(),
        Field::Bytes(_) => return Err("bytes, only text is trained: leave it out of the file".to_owned()),
        Field::MapInternal(_) => return Err("a map: store it as a struct, or leave it out".to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;

    use super::*;

    fn fixture(name: &str) -> Vec<u8> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/fixture/parquet");
        std::fs::read(folder.join(name)).unwrap()
    }

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn checked(bytes: &[u8], max_page: u64, max_pages: u64) -> Result<(), String> {
        let file = file_of(bytes);
        let reader = SerializedFileReader::new(file.try_clone().unwrap()).unwrap();
        pages::check(&file, reader.metadata(), max_page, max_pages)
    }

    #[test]
    fn pages_are_looked_at_before_they_are_unpacked() {
        for name in [
            "pandas", "zstd", "gzip", "required", "calls", "numbers", "datasets",
        ] {
            let bytes = fixture(&format!("{name}.parquet"));
            checked(&bytes, 64 << 10, 1 << 20).unwrap_or_else(|why| panic!("{name}: {why}"));
            let why = checked(&bytes, 1, 1 << 20).unwrap_err();
            assert!(
                why.contains("unpacks to") && why.contains("1 are allowed"),
                "{name}: {why}"
            );
        }
        let why = checked(&fixture("pandas.parquet"), 64 << 10, 10).unwrap_err();
        assert!(why.contains("at the same time, 10 are allowed"), "{why}");
    }

    /// A list that repeats a long entry of its dictionary: 30 MB of some hundred bytes.
    #[test]
    fn rows_are_weighed_before_they_are_made() {
        let error = rows(file_of(&fixture("repeated.parquet")))
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.contains("unpacks to more than 16777216 bytes in row 1"),
            "{error}"
        );
        for name in ["pandas", "zstd", "calls", "datasets", "required"] {
            let reader = SerializedFileReader::new(file_of(&fixture(&format!("{name}.parquet")))).unwrap();
            assert!(unpacked::check(&reader, 1 << 10, 1 << 20).is_ok(), "{name}");
            assert!(unpacked::check(&reader, 3, 1 << 20).is_err(), "{name}");
            assert!(unpacked::check(&reader, 1 << 10, 20).is_err(), "{name}");
        }
    }

    /// A header begins with its kind and its unpacked size: fields 1 and 2, numbers of one or two bytes each.
    #[test]
    fn a_gzip_page_that_unpacks_to_more_than_it_claims_is_refused() {
        let mut bytes = fixture("gzip.parquet");
        let reader = SerializedFileReader::new(file_of(&bytes)).unwrap();
        let (start, _) = reader.metadata().row_group(0).column(0).byte_range();
        let size = &mut bytes[start as usize..][..6];
        assert_eq!([size[0], size[2]], [0x15, 0x15], "{size:?}");
        // A number of two bytes has its high bits in the second.
        let low = if size[3] < 128 { 3 } else { 4 };
        assert!(size[low] > 1, "{size:?}");
        size[low] -= 2 * u8::from(low == 3) + u8::from(low == 4);
        let why = checked(&bytes, 1 << 20, 1 << 30).unwrap_err();
        assert!(
            why.contains("more than the") && why.contains("that it claims"),
            "{why}"
        );
        let error = rows(file_of(&bytes)).err().unwrap();
        assert!(error.to_string().contains("that it claims"), "{error}");
    }
}
