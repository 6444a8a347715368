//! Whole runs of the trainer against torch.optim.AdamW: the same examples in the same order from the same numbers.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use tandem_backend::lora::peft;
use tandem_backend::model::{Decoder, WeightOptions};
use tandem_backend::train::evaluation::Evaluation;
use tandem_backend::train::learner::{Learner, Update};
use tandem_backend::train::mates::Mates;
use tandem_backend::train::pass::{Advanced, Context, Look, Pass, Trained};
use tandem_backend::train::plan::DataPlan;
use tandem_backend::train::slice::{self, Slice};
use tandem_backend::train::{Inputs, Quantum, Trainer};
use tandem_backend::weights::merge;
use tandem_core::dataset::{self, Example, Group};
use tandem_core::job::{
    Hyper, JobEvent, JobSpec, Life, Lora, Method, Objective, Optimizer, SaveStrategy, Schedule, StepReport,
    files,
};
use tandem_kernels::adamw::AdamW;
use tandem_kernels::loss::LogProbs;
use tandem_kernels::weight::Precision;
use tch::{Kind, Tensor};

use crate::fixture::{Fixture, Table, examples, fixtures_folder, max_difference, numbers};
use crate::run::{Sequence, base, packed, paged};

const LOSS: f64 = 1e-5;
const GRAD_NORM: f64 = 1e-5;
/// After ten steps: AdamW divides by a root of second moments, which blows up rounding of small gradients.
pub const ADAPTER: f64 = 1e-5;

#[test]
fn ten_lora_steps_are_pefts() {
    let fixture = Fixture::open("gqa_tied");
    let run = &fixture.numbers["lora_training"];
    let decoder = fixture.decoder(Precision::F32);
    let before = packed(&decoder, &[base(&fixture.tokens("long"))]).remove(0);
    let job = lora_job(run);
    let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("the job starts");
    let reports = finish(&mut trainer, Some(&decoder));

    let mut table = compare_steps("peft", run, &job, &reports);
    for (name, ours) in tensors(
        &job.spec
            .folder
            .join(files::ADAPTER)
            .join("adapter_model.safetensors"),
    ) {
        let expected = fixture.tensor(&format!("lora_training.final.{name}"));
        let short = name.trim_start_matches("base_model.model.model.layers.");
        table.add(short, "", max_difference(&ours, expected), ADAPTER);
    }
    table.judge("ten LoRA steps against peft and torch.optim.AdamW");

    let after = packed(&decoder, &[base(&fixture.tokens("long"))]).remove(0);
    assert_eq!(before, after, "training changed the base");
}

/// DoRA as peft trains it, LoRA+ as it groups its numbers, NEFTune as transformers adds its noise (drawn as ours is).
#[test]
fn ten_steps_of_dora_loraplus_and_neftune_are_pefts() {
    let fixture = Fixture::open("gqa_tied");
    let runs =
        std::fs::read(fixture.folder.with_file_name("variants.json")).expect("scripts/fixtures made it");
    let runs: BTreeMap<String, Value> = serde_json::from_slice(&runs).expect("runs by name");
    assert_eq!(runs.keys().collect::<Vec<_>>(), ["dora", "loraplus", "neftune"]);
    let decoder = fixture.decoder(Precision::F32);
    for (name, run) in &runs {
        let job = lora_job(run);
        let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("the job starts");
        let reports = finish(&mut trainer, Some(&decoder));
        let mut table = compare_steps(name, run, &job, &reports);
        let pefts = fixture
            .folder
            .with_file_name(name)
            .join("adapter_model.safetensors");
        if pefts.exists() {
            let trained = tensors(
                &job.spec
                    .folder
                    .join(files::ADAPTER)
                    .join("adapter_model.safetensors"),
            );
            let expected: BTreeMap<String, Tensor> = tensors(&pefts).into_iter().collect();
            assert_eq!(trained.len(), expected.len());
            for (of, ours) in trained {
                let short = of.trim_start_matches("base_model.model.model.layers.");
                table.add(short, "", max_difference(&ours, &expected[&of]), ADAPTER);
            }
        }
        table.judge(&format!("ten steps of {name}"));
    }
}

