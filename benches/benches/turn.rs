//! The parts of an engine turn, one by one, on a tiny model: what a turn costs beside its matrix products. Speeds of
//! real shapes are src/bin/engine.rs.

use std::hint::black_box;
use std::path::{Path, PathBuf};

use criterion::{Criterion, criterion_group, criterion_main};
use tandem_backend::lora::adapter::{Adapter, AdapterRows};
use tandem_backend::lora::peft;
use tandem_backend::model::{Batch, Context, Decoder};
use tandem_backend::sample::{Ask, sample};
use tandem_backend::train::Trainer;
use tandem_core::blocks::{BlockPool, Groups};
use tandem_core::dataset::{self, Example, Group};
use tandem_core::id::RequestId;
use tandem_core::job::{
    Hyper, JobEvent, JobSpec, Life, Lora, Method, Objective, SaveStrategy, Schedule, files,
};
use tandem_core::message::{Generate, Scored};
use tandem_core::sampling::{RawSampling, Sampling};
use tandem_core::sched::{Limits, Scheduler, View};
use tandem_kernels::attention::{BLOCK_SIZE, KvCache, PagedSeq};
use tandem_kernels::places::{PagedGroup, Places};
use tandem_kernels::weight::Precision;
use tch::{Device, Kind, Tensor};

const STREAMS: usize = 64;
const PROMPT_TOKENS: usize = 64;
const MAX_MODEL_LEN: usize = 4096;

fn scheduler(criterion: &mut Criterion) {
    let limits = Limits {
        max_num_seqs: STREAMS,
        max_num_batched_tokens: 512,
        max_prefill_beside_decode: 512,
        max_waiting: 4096,
        max_model_len: MAX_MODEL_LEN,
        lookup: None,
    };
    let fresh = || {
        let blocks = (STREAMS * MAX_MODEL_LEN / BLOCK_SIZE) as u32;
        let mut scheduler = Scheduler::new(limits, BlockPool::new(blocks, Groups::one(BLOCK_SIZE)));
        for i in 0..STREAMS as u64 {
            let prompt = (0..PROMPT_TOKENS as u32).map(|token| token + i as u32).collect();
            let max_tokens = (MAX_MODEL_LEN - PROMPT_TOKENS) as u32;
            let request = Generate::new(RequestId(i), prompt, Sampling::greedy(), max_tokens);
            scheduler.add(request).expect("it fits");
        }
        scheduler
    };
    let mut scheduler = fresh();
    criterion.bench_function("scheduler: plan and commit 64 streams", |bencher| {
        bencher.iter(|| {
            let plan = match scheduler.plan(usize::MAX) {
                Some(plan) => plan,
                None => {
                    scheduler = fresh();
                    scheduler.plan(usize::MAX).expect("fresh requests run")
                }
            };
            let sampled = plan.rows.iter().filter(|row| row.samples > 0);
            let sampled = sampled
                .map(|_| {
                    vec![Scored {
                        token: 9,
                        logprob: 0.0,
                        top: vec![],
                    }]
                })
                .collect();
            black_box(scheduler.commit(plan, sampled));
        });
    });
}

fn sampler(criterion: &mut Criterion) {
    let logits = Tensor::randn([8, 32_000], (Kind::Float, Device::Cpu)) * 3.0;
    let nucleus = RawSampling {
        temperature: Some(0.8),
        top_p: Some(0.95),
        top_k: Some(50),
        ..RawSampling::default()
    };
    let logprobs = RawSampling {
        temperature: Some(0.0),
        logprobs: Some(5),
        ..RawSampling::default()
    };
    for (name, sampling) in [
        ("greedy", Sampling::greedy()),
        (
            "greedy with 5 log-probabilities",
            Sampling::new(logprobs, 32_000).expect("in range"),
        ),
        (
            "top-k 50, top-p 0.95",
            Sampling::new(nucleus, 32_000).expect("in range"),
        ),
    ] {
        let view = View {
            prompt: &[1, 2, 3],
            generated: 2,
            adapter: None,
            sampling: &sampling,
            pooling: None,
            stop_tokens: &[],
            uses: None,
        };
        let asks: Vec<Ask> = (0..8)
            .map(|seed| Ask {
                view,
                seed,
                mask: None,
                forced: None,
            })
            .collect();
        criterion.bench_function(&format!("sampler: 8 rows of 32000, {name}"), |bencher| {
            bencher.iter(|| black_box(sample(&logits, &asks)));
        });
    }
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/numerics/fixtures/gqa_tied")
}

