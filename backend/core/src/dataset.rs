//! Tokenised training examples as bytes: what the router hands to the engine. Not here: JSON, text, templates.
//!
//! Layout, little-endian: magic `TNDMDS02`, SHA-256 of what follows, u64 count, then per example u32 length, length x u32
//! token ids, length x f32 weights. Where an example does not stand alone or has a value, what follows says of each group,
//! until the end: u32 examples, f32 value.

use std::io::{self, BufWriter, Cursor, Read, Seek, SeekFrom, Write};

use sha2::{Digest, Sha256};

use crate::TokenId;

const MAGIC: &[u8; 8] = b"TNDMDS02";
const DIGEST_BYTES: usize = 32;
const COUNT_BYTES: usize = 8;
/// At once, of what was written.
const READ_BYTES: usize = 1 << 16;

/// One example. `weights[i]` is the loss weight of *predicting* `tokens[i]` from the tokens before it (the first is
/// never predicted, its weight is ignored).
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    pub tokens: Vec<TokenId>,
    pub weights: Vec<f32>,
}

impl Example {
    /// Predicted tokens with a weight.
    pub fn label_tokens(&self) -> usize {
        self.weights
            .iter()
            .skip(1)
            .filter(|&&weight| weight != 0.0)
            .count()
    }
}

/// Examples that stay together: what one row of a training file says. What there are of them, and what the value means, is
/// the job's objective's ([`crate::job::Rows`]): a pair is the preferred answer and the other; a judged example has 1 where
/// it is desirable and 0 where not; a rewarded one its reward.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    pub examples: Vec<Example>,
    pub value: f32,
}

impl Group {
    pub fn tokens(&self) -> usize {
        self.examples.iter().map(|example| example.tokens.len()).sum()
    }

    pub fn label_tokens(&self) -> usize {
        self.examples.iter().map(Example::label_tokens).sum()
    }
}

impl From<Example> for Group {
    /// Alone.
    fn from(example: Example) -> Group {
        Group {
            examples: vec![example],
            value: 0.0,
        }
    }
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("damaged dataset: {0}")]
pub struct Damaged(pub String);

/// Writes groups as they come: none is kept. What is there before [`Encoder::finish`] is no data set.
pub struct Encoder<W: Write> {
    to: BufWriter<W>,
    examples: u64,
    groups: u64,
    bytes: u64,
    /// Of each group, once there was one that is not an example alone.
    kinds: Option<Vec<Kind>>,
}

/// How many examples a group has, and its value.
type Kind = (u32, f32);
const ALONE: Kind = (1, 0.0);

impl<W: Read + Write + Seek> Encoder<W> {
    /// `to` is empty.
    pub fn new(to: W) -> io::Result<Encoder<W>> {
        let mut to = BufWriter::new(to);
        to.write_all(MAGIC)?;
        to.write_all(&[0; DIGEST_BYTES + COUNT_BYTES])?;
        Ok(Encoder {
            to,
            examples: 0,
            groups: 0,
            bytes: (MAGIC.len() + DIGEST_BYTES + COUNT_BYTES) as u64,
            kinds: None,
        })
    }

    pub fn push(&mut self, group: &Group) -> io::Result<()> {
        let Group { examples, value } = group;
        for Example { tokens, weights } in examples {
            assert_eq!(tokens.len(), weights.len(), "one weight per token");
            self.to.write_all(&(tokens.len() as u32).to_le_bytes())?;
            for token in tokens {
                self.to.write_all(&token.to_le_bytes())?;
            }
            for weight in weights {
                self.to.write_all(&weight.to_le_bytes())?;
            }
            self.bytes += 4 + 8 * tokens.len() as u64;
        }
        let kind = (examples.len() as u32, *value);
        if kind != ALONE && self.kinds.is_none() {
            self.kinds = Some(vec![ALONE; self.groups as usize]);
        }
        if let Some(kinds) = &mut self.kinds {
            kinds.push(kind);
        }
        self.examples += examples.len() as u64;
        self.groups += 1;
        Ok(())
    }

    /// Written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn finish(self) -> io::Result<W> {
        let Encoder {
            mut to,
            examples,
            kinds,
            ..
        } = self;
        for (size, value) in kinds.unwrap_or_default() {
            to.write_all(&size.to_le_bytes())?;
            to.write_all(&value.to_le_bytes())?;
        }
        let mut to = to.into_inner().map_err(|error| error.into_error())?;
        let digest_at = MAGIC.len() as u64;
        let content_at = digest_at + DIGEST_BYTES as u64;
        to.seek(SeekFrom::Start(content_at))?;
        to.write_all(&examples.to_le_bytes())?;
        to.seek(SeekFrom::Start(content_at))?;
        let mut digest = Sha256::new();
        let mut buffer = vec![0; READ_BYTES];
        loop {
            match to.read(&mut buffer)? {
                0 => break,
                n => digest.update(&buffer[..n]),
            }
        }
        to.seek(SeekFrom::Start(digest_at))?;
        to.write_all(&digest.finalize())?;
        Ok(to)
    }
}