/// peft's trained DoRA adapter, served: alone, beside others, in pages, and merged.
#[test]
fn a_dora_adapter_answers_as_in_peft() {
    let fixture = Fixture::open("gqa_tied");
    let folder = fixture.folder.with_file_name("dora");
    let decoder = fixture.decoder(Precision::F32);
    let read = peft::read(&folder, &decoder.spec, 64).expect("peft's adapter is read");
    let dora = decoder.fit().pack(&read.params).expect("it packs");
    let plain = fixture.adapter("all", &decoder);
    let tokens = fixture.tokens("long");
    let expected = &tensors(&folder.join("expected.safetensors"))[0].1;
    let by = |adapter| Sequence {
        tokens: &tokens,
        adapter: Some(adapter),
    };
    let alone = packed(&decoder, &[by(&plain), base(&tokens)]);
    let mixed = packed(&decoder, &[by(&plain), by(&dora), base(&tokens)]);
    let pages = paged(&decoder, &[by(&dora)], 7).remove(0);
    assert_eq!(
        (&mixed[0], &mixed[2]),
        (&alone[0], &alone[1]),
        "others pay nothing"
    );
    let merged = tempfile::tempdir().expect("a folder");
    let merged = merged.path().join("merged");
    merge(&fixture.folder, &folder, &merged).expect("it is merged");
    let merged = Decoder::load(&merged, Precision::F32, tch::Device::Cpu).expect("it loads");
    let merged = packed(&merged, &[base(&tokens)]).remove(0);
    let mut table = Table::default();
    for (what, logits) in [("packed", &mixed[1]), ("paged", &pages), ("merged", &merged)] {
        table.add("dora", what, max_difference(logits, expected), 1e-4);
    }
    table.judge("a DoRA adapter's logits against peft");
}

/// What peft trained.
pub fn lora_job(run: &Value) -> Job {
    let lora = Lora {
        r: run["lora"]["r"].as_u64().expect("a rank") as u32,
        alpha: run["lora"]["lora_alpha"].as_f64().expect("alpha"),
        dropout: 0.0,
        target_modules: serde_json::from_value(run["lora"]["target_modules"].clone()).expect("names"),
        use_rslora: false,
        use_dora: run["lora"]["use_dora"].as_bool().unwrap_or(false),
    };
    Job::new(
        &examples(&run["examples"]),
        hyper_of(&run["hyper"], Method::Lora(lora)),
    )
}

#[test]
fn five_full_steps_are_torchs() {
    let fixture = Fixture::open("gqa_tied");
    let run = &fixture.numbers["full_training"];
    let job = Job::new(&examples(&run["examples"]), hyper_of(&run["hyper"], Method::Full));
    let inputs = Inputs::read(&job.spec.folder).expect("the job's files");
    let mut trainer = Trainer::start_full(
        job.spec.clone(),
        &inputs,
        &fixture.folder,
        Precision::F32,
        &Mates::none(),
    )
    .expect("the job starts");
    let reports = finish(&mut trainer, None);
    compare_steps("full", run, &job, &reports).judge("five full steps against torch.optim.AdamW");

    // What was trained is a checkpoint: it loads, and scores as the trainer did.
    let folder = tempfile::tempdir().expect("a folder");
    let weights = trainer
        .full_weights(Kind::Float)
        .expect("full training has weights");
    std::fs::write(folder.path().join("model.safetensors"), weights).expect("it is written");
    std::fs::copy(
        fixture.folder.join("config.json"),
        folder.path().join("config.json"),
    )
    .expect("it is copied");
    let trained =
        Decoder::load(folder.path(), Precision::F32, tch::Device::Cpu).expect("the trained model loads");
    let untrained = fixture.decoder(Precision::F32);
    let tokens = fixture.tokens("long");
    let logits = [&trained, &untrained].map(|decoder| packed(decoder, &[base(&tokens)]).remove(0));
    assert!(
        max_difference(&logits[0], &logits[1]) > 0.1,
        "five steps changed nothing"
    );
}

