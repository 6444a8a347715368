//! Keys and adapters that want more than there is, and one key that wants little: what each is given.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::simulation::plain;
use super::*;
use crate::TokenId;
use crate::blocks::Groups;
use crate::id::{AdapterRef, Digest};
use crate::rng;

/// Asks for the same again and again: so many tokens of prompt and of answer, so many requests at a time.
#[derive(Clone, Copy)]
struct Asker {
    key: u64,
    adapter: Option<u8>,
    prompt: usize,
    answer: u32,
    at_once: usize,
}

const SEATS: usize = 4;
const STEP: usize = 16;

struct World {
    scheduler: Scheduler,
    askers: Vec<Asker>,
    asks: u64,
    /// Of whom each request is, by its number.
    under_way: BTreeMap<u64, usize>,
    waiting: BTreeSet<u64>,
    /// Tokens, as they are charged.
    given: Vec<u64>,
    /// The most requests of others that were let in after a request and before it, by asker.
    overtaken: Vec<usize>,
    let_in_since: BTreeMap<u64, usize>,
}

impl World {
    fn new(n_blocks: u32, askers: Vec<Asker>) -> World {
        let limits = Limits {
            max_num_seqs: SEATS,
            max_num_batched_tokens: STEP,
            max_prefill_beside_decode: STEP / 2,
            max_waiting: 1000,
            max_model_len: 100,
            lookup: None,
        };
        World {
            scheduler: Scheduler::new(limits, BlockPool::new(n_blocks, Groups::one(4))),
            asks: 0,
            under_way: BTreeMap::new(),
            waiting: BTreeSet::new(),
            given: vec![0; askers.len()],
            overtaken: vec![0; askers.len()],
            let_in_since: BTreeMap::new(),
            askers,
        }
    }

    fn ask(&mut self) {
        for (who, asker) in self.askers.clone().into_iter().enumerate() {
            let mine = self.under_way.values().filter(|&&other| other == who).count();
            for _ in mine..asker.at_once {
                let id = self.asks;
                self.asks += 1;
                // No two prompts are alike.
                let token = |i: usize| rng::bits(9, id, i as u64) as TokenId % 1000;
                let adapter = asker.adapter.map(|n| AdapterRef {
                    digest: Digest([n; 32]),
                    folder: PathBuf::new(),
                });
                let request = Generate {
                    key: asker.key,
                    adapter,
                    ..plain(id, (0..asker.prompt).map(token).collect(), asker.answer)
                };
                self.scheduler.add(request).unwrap();
                self.under_way.insert(id, who);
                self.waiting.insert(id);
                self.let_in_since.insert(id, 0);
            }
        }
    }

    fn step(&mut self) {
        self.ask();
        let plan = self.scheduler.plan(usize::MAX).unwrap();
        self.scheduler.audit().unwrap();
        let mut came = vec![];
        for row in &plan.rows {
            let (id, who) = (row.id.0, self.under_way[&row.id.0]);
            self.given[who] += match row.start() < self.askers[who].prompt {
                true => row.tokens.len() as u64,
                false => 0,
            };
            self.given[who] += GENERATED * row.samples as u64;
            if self.waiting.remove(&id) {
                let others = self.let_in_since.remove(&id).unwrap();
                self.overtaken[who] = self.overtaken[who].max(others);
                came.push(who);
            }
        }
        // Of those that come with one step none overtakes another.
        for (other, overtaken) in &mut self.let_in_since {
            let key = |who: usize| self.askers[who].key;
            let own = key(self.under_way[other]);
            *overtaken += came.iter().filter(|&&who| key(who) != own).count();
        }
        let rows = plan.rows.iter().filter(|row| row.samples > 0);
        let scored = |_| Scored {
            token: 1,
            logprob: 0.0,
            top: vec![],
        };
        let sampled = rows.map(|row| vec![scored(row)]).collect();
        for progress in self.scheduler.commit(plan, sampled) {
            if progress.end.is_some() {
                self.under_way.remove(&progress.id.0);
            }
        }
    }
}

const GREEDY: Asker = Asker {
    key: 1,
    adapter: None,
    prompt: 3,
    answer: 10,
    at_once: 20,
};

/// The bound of the paper, for those that always wait: twice what a prompt, or the answers of all places, may cost.
#[test]
fn keys_that_want_more_than_there_is_are_given_the_same() {
    let long = Asker {
        key: 2,
        prompt: 30,
        answer: 2,
        at_once: 6,
        ..GREEDY
    };
    let many = Asker {
        key: 3,
        prompt: 2,
        answer: 1,
        at_once: 90,
        ..GREEDY
    };
    let mut world = World::new(200, vec![GREEDY, long, many]);
    let bound = 2 * u64::max(30, GENERATED * 10 * SEATS as u64);
    for _ in 0..3000 {
        world.step();
        let (most, least) = (world.given.iter().max(), world.given.iter().min());
        let apart = most.unwrap() - least.unwrap();
        assert!(apart <= bound, "{:?} are further apart than {bound}", world.given);
    }
    assert!(
        world.given.iter().all(|&given| given > 10_000),
        "{:?}",
        world.given
    );
}

