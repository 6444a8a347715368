//! A progress bar's parts. Not here: where it is drawn.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_full_as_the_work_is_done() {
        for (done, total, filled) in [
            (0, 0, 0),
            (0, 9, 0),
            (1, 2, 12),
            (5, 5, 24),
            (9, 5, 24),
            (u64::MAX, u64::MAX, 24),
        ] {
            assert_eq!(
                drawn(done, total).matches('=').count(),
                filled,
                "{done} of {total}"
            );
        }
        assert_eq!(clock(Duration::from_secs(125)), "2:05");
        assert_eq!(clock(Duration::from_secs(3723)), "1:02:03");
    }
}
