//! How a download shows itself: a bar on a terminal, now and then a line of the log elsewhere.

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use tandem_backend::size;
use tandem_core::bar;

const REDRAWN: Duration = Duration::from_millis(100);
const SAID: Duration = Duration::from_secs(10);

pub struct Progress {
    what: String,
    is_terminal: bool,
    began: Instant,
    shown: Cell<Option<Instant>>,
    /// Bytes of the files that were not there, of those that are here now, and that came by this process.
    total: Cell<u64>,
    have: Cell<u64>,
    came: Cell<u64>,
}

impl Progress {
    pub fn new(what: &str) -> Progress {
        Progress {
            what: what.to_owned(),
            is_terminal: io::stderr().is_terminal(),
            began: Instant::now(),
            shown: Cell::new(None),
            total: Cell::new(0),
            have: Cell::new(0),
            came: Cell::new(0),
        }
    }

    /// A file of so many bytes is missing.
    pub fn expect(&self, bytes: u64) {
        self.total.set(self.total.get() + bytes);
    }

    /// So many bytes of a file are here already.
    pub fn has(&self, bytes: u64) {
        self.have.set(self.have.get() + bytes);
        self.show();
    }

    /// A transfer ended early: what it had is counted anew by the next.
    pub fn lost(&self, bytes: u64) {
        self.have.set(self.have.get().saturating_sub(bytes));
    }

    pub fn came(&self, bytes: u64) {
        self.came.set(self.came.get() + bytes);
        self.has(bytes);
    }

    pub fn downloaded_bytes(&self) -> u64 {
        self.came.get()
    }

    /// The bar goes; what is said next stands on a line of its own.
    pub fn end(&self) {
        if self.is_terminal && self.shown.get().is_some() {
            write("\r\x1b[K");
        }
    }

    fn show(&self) {
        let period = if self.is_terminal { REDRAWN } else { SAID };
        let since = self.shown.get().unwrap_or(self.began);
        if since.elapsed() < period {
            return;
        }
        self.shown.set(Some(Instant::now()));
        let (have, total) = (self.have.get(), self.total.get());
        let per_second = self.came.get() as f64 / self.began.elapsed().as_secs_f64();
        let left = Duration::from_secs_f64(total.saturating_sub(have) as f64 / per_second.max(1.0));
        let text = format!(
            "{} of {}, {}/s, {} left",
            size(have),
            size(total),
            size(per_second as u64),
            bar::clock(left)
        );
        match self.is_terminal {
            true => write(&format!(
                "\r\x1b[K{} {} {text}",
                self.what,
                bar::drawn(have, total)
            )),
            false => tracing::info!(model = self.what, "downloading: {text}"),
        }
    }
}

fn write(text: &str) {
    // Nobody who looks on is no reason to stop.
    let mut out = io::stderr().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