/// Multiplied in bfloat16, learned in float32: losses follow torch's in float32 as far as bfloat16 tells, the first is that of the base
/// that serves in it, and steps too small for bfloat16 add up.
#[test]
fn full_steps_in_bfloat16_have_float32_masters() {
    let fixture = Fixture::open("gqa_tied");
    let run = &fixture.numbers["full_training"];
    let hyper = hyper_of(&run["hyper"], Method::Full);
    let small = Hyper {
        learning_rate: 1e-6,
        weight_decay: 0.0,
        ..hyper.clone()
    };
    let train = |hyper: Hyper| {
        let job = Job::new(&examples(&run["examples"]), hyper);
        let inputs = Inputs::read(&job.spec.folder).expect("the job's files");
        let trainer = Trainer::start_full(
            job.spec,
            &inputs,
            &fixture.folder,
            Precision::Bf16,
            &Mates::none(),
        );
        let mut trainer = trainer.expect("the job starts");
        let reports = finish(&mut trainer, None);
        let weights = trainer
            .full_weights(Kind::Float)
            .expect("full training has weights");
        (reports, weights)
    };
    let (reports, _) = train(hyper.clone());
    let losses = numbers(&run["losses"]);
    assert_eq!(reports.len(), losses.len());
    let mut table = Table::default();
    for (report, expected) in reports.iter().zip(&losses) {
        let what = format!("step {:2} loss", report.step);
        table.add("bf16", &what, (report.loss - expected).abs() / expected, 5e-3);
    }
    table.judge("full steps in bfloat16 beside torch's in float32");
    assert!(losses[0] - reports[reports.len() - 1].loss > 0.1, "it learns");

    let all = examples(&run["examples"]);
    let steps: Vec<Vec<Vec<usize>>> = serde_json::from_value(run["steps"].clone()).expect("example numbers");
    let first = steps[0]
        .iter()
        .flatten()
        .map(|&i| all[i].clone())
        .map(Group::from);
    let weights = WeightOptions::new(Precision::Bf16, tch::Device::Cpu);
    let data = dataset::encode(&first.collect::<Vec<_>>());
    let evaluation = Evaluation::open(&fixture.folder, weights, None, &data, "rows");
    let mut evaluation = evaluation.expect("it opens");
    let evaluated = loop {
        if let Some(evaluated) = evaluation.advance().expect("a slice") {
            break evaluated;
        }
    };
    assert!(
        (evaluated.loss - reports[0].loss).abs() < 1e-6,
        "{evaluated:?} and {}",
        reports[0].loss
    );

    let (_, weights) = train(small);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("model.safetensors");
    std::fs::write(&file, weights).expect("it is written");
    let before: BTreeMap<String, Tensor> = tensors(&fixture.folder.join("model.safetensors"))
        .into_iter()
        .collect();
    for (name, now) in tensors(&file) {
        let moved = max_difference(&now, &before[&name]);
        assert!(moved > 0.0 && moved < 1e-5, "{name} moved by {moved}");
    }
}

