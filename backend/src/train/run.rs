//! `tandem train`: a job driven without an engine or a server, quantum by quantum, on one rank or on several. The same
//! trainer, the same files, which are rank 0's.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tandem_core::id::Digest;
use tandem_core::job::{JobEvent, JobSpec, Method, files};
use tandem_kernels::comm::Comm;
use tandem_kernels::weight::Precision;
use tch::{Device, Kind};
use tracing::warn;

use super::mates::{Mates, Sharding};
use super::mesh::Mesh;
use super::profile::Profile;
use super::{Inputs, TrainError, Trainer, state};
use crate::guard;
use crate::model::{Decoder, WeightOptions};
use crate::ranks::{self, Assembled, Errand, Followers, Team};
use crate::weights::{CONFIG, Checkpoint, WEIGHTS, gguf, has_weights};

pub struct RunOptions {
    /// `spec.folder` holds the datasets and receives the results.
    pub spec: JobSpec,
    pub model_folder: PathBuf,
    /// Of the frozen base, for LoRA; of full training what passes multiply in.
    pub weights: WeightOptions,
    /// What full training stores.
    pub save_kind: Kind,
    /// The ranks that train it.
    pub team: Team,
    pub mesh: Mesh,
    /// A trace of so many steps is written to this file.
    pub profile: Option<(PathBuf, u64)>,
}

pub struct Run {
    trainer: Trainer,
    /// `None`: every parameter is trained, in a decoder of the trainer's own.
    base: Option<Decoder>,
    mates: Mates,
    model_folder: PathBuf,
    save_kind: Kind,
    is_finished: bool,
    /// Whether the last quantum ended an optimizer step.
    ended_step: bool,
    profile: Option<Profile>,
    /// Where the time of the steps went that a trace was asked of.
    profiled: Option<String>,
    /// Dropped last.
    _followers: Followers,
}

/// What the other ranks of a run are told.
#[derive(Serialize, Deserialize)]
pub struct Order {
    spec: JobSpec,
    inputs: Inputs,
    model_folder: PathBuf,
    bf16: bool,
    /// What dense linears become, by its name.
    recipe: Option<String>,
    /// Of rank 0's copy of the model, where others may have their own.
    base: Option<Digest>,
    mesh: Mesh,
}

/// The part of one rank.
struct Part {
    trainer: Trainer,
    base: Option<Decoder>,
}

impl Part {
    fn begin(
        spec: JobSpec,
        inputs: &Inputs,
        model_folder: &Path,
        weights: WeightOptions,
        model: Comm,
        mates: &Mates,
    ) -> Result<Part, TrainError> {
        let base = match (&spec.hyper.method, mates.share_frozen()) {
            (Method::Lora(_), Some(shared)) => {
                Some(Decoder::open_shared(model_folder, weights, model, shared)?)
            }
            (Method::Lora(_), None) => Some(Decoder::open_part(model_folder, weights, model)?),
            (Method::Full, _) => None,
        };
        let trainer = match &base {
            Some(base) => Trainer::start_with(spec, inputs, base.fit())?,
            None => Trainer::start_full(spec, inputs, model_folder, weights.precision, mates)?,
        };
        Ok(Part {
            trainer: trainer.beside(mates.clone()),
            base,
        })
    }
}

/// A rank's place: with whom it divides its model, and its mates.
fn placed(mesh: &Mesh, all: Comm, device: Device, spec: &JobSpec) -> Result<(Comm, Mates), TrainError> {
    let trains_all = spec.hyper.method == Method::Full;
    guard::torch(|| mesh.place(all, device, trains_all)).map_err(TrainError::Fault)
}

