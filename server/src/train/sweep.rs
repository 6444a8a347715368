//! `tandem train` with settings that are lists: the trials train beside each other in `output_dir/trial-N`, each a folder of a
//! run like any other, and the winner's result is the sweep's. What becomes of them is read off their metrics, so it is the same
//! after any stop. Not here: who goes on (`core::job::sweep`).

use std::fs;
use std::path::{Path, PathBuf};

use serde_norway::{Mapping, Value};
use tandem_backend::train::TrainError as Failure;
use tandem_backend::train::together::Together;
use tandem_core::job::selection::EVAL;
use tandem_core::job::sweep::{Call, Course, Decision, End, Sweep};
use tandem_core::job::{JobEvent, files};
use tandem_core::report::Report;
use tandem_core::settings::{Settings, Trial as Asked};

use super::ground::Ground;
use super::logs::{LINES, Logs, TABLE};
use super::progress::Progress;
use super::record::{self, Aside, Begin, Record, TRIALS};
use super::signals::heed_signals;
use super::{Outcome, TrainError, at, prune, say_finished, say_stopped};

struct Trial {
    asked: Asked,
    folder: PathBuf,
    record: Record,
    logs: Logs,
    progress: Progress,
    /// Why it failed.
    failure: Option<String>,
}

pub fn run(
    ground: &Ground,
    settings: &Settings,
    asked: Vec<Asked>,
    output_dir: &Path,
) -> Result<Outcome, TrainError> {
    let sweep = Sweep::new(settings, asked.len(), ground.valid.is_some());
    fs::create_dir_all(output_dir).map_err(at(output_dir))?;
    let common = record::settings(&ground.choose(settings.clone(), Some(&sweep))?);
    let mut record = ground.record(output_dir, of_sweep(&sweep, common, &asked))?;
    let aside = ground.overwrites.then(|| Aside::set(output_dir)).transpose()?;
    let begin = || {
        if record.begin(output_dir, files::ADAPTER)? == Begin::Finished {
            return Ok(None);
        }
        say!(
            "{} trials, compared by their {} at {} rungs:",
            asked.len(),
            sweep.shown_metric(),
            sweep.rungs()
        );
        place(ground, &sweep, asked, output_dir).map(Some)
    };
    let Some(placed) = record::in_place_of(aside, begin)? else {
        say_finished(&output_dir.join(files::ADAPTER));
        return Ok(Outcome::Done);
    };
    let Placed {
        mut together,
        mut trials,
        mut courses,
    } = placed;
    let signalled = heed_signals().map_err(TrainError::Signals)?;
    let mut decision = sweep.decide(&courses);
    let mut told = 0;
    while decision.winner.is_none() {
        // Nobody needs the others' places: who waits does nothing.
        let goes_on: Vec<bool> = decision.calls.iter().map(|call| *call == Call::GoesOn).collect();
        for (i, said) in together.advance(&goes_on) {
            heed(&mut trials[i], &mut courses[i], said, &sweep, settings)?;
            decision = sweep.decide(&courses);
            tell(&sweep, &decision, &mut told);
        }
        if let Some(signal) = signalled.get() {
            together.keep()?;
            let steps: Vec<String> = courses.iter().map(|course| course.step().to_string()).collect();
            write_tables(&trials)?;
            say_stopped(&steps.join(", "), output_dir);
            return Ok(Outcome::Stopped(signal));
        }
    }
    write_tables(&trials)?;
    let table = output_dir.join(TRIALS);
    fs::write(&table, self::table(&trials, &courses, &decision)).map_err(at(&table))?;
    let Some(winner) = decision.winner.flatten() else {
        let failures = trials.iter().filter_map(|trial| trial.failure.clone());
        return Err(TrainError::AllFailed {
            trials: trials.len(),
            first: failures.take(1).collect(),
        });
    };
    let trial = &trials[winner];
    say!("trial {} wins: {}", winner + 1, shown(&trial.asked));
    for name in [LINES, TABLE] {
        let to = output_dir.join(name);
        fs::copy(trial.folder.join(name), &to).map_err(at(&to))?;
    }
    let result = output_dir.join(files::ADAPTER);
    copy_folder(&trial.folder.join(files::ADAPTER), &result)?;
    record.finish(output_dir)?;
    ground.say_how_to_serve(&result);
    Ok(Outcome::Done)
}

/// What distinguishes it from another sweep: what its trials have in common, and what they differ in.
fn of_sweep(sweep: &Sweep, mut settings: Mapping, trials: &[Asked]) -> Mapping {
    for name in trials[0].varied.keys() {
        settings.remove(name.as_str());
    }
    settings.insert("reduction_factor".into(), sweep.factor.into());
    settings.insert("metric_for_best_model".into(), sweep.metric.as_str().into());
    settings.insert("greater_is_better".into(), sweep.greater_is_better.into());
    for (number, trial) in (1..).zip(trials) {
        settings.insert(name(number).into(), Value::from(shown(trial)));
    }
    settings
}

/// Of a trial's folder.
fn name(number: usize) -> String {
    format!("{}{number}", record::TRIAL)
}

/// `learning_rate 0.0001, lora_r 8`
fn shown(trial: &Asked) -> String {
    let pairs = trial.varied.iter().map(|(name, value)| format!("{name} {value}"));
    pairs.collect::<Vec<String>>().join(", ")
}

struct Placed {
    together: Together,
    trials: Vec<Trial>,
    courses: Vec<Course>,
}

