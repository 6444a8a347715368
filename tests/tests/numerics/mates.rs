//! Data parallel: ranks that train one job, each with a model of its own, against one that makes every micro-batch.

use std::fs;

use tandem_backend::family::read_spec;
use tandem_backend::lora::peft;
use tandem_backend::ranks::Team;
use tandem_backend::train::mates::Sharding;
use tandem_backend::train::mesh::Mesh;
use tandem_backend::train::run::{Run, RunOptions};
use tandem_core::dataset;
use tandem_core::job::{Hyper, JobEvent, Lora, Method, StepReport, files};
use tandem_kernels::weight::Precision;
use tch::Tensor;

use crate::fixture::{FAMILIES, Fixture, Table, examples, max_difference, trained_whole};
use crate::preferences;
use crate::training::{Job, hyper, tensors};

/// Sums of gradients in another order.
const CLOSE: f64 = 1e-5;
/// Adam divides a gradient by its own size: where it is hardly more than rounding, all of a step is.
const CLOSE_NUMBERS: f64 = 1e-4;

struct Ended {
    reports: Vec<StepReport>,
    validations: Vec<f64>,
}

/// To the end, or to a stop behind step `until`.
fn run(fixture: &Fixture, job: &Job, (world, mesh): (usize, Mesh), until: u64) -> Ended {
    run_with(options(fixture, job, world, mesh, None), until)
}

fn run_with(options: RunOptions, until: u64) -> Ended {
    let mut run = Run::start(options).expect("the run starts");
    let (mut reports, mut validations) = (vec![], vec![]);
    while let Some(events) = run.advance().expect("it advances") {
        for event in events {
            match event {
                JobEvent::Step(report) => reports.push(report),
                JobEvent::Validated { loss, .. } => validations.push(loss),
                _ => {}
            }
        }
        let is_there = reports.last().is_some_and(|report| report.step >= until);
        if run.stops(is_there).expect("the ranks agree") {
            run.keep().expect("its state is kept");
            break;
        }
    }
    Ended { reports, validations }
}

fn options(fixture: &Fixture, job: &Job, world: usize, mesh: Mesh, quantization: Option<&str>) -> RunOptions {
    let model = fixture.folder.clone();
    let options = RunOptions::new(
        job.spec.clone(),
        model,
        "float32",
        quantization,
        "cpu",
        Team::Threads(world),
    );
    RunOptions {
        mesh,
        ..options.expect("the model is there")
    }
}

fn sharing(sharding: Sharding) -> Mesh {
    Mesh {
        sharding,
        ..Mesh::PLAIN
    }
}

/// What was made: an adapter, or a model.
fn made(job: &Job) -> Vec<(String, Tensor)> {
    let adapter = job.spec.folder.join(files::ADAPTER).join(peft::TENSORS);
    let mut made = match job.spec.hyper.method {
        Method::Lora(_) => tensors(&adapter),
        Method::Full => tensors(&job.spec.folder.join("model.safetensors")),
    };
    made.sort_by(|(a, _), (b, _)| a.cmp(b));
    made
}

