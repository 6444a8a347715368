//! What fewer bits cost: perplexity and divergence (KL) from the model as it is stored, bytes of its weights, and the loss of
//! ten LoRA steps, for each format, on one text.
//!
//!   python -c "import sys, tokenizers as t; print(t.Tokenizer.from_file(sys.argv[1]).encode(open(sys.argv[2]).read()).ids)" \
//!       DIR/tokenizer.json TEXT > tokens.json
//!   target/release/quality --model DIR --tokens tokens.json [int8] [int4] [nf4] [OTHER-FOLDER]

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use tandem_backend::model::{Batch, Decoder, WeightOptions};
use tandem_backend::start;
use tandem_backend::train::Trainer;
use tandem_core::TokenId;
use tandem_core::dataset::{self, Example, Group};
use tandem_core::job::{
    Hyper, JobEvent, JobSpec, Life, Lora, Method, Objective, SaveStrategy, Schedule, files,
};
use tandem_kernels::weight::{Precision, Recipe};
use tch::{Device, Kind, Tensor};

/// Measures what formats of weights cost in quality
#[derive(Parser)]
struct Options {
    #[arg(long)]
    model: PathBuf,
    /// A JSON list of token ids
    #[arg(long)]
    tokens: PathBuf,
    /// Tokens that are scored together
    #[arg(long, default_value_t = 512)]
    window: usize,
    /// Windows
    #[arg(long, default_value_t = 8)]
    windows: usize,
    /// Optimizer steps of four windows of 256 tokens each; 0 for none
    #[arg(long, default_value_t = 10)]
    train_steps: u64,
    /// int8, int4, nf4, or the folder of the same model in another format
    formats: Vec<String>,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let text = std::fs::read(&options.tokens).context("the tokens")?;
    let tokens: Vec<TokenId> = serde_json::from_slice(&text).context("a JSON list of tokens")?;
    start::set_threads(Device::Cpu, None);
    let _no_grad = tch::no_grad_guard();
    let dense = Decoder::load(&options.model, Precision::Bf16, Device::Cpu)?;
    let expected = scores(&dense, &tokens, &options);
    report(
        "as stored",
        &dense,
        &expected,
        &expected,
        losses(&dense, &tokens, &options)?,
    );
    drop(dense);
    for format in &options.formats {
        let recipe = Recipe::ALL.into_iter().find(|recipe| recipe.name() == format);
        let folder = match recipe {
            Some(_) => &options.model,
            None => Path::new(format),
        };
        let weights = WeightOptions {
            recipe,
            ..WeightOptions::new(Precision::Bf16, Device::Cpu)
        };
        let decoder = Decoder::open(folder, weights)?;
        let got = scores(&decoder, &tokens, &options);
        report(
            format,
            &decoder,
            &got,
            &expected,
            losses(&decoder, &tokens, &options)?,
        );
    }
    Ok(())
}

/// Log-probabilities `[window, V]` of each window, and their targets `[window]`.
fn scores(decoder: &Decoder, tokens: &[TokenId], options: &Options) -> Vec<(Tensor, Tensor)> {
    let windows = tokens.chunks_exact(options.window + 1).take(options.windows);
    windows
        .map(|window| {
            let inputs = &window[..options.window];
            let positions: Vec<i64> = (0..inputs.len() as i64).collect();
            let hidden = decoder.forward(&Batch {
                tokens: inputs,
                positions: &(&positions).into(),
                context: tandem_backend::model::Context::Packed {
                    cu_seqlens: &[0, inputs.len()],
                },
                lora: &[],
            });
            let targets: Vec<i64> = window[1..].iter().map(|&token| i64::from(token)).collect();
            let log_probs = decoder.head(&hidden, &[]).log_softmax(-1, Kind::Float);
            (log_probs, Tensor::from_slice(&targets))
        })
        .collect()
}

fn report(
    name: &str,
    decoder: &Decoder,
    got: &[(Tensor, Tensor)],
    expected: &[(Tensor, Tensor)],
    losses: Vec<f64>,
) {
    let (mut loss, mut divergence, mut same, mut rows) = (0.0, 0.0, 0.0, 0.0);
    for ((ours, targets), (theirs, _)) in got.iter().zip(expected) {
        let chosen = ours.gather(1, &targets.unsqueeze(1), false);
        loss -= chosen.sum(Kind::Double).double_value(&[]);
        divergence += (theirs.exp() * (theirs - ours))
            .sum(Kind::Double)
            .double_value(&[]);
        let equal = ours.argmax(1, false).eq_tensor(&theirs.argmax(1, false));
        same += equal.sum(Kind::Double).double_value(&[]);
        rows += targets.numel() as f64;
    }
    let formats: Vec<String> = decoder
        .formats()
        .iter()
        .map(|(format, bytes)| format!("{:.1} MiB {format}", *bytes as f64 / f64::from(1 << 20)))
        .collect();
    println!(
        "{name:12} perplexity {:9.4}  KL {:.6}  same first choice {:.2} %  {}",
        (loss / rows).exp(),
        divergence / rows,
        same / rows * 100.0,
        formats.join(", ")
    );
    let losses: Vec<String> = losses.iter().map(|loss| format!("{loss:.4}")).collect();
    println!("{:12} LoRA losses {}", "", losses.join(" "));
}

/// Of each step.
fn losses(decoder: &Decoder, tokens: &[TokenId], options: &Options) -> anyhow::Result<Vec<f64>> {
    const LEN: usize = 256;
    const BATCH: u32 = 4;
    if options.train_steps == 0 {
        return Ok(vec![]);
    }
    let folder = tempfile::tempdir()?;
    let examples: Vec<Group> = tokens
        .chunks_exact(LEN)
        .cycle()
        .take(options.train_steps as usize * BATCH as usize)
        .map(|tokens| Example {
            tokens: tokens.to_vec(),
            weights: vec![1.0; LEN],
        })
        .map(Group::from)
        .collect();
    std::fs::write(folder.path().join(files::TRAIN), dataset::encode(&examples))?;
    let lora = Lora {
        r: 16,
        alpha: 32.0,
        dropout: 0.0,
        target_modules: decoder.spec.lora_targets(),
        use_rslora: false,
        use_dora: false,
    };
    let spec = JobSpec {
        id: "ftjob-bench".parse().expect("a job\'s id"),
        folder: folder.path().to_owned(),
        tenant: String::new(),
        base_model: "bench".to_owned(),
        hyper: Hyper {
            n_epochs: 1.0,
            max_steps: None,
            max_steps_per_epoch: None,
            batch_size: BATCH,
            gradient_accumulation_steps: 1,
            learning_rate: 1e-3,
            lr_scheduler: Schedule::Constant,
            warmup_steps: 0,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            optimizer: Default::default(),
            max_grad_norm: 1.0,
            loraplus_lr_ratio: None,
            neftune_noise_alpha: None,
            seed: 1,
            max_seq_length: 1024,
            packing: false,
            shuffle: true,
            save_strategy: SaveStrategy::Steps,
            save_steps: 0,
            eval_steps: 0,
            selection: None,
            objective: Objective::default(),
            frozen_layers: 0,
            method: Method::Lora(lora),
        },
        life: Life::default(),
    };
    let mut trainer = Trainer::start(spec, decoder)?;
    let mut losses = vec![];
    loop {
        let quantum = trainer.quantum(Some(decoder))?;
        for event in &quantum.events {
            if let JobEvent::Step(step) = event {
                losses.push(step.loss);
            }
        }
        if quantum.finished {
            return Ok(losses);
        }
    }
}