/// Each trial in its folder, with what it has reported there already.
fn place(ground: &Ground, sweep: &Sweep, asked: Vec<Asked>, output_dir: &Path) -> Result<Placed, TrainError> {
    let mut together: Option<Together> = None;
    let (mut trials, mut courses) = (vec![], vec![]);
    for (number, asked) in (1..).zip(asked) {
        let folder = output_dir.join(name(number));
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        let hyper = ground.choose(asked.settings.clone(), Some(sweep))?;
        let record = ground.record(&folder, record::settings(&hyper))?;
        let is_done = record.begin(&folder, files::ADAPTER)? == Begin::Finished;
        ground.write(&folder)?;
        say!("  {:<28} {}", name(number), shown(&asked));
        let spec = ground.job(&name(number), &folder, hyper);
        let together = match &mut together {
            Some(together) => together,
            none => {
                let options = ground.options(spec.clone())?;
                none.insert(Together::open(&options.model_folder, options.weights)?)
            }
        };
        let mut course = Course::of(together.add(spec, is_done)?);
        course.end = is_done.then_some(End::Succeeded);
        // What was reported is what will be reported again.
        let lines = fs::read_to_string(folder.join(LINES)).unwrap_or_default();
        for report in lines.lines().filter_map(Report::of_json) {
            take(&mut course, &report, &sweep.metric);
        }
        courses.push(course);
        trials.push(Trial {
            asked,
            logs: Logs::of(&folder, ground.tracked(&record, Some(name(number)))),
            record,
            progress: Progress::of_trial(together.frozen_parameters(), number),
            folder,
            failure: None,
        });
    }
    let together = together.expect("a sweep has trials");
    for note in together.notes() {
        tracing::warn!(model = %ground.model.display(), "{note}");
    }
    Ok(Placed {
        together,
        trials,
        courses,
    })
}

fn take(course: &mut Course, report: &Report, metric: &str) {
    let number = |name: &str| report.values.iter().find(|(known, _)| known == name);
    if let Some((_, value)) = number(&format!("{EVAL}{metric}")) {
        course.validated(report.step, *value);
    } else if let Some((_, value)) = number(metric) {
        course.trained(report.step, *value);
    }
}

fn heed(
    trial: &mut Trial,
    course: &mut Course,
    said: Result<Vec<JobEvent>, Failure>,
    sweep: &Sweep,
    settings: &Settings,
) -> Result<(), TrainError> {
    let events = match said {
        Ok(events) => events,
        // Whatever else is wrong is wrong with all of them.
        Err(error @ (Failure::Diverged { .. } | Failure::Overflowed { .. })) => {
            let message = error.to_string();
            course.end = Some(End::Failed);
            trial.failure = Some(message.clone());
            vec![JobEvent::Failed { message }]
        }
        Err(error) => return Err(error.into()),
    };
    for event in &events {
        trial.progress.show(event);
        trial.logs.take(event).map_err(at(&trial.folder))?;
        prune(event, settings.save_total_limit, &trial.folder)?;
        if let Some(report) = Report::of(event) {
            take(course, &report, &sweep.metric);
        }
        if let JobEvent::Finished { .. } = event {
            trial.record.finish(&trial.folder)?;
            course.end = Some(End::Succeeded);
        }
    }
    Ok(())
}

/// Says what was decided at rungs that were not told.
fn tell(sweep: &Sweep, decision: &Decision, told: &mut usize) {
    for rung in decision.rungs.iter().skip(*told) {
        let trials: Vec<String> = rung
            .ranking
            .iter()
            .map(|(i, value)| format!("trial {} {value:.4}", i + 1))
            .collect();
        say!(
            "rung {}/{}, {:.0} % of the run: {} of {} trials go on, by their {}: {}",
            rung.number,
            sweep.rungs(),
            100.0 * rung.part,
            rung.kept,
            trials.len(),
            sweep.shown_metric(),
            trials.join(", ")
        );
    }
    *told = decision.rungs.len();
}

fn write_tables(trials: &[Trial]) -> Result<(), TrainError> {
    let write = |trial: &Trial| trial.logs.write_table().map_err(at(&trial.folder));
    trials.iter().try_for_each(write)
}

fn table(trials: &[Trial], courses: &[Course], decision: &Decision) -> String {
    let names = trials[0].asked.varied.keys().cloned();
    let columns = ["trial".to_owned()].into_iter().chain(names);
    let columns = columns.chain(["end", "step", "total_steps", "value"].map(str::to_owned));
    let mut table = columns.collect::<Vec<String>>().join(",") + "\n";
    for (i, (trial, course)) in trials.iter().zip(courses).enumerate() {
        let end = match course.end {
            Some(End::Succeeded) => "succeeded",
            Some(End::Failed) => "failed",
            None => "stopped",
        };
        let varied = trial.asked.varied.values().map(|value| match value.as_str() {
            Some(text) => text.to_owned(),
            // Lists have commas.
            None if value.is_array() => format!("\"{}\"", value.to_string().replace('"', "\"\"")),
            None => value.to_string(),
        });
        let number = |number: Option<String>| number.unwrap_or_default();
        let cells = [(i + 1).to_string()].into_iter().chain(varied).chain([
            end.to_owned(),
            course.step().to_string(),
            number(course.total_steps.map(|steps| steps.to_string())),
            number(decision.values[i].map(|value| value.to_string())),
        ]);
        table.push_str(&(cells.collect::<Vec<String>>().join(",") + "\n"));
    }
    table
}

/// Whole or not at all.
fn copy_folder(from: &Path, to: &Path) -> Result<(), TrainError> {
    let partial = to.with_extension("partial");
    let copy = || {
        for folder in [&partial, to] {
            if folder.exists() {
                fs::remove_dir_all(folder)?;
            }
        }
        fs::create_dir(&partial)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            fs::copy(entry.path(), partial.join(entry.file_name()))?;
        }
        fs::rename(&partial, to)
    };
    copy().map_err(at(to))
}
