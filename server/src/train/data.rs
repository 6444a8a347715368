//! Files of rows as `tandem train` reads them, and what it says of them. Not here: how rows are read (text).

use std::fs::File;
use std::io::{self, Cursor, Write};
use std::path::{Path, PathBuf};

use tandem_core::dataset::{Encoder, Group};
use tandem_router::hyper::Facts;
use tandem_text::Tokenizer;
use tandem_text::dataset::{MERGED, Options, Reading, Rows, Shown, Source, Statistics, tokenise};

use super::TrainError;
use super::progress::thousands;
use super::settings::Files;
use crate::hub::{self, RepoName};

/// What says which rows of a hub's data set are meant.
pub struct OfHub {
    pub revision: Option<String>,
    pub config: Option<String>,
}

/// The data set's name, where it can be no file.
fn name_on_hub(path: &Path) -> Option<RepoName> {
    const ROWS: [&str; 7] = ["jsonl", "json", "ndjson", "csv", "tsv", "parquet", "txt"];
    let is_file = path.exists()
        || path
            .extension()
            .is_some_and(|end| ROWS.iter().any(|known| end == *known));
    path.to_str().filter(|_| !is_file).and_then(RepoName::parse)
}

impl OfHub {
    /// The files, of names on the hub those of the first of these splits that is there.
    pub fn files(&self, given: &Files, splits: &[&str]) -> Result<Vec<PathBuf>, TrainError> {
        let mut files = vec![];
        for path in given.paths() {
            match name_on_hub(path) {
                None => files.push(path.clone()),
                Some(name) => files.extend(hub::rows(hub::Rows {
                    name: &name,
                    revision: self.revision.as_deref(),
                    config: self.config.as_deref(),
                    splits,
                })?),
            }
        }
        Ok(files)
    }
}

/// `validation[:10%]` of a hub's data set is the part `[:10%]` of its split `validation`; a file is one split.
pub fn split_of_hub(training: &Files, split: Option<&str>) -> Option<(String, String)> {
    let is_of_hub = training.paths().iter().any(|path| name_on_hub(path).is_some());
    let split = split.unwrap_or_default();
    let (name, part) = split.split_at(split.find('[').unwrap_or(split.len()));
    let name = match name.trim() {
        "" => "train",
        name => name,
    };
    is_of_hub.then(|| (name.to_owned(), format!("train{part}")))
}

/// Files, tokenised.
pub struct Dataset {
    /// As the trainer reads them.
    pub bytes: Vec<u8>,
    pub facts: Facts,
}

impl Dataset {
    pub fn read(
        files: &[PathBuf],
        reading: &Reading,
        tokenizer: &Tokenizer,
        options: &Options,
    ) -> Result<Dataset, TrainError> {
        let mut encoder = Encoder::new(Cursor::new(vec![])).expect("memory takes what is written");
        let keep = |group: Group| encoder.push(&group);
        let statistics = Dataset::tokens(files, reading, tokenizer, options, keep)?;
        let facts = Facts {
            examples: statistics.examples,
            tokens: statistics.tokens,
        };
        Ok(Dataset {
            bytes: encoder
                .finish()
                .expect("memory takes what is written")
                .into_inner(),
            facts,
        })
    }

    /// Prints the first examples, token for token: what is learned stands between marks.
    pub fn show(
        files: &[PathBuf],
        reading: &Reading,
        tokenizer: &Tokenizer,
        options: &Options,
        n: usize,
    ) -> Result<(), TrainError> {
        let mut first = vec![];
        let keep = |group| {
            if first.len() < n {
                first.push(group);
            }
            Ok(())
        };
        let statistics = Dataset::tokens(files, reading, tokenizer, options, keep)?;
        say!(
            "{} tokens are learned, the longest row has {}",
            thousands(statistics.trained_tokens),
            thousands(statistics.longest)
        );
        for (number, group) in first.iter().enumerate() {
            for example in Shown::of(group, tokenizer) {
                say!(
                    "\n--- {} of {} tokens, {} learned (between \u{ab} and \u{bb})",
                    number + 1,
                    example.tokens.len(),
                    example.learned_tokens()
                );
                let pieces = example.pieces.iter();
                let pieces = pieces.map(|piece| match piece.weight {
                    0.0 => piece.text.clone(),
                    _ => format!("\u{ab}{}\u{bb}", piece.text),
                });
                say!("{}", pieces.collect::<String>());
            }
        }
        Ok(())
    }

    /// Says what there is.
    fn tokens(
        files: &[PathBuf],
        reading: &Reading,
        tokenizer: &Tokenizer,
        options: &Options,
        keep: impl FnMut(Group) -> io::Result<()>,
    ) -> Result<Statistics, TrainError> {
        let names: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
        let names = names.join(", ");
        let unfit = |source| TrainError::Rows {
            files: names.clone(),
            source,
        };
        let sources = files.iter().map(|path| Source::from(path.as_path())).collect();
        let mut rows = Rows::open(sources, reading).map_err(|bad| unfit(bad.into()))?;
        let statistics = tokenise(&mut rows, tokenizer, options, |_, _| true, keep).map_err(unfit)?;
        let Statistics {
            rows: n_rows,
            dropped,
            cut,
            merged,
            examples,
            tokens,
            trained_tokens: _,
            longest: _,
        } = statistics;
        let max_seq_length = options.max_seq_length;
        if examples == 0 {
            return Err(TrainError::Empty {
                files: names,
                max_seq_length,
            });
        }
        let mut line = format!(
            "{names} ({}): {} examples, {} tokens",
            rows.formats(),
            thousands(examples),
            thousands(tokens)
        );
        if options.wraps {
            line.push_str(&format!(", blocks of {} rows", thousands(n_rows)));
        }
        if cut > 0 {
            line.push_str(&format!(", {} cut at {max_seq_length} tokens", thousands(cut)));
        }
        if dropped > 0 {
            line.push_str(&format!(
                ", {dropped} left out: nothing to learn within {max_seq_length} tokens"
            ));
        }
        if merged > 0 {
            line.push_str(&format!("; of {} {MERGED}", thousands(merged)));
        }
        say!("{line}");
        Ok(statistics)
    }

    pub fn write(&self, target: &Path) -> Result<(), TrainError> {
        let write = || -> io::Result<()> {
            let mut file = File::create(target)?;
            file.write_all(&self.bytes)?;
            file.sync_all()
        };
        write().map_err(|source| TrainError::File {
            path: target.to_owned(),
            source,
        })
    }
}
