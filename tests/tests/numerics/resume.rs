//! A job that was killed, however often and wherever, ends with the bytes of one that was not.

use std::fs;
use std::path::Path;

use tandem_backend::lora::peft;
use tandem_backend::model::Decoder;
use tandem_backend::train::{TrainError, Trainer};
use tandem_core::dataset::{self, Example, Group};
use tandem_core::job::selection::{LOSS, Selection};
use tandem_core::job::{Hyper, JobEvent, Lora, Method, Optimizer, files};
use tandem_core::rng;
use tandem_kernels::weight::Precision;

use crate::fixture::{Fixture, examples};
use crate::training::{Job, finish, hyper, quantum};

/// Everything that could make a run depend on where it was cut: dropout, noise, packing, accumulation, checkpoints, validation.
fn demanding(decoder: &Decoder) -> Hyper {
    let target_modules = decoder.spec.lora_targets();
    let lora = Lora {
        r: 4,
        alpha: 8.0,
        dropout: 0.1,
        target_modules,
        use_rslora: true,
        use_dora: true,
    };
    Hyper {
        n_epochs: 4.0,
        gradient_accumulation_steps: 2,
        warmup_steps: 2,
        save_steps: 3,
        eval_steps: 2,
        packing: true,
        max_seq_length: 24,
        loraplus_lr_ratio: Some(4.0),
        neftune_noise_alpha: Some(5.0),
        ..hyper(Method::Lora(lora))
    }
}

fn job(fixture: &Fixture, decoder: &Decoder) -> Job {
    let examples: Vec<Example> = examples(&fixture.numbers["lora_training"]["examples"]);
    let job = Job::new(&examples, demanding(decoder));
    fs::write(
        job.spec.folder.join(files::VALID),
        dataset::encode(
            &fixture
                .examples()
                .into_iter()
                .map(Group::from)
                .collect::<Vec<_>>(),
        ),
    )
    .expect("it is written");
    job
}

fn adapter_bytes(job: &Job) -> Vec<u8> {
    fs::read(job.spec.folder.join(files::ADAPTER).join(peft::TENSORS)).expect("the adapter is there")
}

fn flip(bytes: &mut [u8], at: usize) {
    bytes[at] ^= 4;
}

fn flip_last(bytes: &mut [u8]) {
    flip(bytes, bytes.len() - 1);
}

/// Of a file, if it is there.
fn damage(path: &Path, change: impl Fn(&mut Vec<u8>)) {
    if let Ok(mut bytes) = fs::read(path) {
        change(&mut bytes);
        fs::write(path, bytes).expect("it is written");
    }
}

/// What a kill does to the folder between two quanta.
type Wreck = fn(&Path);

#[test]
fn a_killed_job_ends_with_the_same_bytes() {
    let fixture = Fixture::open("gqa_tied");
    let decoder = fixture.decoder(Precision::F32);
    let undisturbed = job(&fixture, &decoder);
    let mut trainer = Trainer::start(undisturbed.spec.clone(), &decoder).expect("it starts");
    let steps = finish(&mut trainer, Some(&decoder)).len();
    assert!(steps >= 8, "{steps} steps are too few to be cut");
    let expected = adapter_bytes(&undisturbed);

    let nothing: Wreck = |_| {};
    // Killed between writing a temporary file and its rename.
    let half_written: Wreck = |folder| {
        fs::write(folder.join(".state.safetensors.partial"), b"half of a st").expect("it is written");
        for name in [
            ".adapter.partial",
            ".checkpoint-3.partial",
            ".checkpoint-6.partial",
        ] {
            fs::create_dir_all(folder.join(name)).expect("it is made");
            fs::write(folder.join(name).join(peft::TENSORS), b"half of an adap").expect("it is written");
        }
    };
    // Killed between removing a checkpoint's old folder and renaming the new one into place.
    let between_two: Wreck = |folder| {
        for entry in fs::read_dir(folder).expect("it is there").flatten() {
            if entry.file_name().to_string_lossy().starts_with(files::CHECKPOINT) {
                fs::remove_dir_all(entry.path()).expect("it is removed");
            }
        }
    };
    // The disk gives another byte back, half of a file, or only what was there before.
    let flipped: Wreck = |folder| damage(&folder.join(files::STATE), |bytes| flip_last(bytes));
    let cut: Wreck = |folder| {
        damage(&folder.join(files::STATE), |bytes| {
            bytes.truncate(bytes.len() / 2)
        })
    };
    let without_the_last: Wreck = |folder| {
        // It may not have been written yet.
        let _ = fs::remove_file(folder.join(files::STATE));
    };
    let both: Wreck = |folder| {
        for name in [files::STATE, files::EARLIER_STATE] {
            damage(&folder.join(name), |bytes| flip(bytes, 9));
        }
    };
    for (seed, wreck) in [
        (1, nothing),
        (2, nothing),
        (3, half_written),
        (4, half_written),
        (5, between_two),
        (6, flipped),
        (7, cut),
        (8, without_the_last),
        (9, both),
    ] {
        let job = job(&fixture, &decoder);
        let mut lives = 0;
        'lives: loop {
            let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("it goes on");
            // The more lives, the longer they last: steps since the last checkpoint are done again each time.
            let quanta = 5 + rng::bits(seed, 0, lives) % (20 + 20 * lives);
            lives += 1;
            for _ in 0..quanta {
                if quantum(&mut trainer, Some(&decoder)).finished {
                    break 'lives;
                }
            }
            wreck(&job.spec.folder);
        }
        assert!(lives > 3, "seed {seed}: only {lives} lives");
        println!("seed {seed}: {lives} lives");
        assert!(
            adapter_bytes(&job) == expected,
            "seed {seed}: other bytes after {lives} lives"
        );
    }
}

