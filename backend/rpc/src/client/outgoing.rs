//! The session's commands as the connection reads them: straight off the handle's channel. Not here: answers.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::Stream;
use tandem_core::job::JobSpec;
use tandem_core::message::Generate;
use tandem_core::replica::Command;
use tokio::sync::mpsc;

use super::table::Table;
use crate::wire::up::Say;
use crate::wire::{self, Up};
use crate::{codec, learn};

/// Ends with [`Command::Stop`], with the last handle, or with the session; the command channel closes with it.
pub struct Outgoing {
    commands: mpsc::Receiver<Command>,
    /// Credits, goodbyes and probes, which the reader of the session wants sent.
    wishes: mpsc::UnboundedReceiver<Up>,
    table: Arc<Table>,
    /// The data folder.
    root: PathBuf,
}

impl Outgoing {
    pub fn new(
        commands: mpsc::Receiver<Command>,
        wishes: mpsc::UnboundedReceiver<Up>,
        table: Arc<Table>,
        root: PathBuf,
    ) -> Outgoing {
        Outgoing {
            commands,
            wishes,
            table,
            root,
        }
    }

    /// `None`: nothing of it travels.
    fn encode(&self, command: Command) -> Option<Say> {
        let table = &self.table;
        Some(match command {
            Command::Generate(generate, events) => {
                let (stream, credit) = table.request(&generate, events)?;
                let Generate {
                    id: _,
                    prompt,
                    adapter,
                    sampling,
                    grammar,
                    thinking,
                    priority,
                    key,
                    salt,
                    max_tokens,
                    pooling,
                    stop_tokens,
                    trace,
                } = generate;
                Say::Generate(wire::Generate {
                    stream,
                    credit,
                    prompt: prompt.to_vec(),
                    adapter: adapter.map(|adapter| adapter.digest.0.to_vec()),
                    sampling_json: codec::json(&sampling),
                    max_tokens,
                    stop_tokens,
                    grammar_json: grammar.as_ref().map(codec::json),
                    salt: salt.map(|salt| salt.0.to_vec()),
                    pooling_json: pooling.as_ref().map(codec::json),
                    priority,
                    key,
                    thinking_json: thinking.as_ref().map(codec::json),
                    traceparent: trace.map(|trace| trace.to_string()),
                })
            }
            Command::Abort(id) => Say::HangUp(table.forget(id)?),
            Command::LoadAdapter(adapter, reply) => Say::LoadAdapter(wire::LoadAdapter {
                stream: table.adapter(reply)?,
                adapter: adapter.digest.0.to_vec(),
            }),
            Command::UnloadAdapter(digest) => Say::UnloadAdapter(digest.0.to_vec()),
            Command::StartJob(spec, events) => {
                let (stream, credit) = table.job(events)?;
                // A folder of this machine means nothing there.
                let spec = JobSpec {
                    folder: Default::default(),
                    ..*spec
                };
                Say::StartJob(wire::StartJob {
                    stream,
                    credit,
                    spec_json: codec::json(&spec),
                })
            }
            Command::CancelJob(id) => Say::CancelJob(id.to_string()),
            Command::PauseJob(id) => Say::PauseJob(id.to_string()),
            Command::Learn(id, learn) => {
                let (ask, waiting) = learn::ask(learn, &self.root)?;
                Say::Learn(wire::Learn {
                    stream: table.learn(waiting)?,
                    learner: id.0,
                    ask: Some(ask),
                })
            }
            Command::Stop => return None,
        })
    }
}

impl Stream for Outgoing {
    type Item = Up;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Up>> {
        match self.wishes.poll_recv(context) {
            Poll::Ready(Some(up)) => return Poll::Ready(Some(up)),
            Poll::Ready(None) => {
                self.commands.close();
                return Poll::Ready(None);
            }
            Poll::Pending => {}
        }
        loop {
            match self.commands.poll_recv(context) {
                Poll::Ready(Some(Command::Stop) | None) => {
                    self.commands.close();
                    return Poll::Ready(None);
                }
                Poll::Ready(Some(command)) => {
                    if let Some(say) = self.encode(command) {
                        return Poll::Ready(Some(Up { say: Some(say) }));
                    }
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}