/// Layers that are not trained, as llama-recipes freezes them: what lies before and behind them learns as in torch, and they stay
/// what they were, to the bit.
#[test]
fn frozen_layers_are_torchs() {
    let runs = std::fs::read(fixtures_folder().join("frozen.json")).expect("scripts/fixtures made it");
    let runs: Vec<Value> = serde_json::from_slice(&runs).expect("runs");
    assert_eq!(runs.len(), 3);
    for run in &runs {
        let name = run["fixture"].as_str().expect("a name");
        let folder = fixtures_folder().join(name);
        let hyper = Hyper {
            frozen_layers: run["frozen_layers"].as_u64().expect("a number") as u32,
            ..hyper_of(&run["hyper"], Method::Full)
        };
        let too_many = Hyper {
            frozen_layers: 99,
            ..hyper.clone()
        };
        let job = Job::new(&examples(&run["examples"]), hyper);
        let inputs = Inputs::read(&job.spec.folder).expect("the job's files");
        let start =
            |spec: JobSpec| Trainer::start_full(spec, &inputs, &folder, Precision::F32, &Mates::none());
        let mut trainer = start(job.spec.clone()).expect("the job starts");
        let reports = finish(&mut trainer, None);
        let table = compare_steps(name, run, &job, &reports);
        table.judge(&format!("steps of {name} with frozen layers"));

        let trained = run["trained"].as_u64().expect("a number");
        let frozen = run["frozen"].as_u64().expect("a number");
        assert_eq!(trainer.frozen_parameters(), frozen);
        let place = tempfile::tempdir().expect("a folder");
        let file = place.path().join("model.safetensors");
        let weights = trainer
            .full_weights(Kind::Float)
            .expect("full training has weights");
        std::fs::write(&file, weights).expect("it is written");
        let before: BTreeMap<String, Tensor> =
            tensors(&folder.join("model.safetensors")).into_iter().collect();
        let after = tensors(&file);
        assert_eq!(after.len(), before.len(), "{name}");
        let mut numbers = [0, 0];
        for (tensor, now) in after {
            let is_frozen = tensor.starts_with("model.layers.0.");
            let difference = max_difference(&now, &before[&tensor]);
            assert_eq!(
                difference == 0.0,
                is_frozen,
                "{name}: {tensor} moved by {difference}"
            );
            numbers[usize::from(is_frozen)] += now.numel() as u64;
        }
        assert_eq!(numbers, [trained, frozen], "{name}");

        let refused = start(JobSpec {
            hyper: too_many,
            ..job.spec.clone()
        });
        let message = refused.map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("at most 2"), "{message}");
    }
}

/// SGD as torch has it, Lion and AdamW with 8-bit moments as bitsandbytes, Adafactor as transformers: of adapters, and of whole
/// models, whose norms go another way than their matrices.
#[test]
fn steps_of_other_optimizers_are_theirs() {
    let fixture = Fixture::open("gqa_tied");
    let runs =
        std::fs::read(fixture.folder.with_file_name("optimizers.json")).expect("scripts/fixtures made it");
    let runs: BTreeMap<String, Value> = serde_json::from_slice(&runs).expect("runs by name");
    assert_eq!(runs.len(), 8);
    let decoder = fixture.decoder(Precision::F32);
    for (name, run) in &runs {
        let (job, reports) = match run["lora"].is_null() {
            false => {
                let job = lora_job(run);
                let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("the job starts");
                let reports = finish(&mut trainer, Some(&decoder));
                (job, reports)
            }
            true => {
                let job = Job::new(&examples(&run["examples"]), hyper_of(&run["hyper"], Method::Full));
                let inputs = Inputs::read(&job.spec.folder).expect("the job's files");
                let trainer = Trainer::start_full(
                    job.spec.clone(),
                    &inputs,
                    &fixture.folder,
                    Precision::F32,
                    &Mates::none(),
                );
                let reports = finish(&mut trainer.expect("the job starts"), None);
                (job, reports)
            }
        };
        // A moment between two codes of 8 bits goes either way.
        let times = if name.contains("8bit") { 100.0 } else { 1.0 };
        let table = compare_steps(name, run, &job, &reports).loosened(times);
        table.judge(&format!("steps of {name}"));
    }
}

