//! What the engine thread waits for: commands, finished adapter loads, compiled grammars, files of jobs read and written. Not here: what
//! they mean.

use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use tandem_core::replica::Command;
use tokio::sync::mpsc;

use super::files::{Done, Files};
use crate::bank::{AdapterBank, Loaded};
use crate::grammars::{Compiled, Grammars};

pub struct Inbox {
    commands: mpsc::Receiver<Command>,
}

pub enum Word {
    Command(Command),
    Loaded(Loaded),
    Compiled(Compiled),
    Filed(Done),
    /// Every handle of this replica is gone.
    NobodyLeft,
}

impl Inbox {
    pub fn new(commands: mpsc::Receiver<Command>) -> Inbox {
        Inbox { commands }
    }

    /// Is no command waiting? Cheap enough to ask between two training quanta.
    pub fn is_empty(&self) -> bool {
        self.commands.is_empty()
    }

    pub fn try_next(
        &mut self,
        bank: &mut AdapterBank,
        grammars: &mut Grammars,
        files: &mut Files,
    ) -> Option<Word> {
        match self.poll(bank, grammars, files, &mut Context::from_waker(Waker::noop())) {
            Poll::Ready(word) => Some(word),
            Poll::Pending => None,
        }
    }

    /// Sleeps until something is said, or for `patience`.
    pub fn wait(
        &mut self,
        bank: &mut AdapterBank,
        grammars: &mut Grammars,
        files: &mut Files,
        patience: Option<Duration>,
    ) -> Option<Word> {
        let until = patience.map(|patience| Instant::now() + patience);
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = Context::from_waker(&waker);
        loop {
            if let Poll::Ready(word) = self.poll(bank, grammars, files, &mut context) {
                return Some(word);
            }
            match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => std::thread::park(),
                Some(Duration::ZERO) => return None,
                Some(left) => std::thread::park_timeout(left),
            }
        }
    }

    /// No command is taken from now on; those already sent can still be heard.
    pub fn close(&mut self) {
        self.commands.close();
    }

    fn poll(
        &mut self,
        bank: &mut AdapterBank,
        grammars: &mut Grammars,
        files: &mut Files,
        context: &mut Context,
    ) -> Poll<Word> {
        if let Poll::Ready(loaded) = bank.poll_loaded(context) {
            return Poll::Ready(Word::Loaded(loaded));
        }
        if let Poll::Ready(compiled) = grammars.poll_compiled(context) {
            return Poll::Ready(Word::Compiled(compiled));
        }
        if let Poll::Ready(done) = files.poll_done(context) {
            return Poll::Ready(Word::Filed(done));
        }
        match self.commands.poll_recv(context) {
            Poll::Ready(Some(command)) => Poll::Ready(Word::Command(command)),
            Poll::Ready(None) => Poll::Ready(Word::NobodyLeft),
            Poll::Pending => Poll::Pending,
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}
