//! The pages of a Parquet file, looked at before one of them is unpacked: a few bytes of a file can unpack to gigabytes, and
//! the crate that reads it takes a page whole. Only headers are read here (Thrift's compact protocol), and what gzip unpacks
//! to, whose reader goes on behind the size that the header claims.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use flate2::read::MultiGzDecoder;
use parquet::basic::CompressionCodec;
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};

/// Unpacked bytes of one page. Writers stay below 1 MB, or 100 MB at most.
pub const MAX_PAGE_BYTES: u64 = 128 << 20;
/// Of the largest pages of all columns, which are there at the same time.
pub const MAX_PAGES_BYTES: u64 = 512 << 20;

pub fn check(file: &File, metadata: &ParquetMetaData, max_page: u64, max_pages: u64) -> Result<(), String> {
    let length = file.metadata().map_err(|error| error.to_string())?.len();
    for group in metadata.row_groups() {
        let mut pages = 0;
        for column in group.columns() {
            let name = column.column_path().string();
            let largest = largest_page(file, length, column, max_page);
            pages += largest.map_err(|why| format!("the column {name}: {why}"))?;
        }
        if pages > max_pages {
            return Err(format!(
                "the pages of its columns unpack to {pages} bytes at the same time, {max_pages} are allowed: write it with \
                 smaller pages"
            ));
        }
    }
    Ok(())
}

fn largest_page(
    file: &File,
    length: u64,
    column: &ColumnChunkMetaData,
    max_page: u64,
) -> Result<u64, String> {
    let (mut at, bytes) = guarded_range(column)?;
    let end = at.saturating_add(bytes);
    if end > length {
        return Err(format!("it ends at byte {end} of a file of {length}"));
    }
    let mut largest = 0;
    while at < end {
        let mut file = file;
        file.seek(SeekFrom::Start(at))
            .map_err(|error| error.to_string())?;
        let mut bytes = Bytes {
            read: BufReader::new(file.take(end - at)),
            taken: 0,
        };
        let mut header = Header::default();
        bytes
            .structure(0, 0, &mut |parent, id, value| header.set(parent, id, value))
            .map_err(|error| format!("the page at byte {at} cannot be read: {error}"))?;
        let (Ok(unpacked), Ok(packed)) = (u64::try_from(header.unpacked), u64::try_from(header.packed))
        else {
            return Err(format!("the page at byte {at} has a negative size"));
        };
        if unpacked > max_page {
            return Err(format!(
                "a page says that it unpacks to {unpacked} bytes, {max_page} are allowed: write it with smaller pages"
            ));
        }
        if column.compression_codec() == CompressionCodec::GZIP && header.is_packed {
            let levels = u64::try_from(header.levels).unwrap_or(0);
            let data = (&mut bytes.read).take(packed);
            if unpacks_beyond(data, levels, unpacked) {
                return Err(format!(
                    "a page unpacks to more than the {unpacked} bytes that it claims"
                ));
            }
        }
        largest = largest.max(unpacked);
        at = at.saturating_add(bytes.taken).saturating_add(packed);
    }
    Ok(largest)
}

/// Damage is not told here: who reads the page tells it.
fn unpacks_beyond(mut data: impl Read, levels: u64, unpacked: u64) -> bool {
    let levels = io::copy(&mut data.by_ref().take(levels), &mut io::sink()).unwrap_or(0);
    let rest = unpacked.saturating_sub(levels);
    let mut unpacks = MultiGzDecoder::new(data).take(rest + 1);
    let mut buffer = [0; 8 << 10];
    let mut n = 0;
    while let Ok(more @ 1..) = unpacks.read(&mut buffer) {
        n += more as u64;
    }
    n > rest
}

/// The crate asserts that these are not negative.
fn guarded_range(column: &ColumnChunkMetaData) -> Result<(u64, u64), String> {
    let start = column
        .dictionary_page_offset()
        .unwrap_or(column.data_page_offset());
    match (u64::try_from(start), u64::try_from(column.compressed_size())) {
        (Ok(start), Ok(bytes)) => Ok((start, bytes)),
        _ => Err("its place is negative".to_owned()),
    }
}

/// Of a `PageHeader`, what says how large the page is.
struct Header {
    unpacked: i64,
    packed: i64,
    /// Bytes before the data that are never packed.
    levels: i64,
    is_packed: bool,
}

impl Default for Header {
    fn default() -> Header {
        Header {
            unpacked: 0,
            packed: 0,
            levels: 0,
            is_packed: true,
        }
    }
}

impl Header {
    fn set(&mut self, parent: i64, id: i64, value: i64) {
        match (parent, id) {
            (0, 2) => self.unpacked = value,
            (0, 3) => self.packed = value,
            // `DataPageHeaderV2`.
            (8, 5 | 6) => self.levels = self.levels.saturating_add(value),
            (8, 7) => self.is_packed = value != 0,
            _ => {}
        }
    }
}

struct Bytes<R> {
    read: R,
    taken: u64,
}

const MAX_DEPTH: usize = 8;

impl<R: Read> Bytes<R> {
    /// Tells the numbers of a structure, and of those in it, with the field they stand in.
    fn structure(
        &mut self,
        parent: i64,
        depth: usize,
        seen: &mut dyn FnMut(i64, i64, i64),
    ) -> io::Result<()> {
        let mut id = 0_i64;
        loop {
            let byte = self.byte()?;
            let (delta, kind) = (byte >> 4, byte & 15);
            if kind == 0 {
                return Ok(());
            }
            id = match delta {
                0 => self.number()?,
                delta => id.wrapping_add(i64::from(delta)),
            };
            match kind {
                1 => seen(parent, id, 1),
                2 => seen(parent, id, 0),
                4..=6 => seen(parent, id, self.number()?),
                12 if depth < MAX_DEPTH => self.structure(id, depth + 1, seen)?,
                kind => self.skip(kind, depth)?,
            }
        }
    }

    fn skip(&mut self, kind: u8, depth: usize) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(io::ErrorKind::InvalidData.into());
        }
        match kind {
            // As an element of a list; as a field a boolean has no byte.
            1..=3 => self.over(1),
            4..=6 => self.number().map(drop),
            7 => self.over(8),
            8 => {
                let length = self.varint()?;
                self.over(length)
            }
            9 | 10 => {
                let byte = self.byte()?;
                let n = match byte >> 4 {
                    15 => self.varint()?,
                    n => u64::from(n),
                };
                (0..n).try_for_each(|_| self.skip(byte & 15, depth + 1))
            }
            12 => self.structure(0, depth + 1, &mut |_, _, _| {}),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn byte(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.read.read_exact(&mut byte)?;
        self.taken += 1;
        Ok(byte[0])
    }

    fn over(&mut self, length: u64) -> io::Result<()> {
        let skipped = io::copy(&mut (&mut self.read).take(length), &mut io::sink())?;
        self.taken += skipped;
        if skipped == length {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    fn varint(&mut self) -> io::Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Ok(value);
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }

    /// Zigzag.
    fn number(&mut self) -> io::Result<i64> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }
}