pub fn encode(groups: &[Group]) -> Vec<u8> {
    let encode = || {
        let mut encoder = Encoder::new(Cursor::new(vec![]))?;
        groups.iter().try_for_each(|group| encoder.push(group))?;
        encoder.finish()
    };
    encode().expect("memory takes what is written").into_inner()
}

/// What the digest is of, when it is right.
pub fn check(bytes: &[u8]) -> Result<&[u8], Damaged> {
    let sealed = bytes
        .strip_prefix(MAGIC)
        .ok_or_else(|| Damaged("the first 8 bytes are not TNDMDS02".to_owned()))?;
    let (digest, content) = sealed
        .split_at_checked(DIGEST_BYTES)
        .ok_or_else(|| Damaged(format!("it ends after {} bytes", bytes.len())))?;
    match Sha256::digest(content)[..] == *digest {
        true => Ok(content),
        false => Err(Damaged(format!(
            "its {} bytes are not those that were written",
            bytes.len()
        ))),
    }
}

pub fn decode(bytes: &[u8]) -> Result<Vec<Group>, Damaged> {
    let mut rest = check(bytes)?;
    let mut take = |n: usize| {
        let (head, tail) = rest.split_at_checked(n).ok_or_else(|| {
            Damaged(format!(
                "{n} more bytes expected at byte {}, {} are left",
                bytes.len() - rest.len(),
                rest.len()
            ))
        })?;
        rest = tail;
        Ok(head)
    };
    let count = u64::from_le_bytes(take(8)?.try_into().expect("8 bytes were taken"));
    let mut examples = Vec::new();
    for _ in 0..count {
        let length = u32::from_le_bytes(take(4)?.try_into().expect("4 bytes were taken")) as usize;
        let words = |bytes: &[u8]| -> Vec<[u8; 4]> {
            bytes
                .chunks_exact(4)
                .map(|word| word.try_into().expect("chunks of 4"))
                .collect()
        };
        let tokens = words(take(4 * length)?)
            .into_iter()
            .map(u32::from_le_bytes)
            .collect();
        let weights = words(take(4 * length)?)
            .into_iter()
            .map(f32::from_le_bytes)
            .collect();
        examples.push(Example { tokens, weights });
    }
    let (sizes, surplus) = rest.as_chunks::<8>();
    if !surplus.is_empty() {
        return Err(Damaged(format!("{} bytes after the last example", rest.len())));
    }
    if sizes.is_empty() {
        return Ok(examples.into_iter().map(Group::from).collect());
    }
    let mut examples = examples.into_iter();
    let mut groups = Vec::with_capacity(sizes.len());
    for &[a, b, c, d, e, f, g, h] in sizes {
        let size = u32::from_le_bytes([a, b, c, d]) as usize;
        let group = Group {
            examples: examples.by_ref().take(size).collect(),
            value: f32::from_le_bytes([e, f, g, h]),
        };
        if group.examples.len() < size {
            return Err(Damaged("its groups have more examples than there are".to_owned()));
        }
        groups.push(group);
    }
    match examples.len() {
        0 => Ok(groups),
        n => Err(Damaged(format!("{n} examples are in no group"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back() {
        let example = Example {
            tokens: vec![1, 2, 3],
            weights: vec![0.0, 0.5, 1.0],
        };
        let empty = Example {
            tokens: vec![],
            weights: vec![],
        };
        let alone = vec![Group::from(example.clone()), Group::from(empty.clone())];
        assert_eq!(alone[0].label_tokens(), 2);
        let judged = Group {
            value: 1.0,
            ..Group::from(example.clone())
        };
        let pair = Group {
            examples: vec![example, empty],
            value: 0.0,
        };
        for groups in [alone, vec![judged, pair]] {
            assert_eq!(decode(&encode(&groups)).unwrap(), groups);
        }
        let bytes = encode(&[]);
        assert_eq!(decode(&bytes).unwrap(), []);
    }

    #[test]
    fn damage_is_noticed() {
        let example = Example {
            tokens: vec![1, 2, 3],
            weights: vec![0.0, 0.5, 1.0],
        };
        let pair = Group {
            examples: vec![example.clone(), example],
            value: 0.5,
        };
        let bytes = encode(&[pair]);
        for at in 0..bytes.len() {
            assert!(decode(&bytes[..at]).is_err(), "cut at {at}");
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert!(decode(&flipped).is_err(), "another bit at {at}");
        }
        assert!(decode(&[bytes, vec![0]].concat()).is_err());
    }
}