/// Whatever the optimizer remembers, of matrices and of DoRA's magnitudes.
#[test]
fn a_killed_job_of_any_optimizer_ends_with_the_same_bytes() {
    let fixture = Fixture::open("gqa_tied");
    let decoder = fixture.decoder(Precision::F32);
    let mut plain = vec![];
    for optimizer in [
        Optimizer::AdamW,
        Optimizer::AdamW8bit,
        Optimizer::Sgd {
            momentum: 0.9,
            nesterov: true,
        },
        Optimizer::Lion,
        Optimizer::Adafactor {
            scale_parameter: true,
        },
    ] {
        let run = |stops: &[u64]| {
            let mut job = job(&fixture, &decoder);
            job.spec.hyper.optimizer = optimizer;
            let Method::Lora(lora) = &mut job.spec.hyper.method else {
                unreachable!("it trains an adapter")
            };
            // So that most matrices have 8-bit moments.
            lora.r = 96;
            for &stop in stops {
                let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("it starts");
                while trainer.step() < stop {
                    quantum(&mut trainer, Some(&decoder));
                }
            }
            let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("it starts");
            finish(&mut trainer, Some(&decoder));
            adapter_bytes(&job)
        };
        let undisturbed = run(&[]);
        assert_eq!(undisturbed, run(&[2, 5, 7]), "{optimizer:?}");
        assert!(!plain.contains(&undisturbed), "{optimizer:?} is another's");
        plain.push(undisturbed);
    }
}

#[test]
fn a_clean_stop_repeats_no_step_and_ends_with_the_same_bytes() {
    let fixture = Fixture::open("gqa_tied");
    let decoder = fixture.decoder(Precision::F32);
    let undisturbed = job(&fixture, &decoder);
    let expected_steps = finish(
        &mut Trainer::start(undisturbed.spec.clone(), &decoder).expect("it starts"),
        Some(&decoder),
    );

    let job = job(&fixture, &decoder);
    let mut losses = vec![];
    let mut finished = false;
    while !finished {
        let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("it goes on");
        let mut stepped = false;
        // Stops in the middle of the step after the next one.
        for _ in 0..60 {
            let quantum = quantum(&mut trainer, Some(&decoder));
            for event in quantum.events {
                if let JobEvent::Step(report) = event {
                    losses.push(report.loss);
                    stepped = true;
                }
            }
            finished |= quantum.finished;
            if finished {
                break;
            }
        }
        assert!(stepped || finished, "sixty quanta made no step");
        trainer.snapshot().write().expect("the state is written");
    }
    assert_eq!(
        losses,
        expected_steps
            .iter()
            .map(|report| report.loss)
            .collect::<Vec<_>>()
    );
    assert!(adapter_bytes(&job) == adapter_bytes(&undisturbed));
}

/// A greater loss is called better, so that the first model is the best and the run ends before its last step.
fn choosing_job(fixture: &Fixture, decoder: &Decoder) -> Job {
    let mut job = job(fixture, decoder);
    job.spec.hyper.save_steps = 2;
    job.spec.hyper.selection = Some(Selection {
        metric: LOSS.to_owned(),
        greater_is_better: true,
        load_best: true,
        patience: Some(2),
        threshold: 0.0,
    });
    job
}

/// What a job says of its end.
fn choices(events: &[JobEvent]) -> Vec<&JobEvent> {
    let is_choice =
        |event: &&JobEvent| matches!(event, JobEvent::StoppedEarly { .. } | JobEvent::BestLoaded { .. });
    events.iter().filter(is_choice).collect()
}

