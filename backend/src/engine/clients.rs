//! Who waits for what a request produces: event channels, events not delivered yet, adapters held. Not here: tokens
//! (core), adapters (bank).

use std::collections::{HashMap, VecDeque};

use tandem_core::id::{AdapterDigest, AdapterRef, RequestId};
use tandem_core::message::{Event, Fault, Generate, Scored};
use tandem_core::replica::AdapterInfo;
use tandem_core::rng;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use super::traced::Traced;
use crate::pool::Pool;

/// Stream of [`rng`] that seeds of requests without one are drawn from.
const SEEDS: u64 = 1;

pub struct Client {
    events: mpsc::Sender<Event>,
    /// Not empty: its client did not read, its sequence is parked.
    undelivered: VecDeque<Event>,
    adapter: AdapterUse,
    /// Prompt log-probabilities so far, when they were asked and not yet sent.
    prompt: Option<Vec<Option<Scored>>>,
    prompt_tokens: usize,
    /// Of a prompt that becomes a vector, until it is one.
    pool: Option<Pool>,
    seed: u64,
    life: Life,
    traced: Option<Traced>,
}

enum AdapterUse {
    Base,
    Awaited(AdapterRef),
    Pinned(AdapterDigest),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Lives,
    /// Over in the engine; stays here until its last events are read.
    Ended,
}

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    Done,
    /// Kept; the sequence waits.
    Parked,
    /// The client is gone.
    Left,
}

impl Client {
    pub fn new(request: &Generate, events: mpsc::Sender<Event>, engine_seed: u64) -> Client {
        let sampling = &request.sampling;
        let adapter = match &request.adapter {
            None => AdapterUse::Base,
            Some(adapter) => AdapterUse::Awaited(adapter.clone()),
        };
        Client {
            events,
            undelivered: VecDeque::new(),
            adapter,
            // The first token has nothing before it.
            prompt: sampling.prompt_logprobs().map(|_| vec![None]),
            prompt_tokens: request.prompt.len(),
            pool: request
                .pooling
                .map(|pooling| Pool::new(pooling, request.prompt.len())),
            seed: sampling
                .seed()
                .unwrap_or_else(|| rng::bits(engine_seed, SEEDS, request.id.0)),
            life: Life::Lives,
            traced: request.trace.as_deref().copied().map(Traced::new),
        }
    }

    /// Its only word to a request that was not taken: its channel is empty, unless nobody listens.
    pub fn refuse(&self, fault: Fault) {
        let _ = self.events.try_send(Event::Failed(fault));
    }

    fn send(&mut self, event: Event) -> Delivery {
        self.undelivered.push_back(event);
        self.deliver()
    }

    fn deliver(&mut self) -> Delivery {
        while let Some(event) = self.undelivered.pop_front() {
            match self.events.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Full(event)) => {
                    self.undelivered.push_front(event);
                    return Delivery::Parked;
                }
                Err(TrySendError::Closed(_)) => {
                    self.undelivered.clear();
                    return Delivery::Left;
                }
            }
        }
        Delivery::Done
    }
}

#[derive(Default)]
pub struct Clients {
    all: HashMap<RequestId, Client>,
    /// Those with undelivered events.
    parked: Vec<RequestId>,
    replies: HashMap<AdapterDigest, Vec<oneshot::Sender<Result<AdapterInfo, Fault>>>>,
}

impl Clients {
    pub fn has(&self, id: RequestId) -> bool {
        self.all.contains_key(&id)
    }

    pub fn insert(&mut self, id: RequestId, client: Client) {
        self.all.insert(id, client);
    }

    pub fn seed(&self, id: RequestId) -> u64 {
        self.all.get(&id).expect("a planned request has a client").seed
    }

    pub fn traced(&mut self, id: RequestId) -> Option<&mut Traced> {
        self.all.get_mut(&id)?.traced.as_mut()
    }

    pub fn send(&mut self, id: RequestId, event: Event) -> Delivery {
        let lives = |client: &&mut Client| client.life == Life::Lives;
        let Some(client) = self.all.get_mut(&id).filter(lives) else {
            return Delivery::Left;
        };
        let delivery = client.send(event);
        if delivery == Delivery::Parked && !self.parked.contains(&id) {
            self.parked.push(id);
        }
        delivery
    }

    /// Tries parked clients again. Those of ended requests are not reported: nothing waits for them.
    pub fn deliver_parked(&mut self) -> Vec<(RequestId, Delivery)> {
        let mut changed = vec![];
        for id in std::mem::take(&mut self.parked) {
            let Some(client) = self.all.get_mut(&id) else {
                continue;
            };
            let delivery = client.deliver();
            match (delivery, client.life) {
                (Delivery::Parked, _) => self.parked.push(id),
                (_, Life::Ended) => drop(self.all.remove(&id)),
                (_, Life::Lives) => changed.push((id, delivery)),
            }
        }
        changed
    }

