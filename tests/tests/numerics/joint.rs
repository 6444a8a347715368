//! Jobs and clients' calls whose slices go through the layers together make the bytes that each makes alone.

use std::collections::VecDeque;
use std::fs;

use tandem_backend::lora::peft;
use tandem_backend::model::Decoder;
use tandem_backend::train::Trainer;
use tandem_backend::train::driven::{Driven, Inputs, Progress};
use tandem_backend::train::joint::{self, Joint, Member, Who};
use tandem_core::dataset::Example;
use tandem_core::id::AdapterDigest;
use tandem_core::job::{Hyper, LM_HEAD, Lora, Method, TABLES, files};
use tandem_core::learner::{
    Adam, Batch, Clip, Datum, LearnerId, Loss, NewLearner, Pass, Save, Saving, Scores, Stepped,
};
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
            n_epochs: 2.0,
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

/// A client, what it still asks, and what it was told.
pub struct Client {
    driven: Driven,
    is_busy: bool,
    asks: VecDeque<Batch>,
    told: Vec<Told>,
    folder: tempfile::TempDir,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    Learned(Scores, Stepped),
    Scored(Scores),
    Wrong(String),
    Saved(AdapterDigest),
}

/// The losses of each, in the order of its calls.
pub fn losses() -> [Vec<Loss>; 3] {
    let clip = |low, high| Clip { low, high };
    [
        vec![Loss::CrossEntropy, Loss::Gspo(clip(0.5, 1.5))],
        vec![
            Loss::ImportanceSampling,
            Loss::CrossEntropy,
            Loss::Ppo(clip(0.8, 1.2)),
        ],
        vec![
            Loss::Dro { beta: 0.05 },
            Loss::Cispo(clip(0.0, 4.0)),
            Loss::CrossEntropy,
        ],
    ]
}

/// `rows`, each with the loss after it; cross-entropy has two targets a token, of weights of either sign.
fn batch(rows: &[Example], loss: Loss, pass: Pass) -> Batch {
    let datum = |row: &Example| {
        let (inputs, last) = (&row.tokens[..row.tokens.len() - 1], row.tokens.len() - 1);
        let plain = Datum {
            tokens: inputs.to_vec(),
            columns: 1,
            targets: row.tokens[1..].to_vec(),
            ..Datum::default()
        };
        let waves = |at: f32| {
            (0..last)
                .map(move |i| (at * (i + 1) as f32).sin())
                .collect::<Vec<f32>>()
        };
        match loss {
            Loss::CrossEntropy => Datum {
                columns: 2,
                targets: row.tokens[1..]
                    .iter()
                    .flat_map(|&token| [token, token / 2])
                    .collect(),
                weights: waves(0.7)
                    .into_iter()
                    .flat_map(|wave| [1.0, 0.5 * wave])
                    .collect(),
                ..plain
            },
            _ => Datum {
                sampled: waves(0.3).into_iter().map(|wave| wave - 3.0).collect(),
                advantages: waves(1.1),
                ..plain
            },
        }
    };
    Batch {
        loss,
        data: rows.iter().map(datum).collect(),
        pass,
        trace: None,
    }
}

impl Client {
    /// Client number `i`. Its second call is wrong: a ratio is infinite.
    pub fn new(i: usize, rows: &[Example], decoder: &Decoder) -> Client {
        let all = decoder.spec.lora_targets();
        let head = [LM_HEAD.to_owned()];
        let target_modules = match i {
            0 => [&all[..], &head].concat(),
            1 => all[..2].to_vec(),
            _ => head.to_vec(),
        };
        let lora = Lora {
            r: 2 + 3 * i as u32,
            alpha: 32.0,
            dropout: 0.0,
            target_modules,
            use_rslora: false,
            use_dora: false,
        };
        let new = NewLearner {
            lora,
            seed: i as u64,
            tenant: String::new(),
            from: None,
        };
        let mut asks = VecDeque::new();
        for loss in losses()[i].repeat(2) {
            asks.push_back(batch(&rows[..rows.len() - i], loss, Pass::ForwardBackward));
        }
        asks.push_back(batch(rows, Loss::CrossEntropy, Pass::Forward));
        let mut wrong = batch(&rows[..2], Loss::ImportanceSampling, Pass::ForwardBackward);
        wrong.data[1].sampled[0] = -1e30;
        asks.insert(1, wrong);
        Client {
            driven: Driven::make(&new, &Inputs::Nothing, decoder.fit()).expect("it is made"),
            is_busy: false,
            asks,
            told: vec![],
            folder: tempfile::tempdir().expect("a folder"),
        }
    }

    /// All it was told, alone.
    pub fn run(mut self, decoder: &Decoder) -> Vec<Told> {
        while !self.quantum(decoder) {}
        self.told
    }

    /// A quantum alone; after each call that learned a step. Whether it was the last: its adapter is saved.
    fn quantum(&mut self, decoder: &Decoder) -> bool {
        if !self.is_busy {
            self.is_busy = true;
            match self.asks.pop_front() {
                Some(batch) => self.driven.begin(batch),
                None => self.driven.begin_save(Save {
                    folder: self.folder.path().to_owned(),
                    what: Saving::Adapter {
                        base_model: "fixture".to_owned(),
                    },
                }),
            }
            return false;
        }
        match self.driven.advance(decoder) {
            Ok(Progress::On) => return false,
            Ok(Progress::Scored(scores)) if self.asks.is_empty() => self.told.push(Told::Scored(scores)),
            Ok(Progress::Scored(scores)) => {
                let adam = Adam {
                    learning_rate: 1e-2,
                    beta1: 0.9,
                    beta2: 0.95,
                    epsilon: 1e-8,
                    weight_decay: 0.0,
                    grad_clip_norm: 1.0,
                };
                let stepped = self.driven.step(decoder, &adam).expect("a step");
                self.told.push(Told::Learned(scores, stepped));
            }
            Ok(Progress::Copied(copy)) => {
                let saved = copy.write().expect("it is written");
                self.told
                    .push(Told::Saved(saved.adapter.expect("an adapter").digest));
                return true;
            }
            Err(fault) => {
                self.driven.clear();
                self.told.push(Told::Wrong(fault.to_string()));
            }
        }
        self.is_busy = false;
        false
    }
}

