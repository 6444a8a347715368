//! Random worlds around the scheduler: requests come, park, leave and fail while a model of the KV cache checks that
//! every row attends to exactly what it should. Same seed, same trace.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;

use super::*;
use crate::TokenId;
use crate::blocks::Groups;
use crate::id::{AdapterDigest, AdapterRef, Digest};
use crate::pooling::Pooling;
use crate::rng;
use crate::sampling::{RawSampling, Sampling};

const VOCAB: u32 = 50;
const STOP: TokenId = 7;

/// What a world is made of.
#[derive(Clone, Copy)]
struct World {
    n_blocks: u32,
    block_size: usize,
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    max_prefill_beside_decode: usize,
    /// One turn in so many: abort something, park something, fail the step. 0: never.
    abort: usize,
    hold: usize,
    fail: usize,
    lookup: Option<Lookup>,
    /// Of each group of layers.
    windows: &'static [Option<usize>],
}

const LOOKUP: Lookup = Lookup {
    tokens: 4,
    min: 1,
    max: 3,
    max_sequences: 8,
};
const MAX_MODEL_LEN: usize = 60;
const CALM: World = World {
    n_blocks: 64,
    block_size: 4,
    max_num_seqs: 8,
    max_num_batched_tokens: 32,
    max_prefill_beside_decode: 16,
    abort: 0,
    hold: 0,
    fail: 0,
    lookup: None,
    windows: &[None],
};

struct Random {
    seed: u64,
    drawn: u64,
}

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.drawn += 1;
        (rng::uniform(self.seed, 1, self.drawn) * n as f64) as usize
    }
    fn one_in(&mut self, n: usize) -> bool {
        n > 0 && self.below(n) == 0
    }
}

/// The world's language model: the next token is a function of the adapter and all tokens before it. It repeats itself
/// often.
fn model(adapter: Option<AdapterDigest>, context: &[TokenId]) -> TokenId {
    let stream = adapter.map_or(0, |digest| u64::from(digest.0[0]));
    let key = context
        .iter()
        .fold(stream, |key, &token| rng::bits(key, stream, u64::from(token)));
    match context.len().checked_sub(3) {
        Some(before) if key % 4 > 0 => context[before],
        _ => (key / 4 % u64::from(VOCAB)) as TokenId,
    }
}

fn answer(request: &Generate) -> (Vec<TokenId>, FinishReason) {
    let mut tokens = request.prompt.to_vec();
    for _ in 0..request.max_tokens {
        tokens.push(model(
            request.adapter.as_ref().map(|adapter| adapter.digest),
            &tokens,
        ));
        if tokens.last() == Some(&STOP) {
            return (tokens.split_off(request.prompt.len()), FinishReason::Stop(STOP));
        }
    }
    (tokens.split_off(request.prompt.len()), FinishReason::Length)
}

fn request(random: &mut Random, id: u64) -> Generate {
    let longest = if random.one_in(4) { 40 } else { 12 };
    let prompt_len = 1 + random.below(longest);
    // Few distinct beginnings, so that prefixes meet.
    let family = random.below(3) as TokenId;
    let shared = random.below(prompt_len + 1);
    let token = |i: usize| {
        if i < shared {
            family
        } else {
            10 + random.below(20) as TokenId
        }
    };
    let prompt: Vec<TokenId> = (0..prompt_len).map(token).collect();
    let adapter = (random.below(3) as u8).checked_sub(1).map(|n| AdapterRef {
        digest: Digest([n + 1; 32]),
        folder: PathBuf::new(),
    });
    let prompt_logprobs = random.one_in(5).then_some(0);
    let pooled = random.one_in(8) && prompt_logprobs.is_none();
    let pooling = pooled.then(|| Pooling::ALL[random.below(3)]);
    let raw = RawSampling {
        temperature: Some(0.0),
        prompt_logprobs,
        ..RawSampling::default()
    };
    let sampling = Sampling::new(raw, VOCAB).unwrap();
    let max_tokens = match pooling {
        Some(_) => 0,
        None => random.below(20.min(MAX_MODEL_LEN - prompt_len)) as u32,
    };
    Generate {
        id: RequestId(id),
        prompt: prompt.into(),
        adapter,
        sampling,
        grammar: None,
        thinking: None,
        priority: [-1, 0, LAST_PRIORITY][random.below(3)],
        key: random.below(3) as u64,
        salt: None,
        trace: None,
        max_tokens,
        pooling,
        stop_tokens: vec![STOP],
    }
}

