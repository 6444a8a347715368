//! The grammars of running sequences: compiled by threads of their own, followed token by token. The masks of a step depend on
//! what was said before it and on its guesses only, so they are made by other threads while its forward runs. Not here: what
//! a grammar is (core), how a mask is used (sample).

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tandem_core::TokenId;
use tandem_core::grammar::{
    BadGrammar, Compiler, Grammar, Guide, GuideError, Mask, Next, STACK_BYTES, Vocabulary,
};
use tandem_core::id::{Digest, RequestId};
use tandem_core::message::Fault;
use tokio::sync::mpsc;

/// Compiled grammars that are kept for the next request; the one used longest ago goes first.
const MAX_KEPT: usize = 128;
/// Threads that compile: a slow grammar keeps at most the others that are not compiled yet waiting.
const COMPILERS: usize = 2;
/// Threads that make masks: 0.05 ms for most.
const MASKERS: usize = 2;

pub struct Grammars {
    vocabulary: Option<Arc<Vocabulary>>,
    to_compile: std_mpsc::Sender<Grammar>,
    compiled: mpsc::UnboundedReceiver<Compiled>,
    kept: Kept,
    /// Under way, and who waits.
    compiling: HashMap<Digest, Vec<RequestId>>,
    to_mask: std_mpsc::Sender<ToMask>,
    masked: std_mpsc::Receiver<Masked>,
    sequences: HashMap<RequestId, Sequence>,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub requests: u64,
    pub compiles: u64,
    pub compile_seconds: f64,
    pub masks: u64,
    pub mask_seconds: f64,
    /// Of the engine, for masks.
    pub wait_seconds: f64,
}

/// A finished compilation.
pub struct Compiled {
    digest: Digest,
    result: Result<Arc<Mutex<Guide>>, BadGrammar>,
    took: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    /// Its grammar is being compiled: comes out of [`Grammars::poll_compiled`].
    Awaited,
}

struct Sequence {
    /// Tokens that end its text.
    ends: Arc<[TokenId]>,
    state: State,
}

enum State {
    Compiling(Digest),
    /// Until a step chooses its next token.
    Idle(From),
    /// Its guide is with a thread.
    Masking,
    /// A mask for the next token, and for the one after each guess that may come.
    Ready(Guide, Vec<Mask>),
    Failed(GuideError),
}

struct ToMask {
    id: RequestId,
    from: From,
    guesses: Vec<TokenId>,
    ends: Arc<[TokenId]>,
}

enum From {
    /// The beginning of a grammar.
    Start(Arc<Mutex<Guide>>),
    Guide(Guide),
}

struct Masked {
    id: RequestId,
    result: Result<(Guide, Vec<Mask>), GuideError>,
    took: Duration,
}