#[test]
fn who_asks_little_is_next_whatever_waits() {
    let modest = Asker {
        key: 9,
        prompt: 5,
        answer: 1,
        at_once: 1,
        ..GREEDY
    };
    // Each of its prompts costs more than all that the modest key asks at a time: one, and it is behind.
    let greedy = Asker { prompt: 8, ..GREEDY };
    let other = Asker {
        key: 2,
        at_once: 50,
        ..greedy
    };
    // Also where blocks are short and sequences are forced out: not those of the one that asks little.
    for n_blocks in [200, 14] {
        let mut world = World::new(n_blocks, vec![greedy, other, modest]);
        for step in 0..3000 {
            // Less than its share: it never has more than the others.
            world.askers[2].at_once = usize::from(step % 12 == 0);
            world.step();
        }
        assert!(
            world.overtaken[2] <= 2,
            "{n_blocks} blocks: overtaken by {} requests of two keys",
            world.overtaken[2]
        );
        let forced = world.scheduler.counts().totals.preemptions;
        match n_blocks {
            14 => assert!(forced > 20, "{forced} were forced out"),
            // Answers of ten tokens are over before their turn is.
            _ => assert_eq!(forced, 0),
        }
    }
}

/// Long answers of one key have every place: one that asks for little has one when the last of them had its turn, and those
/// that make room lose nothing but a moment.
#[test]
fn a_key_with_every_place_gives_one_to_a_key_that_has_none() {
    let greedy = Asker { answer: 90, ..GREEDY };
    let modest = Asker {
        key: 9,
        prompt: 5,
        answer: 2,
        at_once: 0,
        ..GREEDY
    };
    for has_key in [true, false] {
        let key = if has_key { modest.key } else { greedy.key };
        let mut world = World::new(200, vec![greedy, Asker { key, ..modest }]);
        let (mut asked, mut longest) = (0, 0);
        for step in 0..4000 {
            let waits = |world: &World| world.waiting.iter().any(|id| world.under_way[id] == 1);
            if step % 50 == 30 {
                world.askers[1].at_once = 1;
                asked += 1;
            }
            let mut waited = 0;
            world.step();
            while waits(&world) {
                waited += 1;
                world.step();
            }
            world.askers[1].at_once = 0;
            longest = longest.max(waited);
        }
        let forced = world.scheduler.counts().totals.preemptions;
        match has_key {
            true => {
                assert!(longest <= TURN, "it waited for {longest} steps");
                assert!(forced <= asked, "{forced} were forced out by {asked} requests");
            }
            // Of the same key nobody makes room.
            false => assert!(
                longest > 3 * TURN && forced == 0,
                "{longest} steps, {forced} forced out"
            ),
        }
    }
}

#[test]
fn adapters_share_what_their_key_has() {
    let with = |key, adapter, at_once| Asker {
        key,
        adapter: Some(adapter),
        at_once,
        ..GREEDY
    };
    // Key 1 has two adapters, one of them popular; key 2 has one.
    let mut world = World::new(200, vec![with(1, 1, 40), with(1, 2, 5), with(2, 1, 6)]);
    for _ in 0..3000 {
        world.step();
    }
    let [popular, rare, other] = world.given[..] else {
        unreachable!()
    };
    let near = |a: u64, b: u64| (a as f64 / b as f64 - 1.0).abs() < 0.02;
    assert!(
        near(popular, rare) && near(popular + rare, other),
        "{:?}",
        world.given
    );
}

#[test]
fn time_in_which_nothing_was_asked_earns_nothing() {
    let late = Asker { key: 2, ..GREEDY };
    let mut world = World::new(200, vec![GREEDY, Asker { at_once: 0, ..late }]);
    for _ in 0..1000 {
        world.step();
    }
    let before = world.given[0];
    world.askers[1] = late;
    for _ in 0..1000 {
        world.step();
    }
    let (first, second) = (world.given[0] - before, world.given[1]);
    assert!(
        (first as f64 / second as f64 - 1.0).abs() < 0.1,
        "{first} and {second}"
    );
    // Nobody waits: nothing is remembered.
    world.askers.iter_mut().for_each(|asker| asker.at_once = 0);
    while world.scheduler.has_work() {
        world.step();
    }
    assert!(world.scheduler.plan(usize::MAX).is_none());
    assert!(world.scheduler.shares.is_empty());
}
