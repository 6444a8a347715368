//! `tandem quantize`: a checkpoint written anew in fewer bits.

use anyhow::Result;
use tandem_backend::weights;

use crate::cli::Quantize;
use crate::hub::{self, Content, Found};

pub fn run(options: &Quantize) -> Result<()> {
    let Quantize {
        model,
        out,
        format,
        revision,
    } = options;
    let Found { folder, .. } = hub::find(model, revision.as_deref(), Content::Model)?;
    weights::check_folder(&folder)?;
    let made = weights::quantize(&folder, out, format)?;
    for name in &made.dense {
        note!("`{name}` stays as it is: {format} cannot hold it");
    }
    say!(
        "{}: {} matrices in {format}, {}",
        out.display(),
        made.quantised,
        tandem_backend::size(made.bytes)
    );
    Ok(())
}
