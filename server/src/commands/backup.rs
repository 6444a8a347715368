//! `tandem backup` and `tandem restore`: a data folder's copy, and back.

use anyhow::{Context, Result};
use tandem_store::{Places, Summary};

use super::block_on;
use crate::cli::{Backup, Restore};

pub fn backup(options: Backup) -> Result<()> {
    let Backup {
        target,
        data_dir,
        artifact_url,
        database_url,
    } = options;
    let places = Places {
        artifact_url,
        database_url,
        ..Places::local(data_dir)
    };
    let backup = async {
        tandem_store::backup(&places, &target)
            .await
            .context("no backup was made")
    };
    let summary = block_on(backup)?;
    say("copied", &summary, &target);
    Ok(())
}

pub fn restore(options: &Restore) -> Result<()> {
    let Restore { source, data_dir } = options;
    let summary = tandem_store::restore(source, data_dir).context("nothing was restored")?;
    say("restored", &summary, data_dir);
    Ok(())
}

fn say(done: &str, summary: &Summary, folder: &std::path::Path) {
    let Summary { files, bytes } = summary;
    say!("{done} {files} files of {bytes} bytes to {}", folder.display());
}