impl Grammars {
    /// `eos_tokens`: as the model's files name them.
    pub fn new(vocabulary: Option<Arc<Vocabulary>>, eos_tokens: &[TokenId]) -> Grammars {
        let (to_compile, grammars) = std_mpsc::channel();
        let (report, compiled) = mpsc::unbounded_channel();
        let (to_mask, guides) = std_mpsc::channel();
        let (tell, masked) = std_mpsc::channel();
        let vocabulary = vocabulary.map(|known| Arc::new(known.as_ref().clone().with_ends(eos_tokens)));
        if let Some(vocabulary) = &vocabulary {
            let (grammars, guides) = (Arc::new(Mutex::new(grammars)), Arc::new(Mutex::new(guides)));
            let compiler = Arc::new(OnceLock::new());
            for _ in 0..COMPILERS {
                let (vocabulary, compiler) = (vocabulary.clone(), compiler.clone());
                let (grammars, report) = (grammars.clone(), report.clone());
                spawn("tandem-grammar", STACK_BYTES, move || {
                    compile_all(&vocabulary, &compiler, &grammars, &report);
                });
            }
            for _ in 0..MASKERS {
                let (guides, tell) = (guides.clone(), tell.clone());
                spawn("tandem-masks", 8 << 20, move || mask_all(&guides, &tell));
            }
        }
        Grammars {
            vocabulary,
            to_compile,
            compiled,
            kept: Kept::default(),
            compiling: HashMap::new(),
            to_mask,
            masked,
            sequences: HashMap::new(),
            counts: Counts::default(),
        }
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Those of a request's stop tokens that stand for the end of a text.
    pub fn ends_among(&self, stop_tokens: &[TokenId]) -> Vec<TokenId> {
        let known = self.vocabulary.as_ref();
        known.map_or_else(Vec::new, |vocabulary| vocabulary.ends_among(stop_tokens))
    }

    /// A sequence that must be a sentence of the grammar.
    pub fn admit(&mut self, id: RequestId, grammar: Grammar, ends: Vec<TokenId>) -> Result<Readiness, Fault> {
        if self.vocabulary.is_none() {
            let message = "this replica does not know its tokens' texts, and follows no grammar".to_owned();
            return Err(Fault::Grammar(message));
        }
        self.counts.requests += 1;
        let (digest, ends) = (grammar.digest(), Arc::<[TokenId]>::from(ends));
        if let Some(start) = self.kept.find(digest) {
            self.begin(id, start, ends);
            return Ok(Readiness::Ready);
        }
        let state = State::Compiling(digest);
        self.sequences.insert(id, Sequence { ends, state });
        let waiting = self.compiling.entry(digest).or_default();
        waiting.push(id);
        if waiting.len() == 1 {
            self.to_compile
                .send(grammar)
                .expect("the threads live as long as their orders can come");
        }
        Ok(Readiness::Awaited)
    }

    pub fn is_awaited_by(&self, id: RequestId) -> bool {
        let sequence = self.sequences.get(&id);
        sequence.is_some_and(|sequence| matches!(sequence.state, State::Compiling(_)))
    }

    /// The sequence is over.
    pub fn dismiss(&mut self, id: RequestId) {
        let Some(sequence) = self.sequences.remove(&id) else {
            return;
        };
        if let State::Compiling(digest) = sequence.state
            && let Some(waiting) = self.compiling.get_mut(&digest)
        {
            waiting.retain(|&other| other != id);
        }
    }

    /// The next finished compilation. Wakes the context's task when there is none yet.
    pub fn poll_compiled(&mut self, context: &mut Context) -> Poll<Compiled> {
        match self.compiled.poll_recv(context) {
            Poll::Ready(Some(compiled)) => Poll::Ready(compiled),
            // Without a vocabulary there are no threads.
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }

    /// Sequences that waited for it: they can run, or never will.
    pub fn compiled(&mut self, compiled: Compiled) -> Vec<(RequestId, Result<(), Fault>)> {
        let Compiled { digest, result, took } = compiled;
        self.counts.compiles += 1;
        self.counts.compile_seconds += took.as_secs_f64();
        let waiting = self.compiling.remove(&digest).unwrap_or_default();
        if let Ok(start) = &result {
            self.kept.keep(digest, start.clone());
        }
        let told = waiting.into_iter().map(|id| match &result {
            Ok(start) => {
                let ends = self.sequences[&id].ends.clone();
                self.begin(id, start.clone(), ends);
                (id, Ok(()))
            }
            Err(bad) => (
                id,
                Err(Fault::Grammar(format!("the grammar cannot be honoured: {bad}"))),
            ),
        });
        told.collect()
    }

    /// Begins to make the masks of a step: of these sequences, as far as they have a grammar, with what is guessed of them.
    pub fn begin_masks<'a>(&mut self, rows: impl Iterator<Item = (RequestId, &'a [TokenId])>) {
        for (id, guesses) in rows {
            let Some(Sequence { ends, state }) = self.sequences.get_mut(&id) else {
                continue;
            };
            *state = match std::mem::replace(state, State::Masking) {
                State::Idle(from) => {
                    let to_mask = ToMask {
                        id,
                        from,
                        guesses: guesses.to_vec(),
                        ends: ends.clone(),
                    };
                    self.to_mask
                        .send(to_mask)
                        .expect("the threads live as long as their orders can come");
                    State::Masking
                }
                other => other,
            };
        }
    }

    /// Waits for the masks of these sequences, as far as they have a grammar.
    pub fn await_masks(&mut self, ids: impl Iterator<Item = RequestId>) {
        let is_masking = |sequences: &HashMap<RequestId, Sequence>, id: &RequestId| {
            sequences
                .get(id)
                .is_some_and(|one| matches!(one.state, State::Masking))
        };
        let began = Instant::now();
        let mut awaited: HashSet<RequestId> = ids.filter(|id| is_masking(&self.sequences, id)).collect();
        let waits = !awaited.is_empty();
        while !awaited.is_empty() {
            let Masked { id, result, took } = self
                .masked
                .recv()
                .expect("the threads live as long as their orders can come");
            self.counts.masks += result.as_ref().map_or(1, |(_, masks)| masks.len() as u64);
            self.counts.mask_seconds += took.as_secs_f64();
            awaited.remove(&id);
            // One that was dismissed meanwhile is gone.
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.state = match result {
                    Ok((guide, masks)) => State::Ready(guide, masks),
                    Err(error) => State::Failed(error),
                };
            }
        }
        if waits {
            self.counts.wait_seconds += began.elapsed().as_secs_f64();
        }
    }

    /// What may come next, and after each guess that may come; tokens beyond these masks cannot be told. `None`: anything may
    /// come, or the sequence has failed, which [`Grammars::advance`] says.
    pub fn masks(&self, id: RequestId) -> Option<&[Mask]> {
        match &self.sequences.get(&id)?.state {
            State::Ready(_, masks) => Some(masks),
            State::Compiling(_) | State::Idle(_) | State::Masking | State::Failed(_) => None,
        }
    }

    /// Takes a step's tokens, no stop token among them. Says after how many of them nothing can follow. `None`: it has no
    /// grammar.
    pub fn advance(
        &mut self,
        id: RequestId,
        tokens: &[TokenId],
    ) -> Option<Result<Option<usize>, GuideError>> {
        let Sequence { state, .. } = self.sequences.get_mut(&id)?;
        let mut guide = match std::mem::replace(state, State::Masking) {
            State::Ready(guide, _) => guide,
            State::Failed(error) => return Some(Err(error)),
            State::Compiling(_) | State::Idle(_) | State::Masking => {
                panic!("a token was sampled without its mask")
            }
        };
        for (n, &token) in (1..).zip(tokens) {
            match guide.advance(token) {
                Ok(Next::Open) => {}
                Ok(Next::Complete) => return Some(Ok(Some(n))),
                Err(error) => return Some(Err(error)),
            }
        }
        *state = State::Idle(From::Guide(guide));
        Some(Ok(None))
    }

    fn begin(&mut self, id: RequestId, start: Arc<Mutex<Guide>>, ends: Arc<[TokenId]>) {
        let state = State::Idle(From::Start(start));
        self.sequences.insert(id, Sequence { ends, state });
    }
}

