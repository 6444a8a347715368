//! The turn loop of a replica: one thread that owns model, cache, adapters and trainer, plans, runs, commits and
//! tells. Read [`Engine::turn`] first. Not here: which tokens run (core), the forward (model), how a job trains (train).

mod clients;
mod files;
mod inbox;
mod job;
mod jobs;
mod learner;
mod learners;
#[cfg(test)]
mod tests;
mod traced;
mod training;

use std::hash::{BuildHasher, RandomState};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use tandem_core::message::{Event, Fault, Generate, Scored};
use tandem_core::replica::Command;
use tandem_core::sched::{Row, Scheduler, StepPlan, View};
use tandem_core::stats::Stats;
use tandem_core::uses::Uses;
use tandem_core::{TokenId, id::RequestId};
use tandem_kernels::attention::KvCache;
use tch::Tensor;
use tokio::sync::{mpsc, watch};
use tracing::{error, warn};

use crate::bank::{AdapterBank, Pin};
use crate::batch::{self, ScoredRow, Step, StepInputs};
use crate::grammars::{Grammars, Readiness};
use crate::guard::{self, TorchFault};
use crate::model::Decoder;
use crate::pace::{Load, Pace};
use crate::pool::{self, Share};
use crate::ranks::Ranks;
use crate::sample::{self, Ask, NotFinite};
use crate::thoughts::Thoughts;
use clients::{Client, Clients, Delivery};
use files::Files;
use inbox::{Inbox, Word};
use job::Supervisor;
use jobs::Jobs;
use learners::Learners;
use training::Turns;

/// Bytes of logits at a time when prompts are scored: `[T, V]` never exists whole.
const SCORE_BYTES: usize = 32 << 20;
/// Between two looks at clients that did not read, when there is nothing else to do.
const PARKED_POLL: Duration = Duration::from_millis(2);
/// Between two looks after the other ranks, when there is nothing to do.
const RANK_CHECK: Duration = Duration::from_millis(250);
/// Turns between two looks for clients that left before anything was said to them.
const SWEEP_TURNS: u64 = 32;

pub struct Engine {
    decoder: Decoder,
    cache: KvCache,
    scheduler: Scheduler,
    bank: AdapterBank,
    grammars: Grammars,
    thoughts: Thoughts,
    clients: Clients,
    inbox: Inbox,
    files: Files,
    jobs: Jobs,
    /// Supervisors of jobs that are over, with events they have not read or that are not due yet.
    farewells: Vec<Supervisor>,
    learners: Learners,
    turns: Turns,
    pace: Pace,
    counters: Counters,
    ranks: Ranks,
    /// Why the replica is over, other than in order.
    loss: Option<String>,
    stats: watch::Sender<Stats>,
    seed: u64,
    /// No other engine's.
    nonce: u64,
}

/// What [`Stats`] counts beyond the scheduler's and the bank's numbers.
#[derive(Default)]
struct Counters {
    turns: u64,
    steps: u64,
    failed_steps: u64,
    step_seconds: f64,
    trained_tokens: u64,
    train_steps: u64,
    train_seconds: f64,
    shared_passes: u64,
    shared_slices: u64,
}

/// What an engine is made of.
pub struct Parts {
    pub decoder: Decoder,
    pub cache: KvCache,
    pub scheduler: Scheduler,
    pub bank: AdapterBank,
    pub grammars: Grammars,
    pub thoughts: Thoughts,
    pub pace: Pace,
    /// That train at once.
    pub max_training_jobs: usize,
    pub commands: mpsc::Receiver<Command>,
    pub stats: watch::Sender<Stats>,
    /// Of requests that bring none.
    pub seed: u64,
}

/// What a step computed.
struct Output {
    /// For each row that samples, in the plan's order: what it says, right guesses first.
    sampled: Vec<Result<Vec<Scored>, NotFinite>>,
    /// In the plan's order, positions ascending.
    scored: Vec<(RequestId, Result<Scored, NotFinite>)>,
    pooled: Vec<Share>,
}