#[test]
fn several_ranks_train_as_one_that_has_their_micro_batches() {
    let fixture = Fixture::open("gqa_tied");
    let decoder = fixture.decoder(Precision::F32);
    let rows = examples(&fixture.numbers["lora_training"]["examples"]);
    let lora = Method::Lora(Lora {
        r: 4,
        alpha: 8.0,
        dropout: 0.2,
        target_modules: decoder.spec.lora_targets(),
        use_rslora: false,
        use_dora: false,
    });
    // The last step of an epoch has fewer micro-batches than there are ranks.
    let stepwise = |hyper: Hyper| Hyper {
        n_epochs: 4.0,
        batch_size: 1,
        gradient_accumulation_steps: 3,
        eval_steps: 2,
        ..hyper
    };
    let trls = preferences::trls();
    let preferred = |name: &str| {
        let objective = preferences::objective(&trls["cases"][name]);
        preferences::job(&trls, objective, stepwise)
    };
    let noisy = Hyper {
        neftune_noise_alpha: Some(5.0),
        ..stepwise(hyper(lora))
    };
    let cases: [(&str, &dyn Fn() -> Job); 4] = [
        ("lora", &|| Job::new(&rows, noisy.clone())),
        ("full", &|| Job::new(&rows, stepwise(hyper(Method::Full)))),
        ("dpo", &|| preferred("dpo")),
        ("kto", &|| preferred("kto")),
    ];
    let mut table = Table::default();
    for (name, job) in cases {
        let job = || {
            let job = job();
            let valid = dataset::encode(&job.groups[..job.groups.len() - 1]);
            fs::write(job.spec.folder.join(files::VALID), valid).expect("it is written");
            job
        };
        let alone = job();
        let expected = run(&fixture, &alone, (1, Mesh::PLAIN), u64::MAX);
        assert!(expected.reports.len() >= 6 && !expected.validations.is_empty());
        let mut compare = |what: &str, job: &Job, parts: &[Ended]| {
            let reports: Vec<&StepReport> = parts.iter().flat_map(|part| &part.reports).collect();
            let validations: Vec<f64> = parts.iter().flat_map(|part| part.validations.clone()).collect();
            assert_eq!(reports.len(), expected.reports.len(), "{name} {what}");
            assert_eq!(validations.len(), expected.validations.len(), "{name} {what}");
            let worst = |of: &dyn Fn(&StepReport) -> f64| {
                let pairs = reports.iter().zip(&expected.reports);
                pairs
                    .map(|(ours, expected)| (of(ours) - of(expected)).abs() / of(expected).abs().max(1.0))
                    .fold(0.0, f64::max)
            };
            table.add(
                name,
                &format!("{what}: losses"),
                worst(&|report| report.loss),
                CLOSE,
            );
            let norms = worst(&|report| report.grad_norm);
            table.add(name, &format!("{what}: gradient norms"), norms, CLOSE);
            let counted = |report: &StepReport| (report.trained_tokens, report.token_accuracy.to_bits());
            for (ours, expected) in reports.iter().zip(&expected.reports) {
                assert_eq!(
                    counted(ours),
                    counted(expected),
                    "{name} {what}: tokens and accuracy"
                );
                assert_eq!(
                    ours.metrics.keys().collect::<Vec<_>>(),
                    expected.metrics.keys().collect::<Vec<_>>()
                );
            }
            let validations = validations.iter().zip(&expected.validations);
            let validations = validations.map(|(ours, expected)| (ours - expected).abs());
            let validations = validations.fold(0.0, f64::max);
            table.add(name, &format!("{what}: validations"), validations, CLOSE);
            let (ours, expected) = (made(job), made(&alone));
            let numbers = ours
                .iter()
                .zip(&expected)
                .map(|((name, ours), (expected_name, expected))| {
                    assert_eq!(name, expected_name);
                    max_difference(ours, expected)
                });
            table.add(
                name,
                &format!("{what}: numbers"),
                numbers.fold(0.0, f64::max),
                CLOSE,
            );
        };
        let shardings = [Sharding::None, Sharding::Gradients, Sharding::Parameters].map(sharing);
        let plain = [2, 3]
            .into_iter()
            .flat_map(|world| shardings.map(|mesh| (world, mesh)));
        // In groups of two.
        let hybrid = [Sharding::Gradients, Sharding::Parameters].map(|sharding| {
            let sharers = Some(2);
            (
                4,
                Mesh {
                    sharers,
                    ..sharing(sharding)
                },
            )
        });
        for (world, mesh) in plain.chain(hybrid) {
            let job = job();
            let ended = run(&fixture, &job, (world, mesh), u64::MAX);
            compare(&format!("{world} ranks, {mesh:?}"), &job, &[ended]);
        }
        // What is kept says nothing of ranks.
        let job = job();
        let parts = [
            ((3, sharing(Sharding::Parameters)), 2),
            ((1, Mesh::PLAIN), 4),
            ((2, sharing(Sharding::Gradients)), u64::MAX),
        ];
        let parts = parts.map(|(team, until)| run(&fixture, &job, team, until));
        compare("on 3, then 1, then 2 ranks", &job, &parts);
    }
    table.judge("data parallel against one rank");
}

