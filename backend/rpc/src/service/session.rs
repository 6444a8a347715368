//! One router's session: what it asks becomes commands to the engine, what the engine says becomes messages. Not here:
//! other sessions, gRPC's set-up.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures::stream::SelectAll;
use futures::{FutureExt, Stream, StreamExt};
use tandem_core::grammar::Grammar;
use tandem_core::id::{JobId, RequestId};
use tandem_core::job::{JobEvent, JobSpec};
use tandem_core::message::{Event, Fault, Generate};
use tandem_core::pooling::Pooling;
use tandem_core::replica::{Command, EVENT_QUEUE, JOB_EVENT_QUEUE};
use tandem_core::sampling::{RawSampling, Sampling};
use tandem_core::thinking::Budget;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Interval, MissedTickBehavior};
use tonic::{Status, Streaming};

use super::learners::Learners;
use super::source::{Kind, Link, Said, Source};
use super::{STATS_PERIOD, Shared};
use crate::codec::{self, Damaged};
use crate::wire;
use crate::wire::up::Say;

/// Events of one message at most; what is left goes in the next.
const MESSAGE_EVENTS: usize = 1024;
/// Notes that may wait for a router that takes in nothing; then nothing more is heard of it.
pub const NOTES: usize = 1024;
/// Streams of one session that have not ended.
const MAX_STREAMS: usize = 1 << 16;

/// From the session's reader to its writer.
pub enum Note {
    Source(Source),
    Pong(u64),
    /// The last word: what the router said cannot be obeyed.
    Refused(Status),
}

/// Streams that have not ended, by number, and the engine's ids of those that are requests.
type Open = HashMap<u64, (Arc<Link>, Option<RequestId>)>;

#[derive(Clone, Default)]
pub struct Links(Arc<Mutex<Open>>);