#[test]
fn a_killed_job_stops_at_the_same_step_and_chooses_the_same_model() {
    let fixture = Fixture::open("gqa_tied");
    let decoder = fixture.decoder(Precision::F32);
    let undisturbed = choosing_job(&fixture, &decoder);
    let mut trainer = Trainer::start(undisturbed.spec.clone(), &decoder).expect("it starts");
    let mut events = vec![];
    while {
        let quantum = quantum(&mut trainer, Some(&decoder));
        events.extend(quantum.events);
        !quantum.finished
    } {}
    let expected = choices(&events);
    let [
        JobEvent::StoppedEarly { step: 6, waited: 2 },
        JobEvent::BestLoaded { step: 2, .. },
    ] = expected[..]
    else {
        panic!("{expected:?}")
    };
    let folder = &undisturbed.spec.folder;
    let bytes = |name: &str| fs::read(folder.join(name).join(peft::TENSORS)).expect("it is there");
    assert!(
        bytes(files::ADAPTER) == bytes("checkpoint-2"),
        "the result is the best"
    );
    assert!(bytes("checkpoint-4") != bytes("checkpoint-2"));
    let kept = |event: &JobEvent| match event {
        JobEvent::Checkpoint { step, best, .. } => Some((*step, *best)),
        _ => None,
    };
    let kept: Vec<_> = events.iter().filter_map(kept).collect();
    assert_eq!(kept, [(2, Some(2)), (4, Some(2))]);

    for seed in 1..7 {
        let job = choosing_job(&fixture, &decoder);
        let (mut lives, mut finished) = (0, false);
        let mut events = vec![];
        while !finished {
            let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("it goes on");
            let quanta = 5 + rng::bits(seed, 0, lives) % (10 + 10 * lives);
            lives += 1;
            events.clear();
            for _ in 0..quanta {
                let quantum = quantum(&mut trainer, Some(&decoder));
                events.extend(quantum.events);
                finished |= quantum.finished;
                if finished {
                    break;
                }
            }
            match seed % 3 {
                _ if finished => {}
                // A clean stop, wherever it is.
                0 => drop(trainer.snapshot().write().expect("the state is written")),
                1 => damage(&job.spec.folder.join(files::STATE), |bytes| flip_last(bytes)),
                _ => {}
            }
        }
        assert!(lives > 2, "seed {seed}: only {lives} lives");
        assert!(
            adapter_bytes(&job) == bytes(files::ADAPTER),
            "seed {seed}: other bytes"
        );
        let last = choices(&events);
        assert!(expected.ends_with(&last), "seed {seed}: {last:?}");
    }
}

#[test]
fn the_base_answers_the_same_bits_while_it_is_trained_on() {
    let fixture = Fixture::open("gqa_tied");
    for precision in [Precision::F32, Precision::Bf16] {
        let decoder = fixture.decoder(precision);
        let tokens = fixture.tokens("long");
        let logits = || crate::run::packed(&decoder, &[crate::run::base(&tokens)]).remove(0);
        let before = logits();
        let job = job(&fixture, &decoder);
        let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("it starts");
        for number in 0.. {
            if quantum(&mut trainer, Some(&decoder)).finished {
                break;
            }
            // Seven and the layers have no common factor: every kind of quantum is followed by a look.
            if number % 7 == 0 {
                assert_eq!(logits(), before, "{precision:?}: step {}", trainer.step());
            }
        }
        assert_eq!(logits(), before, "{precision:?}: after the job");
    }
}

#[test]
fn another_runs_state_is_refused() {
    let fixture = Fixture::open("gqa_tied");
    let decoder = fixture.decoder(Precision::F32);
    let job = job(&fixture, &decoder);
    Trainer::start(job.spec.clone(), &decoder)
        .expect("it starts")
        .snapshot()
        .write()
        .expect("the state is written");

    let mut other = job.spec.clone();
    other.hyper.learning_rate *= 2.0;
    assert!(matches!(
        Trainer::start(other, &decoder),
        Err(TrainError::State(_))
    ));

    // As many examples as before, one with another token; and the validation set gone.
    for (file, changed) in [(files::TRAIN, true), (files::VALID, false)] {
        let path = job.spec.folder.join(file);
        let bytes = fs::read(&path).expect("it is there");
        if changed {
            let mut examples = dataset::decode(&bytes).expect("it is a dataset");
            examples[0].examples[0].tokens[0] ^= 1;
            fs::write(&path, dataset::encode(&examples)).expect("it is written");
        } else {
            fs::remove_file(&path).expect("it goes");
        }
        assert!(
            matches!(
                Trainer::start(job.spec.clone(), &decoder),
                Err(TrainError::State(message)) if message.contains("other examples")
            ),
            "{file}"
        );
        fs::write(&path, bytes).expect("it is written");
    }

    assert!(Trainer::start(job.spec.clone(), &decoder).is_ok());
}