/// A rank beside rank 0, until the run ends or some rank `stops`. It writes nothing.
pub fn follow(
    order: Order,
    device: Device,
    own_folder: Option<&Path>,
    comm: Comm,
    stops: &dyn Fn() -> bool,
) -> Result<(), TrainError> {
    let Order {
        spec,
        inputs,
        model_folder,
        bf16,
        recipe,
        base,
        mesh,
    } = order;
    let folder = own_folder.unwrap_or(&model_folder);
    if let Some(expected) = base.filter(|_| own_folder.is_some()) {
        ranks::is_rank_0s(Checkpoint::open(folder)?.digest(None)?, expected, &comm)?;
    }
    let weights = ranks::weights(bf16, recipe.as_deref(), device);
    let (model, mates) = placed(&mesh, comm, device, &spec)?;
    let Part { mut trainer, base } = Part::begin(spec, &inputs, folder, weights, model, &mates)?;
    loop {
        let quantum = guard::torch(|| trainer.quantum(base.as_ref())).map_err(TrainError::Fault)??;
        let is_over = quantum.finished
            || ends_step(&quantum.events)
                && guard::torch(|| mates.any(stops())).map_err(TrainError::Fault)?;
        if is_over {
            let part = || {
                trainer.bring_shares(quantum.finished);
                mates.part();
            };
            return guard::torch(part).map_err(TrainError::Fault);
        }
    }
}

/// There is nothing to train: whoever waits for rank 0 ends.
pub fn dismiss(team: &Team, device: Device) -> Result<(), TrainError> {
    if let Team::Meeting { .. } = team {
        let Assembled { comm, followers, .. } = ranks::gather(team, device, None)?;
        let told = guard::torch(|| {
            Errand::Nothing.announce(&comm);
            comm.meet();
        });
        drop((comm, followers));
        told.map_err(TrainError::Fault)?;
    }
    Ok(())
}

fn ends_step(events: &[JobEvent]) -> bool {
    events.iter().any(|event| matches!(event, JobEvent::Step(_)))
}

impl Run {
    pub fn start(options: RunOptions) -> Result<Run, TrainError> {
        let RunOptions {
            spec,
            model_folder,
            weights,
            save_kind,
            team,
            mesh,
            profile,
        } = options;
        let place = mesh.check(team.world()).and_then(|()| match &spec.hyper.method {
            Method::Lora(lora) => lora.fits_ranks(mesh.tensor_parallel as u32),
            Method::Full if mesh.tensor_parallel > 1 => Err(
                "ranks that divide one model train LoRA: for method=full take tensor_parallel_size 1 and \
                 sharding_strategy FULL_SHARD"
                    .to_owned(),
            ),
            Method::Full => Ok(()),
        });
        place.map_err(TrainError::Data)?;
        let Assembled {
            comm,
            device,
            local_world: _,
            followers,
        } = ranks::gather(&team, weights.device, None)?;
        let weights = WeightOptions { device, ..weights };
        let inputs = Inputs::read(&spec.folder)?;
        if comm.world() > 1 {
            // A model that has no weights yet is drawn, alike everywhere.
            let may_differ = matches!(team, Team::Meeting { .. }) && has_weights(&model_folder);
            let base = match may_differ {
                true => Some(Checkpoint::open(&model_folder)?.digest(None)?),
                false => None,
            };
            let order = Errand::Train(Box::new(Order {
                spec: spec.clone(),
                inputs: inputs.clone(),
                model_folder: model_folder.clone(),
                bf16: weights.precision == Precision::Bf16,
                recipe: weights.recipe.map(|recipe| recipe.name().to_owned()),
                base,
                mesh,
            }));
            guard::torch(|| order.announce(&comm)).map_err(TrainError::Fault)?;
        }
        let (model, mates) = placed(&mesh, comm, device, &spec)?;
        let Part { trainer, base } = Part::begin(spec, &inputs, &model_folder, weights, model, &mates)?;
        if mesh.sharding != Sharding::None && !mates.go_in_step() {
            warn!("nothing is shared: {}", mates.why_nothing_is_shared());
        }
        for note in trainer.notes(base.as_ref()) {
            warn!(model = %model_folder.display(), "{note}");
        }
        Ok(Run {
            trainer,
            base,
            mates,
            model_folder,
            save_kind,
            is_finished: false,
            ended_step: false,
            profile: profile.map(|(path, steps)| Profile::new(&path, steps)),
            profiled: None,
            _followers: followers,
        })
    }

