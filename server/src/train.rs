//! `tandem train`: fine-tuning without a server, from a YAML file and `key=value` overrides. The same tokenisation,
//! defaults and trainer as a job of the API. Not here: the training (backend), the defaults (router).

mod settings;

use std::fs::File;
use std::io::{self, BufReader, Write};
use std::path::{Path, PathBuf};

use tandem_backend::train::run::{self, RunOptions};
use tandem_core::dataset::{self, Example};
use tandem_core::id::JobId;
use tandem_core::job::{Hyper, JobEvent, JobSpec, Life, Method, files};
use tandem_router::hyper::{self, Bounds, Facts};
use tandem_text::dataset::{BadLine, Options, read_rows, tokenize};
use tandem_text::{TextError, Tokenizer};

use settings::{Adam, Settings, SettingsError, Tuning};

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("{}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{}", path.display())]
    Row { path: PathBuf, source: BadLine },
    #[error("{}, line {line}", path.display())]
    Tokens {
        path: PathBuf,
        line: u64,
        source: TextError,
    },
    #[error("{} has no example with something to learn within {max_seq_length} tokens", path.display())]
    Empty { path: PathBuf, max_seq_length: u32 },
    #[error(transparent)]
    Tokenizer(TextError),
    #[error(transparent)]
    Load(#[from] tandem_backend::LoadError),
    #[error(transparent)]
    Train(#[from] tandem_backend::train::TrainError),
}

pub fn run(args: &[String]) -> Result<(), TrainError> {
    if args == ["help"] {
        print!("{}", settings::help());
        return Ok(());
    }
    let Settings {
        model,
        training_file,
        validation_file,
        output_dir,
        tuning,
        adam,
        dtype,
        device,
        request,
    } = settings::read(args)?;
    let model = model
        .canonicalize()
        .map_err(|source| TrainError::File { path: model, source })?;
    let tokenizer = Tokenizer::from_folder(&model).map_err(TrainError::Tokenizer)?;
    let spec = tandem_backend::family::read_spec(&model)?;
    let bounds = Bounds {
        max_model_len: u32::try_from(spec.max_positions).unwrap_or(u32::MAX),
        max_lora_rank: u32::MAX,
        lora_targets: &spec.lora_targets(),
    };
    let options = Options {
        max_seq_length: hyper::max_seq_length(&request, bounds),
        prompt_loss_weight: request.prompt_loss_weight.unwrap_or(0.0) as f32,
    };
    std::fs::create_dir_all(&output_dir).map_err(|source| TrainError::File {
        path: output_dir.clone(),
        source,
    })?;
    let facts = convert(
        &training_file,
        &tokenizer,
        &options,
        &output_dir.join(files::TRAIN),
    )?;
    if let Some(path) = validation_file {
        convert(&path, &tokenizer, &options, &output_dir.join(files::VALID))?;
    }
    let hyper = with(hyper::choose(&request, bounds, facts), adam, tuning);
    println!("{hyper:#?}");
    let spec = JobSpec {
        id: JobId("train".to_owned()),
        folder: output_dir,
        base_model: model.display().to_string(),
        hyper,
        life: Life::default(),
    };
    let mut total_steps = 0;
    let result = run::run(RunOptions::new(spec, model, &dtype, &device)?, |event| {
        if let JobEvent::Started {
            total_steps: total, ..
        } = event
        {
            total_steps = *total;
        }
        println!("{}", line(event, total_steps));
    })?;
    println!("written to {}", result.display());
    Ok(())
}

/// What an API's client cannot ask.
fn with(mut hyper: Hyper, adam: Adam, tuning: Tuning) -> Hyper {
    let Adam {
        beta1,
        beta2,
        epsilon,
    } = adam;
    hyper.adam_beta1 = beta1.unwrap_or(hyper.adam_beta1);
    hyper.adam_beta2 = beta2.unwrap_or(hyper.adam_beta2);
    hyper.adam_epsilon = epsilon.unwrap_or(hyper.adam_epsilon);
    if tuning == Tuning::Full {
        hyper.method = Method::Full;
    }
    hyper
}

/// One JSONL file to one dataset file.
fn convert(
    source: &Path,
    tokenizer: &Tokenizer,
    options: &Options,
    target: &Path,
) -> Result<Facts, TrainError> {
    let path = || source.to_owned();
    let file = File::open(source).map_err(|source| TrainError::File { path: path(), source })?;
    let (mut examples, mut left_out) = (Vec::<Example>::new(), 0_u64);
    for row in read_rows(BufReader::new(file)) {
        let (line, row) = row.map_err(|source| TrainError::Row { path: path(), source })?;
        match tokenize(&row, tokenizer, options) {
            Ok(example) => examples.push(example),
            Err(TextError::NoLabels { .. }) => left_out += 1,
            Err(source) => {
                return Err(TrainError::Tokens {
                    path: path(),
                    line,
                    source,
                });
            }
        }
    }
    if examples.is_empty() {
        return Err(TrainError::Empty {
            path: path(),
            max_seq_length: options.max_seq_length,
        });
    }
    let tokens = examples.iter().map(|example| example.tokens.len() as u64).sum();
    println!(
        "{}: {} examples, {tokens} tokens, {left_out} left out",
        source.display(),
        examples.len()
    );
    let write = || -> io::Result<()> {
        let mut file = File::create(target)?;
        file.write_all(&dataset::encode(&examples))?;
        file.sync_all()
    };
    write().map_err(|source| TrainError::File {
        path: target.to_owned(),
        source,
    })?;
    Ok(Facts {
        examples: examples.len() as u64,
        tokens,
    })
}

fn line(event: &JobEvent, total_steps: u64) -> String {
    match event {
        JobEvent::Started {
            total_steps,
            resumed_from,
            examples,
            epoch_tokens,
            trainable_parameters,
            ..
        } => {
            let resumed = resumed_from.map_or_else(String::new, |step| format!(", resumed from step {step}"));
            format!(
                "{total_steps} steps, {examples} examples, {epoch_tokens} tokens an epoch, \
                 {trainable_parameters} trainable parameters{resumed}"
            )
        }
        JobEvent::Step(step) => format!(
            "step {}/{total_steps} epoch {:.2} loss {:.4} accuracy {:.3} grad_norm {:.3} lr {:.2e} {:.0} tokens/s",
            step.step,
            step.epoch,
            step.loss,
            step.token_accuracy,
            step.grad_norm,
            step.learning_rate,
            step.tokens_per_second
        ),
        JobEvent::Validated {
            step,
            loss,
            token_accuracy,
        } => {
            format!("step {step}/{total_steps} validation loss {loss:.4} accuracy {token_accuracy:.3}")
        }
        JobEvent::Checkpoint { step, adapter } => format!("step {step}: saved {}", adapter.folder.display()),
        JobEvent::Finished { trained_tokens, .. } => format!("finished after {trained_tokens} tokens"),
        JobEvent::Failed { message } => format!("failed: {message}"),
        JobEvent::Refused { message } => format!("not begun: {message}"),
        JobEvent::Cancelled { step } => format!("cancelled at step {step}"),
        JobEvent::Kept { step } => format!("stopped after step {step}"),
    }
}