/// What a client has seen of its request.
struct Client {
    request: Generate,
    output: Vec<TokenId>,
    /// Prompt positions whose outputs it was owed and has.
    delivered: usize,
}

/// What it is owed.
fn wanted(request: &Generate) -> Range<usize> {
    match request.pooling {
        Some(pooling) => pooling.positions(request.prompt.len()),
        None if request.sampling.prompt_logprobs().is_some() => 0..request.prompt.len() - 1,
        None => 0..0,
    }
}

/// What stands in a slot: the group of layers, the adapter and all tokens up to its own, when it was written.
type Written = (usize, Option<AdapterDigest>, Vec<TokenId>);

struct Simulation {
    scheduler: Scheduler,
    random: Random,
    world: World,
    clients: BTreeMap<RequestId, Client>,
    held: BTreeSet<RequestId>,
    cache: Vec<Option<Written>>,
    trace: Vec<String>,
    finished: usize,
    dropped: usize,
}

impl World {
    fn groups(&self) -> Groups {
        Groups::new(
            self.block_size,
            self.windows.to_vec(),
            self.max_num_batched_tokens,
        )
    }
}

impl Simulation {
    fn new(world: World, seed: u64) -> Simulation {
        let limits = Limits {
            max_num_seqs: world.max_num_seqs,
            max_num_batched_tokens: world.max_num_batched_tokens,
            max_prefill_beside_decode: world.max_prefill_beside_decode,
            max_waiting: 1000,
            max_model_len: MAX_MODEL_LEN,
            lookup: world.lookup,
        };
        Simulation {
            scheduler: Scheduler::new(limits, BlockPool::new(world.n_blocks, world.groups())),
            random: Random { seed, drawn: 0 },
            world,
            clients: BTreeMap::new(),
            held: BTreeSet::new(),
            cache: vec![None; world.n_blocks as usize * world.block_size],
            trace: vec![],
            finished: 0,
            dropped: 0,
        }
    }

    fn some_client(&mut self) -> Option<RequestId> {
        let n = self.clients.len();
        (n > 0).then(|| *self.clients.keys().nth(self.random.below(n)).unwrap())
    }

    fn turn(&mut self) {
        if self.random.one_in(self.world.abort)
            && let Some(id) = self.some_client()
        {
            assert!(self.scheduler.abort(id), "{id:?} is known");
            assert!(!self.scheduler.abort(id), "{id:?} is gone");
            self.clients.remove(&id);
            self.held.remove(&id);
            self.dropped += 1;
        }
        if self.random.one_in(self.world.hold)
            && let Some(id) = self.some_client()
        {
            self.scheduler.hold(id);
            self.held.insert(id);
        }
        if self.random.one_in(3)
            && let Some(id) = self.held.pop_first()
        {
            self.scheduler.release(id);
        }
        let free = self.clients.keys().any(|id| !self.held.contains(id));
        assert_eq!(self.scheduler.has_work(), free);
        let plan = self.scheduler.plan(usize::MAX);
        self.scheduler.audit().unwrap();
        assert_eq!(
            plan.is_some(),
            free,
            "there is work exactly if something is planned"
        );
        let Some(plan) = plan else { return };
        self.trace.push(format!("{plan:?}"));
        if self.random.one_in(self.world.fail) {
            // A failed step may have written anything.
            let slots = plan.groups.iter().flat_map(|group| &group.slots);
            slots.for_each(|&slot| self.cache[slot as usize] = None);
            let ids: Vec<RequestId> = plan.rows.iter().map(|row| row.id).collect();
            assert_eq!(self.scheduler.abandon(plan), ids);
            ids.iter()
                .for_each(|id| assert!(self.clients.remove(id).is_some()));
            self.dropped += ids.len();
        } else {
            let sampled = self.run(&plan);
            let progress = self.scheduler.commit(plan, sampled);
            progress.into_iter().for_each(|progress| self.tell(progress));
        }
        self.scheduler.audit().unwrap();
    }

