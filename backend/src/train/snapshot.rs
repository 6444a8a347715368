//! What a job leaves in its folder, as a value: numbers copied between two steps, which any thread can write while the
//! job goes on. Not here: when (mod.rs), the state's format (state.rs), PEFT's (lora).

use std::path::PathBuf;
use std::sync::Arc;

use tandem_core::id::{AdapterRef, JobId};
use tandem_core::job::{JobEvent, Lora};
use tch::Tensor;

use super::TrainError;
use super::state::{self, Progress, Tensors};
use crate::lora::adapter::Adapter;
use crate::lora::fit::Fit;
use crate::lora::params::{AdapterParams, AdapterShape};
use crate::lora::peft::{self, PeftConfig};

/// Numbers of one quantum's copying, at most: 16 MiB take a few milliseconds.
const COPIED_AT_ONCE: i64 = 4 << 20;

/// Why a snapshot was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    Checkpoint,
    /// The result.
    End,
    /// The job leaves the replica; it goes on some other time.
    Stop,
}

pub struct Snapshot {
    pub(super) job: JobId,
    pub(super) folder: PathBuf,
    pub(super) occasion: Occasion,
    pub(super) adapter: Option<AdapterCopy>,
    pub(super) state: Option<(Progress, Tensors)>,
    /// The step of the best checkpoint, this one among them.
    pub(super) best: Option<u64>,
    /// Optimizer steps and tokens done.
    pub(super) step: u64,
    pub(super) trained_tokens: u64,
}

/// An adapter to be written as a PEFT folder, and to be served.
pub(super) struct AdapterCopy {
    /// Of the PEFT folder, inside the job's.
    pub name: String,
    pub params: AdapterParams,
    pub lora: Lora,
    pub base_model: String,
    pub fit: Fit,
}

/// What is durable now.
pub struct Written {
    /// What the job's supervisor is told of it.
    pub event: Option<JobEvent>,
    pub published: Option<Published>,
}

/// A new adapter version, on disk and packed to answer.
pub struct Published {
    pub version: AdapterRef,
    pub adapter: Arc<Adapter>,
}

impl Snapshot {
    pub fn job(&self) -> &JobId {
        &self.job
    }

    pub fn occasion(&self) -> Occasion {
        self.occasion
    }

    /// The adapter as it answers, for a rank that writes no files.
    pub fn packed(&self) -> Result<Option<Arc<Adapter>>, TrainError> {
        let packed = self.adapter.as_ref().map(AdapterCopy::packed);
        packed.transpose()
    }

    /// The PEFT folder, then the state that names its step: each appears whole and durable, in this order, so that a kill
    /// at any moment leaves a state to go on from.
    pub fn write(&self) -> Result<Written, TrainError> {
        let &Snapshot {
            job: _,
            ref folder,
            occasion,
            ref adapter,
            ref state,
            best,
            step,
            trained_tokens,
        } = self;
        let published = adapter
            .as_ref()
            .map(|adapter| adapter.write(folder))
            .transpose()?;
        if let Some((progress, tensors)) = state {
            state::write(folder, progress, tensors)?;
        }
        let version = published.as_ref().map(|published| published.version.clone());
        let event = match occasion {
            Occasion::Checkpoint => version.map(|adapter| JobEvent::Checkpoint { step, adapter, best }),
            Occasion::End => version.map(|adapter| JobEvent::Finished {
                adapter,
                trained_tokens,
            }),
            Occasion::Stop => Some(JobEvent::Kept { step }),
        };
        Ok(Written { event, published })
    }
}

impl AdapterCopy {
    /// Only what answers is written: see [`Fit::pack`].
    fn packed(&self) -> Result<Arc<Adapter>, TrainError> {
        Ok(Arc::new(self.fit.pack(&self.params)?))
    }

    fn write(&self, parent: &std::path::Path) -> Result<Published, TrainError> {
        let adapter = self.packed()?;
        let AdapterCopy {
            name,
            params,
            lora,
            base_model,
            fit,
        } = self;
        let config = PeftConfig { base_model, lora };
        let write = match params.shape == AdapterShape::new(&fit.spec, lora) {
            true => peft::write,
            false => peft::write_own,
        };
        state::replace_folder(parent, name, |folder| Ok(write(folder, params, &config)?))?;
        let folder = parent.join(name);
        let digest = peft::digest(&folder)?;
        Ok(Published {
            version: AdapterRef { digest, folder },
            adapter,
        })
    }
}

/// Flat tensors on their way into a snapshot, some of their numbers in each quantum.
pub(super) struct Copying {
    from: Vec<Tensor>,
    to: Vec<Tensor>,
    /// The tensor that is copied, and how many of its numbers are.
    at: (usize, i64),
}

impl Copying {
    pub fn of(from: Vec<Tensor>) -> Copying {
        Copying {
            to: from.iter().map(Tensor::empty_like).collect(),
            from,
            at: (0, 0),
        }
    }

    /// The numbers themselves: what is to be written is made of them before they change.
    pub fn nothing(from: Vec<Tensor>) -> Copying {
        Copying {
            at: (from.len(), 0),
            to: from.iter().map(Tensor::shallow_clone).collect(),
            from,
        }
    }

    /// Copies the next numbers. The copies, when all are there.
    pub fn advance(mut self) -> Result<Vec<Tensor>, Copying> {
        if self.at.0 == self.from.len() {
            return Ok(self.to);
        }
        let (tensor, start) = self.at;
        let len = self.from[tensor].numel() as i64;
        let n = COPIED_AT_ONCE.min(len - start);
        let part = |tensor: &Tensor| tensor.narrow(0, start, n);
        part(&self.to[tensor]).copy_(&part(&self.from[tensor]));
        self.at = match start + n == len {
            true => (tensor + 1, 0),
            false => (tensor, start + n),
        };
        match self.at.0 == self.from.len() {
            true => Ok(self.to),
            false => Err(self),
        }
    }
}
