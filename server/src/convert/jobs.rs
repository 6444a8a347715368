//! Jobs, their events and checkpoints to the wire, in the API of today. What may be asked is fine_tuning.rs.

use serde_json::json;
use tandem_core::job::selection::{EVAL, LOSS};
use tandem_core::job::{Hyper, Lora, Method as CoreMethod, Optimizer, Schedule};
use tandem_core::settings::Settings;
use tandem_openapi::common::{AutoInteger, AutoNumber};
use tandem_openapi::fine_tuning::{
    Checkpoint, ChosenHyperparameters, ChosenMethod, ChosenMethodSettings, CommonHyperparameters, Job,
    JobError, JobEvent, JobPreview, MethodHyperparameters, PreviewExample, PreviewPiece, PreviewRow,
    PreviewStatistics, RunData, RunHyperparameters, RunLora, RunObjective, RunOptimizer, RunSaving,
    RunSchedule, Trial,
};
use tandem_router::api::{self, JobEventRecord, JobRequest, JobStatus, Level, TrialRecord, TrialStatus};
use tandem_router::hyper;
use tandem_router::preview::Preview;
use tandem_text::dataset::{Piece, Shown, Statistics};

pub fn job(job: api::Job, organization: &str) -> Job {
    let api::Job {
        id,
        created_at,
        updated_at: _,
        finished_at,
        estimated_finish,
        status,
        request,
        hyper,
        fine_tuned_model,
        trained_tokens,
        result_files,
        error,
        parent,
        trials,
    } = job;
    let common = common(&request, hyper.as_ref());
    let seed = hyper
        .as_ref()
        .map(|hyper| hyper.seed)
        .or(request.settings.seed)
        .unwrap_or(0);
    let method = self::method(&request.settings, common.clone());
    Job {
        id: id.to_string(),
        object: "fine_tuning.job",
        created_at,
        finished_at,
        estimated_finish,
        model: request.model,
        fine_tuned_model,
        organization_id: organization.to_owned(),
        result_files,
        status: self::status(status, &trials),
        training_file: request.training_file.0.into(),
        validation_file: request.validation_file.map(|files| files.0.into()),
        trained_tokens,
        error: error.map(|api::JobError { code, param, message }| JobError { code, message, param }),
        seed,
        method,
        hyperparameters: ChosenHyperparameters {
            common,
            run: hyper.map(|hyper| run(hyper, &request.settings)),
        },
        integrations: Vec::new(),
        metadata: (!request.metadata.is_empty()).then_some(request.metadata),
        user_provided_suffix: request.suffix,
        trials: trials.into_iter().map(trial).collect(),
        sweep: parent,
    }
}

fn trial(trial: TrialRecord) -> Trial {
    let TrialRecord {
        number,
        job,
        varied,
        status,
        rung,
        step,
        total_steps,
        value,
        train_loss,
        valid_loss,
        model,
    } = trial;
    Trial {
        number,
        job,
        hyperparameters: varied,
        status: match status {
            TrialStatus::Queued => "queued",
            TrialStatus::Running => "running",
            TrialStatus::Stopped => "stopped",
            TrialStatus::Succeeded => "succeeded",
            TrialStatus::Failed => "failed",
            TrialStatus::Cancelled => "cancelled",
        },
        rung,
        step,
        total_steps,
        metric_value: value,
        train_loss,
        valid_loss,
        fine_tuned_model: model,
    }
}

pub fn preview(preview: Preview, request: &JobRequest) -> JobPreview {
    let Preview {
        formats,
        statistics,
        is_whole,
        rows,
        hyper,
    } = preview;
    let Statistics {
        rows: n_rows,
        dropped,
        cut,
        merged,
        examples,
        tokens,
        trained_tokens,
        longest,
    } = statistics;
    let example = |shown: Shown| PreviewExample {
        text: shown.text(),
        pieces: shown
            .pieces
            .into_iter()
            .map(|Piece { text, weight }| PreviewPiece { text, weight })
            .collect(),
        tokens: shown.tokens,
        loss_mask: shown.weights,
    };
    JobPreview {
        object: "fine_tuning.preview",
        model: request.model.clone(),
        format: formats,
        statistics: PreviewStatistics {
            whole_file: is_whole,
            rows: n_rows,
            dropped,
            cut,
            merged,
            examples,
            tokens,
            trained_tokens,
            longest,
        },
        hyperparameters: ChosenHyperparameters {
            common: common(request, Some(&hyper)),
            run: Some(run(hyper, &request.settings)),
        },
        data: rows
            .into_iter()
            .map(|examples| PreviewRow {
                examples: examples.into_iter().map(example).collect(),
            })
            .collect(),
    }
}

/// In OpenAI's form, by the name that was asked for.
fn method(settings: &Settings, common: CommonHyperparameters) -> ChosenMethod {
    let kind = match settings.objective.as_deref() {
        None | Some("sft") => "supervised",
        Some(objective) => objective,
    };
    let numbers = hyper::objective(settings).numbers();
    let beta = numbers.iter().find(|(name, _)| *name == "beta");
    let hyperparameters = MethodHyperparameters {
        common,
        beta: beta.map(|(_, beta)| *beta),
    };
    ChosenMethod {
        kind: kind.to_owned(),
        of_type: [(kind.to_owned(), ChosenMethodSettings { hyperparameters })].into(),
    }
}