    /// The forward pass: writes the cache, and reads back what each row would attend to.
    fn run(&mut self, plan: &StepPlan) -> Vec<Vec<Scored>> {
        let World {
            max_num_batched_tokens,
            ..
        } = self.world;
        assert!(plan.tokens.len() <= max_num_batched_tokens);
        assert!(plan.rows.is_sorted_by_key(|row| row.adapter));
        for (i, row) in plan.rows.iter().enumerate() {
            assert!(!self.held.contains(&row.id), "{:?} is parked", row.id);
            let client = &self.clients[&row.id];
            let known = [&client.request.prompt[..], &client.output[..]].concat();
            let context = [&known[..], plan.guesses(row)].concat();
            assert_eq!(
                row.adapter,
                client.request.adapter.as_ref().map(|adapter| adapter.digest)
            );
            assert_eq!(context[row.start()..row.kv_len], plan.tokens[row.tokens.clone()]);
            assert_eq!(
                row.samples > 0,
                row.kv_len == context.len() && client.request.max_tokens > 0
            );
            // No guess takes a place that its sequence will never have.
            assert!(
                context.len() < client.request.prompt.len() + (client.request.max_tokens as usize).max(1)
            );
            for (position, flat) in (row.start()..row.kv_len).zip(row.tokens.clone()) {
                assert_eq!(plan.positions[flat], position as i64);
                for group in 0..plan.groups.len() {
                    let slot = self.slot(plan, group, i, position);
                    assert_eq!(plan.groups[group].slots[flat] as usize, slot);
                    self.cache[slot] = Some((group, row.adapter, context[..=position].to_vec()));
                }
            }
        }
        let mut sampled = vec![];
        for (i, row) in plan.rows.iter().enumerate() {
            let client = &self.clients[&row.id];
            let known = [&client.request.prompt[..], &client.output[..]].concat();
            let context = [&known[..], plan.guesses(row)].concat();
            for (group, window) in self.world.windows.iter().enumerate() {
                // What the row's first token sees, and so all of them.
                let first = window.map_or(0, |window| (row.start() + 1).saturating_sub(window));
                for position in first..row.kv_len {
                    let expected = (group, row.adapter, context[..=position].to_vec());
                    assert_eq!(
                        self.cache[self.slot(plan, group, i, position)].as_ref(),
                        Some(&expected),
                        "{:?} attends to a stranger",
                        row.id
                    );
                }
            }
            let client = self.clients.get_mut(&row.id).unwrap();
            if !row.wanted.is_empty() {
                let inside = row.start() <= row.wanted.start && row.wanted.end <= row.kv_len;
                let next = wanted(&client.request).start + client.delivered;
                assert!(inside && row.wanted.start == next);
                client.delivered += row.wanted.len();
            }
            if row.samples > 0 {
                let mut told = vec![];
                for end in known.len()..=context.len() {
                    let token = model(row.adapter, &context[..end]);
                    told.push(Scored {
                        token,
                        logprob: 0.0,
                        top: vec![],
                    });
                    if context.get(end) != Some(&token) {
                        break;
                    }
                }
                sampled.push(told);
            }
        }
        sampled
    }

