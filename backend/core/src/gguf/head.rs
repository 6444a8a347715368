//! Reads the head. Every count and length is held against the bytes that are left before memory is taken for it, so a
//! damaged or hostile file costs no more than its own size.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use super::{GgufError, Metadata, Value};

/// What a file begins with.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// docs/gguf.md: keys are at most 2^16 - 1 bytes long.
const MAX_KEY_BYTES: u64 = 65_535;
/// ggml.h, GGML_MAX_DIMS.
const MAX_DIMENSIONS: u32 = 4;
const ALIGNMENT: &str = "general.alignment";
pub(super) const DEFAULT_ALIGNMENT: i64 = 32;
/// The least that an entry of a table takes: an empty name, a type and a value of one byte; an empty name, a count of
/// dimensions, one dimension, a type and an offset.
const MIN_ENTRY_BYTES: u64 = 8 + 4 + 1;
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

#[derive(Clone, Debug)]
pub struct Gguf {
    pub metadata: Metadata,
    pub tensors: Vec<TensorInfo>,
    /// Where the tensors' bytes begin in the file.
    pub data_start: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    /// Outermost first, as in safetensors. (A GGUF has them the other way round.)
    pub shape: Vec<i64>,
    /// ggml's number of the type that its numbers are stored in.
    pub type_id: u32,
    /// From [`Gguf::data_start`].
    pub offset: u64,
}

/// Is this what a GGUF file is called?
pub fn is_name(file: &str) -> bool {
    file.get(file.len().saturating_sub(5)..)
        .is_some_and(|end| end.eq_ignore_ascii_case(".gguf"))
}

/// All parts of the model that `file` (a name such as `x-00001-of-00003.gguf`) is the first part of: itself, where it is
/// whole. An error says what it is instead of the first.
pub fn siblings(file: &str) -> Result<Vec<String>, String> {
    let whole = || Ok(vec![file.to_owned()]);
    let Some((stem, end)) = file.len().checked_sub(5).and_then(|at| file.split_at_checked(at)) else {
        return whole();
    };
    let numbers = |stem: &str| {
        let (stem, count) = stem.rsplit_once("-of-")?;
        let (stem, number) = stem.rsplit_once('-')?;
        let number_of = |digits: &str| match digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit()) {
            true => digits.parse::<u32>().ok(),
            false => None,
        };
        Some((stem.to_owned(), number_of(number)?, number_of(count)?))
    };
    match numbers(stem) {
        None => whole(),
        Some((stem, 1, count)) if count > 0 => Ok((1..=count)
            .map(|number| format!("{stem}-{number:05}-of-{count:05}{end}"))
            .collect()),
        Some((stem, number, count)) => Err(format!(
            "it is part {number} of {count}: name the first, {stem}-00001-of-{count:05}{end}"
        )),
    }
}

impl Gguf {
    /// From the beginning of a file of `file_bytes`; `file` is its name for errors. Reads no further than the head.
    pub fn read(source: impl Read, file_bytes: u64, file: &str) -> Result<Gguf, GgufError> {
        let mut head = Head {
            source,
            file,
            at: 0,
            end: file_bytes,
            inside: String::new(),
        };
        let magic: [u8; 4] = head.array("the magic number")?;
        if magic == *b"vers" {
            return Err(head.wrong(
                "it is a pointer of git-lfs, not the file itself: `git lfs pull` in its folder fetches that"
                    .to_owned(),
            ));
        }
        if magic != MAGIC {
            return Err(head.wrong(format!(
                "no GGUF file: it begins with the bytes {magic:02x?} and not with \"GGUF\""
            )));
        }
        match head.u32("the version")? {
            2 | 3 => {}
            version if version.swap_bytes() <= 3 => {
                return Err(head.wrong(
                    "its numbers are big-endian, little-endian ones are read here: gguf-convert-endian of the gguf package \
                     rewrites it"
                        .to_owned(),
                ));
            }
            version => {
                return Err(head.wrong(format!(
                    "it has version {version} of the format; 2 and 3 are read"
                )));
            }
        }
        let tensor_count = head.u64("the number of tensors")?;
        let entries = head.u64("the number of keys")?;
        head.fits(entries, MIN_ENTRY_BYTES, "keys")?;
        head.fits(tensor_count, MIN_TENSOR_BYTES, "tensors")?;
        let mut values = BTreeMap::new();
        for _ in 0..entries {
            let key = head.key()?;
            head.inside = format!("`{key}`: ");
            let value = head.value()?;
            head.inside.clear();
            if values.insert(key.clone(), value).is_some() {
                return Err(head.wrong(format!("the key `{key}` is there twice")));
            }
        }
        let metadata = Metadata {
            file: file.to_owned(),
            values,
        };
        let alignment = match metadata.whole(ALIGNMENT)?.unwrap_or(DEFAULT_ALIGNMENT) {
            n if n > 0 && (n as u64).is_power_of_two() => n as u64,
            _ => return Err(metadata.wrong(ALIGNMENT, "a power of two is needed")),
        };
        let mut names = BTreeSet::new();
        let mut tensors = Vec::with_capacity(tensor_count as usize);
        for _ in 0..tensor_count {
            let tensor = head.tensor(alignment)?;
            if !names.insert(tensor.name.clone()) {
                return Err(head.wrong(format!("the tensor `{}` is there twice", tensor.name)));
            }
            tensors.push(tensor);
        }
        let data_start = head.at.next_multiple_of(alignment);
        Ok(Gguf {
            metadata,
            tensors,
            data_start,
        })
    }
}