    pub fn is_any_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    pub fn parked(&self) -> usize {
        self.parked.len()
    }

    /// Requests whose clients no longer listen.
    pub fn left(&self) -> Vec<RequestId> {
        let left = self.all.iter().filter(|(_, client)| client.events.is_closed());
        left.map(|(id, _)| *id).collect()
    }

    /// Ends a request. Returns the adapter it held.
    pub fn end(&mut self, id: RequestId) -> Option<AdapterDigest> {
        let client = self.all.get_mut(&id)?;
        client.life = Life::Ended;
        client.traced = None;
        let adapter = match std::mem::replace(&mut client.adapter, AdapterUse::Base) {
            AdapterUse::Pinned(digest) => Some(digest),
            AdapterUse::Base | AdapterUse::Awaited(_) => None,
        };
        if client.undelivered.is_empty() || client.events.is_closed() {
            self.all.remove(&id);
            self.parked.retain(|&parked| parked != id);
        }
        adapter
    }

    pub fn adapter(&self, id: RequestId) -> Option<&AdapterRef> {
        match &self.all.get(&id)?.adapter {
            AdapterUse::Awaited(adapter) => Some(adapter),
            AdapterUse::Base | AdapterUse::Pinned(_) => None,
        }
    }

    /// The adapter a request waited for is held for it now.
    pub fn pinned(&mut self, id: RequestId) {
        let client = self.all.get_mut(&id).expect("it has a client");
        if let AdapterUse::Awaited(adapter) = &client.adapter {
            client.adapter = AdapterUse::Pinned(adapter.digest);
        }
    }

    /// Requests that wait for an adapter, in the order of their ids: the order they came in.
    pub fn awaiting(&self, digest: AdapterDigest) -> Vec<RequestId> {
        let awaits = |client: &Client| matches!(&client.adapter, AdapterUse::Awaited(adapter) if adapter.digest == digest);
        let mut ids: Vec<RequestId> = self
            .all
            .iter()
            .filter(|(_, client)| awaits(client))
            .map(|(id, _)| *id)
            .collect();
        ids.sort_unstable();
        ids
    }

    /// Does a request wait for the adapter, or somebody who asked to load it and is still there?
    pub fn is_awaited(&self, digest: AdapterDigest) -> bool {
        let asked = self.replies.get(&digest);
        !self.awaiting(digest).is_empty()
            || asked.is_some_and(|replies| replies.iter().any(|reply| !reply.is_closed()))
    }

    pub fn await_adapter(
        &mut self,
        digest: AdapterDigest,
        reply: oneshot::Sender<Result<AdapterInfo, Fault>>,
    ) {
        self.replies.entry(digest).or_default().push(reply);
    }

    pub fn answer_adapter(&mut self, digest: AdapterDigest, info: Result<AdapterInfo, Fault>) {
        for reply in self.replies.remove(&digest).unwrap_or_default() {
            // Whoever asked may be gone.
            let _ = reply.send(info.clone());
        }
    }

    /// The log-probability of the next prompt token.
    pub fn scored(&mut self, id: RequestId, score: Scored) {
        if let Some(prompt) = self.all.get_mut(&id).and_then(|client| client.prompt.as_mut()) {
            prompt.push(Some(score));
        }
    }

    /// The sum of states of so many more prompt tokens.
    pub fn pooled(&mut self, id: RequestId, sum: Vec<f64>, tokens: usize) {
        if let Some(pool) = self.all.get_mut(&id).and_then(|client| client.pool.as_mut()) {
            pool.add(sum, tokens);
        }
    }

    /// The prompt's log-probabilities, or its vector, once: when all of its tokens are through.
    pub fn whole_prompt(&mut self, id: RequestId) -> Option<Event> {
        let client = self.all.get_mut(&id)?;
        if let Some(vector) = client.pool.as_ref().and_then(Pool::whole) {
            client.pool = None;
            return Some(Event::Pooled(vector));
        }
        let prompt = client
            .prompt
            .take_if(|prompt| prompt.len() == client.prompt_tokens);
        prompt.map(Event::Prompt)
    }

    /// Tells everybody why it ends, as far as they read.
    pub fn shut_down(&mut self, farewell: &Fault) {
        for (_, mut client) in self.all.drain().filter(|(_, client)| client.life == Life::Lives) {
            let _ = client.send(Event::Failed(farewell.clone()));
        }
        for (_, replies) in self.replies.drain() {
            replies
                .into_iter()
                .for_each(|reply| drop(reply.send(Err(farewell.clone()))));
        }
    }
}