impl Links {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A job that this session started, until the session ends.
struct Job {
    /// Cancelled, perhaps before the engine knew it.
    cancelled: Arc<AtomicBool>,
}

/// Obeys a router until it leaves; `peer` is for the log.
pub async fn hear(
    shared: Arc<Shared>,
    mut inbound: Streaming<wire::Up>,
    links: Links,
    notes: mpsc::Sender<Note>,
    peer: String,
) {
    let mut ear = Ear {
        shared: shared.clone(),
        links,
        notes,
        jobs: HashMap::new(),
        learners: Learners::new(shared),
    };
    let refused = loop {
        match inbound.message().await {
            Ok(Some(up)) => match ear.obey(up).await {
                Ok(()) => {}
                Err(error) => break Some(Status::invalid_argument(error.to_string())),
            },
            Ok(None) => break None,
            Err(status) => break Some(status),
        }
    };
    let why = match &refused {
        Some(status) => status.message().to_owned(),
        None => "it said goodbye".to_owned(),
    };
    if let Some(status) = refused {
        // A writer that is gone tells nobody.
        drop(ear.notes.send(Note::Refused(status)).await);
    }
    ear.learners.end().await;
    // The writer sees the closed channel, drops its sources, and the engine aborts what nobody reads.
    tracing::info!(peer, why, "a router left");
}

struct Ear {
    shared: Arc<Shared>,
    links: Links,
    notes: mpsc::Sender<Note>,
    jobs: HashMap<JobId, Job>,
    learners: Learners,
}

impl Ear {
    async fn obey(&mut self, up: wire::Up) -> Result<(), Damaged> {
        let say = up
            .say
            .ok_or_else(|| Damaged("a command of an unknown kind".to_owned()))?;
        match say {
            Say::Generate(generate) => self.generate(generate).await?,
            Say::HangUp(stream) => {
                let left = self.links.lock().remove(&stream);
                if let Some((link, request)) = left {
                    link.hang_up();
                    if let Some(id) = request {
                        self.command(Command::Abort(id)).await;
                    }
                }
            }
            Say::Credit(wire::Credit { stream, events }) => {
                // The stream may have ended meanwhile.
                if let Some((link, _)) = self.links.lock().get(&stream) {
                    link.grant(events);
                }
            }
            Say::LoadAdapter(wire::LoadAdapter { stream, adapter }) => {
                let digest = codec::digest(&adapter)?;
                let (reply, answer) = oneshot::channel();
                self.open(stream, Link::new(1), None, Kind::Adapter(answer))
                    .await?;
                let shared = self.shared.clone();
                tokio::spawn(async move {
                    match shared.hooks.adapter(digest).await {
                        // An engine that is gone drops the reply.
                        Ok(adapter) => {
                            let command = Command::LoadAdapter(adapter, reply);
                            drop(shared.replica.commands.send(command).await);
                        }
                        Err(fault) => drop(reply.send(Err(fault))),
                    }
                });
            }
            Say::UnloadAdapter(adapter) => {
                let digest = codec::digest(&adapter)?;
                self.learners.forget_snapshot(digest);
                self.command(Command::UnloadAdapter(digest)).await;
            }
            Say::Learn(wire::Learn { stream, learner, ask }) => {
                let ask = ask.ok_or_else(|| Damaged("a word to a learner of an unknown kind".to_owned()))?;
                let answered = self.learners.obey(learner, ask).await?;
                self.open(stream, Link::new(1), None, Kind::Learner(answered))
                    .await?;
            }
            Say::StartJob(wire::StartJob {
                stream,
                credit,
                spec_json,
            }) => {
                let spec: JobSpec = codec::from_json(&spec_json)?;
                // Folders are this machine's to choose.
                let spec = JobSpec {
                    folder: PathBuf::new(),
                    ..spec
                };
                let (sender, events) = mpsc::channel(1);
                self.open(stream, Link::new(credit), None, Kind::Job(events))
                    .await?;
                if let Err(message) = spec.check(&self.shared.replica.info) {
                    // The channel is empty.
                    let _ = sender.try_send(codec::json(&JobEvent::Failed { message }));
                    return Ok(());
                }
                let cancelled = Arc::new(AtomicBool::new(false));
                let job = Job {
                    cancelled: cancelled.clone(),
                };
                self.jobs.insert(spec.id.clone(), job);
                tokio::spawn(run_job(self.shared.clone(), spec, cancelled, sender));
            }
            Say::CancelJob(id) => {
                let id = JobId::try_from(id).map_err(|error| Damaged(error.to_string()))?;
                if let Some(job) = self.jobs.get(&id) {
                    job.cancelled.store(true, Ordering::Release);
                }
                self.command(Command::CancelJob(id)).await;
            }
            // One that the engine does not know yet is asked for again.
            Say::PauseJob(id) => {
                let id = JobId::try_from(id).map_err(|error| Damaged(error.to_string()))?;
                self.command(Command::PauseJob(id)).await;
            }
            // A writer that is gone answers nothing.
            Say::Ping(number) => drop(self.notes.send(Note::Pong(number)).await),
        }
        Ok(())
    }