/// Every kind of layer, experts of which a rank may have no rows among them; weights in few bits. Models of two ranks beside each
/// other, too.
#[test]
fn ranks_that_share_parameters_train_every_family() {
    let mut table = Table::default();
    for name in FAMILIES {
        let fixture = Fixture::open(name);
        let spec = read_spec(&fixture.folder).expect("the fixture has a config");
        let lora = Method::Lora(Lora {
            r: 4,
            alpha: 8.0,
            dropout: 0.1,
            target_modules: spec.lora_targets(),
            use_rslora: false,
            use_dora: false,
        });
        let mut methods = vec![("lora", lora.clone(), None)];
        if trained_whole().any(|whole| whole == name) {
            methods.push(("full", Method::Full, None));
        }
        if name == FAMILIES[0] {
            let formats = ["int8", "int4", "nf4"];
            methods.extend(formats.map(|format| (format, lora.clone(), Some(format))));
        }
        for (what, method, quantization) in methods {
            let hyper = Hyper {
                n_epochs: 2.0,
                batch_size: 1,
                gradient_accumulation_steps: 3,
                ..hyper(method)
            };
            let rows = fixture.examples();
            let train = |world, mesh| {
                let job = Job::new(&rows, hyper.clone());
                let options = options(&fixture, &job, world, mesh, quantization);
                let Ended { reports, .. } = run_with(options, u64::MAX);
                (reports, made(&job))
            };
            let (expected, expected_made) = train(1, Mesh::PLAIN);
            let divided = |sharding, sharers| Mesh {
                tensor_parallel: 2,
                sharding,
                sharers,
            };
            let mut meshes = vec![("shared", 2, sharing(Sharding::Parameters))];
            if what != "full" {
                meshes.push(("divided and shared", 4, divided(Sharding::Parameters, None)));
            }
            if what == "lora" && name == FAMILIES[0] {
                meshes.extend([
                    ("divided", 2, divided(Sharding::None, None)),
                    ("divided, two models", 4, divided(Sharding::None, None)),
                    (
                        "divided, shared in groups",
                        8,
                        divided(Sharding::Parameters, Some(2)),
                    ),
                ]);
            }
            for (how, world, mesh) in meshes {
                let (reports, made) = train(world, mesh);
                assert!(reports.len() > 1 && reports.len() == expected.len());
                let losses = reports.iter().zip(&expected);
                let losses = losses.map(|(ours, expected)| (ours.loss - expected.loss).abs());
                let losses = losses.fold(0.0, f64::max);
                table.add(name, &format!("{what}, {how}: losses"), losses, CLOSE);
                let numbers = made.iter().zip(&expected_made);
                let numbers = numbers.map(|((_, ours), (_, expected))| max_difference(ours, expected));
                let numbers = numbers.fold(0.0, f64::max);
                table.add(name, &format!("{what}, {how}: numbers"), numbers, CLOSE_NUMBERS);
            }
            if what == "full" {
                let job = Job::new(&rows, hyper.clone());
                let refused = Run::start(options(&fixture, &job, 2, divided(Sharding::None, None), None));
                let error = refused
                    .err()
                    .expect("every parameter is trained whole")
                    .to_string();
                assert!(
                    error.contains("ranks that divide one model train LoRA"),
                    "{error}"
                );
            }
        }
    }
    table.judge("ranks that share parameters against one rank");
}