/// What was chosen, else what was asked, else `auto`.
fn common(request: &JobRequest, hyper: Option<&Hyper>) -> CommonHyperparameters {
    // What trials differ in is the winner's, once there is one.
    let varies = |name: &str| request.trials.iter().any(|trial| trial.varied.contains_key(name));
    let settings = &request.settings;
    let multiplier = settings
        .learning_rate_multiplier
        .filter(|_| !varies("learning_rate_multiplier"))
        .or(hyper.map(|_| 1.0));
    CommonHyperparameters {
        n_epochs: hyper
            .map(|hyper| hyper.n_epochs)
            .or(settings.n_epochs.filter(|_| !varies("n_epochs")))
            .map_or(AutoNumber::AUTO, AutoNumber::Value),
        batch_size: hyper
            .map(|hyper| hyper.batch_size)
            .or(settings.batch_size.filter(|_| !varies("batch_size")))
            .map_or(AutoInteger::AUTO, |n| AutoInteger::Value(i64::from(n))),
        learning_rate_multiplier: multiplier.map_or(AutoNumber::AUTO, AutoNumber::Value),
    }
}

fn run_optimizer(optimizer: Optimizer) -> RunOptimizer {
    let of = RunOptimizer {
        optim: optimizer.name().to_owned(),
        momentum: None,
        nesterov: None,
        scale_parameter: None,
    };
    match optimizer {
        Optimizer::AdamW | Optimizer::AdamW8bit | Optimizer::Lion => of,
        Optimizer::Sgd { momentum, nesterov } => RunOptimizer {
            momentum: Some(momentum),
            nesterov: Some(nesterov),
            ..of
        },
        Optimizer::Adafactor { scale_parameter } => RunOptimizer {
            scale_parameter: Some(scale_parameter),
            ..of
        },
    }
}

fn run(hyper: Hyper, settings: &Settings) -> RunHyperparameters {
    let Hyper {
        n_epochs: _,
        max_steps,
        max_steps_per_epoch,
        batch_size: _,
        gradient_accumulation_steps,
        learning_rate,
        lr_scheduler,
        warmup_steps,
        optimizer,
        weight_decay,
        adam_beta1,
        adam_beta2,
        adam_epsilon,
        max_grad_norm,
        loraplus_lr_ratio,
        neftune_noise_alpha,
        seed: _,
        max_seq_length,
        packing,
        shuffle,
        save_strategy,
        save_steps,
        eval_steps,
        selection,
        objective,
        frozen_layers: _,
        method,
    } = hyper;
    let lora = match method {
        CoreMethod::Lora(Lora {
            r,
            alpha,
            dropout,
            target_modules,
            use_rslora,
            use_dora,
        }) => Some(RunLora {
            lora_r: r,
            lora_alpha: alpha,
            lora_dropout: dropout,
            lora_target_modules: target_modules,
            use_rslora,
            use_dora,
        }),
        CoreMethod::Full => None,
    };
    RunHyperparameters {
        learning_rate,
        lr_scheduler_type: lr_scheduler.name().to_owned(),
        schedule: schedule(lr_scheduler, learning_rate),
        warmup_steps,
        optimizer: run_optimizer(optimizer),
        weight_decay,
        adam_beta1,
        adam_beta2,
        adam_epsilon,
        max_grad_norm,
        loraplus_lr_ratio,
        neftune_noise_alpha,
        max_seq_length,
        packing,
        // Worked into the tokens' weights, not a number of the run.
        prompt_loss_weight: settings.prompt_loss_weight.unwrap_or(0.0),
        max_steps,
        max_steps_per_epoch,
        gradient_accumulation_steps,
        shuffle,
        saving: RunSaving {
            save_strategy: match settings.save_strategy.as_deref() {
                Some("no") => "no".to_owned(),
                _ => save_strategy.name().to_owned(),
            },
            save_steps,
            save_total_limit: settings.save_total_limit,
            eval_steps,
            load_best_model_at_end: selection.as_ref().is_some_and(|selection| selection.load_best),
            metric_for_best_model: match &selection {
                Some(selection) => format!("{EVAL}{}", selection.metric),
                None => format!("{EVAL}{LOSS}"),
            },
            greater_is_better: selection
                .as_ref()
                .is_some_and(|selection| selection.greater_is_better),
            early_stopping_patience: selection.as_ref().and_then(|selection| selection.patience),
            early_stopping_threshold: selection.map_or(0.0, |selection| selection.threshold),
        },
        data: data(settings),
        objective: RunObjective {
            objective: objective.name().to_owned(),
            loss_type: objective.loss_type().map(str::to_owned),
            numbers: objective
                .numbers()
                .into_iter()
                .map(|(name, number)| (name.to_owned(), number))
                .collect(),
        },
        lora,
    }
}