impl Engine {
    pub fn new(parts: Parts) -> Engine {
        let Parts {
            decoder,
            cache,
            scheduler,
            bank,
            grammars,
            thoughts,
            pace,
            max_training_jobs,
            commands,
            stats,
            seed,
        } = parts;
        Engine {
            ranks: Ranks::new(decoder.comm().clone()),
            loss: None,
            files: Files::new(decoder.fit()),
            decoder,
            cache,
            scheduler,
            bank,
            grammars,
            thoughts,
            clients: Clients::default(),
            inbox: Inbox::new(commands),
            jobs: Jobs::new(max_training_jobs),
            farewells: vec![],
            learners: Learners::default(),
            turns: Turns::default(),
            pace,
            counters: Counters::default(),
            stats,
            seed,
            nonce: RandomState::new().hash_one(()),
        }
    }

    /// Until [`Command::Stop`], until nobody can send commands any more, or until the device or a rank is lost. The
    /// statistics' channel closes after it.
    pub fn run(mut self) {
        let _no_grad = tch::no_grad_guard();
        while self.turn().is_continue() {}
        self.stop();
    }

    /// One turn: hear, plan, run, commit, tell; then, if the pace allows, train a little.
    fn turn(&mut self) -> ControlFlow<()> {
        self.hear()?;
        if let Some(plan) = self.scheduler.plan(self.pace.most_prompt_tokens()) {
            let span = self.traced_step(&plan);
            let began = Instant::now();
            let result = guard::torch(|| self.step(&plan));
            let took = began.elapsed();
            drop(span);
            self.pace.stepped(took, plan.prompt_tokens());
            self.counters.steps += 1;
            self.counters.step_seconds += took.as_secs_f64();
            match result {
                Ok(output) => self.tell(plan, output),
                Err(fault) => self.recover(plan, fault)?,
            }
        }
        self.train_within()?;
        self.publish();
        ControlFlow::Continue(())
    }

    /// Takes in all that was said; waits for more only when there is nothing to do.
    fn hear(&mut self) -> ControlFlow<()> {
        self.counters.turns += 1;
        if self.counters.turns.is_multiple_of(SWEEP_TURNS) {
            self.clients.left().into_iter().for_each(|id| self.forget(id));
        }
        self.deliver_parked();
        while !self.has_work() {
            // Whoever watches sees the last word before the silence.
            self.publish();
            let paused = !self.jobs.is_empty() || !self.farewells.is_empty();
            let patience = match paused || self.clients.is_any_parked() {
                true => Some(PARKED_POLL),
                false => self.ranks.are_many().then_some(RANK_CHECK),
            };
            match self
                .inbox
                .wait(&mut self.bank, &mut self.grammars, &mut self.files, patience)
            {
                Some(word) => self.obey(word)?,
                None => {
                    if let Err(fault) = guard::torch(|| self.ranks.check()) {
                        return self.lose(fault);
                    }
                    self.clients.left().into_iter().for_each(|id| self.forget(id));
                    self.deliver_parked();
                }
            }
        }
        while let Some(word) = self
            .inbox
            .try_next(&mut self.bank, &mut self.grammars, &mut self.files)
        {
            self.obey(word)?;
        }
        ControlFlow::Continue(())
    }

    fn has_work(&self) -> bool {
        self.scheduler.has_work() || self.jobs.can_go_on() || self.learners.can_go_on()
    }

