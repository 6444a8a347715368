//! `tandem merge`: a checkpoint written anew with an adapter in it.

use anyhow::Result;
use tandem_backend::weights;

use crate::cli::Merge;
use crate::exit::WrongSetting;
use crate::hub::{self, Content, Found};

pub fn run(options: &Merge) -> Result<()> {
    let Merge {
        model,
        adapter,
        out,
        revision,
    } = options;
    if out.extension().is_some_and(|end| end == "gguf") {
        return Err(WrongSetting(format!(
            "{}: a folder of safetensors is written, no GGUF file; llama.cpp's convert_hf_to_gguf.py makes one of it",
            out.display()
        ))
        .into());
    }
    let Found { folder, .. } = hub::find(model, revision.as_deref(), Content::Model)?;
    weights::check_folder(&folder)?;
    let adapter = hub::find(adapter, None, Content::Adapter)?.folder;
    let made = weights::merge(&folder, &adapter, out)?;
    for note in &made.notes {
        eprintln!("{note}");
    }
    println!(
        "{}: {} matrices changed, {}",
        out.display(),
        made.changed,
        tandem_backend::size(made.bytes)
    );
    Ok(())
}
