//! What answers must be, compiled before a request is taken: what cannot be honoured is refused with its reason. Not here:
//! how a grammar is followed (backend).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tandem_core::grammar::{BadGrammar, Compiler, Grammar, STACK_BYTES};
use tandem_core::id::Digest;
use tandem_core::replica::ReplicaInfo;
use tandem_text::Tokenizer;
use tokio::sync::{Semaphore, oneshot};

use crate::Router;
use crate::api::{Constraint, Form, RouterError};

/// Grammars that are compiled at a time: who sends many slow ones keeps other grammars waiting, and nothing else.
const AT_ONCE: usize = 2;
/// Verdicts that are remembered; when there are more, all are forgotten.
const MAX_VERDICTS: usize = 4096;

pub(crate) struct Grammars {
    /// Made at the first use: it takes a moment, and not everybody asks for grammars.
    compiler: Arc<OnceLock<Result<Compiler, String>>>,
    tokenizer: Tokenizer,
    eos_tokens: Vec<u32>,
    places: Arc<Semaphore>,
    verdicts: Mutex<HashMap<Digest, Result<(), BadGrammar>>>,
}

impl Grammars {
    pub fn new(tokenizer: &Tokenizer, info: &ReplicaInfo) -> Grammars {
        Grammars {
            compiler: Arc::default(),
            tokenizer: tokenizer.clone(),
            eos_tokens: info.eos_tokens.clone(),
            places: Arc::new(Semaphore::new(AT_ONCE)),
            verdicts: Mutex::default(),
        }
    }

    async fn verdict(&self, grammar: &Grammar) -> Result<(), BadGrammar> {
        let digest = grammar.digest();
        let known = |all: &HashMap<_, _>| all.get(&digest).cloned();
        if let Some(verdict) = known(&self.lock()) {
            return verdict;
        }
        let place = self.places.clone().acquire_owned().await;
        // Whoever was before may have asked the same.
        if let Some(verdict) = known(&self.lock()) {
            return verdict;
        }
        let (compiler, grammar) = (self.compiler.clone(), grammar.clone());
        let (tokenizer, eos_tokens) = (self.tokenizer.clone(), self.eos_tokens.clone());
        let (reply, answer) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("tandem-grammar".to_owned())
            .stack_size(STACK_BYTES);
        let compile = move || {
            let _place = place;
            let made = || Compiler::new(&tokenizer.vocabulary().with_ends(&eos_tokens));
            let verdict = match compiler.get_or_init(made) {
                Ok(compiler) => compiler.compile(&grammar).map(drop),
                Err(error) => Err(BadGrammar(error.clone())),
            };
            // Whoever asked may be gone.
            let _ = reply.send(verdict);
        };
        if let Err(error) = thread.spawn(compile) {
            return Err(BadGrammar(format!("no thread could be started: {error}")));
        }
        let Ok(verdict) = answer.await else {
            return Err(BadGrammar("it cannot be compiled".to_owned()));
        };
        let mut verdicts = self.lock();
        if verdicts.len() >= MAX_VERDICTS {
            verdicts.clear();
        }
        verdicts.insert(digest, verdict.clone());
        verdict
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, Result<(), BadGrammar>>> {
        self.verdicts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Router {
    /// A grammar that every replica can follow, or why not.
    pub(crate) async fn checked(&self, constraint: Constraint) -> Result<Grammar, RouterError> {
        let Constraint { param, form } = constraint;
        let refused =
            |bad: BadGrammar| RouterError::invalid(&param, format!("{param} cannot be honoured: {bad}"));
        if !self.info().grammars {
            let why = "the backends of this server do not follow grammars; start them with the version of this router";
            return Err(refused(BadGrammar(why.to_owned())));
        }
        let grammars = &self.0.grammars;
        let grammar = match form {
            Form::Grammar(grammar) => grammar,
            Form::Format(format) => {
                Grammar::format(&format, &grammars.tokenizer.special_tokens()).map_err(refused)?
            }
        };
        grammars.verdict(&grammar).await.map_err(refused)?;
        Ok(grammar)
    }
}
