//! `tandem download`: a model or an adapter from the hub, into its cache or a folder. The folder goes to standard output,
//! for scripts; how it goes on to standard error.

use anyhow::Result;

use crate::cli::Download;
use crate::exit::WrongSetting;
use crate::hub::{self, Content, RepoName};

pub fn run(options: &Download) -> Result<()> {
    let Download {
        name,
        revision,
        local_dir,
    } = options;
    let repository = RepoName::parse(name).ok_or_else(|| {
        WrongSetting(format!(
            "{name} cannot be a name of the hub: these are ORG/NAME, such as HuggingFaceTB/SmolLM2-135M-Instruct"
        ))
    })?;
    let folder = hub::get(
        &repository,
        revision.as_deref(),
        Content::Either,
        local_dir.as_deref(),
    )?;
    say!("{}", folder.display());
    Ok(())
}