    async fn generate(&mut self, generate: wire::Generate) -> Result<(), Damaged> {
        let wire::Generate {
            stream,
            credit,
            prompt,
            adapter,
            sampling_json,
            max_tokens,
            stop_tokens,
            grammar_json,
            salt,
            pooling_json,
            priority,
            thinking_json,
            traceparent,
            key,
        } = generate;
        let adapter = adapter.as_deref().map(codec::digest).transpose()?;
        let salt = salt.as_deref().map(codec::digest).transpose()?;
        let sampling: RawSampling = codec::from_json(&sampling_json)?;
        let grammar: Option<Grammar> = grammar_json.as_deref().map(codec::from_json).transpose()?;
        let thinking: Option<Box<Budget>> = thinking_json.as_deref().map(codec::from_json).transpose()?;
        let pooling: Option<Pooling> = pooling_json.as_deref().map(codec::from_json).transpose()?;
        let (events, receiver) = mpsc::channel(EVENT_QUEUE);
        let (id, open) = self.shared.open();
        let link = Link::new(credit);
        let kind = Kind::Request {
            events: receiver,
            _open: open,
        };
        self.open(stream, link.clone(), Some(id), kind).await?;
        // An engine that is gone is as good as one that stops: the next request goes elsewhere, or waits.
        if self.shared.draining.load(Ordering::Acquire) || self.shared.replica.commands.is_closed() {
            // The channel is empty.
            let _ = events.try_send(Event::Failed(Fault::ShuttingDown));
            return Ok(());
        }
        let info = &self.shared.replica.info;
        let checked = Sampling::new(sampling, info.vocab_size)
            .map_err(|error| Fault::Refused(error.to_string()))
            .and_then(|sampling| {
                let request = Generate {
                    id,
                    prompt: prompt.into(),
                    adapter: None,
                    sampling,
                    grammar,
                    thinking,
                    priority,
                    key,
                    salt,
                    max_tokens,
                    pooling,
                    stop_tokens,
                    // One that cannot be read costs its spans.
                    trace: traceparent.and_then(|trace| trace.parse().ok()).map(Box::new),
                };
                request.check(info.vocab_size, info.max_model_len)?;
                Ok(request)
            });
        let request = match checked {
            Ok(request) => request,
            Err(fault) => {
                let _ = events.try_send(Event::Failed(fault));
                return Ok(());
            }
        };
        let request = |adapter| Generate { adapter, ..request };
        let Some(digest) = adapter else {
            self.command(Command::Generate(request(None), events)).await;
            return Ok(());
        };
        if let Some(snapshot) = self.learners.snapshot(digest) {
            self.command(Command::Generate(request(Some(snapshot)), events))
                .await;
            return Ok(());
        }
        let mut found = self.shared.hooks.adapter(digest);
        match (&mut found).now_or_never() {
            Some(Ok(adapter)) => {
                self.command(Command::Generate(request(Some(adapter)), events))
                    .await
            }
            Some(Err(fault)) => drop(events.try_send(Event::Failed(fault))),
            // It is fetched from the artifact store; others must not wait for it.
            None => {
                let commands = self.shared.replica.commands.clone();
                let request = request(None);
                tokio::spawn(async move {
                    match found.await {
                        Ok(_) if link.is_hung_up() => {}
                        Ok(adapter) => {
                            let request = Generate {
                                adapter: Some(adapter),
                                ..request
                            };
                            drop(commands.send(Command::Generate(request, events)).await);
                        }
                        Err(fault) => drop(events.try_send(Event::Failed(fault))),
                    }
                });
            }
        }
        Ok(())
    }

    async fn open(
        &self,
        stream: u64,
        link: Arc<Link>,
        request: Option<RequestId>,
        kind: Kind,
    ) -> Result<(), Damaged> {
        {
            let mut links = self.links.lock();
            if links.len() >= MAX_STREAMS {
                return Err(Damaged(format!("more than {MAX_STREAMS} open streams")));
            }
            match links.entry(stream) {
                Entry::Occupied(_) => return Err(Damaged(format!("stream {stream} is open already"))),
                Entry::Vacant(place) => place.insert((link.clone(), request)),
            };
        }
        // A writer that is gone drops the source, and with it the request.
        drop(self.notes.send(Note::Source(Source { stream, link, kind })).await);
        Ok(())
    }

    /// An engine that is gone drops the command, and with it the sender of its events: the stream closes.
    async fn command(&self, command: Command) {
        drop(self.shared.replica.commands.send(command).await);
    }
}

/// Fetches the job's folder, runs it in the engine, and lets events out once what they name can be found elsewhere. A
/// last word is an event; after `Kept`, and without one, the job goes on some other time.
async fn run_job(shared: Arc<Shared>, spec: JobSpec, cancelled: Arc<AtomicBool>, out: mpsc::Sender<Vec<u8>>) {
    let id = spec.id.clone();
    // Others', or this job's former life that has not seen yet that nobody listens.
    let Ok(_place) = shared.jobs.try_acquire() else {
        let message = "the backend trains as many jobs as it may (--max-training-jobs)".to_owned();
        let refused = codec::json(&JobEvent::Refused { message });
        return drop(out.send(refused).await);
    };
    let spec = match shared.hooks.job(spec).await {
        Ok(spec) => spec,
        Err(error) => {
            tracing::error!(job = %id, error, "the job's files cannot be fetched");
            // Another backend may fetch them: nothing that counts against the job.
            let message = "the backend could not fetch the job's files".to_owned();
            return drop(out.send(codec::json(&JobEvent::Refused { message })).await);
        }
    };
    let (sender, mut events) = mpsc::channel(JOB_EVENT_QUEUE);
    let start = Command::StartJob(Box::new(spec.clone()), sender);
    if shared.replica.commands.send(start).await.is_err() {
        return;
    }
    if cancelled.load(Ordering::Acquire) {
        // It came before the engine knew the job.
        drop(shared.replica.commands.send(Command::CancelJob(id.clone())).await);
    }
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            () = out.closed() => return,
        };
        let Some(event) = event else { return };
        let event: JobEvent = match shared.hooks.job_event(&spec, event).await {
            Ok(event) => event,
            Err(error) => return tracing::error!(job = %id, error, "what the job made cannot be kept"),
        };
        let json = match serde_json::to_vec(&event) {
            Ok(json) => json,
            Err(error) => return tracing::error!(job = %id, %error, "a job's event cannot be sent"),
        };
        if out.send(json).await.is_err() {
            return;
        }
    }
}