/// Compiled grammars, the last used last.
#[derive(Default)]
struct Kept(VecDeque<(Digest, Arc<Mutex<Guide>>)>);

impl Kept {
    fn find(&mut self, digest: Digest) -> Option<Arc<Mutex<Guide>>> {
        let place = self.0.iter().position(|(known, _)| *known == digest)?;
        let found = self.0.remove(place).expect("it was there");
        let start = found.1.clone();
        self.0.push_back(found);
        Some(start)
    }

    fn keep(&mut self, digest: Digest, start: Arc<Mutex<Guide>>) {
        self.0.push_back((digest, start));
        if self.0.len() > MAX_KEPT {
            self.0.pop_front();
        }
    }
}

fn spawn(name: &str, stack_bytes: usize, work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(stack_bytes);
    thread.spawn(work).expect("the system starts a thread");
}

fn next<T>(orders: &Mutex<std_mpsc::Receiver<T>>) -> Option<T> {
    // Held while waiting: whoever comes next waits for the lock instead.
    orders.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

fn compile_all(
    vocabulary: &Vocabulary,
    compiler: &OnceLock<Result<Compiler, String>>,
    grammars: &Mutex<std_mpsc::Receiver<Grammar>>,
    report: &mpsc::UnboundedSender<Compiled>,
) {
    while let Some(grammar) = next(grammars) {
        let began = Instant::now();
        let compile = || match compiler.get_or_init(|| Compiler::new(vocabulary)) {
            Ok(compiler) => compiler.compile(&grammar),
            Err(error) => Err(BadGrammar(error.clone())),
        };
        let result = catch_unwind(AssertUnwindSafe(compile));
        let result = result.unwrap_or_else(|_| Err(BadGrammar("it cannot be compiled".to_owned())));
        let compiled = Compiled {
            digest: grammar.digest(),
            result: result.map(|guide| Arc::new(Mutex::new(guide))),
            took: began.elapsed(),
        };
        if report.send(compiled).is_err() {
            return;
        }
    }
}

fn mask_all(guides: &Mutex<std_mpsc::Receiver<ToMask>>, tell: &std_mpsc::Sender<Masked>) {
    while let Some(to_mask) = next(guides) {
        let ToMask {
            id,
            from,
            guesses,
            ends,
        } = to_mask;
        let began = Instant::now();
        let mut guide = match from {
            From::Start(start) => start.lock().unwrap_or_else(PoisonError::into_inner).fork(),
            From::Guide(guide) => guide,
        };
        let result = masks(&mut guide, &guesses, &ends).map(|masks| (guide, masks));
        let took = began.elapsed();
        if tell.send(Masked { id, result, took }).is_err() {
            return;
        }
    }
}

/// Of the next token, and of the one after each guess, up to the first that may not come or that nothing follows.
fn masks(guide: &mut Guide, guesses: &[TokenId], ends: &[TokenId]) -> Result<Vec<Mask>, GuideError> {
    let mut masks = vec![guide.mask(ends)?];
    let mut ahead = None;
    for &guess in guesses {
        let may_come = masks.last().is_some_and(|mask| mask.allows(guess));
        if !may_come || ends.contains(&guess) {
            break;
        }
        let ahead = ahead.get_or_insert_with(|| guide.ahead());
        // What fails here does so again in the step of its own token, if that comes.
        let Ok(Next::Open) = ahead.advance(guess) else {
            break;
        };
        let Ok(mask) = ahead.mask(ends) else { break };
        masks.push(mask);
    }
    Ok(masks)
}
