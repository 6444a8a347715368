//! Jobs whose slices go through the layers together make the bytes that each makes alone.

use std::fs;

use tandem_backend::lora::peft;
use tandem_backend::model::Decoder;
use tandem_backend::train::Trainer;
use tandem_backend::train::joint::{self, Joint};
use tandem_core::job::{Hyper, Lora, Method, TABLES, files};
use tandem_kernels::weight::Precision;

use crate::fixture::{Fixture, examples};
use crate::training::{Job, hyper, quantum};

/// Jobs that differ in all that rows of one pass may differ in: modules, rank, scale, dropout, noise, magnitudes, batch, rate.
fn hypers(decoder: &Decoder, has_magnitudes: bool) -> Vec<Hyper> {
    let all = decoder.spec.lora_targets();
    let with_tables = [&all[..], &TABLES.map(str::to_owned)].concat();
    let lora = |r, dropout, target_modules: &[String], use_dora| {
        Method::Lora(Lora {
            r,
            alpha: 2.0 * f64::from(r),
            dropout,
            target_modules: target_modules.to_vec(),
            use_rslora: r == 3,
            use_dora,
        })
    };
    let mut hypers = vec![
        hyper(lora(8, 0.0, &all, false)),
        Hyper {
            learning_rate: 1e-3,
            batch_size: 1,
            gradient_accumulation_steps: 3,
            neftune_noise_alpha: Some(5.0),
            ..hyper(lora(3, 0.2, &all, false))
        },
        // One of the linears alone: on the others its rows are the base's.
        Hyper {
            seed: 9,
            n_epochs: 2,
            ..hyper(lora(5, 0.0, &all[..1], false))
        },
        // Gradients of the head are sums over labels.
        hyper(lora(6, 0.0, &with_tables, false)),
        hyper(lora(3, 0.2, &with_tables[all.len()..], false)),
    ];
    if has_magnitudes {
        hypers.push(hyper(lora(4, 0.0, &all, true)));
        hypers.push(hyper(lora(2, 0.3, &all[..2], true)));
    }
    hypers
}

fn adapter(job: &Job) -> Vec<u8> {
    fs::read(job.spec.folder.join(files::ADAPTER).join(peft::TENSORS)).expect("the adapter is there")
}

/// To the end of each job in `together`, all that have a slice in one pass. The second pass of all is given up on its way back.
/// How many jobs each pass had.
fn run(jobs: &[Job], together: &[usize], decoder: &Decoder) -> Vec<usize> {
    let start = |&i: &usize| {
        let mut spec = jobs[i].spec.clone();
        spec.id = format!("ftjob-{i}").parse().unwrap();
        Trainer::start(spec, decoder).expect("it starts")
    };
    let mut trainers: Vec<Trainer> = together.iter().map(start).collect();
    let mut going: Vec<usize> = (0..trainers.len()).collect();
    let (mut passes, mut given_up) = (vec![], false);
    while !going.is_empty() {
        if let Some(&i) = going.iter().find(|&&i| trainers[i].next_rows().is_none()) {
            if quantum(&mut trainers[i], Some(decoder)).finished {
                going.retain(|&other| other != i);
            }
            continue;
        }
        let mut members: Vec<&mut Trainer> = trainers
            .iter_mut()
            .enumerate()
            .filter(|(i, _)| going.contains(i))
            .map(|(_, trainer)| trainer)
            .collect();
        passes.push(members.len());
        let (mut pass, mut quanta): (Option<Joint>, usize) = (None, 0);
        loop {
            joint::quantum(&mut pass, &mut members, decoder);
            quanta += 1;
            if passes.len() == 2 && !given_up && quanta == decoder.n_sublayers() + 4 {
                given_up = true;
                let leaver = members[0].spec().id.clone();
                joint::part(
                    &mut pass,
                    &leaver,
                    members.iter_mut().map(|trainer| &mut **trainer),
                );
            }
            if pass.is_none() {
                break;
            }
        }
    }
    passes
}

#[test]
fn jobs_in_one_pass_make_the_bytes_of_each_alone() {
    for (name, precision, has_magnitudes) in [
        ("gqa_tied", Precision::F32, true),
        ("gqa_tied", Precision::Bf16, true),
        ("gemma3", Precision::Bf16, true),
        ("qwen2_moe", Precision::F32, false),
        ("gpt_oss", Precision::Bf16, false),
    ] {
        let fixture = Fixture::open(name);
        let decoder = fixture.decoder(precision);
        let rows = examples(&fixture.numbers["lora_training"]["examples"]);
        let jobs = || -> Vec<Job> {
            let of = |(i, hyper): (usize, Hyper)| Job::new(&rows[..rows.len() - i / 2], hyper);
            hypers(&decoder, has_magnitudes)
                .into_iter()
                .enumerate()
                .map(of)
                .collect()
        };
        let (alone, together) = (jobs(), jobs());
        for i in 0..alone.len() {
            assert!(run(&alone, &[i], &decoder).iter().all(|&jobs| jobs == 1));
        }
        let all: Vec<usize> = (0..together.len()).collect();
        let passes = run(&together, &all, &decoder);
        assert!(
            passes.iter().filter(|&&jobs| jobs == all.len()).count() > 2,
            "{name}: {passes:?} jobs a pass"
        );
        for (i, (alone, together)) in alone.iter().zip(&together).enumerate() {
            assert!(
                adapter(alone) == adapter(together),
                "{name} in {precision:?}: job {i}"
            );
        }
    }
}
