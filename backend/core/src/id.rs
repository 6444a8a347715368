//! Identities. A name is an alias (router); what answers is identified by content (digest).

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::Digest as _;

/// One sequence inside the engine. `n` choices of a call are `n` requests. Unique for the life of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId(pub u64);

/// A fine-tuning job, `ftjob-...`. It names folders and keys, so there is none that is a path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct JobId(String);

impl JobId {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no job's id: those are letters, digits, `-` and `_`, 128 at most")]
pub struct NotAJobId(String);

impl TryFrom<String> for JobId {
    type Error = NotAJobId;

    fn try_from(text: String) -> Result<JobId, NotAJobId> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        match (1..=128).contains(&text.len()) && text.chars().all(is_plain) {
            true => Ok(JobId(text)),
            // As much of it as a message should repeat.
            false => Err(NotAJobId(text.chars().take(128).collect())),
        }
    }
}

impl FromStr for JobId {
    type Err = NotAJobId;

    fn from_str(text: &str) -> Result<JobId, NotAJobId> {
        JobId::try_from(text.to_owned())
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// SHA-256 of content: of an adapter (config and tensors), of a base model, of an artifact.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

pub type AdapterDigest = Digest;

impl Digest {
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(sha2::Sha256::digest(bytes).into())
    }

    /// The first 12 hexadecimal digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

/// Makes a [`Digest`] of bytes that come in pieces.
#[derive(Clone, Default)]
pub struct Hasher(sha2::Sha256);

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a digest: 64 hexadecimal digits are")]
pub struct NotADigest(pub String);

impl FromStr for Digest {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Digest, NotADigest> {
        let refused = || NotADigest(text.to_owned());
        if text.len() != 64 || !text.is_ascii() {
            return Err(refused());
        }
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| refused())?;
        }
        Ok(Digest(bytes))
    }
}

impl Serialize for Digest {
    /// 64 digits for people, 32 bytes for machines.
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match s.is_human_readable() {
            true => s.collect_str(self),
            false => self.0.serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Digest, D::Error> {
        match d.is_human_readable() {
            true => String::deserialize(d)?.parse().map_err(serde::de::Error::custom),
            false => Ok(Digest(<[u8; 32]>::deserialize(d)?)),
        }
    }
}

/// An adapter version and the local PEFT folder to read it from when it is not resident.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AdapterRef {
    pub digest: AdapterDigest,
    pub folder: PathBuf,
}

/// The digest of an adapter: SHA-256 over the two files that make it what it is, each after its length (u64,
/// little-endian), so that no bytes can move from one to the other unnoticed. Whoever trains one and whoever stores one
/// must agree, hence here.
///
/// Feed all bytes of adapter_config.json, then all bytes of adapter_model.safetensors, in pieces of any size.
pub struct AdapterHasher {
    sha: sha2::Sha256,
    config_left: u64,
    tensors_left: u64,
    tensors_len: u64,
}

impl AdapterHasher {
    pub fn new(config_len: u64, tensors_len: u64) -> AdapterHasher {
        let mut sha = sha2::Sha256::new();
        sha.update(config_len.to_le_bytes());
        AdapterHasher {
            sha,
            config_left: config_len,
            tensors_left: tensors_len,
            tensors_len,
        }
    }

    /// # Panics
    /// If more bytes come than were announced.
    pub fn update(&mut self, bytes: &[u8]) {
        let of_config = usize::try_from(self.config_left)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let (config, tensors) = bytes.split_at(of_config);
        self.sha.update(config);
        self.config_left -= config.len() as u64;
        if !tensors.is_empty() && self.tensors_left == self.tensors_len {
            self.sha.update(self.tensors_len.to_le_bytes());
        }
        self.sha.update(tensors);
        self.tensors_left = self
            .tensors_left
            .checked_sub(tensors.len() as u64)
            .expect("no more bytes than announced");
    }

    /// # Panics
    /// If fewer bytes came than were announced.
    pub fn finish(mut self) -> AdapterDigest {
        let missing = self.config_left + self.tensors_left;
        assert_eq!(missing, 0, "{missing} announced bytes never came");
        if self.tensors_len == 0 {
            self.sha.update(0u64.to_le_bytes());
        }
        Digest(self.sha.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(pieces: &[&[u8]], config_len: u64, tensors_len: u64) -> Digest {
        let mut hasher = AdapterHasher::new(config_len, tensors_len);
        pieces.iter().for_each(|piece| hasher.update(piece));
        hasher.finish()
    }

    #[test]
    fn a_job_that_arrives_names_no_path() {
        let read = |id: &str| serde_json::from_value::<JobId>(id.into());
        for good in ["ftjob-a1_B", "train"] {
            assert_eq!(read(good).unwrap().as_str(), good);
        }
        for bad in ["", "..", "a/b", "a.b", "a\0", "é", &"x".repeat(129)] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_adapter_is_its_two_files_whatever_the_pieces() {
        let layout = [&2u64.to_le_bytes()[..], b"{}", &4u64.to_le_bytes()[..], b"abcd"].concat();
        let expected = Digest(sha2::Sha256::digest(layout).into());
        for pieces in [
            &[&b"{}abcd"[..]][..],
            &[b"{", b"}", b"ab", b"cd"],
            &[b"{}", b"", b"abcd"],
            &[b"{}a", b"bcd"],
        ] {
            assert_eq!(hash(pieces, 2, 4), expected, "{pieces:?}");
        }
        assert_ne!(hash(&[b"{}abcd"], 3, 3), expected);
        assert_eq!(expected.to_string().parse::<Digest>().unwrap(), expected);
        assert_eq!(
            hash(&[b"{}"], 2, 0),
            Digest(sha2::Sha256::digest([&2u64.to_le_bytes()[..], b"{}", &[0; 8]].concat()).into())
        );
    }
}