    fn obey(&mut self, word: Word) -> ControlFlow<()> {
        match word {
            Word::Command(Command::Generate(request, events)) => self.admit(request, events),
            Word::Command(Command::Abort(id)) => self.forget(id),
            Word::Command(Command::LoadAdapter(adapter, reply)) => match self.bank.info(adapter.digest) {
                // Whoever asked may be gone; that is no reason to unload.
                Some(info) => drop(reply.send(Ok(info))),
                None => {
                    self.bank.pin(&adapter);
                    self.clients.await_adapter(adapter.digest, reply);
                }
            },
            Word::Command(Command::UnloadAdapter(digest)) => {
                if !self.clients.is_awaited(digest) {
                    self.bank.dequeue(digest);
                }
                self.bank.forget(digest);
            }
            Word::Command(Command::StartJob(spec, events)) => self.start_job(*spec, events),
            Word::Command(Command::CancelJob(id)) => self.cancel_job(&id),
            Word::Command(Command::PauseJob(id)) => self.pause_job(&id),
            Word::Command(Command::Learn(id, learn)) => self.learn(id, learn),
            Word::Command(Command::Stop) | Word::NobodyLeft => return ControlFlow::Break(()),
            Word::Loaded((digest, result)) => {
                for id in self.clients.awaiting(digest) {
                    match &result {
                        Ok(_) => self.resume_with_adapter(id),
                        Err(fault) => self.fail(id, fault.clone()),
                    }
                }
                let info = result.map(|_| self.bank.info(digest).expect("it was loaded just now"));
                self.clients.answer_adapter(digest, info);
                self.bank.begin_loads();
            }
            Word::Compiled(compiled) => {
                for (id, readiness) in self.grammars.compiled(compiled) {
                    match readiness {
                        Ok(()) if self.clients.adapter(id).is_none() => self.scheduler.release(id),
                        Ok(()) => {}
                        Err(fault) => self.fail(id, fault),
                    }
                }
            }
            Word::Filed(done) => self.filed(done),
        }
        ControlFlow::Continue(())
    }

    fn admit(&mut self, request: Generate, events: mpsc::Sender<Event>) {
        let id = request.id;
        let refused = match self.clients.has(id) {
            true => Err(Fault::Refused(format!("request {} is already here", id.0))),
            false => request.check(
                self.decoder.spec.vocab as u32,
                self.scheduler.max_model_len() as u32,
            ),
        };
        let client = Client::new(&request, events, self.seed);
        let (adapter, grammar) = (request.adapter.clone(), request.grammar.clone());
        let thinking = request.thinking.clone();
        let ends = self.grammars.ends_among(&request.stop_tokens);
        if let Err(fault) = refused.and_then(|()| self.scheduler.add(request)) {
            client.refuse(fault);
            return;
        }
        self.clients.insert(id, client);
        if let Some(Err(fault)) = thinking.map(|budget| self.thoughts.admit(id, *budget)) {
            return self.fail(id, fault);
        }
        match grammar.map(|grammar| self.grammars.admit(id, grammar, ends)) {
            None | Some(Ok(Readiness::Ready)) => {}
            Some(Ok(Readiness::Awaited)) => self.scheduler.hold(id),
            Some(Err(fault)) => return self.fail(id, fault),
        }
        if let Some(adapter) = adapter {
            match self.bank.pin(&adapter) {
                Pin::Held => self.clients.pinned(id),
                Pin::Awaited => self.scheduler.hold(id),
            }
        }
    }

    fn resume_with_adapter(&mut self, id: RequestId) {
        let digest = self.clients.adapter(id).expect("it waits for an adapter").digest;
        self.bank.hold(digest);
        self.clients.pinned(id);
        if !self.grammars.is_awaited_by(id) {
            self.scheduler.release(id);
        }
    }

