//! Objectives that learn from preferences, against TRL's trainers (make_preferences.py): the same rows in the same order
//! from the same adapter. And that a killed job ends with the bytes of one that was not.

use serde_json::{Map, Value, json};
use tandem_backend::lora::peft;
use tandem_backend::model::Decoder;
use tandem_backend::train::Trainer;
use tandem_core::dataset::{self, Example, Group};
use tandem_core::job::{Hyper, JobEvent, Lora, Method, Objective, StepReport, files};
use tandem_core::settings;
use tandem_kernels::weight::Precision;

use crate::fixture::{Fixture, Table, fixtures_folder, max_difference, numbers};
use crate::training::{Job, finish, hyper_of, quantum, tensors};

/// Relative where it is above 1. TRL sums log-probabilities of about 80 nats in float32, and sppo_hard squares them.
const LOSS: f64 = 2e-5;
/// Relative.
const METRIC: f64 = 1e-5;
const ADAPTER: f64 = 2e-5;

#[test]
fn every_objective_is_trls() {
    let fixture = Fixture::open("gqa_tied");
    let decoder = fixture.decoder(Precision::F32);
    let expected = trls();
    let mut table = Table::default();
    for (name, case) in expected["cases"].as_object().expect("cases") {
        let objective = objective(case);
        let mut job = job(&expected, objective, |hyper| hyper);
        if name == "dpo_from_adapter" {
            start_from(&mut job, &fixture, &decoder);
        }
        let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("the job starts");
        let reports = finish(&mut trainer, Some(&decoder));
        compare(name, case, &objective, &reports, &mut table);
        let ours = tensors(&job.spec.folder.join(files::ADAPTER).join(peft::TENSORS));
        let theirs = tensors(&fixtures_folder().join("preferences/expected.safetensors"));
        let worst = ours.iter().map(|(tensor, ours)| {
            let key = format!("{name}.{tensor}");
            let theirs = theirs.iter().find(|(name, _)| *name == key);
            max_difference(ours, &theirs.expect("TRL trained the same modules").1)
        });
        table.add(
            name,
            "adapter after six steps",
            worst.fold(0.0, f64::max),
            ADAPTER,
        );
    }
    table.judge("six steps of each objective against TRL");
}

fn compare(name: &str, case: &Value, objective: &Objective, reports: &[StepReport], table: &mut Table) {
    let (losses, norms) = (numbers(&case["losses"]), numbers(&case["grad_norms"]));
    assert_eq!(reports.len(), losses.len());
    let (mut loss, mut norm, mut metric) = (0.0_f64, 0.0_f64, 0.0_f64);
    for (i, report) in reports.iter().enumerate() {
        loss = loss.max((report.loss - losses[i]).abs() / losses[i].abs().max(1.0));
        norm = norm.max((report.grad_norm - norms[i]).abs() / norms[i]);
        for (key, theirs) in case["metrics"][i].as_object().expect("metrics") {
            // TRL's means are of micro-batches, in which desirable rows are not equally many.
            if matches!(objective, Objective::Kto { .. }) && key != "kl" {
                continue;
            }
            let theirs = theirs.as_f64().expect("a number");
            let Some(ours) = report.metrics.get(key) else {
                assert_eq!((key.as_str(), theirs), ("nll_loss", 0.0), "{name}");
                continue;
            };
            metric = metric.max((ours - theirs).abs() / theirs.abs().max(1.0));
        }
    }
    table.add(name, "losses", loss, LOSS);
    table.add(name, "gradient norms", norm, METRIC);
    table.add(name, "metrics", metric, METRIC);
}

/// The reference is then that adapter, not the base.
fn start_from(job: &mut Job, fixture: &Fixture, decoder: &Decoder) {
    let read = |name: &str| std::fs::read(fixture.adapter_folder("all").join(name)).expect("it is committed");
    let (config, tensors) = (read(peft::CONFIG), read(peft::TENSORS));
    let known = decoder.spec.lora_targets();
    let lora =
        Lora::of_peft(&serde_json::from_slice(&config).expect("JSON"), &known).expect("a plain adapter");
    job.spec.hyper.method = Method::Lora(lora);
    for (name, bytes) in [(files::START_CONFIG, config), (files::START_TENSORS, tensors)] {
        std::fs::write(job.spec.folder.join(name), bytes).expect("it is written");
    }
}

/// What TRL's settings mean here, read as everywhere.
pub fn objective(case: &Value) -> Objective {
    let mut settings: Map<String, Value> = case["settings"].as_object().expect("settings").clone();
    settings.insert("objective".to_owned(), case["objective"].clone());
    let settings = settings::read([("", settings)], false).expect("TRL's settings are read");
    settings.objective().expect("an objective")
}

pub fn trls() -> Value {
    let path = fixtures_folder().join("preferences/expected.json");
    serde_json::from_slice(&std::fs::read(path).expect("the fixture is committed")).expect("JSON")
}

