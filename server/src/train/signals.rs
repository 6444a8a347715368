//! Ctrl-C and SIGTERM stop a run behind its step.

use std::io;
use std::sync::{Arc, OnceLock};

use crate::listen::{SIGINT, Signals};

pub fn signal_code(signal: &str) -> u8 {
    if signal == SIGINT { 130 } else { 143 }
}

/// Set by the first SIGINT or SIGTERM, with its name; the second ends the process.
pub(super) fn heed_signals() -> io::Result<Arc<OnceLock<&'static str>>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut signals = {
        let _entered = runtime.enter();
        Signals::new()?
    };
    let heard = Arc::new(OnceLock::new());
    let ours = heard.clone();
    let thread = std::thread::Builder::new().name("tandem-signals".to_owned());
    thread.spawn(move || {
        runtime.block_on(async {
            let _ = ours.set(signals.next().await);
            note!("\nstopping when this step is done; once more stops at once");
            let second = signals.next().await;
            tandem_backend::exit_at_once(signal_code(second).into())
        })
    })?;
    Ok(heard)
}