/// What a client does that drives training call by call: passes whose weights come after their forward add up to the
/// bits of passes whose weights are known, and a token that is wanted twice behind one row counts twice.
#[test]
fn weights_that_come_later_make_the_same_gradient() {
    let fixture = Fixture::open("gqa_tied");
    let decoder = fixture.decoder(Precision::F32);
    let run = &fixture.numbers["lora_training"];
    let Method::Lora(lora) = lora_job(run).spec.hyper.method else {
        unreachable!("it trains an adapter")
    };
    let _no_grad = tch::no_grad_guard();
    let mut learner = Learner::lora(lora, decoder.fit(), 3).expect("it starts");
    let mut slices = slice::slices(examples(&run["examples"]).iter(), tch::Device::Cpu);
    slices.truncate(2);
    let update = Update {
        b_ratio: 1.0,
        learning_rate: 1e-2,
        adamw: AdamW {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.0,
        },
        max_grad_norm: 0.0,
        step: 1,
    };
    // So that B is not zero.
    through(&learner, &decoder, &slices[0], false);
    learner.update(Some(&decoder), &update).expect("a step");

    let mut gradient = |slices: &[Slice], is_later: bool| {
        learner.forget_gradient();
        let found: Vec<LogProbs> = slices
            .iter()
            .map(|slice| through(&learner, &decoder, slice, is_later))
            .collect();
        let Trained::Adapter { adapter, gradient } = learner.trained() else {
            unreachable!("it trains an adapter")
        };
        for (slice, found) in slices.iter().zip(&found) {
            let mut look = Look::enter(slice, &decoder, Some(adapter));
            let looked = loop {
                match look.advance(slice, &decoder, Some(adapter)) {
                    Ok(found) => break found,
                    Err(next) => look = next,
                }
            };
            assert_eq!(looked.log_probs, found.log_probs);
        }
        gradient.flat.copy()
    };
    let known = gradient(&slices, false);
    assert!(known.abs().max().double_value(&[]) > 0.0);
    assert_eq!(known, gradient(&slices, true));

    let mut halves = slices.clone();
    for slice in &mut halves {
        let half = |&(row, token, weight): &slice::Label| [(row, token, 0.5 * weight); 2];
        slice.labels = slice.labels.iter().flat_map(half).collect();
    }
    let twice = gradient(&halves, true);
    let far = max_difference(&twice, &known) / known.abs().max().double_value(&[]);
    assert!(far < 1e-6, "{far}");
}

/// Forward and back; adds to the gradient.
fn through(learner: &Learner, decoder: &Decoder, slice: &Slice, is_later: bool) -> LogProbs {
    let context = Context {
        decoder,
        learns: &[learner.trained().into()],
        // The second slice's layers run again.
        keep_bytes: (4 * decoder.saved_numbers() * slice.tokens.len()) as i64 - i64::from(is_later),
    };
    let mut pass = match is_later {
        false => Pass::enter(&[(slice, 0)], &context),
        true => Pass::enter_to_be_weighed((slice, 0), &context),
    };
    loop {
        pass = match pass.advance(&context) {
            Advanced::On(pass) => pass,
            Advanced::Scored(scored) => {
                let labels = &scored.slice().labels;
                let dlogp: Vec<f32> = labels.iter().map(|&(_, _, weight)| -weight).collect();
                scored.weighed(&dlogp)
            }
            Advanced::Through(mut found) => return found.remove(0),
        };
    }
}

pub fn compare_steps(who: &str, run: &Value, job: &Job, reports: &[StepReport]) -> Table {
    let mut plan = DataPlan::new(job.groups.iter().map(Group::tokens).collect(), &job.spec.hyper);
    let steps: Vec<Vec<Vec<usize>>> = serde_json::from_value(run["steps"].clone()).expect("example numbers");
    assert_eq!(
        (0..plan.total()).map(|step| plan.step(step)).collect::<Vec<_>>(),
        steps,
        "the order of examples"
    );
    assert_eq!(reports.len(), steps.len());
    let mut table = Table::default();
    for (i, report) in reports.iter().enumerate() {
        let expected = |what: &str| numbers(&run[what])[i];
        let what = |name: &str| format!("step {:2} {name}", i + 1);
        table.add(who, &what("loss"), (report.loss - expected("losses")).abs(), LOSS);
        let norm = expected("grad_norms");
        table.add(
            who,
            &what("gradient norm"),
            (report.grad_norm - norm).abs() / norm,
            GRAD_NORM,
        );
        table.add(
            who,
            &what("learning rate"),
            (report.learning_rate - expected("learning_rates")).abs(),
            1e-12,
        );
    }
    table
}

/// A job's folder with its dataset.
pub struct Job {
    pub spec: JobSpec,
    pub groups: Vec<Group>,
    _folder: tempfile::TempDir,
}