    /// The forward of a plan, on every rank, and everything read off its logits.
    fn step(&mut self, plan: &StepPlan) -> Output {
        let wanted = self.scored_rows(plan);
        let at_once = (SCORE_BYTES / (4 * self.decoder.spec.vocab as usize)).max(1);
        let rows = batch::sampled_rows(plan);
        let flat = |wanted: &[ScoredRow]| wanted.iter().map(|wanted| wanted.row).collect::<Vec<i64>>();
        let step = Step::of(plan);
        if self.ranks.are_many() {
            let sampled = (!rows.is_empty()).then(|| rows.clone());
            let heads: Vec<Vec<i64>> = sampled
                .into_iter()
                .chain(wanted.chunks(at_once).map(flat))
                .collect();
            self.ranks.order_adapters(self.bank.changes());
            self.ranks.order_step(&step, &heads);
            self.ranks.send();
        }
        self.grammars
            .begin_masks(batch::sampling(plan).map(|row| (row.id, plan.guesses(row))));
        let inputs = StepInputs::new(step, &self.decoder, &self.cache, |digest| self.bank.get(digest));
        let hidden = self.decoder.forward(&inputs.batch(&self.cache)); // [T, H]
        let sampled = match rows.is_empty() {
            true => vec![],
            false => {
                let logits = inputs.logits(&self.decoder, &hidden, &rows); // [S, V]
                self.grammars.await_masks(batch::sampling(plan).map(|row| row.id));
                self.choose(plan, &logits)
            }
        };
        let mut scored = Vec::with_capacity(wanted.len());
        for chunk in wanted.chunks(at_once) {
            let rows = flat(chunk);
            let targets: Vec<(TokenId, u32)> =
                chunk.iter().map(|wanted| (wanted.target, wanted.n_top)).collect();
            let logits = inputs.logits(&self.decoder, &hidden, &rows); // [chunk, V]
            let ids = chunk.iter().map(|&ScoredRow { id, .. }| id);
            scored.extend(ids.zip(sample::score(&logits, &targets)));
        }
        let pooled = pool::shares(
            plan,
            &hidden,
            |row| self.view(row).pooling.is_some(),
            |hidden| self.decoder.normed(hidden),
        );
        // What a GPU computed beside a lost rank is only known to be wrong now.
        self.ranks.check();
        Output {
            sampled,
            scored,
            pooled,
        }
    }

    /// The tokens of each row that samples from `logits [S, V]`, as far as its guesses are right and its grammar is known.
    fn choose(&self, plan: &StepPlan, logits: &Tensor) -> Vec<Result<Vec<Scored>, NotFinite>> {
        let view = |row| self.view(row);
        // Penalties after a guess count it.
        let used: Vec<Vec<Uses>> = batch::sampling(plan)
            .map(|row| {
                let mut used: Vec<Uses> = vec![];
                for &guess in plan.guesses(row) {
                    let Some(before) = used.last().or(view(row).uses) else {
                        break;
                    };
                    let mut uses = before.clone();
                    uses.generated(guess);
                    used.push(uses);
                }
                used
            })
            .collect();
        let asks: Vec<Ask> = batch::sampling(plan)
            .zip(&used)
            .flat_map(|(row, used)| {
                let (view, seed) = (view(row), self.clients.seed(row.id));
                let masks = self.grammars.masks(row.id);
                let forced = self.thoughts.forced(row.id, plan.guesses(row));
                let after = move |guesses: usize| match guesses {
                    0 => view,
                    _ => View {
                        generated: view.generated + guesses,
                        uses: used.get(guesses - 1),
                        ..view
                    },
                };
                forced.into_iter().enumerate().map(move |(guesses, forced)| Ask {
                    view: after(guesses),
                    seed,
                    mask: masks.and_then(|masks| masks.get(guesses)),
                    forced,
                })
            })
            .collect();
        let mut chosen = sample::sample(logits, &asks).into_iter();
        batch::sampling(plan)
            .map(|row| {
                let known = self.grammars.masks(row.id).map_or(row.samples, <[_]>::len);
                let chosen: Vec<_> = chosen.by_ref().take(row.samples).collect();
                batch::until_wrong(chosen.into_iter().take(known), plan.guesses(row))
            })
            .collect()
    }

    /// Prompt positions of a plan whose next tokens are to be scored.
    fn scored_rows(&self, plan: &StepPlan) -> Vec<ScoredRow> {
        batch::scored_rows(plan, |row, position| {
            let view = self.view(row);
            let n_top = view.sampling.prompt_logprobs()?;
            Some((view.prompt[position + 1], n_top))
        })
    }

