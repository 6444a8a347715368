//! Decides which tokens run next. Never sees a tensor, a clock or a socket.
//!
//! There is no prefill phase and no decode phase: a sequence has tokens, some of them computed, and catches up within
//! the step's token budget. A chunk of a prompt, a prefix hit, one more generated token and a recomputation after
//! preemption are the same move. Requests stand in line by their priority, those of one priority by what their API key and
//! their adapter were given ([`shares`]), and then in order of arrival: who stands before another never waits for that
//! one's blocks, place or budget.

#[cfg(test)]
mod fairness;
mod lookup;
mod plan;
mod sequence;
mod shares;
#[cfg(test)]
mod simulation;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub use lookup::Lookup;
pub use plan::{GroupPlan, Row, RowTable, StepPlan};
pub use sequence::View;
use sequence::{Flow, Running, Sequence, Turn, Waiting};
use shares::{GENERATED, Shares};

use crate::blocks::{BlockPool, Table};
use crate::id::RequestId;
use crate::message::{Fault, FinishReason, Generate, Guessed, LAST_PRIORITY, Scored};

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences that hold blocks at a time.
    pub max_num_seqs: usize,
    /// Tokens of one step.
    pub max_num_batched_tokens: usize,
    /// Prompt tokens of a step that also continues running sequences: bounds how long a newcomer's prompt keeps the
    /// others from their next token.
    pub max_prefill_beside_decode: usize,
    /// Requests that may wait for a place.
    pub max_waiting: usize,
    pub max_model_len: usize,
    /// How tokens are guessed, if they are.
    pub lookup: Option<Lookup>,
}

/// Tokens that a sequence has of a place before it may be asked to give it to a key that has none: what it costs to come back
/// is then little beside them.
const TURN: usize = 16;

/// Of so many steps in which somebody waits for an answer, what nobody waits for ([`LAST_PRIORITY`]) has one.
const YIELDING: u64 = 8;

pub struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    /// Both by priority, then by arrival.
    waiting: VecDeque<Waiting>,
    running: Vec<Running>,
    /// Of each priority of which there is somebody.
    shares: BTreeMap<i32, Shares>,
    arrivals: u64,
    /// Steps that were run.
    steps: u64,
    totals: Totals,
}

/// Whether those that wait come in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Line {
    Moves,
    /// There is no place for the first of it.
    Stands,
}

/// Whose prompt is computed next: a seat of those that run, a place of those that wait.
enum Next {
    Runs(usize),
    Waits(usize),
}

/// Counters that only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    pub prefix_queried_tokens: u64,
    pub prefix_hit_tokens: u64,
    pub preemptions: u64,
    pub guessed_tokens: u64,
    pub accepted_tokens: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub running: usize,
    pub waiting: usize,
    /// Of both: parked until [`Scheduler::release`].
    pub held: usize,
    pub kv_blocks_total: usize,
    pub kv_blocks_used: usize,
    pub totals: Totals,
}

/// What a step did for one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    pub id: RequestId,
    /// In order: the guesses that were right, and the token after them.
    pub tokens: Vec<Scored>,
    /// The sequence is gone from the scheduler.
    pub end: Option<End>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    pub reason: FinishReason,
    /// Prompt tokens that were not computed, thanks to a known prefix.
    pub cached_tokens: u32,
    pub guessed: Guessed,
}

impl Scheduler {
    pub fn new(limits: Limits, pool: BlockPool) -> Scheduler {
        let places = limits.max_num_seqs.min(limits.max_num_batched_tokens);
        assert!(
            places > 0 && limits.max_prefill_beside_decode > 0,
            "limits must be positive: {limits:?}"
        );
        assert!(
            limits.max_num_batched_tokens <= pool.groups().stride(),
            "{:?} have no blocks for a step of {limits:?}",
            pool.groups()
        );
        // Each running sequence can then have its next token in every step.
        let limits = Limits {
            max_num_seqs: places,
            ..limits
        };
        let totals = Totals::default();
        Scheduler {
            limits,
            pool,
            waiting: VecDeque::new(),
            running: vec![],
            shares: BTreeMap::new(),
            arrivals: 0,
            steps: 0,
            totals,
        }
    }

