//! A trainer begins: from the contents of its job's folder, or from its state.

use std::cell::RefCell;
use std::path::Path;
use std::time::Instant;

use tandem_core::dataset::Group;
use tandem_core::job::{JobSpec, Method, Objective, files};
use tandem_kernels::weight::Precision;

use super::{Stage, Trainer};
use crate::lora::adapter::Adapter;
use crate::lora::fit::Fit;
use crate::lora::params::AdapterShape;
use crate::lora::peft;
use crate::model::{Decoder, full};
use crate::train::best::Best;
use crate::train::inputs::{Inputs, groups};
use crate::train::learner::Learner;
use crate::train::mates::Mates;
use crate::train::plan::DataPlan;
use crate::train::{TrainError, objective, slice, state};

impl Trainer {
    /// Reads the job's folder; goes on from its state when there is one.
    pub fn start(spec: JobSpec, base: &Decoder) -> Result<Trainer, TrainError> {
        let inputs = Inputs::read(&spec.folder)?;
        Trainer::start_with(spec, &inputs, base.fit())
    }

    /// From the contents of the job's folder, which other ranks do not see. Takes a while: data are parsed, numbers drawn.
    pub fn start_with(spec: JobSpec, inputs: &Inputs, fit: Fit) -> Result<Trainer, TrainError> {
        let Method::Lora(lora) = spec.hyper.method.clone() else {
            return Err(TrainError::Data(
                "full training changes the base; only `tandem train` does it".to_owned(),
            ));
        };
        let Some((config, tensors)) = &inputs.start else {
            let learner = Learner::lora(lora, fit, spec.hyper.seed)?;
            return Trainer::new(spec, inputs, learner, None);
        };
        let start = peft::read_bytes(config, tensors, &fit.spec, u32::MAX)?.params;
        if !start.shape.is_within(&AdapterShape::new(&fit.spec, &lora)) {
            let message =
                "the adapter that the job starts from has other modules, ranks or scales than the job";
            return Err(TrainError::Data(message.to_owned()));
        }
        let reference = match spec.hyper.objective.has_reference() {
            true => Some(fit.pack(&start)?),
            false => None,
        };
        let learner = Learner::of_adapter(lora, fit, start)?;
        Trainer::new(spec, inputs, learner, reference)
    }

    /// Trains every parameter of the model in `model_folder` (drawn at random when it has no weights): numbers, gradient and
    /// moments are float32, passes multiply in `precision`. The ranks of `mates` may share them.
    pub fn start_full(
        spec: JobSpec,
        inputs: &Inputs,
        model_folder: &Path,
        precision: Precision,
        mates: &Mates,
    ) -> Result<Trainer, TrainError> {
        let (shared, keeps_whole) = mates.share_trained();
        let (decoder_spec, params) = full::read_or_init(
            model_folder,
            spec.hyper.seed,
            spec.hyper.frozen_layers as usize,
            shared,
        )?;
        let learner = Learner::full(decoder_spec, params, precision, keeps_whole)?;
        Trainer::new(spec, inputs, learner, None)
    }

    fn new(
        spec: JobSpec,
        inputs: &Inputs,
        learner: Learner,
        reference: Option<Adapter>,
    ) -> Result<Trainer, TrainError> {
        let (model, device) = (learner.spec(), learner.device());
        // It may come from another machine.
        spec.hyper.check().map_err(TrainError::Data)?;
        let objective = spec.hyper.objective;
        let train = groups(&inputs.train, files::TRAIN, model, &objective)?;
        let valid = match &inputs.valid {
            Some(bytes) => groups(bytes, files::VALID, model, &objective)?,
            None => vec![],
        };
        let learned = train.iter().flat_map(|group| &group.examples);
        let learned = learned.filter(|example| example.label_tokens() > 0);
        let Some(trial) = slice::slices(learned.take(1), device).pop() else {
            return Err(TrainError::Data(format!(
                "none of {} examples has a token to learn",
                train.len()
            )));
        };
        let plan = DataPlan::new(train.iter().map(Group::tokens).collect(), &spec.hyper);
        let factors = |groups: &[Group]| match objective {
            Objective::RewardWeighted { beta } => {
                let rewards: Vec<f32> = groups.iter().map(|group| group.value).collect();
                Some(objective::factors(&rewards, beta))
            }
            _ => None,
        };
        let mut valid_slices = vec![];
        if objective::is_known(&objective) {
            valid_slices = slice::slices(valid.iter().flat_map(|group| &group.examples), device);
            objective::by_reward(&mut valid_slices, factors(&valid).into_iter().flatten());
        }
        let rule = spec.hyper.optimizer;
        if learner.is_shared() && !rule.is_of_numbers() {
            let name = rule.name();
            return Err(TrainError::Data(format!(
                "optim {name} goes by whole tensors, of which each rank holds a part: sharding_strategy NO_SHARD, or adamw_torch"
            )));
        }
        let learner = learner.stepping_by(rule);
        let mut trainer = Trainer {
            factors: factors(&train),
            valid,
            valid_slices,
            reference,
            references: RefCell::default(),
            trial,
            learner,
            plan,
            step: 0,
            trained_tokens: 0,
            best: Best::new(spec.hyper.selection.clone()),
            stage: Stage::Announce {
                resumed_from: None,
                notes: inputs.notes.clone(),
                is_rest_due: false,
            },
            step_began: Instant::now(),
            mates: Mates::none(),
            train,
            data: inputs.data(),
            spec,
        };
        if let Some(bytes) = &inputs.state {
            let (progress, tensors) = state::parse(bytes)?;
            trainer.resume(progress, tensors, inputs.notes.clone())?;
        }
        Ok(trainer)
    }

    /// The same on each of several ranks, before the first quantum.
    pub fn beside(mut self, mates: Mates) -> Trainer {
        self.mates = mates;
        self
    }

    fn resume(
        &mut self,
        progress: state::Progress,
        tensors: state::Tensors,
        notes: Vec<String>,
    ) -> Result<(), TrainError> {
        let state::Progress {
            step,
            trained_tokens,
            hyper,
            data,
            is_rest_due,
            order,
            standing,
        } = progress;
        let state::Tensors { params, memory, best } = tensors;
        let other = match (hyper == self.spec.hyper, data == self.data) {
            (true, true) => None,
            (false, _) => Some("with other hyperparameters"),
            (true, false) => Some("for other examples"),
        };
        if let Some(other) = other {
            return Err(TrainError::State(format!("its state was written {other}")));
        }
        if order != state::ORDER && self.learner.as_lora().is_none() {
            let message =
                "its state has the model's parameters in the order of another version of this program";
            return Err(TrainError::State(message.to_owned()));
        }
        self.learner.resume(&params, &memory)?;
        let best = best.map(|numbers| self.learner.share_of(&numbers));
        self.best.resume(standing, best);
        self.step = step;
        self.plan.reach(step);
        self.trained_tokens = trained_tokens;
        self.stage = Stage::Announce {
            resumed_from: Some(step),
            notes,
            is_rest_due,
        };
        Ok(())
    }
}