    /// A planned row's request, before anything can abort it.
    fn view(&self, row: &Row) -> View<'_> {
        let view = self.scheduler.view(row);
        view.expect("nothing was aborted since the plan")
    }

    /// Commits a step and tells its clients. A row with broken logits fails alone.
    fn tell(&mut self, plan: StepPlan, output: Output) {
        let Output {
            sampled,
            scored,
            pooled,
        } = output;
        self.follow(&plan, &sampled);
        let sampling = batch::sampling(&plan).map(|row| row.id);
        let failed: Vec<RequestId> = {
            let sampled = sampling
                .zip(&sampled)
                .filter(|(_, token)| token.is_err())
                .map(|(id, _)| id);
            let scored = scored
                .iter()
                .filter(|(_, score)| score.is_err())
                .map(|(id, _)| *id);
            let pooled = pooled
                .iter()
                .filter(|share| share.sum.is_err())
                .map(|share| share.id);
            sampled.chain(scored).chain(pooled).collect()
        };
        for id in failed {
            self.fail(id, Fault::Step(NotFinite.to_string()));
        }
        for (id, score) in scored
            .into_iter()
            .filter_map(|(id, score)| Some((id, score.ok()?)))
        {
            self.clients.scored(id, score);
        }
        for Share { id, tokens, sum } in pooled {
            if let Ok(sum) = sum {
                self.clients.pooled(id, sum, tokens);
            }
        }
        let ids: Vec<RequestId> = plan.rows.iter().map(|row| row.id).collect();
        // The scheduler skips the rows of those that failed; it only needs their places taken.
        let sampled = sampled.into_iter().map(Result::unwrap_or_default).collect();
        let progress = self.scheduler.commit(plan, sampled);
        for id in ids {
            if let Some(event) = self.clients.whole_prompt(id) {
                self.send(id, event);
            }
        }
        for progress in progress {
            let id = progress.id;
            let mut tokens = progress.tokens.into_iter().peekable();
            while let Some(token) = tokens.next() {
                let is_last = progress.end.is_some() && tokens.peek().is_none();
                self.send(id, Event::Token { token, is_last });
            }
            if let Some(end) = progress.end {
                self.send(
                    id,
                    Event::Finished {
                        reason: end.reason,
                        cached_tokens: end.cached_tokens,
                        guessed: end.guessed,
                    },
                );
                self.end(id);
            }
        }
    }

    /// Takes the tokens of sequences into their grammars and bounds of reasoning, before they are committed.
    fn follow(&mut self, plan: &StepPlan, sampled: &[Result<Vec<Scored>, NotFinite>]) {
        for (row, tokens) in batch::sampling(plan).zip(sampled) {
            let (Ok(tokens), Some(view)) = (tokens, self.scheduler.view(row)) else {
                continue;
            };
            let text = tokens.iter().map(|scored| scored.token);
            let text: Vec<TokenId> = text
                .take_while(|token| !view.stop_tokens.contains(token))
                .collect();
            self.thoughts.take(row.id, text.iter().copied());
            match self.grammars.advance(row.id, &text) {
                None | Some(Ok(None)) => {}
                Some(Ok(Some(last))) => self.scheduler.complete(row.id, last),
                Some(Err(error)) => self.fail(row.id, Fault::Grammar(error.to_string())),
            }
        }
    }

    /// A failed step costs its requests; a lost device or rank the replica.
    fn recover(&mut self, plan: StepPlan, fault: TorchFault) -> ControlFlow<()> {
        self.counters.failed_steps += 1;
        let ids = self.scheduler.abandon(plan);
        warn!(requests = ids.len(), %fault, "a step failed");
        if self.is_fatal(&fault) {
            return self.lose(fault);
        }
        for id in ids {
            self.fail(id, Fault::Step(fault.message.clone()));
        }
        ControlFlow::Continue(())
    }

    /// With several ranks any fault is: the others may sit in a collective that this one left.
    fn is_fatal(&self, fault: &TorchFault) -> bool {
        fault.kills_device() || self.ranks.are_many()
    }

    fn lose(&mut self, fault: TorchFault) -> ControlFlow<()> {
        error!(%fault, "the replica is lost");
        self.loss = Some(fault.message);
        ControlFlow::Break(())
    }

    fn send(&mut self, id: RequestId, event: Event) {
        match self.clients.send(id, event) {
            Delivery::Done => {}
            Delivery::Parked => self.scheduler.hold(id),
            Delivery::Left => self.forget(id),
        }
    }

    fn deliver_parked(&mut self) {
        for (id, delivery) in self.clients.deliver_parked() {
            match delivery {
                Delivery::Done => self.scheduler.release(id),
                Delivery::Parked => {}
                Delivery::Left => self.forget(id),
            }
        }
        self.farewells.retain_mut(Supervisor::is_to_hear_more);
    }

    fn fail(&mut self, id: RequestId, fault: Fault) {
        self.clients.send(id, Event::Failed(fault));
        self.scheduler.abort(id);
        self.end(id);
    }

    /// The client left.
    fn forget(&mut self, id: RequestId) {
        self.scheduler.abort(id);
        self.end(id);
    }

    /// A request is over; its last events may still wait to be read.
    fn end(&mut self, id: RequestId) {
        self.grammars.dismiss(id);
        self.thoughts.dismiss(id);
        if let Some(digest) = self.clients.end(id) {
            self.bank.unpin(digest);
        }
    }

    fn load(&self) -> Load {
        if self.scheduler.has_work() {
            Load::Serving
        } else {
            Load::Idle
        }
    }

    fn stop(mut self) {
        self.inbox.close();
        let farewell = match self.loss.take() {
            Some(why) => {
                self.ranks.leave();
                // They go on from their last states: what is half done here is not to be kept.
                self.jobs.forget();
                self.turns.forget();
                Fault::ReplicaLost(why)
            }
            None => {
                self.keep_jobs();
                while let Some(done) = self.files.wait() {
                    self.filed(done);
                }
                if let Err(fault) = guard::torch(|| self.ranks.part()) {
                    warn!(%fault, "the other ranks were not told to end");
                }
                Fault::ShuttingDown
            }
        };
        // What came too late hears it too.
        while let Some(word) = self
            .inbox
            .try_next(&mut self.bank, &mut self.grammars, &mut self.files)
        {
            match word {
                Word::Command(Command::Generate(request, events)) => {
                    Client::new(&request, events, self.seed).refuse(farewell.clone());
                }
                Word::Command(Command::LoadAdapter(_, reply)) => drop(reply.send(Err(farewell.clone()))),
                Word::Command(Command::Learn(_, learn)) => learn.refuse(farewell.clone()),
                Word::NobodyLeft => break,
                _ => {}
            }
        }
        self.clients.shut_down(&farewell);
        self.learners.shut_down(&farewell);
        self.publish();
    }

    fn publish(&self) {
        let counts = self.scheduler.counts();
        let grammars = self.grammars.counts();
        let Counters {
            turns: _,
            steps,
            failed_steps,
            step_seconds,
            trained_tokens,
            train_steps,
            train_seconds,
            shared_passes,
            shared_slices,
        } = self.counters;
        self.stats.send_replace(Stats {
            running: counts.running as u32,
            waiting: counts.waiting as u32,
            parked: self.clients.parked() as u32,
            kv_blocks_total: counts.kv_blocks_total as u32,
            kv_blocks_used: counts.kv_blocks_used as u32,
            steps,
            prompt_tokens: counts.totals.prompt_tokens,
            generated_tokens: counts.totals.generated_tokens,
            prefix_queried_tokens: counts.totals.prefix_queried_tokens,
            prefix_hit_tokens: counts.totals.prefix_hit_tokens,
            preemptions: counts.totals.preemptions,
            guessed_tokens: counts.totals.guessed_tokens,
            accepted_tokens: counts.totals.accepted_tokens,
            failed_steps,
            step_seconds,
            resident_adapters: self.bank.residents(),
            adapter_bytes: self.bank.bytes(),
            adapter_loads: self.bank.loads(),
            trained_tokens,
            train_steps,
            train_seconds,
            shared_passes,
            shared_slices,
            grammar_requests: grammars.requests,
            grammar_compiles: grammars.compiles,
            grammar_compile_seconds: grammars.compile_seconds,
            grammar_masks: grammars.masks,
            grammar_mask_seconds: grammars.mask_seconds,
            grammar_wait_seconds: grammars.wait_seconds,
            training_jobs: self.jobs.len() as u32,
            draining: false,
        });
    }
}
