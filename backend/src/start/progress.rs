//! How loading shows itself when it takes more than a second: a bar on a terminal, a line of the log now and then elsewhere.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use tandem_core::bar;
use tracing::info;

use super::memory::size;
use crate::weights::Checkpoint;

const FIRST: Duration = Duration::from_secs(1);
const REDRAWN: Duration = Duration::from_millis(200);
const SAID: Duration = Duration::from_secs(10);

/// Looks on until it is dropped.
pub struct Watch<'s> {
    over: &'s AtomicBool,
    thread: Option<ScopedJoinHandle<'s, ()>>,
}

/// `over` is false.
pub fn watch<'s>(scope: &'s Scope<'s, '_>, checkpoint: &'s Checkpoint, over: &'s AtomicBool) -> Watch<'s> {
    Watch {
        over,
        thread: Some(scope.spawn(|| look_on(checkpoint, over))),
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
        }
    }
}

fn look_on(checkpoint: &Checkpoint, over: &AtomicBool) {
    let (began, is_terminal) = (Instant::now(), io::stderr().is_terminal());
    let mut is_shown = false;
    let period = if is_terminal { REDRAWN } else { SAID };
    let mut next = if is_terminal { FIRST } else { SAID };
    while !over.load(Ordering::Relaxed) {
        let elapsed = began.elapsed();
        if elapsed < next {
            std::thread::park_timeout(next - elapsed);
            continue;
        }
        let (total, done) = checkpoint.progress();
        let text = format!("{} of {}", size(done), size(total));
        match is_terminal {
            true => draw(&format!("\r\x1b[Kloading {} {text}", bar::drawn(done, total))),
            false => info!("loading the weights: {text}"),
        }
        is_shown = is_terminal;
        next = elapsed + period;
    }
    if is_shown {
        draw("\r\x1b[K");
    }
}

fn draw(text: &str) {
    // Nobody who looks on is no reason to stop.
    let mut out = io::stderr().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