    /// Where a row's position stands in a group.
    fn slot(&self, plan: &StepPlan, group: usize, row: usize, position: usize) -> usize {
        let block_size = self.world.block_size;
        let group = &plan.groups[group];
        let table = &group.tables[row];
        let block = group.blocks[table.blocks.clone()][position / block_size - table.first];
        block as usize * block_size + position % block_size
    }

    fn tell(&mut self, Progress { id, tokens, end }: Progress) {
        let client = self.clients.get_mut(&id).unwrap();
        client.output.extend(tokens.iter().map(|scored| scored.token));
        let Some(End {
            reason,
            cached_tokens,
            guessed: _,
        }) = end
        else {
            return;
        };
        let Client {
            request,
            output,
            delivered,
        } = self.clients.remove(&id).unwrap();
        assert_eq!((output, reason), answer(&request), "disturbed");
        assert!((cached_tokens as usize) < request.prompt.len());
        let wanted = wanted(&request);
        assert_eq!(delivered, wanted.len());
        assert!(wanted.is_empty() || cached_tokens as usize <= wanted.start);
        self.finished += 1;
    }
}

#[test]
fn every_request_ends_once_with_its_own_answer() {
    let worlds = [
        CALM,
        World { n_blocks: 16, ..CALM },
        World {
            n_blocks: 15,
            block_size: 4,
            max_num_seqs: 4,
            max_num_batched_tokens: 5,
            ..CALM
        },
        World {
            n_blocks: 20,
            abort: 7,
            hold: 3,
            fail: 50,
            ..CALM
        },
        World {
            n_blocks: 60,
            block_size: 1,
            max_num_batched_tokens: 3,
            abort: 20,
            hold: 2,
            ..CALM
        },
        World {
            n_blocks: 200,
            max_num_seqs: 30,
            max_prefill_beside_decode: 1,
            hold: 5,
            fail: 100,
            ..CALM
        },
    ];
    let guessing = worlds.map(|world| World {
        lookup: Some(LOOKUP),
        ..world
    });
    let worlds = worlds.into_iter().chain(guessing);
    // Sequences of 60 tokens, which a window of 5 mostly leaves behind. Of the first, one that sees all would not fit.
    let worlds = worlds.chain([
        World {
            n_blocks: 14,
            windows: &[Some(5)],
            max_num_batched_tokens: 9,
            ..CALM
        },
        World {
            n_blocks: 60,
            windows: &[Some(5), None, Some(1)],
            max_num_batched_tokens: 9,
            max_prefill_beside_decode: 5,
            ..CALM
        },
        World {
            n_blocks: 150,
            block_size: 1,
            windows: &[None, Some(5), Some(12)],
            max_num_batched_tokens: 6,
            abort: 20,
            hold: 3,
            fail: 50,
            lookup: Some(LOOKUP),
            ..CALM
        },
        World {
            n_blocks: 300,
            windows: &[Some(16), Some(16), None, Some(16)],
            max_num_seqs: 30,
            abort: 7,
            hold: 5,
            lookup: Some(LOOKUP),
            ..CALM
        },
    ]);
    let n_requests = 150;
    let mut totals = vec![];
    for (number, world) in worlds.enumerate() {
        for seed in 0..8 {
            let mut simulation = Simulation::new(world, seed);
            let mut turns = 0;
            let mut id = 0;
            while id < n_requests || !simulation.clients.is_empty() {
                for _ in 0..simulation.random.below(3) {
                    if id < n_requests {
                        let request = request(&mut simulation.random, id);
                        simulation.scheduler.add(request.clone()).unwrap();
                        simulation.clients.insert(
                            request.id,
                            Client {
                                request,
                                output: vec![],
                                delivered: 0,
                            },
                        );
                        id += 1;
                    }
                }
                simulation.turn();
                turns += 1;
                assert!(
                    turns < 20_000,
                    "world {number} seed {seed}: {} never end",
                    simulation.clients.len()
                );
            }
            assert_eq!(simulation.finished + simulation.dropped, n_requests as usize);
            let counts = simulation.scheduler.counts();
            assert_eq!((counts.running, counts.waiting, counts.kv_blocks_used), (0, 0, 0));
            totals.push(counts.totals);
        }
    }
    // The worlds are worth something only if they meet all of it.
    let sum = |counter: fn(&Totals) -> u64| totals.iter().map(counter).sum::<u64>();
    let (preemptions, hits) = (
        sum(|totals| totals.preemptions),
        sum(|totals| totals.prefix_hit_tokens),
    );
    assert!(
        preemptions > 300 && hits > 5000,
        "{preemptions} preemptions, {hits} tokens of prefix hits"
    );
    let (guessed, accepted) = (
        sum(|totals| totals.guessed_tokens),
        sum(|totals| totals.accepted_tokens),
    );
    assert!(
        accepted > 1000 && guessed > accepted + 1000,
        "{accepted} of {guessed} guesses were right"
    );
}

