//! Files of rows as `tandem train` reads them, and what it says of them. Not here: how rows are read (text).

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use tandem_core::dataset;
use tandem_router::hyper::Facts;
use tandem_text::Tokenizer;
use tandem_text::dataset::{self as rows, Options, Reading, Rows, Shown, Source, Statistics, tokenise};

use super::progress::thousands;
use super::settings::Files;
use super::{TrainError, wrong};

/// A name on the hub is no file.
fn is_there(path: &Path) -> Result<(), TrainError> {
    let name = path.display().to_string();
    let is_name = name.split('/').count() == 2 && !name.starts_with(['.', '/']);
    match path.exists() || !is_name {
        true => Ok(()),
        false => {
            let message = format!(
                "there is no file {name}. A data set of the hub is made one by datasets.load_dataset({name:?}, \
                 split=\"train\").to_json(\"rows.jsonl\"): then give training_file=rows.jsonl"
            );
            Err(wrong("training_file", message).into())
        }
    }
}

/// Files, tokenised.
pub struct Dataset {
    /// As the trainer reads them.
    pub bytes: Vec<u8>,
    pub facts: Facts,
}

impl Dataset {
    pub fn read(
        files: &Files,
        reading: &Reading,
        tokenizer: &Tokenizer,
        options: &Options,
    ) -> Result<Dataset, TrainError> {
        let rows::Dataset { groups, statistics } = Dataset::tokens(files, reading, tokenizer, options)?;
        let facts = Facts {
            examples: statistics.examples,
            tokens: statistics.tokens,
        };
        Ok(Dataset {
            bytes: dataset::encode(&groups),
            facts,
        })
    }

    /// Prints the first examples, token for token: what is learned stands between marks.
    pub fn show(
        files: &Files,
        reading: &Reading,
        tokenizer: &Tokenizer,
        options: &Options,
        n: usize,
    ) -> Result<(), TrainError> {
        let dataset = Dataset::tokens(files, reading, tokenizer, options)?;
        println!(
            "{} tokens are learned, the longest row has {}",
            thousands(dataset.statistics.trained_tokens),
            thousands(dataset.statistics.longest)
        );
        for (number, group) in dataset.groups.iter().take(n).enumerate() {
            for example in Shown::of(group, tokenizer) {
                println!(
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
                println!("{}", pieces.collect::<String>());
            }
        }
        Ok(())
    }

    /// Says what there is.
    fn tokens(
        files: &Files,
        reading: &Reading,
        tokenizer: &Tokenizer,
        options: &Options,
    ) -> Result<rows::Dataset, TrainError> {
        files.paths().iter().try_for_each(|path| is_there(path))?;
        let names: Vec<String> = files
            .paths()
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        let names = names.join(", ");
        let unfit = |source| TrainError::Rows {
            files: names.clone(),
            source,
        };
        let sources = files
            .paths()
            .iter()
            .map(|path| Source::from(path.as_path()))
            .collect();
        let mut rows = Rows::open(sources, reading).map_err(|bad| unfit(bad.into()))?;
        let dataset = tokenise(&mut rows, tokenizer, options, |_, _| true).map_err(unfit)?;
        let Statistics {
            rows: n_rows,
            dropped,
            cut,
            examples,
            tokens,
            trained_tokens: _,
            longest: _,
        } = dataset.statistics;
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
        println!("{line}");
        Ok(dataset)
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
