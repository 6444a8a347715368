//! What commands say. A reader that has left (`| head -1`) ends no work; what finds no room (`> /full/file`) is told on the other
//! stream, once, and by the exit code.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// As `println!`, which panics instead.
macro_rules! say {
    ($($words:tt)*) => {
        $crate::output::say(format_args!("{}\n", format_args!($($words)*)))
    };
}

/// As `eprintln!`, likewise.
macro_rules! note {
    ($($words:tt)*) => {
        $crate::output::note(format_args!("{}\n", format_args!($($words)*)))
    };
}

static IS_LOST: AtomicBool = AtomicBool::new(false);

pub fn say(words: Arguments) {
    let mut out = io::stdout().lock();
    let Err(error) = out.write_fmt(words).and_then(|()| out.flush()) else {
        return;
    };
    if error.kind() != ErrorKind::BrokenPipe && !IS_LOST.swap(true, Ordering::Relaxed) {
        note!("tandem: what it says cannot be written: {error}");
    }
}

pub fn note(words: Arguments) {
    // There is nobody else to tell.
    let _ = io::stderr().lock().write_fmt(words);
}

/// Whether something was said that could not be written.
pub fn is_lost() -> bool {
    IS_LOST.load(Ordering::Relaxed)
}