    pub fn max_model_len(&self) -> usize {
        self.limits.max_model_len
    }

    pub fn add(&mut self, request: Generate) -> Result<(), Fault> {
        let (prompt, asked) = (request.prompt.len(), request.max_tokens as usize);
        if prompt == 0 {
            return Err(Fault::Refused(
                "a prompt of 0 tokens cannot be continued".to_owned(),
            ));
        }
        let Limits {
            max_model_len,
            max_waiting,
            ..
        } = self.limits;
        if prompt + asked > max_model_len {
            let message = format!("a prompt of {prompt} tokens and {asked} more exceed {max_model_len}");
            return Err(Fault::Refused(message));
        }
        // The last token is never computed, except of a prompt that is only scored or pooled.
        let needed = self.pool.groups().most(prompt + asked.max(1) - 1);
        if needed > self.pool.total() {
            let total = self.pool.total();
            let message =
                format!("a prompt of {prompt} tokens and {asked} more need {needed} KV blocks of {total}");
            return Err(Fault::Refused(message));
        }
        // Those that it overtakes do not keep it out.
        let priority = request.priority;
        let before = self
            .waiting
            .partition_point(|waiting| waiting.seq.turn.priority <= priority);
        if before >= max_waiting {
            return Err(Fault::Overloaded {
                waiting: before as u32,
            });
        }
        let seq = Sequence::new(self.arrivals, request);
        self.arrivals += 1;
        self.wait(seq);
        Ok(())
    }

    /// Forgets a request. Says whether it was there.
    pub fn abort(&mut self, id: RequestId) -> bool {
        if let Some(place) = self.waiting.iter().position(|waiting| waiting.seq.id == id) {
            self.waiting.remove(place);
            return true;
        }
        let Some(seat) = self.running.iter().position(|running| running.seq.id == id) else {
            return false;
        };
        let Running { tables, .. } = self.running.remove(seat);
        self.pool.release(&tables);
        true
    }

    /// Parks a request: its client does not read, or its adapter is not there yet. Others may take its blocks.
    pub fn hold(&mut self, id: RequestId) {
        self.set_flow(id, Flow::Held);
    }

    pub fn release(&mut self, id: RequestId) {
        self.set_flow(id, Flow::Free);
    }

