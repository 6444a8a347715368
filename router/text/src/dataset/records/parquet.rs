//! Parquet, as pandas, `datasets` and the hub store rows, through the crate of Apache Arrow without Arrow itself. A struct has all
//! keys that any row has: what a row does not have is null there, and left out here.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Map, Value, json};

use super::{BadLine, Place, Record, whole};

pub const MAGIC: &[u8] = b"PAR1";

pub fn rows(file: File) -> Result<impl Iterator<Item = Result<Record, BadLine>>, BadLine> {
    let opened = guarded(|| {
        let reader: Box<dyn FileReader> = Box::new(SerializedFileReader::new(file)?);
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