#[test]
fn the_same_seed_is_the_same_trace() {
    let world = World {
        n_blocks: 20,
        abort: 7,
        hold: 3,
        fail: 50,
        lookup: Some(LOOKUP),
        ..CALM
    };
    let trace = |seed| {
        let mut simulation = Simulation::new(world, seed);
        for id in 0..200 {
            let request = request(&mut simulation.random, id);
            simulation.scheduler.add(request.clone()).unwrap();
            simulation.clients.insert(
                request.id,
                Client {
                    request,
                    output: vec![],
                    delivered: 0,
                },
            );
            simulation.turn();
        }
        simulation.trace
    };
    assert_eq!(trace(3), trace(3));
    assert_ne!(trace(3), trace(4));
}

pub(super) fn plain(id: u64, prompt: Vec<TokenId>, max_tokens: u32) -> Generate {
    Generate::new(RequestId(id), prompt.into(), Sampling::greedy(), max_tokens)
}

fn scheduler(n_blocks: u32, max_waiting: usize) -> Scheduler {
    let limits = Limits {
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        max_prefill_beside_decode: 8,
        max_waiting,
        max_model_len: 50,
        lookup: None,
    };
    Scheduler::new(limits, BlockPool::new(n_blocks, Groups::one(4)))
}

fn step(scheduler: &mut Scheduler) -> Vec<(u64, usize)> {
    let plan = scheduler.plan(usize::MAX).unwrap();
    let shape = plan.rows.iter().map(|row| (row.id.0, row.tokens.len())).collect();
    let sample = |_| {
        vec![Scored {
            token: 1,
            logprob: 0.0,
            top: vec![],
        }]
    };
    let sampled = plan
        .rows
        .iter()
        .filter(|row| row.samples > 0)
        .map(sample)
        .collect();
    scheduler.commit(plan, sampled);
    shape
}

#[test]
fn a_long_prompt_does_not_stall_streams() {
    let mut scheduler = scheduler(40, 10);
    scheduler.add(plain(0, vec![5; 3], 9)).unwrap();
    assert_eq!(step(&mut scheduler), [(0, 3)]);
    scheduler.add(plain(1, (0..40).collect(), 2)).unwrap();
    for _ in 0..5 {
        assert_eq!(step(&mut scheduler), [(0, 1), (1, 8)]);
    }
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 1)]);
    scheduler.abort(RequestId(0));
    scheduler.abort(RequestId(1));
    scheduler.add(plain(2, (0..40).rev().collect(), 2)).unwrap();
    assert_eq!(
        step(&mut scheduler),
        [(2, 16)],
        "alone, a prompt takes the whole step"
    );
}

