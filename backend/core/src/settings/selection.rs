//! How the models of a run are compared, and what follows: settings that are transformers'. What they mean is
//! [`crate::job::selection`]'s.

use super::{Refused, Settings, Why, refused};
use crate::job::SaveStrategy;
use crate::job::selection::{EVAL, LOSS, Selection, TOKEN_ACCURACY};

const ACCURACIES: &str = "rewards/accuracies";
const MARGINS: &str = "rewards/margins";
/// Of `metric_for_best_model`.
pub(super) const METRICS: [&str; 8] = [
    LOSS,
    TOKEN_ACCURACY,
    "eval_mean_token_accuracy",
    ACCURACIES,
    "eval_rewards/accuracies",
    MARGINS,
    "eval_rewards/margins",
    "eval_loss",
];
/// Of `save_strategy`.
pub(super) const STRATEGIES: [&str; 4] = ["no", "steps", "epoch", BEST];
const BEST: &str = "best";

impl Settings {
    /// `None`: models are not compared.
    pub fn selection(&self) -> Option<Selection> {
        let load_best = self.load_best_model_at_end == Some(true);
        let asked = load_best
            || self.patience().is_some()
            || self.metric_for_best_model.is_some()
            || self.greater_is_better.is_some()
            || self.save_strategy() == SaveStrategy::Best;
        let metric = self.metric_for_best_model.as_deref().unwrap_or(LOSS);
        let metric = metric.strip_prefix(EVAL).unwrap_or(metric);
        asked.then(|| Selection {
            metric: metric.to_owned(),
            greater_is_better: self.greater_is_better.unwrap_or(!metric.ends_with(LOSS)),
            load_best,
            patience: self.patience(),
            threshold: self.early_stopping_threshold.unwrap_or(0.0),
        })
    }

    /// A threshold alone asks for transformers' callback with its default.
    fn patience(&self) -> Option<u32> {
        let has_threshold = self.early_stopping_threshold.is_some_and(|least| least > 0.0);
        self.early_stopping_patience.or(has_threshold.then_some(1))
    }

    pub fn save_strategy(&self) -> SaveStrategy {
        match self.save_strategy.as_deref() {
            Some("epoch") => SaveStrategy::Epoch,
            Some(BEST) => SaveStrategy::Best,
            _ => SaveStrategy::Steps,
        }
    }
}

pub(super) fn check(settings: &Settings, has_validation_file: bool) -> Result<(), Refused> {
    let by_validations = [
        (
            "load_best_model_at_end",
            settings.load_best_model_at_end == Some(true),
        ),
        ("early_stopping_patience", settings.patience().is_some()),
        ("eval_steps", settings.eval_steps.is_some_and(|steps| steps > 0)),
        ("save_strategy", settings.save_strategy() == SaveStrategy::Best),
    ];
    let first = by_validations.into_iter().find(|(_, asked)| *asked);
    if let (Some((name, _)), false) = (first, has_validation_file) {
        let message = format!(
            "{name} goes by validations, and there is no validation_file: give one, and eval_steps (without it each epoch's end is \
             a validation)"
        );
        return Err(wrong(name, message));
    }
    if let (Some(strategy @ ("no" | "epoch" | BEST)), Some(1..)) =
        (settings.save_strategy.as_deref(), settings.save_steps)
    {
        let message = format!(
            "save_strategy {strategy} saves at other times than every save_steps: leave one of them out"
        );
        return Err(wrong("save_strategy", message));
    }
    let objective = settings.objective.as_deref().unwrap_or("sft");
    let reports: &[&str] = match objective {
        "sft" | "reward_weighted" => &[LOSS, TOKEN_ACCURACY],
        "kto" => &[LOSS, TOKEN_ACCURACY, MARGINS],
        _ => &[LOSS, TOKEN_ACCURACY, ACCURACIES, MARGINS],
    };
    match settings.selection() {
        Some(Selection { metric, .. }) if !reports.contains(&metric.as_str()) => {
            let reports = reports.join(", ");
            let message =
                format!("metric_for_best_model of {objective} must be one of {reports}, got {metric}");
            Err(wrong("metric_for_best_model", message))
        }
        _ => Ok(()),
    }
}

fn wrong(name: &str, message: String) -> Refused {
    refused(name.to_owned(), Why::Value, message)
}