#[derive(Debug, PartialEq)]
enum Made {
    Adapter(Vec<u8>),
    Told(Told),
}

enum Actor<'a> {
    Job(&'a Job, Box<Trainer>),
    Client(Box<Client>),
}

impl Actor<'_> {
    fn member(&mut self) -> &mut dyn Member {
        match self {
            Actor::Job(_, trainer) => trainer.as_mut(),
            Actor::Client(client) => &mut client.driven,
        }
    }

    /// What it made, when it was the last.
    fn quantum(&mut self, decoder: &Decoder) -> Option<Vec<Made>> {
        match self {
            Actor::Job(job, trainer) => {
                let adapter = job.spec.folder.join(files::ADAPTER).join(peft::TENSORS);
                let is_finished = quantum(trainer, Some(decoder)).finished;
                is_finished.then(|| vec![Made::Adapter(fs::read(adapter).expect("the adapter is there"))])
            }
            Actor::Client(client) => client.quantum(decoder).then(|| {
                let told = std::mem::take(&mut client.told);
                told.into_iter().map(Made::Told).collect()
            }),
        }
    }
}

/// To the end of each, all that have a slice in one pass. From the second pass of all a job leaves on its way back, to begin
/// again, and from the third a client, for ever. What each made, and how many slices each pass had.
fn run(
    jobs: &[Job],
    clients: Vec<Client>,
    leaver: Option<Client>,
    decoder: &Decoder,
) -> (Vec<Vec<Made>>, Vec<usize>) {
    let start = |i: usize| {
        let mut spec = jobs[i].spec.clone();
        spec.id = format!("ftjob-{i}").parse().expect("an id");
        Box::new(Trainer::start(spec, decoder).expect("it starts"))
    };
    let mut actors: Vec<Actor> = (0..jobs.len()).map(|i| Actor::Job(&jobs[i], start(i))).collect();
    actors.extend(clients.into_iter().map(|client| Actor::Client(Box::new(client))));
    let n = actors.len();
    let is_shared = n > 1;
    actors.extend(leaver.map(|client| Actor::Client(Box::new(client))));
    let who = |i: usize| Who::Learner(LearnerId(i as u64));
    let mut made: Vec<Vec<Made>> = (0..n).map(|_| vec![]).collect();
    let mut going: Vec<usize> = (0..actors.len()).collect();
    let mut passes = vec![];
    while !going.is_empty() {
        if let Some(&i) = going.iter().find(|&&i| actors[i].member().next_rows().is_none()) {
            if let Some(end) = actors[i].quantum(decoder) {
                made[i] = end;
                going.retain(|&other| other != i);
            }
            continue;
        }
        passes.push(going.len());
        let (mut pass, mut quanta): (Option<Joint>, usize) = (None, 0);
        let mut members = going.clone();
        loop {
            let mut together: Vec<(Who, &mut dyn Member)> = vec![];
            for (i, actor) in actors.iter_mut().enumerate() {
                if members.contains(&i) {
                    together.push((who(i), actor.member()));
                }
            }
            joint::quantum(&mut pass, &mut together, decoder);
            quanta += 1;
            if is_shared && quanta == decoder.n_sublayers() + 6 {
                let left = match passes.len() {
                    2 => 0,
                    3 => n,
                    _ => usize::MAX,
                };
                if let Some(at) = members.iter().position(|&i| i == left) {
                    members.remove(at);
                    match (left, &mut actors[left]) {
                        (0, Actor::Job(_, trainer)) => {
                            let old = std::mem::replace(trainer, start(0));
                            joint::leave(&mut pass, &who(0), old);
                        }
                        (_, _) => {
                            let Some(Actor::Client(client)) = actors.pop() else {
                                panic!("the leaver is a client")
                            };
                            going.retain(|&i| i != left);
                            joint::leave(&mut pass, &who(left), Box::new(client.driven));
                        }
                    }
                }
            }
            if pass.is_none() {
                break;
            }
        }
    }
    (made, passes)
}

#[test]
fn those_in_one_pass_make_the_bytes_of_each_alone() {
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
        let client = |i| Client::new(i, &rows[..4], &decoder);
        let mut alone = vec![];
        for job in jobs().chunks(1) {
            alone.extend(run(job, vec![], None, &decoder).0);
        }
        for i in 0..losses().len() {
            alone.extend(run(&[], vec![client(i)], None, &decoder).0);
        }
        let clients = (0..losses().len()).map(client).collect();
        let (together, passes) = run(&jobs(), clients, Some(client(1)), &decoder);
        let fullest = alone.len();
        assert!(
            passes.iter().filter(|&&slices| slices >= fullest).count() > 2,
            "{name}: {passes:?} slices a pass"
        );
        for (i, (alone, together)) in alone.iter().zip(&together).enumerate() {
            assert!(!alone.is_empty());
            assert_eq!(alone.len(), together.len(), "{name} in {precision:?}: number {i}");
            for (alone, together) in alone.iter().zip(together) {
                assert!(alone == together, "{name} in {precision:?}: number {i}");
            }
        }
    }
}