fn decode_step(criterion: &mut Criterion) {
    let decoder = Decoder::load(&fixture(), Precision::F32, Device::Cpu).expect("the fixture loads");
    let params = peft::read(&fixture().join("adapter-all"), &decoder.spec, 64)
        .expect("the fixture's adapter")
        .params;
    let adapter = Adapter::new(&params, decoder.layout(), Precision::F32, Device::Cpu).expect("it packs");
    let shape = decoder.layout().cache_shape(&decoder.spec, 8);
    let cache = KvCache::new(shape, Precision::F32, Device::Cpu).expect("a small cache");
    let (tokens, positions): (Vec<u32>, Vec<i64>) = ((0..8).collect(), vec![20; 8]);
    let tables: Vec<[u32; 1]> = (0..8).map(|block| [block]).collect();
    let slots: Vec<i64> = (0..8).map(|block| block * BLOCK_SIZE as i64 + 20).collect();
    let seqs: Vec<PagedSeq> = tables
        .iter()
        .enumerate()
        .map(|(i, table)| PagedSeq {
            rows: i..i + 1,
            table,
            first_block: 0,
            kv_len: 21,
        })
        .collect();
    let groups = vec![PagedGroup::new(&slots, seqs)];
    let places = Places::new(Device::Cpu, &tokens, &positions, groups);
    for (name, lora) in [
        ("base", vec![]),
        (
            "half of them with an adapter",
            vec![AdapterRows {
                rows: 4..8,
                adapter: &adapter,
            }],
        ),
    ] {
        criterion.bench_function(
            &format!("decode step: 2 tiny layers, 8 streams, {name}"),
            |bencher| {
                let _no_grad = tch::no_grad_guard();
                bencher.iter(|| {
                    let context = Context::Paged {
                        cache: &cache,
                        groups: &places.groups,
                    };
                    let batch = Batch {
                        tokens: &tokens,
                        positions: &places.positions,
                        context,
                        lora: &lora,
                    };
                    black_box(decoder.head(&decoder.forward(&batch), batch.lora))
                });
            },
        );
    }
}

fn train_step(criterion: &mut Criterion) {
    let decoder = Decoder::load(&fixture(), Precision::F32, Device::Cpu).expect("the fixture loads");
    let lora = Lora {
        r: 4,
        alpha: 8.0,
        dropout: 0.0,
        target_modules: decoder.spec.lora_targets(),
        use_rslora: false,
        use_dora: false,
    };
    let hyper = Hyper {
        n_epochs: 1_000_000.0,
        max_steps: Some(1_000_000),
        max_steps_per_epoch: None,
        batch_size: 4,
        gradient_accumulation_steps: 1,
        learning_rate: 1e-4,
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
        max_seq_length: 64,
        packing: false,
        shuffle: true,
        save_strategy: SaveStrategy::Steps,
        save_steps: 0,
        eval_steps: 0,
        selection: None,
        objective: Objective::default(),
        frozen_layers: 0,
        method: Method::Lora(lora),
    };
    let folder = tempfile::tempdir().expect("a folder");
    let examples: Vec<Group> = (0..4)
        .map(|i| Example {
            tokens: (i..i + 33).collect(),
            weights: vec![1.0; 33],
        })
        .map(Group::from)
        .collect();
    std::fs::write(folder.path().join(files::TRAIN), dataset::encode(&examples)).expect("it is written");
    let id = "ftjob-bench".parse().expect("a job\'s id");
    let spec = JobSpec {
        id,
        folder: folder.path().to_owned(),
        tenant: String::new(),
        base_model: "fixture".to_owned(),
        hyper,
        life: Life::default(),
    };
    let mut trainer = Trainer::start(spec, &decoder).expect("it starts");
    criterion.bench_function("train step: 2 tiny layers, 4 x 32 tokens", |bencher| {
        bencher.iter(|| {
            loop {
                let quantum = trainer.quantum(Some(&decoder)).expect("a quantum runs");
                if quantum
                    .events
                    .iter()
                    .any(|event| matches!(event, JobEvent::Step(_)))
                {
                    break;
                }
            }
        });
    });
}

criterion_group!(turn, scheduler, sampler, decode_step, train_step);
criterion_main!(turn);
