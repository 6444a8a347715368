//! What a job would train, without training it: the first rows as the model would read them, and what there is of all. Not here:
//! how rows become tokens (`tandem_text::dataset`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tandem_core::dataset::Group;
use tandem_core::job::Hyper;
use tandem_text::dataset::{Options, Reading, Rows, Sample, Shown, Statistics, tokenise};

use crate::Router;
use crate::api::{Client, JobRequest, RouterError};
use crate::jobs::check;
use crate::jobs::hyper::{self, Facts, Tuning};
use crate::jobs::prepare::Waiting;

/// Rows that are read at most, so that an answer takes seconds.
const MOST_ROWS: usize = 10_000;

pub struct Preview {
    /// How the rows lie in the file.
    pub formats: String,
    /// Of the whole file, or of its beginning.
    pub statistics: Statistics,
    pub is_whole: bool,
    /// Of each row, its examples: two of a pair.
    pub rows: Vec<Vec<Shown>>,
    /// What would be chosen. Of a file that is not read whole, for its beginning.
    pub hyper: Hyper,
}

impl Router {
    pub(crate) async fn preview_job(
        &self,
        mut request: JobRequest,
        n_rows: usize,
        client: &Client,
    ) -> Result<Preview, RouterError> {
        let param = "training_file";
        self.find_start(&mut request, client).await?;
        check::request(&request, self.info())?;
        self.check_files(param, &request.training_file, client).await?;
        let sources = self.sources(&request.training_file).await?;
        let settings = tandem_core::settings::Settings {
            seed: Some(request.settings.seed.unwrap_or(0)),
            ..request.settings
        };
        let bounds = self.info();
        let options = Options::new(
            &settings,
            hyper::max_seq_length(&settings, bounds),
            hyper::objective(&settings).rows(),
        );
        let reading =
            Reading::new(&settings).map_err(|(param, message)| RouterError::invalid(param, message))?;
        let tokenizer = self.tokenizer().clone();
        let turn = self.0.readers.wait(&client.tenant).await;
        let given_up = Arc::new(AtomicBool::new(false));
        let _waiting = Waiting(given_up.clone());
        let read = move || {
            let _turn = turn;
            let bad = |error: &dyn std::fmt::Display| RouterError::invalid(param, error.to_string());
            let mut rows = Rows::open(sources, &reading).map_err(|error| bad(&error))?;
            let beginning = rows.by_ref().take(MOST_ROWS);
            let each = |_: &Sample, _: &Group| !given_up.load(Ordering::Acquire);
            let mut shown = vec![];
            let keep = |group| {
                if shown.len() < n_rows {
                    shown.push(Shown::of(&group, &tokenizer));
                }
                Ok(())
            };
            let statistics =
                tokenise(beginning, &tokenizer, &options, each, keep).map_err(|error| bad(&error))?;
            let is_whole = (statistics.rows as usize) < MOST_ROWS || rows.next().is_none();
            Ok::<_, RouterError>((rows.formats(), statistics, is_whole, shown))
        };
        let (formats, statistics, is_whole, rows) = match tokio::task::spawn_blocking(read).await {
            Ok(read) => read?,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        let facts = Facts {
            examples: statistics.examples,
            tokens: statistics.tokens,
        };
        let hyper = hyper::choose(&settings, Tuning::Lora, bounds, facts);
        Ok(Preview {
            formats,
            statistics,
            is_whole,
            rows,
            hyper,
        })
    }
}
