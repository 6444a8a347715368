//! What a run writes of its course beside its result: `metrics.jsonl` (a line a report, as it comes), `step_metrics.csv` (a
//! line a step, whenever something else is written), an event file for TensorBoard and, where it is asked, an offline W&B run. Not here: what a report says (core).

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use tandem_core::job::JobEvent;
use tandem_core::report::{self, Report};

use super::wandb;

pub const LINES: &str = "metrics.jsonl";
pub const TABLE: &str = "step_metrics.csv";
/// What TensorBoard looks for in a name.
pub const EVENTS: &str = "events.out.tfevents.";

/// Of a folder; opened by the event that says from where the run goes on.
pub struct Logs {
    folder: PathBuf,
    wandb: Option<wandb::Asked>,
    open: Option<Open>,
}

struct Open {
    lines: File,
    events: File,
    wandb: Option<wandb::Open>,
    reports: Vec<Report>,
}

impl Logs {
    pub fn of(folder: &Path, wandb: Option<wandb::Asked>) -> Logs {
        Logs {
            folder: folder.to_owned(),
            wandb,
            open: None,
        }
    }

    pub fn take(&mut self, event: &JobEvent) -> io::Result<()> {
        if let JobEvent::Started { resumed_from, .. } = event {
            self.open = Some(Open::begin(&self.folder, self.wandb.as_ref(), *resumed_from)?);
        }
        let Some(open) = &mut self.open else { return Ok(()) };
        if let Some(report) = Report::of(event) {
            open.lines.write_all(report.json().as_bytes())?;
            let now_s = now_s();
            open.events.write_all(&report.tensorboard(now_s))?;
            if let Some(run) = &mut open.wandb {
                run.row(&report, now_s)?;
            }
            open.reports.push(report);
        }
        if let (JobEvent::Finished { .. }, Some(run)) = (event, &mut open.wandb) {
            run.end(now_s())?;
        }
        match event {
            JobEvent::Validated { .. } | JobEvent::Checkpoint { .. } | JobEvent::Finished { .. } => {
                self.write_table()
            }
            _ => Ok(()),
        }
    }

    /// Brings the table up to date.
    pub fn write_table(&self) -> io::Result<()> {
        match &self.open {
            Some(open) => fs::write(self.folder.join(TABLE), report::csv(&open.reports)),
            None => Ok(()),
        }
    }
}

impl Open {
    /// Lines of steps that are made again are dropped. (TensorBoard itself drops what a later file reports anew.)
    fn begin(folder: &Path, wandb: Option<&wandb::Asked>, resumed_from: Option<u64>) -> io::Result<Open> {
        let done = resumed_from.unwrap_or(0);
        let path = folder.join(LINES);
        let before = match resumed_from {
            Some(_) => fs::read_to_string(&path).or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => Ok(String::new()),
                _ => Err(error),
            })?,
            None => String::new(),
        };
        let mut reports: Vec<Report> = before.lines().filter_map(Report::of_json).collect();
        reports.retain(|report| report.step <= done);
        let mut lines = File::create(&path)?;
        for report in &reports {
            lines.write_all(report.json().as_bytes())?;
        }
        let began = now_s();
        let mut events = File::create(folder.join(format!("{EVENTS}{began:.0}.tandem.{done}")))?;
        events.write_all(&report::tensorboard_head(began))?;
        let before = resumed_from.map(|_| reports.len() as u64);
        let run = wandb.map(|asked| wandb::Open::begin(folder, asked, before, began));
        Ok(Open {
            lines,
            events,
            wandb: run.transpose()?,
            reports,
        })
    }
}

fn now_s() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64())
}

/// What a run left there: files, and folders of W&B.
pub fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let is_ours =
        |name: &str| [LINES, TABLE].contains(&name) || name.starts_with(EVENTS) && name.contains(".tandem.");
    let mut found = wandb::runs(folder)?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(is_ours) {
            found.push(entry.path());
        }
    }
    Ok(found)
}
