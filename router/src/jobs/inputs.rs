//! The files that a job names: whether they are there for who asks, where they lie, and whether their first rows suit the
//! objective. Not here: all of their rows (`prepare`).

use tandem_core::job::Rows;
use tandem_text::TextError;
use tandem_text::dataset::{self, Kind, Reading, suits};

use crate::Router;
use crate::api::{Client, FileIds, JobRequest, RouterError};
use crate::jobs::hyper;

impl Router {
    pub(super) async fn check_files(
        &self,
        param: &str,
        files: &FileIds,
        client: &Client,
    ) -> Result<(), RouterError> {
        for id in &files.0 {
            self.check_file(param, id, client).await?;
        }
        Ok(())
    }

    async fn check_file(&self, param: &str, id: &str, client: &Client) -> Result<(), RouterError> {
        match self.of(client).file(id).await {
            Ok(file) if file.purpose == crate::files::FINE_TUNE => Ok(()),
            Ok(file) => {
                let message = format!(
                    "{param} {id} has purpose '{}', it must have 'fine-tune'",
                    file.purpose
                );
                Err(RouterError::invalid(param, message))
            }
            Err(RouterError::UnknownFile(_)) => Err(RouterError::invalid(
                param,
                format!("{param} {id:?} does not exist"),
            )),
            Err(error) => Err(error),
        }
    }

    /// Where the files lie, as they were written, and what they are called.
    pub(super) async fn sources(&self, files: &FileIds) -> Result<Vec<dataset::Source>, RouterError> {
        let mut sources = vec![];
        for id in &files.0 {
            let row = self.file_row(id).await?;
            let path = self.0.store.sound_file(&row).await?;
            let name = row.filename;
            sources.push(dataset::Source { path, name });
        }
        Ok(sources)
    }

    /// An objective wants files of its rows, a weight of prompts such that have some. Their first row says it; the others
    /// are checked later.
    pub(super) async fn check_rows(&self, request: &JobRequest) -> Result<(), RouterError> {
        let rows = hyper::objective(&request.settings).rows();
        let weighs_prompts = request
            .settings
            .prompt_loss_weight
            .is_some_and(|weight| weight != 0.0);
        // Of a plain job no file is read before it is answered.
        if rows == Rows::Examples && !weighs_prompts {
            return Ok(());
        }
        let reading = Reading::new(&request.settings)
            .map_err(|(param, message)| RouterError::invalid(param, message))?;
        let files = [
            ("training_file", Some(&request.training_file)),
            ("validation_file", request.validation_file.as_ref()),
        ];
        for (param, files) in files
            .into_iter()
            .filter_map(|(param, files)| Some((param, files?)))
        {
            // Rows of a job have one kind.
            let Some(source) = self.sources(files).await?.into_iter().next() else {
                continue;
            };
            let reading = reading.whole();
            let first = move || Some(dataset::Rows::open(vec![source], &reading).ok()?.next()?.ok()?.1);
            // What cannot be read fails the job, with its line.
            let Some(sample) = tokio::task::spawn_blocking(first).await.ok().flatten() else {
                continue;
            };
            if let Err(error) = suits(&sample, rows) {
                return Err(RouterError::invalid(param, format!("{param}, line 1: {error}")));
            }
            let kind = sample.kind();
            if weighs_prompts && kind != Kind::Completion {
                let error = TextError::NoPrompt { shape: kind.shape() };
                return Err(RouterError::invalid("prompt_loss_weight", error.to_string()));
            }
        }
        Ok(())
    }
}
