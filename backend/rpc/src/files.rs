//! The small files of a model folder that a router needs: what its text and its tokens are. They travel with the
//! replica's description. Not here: what they mean (crate text).

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use sha2::Digest as _;
use tandem_core::id::Digest;

/// What the base digest covers (config.json) or the replica's info tells (end-of-sequence tokens).
const MODEL: [&str; 2] = ["config.json", "generation_config.json"];
/// What decides how text becomes tokens. Where these differ, the same prompt is another one.
const TEXT: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
];

/// Names and contents, those that exist.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelFiles(Vec<(String, Vec<u8>)>);

impl ModelFiles {
    /// Of a model without a folder.
    pub fn made(files: Vec<(String, Vec<u8>)>) -> ModelFiles {
        ModelFiles(files)
    }

    pub fn read(folder: &Path) -> io::Result<ModelFiles> {
        let mut files = Vec::new();
        for name in MODEL.iter().chain(&TEXT) {
            match fs::read(folder.join(name)) {
                Ok(content) => files.push(((*name).to_owned(), content)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(ModelFiles(files))
    }

    /// Only names that a replica may send: they become paths.
    pub(crate) fn received(files: impl Iterator<Item = (String, Vec<u8>)>) -> ModelFiles {
        let known = |name: &str| MODEL.contains(&name) || TEXT.contains(&name);
        ModelFiles(files.filter(|(name, _)| known(name)).collect())
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0
            .iter()
            .map(|(name, content)| (name.as_str(), content.as_slice()))
    }

    pub fn content(&self, name: &str) -> Option<&[u8]> {
        let (_, content) = self.iter().find(|(known, _)| *known == name)?;
        Some(content)
    }

    /// Of tokenizer and chat template.
    pub fn text_digest(&self) -> Digest {
        digest(self.iter().filter(|(name, _)| TEXT.contains(name)))
    }

    /// Write them to `<parent>/model-<digest>`, complete or not at all; the same files twice are one folder.
    pub fn materialise(&self, parent: &Path) -> io::Result<PathBuf> {
        let short = digest(self.iter()).short();
        let folder = parent.join(format!("model-{short}"));
        if folder.is_dir() {
            return Ok(folder);
        }
        let fresh = parent.join(format!(".model-{short}-{}", std::process::id()));
        fs::create_dir_all(&fresh)?;
        for (name, content) in self.iter() {
            let path = fresh.join(name);
            fs::create_dir_all(path.parent().expect("a file lies in a folder"))?;
            let mut file = fs::File::create(path)?;
            file.write_all(content)?;
            file.sync_all()?;
        }
        match fs::rename(&fresh, &folder) {
            Ok(()) => fs::File::open(parent)?.sync_all()?,
            // Another process was faster; the content is the same.
            Err(_) if folder.is_dir() => fs::remove_dir_all(&fresh)?,
            Err(error) => return Err(error),
        }
        Ok(folder)
    }
}

fn digest<'a>(files: impl Iterator<Item = (&'a str, &'a [u8])>) -> Digest {
    let mut sha = sha2::Sha256::new();
    for (name, content) in files {
        for part in [name.as_bytes(), content] {
            sha.update((part.len() as u64).to_le_bytes());
            sha.update(part);
        }
    }
    Digest(sha.finalize().into())
}