/// The session's messages to its router. Dropped, it aborts all that the session asked for.
pub struct Outgoing {
    shared: Arc<Shared>,
    inbox: mpsc::Receiver<Note>,
    links: Links,
    sources: SelectAll<Source>,
    look: Interval,
    stats: tokio::sync::watch::Receiver<tandem_core::stats::Stats>,
    /// What was last said of it; `None`: nothing yet.
    told_draining: Option<bool>,
    engine: Life,
}

#[derive(PartialEq, Eq)]
enum Life {
    Lives,
    Gone,
}

impl Outgoing {
    pub(super) fn new(shared: Arc<Shared>, inbox: mpsc::Receiver<Note>, links: Links) -> Outgoing {
        let mut look = tokio::time::interval(STATS_PERIOD);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Outgoing {
            stats: shared.replica.stats.clone(),
            shared,
            inbox,
            links,
            sources: SelectAll::new(),
            look,
            told_draining: None,
            engine: Life::Lives,
        }
    }

    fn put(&self, said: Said, down: &mut wire::Down) -> usize {
        if said.is_last() {
            self.links.lock().remove(&said.stream());
        }
        match said {
            Said::Events(stream, events) => {
                let events: Vec<_> = events.into_iter().map(codec::event).collect();
                let n_events = events.len();
                down.events.push(wire::Events { stream, events });
                n_events
            }
            Said::Job(stream, events_json) => {
                let n_events = events_json.len();
                down.job_events.push(wire::JobEvents { stream, events_json });
                n_events
            }
            Said::Adapter(stream, result) => {
                let result_json = codec::json(&result);
                down.adapters.push(wire::AdapterAnswer { stream, result_json });
                1
            }
            Said::Learner(stream, answer) => {
                let answer = Some(answer);
                down.learned.push(wire::LearnAnswer { stream, answer });
                1
            }
            Said::Closed(stream) => {
                down.closed.push(stream);
                1
            }
        }
    }

    fn look(&mut self, down: &mut wire::Down) {
        let changed = match self.stats.has_changed() {
            Ok(changed) => changed,
            Err(_) => {
                self.engine = Life::Gone;
                return;
            }
        };
        let draining = self.shared.draining.load(Ordering::Acquire);
        if changed || self.told_draining != Some(draining) {
            self.told_draining = Some(draining);
            self.stats.mark_unchanged();
            down.stats_json = Some(codec::json(&self.shared.stats()));
        }
    }
}

impl Stream for Outgoing {
    type Item = Result<wire::Down, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let mut down = wire::Down::default();
        loop {
            match this.inbox.poll_recv(context) {
                Poll::Ready(Some(Note::Source(source))) => this.sources.push(source),
                Poll::Ready(Some(Note::Pong(number))) => down.pong.push(number),
                Poll::Ready(Some(Note::Refused(status))) => return Poll::Ready(Some(Err(status))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => break,
            }
        }
        let mut n_events = 0;
        while n_events < MESSAGE_EVENTS {
            match this.sources.poll_next_unpin(context) {
                Poll::Ready(Some(said)) => n_events += this.put(said, &mut down),
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        while this.look.poll_tick(context).is_ready() {
            this.look(&mut down);
        }
        if down != wire::Down::default() {
            return Poll::Ready(Some(Ok(down)));
        }
        match this.engine == Life::Gone && this.sources.is_empty() {
            true => Poll::Ready(None),
            false => Poll::Pending,
        }
    }
}