impl Job {
    pub fn new(examples: &[Example], hyper: Hyper) -> Job {
        let groups = examples.iter().cloned().map(Group::from);
        Job::of(groups.collect(), hyper)
    }

    pub fn of(groups: Vec<Group>, hyper: Hyper) -> Job {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join(files::TRAIN), dataset::encode(&groups)).expect("it is written");
        let id = "ftjob-numerics".parse().unwrap();
        let spec = JobSpec {
            id,
            folder: folder.path().to_owned(),
            tenant: String::new(),
            base_model: "fixture".to_owned(),
            hyper,
            life: Life::default(),
        };
        Job {
            spec,
            groups,
            _folder: folder,
        }
    }
}

/// Runs to the end.
pub fn finish(trainer: &mut Trainer, base: Option<&Decoder>) -> Vec<StepReport> {
    let mut reports = vec![];
    loop {
        let quantum = quantum(trainer, base);
        reports.extend(quantum.events.into_iter().filter_map(|event| match event {
            JobEvent::Step(report) => Some(report),
            _ => None,
        }));
        if quantum.finished {
            return reports;
        }
    }
}

/// A quantum, and what it leaves to write.
pub fn quantum(trainer: &mut Trainer, base: Option<&Decoder>) -> Quantum {
    let quantum = trainer.quantum(base).and_then(Quantum::write);
    quantum.expect("a quantum runs")
}

pub fn tensors(path: &Path) -> Vec<(String, Tensor)> {
    Tensor::read_safetensors(path).expect("a safetensors file")
}

/// Small numbers for tests that do not care.
pub fn hyper(method: Method) -> Hyper {
    Hyper {
        n_epochs: 1.0,
        max_steps: None,
        max_steps_per_epoch: None,
        batch_size: 2,
        gradient_accumulation_steps: 1,
        learning_rate: 5e-3,
        lr_scheduler: Schedule::Linear,
        warmup_steps: 0,
        weight_decay: 0.01,
        adam_beta1: 0.9,
        adam_beta2: 0.95,
        adam_epsilon: 1e-8,
        optimizer: Default::default(),
        max_grad_norm: 1.0,
        loraplus_lr_ratio: None,
        neftune_noise_alpha: None,
        seed: 3,
        max_seq_length: 64,
        packing: false,
        shuffle: true,
        save_strategy: SaveStrategy::Steps,
        save_steps: 0,
        eval_steps: 0,
        selection: None,
        objective: Objective::default(),
        frozen_layers: 0,
        method,
    }
}

pub fn hyper_of(value: &Value, method: Method) -> Hyper {
    let number = |name: &str| {
        value[name]
            .as_f64()
            .unwrap_or_else(|| panic!("the fixture has no {name}"))
    };
    let whole = |name: &str| {
        value[name]
            .as_u64()
            .unwrap_or_else(|| panic!("the fixture has no {name}"))
    };
    Hyper {
        n_epochs: number("n_epochs"),
        max_steps: value["max_steps"].as_u64(),
        batch_size: whole("batch_size") as u32,
        gradient_accumulation_steps: whole("gradient_accumulation_steps") as u32,
        learning_rate: number("learning_rate"),
        lr_scheduler: serde_json::from_value(value["lr_scheduler"].clone()).expect("a schedule"),
        warmup_steps: whole("warmup_steps"),
        weight_decay: number("weight_decay"),
        adam_beta1: number("adam_beta1"),
        adam_beta2: number("adam_beta2"),
        adam_epsilon: number("adam_epsilon"),
        max_grad_norm: number("max_grad_norm"),
        seed: whole("seed"),
        loraplus_lr_ratio: value["loraplus_lr_ratio"].as_f64(),
        neftune_noise_alpha: value["neftune_noise_alpha"].as_f64(),
        optimizer: match &value["optimizer"] {
            Value::Null => Optimizer::AdamW,
            optimizer => serde_json::from_value(optimizer.clone()).expect("an optimizer"),
        },
        ..hyper(method)
    }
}
