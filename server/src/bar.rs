//! A progress bar's parts.

use std::time::Duration;

const CHARS: u64 = 24;

/// `[======                  ]`
pub fn drawn(done: u64, total: u64) -> String {
    let filled =
        (u128::from(CHARS) * u128::from(done) / u128::from(total.max(1))).min(u128::from(CHARS)) as usize;
    let empty = CHARS as usize - filled;
    format!("[{}{}]", "=".repeat(filled), " ".repeat(empty))
}

/// `2:05`, `1:02:03`
pub fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match hours {
        0 => format!("{minutes}:{seconds:02}"),
        _ => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}