/// What a job says of where it begins: the step, and notes.
fn begins(job: &Job, decoder: &Decoder) -> (Option<u64>, Vec<String>) {
    let mut trainer = Trainer::start(job.spec.clone(), decoder).expect("it starts");
    match quantum(&mut trainer, Some(decoder)).events.remove(0) {
        JobEvent::Started {
            resumed_from, notes, ..
        } => (resumed_from, notes),
        event => panic!("{event:?}"),
    }
}

#[test]
fn a_damaged_state_is_noticed_and_the_one_before_it_counts() {
    let fixture = Fixture::open("gqa_tied");
    let decoder = fixture.decoder(Precision::F32);
    let job = job(&fixture, &decoder);
    let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("it starts");
    while trainer.step() < 7 {
        quantum(&mut trainer, Some(&decoder));
    }
    let [last, earlier] = [files::STATE, files::EARLIER_STATE].map(|name| job.spec.folder.join(name));
    let read = |path: &Path| fs::read(path).expect("it was written");
    let (last_bytes, earlier_bytes) = (read(&last), read(&earlier));
    let restore = || {
        fs::write(&last, &last_bytes).expect("it is written");
        fs::write(&earlier, &earlier_bytes).expect("it is written");
    };
    assert_eq!(begins(&job, &decoder), (Some(6), vec![]));
    let header = 8 + u64::from_le_bytes(last_bytes[..8].try_into().expect("8 bytes")) as usize;
    // Every byte of the header, some of the numbers.
    let flips = (0..header).chain((header..last_bytes.len()).step_by(last_bytes.len() / 20));
    let flips = flips.map(|at| {
        let mut bytes = last_bytes.clone();
        flip(&mut bytes, at);
        (format!("another bit at {at}"), bytes)
    });
    let cuts = [0, 7, 100, last_bytes.len() / 2, last_bytes.len() - 1];
    let cuts = cuts.map(|at| (format!("cut at {at}"), last_bytes[..at].to_vec()));
    for (what, bytes) in flips.chain(cuts) {
        restore();
        fs::write(&last, bytes).expect("it is written");
        let (from, notes) = begins(&job, &decoder);
        // A header of another spelling that says the same is no damage.
        if (from, notes.len()) == (Some(6), 0) {
            assert!(what.starts_with("another bit"), "{what}");
            continue;
        }
        assert_eq!(from, Some(3), "{what}");
        let [note] = &notes[..] else {
            panic!("{what}: {notes:?}")
        };
        assert!(
            note.starts_with("state.safetensors is damaged") && note.ends_with("from the state before it"),
            "{what}: {note}"
        );
        assert!(
            !last.exists(),
            "{what}: a damaged state never takes a good one's place"
        );
    }
    restore();
    for path in [&last, &earlier] {
        damage(path, |bytes| flip(bytes, header));
    }
    let (from, notes) = begins(&job, &decoder);
    assert_eq!((from, notes.len()), (None, 2), "{notes:?}");
    assert!(notes[1].ends_with("the job begins again"), "{notes:?}");
    assert_eq!(begins(&job, &decoder), (None, vec![]), "as with a missing one");
}

/// What a job says between its steps, until it has finished or `stops` is true of an event.
fn said(trainer: &mut Trainer, decoder: &Decoder, stops: impl Fn(&JobEvent) -> bool) -> (Vec<String>, bool) {
    let mut said = vec![];
    loop {
        let quantum = quantum(trainer, Some(decoder));
        for event in &quantum.events {
            match event {
                JobEvent::Validated { step, loss, .. } => {
                    said.push(format!("step {step}: validation loss {loss}"))
                }
                JobEvent::Checkpoint { step, .. } => said.push(format!("step {step}: checkpoint")),
                _ => {}
            }
        }
        if quantum.finished || quantum.events.iter().any(&stops) {
            return (said, quantum.finished);
        }
    }
}

#[test]
fn what_is_due_after_a_step_outlives_a_clean_stop() {
    let fixture = Fixture::open("gqa_tied");
    let decoder = fixture.decoder(Precision::F32);
    let undisturbed = job(&fixture, &decoder);
    let mut trainer = Trainer::start(undisturbed.spec.clone(), &decoder).expect("it starts");
    let (expected, _) = said(&mut trainer, &decoder, |_| false);
    assert!(expected.len() > 4, "{expected:?}");

    let job = job(&fixture, &decoder);
    let (mut heard, mut finished) = (vec![], false);
    while !finished {
        let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("it goes on");
        let (said, is_last) = said(&mut trainer, &decoder, |event| matches!(event, JobEvent::Step(_)));
        heard.extend(said);
        finished = is_last;
        trainer.snapshot().write().expect("the state is written");
    }
    assert_eq!(heard, expected);
}