pub fn job(expected: &Value, objective: Objective, change: impl FnOnce(Hyper) -> Hyper) -> Job {
    let lora = Lora {
        r: 4,
        alpha: 8.0,
        dropout: 0.0,
        target_modules: serde_json::from_value(expected["lora"]["target_modules"].clone()).expect("names"),
        use_rslora: false,
        use_dora: false,
    };
    let hyper = change(Hyper {
        objective,
        ..hyper_of(&expected["hyper"], Method::Lora(lora))
    });
    Job::of(groups(expected, &objective), hyper)
}

fn groups(expected: &Value, objective: &Objective) -> Vec<Group> {
    let tokens = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).expect("tokens") };
    let example = |row: &Value, answer: &str| {
        let (prompt, answer) = (tokens(&row["prompt"]), tokens(&row[answer]));
        Example {
            weights: [vec![0.0; prompt.len()], vec![1.0; answer.len()]].concat(),
            tokens: [prompt, answer].concat(),
        }
    };
    let rows = |name: &str| expected[name].as_array().expect("rows");
    match objective {
        Objective::Kto { .. } => rows("judged")
            .iter()
            .map(|row| Group {
                examples: vec![example(row, "completion")],
                value: f32::from(u8::from(row["label"] == json!(true))),
            })
            .collect(),
        Objective::Sft | Objective::RewardWeighted { .. } => (0u8..)
            .zip(rows("pairs"))
            .map(|(i, row)| Group {
                examples: vec![example(row, "chosen")],
                value: f32::from(i) / 4.0,
            })
            .collect(),
        _ => rows("pairs")
            .iter()
            .map(|row| Group {
                examples: vec![example(row, "chosen"), example(row, "rejected")],
                value: 0.0,
            })
            .collect(),
    }
}

/// With dropout, validation and checkpoints; killed after every seventh quantum that it gets to.
#[test]
fn a_killed_job_of_every_objective_ends_with_the_same_bytes() {
    let fixture = Fixture::open("gqa_tied");
    let decoder = fixture.decoder(Precision::F32);
    let expected = trls();
    let named = |name: &str| objective(&expected["cases"][name]);
    let all = [
        named("dpo"),
        named("kto"),
        named("orpo"),
        named("simpo"),
        Objective::RewardWeighted { beta: 0.5 },
    ];
    for objective in all {
        let made = || {
            let job = job(&expected, objective, |mut hyper| {
                if let Method::Lora(lora) = &mut hyper.method {
                    lora.dropout = 0.1;
                }
                Hyper {
                    save_steps: 2,
                    eval_steps: 3,
                    ..hyper
                }
            });
            let valid = dataset::encode(&groups(&expected, &objective)[..3]);
            std::fs::write(job.spec.folder.join(files::VALID), valid).expect("it is written");
            job
        };
        let bytes = |job: &Job| {
            std::fs::read(job.spec.folder.join(files::ADAPTER).join(peft::TENSORS))
                .expect("the adapter is there")
        };
        let undisturbed = made();
        let mut trainer = Trainer::start(undisturbed.spec.clone(), &decoder).expect("it starts");
        let losses: Vec<f64> = finish(&mut trainer, Some(&decoder))
            .iter()
            .map(|report| report.loss)
            .collect();
        assert!(losses[5] < losses[0], "{}: {losses:?}", objective.name());

        let killed = made();
        let mut quanta = 7;
        'lives: loop {
            let mut trainer = Trainer::start(killed.spec.clone(), &decoder).expect("it goes on");
            for _ in 0..quanta {
                if quantum(&mut trainer, Some(&decoder)).finished {
                    break 'lives;
                }
            }
            quanta += 7;
        }
        assert_eq!(bytes(&killed), bytes(&undisturbed), "{}", objective.name());
    }
}

/// The reference is asked of each group once: steps of the second epoch are shorter.
#[test]
fn the_reference_is_asked_once() {
    let fixture = Fixture::open("gqa_tied");
    let decoder = fixture.decoder(Precision::F32);
    let expected = trls();
    for (name, asks) in [("dpo", true), ("simpo", false)] {
        let job = job(&expected, objective(&expected["cases"][name]), |hyper| Hyper {
            n_epochs: 2.0,
            max_steps: None,
            ..hyper
        });
        let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("it starts");
        // Behind which step each quantum came.
        let mut quanta: Vec<usize> = vec![];
        let mut now = 0;
        loop {
            let done = quantum(&mut trainer, Some(&decoder));
            now += 1;
            if done.events.iter().any(|event| matches!(event, JobEvent::Step(_))) {
                quanta.push(std::mem::take(&mut now));
            }
            if done.finished {
                break;
            }
        }
        let (first, second) = quanta.split_at(quanta.len() / 2);
        let [first, second] = [first, second].map(|epoch| epoch.iter().sum::<usize>() as f64);
        assert_eq!(second < 0.85 * first, asks, "{name}: {quanta:?} quanta");
    }
}