    /// That are not trained.
    pub fn frozen_parameters(&self) -> u64 {
        match &self.base {
            Some(base) => base.parameters(),
            None => self.trainer.frozen_parameters(),
        }
    }

    /// What the next quantum has to say; `None` after the last.
    pub fn advance(&mut self) -> Result<Option<Vec<JobEvent>>, TrainError> {
        if self.is_finished {
            return Ok(None);
        }
        let (doing, step, began) = (self.trainer.doing(), self.trainer.step(), Instant::now());
        let (trainer, base) = (&mut self.trainer, self.base.as_ref());
        let quantum = guard::torch(|| trainer.quantum(base)).map_err(TrainError::Fault)??;
        let quantum = quantum.write()?;
        self.ended_step = ends_step(&quantum.events);
        if let Some(mut profile) = self.profile.take() {
            profile.record(doing, step + 1, began, self.ended_step);
            match profile.is_full() || quantum.finished {
                true => self.profiled = Some(profile.write()?),
                false => self.profile = Some(profile),
            }
        }
        if quantum.finished {
            self.write_model()?;
            self.part()?;
            self.is_finished = true;
        }
        Ok(Some(quantum.events))
    }

    /// Whether the run stops here, as it `should`: between two steps, or, with several ranks, behind a step, because some rank
    /// should. To be asked after each [`Run::advance`].
    pub fn stops(&self, should: bool) -> Result<bool, TrainError> {
        match self.mates.are_there() {
            false => Ok(should && self.trainer.is_between_steps()),
            true if self.ended_step => guard::torch(|| self.mates.any(should)).map_err(TrainError::Fault),
            true => Ok(false),
        }
    }

    /// Writes the state, from which a run in the same folder goes on. Returns the optimizer steps done.
    pub fn keep(&self) -> Result<u64, TrainError> {
        let snapshot = guard::torch(|| self.trainer.snapshot()).map_err(TrainError::Fault)?;
        snapshot.write()?;
        self.part()?;
        Ok(self.trainer.step())
    }

    /// Once, when the trace that was asked for is written: its place, and what took how much of the time.
    pub fn profiled(&mut self) -> Option<String> {
        self.profiled.take()
    }

    fn part(&self) -> Result<(), TrainError> {
        guard::torch(|| self.mates.part()).map_err(TrainError::Fault)
    }

    /// What there is at the end: a PEFT folder, or the model's.
    pub fn result(&self) -> PathBuf {
        let folder = &self.trainer.spec().folder;
        match self.base {
            Some(_) => folder.join(files::ADAPTER),
            None => folder.clone(),
        }
    }

    /// After full training: the weights, and beside them what else the model's folder has.
    fn write_model(&self) -> Result<(), TrainError> {
        let weights = guard::torch(|| self.trainer.full_weights(self.save_kind));
        let Some(weights) = weights.map_err(TrainError::Fault)? else {
            return Ok(());
        };
        let folder = &self.trainer.spec().folder;
        state::replace(folder, WEIGHTS, &weights)?;
        match *folder == self.model_folder {
            true => Ok(()),
            false => copy_configuration(&self.model_folder, folder),
        }
    }
}

fn copy_configuration(from: &Path, to: &Path) -> Result<(), TrainError> {
    let copied = |error, file: &str| TrainError::File {
        file: file.to_owned(),
        error,
    };
    if gguf::is_gguf(from) {
        // The tokenizer's files are the caller's to make: text is not known here.
        let config = Value::Object(gguf::Model::open(from)?.config()?);
        return std::fs::write(to.join(CONFIG), config.to_string()).map_err(|error| copied(error, CONFIG));
    }
    let entries = std::fs::read_dir(from).map_err(|error| copied(error, "the model folder"))?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_configuration = name.ends_with(".json") || name.ends_with(".jinja");
        if is_configuration && !name.ends_with(".index.json") {
            std::fs::copy(entry.path(), to.join(&name)).map_err(|error| copied(error, &name))?;
        }
    }
    Ok(())
}