    /// What is known of a planned row's request; `None` when it was aborted since.
    pub fn view(&self, row: &Row) -> Option<View<'_>> {
        self.seat_of(row).map(|seat| self.running[seat].seq.view())
    }

    /// Does [`Scheduler::plan`] have something to do?
    pub fn has_work(&self) -> bool {
        self.sequences().any(|seq| seq.flow == Flow::Free)
    }

    /// The next step, or `None` when nothing can run. It reads at most `most_beside_decode` tokens of prompts where it keeps
    /// streams from their next token (the limits hold as well). A plan that is dropped instead of committed changes nothing but
    /// who is next.
    pub fn plan(&mut self, most_beside_decode: usize) -> Option<StepPlan> {
        let beside_decode = self.limits.max_prefill_beside_decode.min(most_beside_decode);
        for running in &mut self.running {
            running.planned = 0;
            // Of a plan that was dropped.
            running.drop_guesses(&mut self.pool);
        }
        let (running, waiting) = (&self.running, &self.waiting);
        self.shares.retain(|&priority, _| {
            let has = |seq: &Sequence| seq.turn.priority == priority;
            running.iter().any(|running| has(&running.seq)) || waiting.iter().any(|waiting| has(&waiting.seq))
        });
        self.grow();
        let rests = self.rests();
        let mut budget = self.limits.max_num_batched_tokens;
        let free = |running: &&mut Running| {
            running.seq.flow == Flow::Free && !(rests && running.seq.turn.priority == LAST_PRIORITY)
        };
        for running in self
            .running
            .iter_mut()
            .filter(free)
            .filter(|running| running.pending() == 1)
            .take(budget)
        {
            running.planned = 1;
            budget -= 1;
        }
        let mut prefilled = 0;
        let mut priorities = self.prefilling();
        if rests {
            priorities.remove(&LAST_PRIORITY);
        }
        for priority in priorities {
            let room = self
                .prefill_room(priority, beside_decode)
                .saturating_sub(prefilled)
                .min(budget);
            let (left, end) = self.prefill(priority, room);
            prefilled += room - left;
            budget -= room - left;
            if end == Line::Stands {
                break;
            }
        }
        self.guess(budget.min(beside_decode.saturating_sub(prefilled)));
        StepPlan::new(&self.running, self.pool.groups())
    }

    /// Whether what nobody waits for has no part in the next step.
    fn rests(&self) -> bool {
        let waited_for = |seq: &Sequence| seq.flow == Flow::Free && seq.turn.priority < LAST_PRIORITY;
        !self.steps.is_multiple_of(YIELDING) && self.sequences().any(waited_for)
    }

    /// Priorities of which somebody has a prompt to compute, or waits.
    fn prefilling(&self) -> BTreeSet<i32> {
        let running = self.running.iter().filter(|running| running.pending() > 1);
        let all = running
            .map(|running| &running.seq)
            .chain(self.waiting.iter().map(|waiting| &waiting.seq));
        all.filter(|seq| seq.flow == Flow::Free)
            .map(|seq| seq.turn.priority)
            .collect()
    }

    /// Prompt tokens that this step may have up to this priority: those that decode and do not stand behind it are kept from
    /// their next token meanwhile.
    fn prefill_room(&self, priority: i32, beside_decode: usize) -> usize {
        let mut decoding = self
            .running
            .iter()
            .filter(|running| running.planned == 1 && running.pending() == 1);
        // They are in line: the first decides.
        match decoding.next().map(|running| running.seq.turn.priority) {
            Some(first) if first <= priority => beside_decode,
            _ => self.limits.max_num_batched_tokens,
        }
    }

    /// Prompts of one priority, of those that run and of those that wait alike: each gets what it can use, who is next first.
    /// Returns what is left of the budget.
    fn prefill(&mut self, priority: i32, mut budget: usize) -> (usize, Line) {
        let mut line = Line::Moves;
        while budget > 0
            && let Some(next) = self.next(priority, line)
        {
            let seat = match next {
                Next::Runs(seat) => seat,
                Next::Waits(place) => match self.let_in(place) {
                    Some(seat) => seat,
                    None => {
                        // Neither a parked sequence nor one of a higher number must keep out one that could run, nor a key
                        // that has several places one that has none.
                        let victim = self.parked().or_else(|| self.last_behind(priority));
                        match victim.or_else(|| self.spare(place)) {
                            Some(victim) => self.preempt(victim),
                            // Nobody overtakes the first in line, so it starves only behind those of lower numbers.
                            None => line = Line::Stands,
                        }
                        continue;
                    }
                },
            };
            let running = &mut self.running[seat];
            running.planned = running.pending().min(budget);
            budget -= running.planned;
            let (payer, tokens) = (running.seq.payer, running.planned as u64);
            self.shares.entry(priority).or_default().charge(payer, tokens);
        }
        (budget, line)
    }

    /// Who is first in line of those of one priority that have a prompt to compute, and, while the line moves, of those
    /// that wait.
    fn next(&self, priority: i32, line: Line) -> Option<Next> {
        let may = |seq: &Sequence| seq.flow == Flow::Free && seq.turn.priority == priority;
        let running = self.running.iter().enumerate();
        let running = running
            .filter(|(_, running)| may(&running.seq) && running.planned == 0 && running.pending() > 1)
            .map(|(seat, running)| (self.rank(&running.seq), Next::Runs(seat)));
        let waiting = self.waiting.iter().enumerate();
        let waiting = waiting
            .filter(|(_, waiting)| line == Line::Moves && may(&waiting.seq))
            .map(|(place, waiting)| (self.rank(&waiting.seq), Next::Waits(place)));
        let first = running.chain(waiting).min_by_key(|(rank, _)| *rank);
        first.map(|(_, next)| next)
    }

    /// The lower, the nearer to the head of the line: its priority, what was given to its key and to its adapter, and its
    /// arrival.
    fn rank(&self, seq: &Sequence) -> (i32, (u64, u64), u64) {
        let Turn { priority, arrival } = seq.turn;
        let shares = self.shares.get(&priority);
        let given = shares.map_or((0, 0), |shares| shares.given(seq.payer));
        (priority, given, arrival)
    }

    /// Takes a step's outcome, in the plan's order for each row that samples: the guesses that were right, as far as the
    /// first that was not, and the token that was chosen after them.
    pub fn commit(&mut self, plan: StepPlan, sampled: Vec<Vec<Scored>>) -> Vec<Progress> {
        self.steps += 1;
        let mut sampled = sampled.into_iter();
        let mut progress = Vec::with_capacity(sampled.len());
        for row in &plan.rows {
            let chosen = match row.samples {
                0 => vec![],
                _ => sampled.next().expect("tokens for each row that samples"),
            };
            let Some(seat) = self.seat_of(row) else { continue };
            let running = &mut self.running[seat];
            let guesses = plan.guesses(row);
            running.advance(row.tokens.len() - guesses.len(), &mut self.pool);
            let mut told = Progress {
                id: row.id,
                tokens: vec![],
                end: None,
            };
            let mut reason = None;
            if row.samples == 0 {
                reason = running.ends_unsampled();
            }
            for token in chosen {
                // The one before it was a guess, and is in the cache.
                if !told.tokens.is_empty() {
                    running.advance(1, &mut self.pool);
                }
                reason = running.append(token.token);
                told.tokens.push(token);
                if reason.is_some() {
                    break;
                }
            }
            let accepted = told.tokens.len().saturating_sub(1);
            running.seq.judge_guesses(guesses.len(), accepted);
            running.drop_guesses(&mut self.pool);
            let tokens = told.tokens.len() as u64;
            self.totals.generated_tokens += tokens;
            let (priority, payer) = (running.seq.turn.priority, running.seq.payer);
            let shares = self.shares.entry(priority).or_default();
            shares.charge(payer, GENERATED * tokens);
            self.totals.guessed_tokens += guesses.len() as u64;
            self.totals.accepted_tokens += accepted as u64;
            told.end = reason.map(|reason| End {
                reason,
                cached_tokens: running.seq.cached.unwrap_or(0) as u32,
                guessed: running.seq.guessed,
            });
            if told.end.is_some() {
                let Running { tables, .. } = self.running.remove(seat);
                self.pool.release(&tables);
            }
            if told.end.is_some() || !told.tokens.is_empty() {
                progress.push(told);
            }
        }
        debug_assert_eq!(sampled.next(), None, "no token is left over");
        progress
    }

    /// The step failed: what its rows wrote is unknown, so they go. Returns their requests.
    pub fn abandon(&mut self, plan: StepPlan) -> Vec<RequestId> {
        self.steps += 1;
        plan.rows
            .iter()
            .map(|row| row.id)
            .filter(|&id| self.abort(id))
            .collect()
    }

    pub fn counts(&self) -> Counts {
        Counts {
            running: self.running.len(),
            waiting: self.waiting.len(),
            held: self.sequences().filter(|seq| seq.flow == Flow::Held).count(),
            kv_blocks_total: self.pool.total(),
            kv_blocks_used: self.pool.used(),
            totals: self.totals,
        }
    }

    /// Checks what must hold between two calls; for tests.
    pub fn audit(&self) -> Result<(), String> {
        self.pool
            .audit(self.running.iter().flat_map(|running| &running.tables))?;
        if self.running.len() > self.limits.max_num_seqs {
            return Err(format!(
                "{} sequences run, {} may",
                self.running.len(),
                self.limits.max_num_seqs
            ));
        }
        let running = self.running.iter().map(|running| running.seq.turn);
        let waiting = self.waiting.iter().map(|waiting| waiting.seq.turn);
        if !running.is_sorted_by(|a, b| a < b) || !waiting.is_sorted_by(|a, b| a < b) {
            return Err("sequences do not stand in line".to_owned());
        }
        self.running
            .iter()
            .try_for_each(|running| running.audit(&self.pool))
    }

    /// The sequence ends with the next `tokens` that are committed: its grammar allows nothing after them.
    pub fn complete(&mut self, id: RequestId, tokens: usize) {
        if let Some(running) = self.running.iter_mut().find(|running| running.seq.id == id) {
            running.seq.is_whole_after(tokens);
        }
    }

    fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        let running = self.running.iter().map(|running| &running.seq);
        running.chain(self.waiting.iter().map(|waiting| &waiting.seq))
    }

    fn set_flow(&mut self, id: RequestId, flow: Flow) {
        let running = self.running.iter_mut().map(|running| &mut running.seq);
        let mut all = running.chain(self.waiting.iter_mut().map(|waiting| &mut waiting.seq));
        if let Some(seq) = all.find(|seq| seq.id == id) {
            seq.flow = flow;
        }
    }

    /// A row's sequence stands where the plan saw it, unless something was aborted since.
    fn seat_of(&self, row: &Row) -> Option<usize> {
        let here = |seat: &usize| {
            self.running
                .get(*seat)
                .is_some_and(|running| running.seq.id == row.id)
        };
        Some(row.seat)
            .filter(here)
            .or_else(|| (0..self.running.len()).find(here))
    }

    /// Gives every sequence that goes on the blocks for its next tokens. When too few are left, a parked sequence loses
    /// its blocks, else the last in line.
    fn grow(&mut self) {
        let mut seat = 0;
        while let Some(running) = self.running.get_mut(seat) {
            let (computed, len) = (running.computed, running.seq.len());
            if running.seq.flow != Flow::Free || self.pool.extend(&mut running.tables, computed, len) {
                seat += 1;
            } else {
                let victim = self.parked().or_else(|| self.last()).expect("one runs");
                self.preempt(victim);
                // Those after the victim moved down by one.
                seat -= usize::from(victim < seat);
            }
        }
    }

    /// Guesses for sequences that decode, in line, with what is left of the step's tokens and of the blocks: a guess
    /// takes nothing from anybody.
    fn guess(&mut self, mut budget: usize) {
        let Some(lookup) = self.limits.lookup else { return };
        let decodes = |running: &Running| running.planned == 1 && running.pending() == 1;
        if self.running.iter().filter(|running| decodes(running)).count() > lookup.max_sequences {
            return;
        }
        let pool = &mut self.pool;
        for running in self.running.iter_mut().filter(|running| decodes(running)) {
            let mut guesses = running.seq.guess(&lookup);
            guesses.truncate(budget);
            let len = running.seq.len();
            if !pool.extend(&mut running.tables, running.computed, len + guesses.len()) {
                let end = running.tables.iter().map(Table::end).min();
                guesses.truncate(end.unwrap_or(0) * pool.block_size() - len);
            }
            budget -= guesses.len();
            running.planned += guesses.len();
            running.guesses = guesses;
        }
    }

    /// Gives one that waits a place and blocks, if there are; returns its seat.
    fn let_in(&mut self, place: usize) -> Option<usize> {
        let (tables, computed) = self.make_place(place)?;
        let Waiting { mut seq } = self.waiting.remove(place).expect("place is below the length");
        self.totals.prefix_queried_tokens += seq.len() as u64;
        self.totals.prefix_hit_tokens += computed as u64;
        if seq.cached.is_none() {
            self.totals.prompt_tokens += seq.prompt_len() as u64;
            seq.cached = Some(computed);
        }
        self.shares
            .entry(seq.turn.priority)
            .or_default()
            .let_in(seq.payer);
        let seat = self
            .running
            .partition_point(|running| running.seq.turn < seq.turn);
        let named = computed / self.pool.block_size();
        self.running.insert(
            seat,
            Running {
                let_in_at: seq.len(),
                seq,
                tables,
                computed,
                named,
                planned: 0,
                guesses: vec![],
            },
        );
        Some(seat)
    }

    /// Of those that run, the last in line.
    fn last(&self) -> Option<usize> {
        (0..self.running.len()).max_by_key(|&seat| self.rank(&self.running[seat].seq))
    }

    /// The same, where its number is higher.
    fn last_behind(&self, priority: i32) -> Option<usize> {
        self.last()
            .filter(|&seat| self.running[seat].seq.turn.priority > priority)
    }

    /// Where the key of one that waits has no place: the last in line of the key of its priority that has most of them, if those
    /// are several, it had its turn, and its place and blocks are enough.
    fn spare(&self, place: usize) -> Option<usize> {
        let waiting = &self.waiting[place].seq;
        let of_priority = || {
            let seats = 0..self.running.len();
            seats.filter(|&seat| self.running[seat].seq.turn.priority == waiting.turn.priority)
        };
        let key = |seat: usize| self.running[seat].seq.payer.key;
        let mut places: BTreeMap<u64, usize> = BTreeMap::new();
        of_priority().for_each(|seat| *places.entry(key(seat)).or_default() += 1);
        if places.contains_key(&waiting.payer.key) {
            return None;
        }
        let most = places.values().copied().max().filter(|&most| most > 1)?;
        let needed = self.pool.groups().most(waiting.len()) + self.reserve();
        let fits = |seat: &usize| {
            let running = &self.running[*seat];
            running.seq.len() >= running.let_in_at + TURN && needed <= self.pool.free() + running.n_blocks()
        };
        of_priority()
            .filter(|&seat| places[&key(seat)] == most)
            .filter(fits)
            .max_by_key(|&seat| self.rank(&self.running[seat].seq))
    }

    /// Blocks for what a waiting sequence has, and how many of its tokens a known prefix covers.
    fn make_place(&mut self, place: usize) -> Option<(Vec<Table>, usize)> {
        if self.running.len() >= self.limits.max_num_seqs {
            return None;
        }
        let block_size = self.pool.block_size();
        let reserve = self.reserve();
        let seq = &mut self.waiting[place].seq;
        let prefix = self.pool.lookup(seq.reusable(block_size));
        let computed = prefix.n_blocks() * block_size;
        let tables = self.pool.allocate(prefix, seq.len(), reserve)?;
        Some((tables, computed))
    }

    /// A block in each group for each running sequence: a newcomer that forces them out at once is no gain.
    fn reserve(&self) -> usize {
        self.running.len() * self.pool.groups().count()
    }

    /// The youngest parked sequence that holds blocks.
    fn parked(&self) -> Option<usize> {
        self.running
            .iter()
            .rposition(|running| running.seq.flow == Flow::Held)
    }

    /// Takes a sequence's blocks; it waits, and is computed again.
    fn preempt(&mut self, seat: usize) {
        let Running { seq, tables, .. } = self.running.remove(seat);
        self.pool.release(&tables);
        self.totals.preemptions += 1;
        self.wait(seq);
    }

    fn wait(&mut self, seq: Sequence) {
        let place = self
            .waiting
            .partition_point(|waiting| waiting.seq.turn < seq.turn);
        self.waiting.insert(place, Waiting { seq });
    }
}
