//! Tokenised training examples as bytes: what the router hands to the engine. Not here: JSON, text, templates.
//!
//! Layout, little-endian: magic `TNDMDS02`, SHA-256 of what follows, u64 count, then per example u32 length, length x u32
//! token ids, length x f32 weights.

use sha2::{Digest, Sha256};

use crate::TokenId;

const MAGIC: &[u8; 8] = b"TNDMDS02";
const DIGEST_BYTES: usize = 32;

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

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("damaged dataset: {0}")]
pub struct Damaged(pub String);

pub fn encode(examples: &[Example]) -> Vec<u8> {
    let tokens: usize = examples.iter().map(|example| example.tokens.len()).sum();
    let mut bytes = Vec::with_capacity(16 + DIGEST_BYTES + 4 * examples.len() + 8 * tokens);
    bytes.extend(MAGIC);
    bytes.extend([0; DIGEST_BYTES]);
    bytes.extend((examples.len() as u64).to_le_bytes());
    for Example { tokens, weights } in examples {
        assert_eq!(tokens.len(), weights.len(), "one weight per token");
        bytes.extend((tokens.len() as u32).to_le_bytes());
        bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        bytes.extend(weights.iter().flat_map(|weight| weight.to_le_bytes()));
    }
    let (head, content) = bytes.split_at_mut(MAGIC.len() + DIGEST_BYTES);
    head[MAGIC.len()..].copy_from_slice(&Sha256::digest(content));
    bytes
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

pub fn decode(bytes: &[u8]) -> Result<Vec<Example>, Damaged> {
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
    match rest.len() {
        0 => Ok(examples),
        n => Err(Damaged(format!("{n} bytes after the last example"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_and_damage_is_noticed() {
        let examples = vec![
            Example {
                tokens: vec![1, 2, 3],
                weights: vec![0.0, 0.5, 1.0],
            },
            Example {
                tokens: vec![],
                weights: vec![],
            },
        ];
        let bytes = encode(&examples);
        assert_eq!(decode(&bytes).unwrap(), examples);
        assert_eq!(examples[0].label_tokens(), 2);
        for at in 0..bytes.len() {
            assert!(decode(&bytes[..at]).is_err(), "cut at {at}");
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert!(decode(&flipped).is_err(), "another bit at {at}");
        }
        assert!(decode(&[bytes, vec![0]].concat()).is_err());
    }
}
