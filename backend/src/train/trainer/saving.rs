//! What a trainer gives away: checkpoints, the result, what a stop keeps. Not here: writing them (snapshot).

use tandem_core::job::files;
use tch::{Kind, Tensor};

use super::{Stage, Trainer};
use crate::lora::params::AdapterParams;
use crate::train::learner::LoraView;
use crate::train::snapshot::{AdapterCopy, Copying, Occasion, Snapshot};
use crate::train::state;

impl Trainer {
    /// What a clean stop keeps, so that no step is done twice: the state only.
    pub fn snapshot(&self) -> Snapshot {
        let is_rest_due = matches!(
            self.stage,
            Stage::Validate(_)
                | Stage::KeepBest(_)
                | Stage::Try {
                    occasion: Occasion::Checkpoint,
                    ..
                }
                | Stage::Save
                | Stage::Copy {
                    occasion: Occasion::Checkpoint,
                    ..
                }
                | Stage::Announce {
                    is_rest_due: true,
                    ..
                }
        );
        let mut numbers = self.numbers(Occasion::Stop);
        if !self.learner.is_shared() {
            numbers = numbers.iter().map(Tensor::copy).collect();
        }
        self.snapshot_of(Occasion::Stop, numbers, is_rest_due)
    }

    /// What rank 0 does with this rank's shares when the run ends, `finished` or to go on some other time.
    pub fn bring_shares(&self, finished: bool) {
        match (self.learner.is_shared(), finished) {
            (false, _) => {}
            (true, false) => drop(self.snapshot()),
            (true, true) => drop(self.full_weights(Kind::Float)),
        }
    }

    pub(super) fn copy(&self, occasion: Occasion) -> Stage {
        let numbers = self.numbers(occasion);
        let copying = match self.learner.is_shared() {
            true => Copying::nothing(numbers),
            false => Copying::of(numbers),
        };
        Stage::Copy { occasion, copying }
    }

    /// What is copied: the trained numbers, and what the optimizer remembers of them where the job is to go on from them.
    fn numbers(&self, occasion: Occasion) -> Vec<Tensor> {
        let mut numbers = vec![self.learner.flat()];
        if occasion != Occasion::End {
            numbers.extend(self.learner.memory().into_iter().map(|(_, tensor)| tensor));
        }
        numbers
    }

    /// `copies` are of [`Trainer::numbers`].
    pub(super) fn snapshot_of(&self, occasion: Occasion, copies: Vec<Tensor>, is_rest_due: bool) -> Snapshot {
        // Every rank brings its shares, of all of them.
        let whole = |share| self.learner.together(share);
        let copies: Vec<Option<Tensor>> = copies.into_iter().map(whole).collect();
        let best = match occasion {
            Occasion::End => None,
            _ => self.best.numbers().and_then(whole),
        };
        // None on a rank that only brought its shares.
        let mut copies = copies.into_iter().flatten();
        let params = copies.next();
        let name = match occasion {
            Occasion::Checkpoint => Some(format!("{}{}", files::CHECKPOINT, self.step)),
            Occasion::End => Some(files::ADAPTER.to_owned()),
            Occasion::Stop => None,
        };
        let of_lora = self.learner.as_lora().zip(name).zip(params.as_ref());
        let adapter = of_lora.map(|((of, name), params)| {
            let LoraView {
                lora,
                params: own,
                fit,
            } = of;
            AdapterCopy {
                name,
                params: AdapterParams {
                    flat: params.shallow_clone(),
                    shape: own.shape.clone(),
                },
                lora: lora.clone(),
                base_model: self.spec.base_model.clone(),
                fit: fit.clone(),
            }
        });
        let goes_on = params.filter(|_| occasion != Occasion::End);
        let state = goes_on.map(|params| {
            let names = self.learner.memory().into_iter().map(|(name, _)| name);
            let progress = state::Progress {
                step: self.step,
                trained_tokens: self.trained_tokens,
                hyper: self.spec.hyper.clone(),
                data: self.data,
                is_rest_due,
                order: state::ORDER,
                standing: self.best.standing(),
            };
            let tensors = state::Tensors {
                params,
                memory: names.zip(copies).collect(),
                best,
            };
            (progress, tensors)
        });
        Snapshot {
            job: self.spec.id.clone(),
            folder: self.spec.folder.clone(),
            occasion,
            adapter,
            state,
            best: self.best.standing().saved,
            step: self.step,
            trained_tokens: self.trained_tokens,
        }
    }
}