fn schedule(schedule: Schedule, learning_rate: f64) -> RunSchedule {
    let mut run = RunSchedule::default();
    match schedule {
        Schedule::CosineWithRestarts { num_cycles } => run.num_cycles = Some(num_cycles),
        Schedule::Polynomial { power, end } => {
            (run.power, run.lr_end) = (Some(power), Some(end * learning_rate));
        }
        Schedule::Step { gamma, every: _ } => run.gamma = Some(gamma),
        Schedule::Constant
        | Schedule::ConstantWithWarmup
        | Schedule::Linear
        | Schedule::Cosine
        | Schedule::InverseSqrt => {}
    }
    run
}

/// Worked into the tokens, not numbers of the run.
fn data(settings: &Settings) -> RunData {
    let word = |asked: &Option<String>, default: &str| asked.clone().unwrap_or_else(|| default.to_owned());
    RunData {
        train_on_input: settings.train_on_input.unwrap_or(false),
        packing_strategy: word(&settings.packing_strategy, "bfd"),
        template: settings.template.clone(),
        column_map: settings.column_map.clone(),
        dataset_text_field: word(&settings.dataset_text_field, "text"),
        dataset_format: settings.dataset_format.clone(),
        sample_by: word(&settings.sample_by, "line"),
        split: word(&settings.split, "train"),
    }
}

fn status(status: JobStatus, trials: &[TrialRecord]) -> &'static str {
    match status {
        JobStatus::Sweeping if waits(trials) => "queued",
        JobStatus::ValidatingFiles => "validating_files",
        JobStatus::Queued => "queued",
        JobStatus::Sweeping | JobStatus::Running => "running",
        JobStatus::Paused => "paused",
        JobStatus::Succeeded => "succeeded",
        JobStatus::Failed => "failed",
        JobStatus::Cancelled => "cancelled",
    }
}

/// A sweep of which no trial has begun.
pub fn waits(trials: &[TrialRecord]) -> bool {
    let has_not_begun = |trial: &TrialRecord| trial.status == TrialStatus::Queued && trial.step == 0;
    trials.iter().all(has_not_begun)
}

pub fn level(level: Level) -> &'static str {
    match level {
        Level::Info => "info",
        Level::Warn => "warn",
        Level::Error => "error",
    }
}

pub fn event(record: JobEventRecord) -> JobEvent {
    let JobEventRecord {
        id,
        created_at,
        level,
        message,
        data,
    } = record;
    let kind = match data.get("train_loss").or(data.get("valid_loss")) {
        Some(_) => "metrics",
        None => "message",
    };
    let data = if data.is_null() { json!({}) } else { data };
    JobEvent {
        id,
        object: "fine_tuning.job.event",
        created_at,
        level: self::level(level),
        message,
        kind,
        data,
    }
}

pub fn checkpoint(checkpoint: api::Checkpoint, job: &str) -> Checkpoint {
    let api::Checkpoint {
        id,
        created_at,
        step,
        model,
        metrics,
    } = checkpoint;
    Checkpoint {
        id,
        object: "fine_tuning.job.checkpoint",
        created_at,
        fine_tuned_model_checkpoint: model,
        fine_tuning_job_id: job.to_owned(),
        step_number: step,
        metrics: if metrics.is_null() { json!({}) } else { metrics },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tandem_core::settings::{TABLE, readers};
    use tandem_router::hyper::{Bounds, Facts, Tuning};

    use super::*;

    /// A job shows every setting under the name by which it is asked, and a default that the table calls fixed is the
    /// one that is chosen.
    #[test]
    fn every_setting_comes_back_under_its_name() {
        let bounds = Bounds {
            hidden_size: 64,
            max_model_len: 512,
            max_lora_rank: 64,
            lora_targets: &["q_proj".to_owned()],
        };
        let facts = Facts {
            examples: 100,
            tokens: 5_000,
        };
        let shown = |objective: Option<&str>| {
            let settings = Settings {
                seed: Some(7),
                objective: objective.map(str::to_owned),
                ..Settings::default()
            };
            let hyper = hyper::choose(&settings, Tuning::Lora, bounds, facts);
            let shown = ChosenHyperparameters {
                common: common(&JobRequest::default(), Some(&hyper)),
                run: Some(run(hyper, &settings)),
            };
            serde_json::to_value(shown).unwrap()
        };
        for setting in TABLE {
            let shown = shown(readers(setting.name).last());
            // The seed is a field of the job itself, and so is what it starts from; a ratio comes back as the steps it made.
            // What compares trials is no trial's.
            if ["seed", "from_peft_checkpoint", "warmup_ratio", "reduction_factor"].contains(&setting.name) {
                continue;
            }
            let value = shown
                .get(setting.name)
                .unwrap_or_else(|| panic!("{} is not shown", setting.name));
            match (value, serde_json::from_str::<Value>(setting.default)) {
                (Value::Number(chosen), Ok(Value::Number(fixed))) => {
                    assert_eq!(chosen.as_f64(), fixed.as_f64(), "{}", setting.name)
                }
                (Value::Bool(_), Ok(fixed)) => assert_eq!(value, &fixed, "{}", setting.name),
                (Value::String(word), _) => assert!(setting.default.contains(word), "{}", setting.name),
                _ => {}
            }
        }
    }
}
