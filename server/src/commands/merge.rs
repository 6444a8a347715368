//! `tandem merge`: a checkpoint written anew with an adapter in it.

use std::path::Path;

use anyhow::{Context, Result};
use tandem_backend::weights::{self, Merge as Merging, Merged};
use tandem_text::tokenizer::gguf;

use crate::cli::Merge;
use crate::exit::WrongSetting;
use crate::hub::{self, Content, Found};

pub fn run(options: &Merge) -> Result<()> {
    let Merge {
        model,
        adapter,
        out,
        format,
        revision,
    } = options;
    let is_named = out.extension().is_some_and(|end| end == "gguf");
    let is_gguf = format.as_deref().map_or(is_named, |format| format == "gguf");
    if is_gguf != is_named {
        let wanted = if is_gguf { "a file *.gguf" } else { "a folder" };
        return Err(WrongSetting(format!("{}: this format is written to {wanted}", out.display())).into());
    }
    let Found { folder, .. } = hub::find(model, revision.as_deref(), Content::Model)?;
    weights::check_folder(&folder)?;
    let adapter = hub::find(adapter, None, Content::Adapter)?.folder;
    let made = match is_gguf {
        true => to_gguf(&folder, &adapter, out)?,
        false => weights::merge(&folder, &adapter, out)?,
    };
    for note in &made.notes {
        note!("{note}");
    }
    say!(
        "{}: {} matrices changed, {}",
        out.display(),
        made.changed,
        tandem_backend::size(made.bytes)
    );
    Ok(())
}

fn to_gguf(base: &Path, adapter: &Path, out: &Path) -> Result<Merged> {
    let mut merging = Merging::open(base, adapter)?;
    let tokenizer = gguf::metadata(base, merging.vocab()).context("the model's tokenizer")?;
    let name = out.file_stem().unwrap_or_default().to_string_lossy();
    let file = merging.gguf(&name, tokenizer)?;
    let folder = out.parent().unwrap_or(Path::new(""));
    Ok(merging.write(&[file], folder)?)
}