#[test]
fn who_has_the_lower_number_goes_first() {
    let with = |id, priority, prompt: Vec<TokenId>| Generate {
        priority,
        ..plain(id, prompt, 9)
    };
    // Four places, all taken by what nobody waits for, and more of it waits.
    let mut scheduler = scheduler(60, 4);
    for id in 0..8 {
        if id == 4 {
            step(&mut scheduler);
        }
        scheduler.add(with(id, 7, vec![id as TokenId; 4])).unwrap();
    }
    assert_eq!(
        scheduler.add(with(8, 7, vec![1])),
        Err(Fault::Overloaded { waiting: 4 })
    );
    // A prompt of the whole step comes in at once, whatever waits; its budget is not what is left beside the others.
    scheduler.add(with(10, 0, vec![9; 12])).unwrap();
    assert_eq!(step(&mut scheduler), [(10, 12), (0, 1), (1, 1), (2, 1)]);
    scheduler.abort(RequestId(1));
    assert_eq!(step(&mut scheduler), [(10, 1), (0, 1), (2, 1), (3, 1)]);
    scheduler.add(with(11, -1, vec![8; 20])).unwrap();
    assert_eq!(step(&mut scheduler), [(11, 12), (10, 1), (0, 1), (2, 1)]);
    while scheduler.has_work() {
        step(&mut scheduler);
        scheduler.audit().unwrap();
    }
    // What nobody waits for has one step of eight while somebody waits.
    let mut scheduler = self::scheduler(60, 2);
    scheduler.add(with(0, LAST_PRIORITY, vec![1; 4])).unwrap();
    assert_eq!(step(&mut scheduler), [(0, 4)]);
    scheduler.add(with(1, 5, vec![2; 3])).unwrap();
    assert_eq!(step(&mut scheduler), [(1, 3)]);
    for _ in 0..6 {
        assert_eq!(step(&mut scheduler), [(1, 1)]);
    }
    assert_eq!(step(&mut scheduler), [(1, 1), (0, 1)]);
    assert!(scheduler.abort(RequestId(1)));
    assert_eq!(step(&mut scheduler), [(0, 1)]);
    // It takes blocks as it takes places.
    let mut scheduler = self::scheduler(5, 2);
    scheduler.add(with(0, 7, vec![1; 12])).unwrap();
    assert_eq!(step(&mut scheduler), [(0, 12)]);
    let short = Generate {
        max_tokens: 2,
        ..with(1, 6, vec![2; 15])
    };
    scheduler.add(short).unwrap();
    assert_eq!(step(&mut scheduler), [(1, 15)]);
}

#[test]
fn what_cannot_fit_is_refused_with_its_numbers() {
    let mut scheduler = scheduler(5, 1);
    let cases = [
        (plain(0, vec![], 1), "0 tokens"),
        (plain(0, vec![1; 49], 2), "49 tokens and 2 more exceed 50"),
        (plain(0, vec![1; 18], 4), "need 6 KV blocks of 5"),
    ];
    for (request, message) in cases {
        let fault = scheduler.add(request).unwrap_err();
        assert!(fault.to_string().contains(message), "{fault}");
    }
    scheduler.add(plain(0, vec![1; 18], 3)).unwrap();
    assert_eq!(
        scheduler.add(plain(1, vec![1], 1)),
        Err(Fault::Overloaded { waiting: 1 })
    );
}

#[test]
fn parked_sequences_give_way() {
    let mut scheduler = scheduler(8, 10);
    for id in 0..4 {
        scheduler.add(plain(id, vec![id as TokenId; 3], 5)).unwrap();
    }
    step(&mut scheduler);
    (0..4).for_each(|id| scheduler.hold(RequestId(id)));
    assert!(scheduler.plan(usize::MAX).is_none());
    scheduler.add(plain(9, vec![9; 20], 5)).unwrap();
    assert_eq!(
        step(&mut scheduler),
        [(9, 16)],
        "all places were taken by clients that do not read"
    );
    (0..4).for_each(|id| scheduler.release(RequestId(id)));
    let mut turns = 0;
    while scheduler.has_work() {
        step(&mut scheduler);
        scheduler.audit().unwrap();
        turns += 1;
        assert!(turns < 50);
    }
}