struct Head<'a, R> {
    source: R,
    file: &'a str,
    /// Bytes read.
    at: u64,
    /// Bytes of the file.
    end: u64,
    /// What an error is about: empty, or a key with a colon.
    inside: String,
}

impl<R: Read> Head<'_, R> {
    fn wrong(&self, message: String) -> GgufError {
        GgufError {
            file: self.file.to_owned(),
            message: format!("{}{message}", self.inside),
        }
    }

    fn left(&self) -> u64 {
        self.end.saturating_sub(self.at)
    }

    /// `count` things of at least `least` bytes each.
    fn fits(&self, count: u64, least: u64, what: &str) -> Result<(), GgufError> {
        match count.checked_mul(least) {
            Some(bytes) if bytes <= self.left() => Ok(()),
            _ => Err(self.wrong(format!(
                "{count} {what} at byte {} cannot fit into the {} bytes that are left of the file: it is cut off or damaged",
                self.at,
                self.left()
            ))),
        }
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8], what: &str) -> Result<(), GgufError> {
        if bytes.len() as u64 > self.left() {
            return Err(self.wrong(format!(
                "the file ends at byte {} inside {what}, which begins at byte {} and has {} bytes: it is cut off",
                self.end,
                self.at,
                bytes.len()
            )));
        }
        if let Err(error) = self.source.read_exact(bytes) {
            return Err(self.wrong(format!("cannot read {what} at byte {}: {error}", self.at)));
        }
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &str) -> Result<String, GgufError> {
        let length = self.u64(what)?;
        self.fits(length, 1, &format!("bytes of {what}"))?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes, what)?;
        String::from_utf8(bytes).map_err(|error| self.wrong(format!("{what} is not UTF-8: {error}")))
    }

    fn key(&mut self) -> Result<String, GgufError> {
        let begin = self.at;
        let key = self.text("a key")?;
        match key.len() as u64 {
            0 | MAX_KEY_BYTES.. => Err(self.wrong(format!(
                "the key at byte {begin} has {} bytes, from 1 to {MAX_KEY_BYTES} are allowed",
                key.len()
            ))),
            _ => Ok(key),
        }
    }

    fn value(&mut self) -> Result<Value, GgufError> {
        let kind = self.u32("a value's type")?;
        match kind {
            STRING => self.text("a text").map(Value::Text),
            ARRAY => self.list(),
            _ => match self.scalar(kind)? {
                Scalar::Whole(n) => Ok(Value::Whole(n)),
                Scalar::Float(x) => Ok(Value::Float(x)),
                Scalar::Flag(flag) => Ok(Value::Flag(flag)),
            },
        }
    }

    fn list(&mut self) -> Result<Value, GgufError> {
        let kind = self.u32("a list's type")?;
        let count = self.u64("a list's length")?;
        let least = match kind {
            STRING => 8,
            ARRAY => return Err(self.wrong("a list of lists is not read".to_owned())),
            _ => self.bytes_of(kind)?,
        };
        self.fits(count, least, "items of a list")?;
        let count = count as usize;
        Ok(match kind {
            STRING => {
                let mut texts = Vec::with_capacity(count);
                for i in 0..count {
                    texts.push(self.text(&format!("text {i}"))?);
                }
                Value::Texts(texts)
            }
            FLOAT32 | FLOAT64 => Value::Floats(self.scalars(kind, count, |scalar| match scalar {
                Scalar::Float(x) => Some(x as f32),
                _ => None,
            })?),
            BOOL => Value::Flags(self.scalars(kind, count, |scalar| match scalar {
                Scalar::Flag(flag) => Some(flag),
                _ => None,
            })?),
            _ => Value::Wholes(self.scalars(kind, count, |scalar| match scalar {
                Scalar::Whole(n) => i64::try_from(n).ok(),
                _ => None,
            })?),
        })
    }

    fn scalars<T>(
        &mut self,
        kind: u32,
        count: usize,
        take: impl Fn(Scalar) -> Option<T>,
    ) -> Result<Vec<T>, GgufError> {
        let mut list = Vec::with_capacity(count);
        for i in 0..count {
            let scalar = self.scalar(kind)?;
            match take(scalar) {
                Some(item) => list.push(item),
                None => return Err(self.wrong(format!("item {i} of the list is above 2^63 - 1"))),
            }
        }
        Ok(list)
    }

    fn bytes_of(&self, kind: u32) -> Result<u64, GgufError> {
        match kind {
            UINT8 | INT8 | BOOL => Ok(1),
            UINT16 | INT16 => Ok(2),
            UINT32 | INT32 | FLOAT32 => Ok(4),
            UINT64 | INT64 | FLOAT64 => Ok(8),
            _ => Err(self.wrong(format!(
                "the type at byte {} is {kind}; the format has the types 0 to 12",
                self.at
            ))),
        }
    }

    fn scalar(&mut self, kind: u32) -> Result<Scalar, GgufError> {
        let what = "a value";
        Ok(match kind {
            UINT8 => Scalar::Whole(u8::from_le_bytes(self.array(what)?).into()),
            INT8 => Scalar::Whole(i8::from_le_bytes(self.array(what)?).into()),
            UINT16 => Scalar::Whole(u16::from_le_bytes(self.array(what)?).into()),
            INT16 => Scalar::Whole(i16::from_le_bytes(self.array(what)?).into()),
            UINT32 => Scalar::Whole(u32::from_le_bytes(self.array(what)?).into()),
            INT32 => Scalar::Whole(i32::from_le_bytes(self.array(what)?).into()),
            UINT64 => Scalar::Whole(u64::from_le_bytes(self.array(what)?).into()),
            INT64 => Scalar::Whole(i64::from_le_bytes(self.array(what)?).into()),
            FLOAT32 => Scalar::Float(shortest(f32::from_le_bytes(self.array(what)?))),
            FLOAT64 => Scalar::Float(f64::from_le_bytes(self.array(what)?)),
            BOOL => match self.array::<1>(what)? {
                [0] => Scalar::Flag(false),
                [1] => Scalar::Flag(true),
                [other] => return Err(self.wrong(format!("{other} is neither false (0) nor true (1)"))),
            },
            _ => {
                self.bytes_of(kind)?;
                unreachable!("every scalar type has its size")
            }
        })
    }

    fn tensor(&mut self, alignment: u64) -> Result<TensorInfo, GgufError> {
        let name = self.text("a tensor's name")?;
        self.inside = format!("tensor `{name}`: ");
        let dimensions = self.u32("the number of dimensions")?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(self.wrong(format!(
                "it has {dimensions} dimensions, from 1 to {MAX_DIMENSIONS} are allowed"
            )));
        }
        let mut shape = Vec::with_capacity(dimensions as usize);
        for _ in 0..dimensions {
            let size = self.u64("a dimension")?;
            match i64::try_from(size) {
                Ok(size @ 1..) => shape.push(size),
                _ => return Err(self.wrong(format!("a dimension is {size}"))),
            }
        }
        let numbers = shape.iter().try_fold(1i64, |product, &n| product.checked_mul(n));
        if numbers.is_none_or(|numbers| numbers > 1 << 48) {
            return Err(self.wrong(format!(
                "the dimensions {shape:?} are more numbers than a file can hold"
            )));
        }
        shape.reverse();
        let type_id = self.u32("the tensor's type")?;
        let offset = self.u64("the tensor's offset")?;
        if offset % alignment != 0 {
            return Err(self.wrong(format!(
                "its offset {offset} is not a multiple of the alignment {alignment}"
            )));
        }
        self.inside.clear();
        Ok(TensorInfo {
            name,
            shape,
            type_id,
            offset,
        })
    }
}

enum Scalar {
    Whole(i128),
    Float(f64),
    Flag(bool),
}

/// The number that was meant: 1e-5 and not 9.99999974e-6, which is what float32 makes of it.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().expect("a number's text is a number")
}

// docs/gguf.md, gguf_metadata_value_type.
const UINT8: u32 = 0;
const INT8: u32 = 1;
const UINT16: u32 = 2;
const INT16: u32 = 3;
pub(super) const UINT32: u32 = 4;
pub(super) const INT32: u32 = 5;
pub(super) const FLOAT32: u32 = 6;
pub(super) const BOOL: u32 = 7;
pub(super) const STRING: u32 = 8;
pub(super) const ARRAY: u32 = 9;
pub(super) const UINT64: u32 = 10;
pub(super) const INT64: u32 = 11;
const FLOAT64: u32 = 12;
